// device.cuh: the machine. One source runs on two of them: nvcc compiles it for NVIDIA GPUs, a plain C++17 compiler for CPUs.
//
// A kernel is written once, as what a *group of lanes* does with one row; the loop over the row's elements belongs to the group:
//
//     struct scale_rows;                                         // a tag: the kernel's name in every profiler
//     for_rows<scale_rows>(ctx, {bytes, flops}, N, KERNEL(Group<32> g, int64_t r) {
//         acc_t ss = g.sum(C, [](acc_t v) { return v * v; }, x + r * C);
//         g.map(C, [=](acc_t& o, acc_t v) { o = v / ss; }, out(y + r * C), x + r * C);
//     });
//
// On the GPU a group is W lanes of a warp or a block: its loops are 16-byte loads, shuffles and 16-byte stores. On the CPU a
// group is one OpenMP thread: its loops are `omp simd`, sums in 16 fixed partial sums. Nothing depends on how many threads run.
//
// Here: scalar types, bit-level helpers and math (the same bits on both machines), Philox, the context, memory, profiler, Group,
// for_rows, for_tiles. matmul.cuh and attention.cuh hold the two other things that have a body per machine.
// Compile without fast-math and without contraction (-ffp-contract=off, --fmad=false): fused multiply-adds are explicit fmaf.
#pragma once
#include "host.h"       // fail, seconds
#include <algorithm>    // std::min, std::max, std::sort
#include <array>        // std::array
#include <cmath>        // sqrt, fmaf
#include <map>          // std::map
#include <memory>       // std::shared_ptr
#include <string>       // std::string
#include <type_traits>  // std::conditional_t
#include <vector>       // std::vector
#include <omp.h>        // omp_get_thread_num, omp_get_num_procs
#ifdef __CUDACC__
#include <cuda_runtime.h>
#define HD __host__ __device__ inline
#define KERNEL [=] __device__
#define CUDA(call) do { cudaError_t e_ = (call); if (e_ != cudaSuccess) fail("CUDA: %s (%s)", cudaGetErrorString(e_), #call); } while (0)
constexpr bool on_gpu = true;
#else
#define HD inline
#define KERNEL [=]
constexpr bool on_gpu = false;
#endif

// ---------------------------------------------------------------------------------------------------------------------------
// Scalar types. act_t: activations and their gradients. acc_t: parameters, optimiser state, reductions, everything in registers.

struct bf16 { uint16_t bits; };           // the upper half of a float

#if defined(METIS_DOUBLE)                 // finite-difference checks: the whole model in double, on the CPU
typedef double acc_t;
typedef double act_t;
#elif defined(__CUDACC__) && !defined(METIS_ACT_FLOAT)
typedef float acc_t;
typedef bf16 act_t;
#else                                     // the CPU; on a GPU -DMETIS_ACT_FLOAT compares it with the CPU without bf16's rounding
typedef float acc_t;
typedef float act_t;
#endif

HD uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
HD float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
// Floats by their bits. x is a NaN if (bits_of(x) & 0x7fffffff) > infinity_bits; infinity_bits alone is the exponent field, all ones.
constexpr uint32_t infinity_bits = 0x7f800000, quiet_nan_bits = 0x7fc00000;
constexpr float float_max = 3.40282347e38f;

// Elements of piece r of n elements cut into pieces of `chunk`, of which the last may be smaller.
HD int piece(int64_t n, int64_t r, int64_t chunk) { return (int)(n - r * chunk < chunk ? n - r * chunk : chunk); }

