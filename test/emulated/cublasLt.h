// cuBLASLt for the emulated device: column-major products as its documentation defines them, by plain loops in double. What the
// documentation refuses is refused here, so that a test of descriptors means something. Sources: the cuBLAS 13 documentation, sections
// cublasLtMatmul() (tables of types, "To use FP8 kernels", "To use FP4 kernels") and "Narrow precision data types usage", and cublasLt.h.
// Small floats are decoded by this file's own lines, not by the project's.
#pragma once
#include "cuda_runtime.h"
#include <map>

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16BF = 14, CUDA_R_8F_E4M3 = 28, CUDA_R_8F_E5M2 = 29, CUDA_R_4F_E2M1 = 33 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F };
enum cublasLtPointerMode_t { CUBLASLT_POINTER_MODE_HOST, CUBLASLT_POINTER_MODE_DEVICE };
enum cublasLtMatmulMatrixScale_t { CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F, CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3, CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0,
                                   CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F };
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_POINTER_MODE = 2, CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER = 17,
    CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, CUBLASLT_MATMUL_DESC_FAST_ACCUM = 25, CUBLASLT_MATMUL_DESC_A_SCALE_MODE = 31, CUBLASLT_MATMUL_DESC_B_SCALE_MODE
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK
};
enum { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
struct EmulatedLayout { cudaDataType_t type; uint64_t rows, cols; int64_t ld; };
struct EmulatedDesc {
    std::map<int, int> attributes;
    const void* scale[2] = {};                                  // of A and of B
};
struct EmulatedPreference { uint32_t align[4] = {256, 256, 256, 256}; };
typedef void* cublasLtHandle_t;
typedef EmulatedDesc* cublasLtMatmulDesc_t;
typedef EmulatedLayout* cublasLtMatrixLayout_t;
typedef EmulatedPreference* cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t { int none; };
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; cublasStatus_t state; };

