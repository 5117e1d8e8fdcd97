// cuBLASLt for the emulated device: column-major products as its documentation defines them, by plain loops in double.
#pragma once
#include "cuda_runtime.h"
#include <map>

typedef int cublasStatus_t;
enum { CUBLAS_STATUS_SUCCESS = 0 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F };
enum cublasLtPointerMode_t { CUBLASLT_POINTER_MODE_HOST, CUBLASLT_POINTER_MODE_DEVICE };
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB, CUBLASLT_MATMUL_DESC_POINTER_MODE };
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK
};
enum { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
struct EmulatedLayout { cudaDataType_t type; uint64_t rows, cols; int64_t ld; };
struct EmulatedDesc { std::map<int, int> attributes; };
typedef void* cublasLtHandle_t;
typedef EmulatedDesc* cublasLtMatmulDesc_t;
typedef EmulatedLayout* cublasLtMatrixLayout_t;
typedef void* cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t { int none; };
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; };

inline const char* cublasLtGetStatusString(cublasStatus_t) { return "error"; }
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* h) { return *h = nullptr, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t, cudaDataType_t) { return *d = new EmulatedDesc, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void* v, size_t) {
    return memcpy(&d->attributes[a], v, sizeof(int)), CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType_t type, uint64_t rows, uint64_t cols, int64_t ld) {
    return *l = new EmulatedLayout{type, rows, cols, ld}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) { return *p = nullptr, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void*, size_t) { return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t) { return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                     cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* result, int* found) {
    return *result = {}, *found = 1, CUBLAS_STATUS_SUCCESS;
}

inline double emulated_read(const void* p, cudaDataType_t type, int64_t i) {
    if (type == CUDA_R_64F) return ((const double*)p)[i];
    if (type == CUDA_R_32F) return ((const float*)p)[i];
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

// D = alpha op(A) op(B) + beta C, all column-major.
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void* alpha, const void* a, cublasLtMatrixLayout_t la, const void* b,
                                     cublasLtMatrixLayout_t lb, const void* beta, const void* c, cublasLtMatrixLayout_t lc, void* out, cublasLtMatrixLayout_t ld,
                                     const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t) {
    bool ta = d->attributes[CUBLASLT_MATMUL_DESC_TRANSA] == CUBLAS_OP_T, tb = d->attributes[CUBLASLT_MATMUL_DESC_TRANSB] == CUBLAS_OP_T;
    int64_t m = ld->rows, n = ld->cols, k = ta ? la->rows : la->cols;
    if ((int64_t)(ta ? la->cols : la->rows) != m || (int64_t)(tb ? lb->rows : lb->cols) != n || (int64_t)(tb ? lb->cols : lb->rows) != k) return 7;
    double scale = *(const float*)alpha, add = *(const float*)beta;
    std::vector<double> x(m * k), y(n * k);                    // op(A) by rows, op(B) by columns
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < k; p++) x[i * k + p] = emulated_read(a, la->type, ta ? p + i * la->ld : i + p * la->ld);
    for (int64_t j = 0; j < n; j++)
        for (int64_t p = 0; p < k; p++) y[j * k + p] = emulated_read(b, lb->type, tb ? j + p * lb->ld : p + j * lb->ld);
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
