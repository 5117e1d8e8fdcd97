// matmul.cuh: C = A B + beta C, one function with a body per machine: cuBLASLt on the GPU; on the CPU oneDNN, or plain loops
// (the reference build, and the double-precision one of the gradient checks).
//
// Matrices are row-major with a leading dimension; a transposed operand is read in place. The three GEMMs of a linear layer:
//
//     fprop  Y  (l x n) = X  (l x m) W^T (m x n)        matmul(ctx, name, Y,  X,             W.transposed(), l, n, m, 0)
//     dgrad  dX (l x m) = D  (l x n) W   (n x m)        matmul(ctx, name, dX, D,             W,              l, m, n, 0)
//     wgrad  dW (n x m) += D^T (n x l) X (l x m)        matmul(ctx, name, dW, D.transposed(), X,             n, m, l, 1)
//
// A plan is what a library works out once for a shape, its layouts and types: the kernel to run (cuBLASLt), or machine code made for it
// (oneDNN). Both take far longer than a small product, so plans are kept in a map and looked up by MatmulKey.
//
// CPU. The result is cut into tiles of 256 x 512, each computed by one thread by a single-threaded library call: no thread
// count can change the order of an addition, hence not a bit. oneDNN multiplies bf16 operands into float on the CPU's own bf16
// units where these are faster (AMX; AVX512-BF16 on AMD); elsewhere bf16-valued operands are stored and multiplied as float. A wgrad's k, the
// tokens, is cut too, for the cache's sake. For a result of 600 x 1000, k = 1100 read from a transposed A, tiles and chunks are
//
//     | 256 x 512 | 256 x 488 |          each    k: | 512 | 512 | 76 |    added to the tile in this order
//     | 256 x 512 | 256 x 488 |
//     |  88 x 512 |  88 x 488 |
//
// GPU. cuBLASLt; a plan is the heuristic's first answer, cached by shape, so that two runs use the same kernels. Operands as fp4.cuh packs
// them are multiplied by the GPU's own FP8 and FP4 units where cuBLASLt has a kernel for them (has(), serves()).
#pragma once
#include "device.cuh"   // Ctx, Launch
#include <array>        // std::array
#include <map>          // std::map
#include <tuple>        // std::tie
#ifdef __CUDACC__
#include <cublasLt.h>
#elif defined(METIS_ONEDNN)
#include <oneapi/dnnl/dnnl.hpp>
#endif

// The narrow ones are as a tensor core reads them: fp8 (E4M3) and fp8_e5m2 under one float scale, or none; mxfp8 (E4M3) under an E8M0
// byte for every 32 elements; nvfp4 (E2M1, the even element in the lower half of a byte) under an E4M3 byte for every 16; fp8_row (E4M3)
// under a float for every row.
enum class Type : int { f32, bf16, f64, fp8, fp8_e5m2, mxfp8, nvfp4, fp8_row };
template <class T> constexpr Type type_of();
template <> constexpr Type type_of<float>() { return Type::f32; }
template <> constexpr Type type_of<bf16>() { return Type::bf16; }
template <> constexpr Type type_of<double>() { return Type::f64; }
HD int bits_in(Type t) { return t == Type::f64 ? 64 : t == Type::f32 ? 32 : t == Type::bf16 ? 16 : t == Type::nvfp4 ? 4 : 8; }
HD size_t size_of(Type t) { return bits_in(t) / 8; }              // of all but nvfp4
HD bool is_narrow(Type t) { return t >= Type::fp8; }
HD bool is_tensorwise(Type t) { return t == Type::fp8 || t == Type::fp8_e5m2; }