inline const char* cublasLtGetStatusString(cublasStatus_t s) { return s == CUBLAS_STATUS_NOT_SUPPORTED ? "not supported" : "invalid value"; }
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* h) { return *h = nullptr, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t, cudaDataType_t) { return *d = new EmulatedDesc, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void* v, size_t size) {
    bool pointer = a == CUBLASLT_MATMUL_DESC_A_SCALE_POINTER || a == CUBLASLT_MATMUL_DESC_B_SCALE_POINTER;
    if (size != (pointer ? sizeof(void*) : a == CUBLASLT_MATMUL_DESC_FAST_ACCUM ? 1 : sizeof(int))) return CUBLAS_STATUS_INVALID_VALUE;
    if (pointer) memcpy(&d->scale[a == CUBLASLT_MATMUL_DESC_B_SCALE_POINTER], v, size);
    else memcpy(&d->attributes[a], v, size);
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType_t type, uint64_t rows, uint64_t cols, int64_t ld) {
    return *l = new EmulatedLayout{type, rows, cols, ld}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) { return *p = new EmulatedPreference, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t a, const void* v, size_t size) {
    if (a >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES && a <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES)
        memcpy(&p->align[a - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], v, size);
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { return delete p, CUBLAS_STATUS_SUCCESS; }

inline int emulated_bits(cudaDataType_t t) { return t == CUDA_R_64F ? 64 : t == CUDA_R_32F ? 32 : t == CUDA_R_16BF ? 16 : t == CUDA_R_4F_E2M1 ? 4 : 8; }
inline int emulated_mode(const EmulatedDesc* d, int side) {
    auto found = d->attributes.find(side ? CUBLASLT_MATMUL_DESC_B_SCALE_MODE : CUBLASLT_MATMUL_DESC_A_SCALE_MODE);
    return found == d->attributes.end() ? 0 : found->second;
}

// What the documentation allows. `align`: bytes on which A, B, C and D start at least.
inline cublasStatus_t emulated_check(cublasLtMatmulDesc_t d, const EmulatedLayout* a, const EmulatedLayout* b, const EmulatedLayout* c, const EmulatedLayout* out, const uint32_t* align) {
    bool ta = d->attributes[CUBLASLT_MATMUL_DESC_TRANSA] == CUBLAS_OP_T, tb = d->attributes[CUBLASLT_MATMUL_DESC_TRANSB] == CUBLAS_OP_T;
    uint64_t m = ta ? a->cols : a->rows, n = tb ? b->rows : b->cols, k = ta ? a->rows : a->cols;
    if ((tb ? b->cols : b->rows) != k || c->rows != m || c->cols != n || out->rows != m || out->cols != n) return CUBLAS_STATUS_INVALID_VALUE;
    for (const EmulatedLayout* l : {a, b, c, out})
        if (l->ld < (int64_t)l->rows) return CUBLAS_STATUS_INVALID_VALUE;
    auto fp8 = [](const EmulatedLayout* l) { return l->type == CUDA_R_8F_E4M3 || l->type == CUDA_R_8F_E5M2; };
    auto fp4 = [](const EmulatedLayout* l) { return l->type == CUDA_R_4F_E2M1; };
    int sm = emulated_sm(), mode = emulated_mode(d, 0);
    if (!fp8(a) && !fp8(b) && !fp4(a) && !fp4(b))               // scales are for narrow operands
        return a->type != b->type || d->scale[0] || d->scale[1] || mode || emulated_mode(d, 1) ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
    if (emulated_mode(d, 1) != mode || c->type != out->type || (out->type != CUDA_R_16BF && out->type != CUDA_R_32F)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (fp4(a) || fp4(b)) {
        if (!fp4(a) || !fp4(b) || sm < 100 || mode != CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3 || !ta || tb) return CUBLAS_STATUS_NOT_SUPPORTED;
    } else {
        if (!fp8(a) || !fp8(b) || (a->type == CUDA_R_8F_E5M2 && b->type == CUDA_R_8F_E5M2) || sm < 89) return CUBLAS_STATUS_NOT_SUPPORTED;
        if (mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F ? sm != 90 : mode != CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F && (mode != CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0 || sm < 100)) return CUBLAS_STATUS_NOT_SUPPORTED;
        if ((!ta || tb) && (sm < 100 || sm >= 120)) return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    for (const void* scale : d->scale)
        if (mode && (!scale || (uintptr_t)scale % 16)) return CUBLAS_STATUS_NOT_SUPPORTED;
    const EmulatedLayout* all[] = {a, b, c, out};
    for (int i = 0; i < 4; i++)                                 // rows and starts on 16 bytes
        if (all[i]->ld * emulated_bits(all[i]->type) % 128 || align[i] < 16) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (m % 16 || n % 16 || k % (fp4(a) || mode == CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0 ? 32 : 16)) return CUBLAS_STATUS_NOT_SUPPORTED;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                                     cublasLtMatrixLayout_t out, cublasLtMatmulPreference_t p, int, cublasLtMatmulHeuristicResult_t* result, int* found) {
    cublasStatus_t status = emulated_check(d, a, b, c, out, p->align);
    return *result = {}, *found = status == CUBLAS_STATUS_SUCCESS, status;
}

// sign, exponent (less its bias), mantissa of m bits; E4M3 has one NaN and no infinity, E5M2 both as IEEE has them.
inline double emulated_small(unsigned code, int e, int m, int bias) {
    int mantissa = code & ((1 << m) - 1), exponent = code >> m & ((1 << e) - 1);
    double v = exponent ? ldexp((1 << m) + mantissa, exponent - bias - m) : ldexp(mantissa, 1 - bias - m);
    if (m == 3 && exponent == 15 && mantissa == 7) v = NAN;
    if (m == 2 && exponent == 31) v = mantissa ? NAN : INFINITY;
    return code >> (e + m) & 1 ? -v : v;
}
inline double emulated_read(const void* p, cudaDataType_t type, int64_t i) {
    static const double fp4[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0., -0.5, -1, -1.5, -2, -3, -4, -6};
    if (type == CUDA_R_64F) return ((const double*)p)[i];
    if (type == CUDA_R_32F) return ((const float*)p)[i];
    if (type == CUDA_R_8F_E4M3) return emulated_small(((const uint8_t*)p)[i], 4, 3, 7);
    if (type == CUDA_R_8F_E5M2) return emulated_small(((const uint8_t*)p)[i], 5, 2, 15);
    if (type == CUDA_R_4F_E2M1) return fp4[((const uint8_t*)p)[i / 2] >> i % 2 * 4 & 15];      // x, the first of __nv_fp4x2_e2m1, in the lower half
    uint32_t u = (uint32_t)((const uint16_t*)p)[i] << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline void emulated_write(void* p, cudaDataType_t type, int64_t i, double v) {
    if (type == CUDA_R_64F) ((double*)p)[i] = v;
    else if (type == CUDA_R_32F) ((float*)p)[i] = (float)v;
    else {
        float f = (float)v;
        uint32_t u;
        memcpy(&u, &f, 4);
        bool nan = (u & 0x7fffffff) > 0x7f800000;
        ((uint16_t*)p)[i] = (uint16_t)(nan ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
}

// The documentation's block scaling factors layout: tiles of 128 (outer) x 4 (along K) bytes, tiles of one outer index side by side; in a
// tile, byte (outer % 32) * 16 + (outer / 32) * 4 + inner. What lies beyond the matrix must be zero. false: it is not.
inline bool emulated_block_scales(std::vector<double>& x, const uint8_t* scales, int mode, int64_t outer, int64_t k) {
    int64_t length = mode == CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3 ? 16 : 32, tiles = (k + 4 * length - 1) / (4 * length);
    for (int64_t tile = 0; tile < (outer + 127) / 128 * tiles; tile++)
        for (int byte = 0; byte < 512; byte++) {
            int64_t row = tile / tiles * 128 + byte / 16 + byte % 16 / 4 * 32, first = (tile % tiles * 4 + byte % 4) * length;
            unsigned code = scales[tile * 512 + byte];
            if (row >= outer || first >= k) {
                if (code) return false;
                continue;
            }
            double scale = length == 16 ? emulated_small(code & 0x7f, 4, 3, 7) : code == 255 ? NAN : ldexp(1, (int)code - 127);
            for (int64_t p = first; p < first + length; p++) x[row * k + p] *= scale;
        }
    return true;
}

// D = alpha op(A) op(B) + beta C, all column-major.
inline cublasStatus_t emulated_matmul(cublasLtMatmulDesc_t d, const void* alpha, const void* a, cublasLtMatrixLayout_t la, const void* b, cublasLtMatrixLayout_t lb,
                                      const void* beta, const void* c, cublasLtMatrixLayout_t lc, void* out, cublasLtMatrixLayout_t ld) {
    bool ta = d->attributes[CUBLASLT_MATMUL_DESC_TRANSA] == CUBLAS_OP_T, tb = d->attributes[CUBLASLT_MATMUL_DESC_TRANSB] == CUBLAS_OP_T;
    int64_t m = ld->rows, n = ld->cols, k = ta ? la->rows : la->cols;
    auto align = [](const void* p) { return (uintptr_t)p % 16 ? 1u : 16u; };
    const uint32_t aligned[] = {align(a), align(b), align(c), align(out)};
    if (cublasStatus_t status = emulated_check(d, la, lb, lc, ld, aligned)) return status;
    double scale = *(const float*)alpha, add = *(const float*)beta;
    // A library that offers a product and then refuses it: the heuristic is not told of beta.
    if (getenv("EMULATED_NO_BETA") && add != 0 && emulated_bits(la->type) < 16) return CUBLAS_STATUS_NOT_SUPPORTED;
    std::vector<double> x(m * k), y(n * k);                    // op(A) by rows, op(B) by columns
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < k; p++) x[i * k + p] = emulated_read(a, la->type, ta ? p + i * la->ld : i + p * la->ld);
    for (int64_t j = 0; j < n; j++)
        for (int64_t p = 0; p < k; p++) y[j * k + p] = emulated_read(b, lb->type, tb ? j + p * lb->ld : p + j * lb->ld);
    int mode = emulated_mode(d, 0);
    for (int side = 0; side < 2; side++)
        if (mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F) {                              // a float for each row of op(A), each column of op(B)
            for (int64_t i = 0; i < (side ? n : m) * k; i++) (side ? y : x)[i] *= ((const float*)d->scale[side])[i / k];
        } else if (mode) {
            if (emulated_block_scales(side ? y : x, (const uint8_t*)d->scale[side], mode, side ? n : m, k)) continue;
            return fprintf(stderr, "emulated GPU: padding of block scales is not zero\n"), CUBLAS_STATUS_INVALID_VALUE;
        } else if (d->scale[side]) scale *= *(const float*)d->scale[side];
    #pragma omp parallel for num_threads(omp_get_num_procs())
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < m; i++) {
            double s = 0;
            for (int64_t p = 0; p < k; p++) s += x[i * k + p] * y[j * k + p];
            s *= scale;
            if (add != 0) s += add * emulated_read(c, lc->type, i + j * lc->ld);
            emulated_write(out, ld->type, i + j * ld->ld, s);
        }
    return CUBLAS_STATUS_SUCCESS;
}
// While the stream is captured: with the descriptor and the host's factors as they are now, the device's as they will be.
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void* alpha, const void* a, cublasLtMatrixLayout_t la, const void* b,
                                     cublasLtMatrixLayout_t lb, const void* beta, const void* c, cublasLtMatrixLayout_t lc, void* out, cublasLtMatrixLayout_t ld,
                                     const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t) {
    if (!emulated_capture) return emulated_matmul(d, alpha, a, la, b, lb, beta, c, lc, out, ld);
    bool host = d->attributes[CUBLASLT_MATMUL_DESC_POINTER_MODE] == CUBLASLT_POINTER_MODE_HOST;
    float factors[2] = {host ? *(const float*)alpha : 0, host ? *(const float*)beta : 0};
    emulated_do([=, desc = *d, scales = std::array<float, 2>{factors[0], factors[1]}]() mutable {
        cublasStatus_t status = emulated_matmul(&desc, host ? &scales[0] : alpha, a, la, b, lb, host ? &scales[1] : beta, c, lc, out, ld);
        if (status) fprintf(stderr, "emulated GPU: %s in a recorded cublasLtMatmul\n", cublasLtGetStatusString(status)), abort();
    });
    return CUBLAS_STATUS_SUCCESS;
}