HD float  load(const float* p)  { return *p; }
HD double load(const double* p) { return *p; }
HD uint32_t load(const uint32_t* p) { return *p; }         // random words, which a kernel wants as they are
HD float  load(const bf16* p)   { return float_of((uint32_t)p->bits << 16); }
HD void store(float* p, float v)   { *p = v; }
HD void store(double* p, double v) { *p = v; }
HD void store(bf16* p, float v) {          // round to nearest even; a NaN keeps its sign and becomes quiet
    uint32_t u = bits_of(v);
    uint32_t nan = (u & 0x7fffffff) > infinity_bits;
    p->bits = (uint16_t)(nan ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// v rounded to bf16, up with the probability of what is cut off, given 16 random bits: the mean over r is v itself. What has no larger
// finite neighbour is cut, a NaN keeps its sign and becomes quiet.
HD float stochastic_bf16(float v, uint32_t r) {
    uint32_t u = bits_of(v), a = u & 0x7fffffff;
    return float_of(((u + (a < 0x7f7f0000 ? r : 0)) & 0xffff0000u) | (a > infinity_bits ? 0x400000 : 0));
}

// v as an act_t would hold it, so that a kernel can go on with what it stores.
HD acc_t as_act(acc_t v) {
    act_t t;
    store(&t, v);
    return load(&t);
}

// A NaN or an infinity, told by its bits, so that no compiler flag can fold the question away.
HD bool is_finite(float v) { return (bits_of(v) & infinity_bits) != infinity_bits; }
HD bool is_finite(double v) {
    uint64_t u;
    memcpy(&u, &v, 8);
    return (u & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Math that both machines compute to the same bits and compilers vectorise: polynomials fitted for minimal relative error,
// at most 2 units in the last place over the stated range; test/test_kernels.cu checks them against libm.

// e^x. 0 below -87.3, infinity above 88.37 (just short of FLT_MAX, so that 2^n never needs two factors); NaN stays NaN.
HD float exp_(float x) {
    float t = fmaf(x, 1.44269504f, 12582912.f);                  // 1.5 * 2^23: rounds x/ln2 to an integer in the low bits
    float n = t - 12582912.f;                                    // (x out of range makes nonsense here, replaced at the end)
    float r = fmaf(n, -0.693145752f, x);                         // ln2 in two parts: |r| <= ln2 / 2, exact to 2^-35
    r = fmaf(n, -1.42860677e-6f, r);
    float p = fmaf(1.3950538e-3f, r, 8.368918e-3f);
    p = fmaf(p, r, 0.041666206f);
    p = fmaf(p, r, 0.16666518f);
    p = fmaf(p, r, 0.5f);
    float y = fmaf(p, r * r, r) + 1.f;
    y *= float_of((bits_of(t) << 23) + 0x3f800000u);             // 2^n by its exponent bits
    y = x < -87.3f ? 0.f : y;
    return x > 88.37f ? float_of(infinity_bits) : y;
}
HD double exp_(double x) { return exp(x); }

// ln x for normal positive x; infinity and NaN stay what they are, a negative x is NaN, zero and subnormals are -infinity.
HD float log_(float x) {
    uint32_t u = bits_of(x);
    int32_t e = (int32_t)(u - 0x3f3504f3u) >> 23;                // x = m 2^e with m in [sqrt(1/2), sqrt(2))
    float m = float_of(u - ((uint32_t)e << 23));
    float s = (m - 1.f) / (m + 1.f), z = s * s;                  // ln m = 2 atanh(s)
    float q = fmaf(0.23582155f, z, 0.2853731f);
    q = fmaf(q, z, 0.40000334f);
    q = fmaf(q, z, 0.6666666f);
    float y = fmaf((float)e, 0.693145752f, fmaf((float)e, 1.42860677e-6f, fmaf(q * z, s, 2.f * s)));
    y = u < 0x00800000u ? -float_of(infinity_bits) : y;
    y = u >= infinity_bits ? x : y;
    y = u == 0x80000000u ? -float_of(infinity_bits) : y;
    return u > 0x80000000u ? float_of(quiet_nan_bits) : y;
}
HD double log_(double x) { return log(x); }

// sin and cos of any angle up to 1e6 or so: the reduction by pi/2 is done in double.
HD void sincos_(float x, float* sine, float* cosine) {
    double k = (double)x * 0.6366197723675814 + 6755399441055744.0;                 // 1.5 * 2^52: round to an integer
    double n = k - 6755399441055744.0;
    float r = (float)((double)x - n * 1.5707963267948966), z = r * r;
    float s = fmaf(fmaf(fmaf(-1.9517298e-4f, z, 8.332178e-3f), z, -0.16666655f) * z, r, r);
    float c = fmaf(fmaf(fmaf(2.443845e-5f, z, -1.3887368e-3f), z, 0.041666646f), z * z, fmaf(-0.5f, z, 1.f));
    int q = (int)n & 3;
    float a = q & 1 ? c : s, b = q & 1 ? s : c;
    *sine = q & 2 ? -a : a;
    *cosine = (q + 1) & 2 ? -b : b;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Random numbers: Philox4x32-10 (Salmon et al., SC'11), counter-based. A draw is named by what it is for, never by who draws it,
// so threads, order, recomputation and resuming cannot change it.

enum class Purpose : uint32_t { init = 1, data_order = 2, sampling = 3, test = 4, rounding = 5, signs = 6, rows = 7, sketch = 8, moments = 9 };

struct Clock { uint32_t step, micro; };
struct RandomKey {
    uint64_t seed;
    uint32_t step, micro, layer, operand;
    Purpose purpose;
    const Clock* clock = nullptr;     // of a recorded launch (replay()): step and micro are what this shows, on the device, as it runs
};
// `key` as of now; for a kernel to ask once, before it draws.
HD RandomKey now(RandomKey key) {
    if (key.clock) key.step = key.clock->step, key.micro = key.clock->micro;
    return key;
}

struct Words { uint32_t w[4]; };

// The counter and the key of block high * 2^32 + index (high < 2^16) of the stream that `key` names, and one of the ten rounds.
// Fields: micro < 2^16, layer < 2^16, operand < 2^8.
HD Words philox_counter(RandomKey key, uint32_t index, uint32_t high) {
    return {{index, key.step, (uint32_t)key.purpose | (key.operand & 0xff) << 8 | (key.layer & 0xffff) << 16, high | (key.micro & 0xffff) << 16}};
}
HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
    uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ k0, c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ k1, c3 = (uint32_t)a;
}
constexpr uint32_t philox_step0 = 0x9E3779B9u, philox_step1 = 0xBB67AE85u;        // what a round adds to the key

// The 128 random bits of a block.
HD Words philox(RandomKey key, uint32_t index, uint32_t high) {
    Words c = philox_counter(key, index, high);
    uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
    for (int round = 0; round < 10; round++, k0 += philox_step0, k1 += philox_step1) philox_round(c.w[0], c.w[1], c.w[2], c.w[3], k0, k1);
    return c;
}
HD Words philox(RandomKey key, uint64_t index) { return philox(key, (uint32_t)index, (uint32_t)(index >> 32)); }

// Uniform in (0, 1): 23 bits, centred, so that neither end is ever drawn (with 24 the half would round up to 1).
HD float uniform(uint32_t word) { return ((float)(word >> 9) + 0.5f) * 1.1920929e-7f; }

// Element `index` of a standard normal stream (Box-Muller; two elements share a block).
HD float normal(RandomKey key, uint64_t index) {
    Words r = philox(key, index >> 1);
    float radius = sqrtf(-2.f * log_(uniform(r.w[0]))), s, c;
    sincos_(6.2831853f * uniform(r.w[1]), &s, &c);
    return radius * (index & 1 ? s : c);
}

// ---------------------------------------------------------------------------------------------------------------------------
// The context: everything that is not an argument. One is made in main() and passed to every launch.

struct Cost { double bytes = 0, flops = 0; };   // what a launch must move and compute at the least; the profiler divides by time

struct Profiler {
    struct Row { const char* name; int64_t calls; double seconds, bytes, flops; };
    bool on = false;
    std::vector<Row> rows;
    Row& row(const char* name) {
        for (Row& r : rows)
            if (!strcmp(r.name, name)) return r;
        rows.push_back({name, 0, 0, 0, 0});
        return rows.back();
    }
};

struct MatmulPlans;                             // matmul.cuh: library handles and cached plans
struct Graphs;                                  // below, after the kernels: recorded launches

struct Ctx {
    int threads = 1;                            // OpenMP threads (CPU)
    uint64_t seed = 0;
    uint32_t step = 0, micro = 0;               // the optimiser step and its micro-batch: part of every random draw's name
    Profiler profiler;
    std::shared_ptr<MatmulPlans> plans;
    const Clock* clock = nullptr;               // for the keys of launches that are being recorded
#ifdef __CUDACC__
    std::shared_ptr<Graphs> graphs;             // null: every launch is made anew
    cudaStream_t stream = nullptr;
    void synchronise() { CUDA(cudaStreamSynchronize(stream)); }
#else
    std::vector<std::vector<char>> thread_scratch;   // two growing buffers a thread: for a kernel's tiles, and for matmul within it
    void synchronise() {}
    // This thread's scratch, 64-byte aligned; contents are not kept between calls.
    void* scratch(int slot, size_t bytes) {
        std::vector<char>& s = thread_scratch[2 * omp_get_thread_num() + slot];
        if (s.size() < bytes + 64) s.resize(bytes + 64);
        return (void*)(((uintptr_t)s.data() + 63) & ~(uintptr_t)63);
    }
#endif
};

// A launch in flight; its destructor books time, bytes and FLOPs under `name` when profiling is on.
struct Launch {
    Ctx& ctx;
    const char* name;
    Cost cost;
    double start = 0;
    Launch(Ctx& c, const char* n, Cost k) : ctx(c), name(n), cost(k) {
        if (ctx.profiler.on) ctx.synchronise(), start = seconds();
    }
    ~Launch() {
        if (!ctx.profiler.on) return;
        ctx.synchronise();
        Profiler::Row& r = ctx.profiler.row(name);
        r.calls++, r.seconds += seconds() - start, r.bytes += cost.bytes, r.flops += cost.flops;
    }
};

// The name of a tag type, cut out of the compiler's own spelling of this function.
template <class Tag> const char* tag_name() {
    static const std::string name = [](std::string s) {          // "... [with Tag = rmsnorm_forward]", "... [Tag = rmsnorm_forward]"
        size_t from = s.find("Tag = ") + 6;
        return s.substr(from, s.find_first_of(";]", from) - from);
    }(__PRETTY_FUNCTION__);
    return name.c_str();
}

// ---------------------------------------------------------------------------------------------------------------------------
// Memory. A layout function takes its buffers from an Arena in order; run once with base == nullptr it only measures, so the
// plan that --dry-run prints and the memory that is used come from the same lines.

struct Arena {
    char* base = nullptr;
    size_t used = 0;
    template <class T> T* take(size_t count) {
        T* p = base ? (T*)(base + used) : nullptr;
        used += (count * sizeof(T) + 255) & ~(size_t)255;        // 256: what cuBLASLt and vector loads like best
        return p;
    }
};

#ifdef __CUDACC__
inline void* device_alloc(size_t bytes, const char* what) {
    void* p = nullptr;
    cudaError_t error = cudaMalloc(&p, std::max<size_t>(bytes, 256));
    if (error == cudaErrorMemoryAllocation) fail("out of GPU memory: %.2f GB for %s; see --dry-run", bytes * 1e-9, what);
    CUDA(error);
    CUDA(cudaMemset(p, 0, bytes));           // on the default stream, which our (blocking) stream waits for
    return p;
}
inline void device_free(void* p, size_t) { CUDA(cudaFree(p)); }
inline void to_device(Ctx& ctx, void* dst, const void* src, size_t n) {
    CUDA(cudaMemcpyAsync(dst, src, n, cudaMemcpyHostToDevice, ctx.stream));
    ctx.synchronise();
}
inline void to_host(Ctx& ctx, void* dst, const void* src, size_t n) {
    CUDA(cudaMemcpyAsync(dst, src, n, cudaMemcpyDeviceToHost, ctx.stream));
    ctx.synchronise();
}
inline void set_zero(Ctx& ctx, void* p, size_t n) { CUDA(cudaMemsetAsync(p, 0, n, ctx.stream)); }
#else
// Zeroed pages straight from the kernel: untouched ones cost nothing, large ones spare the TLB.
inline void* device_alloc(size_t bytes, const char* what) {
    bytes = std::max<size_t>(bytes, 256);
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("out of memory: %.2f GB for %s; see --dry-run", bytes * 1e-9, what);
    madvise(p, bytes, MADV_HUGEPAGE);
    return p;
}
inline void device_free(void* p, size_t bytes) { munmap(p, std::max<size_t>(bytes, 256)); }
inline void to_device(Ctx&, void* dst, const void* src, size_t n) { memcpy(dst, src, n); }
inline void to_host(Ctx&, void* dst, const void* src, size_t n) { memcpy(dst, src, n); }
inline void set_zero(Ctx& ctx, void* p, size_t n) {
    const size_t megabyte = 1 << 20;
    #pragma omp parallel for schedule(static) num_threads(ctx.threads)
    for (size_t i = 0; i < n; i += megabyte) memset((char*)p + i, 0, std::min(megabyte, n - i));
}
#endif

// ---------------------------------------------------------------------------------------------------------------------------
// Group: a row's worth of lanes. Arguments of map/sum/max after the function are rows of `n` contiguous elements:
// const T* is read, T* is read and written, out(T*) is only written. The function sees acc_t's (random words, const uint32_t*, as they are);
// sum's may write, too.

template <class T> struct Out { T* p; };
template <class T> HD Out<T> out(T* p) { return {p}; }
template <class T> HD T* at(T* p, int i) { return p + i; }
template <class T> HD Out<T> at(Out<T> o, int i) { return {o.p + i}; }

// One element of one argument: loaded on construction, stored back (if it may be) on destruction.
template <class T> struct Slot {                                 // T*: read and written
    acc_t v;
    T* p;
    HD Slot(T* row, int i) : v(load(row + i)), p(row + i) {}
    HD ~Slot() { store(p, v); }
    HD acc_t& get() { return v; }
};
template <class T> using element = std::conditional_t<std::is_same_v<T, uint32_t>, uint32_t, acc_t>;
template <class T> struct Slot<const T> {
    element<T> v;
    HD Slot(const T* row, int i) : v(load(row + i)) {}
    HD element<T> get() { return v; }
};
template <class T> struct Slot<Out<T>> {
    acc_t v;
    T* p;
    HD Slot(Out<T> row, int i) : p(row.p + i) {}
    HD ~Slot() { store(p, v); }
    HD acc_t& get() { return v; }
};
template <class P> struct slot_of;
template <class T> struct slot_of<T*> { typedef Slot<T> type; };
template <class T> struct slot_of<Out<T>> { typedef Slot<Out<T>> type; };

template <class F, class... P> HD void apply_one(F& f, int i, P... p) { f(typename slot_of<P>::type(p, i).get()...); }
template <class F, class... P> HD acc_t value_one(F& f, int i, P... p) { return f(typename slot_of<P>::type(p, i).get()...); }

struct Nothing { template <class... T> HD void operator()(T...) const {} };

// (v0 + v8) ... , then d = 4, 2, 1: sixteen values in one order on both machines, whichever axis they lie along.
template <class V, class Op> HD float tree16(V value, Op op) {
    float t[16];
    for (int j = 0; j < 16; j++) t[j] = value(j);
    for (int d = 8; d > 0; d /= 2)
        for (int j = 0; j < d; j++) t[j] = op(t[j], t[j + d]);
    return t[0];
}

#ifdef __CUDACC__
// 16 bytes at a time: V elements of every argument sit in registers, then the function runs V times.
template <class T, int V> struct alignas(16) Packet { T v[V]; };
template <class T, int V> __device__ void load_packet(element<T>* to, const T* from) {
    constexpr int n = 16 / sizeof(T);
    for (int k = 0; k < V; k += n) {
        Packet<T, n> q = *(const Packet<T, n>*)(from + k);
        for (int j = 0; j < n; j++) to[k + j] = load(&q.v[j]);
    }
}
template <class T, int V> __device__ void store_packet(T* to, const acc_t* from) {
    constexpr int n = 16 / sizeof(T);
    for (int k = 0; k < V; k += n) {
        Packet<T, n> q;
        for (int j = 0; j < n; j++) store(&q.v[j], from[k + j]);
        uint4 w;
        memcpy(&w, &q, 16);
        __stwb((uint4*)(to + k), w);                             // one 16-byte store: as a plain assignment it may be split again
    }
}
template <class P, int V> struct Lanes;
template <class T, int V> struct Lanes<T*, V> {
    acc_t v[V];
    T* p;
    __device__ Lanes(T* row, int i) : p(row + i) { load_packet<T, V>(v, p); }
    __device__ ~Lanes() { store_packet<T, V>(p, v); }
    __device__ acc_t& get(int j) { return v[j]; }
};
template <class T, int V> struct Lanes<const T*, V> {
    element<T> v[V];
    __device__ Lanes(const T* row, int i) { load_packet<T, V>(v, row + i); }
    __device__ element<T> get(int j) { return v[j]; }
};
template <class T, int V> struct Lanes<Out<T>, V> {
    acc_t v[V];
    T* p;
    __device__ Lanes(Out<T> row, int i) : p(row.p + i) {}
    __device__ ~Lanes() { store_packet<T, V>(p, v); }
    __device__ acc_t& get(int j) { return v[j]; }
};
template <class F, class... L> __device__ void apply_lanes(F& f, int V, L&&... lanes) {
    #pragma unroll
    for (int j = 0; j < V; j++) f(lanes.get(j)...);
}
template <class F, class... L> __device__ acc_t sum_lanes(F& f, int V, L&&... lanes) {
    acc_t s = 0;
    #pragma unroll
    for (int j = 0; j < V; j++) s += f(lanes.get(j)...);
    return s;
}
template <class F, class... L> __device__ acc_t max_lanes(F& f, int V, acc_t m, L&&... lanes) {
    #pragma unroll
    for (int j = 0; j < V; j++) {
        acc_t v = f(lanes.get(j)...);
        m = v > m ? v : m;
    }
    return m;
}
template <class... P> struct widest;                              // elements in 16 bytes of the narrowest argument
template <> struct widest<> { static constexpr int value = 1; };
template <class T, class... R> struct widest<T*, R...> {
    static constexpr int value = std::max<int>(16 / sizeof(T), widest<R...>::value);
};
template <class T, class... R> struct widest<Out<T>, R...> : widest<T*, R...> {};
template <class T> __device__ bool aligned(T* p) { return (uintptr_t)p % 16 == 0; }
template <class T> __device__ bool aligned(Out<T> o) { return (uintptr_t)o.p % 16 == 0; }

template <int W> struct Group {
    static_assert(W == 8 || W == 16 || W == 32 || W % 128 == 0, "part of a warp, a warp, or a block of its own");
    static constexpr int lanes = W;
    __device__ int lane() const { return threadIdx.x % W; }
    __device__ void sync() const {
        if (W > 32) __syncthreads();
        else __syncwarp(mask());
    }
    template <class T> __device__ static void fetch(T*, int) {}
    __device__ unsigned mask() const { return W >= 32 ? 0xffffffffu : ((1u << (W % 32)) - 1) << (threadIdx.x % 32 / W * W); }

    template <class F, class... P> __device__ void map(int n, F f, P... p) const {
        constexpr int V = widest<P...>::value;
        if (n % V == 0 && (aligned(p) && ...))
            for (int i = lane() * V; i < n; i += W * V) apply_lanes(f, V, Lanes<P, V>(p, i)...);
        else
            for (int i = lane(); i < n; i += W) apply_one(f, i, p...);
    }
    template <class F, class... P> __device__ acc_t sum(int n, F f, P... p) const {
        constexpr int V = widest<P...>::value;
        acc_t s = 0;
        if (n % V == 0 && (aligned(p) && ...))
            for (int i = lane() * V; i < n; i += W * V) s += sum_lanes(f, V, Lanes<P, V>(p, i)...);
        else
            for (int i = lane(); i < n; i += W) s += value_one(f, i, p...);
        return reduce(s, [](acc_t a, acc_t b) { return a + b; });
    }
    template <class F, class... P> __device__ acc_t max(int n, F f, P... p) const {
        constexpr int V = widest<P...>::value;
        acc_t m = -INFINITY;
        if (n % V == 0 && (aligned(p) && ...))
            for (int i = lane() * V; i < n; i += W * V) m = max_lanes(f, V, m, Lanes<P, V>(p, i)...);
        else
            for (int i = lane(); i < n; i += W) {
                acc_t v = value_one(f, i, p...);
                m = v > m ? v : m;
            }
        return reduce(m, [](acc_t a, acc_t b) { return a > b ? a : b; });
    }
    // f(i) for i in [0, n); f(i, j) for i in [0, n), j in [0, 16); to[i] = the fixed tree of value(i, 0..15) under op.
    template <class F> __device__ void each(int n, F f) const {
        for (int i = lane(); i < n; i += W) f(i);
    }
    template <class F, class A = Nothing> __device__ void grid16(int n, F f, A = {}) const {
        for (int i = lane(); i < 16 * n; i += W) f(i / 16, i % 16);
    }
    // f(i, lane, words) for i in [0, n), lane in [0, 16): words of block first(i) + lane, first a multiple of 16.
    template <class B, class F> __device__ void draw16(int n, RandomKey key, B first, F f) const {
        for (int i = lane(); i < 16 * n; i += W) f(i / 16, i % 16, philox(key, first(i / 16) + i % 16));
    }
    // f(r, c) for r < height, c < width <= 2^shift.
    template <class F> __device__ void tile(int height, int width, int shift, F f) const {
        for (int i = lane(); i < height << shift; i += W)
            if ((i & ((1 << shift) - 1)) < width) f(i >> shift, i & ((1 << shift) - 1));
    }
    // Of 16 neighbours in shared memory a lane's are in the banks of the lane's two further on: where op does not care for the order, lanes
    // begin at different ones.
    template <bool any_order = false, class V, class Op> __device__ void fold16(int n, V value, Op op, float* to) const {
        for (int i = lane(); i < n; i += W) {
            if (!any_order) {
                to[i] = tree16([&](int j) { return value(i, j); }, op);
                continue;
            }
            float all = value(i, i / 2 % 16);
            #pragma unroll
            for (int j = 1; j < 16; j++) all = op(all, value(i, (i / 2 + j) % 16));
            to[i] = all;
        }
    }
    // The sum of f(i) in double, in a fixed order.
    template <class F> __device__ double sum_double(int n, F f) const {
        double s = 0;
        for (int i = lane(); i < n; i += W) s += f(i);
        return reduce(s, [](double a, double b) { return a + b; });
    }
    // The same value in every lane: a butterfly in the warp, then the warps' values in order.
    template <class T, class Op> __device__ T reduce(T v, Op op) const {
        for (int d = (W < 32 ? W : 32) / 2; d > 0; d /= 2) v = op(v, __shfl_xor_sync(mask(), v, d));
        if (W <= 32) return v;
        __shared__ T part[W / 32 > 0 ? W / 32 : 1];
        __syncthreads();
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
        __syncthreads();
        v = part[0];
        for (int i = 1; i < W / 32; i++) v = op(v, part[i]);
        return v;
    }
};

// Starts a kernel with `blocks` blocks of `lanes` lanes and `shared` bytes of dynamic shared memory. A function of the runtime, not the
// <<<>>> of the language: so that a C++ compiler can read this file, too (test/emulated).
template <class... P, class... A> void start(Ctx& ctx, void (*kernel)(P...), int64_t blocks, int lanes, size_t shared, A... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks), config.blockDim = dim3((unsigned)lanes), config.dynamicSmemBytes = shared, config.stream = ctx.stream;
    if (shared > 48 << 10) CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    CUDA(cudaLaunchKernelEx(&config, kernel, P(arguments)...));
}

template <class Tag, int W, class F> __global__ void __launch_bounds__(W < 128 ? 128 : W) rows_kernel(int64_t n, F f) {
    constexpr int groups = W < 128 ? 128 / W : 1;
    int64_t r = (int64_t)blockIdx.x * groups + threadIdx.x / W;
    if (r < n) f(Group<W>(), r);
}
#else
// The function must become part of its loop, or the loop is not vectorised; a large kernel makes compilers think otherwise.
#define FLAT __attribute__((flatten))
template <int W> struct Group {
    static constexpr int lanes = 1;
    int lane() const { return 0; }
    void sync() const {}

    // Asks for the cache lines of n elements; on a GPU, where other warps hide what is not there yet, nothing.
    template <class T> static void fetch(T* p, int n) {
        for (int k = 0; k < n; k += 64 / sizeof(T)) __builtin_prefetch(p + k, !std::is_const<T>::value);
        asm volatile("");                     // without it gcc takes what only fetches for a function without effect, and drops its calls
    }
    // Those of 128 elements 2 KB ahead: kernels of several streams and much arithmetic gained 18 to 27%.
    template <class T> static void fetch(T* p) { fetch(p + 512, 128); }
    template <class T> static void fetch(Out<T> p) { fetch(p.p); }

    template <class F, class... P> FLAT void map(int n, F f, P... p) const {
        for (int from = 0; from < n; from += 128) {
            (fetch(at(p, from)), ...);
            int to = from + 128 < n ? from + 128 : n;
            #pragma omp simd
            for (int i = from; i < to; i++) apply_one(f, i, p...);
        }
    }
    // f(i) for i in [0, n); f(i, j) for i in [0, n), j in [0, 16); to[i] = the fixed tree of value(i, 0..15) under op. `ahead(i)` may
    // fetch what is needed later: between two i's there is time for it.
    template <class F> FLAT void each(int n, F f) const {
        #pragma omp simd
        for (int i = 0; i < n; i++) f(i);
    }
    template <class F, class A = Nothing> FLAT void grid16(int n, F f, A ahead = {}) const {
        for (int i = 0; i < n; i++) {
            ahead(i);
            #pragma omp simd
            for (int j = 0; j < 16; j++) f(i, j);
        }
    }
    // f(i, lane, words) for i in [0, n), lane in [0, 16): words of block first(i) + lane, first a multiple of 16. Round by round over
    // 16 lanes: a loop that every compiler vectorises.
    template <class B, class F> FLAT void draw16(int n, RandomKey key, B first, F f) const {
        for (int i = 0; i < n; i++) {
            uint64_t block = first(i);
            Words c = philox_counter(key, (uint32_t)block, (uint32_t)(block >> 32));
            uint32_t c0[16], c1[16], c2[16], c3[16], k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
            for (int j = 0; j < 16; j++) c0[j] = c.w[0] + j, c1[j] = c.w[1], c2[j] = c.w[2], c3[j] = c.w[3];
            for (int round = 0; round < 10; round++, k0 += philox_step0, k1 += philox_step1) {
                #pragma omp simd simdlen(8)                          // with 16 gcc multiplies 64 bits by 64, which takes 1.5 times as long
                for (int j = 0; j < 16; j++) philox_round(c0[j], c1[j], c2[j], c3[j], k0, k1);
            }
            #pragma omp simd
            for (int j = 0; j < 16; j++) f(i, j, Words{{c0[j], c1[j], c2[j], c3[j]}});
        }
    }
    // f(r, c) for r < height, c < width <= 2^shift.
    template <class F> FLAT void tile(int height, int width, int, F f) const {
        for (int r = 0; r < height; r++) {
            #pragma omp simd
            for (int c = 0; c < width; c++) f(r, c);
        }
    }
    template <bool any_order = false, class V, class Op> FLAT void fold16(int n, V value, Op op, float* to) const {
        // n a multiple of 16, in two passes: what one stores as halves of vectors is long in the cache when the other loads whole ones.
        float a[64 * 8];
        for (int first = 0; first < n; first += 64) {
            int count = n - first < 64 ? n - first : 64;
            for (int i = 0; i < count; i++) {
                #pragma omp simd
                for (int j = 0; j < 8; j++) a[8 * i + j] = op(value(first + i, j), value(first + i, j + 8));
            }
            for (int i = 0; i < count; i += 16) {
                #pragma omp simd
                for (int k = i; k < i + 16; k++) {
                    const float* t = a + 8 * k;
                    to[first + k] = op(op(op(t[0], t[4]), op(t[2], t[6])), op(op(t[1], t[5]), op(t[3], t[7])));
                }
            }
        }
    }
    // The same trees over 16 rows: to[c] of value(0..15, c), n a multiple of 16.
    template <class V, class Op> FLAT void fold_rows16(int n, V value, Op op, float* to) const {
        for (int first = 0; first < n; first += 16) {
            float t[8][16];
            for (int j = 0; j < 8; j++) {
                #pragma omp simd
                for (int c = 0; c < 16; c++) t[j][c] = op(value(j, first + c), value(j + 8, first + c));
            }
            for (int d = 4; d > 0; d /= 2)
                for (int j = 0; j < d; j++) {
                    #pragma omp simd
                    for (int c = 0; c < 16; c++) t[j][c] = op(t[j][c], t[j + d][c]);
                }
            for (int c = 0; c < 16; c++) to[first + c] = t[0][c];
        }
    }
    // The sum of f(i) in double, in a fixed order.
    template <class F> FLAT double sum_double(int n, F f) const {
        double s[8] = {};
        for (int i = 0; i < (n & ~7); i += 8) {
            #pragma omp simd
            for (int j = 0; j < 8; j++) s[j] += f(i + j);
        }
        for (int i = n & ~7; i < n; i++) s[i & 7] += f(i);
        return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    }
    // 16 partial sums whatever the vector width, then a fixed tree.
    template <class F, class... P> FLAT acc_t sum(int n, F f, P... p) const {
        acc_t s[16] = {};
        int whole = n & ~15;
        for (int i = 0; i < whole; i += 16) {
            if (i % 128 == 0) (fetch(at(p, i)), ...);
            #pragma omp simd
            for (int j = 0; j < 16; j++) s[j] += value_one(f, i + j, p...);
        }
        for (int i = whole; i < n; i++) s[i - whole] += value_one(f, i, p...);
        for (int d = 8; d > 0; d /= 2)
            for (int j = 0; j < d; j++) s[j] += s[j + d];
        return s[0];
    }
    template <class F, class... P> FLAT acc_t max(int n, F f, P... p) const {
        acc_t m[16];
        for (int j = 0; j < 16; j++) m[j] = -INFINITY;
        int whole = n & ~15;
        for (int i = 0; i < whole; i += 16) {
            if (i % 128 == 0) (fetch(at(p, i)), ...);
            #pragma omp simd
            for (int j = 0; j < 16; j++) {
                acc_t v = value_one(f, i + j, p...);
                m[j] = v > m[j] ? v : m[j];
            }
        }
        for (int i = whole; i < n; i++) {
            acc_t v = value_one(f, i, p...);
            m[0] = v > m[0] ? v : m[0];
        }
        for (int j = 1; j < 16; j++) m[0] = m[j] > m[0] ? m[j] : m[0];
        return m[0];
    }
};
#endif

// Runs kernel(group, row) for every row in [0, n). Rows must not depend on each other.
template <class Tag, int W = 32, class F> void for_rows(Ctx& ctx, Cost cost, int64_t n, F kernel) {
    Launch launch(ctx, tag_name<Tag>(), cost);
    if (n <= 0) return;
#ifdef __CUDACC__
    constexpr int groups = W < 128 ? 128 / W : 1;
    start(ctx, rows_kernel<Tag, W, F>, (n + groups - 1) / groups, W < 128 ? 128 : W, 0, n, kernel);
#else
    // Sixteen pieces a thread, taken as threads come free: a core that is slower, or busy with something else, delays less.
    int64_t share = std::max<int64_t>(1, n / (16 * ctx.threads));
    #pragma omp parallel for schedule(dynamic, share) num_threads(ctx.threads)
    for (int64_t r = 0; r < n; r++) kernel(Group<W>(), r);
#endif
}

#ifdef __CUDACC__
// Four blocks on a multiprocessor, 64 registers a lane: a tile waits for memory and barriers, and others must fill the gaps.
template <class Tag, class Stage, class F> __global__ void __launch_bounds__(256, 4) tiles_kernel(F f) {
    __shared__ Stage stage;
    f(Group<256>(), (int64_t)blockIdx.x, stage);
}
#endif

// Runs kernel(group, tile, stage) for every tile in [0, n). `stage` is a plain struct of arrays near the lanes (shared memory, or
// L1) that lanes fill and read together, with g.sync() between; its contents do not outlive the tile.
template <class Tag, class Stage, class F> void for_tiles(Ctx& ctx, Cost cost, int64_t n, F kernel) {
    Launch launch(ctx, tag_name<Tag>(), cost);
    if (n <= 0) return;
#ifdef __CUDACC__
    start(ctx, tiles_kernel<Tag, Stage, F>, n, 256, 0, kernel);
#else
    int64_t share = std::max<int64_t>(1, n / (16 * ctx.threads));
    #pragma omp parallel for schedule(dynamic, share) num_threads(ctx.threads)
    for (int64_t t = 0; t < n; t++) kernel(Group<256>(), t, *(Stage*)ctx.scratch(0, sizeof(Stage)));
#endif
}

// ---------------------------------------------------------------------------------------------------------------------------
// Launches that repeat. A step of a small model on a GPU is thousands of launches of microseconds, which a CPU may not make fast enough.

typedef std::array<int64_t, 8> GraphKey;        // names a list of launches: equal keys, equal launches with equal arguments
#ifdef __CUDACC__
struct Graphs {
    struct Recorded {
        bool seen = false;
        cudaGraphExec_t graph = nullptr;
    };
    std::map<GraphKey, Recorded> all;
    Clock *clock, shown = {~0u, ~0u};           // what recorded draws ask for the time, on the device; what it shows
    Graphs() : clock((Clock*)device_alloc(sizeof(Clock), "the clock of recorded launches")) {}
};
struct set_clock;
inline void set_time(Ctx& ctx, Graphs& g) {
    Clock time = {ctx.step, ctx.micro}, *clock = g.clock;
    if (time.step == g.shown.step && time.micro == g.shown.micro) return;
    g.shown = time;
    for_rows<set_clock, 8>(ctx, {}, 1, KERNEL(Group<8> g, int64_t) { if (g.lane() == 0) *clock = time; });
}
#endif

// f(), whose launches are those of every call under `key` unless `repeats` is false. Where ctx has graphs they are made one by one at first,
// while plans are found and code is loaded, recorded as a CUDA graph at the second call, and from then on replayed. f() must not copy from or
// to the host, allocate, wait, or let anything but ctx.step and ctx.micro in a RandomKey with ctx.clock change what it launches.
template <class F> void replay(Ctx& ctx, const GraphKey& key, bool repeats, F f) {
#ifdef __CUDACC__
    if (repeats && ctx.graphs && !ctx.profiler.on) {
        Graphs& g = *ctx.graphs;
        Graphs::Recorded& r = g.all[key];
        if (r.seen && !r.graph) {
            cudaGraph_t graph;
            ctx.clock = g.clock;
            CUDA(cudaStreamBeginCapture(ctx.stream, cudaStreamCaptureModeRelaxed));
            f();
            CUDA(cudaStreamEndCapture(ctx.stream, &graph));
            ctx.clock = nullptr;
            CUDA(cudaGraphInstantiate(&r.graph, graph, 0));
            CUDA(cudaGraphDestroy(graph));
        }
        if (r.graph) {
            set_time(ctx, g);
            CUDA(cudaGraphLaunch(r.graph, ctx.stream));
            return;
        }
        r.seen = true;
    }
#endif
    (void)ctx, (void)key, (void)repeats;
    f();
}