// A row-major matrix in memory: element (r, c) is data[r * ld + c], or, read as its transpose, data[c * ld + r]. It owns nothing and does not
// know its size; who multiplies does.
struct Mat {
    const void* data;
    Type type;
    int64_t ld;                        // elements from one row to the next
    bool trans = false;                // read as its transpose
    const float* scale = nullptr;      // one float on the device that multiplies the whole matrix (an FP4 operand's tensor scale), or null
    const uint8_t* blocks = nullptr;   // scale bytes of mxfp8 and nvfp4, in tiles of 128 x 4; the rows' floats of fp8_row
    const float* row_amax = nullptr;   // every row's max |x| as the kernel that made the matrix left it, or null
    Mat transposed() const { return {data, type, ld, !trans, scale, blocks}; }      // the same memory
};
template <class T> Mat mat(const T* data, int64_t ld, const float* row_amax = nullptr) {
    return {data, type_of<T>(), ld, false, nullptr, nullptr, row_amax};
}

// A product C (m x n) = A (m x k) B (k x n), or C += A B, but for its data: what a plan is made for and cached under.
struct MatmulKey {
    int64_t m, n, k;
    int64_t lda, ldb, ldc;             // elements from row to row of each matrix as it lies in memory
    bool trans_a, trans_b;             // it lies as its transpose
    Type a, b, c;                      // element types
    bool add;                          // beta is 1: C += A B
    bool scaled;                       // alpha is the product of tensor scales; not FP8's, which the library multiplies in on its own
    auto fields() const { return std::tie(m, n, k, lda, ldb, ldc, trans_a, trans_b, a, b, c, add, scaled); }
    bool operator<(const MatmulKey& o) const { return fields() < o.fields(); }
};
inline MatmulKey matmul_key(const Mat& a, const Mat& b, int64_t m, int64_t n, int64_t k, int64_t ldc, Type c, bool add) {
    return {m, n, k, a.ld, b.ld, ldc, a.trans, b.trans, a.type, b.type, c, add, (a.scale || b.scale) && !is_tensorwise(a.type)};
}
// The key of a product of narrow operands, contiguous C: A (m x k) and B^T (n x k) lie with the contracted axis along their rows, "TN" in
// BLAS' words, the only layout of FP4, and of FP8 on sm_89, sm_90 and sm_120. tensor_scaled: an operand has a tensor scale.
inline MatmulKey narrow_key(Type a, Type b, int64_t m, int64_t n, int64_t k, Type c, bool add, bool tensor_scaled) {
    return {m, n, k, k, k, n, false, true, a, b, c, add, tensor_scaled && !is_tensorwise(a)};
}

#ifdef __CUDACC__
// ------------------------------------------------------------------------------------------------------------------- the GPU
#if !defined(METIS_EMULATED) && CUDART_VERSION < 12090
#error "metis.cu needs CUDA 12.9 or newer: make NVCC=/path/to/nvcc, or make GPU=0"
#endif
#define CUBLAS(call) do { \
    cublasStatus_t s_ = (call); \
    if (s_ != CUBLAS_STATUS_SUCCESS) fail("cuBLASLt: %s (%s)", cublasLtGetStatusString(s_), #call); \
} while (0)

struct MatmulPlans {
    struct Plan {
        cublasLtMatmulDesc_t desc;                            // transposes, precision of the sum, scales
        cublasLtMatrixLayout_t a, b, c;                       // cuBLAS' A, B, C: our B, A, C (describe())
        cublasLtMatmulAlgo_t algo;                            // the kernel
        bool found = false;                                   // cuBLASLt has a kernel
    };
    cublasLtHandle_t handle;
    std::map<MatmulKey, Plan> cache;
    bool native;                                              // FP8 and FP4 operands may be multiplied as such; METIS_NATIVE=0: never
    void* workspace;
    float* factors;                                           // on the device: 0, 1, and the scaled product's alpha
    static constexpr size_t workspace_bytes = 32 << 20;       // what cuBLAS recommends for sm_90 and later

    explicit MatmulPlans(Ctx& ctx) {
        const char* choice = getenv("METIS_NATIVE");
        native = !choice || *choice != '0';
        CUBLAS(cublasLtCreate(&handle));
        workspace = device_alloc(workspace_bytes, "the matmul workspace");
        factors = (float*)device_alloc(3 * sizeof(float), "the matmul factors");
        const float values[3] = {0, 1, 1};
        to_device(ctx, factors, values, sizeof values);
    }
    static bool bf16_units() { return true; }
    static const char* library() { return "cuBLASLt"; }

    static cudaDataType_t cuda_type(Type t) {
        static const cudaDataType_t types[] = {CUDA_R_32F, CUDA_R_16BF, CUDA_R_64F, CUDA_R_8F_E4M3, CUDA_R_8F_E5M2,
                                               CUDA_R_8F_E4M3, CUDA_R_4F_E2M1, CUDA_R_8F_E4M3};
        return types[(int)t];
    }
    // One attribute of a product's description, or of what the heuristic is to look for.
    template <class T> static void set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t which, const T& value) {
        CUBLAS(cublasLtMatmulDescSetAttribute(desc, which, &value, sizeof value));
    }
    template <class T> static void set(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t which, const T& value) {
        CUBLAS(cublasLtMatmulPreferenceSetAttribute(p, which, &value, sizeof value));
    }
    // Where cuBLAS' A, or B, has its scales: one float, or a byte a block, or a float a row.
    static void set_scale(const Plan& p, bool of_b, const void* scale) {
        set(p.desc, of_b ? CUBLASLT_MATMUL_DESC_B_SCALE_POINTER : CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, scale);
    }

    // Whether the GPU multiplies these narrow operands itself; what it does not is emulated by a bf16 GEMM of the same values. cuBLAS' rules
    // beside what the heuristic is asked (documentation of cublasLtMatmul, FP8 and FP4): rows of all three matrices are multiples of 16
    // bytes, so k is one of 16 elements of FP8 or of 32 of FP4; of MXFP8, of whole blocks of 32.
    bool has(const MatmulKey& key) {
        bool pair = is_tensorwise(key.a) ? is_tensorwise(key.b) : is_narrow(key.a) && key.a == key.b;
        int depth = is_tensorwise(key.a) || key.a == Type::fp8_row ? 16 : 32;
        bool whole = key.m % 16 == 0 && key.n % 16 == 0 && key.k % depth == 0;
        return native && pair && whole && find(key).found;
    }
    // The same for a large GEMM of these types: asked first, once a pair, so that a GPU without such units is asked no more. The heuristic is
    // told neither of beta nor of where alpha lies, so a small product with both is made to see.
    bool serves(Type a, Type b) {
        const MatmulKey large = narrow_key(a, b, 1024, 1024, 1024, Type::f32, false, a == Type::nvfp4);
        const MatmulKey small = narrow_key(a, b, 128, 32, 64, Type::f32, true, a == Type::nvfp4);
        auto known = cache.find(large);
        if (known != cache.end()) return known->second.found;
        return has(large) && (cache[large].found = has(small) && runs(small));
    }
    // Whether the small product is accepted, on zeros.
    bool runs(const MatmulKey& key) {
        const Plan& p = find(key);
        const size_t part = 64 << 10, bytes = 4 * part;                           // each of A, B and C, and the scales of both, fits into one
        char *zeros = (char*)device_alloc(bytes, "a trial product"), *a = zeros + part, *b = a + part, *c = b + part;
        CUDA(cudaMemset(zeros, 0, bytes));
        const float one = 1, *factor = key.scaled ? factors + 1 : &one;            // alpha and beta
        set_scale(p, false, is_tensorwise(key.b) ? (const void*)(factors + 1) : zeros);
        set_scale(p, true, is_tensorwise(key.a) ? (const void*)(factors + 1) : zeros);
        cublasStatus_t status = cublasLtMatmul(handle, p.desc, factor, b, p.a, a, p.b, factor, c, p.c, c, p.c, &p.algo, workspace, workspace_bytes, nullptr);
        CUDA(cudaDeviceSynchronize());
        device_free(zeros, bytes);
        return status == CUBLAS_STATUS_SUCCESS;
    }

    // The plan of a product that must exist.
    const Plan& plan(const MatmulKey& key) {
        const Plan& p = find(key);
        if (!p.found) {
            fail("cuBLASLt has no kernel for a %ld x %ld x %ld product of these types on this GPU", (long)key.m, (long)key.n, (long)key.k);
        }
        return p;
    }
    const Plan& find(const MatmulKey& key) {
        auto made = cache.find(key);
        if (made != cache.end()) return made->second;
        Plan p;
        describe(p, key);
        choose(p, key);
        return cache.emplace(key, p).first->second;
    }

    // Says what is to be multiplied. cuBLAS is column-major, and a row-major matrix read by columns is its transpose: it is asked for
    // C^T (n x m) = B^T A^T, so that its A is our B, its B our A, its m our n. An operand that we read in place as its transpose it
    // reads as such, too: what one calls rows the other calls columns, so both see a transpose or neither does.
    void describe(Plan& p, const MatmulKey& key) {
        CUBLAS(cublasLtMatmulDescCreate(&p.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        set(p.desc, CUBLASLT_MATMUL_DESC_TRANSA, key.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(p.desc, CUBLASLT_MATMUL_DESC_TRANSB, key.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
        // Tensor scales are known on the device alone: then alpha is read there.
        set(p.desc, CUBLASLT_MATMUL_DESC_POINTER_MODE, key.scaled ? CUBLASLT_POINTER_MODE_DEVICE : CUBLASLT_POINTER_MODE_HOST);
        // Block scales: cuBLAS documentation, "Narrow precision data types usage". Their pointers must be there when the heuristic is asked;
        // any will do until the product runs. FP8's tensor scales stay SCALAR_32F, the default. FAST_ACCUM stays 0, the default: partial
        // sums are promoted to float in all GEMMs.
        auto set_mode = [&](Type t, cublasLtMatmulDescAttributes_t which) {
            int32_t mode = t == Type::nvfp4 ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3
                         : t == Type::mxfp8 ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0
                         : CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            if (is_narrow(t) && !is_tensorwise(t)) set(p.desc, which, mode);
        };
        set_mode(key.b, CUBLASLT_MATMUL_DESC_A_SCALE_MODE);
        set_mode(key.a, CUBLASLT_MATMUL_DESC_B_SCALE_MODE);
        if (is_narrow(key.b)) set_scale(p, false, workspace);
        if (is_narrow(key.a)) set_scale(p, true, workspace);
        // Rows and columns as they lie, column-major: B (k x n) row-major is n x k.
        CUBLAS(cublasLtMatrixLayoutCreate(&p.a, cuda_type(key.b), key.trans_b ? key.k : key.n, key.trans_b ? key.n : key.k, key.ldb));
        CUBLAS(cublasLtMatrixLayoutCreate(&p.b, cuda_type(key.a), key.trans_a ? key.m : key.k, key.trans_a ? key.k : key.m, key.lda));
        CUBLAS(cublasLtMatrixLayoutCreate(&p.c, cuda_type(key.c), key.n, key.m, key.ldc));
    }

    // Takes the heuristic's first kernel, if it has one. Timing candidates would be faster at times, and would make two runs differ: another
    // kernel adds in another order.
    void choose(Plan& p, const MatmulKey& key) {
        cublasLtMatmulPreference_t preference;
        CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
        set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, size_t(workspace_bytes));
        // Callers' matrices start on 16 bytes wherever their rows do (ld a multiple of 16 bytes); otherwise on an element.
        auto alignment = [](Type t, int64_t ld) { return ld * bits_in(t) % 128 == 0 ? 16u : std::max(1u, (uint32_t)size_of(t)); };
        set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(key.b, key.ldb));
        set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(key.a, key.lda));
        set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(key.c, key.ldc));
        set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(key.c, key.ldc));
        // Split-K may add its parts in float only: the default would allow a bf16 C to round every part.
        set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
        cublasLtMatmulHeuristicResult_t result;
        int count = 0;                                        // "not supported" is an answer here, not an error
        cublasLtMatmulAlgoGetHeuristic(handle, p.desc, p.a, p.b, p.c, p.c, preference, 1, &result, &count);
        cublasLtMatmulPreferenceDestroy(preference);
        p.found = count > 0 && result.state == CUBLAS_STATUS_SUCCESS;
        if (p.found) p.algo = result.algo;
    }
};

struct matmul_alpha;
inline void matmul_run(Ctx& ctx, void* c, const Mat& a, const Mat& b, const MatmulKey& key) {
    const MatmulPlans::Plan& p = ctx.plans->plan(key);
    float one = 1, beta_value = key.add ? 1 : 0;
    const float *alpha = &one, *beta = &beta_value;
    // Tensor scales: alpha = their product, made by a kernel of one lane in the same stream; cuBLASLt reads it and beta on the device.
    if (key.scaled) {
        float* product = ctx.plans->factors + 2;
        const float *sa = a.scale, *sb = b.scale;
        for_rows<matmul_alpha, 8>(ctx, {}, 1, KERNEL(Group<8> g, int64_t) {
            if (g.lane() == 0) *product = (sa ? *sa : 1.f) * (sb ? *sb : 1.f);
        });
        alpha = product, beta = ctx.plans->factors + (key.add ? 1 : 0);
    }
    // Narrow operands bring their scales with them; cuBLASLt reads the pointers as it is called.
    const Mat* side[] = {&b, &a};
    for (int i = 0; i < 2; i++)
        if (is_narrow(side[i]->type)) {
            const float* tensor = side[i]->scale ? side[i]->scale : ctx.plans->factors + 1;
            MatmulPlans::set_scale(p, i, is_tensorwise(side[i]->type) ? (const void*)tensor : side[i]->blocks);
        }
    CUBLAS(cublasLtMatmul(ctx.plans->handle, p.desc, alpha, b.data, p.a, a.data, p.b, beta, c, p.c, c, p.c, &p.algo,
                          ctx.plans->workspace, MatmulPlans::workspace_bytes, ctx.stream));
}
#else
// ------------------------------------------------------------------------------------------------------------------- the CPU

// The reference: for every element of C a sum over k in ascending order by fused multiply-adds, starting from 0, then added to
// C where beta is 1. 4 x 16 sums stay in registers: each step of k reads 4 elements of A and 16 of B for 64 multiply-adds.
//
//     panel  k x 16    B's columns j0 ... j0 + 15, packed once for all rows of A, so that the inner loop is the same for every layout;
//                      columns beyond n are zeros, and rows beyond m repeat the last: nothing of either is stored
template <class T> void plain_tile(T* c, int64_t ldc, const Mat& a, const Mat& b, int64_t m, int64_t n, int64_t k, bool add, T* panel) {
    const T* A = (const T*)a.data;
    const T* B = (const T*)b.data;
    int64_t a_row = a.trans ? 1 : a.ld, a_col = a.trans ? a.ld : 1, b_row = b.trans ? 1 : b.ld, b_col = b.trans ? b.ld : 1;
    for (int64_t j0 = 0; j0 < n; j0 += 16) {
        int width = (int)std::min<int64_t>(16, n - j0);
        for (int64_t p = 0; p < k; p++)
            for (int j = 0; j < 16; j++) panel[16 * p + j] = j < width ? B[p * b_row + (j0 + j) * b_col] : T(0);
        for (int64_t i0 = 0; i0 < m; i0 += 4) {
            int height = (int)std::min<int64_t>(4, m - i0);
            const T* row[4];
            for (int i = 0; i < 4; i++) row[i] = A + (i0 + std::min(i, height - 1)) * a_row;
            T s[4][16] = {};
            for (int64_t p = 0; p < k; p++)
                for (int i = 0; i < 4; i++) {
                    T v = row[i][p * a_col];
                    #pragma omp simd
                    for (int j = 0; j < 16; j++) s[i][j] = std::fma(v, panel[16 * p + j], s[i][j]);
                }
            for (int i = 0; i < height; i++)
                for (int j = 0; j < width; j++) {
                    T& o = c[(i0 + i) * ldc + j0 + j];
                    o = add ? o + s[i][j] : s[i][j];
                }
        }
    }
}

struct MatmulPlans {
    struct Plan {
        MatmulKey key;
        size_t scratch = 0;                                   // bytes that one execution needs
#ifdef METIS_ONEDNN
        dnnl::matmul primitive;
        // a, b, c and scratch of every thread, without their data: making these objects costs as much as a small tile.
        std::vector<std::array<dnnl::memory, 4>> args;
#endif
    };
    std::map<MatmulKey, Plan> cache;
    static constexpr bool native = false;                     // no CPU of ours multiplies narrow operands
    static bool has(const MatmulKey&) { return false; }
    static bool serves(Type, Type) { return false; }
#ifdef METIS_ONEDNN
    dnnl::engine engine{dnnl::engine::kind::cpu, 0};
    dnnl::stream stream{engine};
    static const char* library() { return "oneDNN"; }
    // Whether bf16 operands pay: where AMX is, and where AVX512-BF16 is on AMD. Intel's VDPBF16PS runs on one port where float's FMA
    // runs on two: no faster on paper, half as fast by measurement (dev/LOG.md). METIS_BF16_UNITS=0|1 decides otherwise, for tests.
    static bool bf16_units() {
        static const bool pay = [] {
            auto isa = (unsigned)dnnl::get_effective_cpu_isa();              // sets of bits, not an order: AVX2-VNNI is a large number
            auto has = [=](dnnl::cpu_isa want) { return (isa & (unsigned)want) == (unsigned)want; };
            const char* choice = getenv("METIS_BF16_UNITS");
            if (!has(dnnl::cpu_isa::avx512_core_bf16)) return false;         // oneDNN would refuse, or convert
            return choice ? *choice == '1' : has(dnnl::cpu_isa::avx512_core_amx) || __builtin_cpu_is("amd");
        }();
        return pay;
    }
#else
    static const char* library() { return "plain loops"; }
    static bool bf16_units() { return false; }
#endif
    // The library must see one thread: we cut the tiles. Our own loops name their thread count.
    int threads;
    explicit MatmulPlans(Ctx& ctx) : threads(ctx.threads) {
        omp_set_num_threads(1);
        ctx.thread_scratch.resize(2 * threads);
    }

    // Not for several threads at a time: callers find their plans before they start a parallel loop.
    const Plan& plan(const MatmulKey& key) {
        auto made = cache.find(key);
        if (made != cache.end()) return made->second;
        Plan p;
        p.key = key;
#ifdef METIS_ONEDNN
        typedef dnnl::memory::dims Dims;
        // A layout is a size and a stride for each axis, so a transpose is another pair of strides.
        auto type = [](Type t) { return t == Type::bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32; };
        auto strides = [](bool trans, int64_t ld) { return trans ? Dims{1, ld} : Dims{ld, 1}; };
        dnnl::memory::desc a(Dims{key.m, key.k}, type(key.a), strides(key.trans_a, key.lda));
        dnnl::memory::desc b(Dims{key.k, key.n}, type(key.b), strides(key.trans_b, key.ldb));
        dnnl::memory::desc c(Dims{key.m, key.n}, type(key.c), strides(false, key.ldc));
        dnnl::primitive_attr attr;
        attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);              // else every execution would allocate
        if (key.add) {
            dnnl::post_ops post;
            post.append_sum(1.f);                                           // C = A B + 1 C
            attr.set_post_ops(post);
        }
#if DNNL_VERSION_MAJOR >= 3
        dnnl::matmul::primitive_desc pd(engine, a, b, c, attr);
#else
        dnnl::matmul::primitive_desc pd(dnnl::matmul::desc(a, b, c), attr, engine);
#endif
        p.primitive = dnnl::matmul(pd);                                     // machine code for this very shape is made here
        p.scratch = pd.scratchpad_desc().get_size();
        for (int t = 0; t < threads; t++) {
            auto none = [&](const dnnl::memory::desc& d) { return dnnl::memory(d, engine, nullptr); };
            p.args.push_back({none(a), none(b), none(c), none(pd.scratchpad_desc())});
        }
#else
        p.scratch = (size_t)key.k * 16 * sizeof(acc_t);                     // plain_tile()'s panel
#endif
        return cache.emplace(key, std::move(p)).first->second;
    }

    // One tile by the calling thread. a, b and c point at the tile's first elements. By oneDNN's C interface: the C++ one takes a hash map
    // of arguments, made anew for every tile.
    void run(Ctx& ctx, const Plan& p, void* c, const void* a, const void* b) {
        void* pad = ctx.scratch(1, p.scratch);
#ifdef METIS_ONEDNN
        const std::array<dnnl::memory, 4>& m = p.args[omp_get_thread_num()];
        void* handles[4] = {(void*)a, (void*)b, c, pad};
        const int roles[4] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST, DNNL_ARG_SCRATCHPAD};
        dnnl_exec_arg_t list[4];
        for (int i = 0; i < 4; i++) dnnl_memory_set_data_handle(m[i].get(), handles[i]), list[i] = {roles[i], m[i].get()};
        if (dnnl_primitive_execute(p.primitive.get(), stream.get(), 4, list) != dnnl_success) fail("oneDNN cannot run a matmul");
#else
        const MatmulKey& key = p.key;
        const Mat left = {a, type_of<acc_t>(), key.lda, key.trans_a}, right = {b, type_of<acc_t>(), key.ldb, key.trans_b};
        plain_tile<acc_t>((acc_t*)c, key.ldc, left, right, key.m, key.n, key.k, key.add, (acc_t*)pad);
#endif
    }
};

// Measured on `15m`: 256 x 512 is within 5% of the library's own threading on every GEMM. Where A is read transposed (wgrad) its
// rows lie far apart, and 512 of them at a time, added in order, stay in cache: up to 1.4x.
constexpr int64_t tile_rows = 256, tile_cols = 512, tile_depth = 512;

// c (rows x cols, ld apart) = alpha * t, or += where add: the scaled product's last step. t is contiguous. Scaling after the sum, as a
// tensor core's alpha does: operands that are exact in bf16 stay so.
template <class T> void scale_tile(T* c, int64_t ld, const T* t, int64_t rows, int64_t cols, T alpha, bool add) {
    for (int64_t i = 0; i < rows; i++) {
        #pragma omp simd
        for (int64_t j = 0; j < cols; j++) {
            c[i * ld + j] = add ? c[i * ld + j] + alpha * t[i * cols + j] : alpha * t[i * cols + j];
        }
    }
}

// Every tile of C by one thread, as threads come free: no two write the same element, and none waits for another.
inline void matmul_run(Ctx& ctx, void* c, const Mat& a, const Mat& b, const MatmulKey& key) {
    const int64_t m = key.m, n = key.n, k = key.k, ld = key.ldc;
    const int64_t depth = a.trans ? tile_depth : k;
    const int64_t rows = (m + tile_rows - 1) / tile_rows, cols = (n + tile_cols - 1) / tile_cols, chunks = (k + depth - 1) / depth;
    const acc_t alpha = acc_t(a.scale ? *a.scale : 1.f) * acc_t(b.scale ? *b.scale : 1.f);
    const bool add = key.add, beside = key.scaled;        // a scaled tile is made beside C, then added to it
    const bool first_adds = add && !beside;
    // Tiles differ at the edges alone: in height in the last row of tiles, in width in the last column, in depth in the last chunk of k;
    // and chunks after the first add to what is there. So at most 2 x 2 x 3 plans serve every tile, found before threads start.
    enum { first, middle, last };                         // chunks; one alone counts as the first
    auto kind = [=](int64_t p) { return p == 0 ? first : p < chunks - 1 ? middle : last; };
    const MatmulPlans::Plan* plans[2][2][3];              // [last row of tiles?][last column?][kind of chunk]
    for (int64_t i : {int64_t(0), rows - 1})
        for (int64_t j : {int64_t(0), cols - 1})
            for (int64_t p : {int64_t(0), std::min<int64_t>(1, chunks - 1), chunks - 1}) {
                MatmulKey tile = key;
                tile.m = piece(m, i, tile_rows), tile.n = piece(n, j, tile_cols), tile.k = piece(k, p, depth);
                tile.add = p > 0 || first_adds;
                if (beside) tile.ldc = tile.n, tile.scaled = false;
                plans[i == rows - 1][j == cols - 1][kind(p)] = &ctx.plans->plan(tile);
            }
    // Bytes from one tile of A to the next below it, and to the next along k; of B, to the next on the right, and along k.
    const int64_t size_a = size_of(key.a), size_b = size_of(key.b), size_c = size_of(key.c);
    const int64_t row_a = (a.trans ? 1 : a.ld) * tile_rows * size_a, deep_a = (a.trans ? a.ld : 1) * depth * size_a;
    const int64_t col_b = (b.trans ? b.ld : 1) * tile_cols * size_b, deep_b = (b.trans ? 1 : b.ld) * depth * size_b;
    const char *pa = (const char*)a.data, *pb = (const char*)b.data;
    #pragma omp parallel for schedule(dynamic) num_threads(ctx.threads)
    for (int64_t t = 0; t < rows * cols; t++) {
        int64_t i = t / cols, j = t % cols;
        char* pc = (char*)c + (i * tile_rows * ld + j * tile_cols) * size_c;
        char* to = beside ? (char*)ctx.scratch(0, tile_rows * tile_cols * size_c) : pc;
        for (int64_t p = 0; p < chunks; p++) {            // in order, by one thread: the sum over k is the same in every run
            const MatmulPlans::Plan& plan = *plans[i == rows - 1][j == cols - 1][kind(p)];
            ctx.plans->run(ctx, plan, to, pa + i * row_a + p * deep_a, pb + j * col_b + p * deep_b);
        }
        if (beside) {
            scale_tile((acc_t*)pc, ld, (const acc_t*)to, piece(m, i, tile_rows), piece(n, j, tile_cols), alpha, add);
        }
    }
}
#endif

// C (m x n) = alpha A (m x k) B (k x n) + beta C, alpha the product of the operands' scales, beta 0 or 1. `name` is the profiler's. C never
// overlaps A or B. Types: A and B both float or both bf16 (double in a double build), or narrow where has() says so; C float or bf16.
template <class T>
void matmul(Ctx& ctx, const char* name, T* c, int64_t ldc, const Mat& a, const Mat& b, int64_t m, int64_t n, int64_t k, int beta) {
    double read = double(m) * k * bits_in(a.type) / 8 + double(k) * n * bits_in(b.type) / 8;
    double bytes = read + double(m) * n * sizeof(T) * (1 + beta);                   // C is written, and read if it is added to
    Launch launch(ctx, name, {bytes, 2.0 * m * n * k});
    matmul_run(ctx, c, a, b, matmul_key(a, b, m, n, k, ldc, type_of<T>(), beta != 0));
}
