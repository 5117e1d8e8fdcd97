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
// for_rows, for_tiles, recorded launches (replay). matmul.cuh and attention.cuh hold the two other things that have a body per machine.
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
#define HD __host__ __device__ inline        // a function of both sides
#define KERNEL [=] __device__               // a lambda that runs on the device; it captures by value, as what it refers to lives on the host
#define CUDA(call) do { cudaError_t e_ = (call); if (e_ != cudaSuccess) fail("CUDA: %s (%s)", cudaGetErrorString(e_), #call); } while (0)
constexpr bool on_gpu = true;
#else
#define HD inline
#define KERNEL [=]
constexpr bool on_gpu = false;
#endif

// ---------------------------------------------------------------------------------------------------------------------------
// Scalar types. act_t: activations and their gradients, bf16 on a GPU, where memory traffic is what they cost. acc_t: parameters, optimiser
// state, reductions, everything in registers. Kernels load() into acc_t and store() from it, whatever lies in memory.

struct bf16 { uint16_t bits; };           // the upper half of a float: sign, 8 bits of exponent, 7 of mantissa

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
// Rounds to nearest even; a NaN keeps its sign and becomes quiet. The lower 16 bits are cut after an addition that carries into the upper
// ones if they are more than half, 0x8000, or half and the last bit that stays is 1. The largest floats carry to infinity.
HD void store(bf16* p, float v) {
    uint32_t u = bits_of(v);
    uint32_t nan = (u & 0x7fffffff) > infinity_bits;
    p->bits = (uint16_t)(nan ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// v rounded to bf16, up with the probability of what is cut off, given 16 random bits r: the mean over r is v itself. If the lower half of
// v's bits is 0x4000, a quarter, then adding r carries for the 0x4000 of 0x10000 r's that are at least 0xc000. What has no larger finite
// neighbour is cut, a NaN keeps its sign and becomes quiet.
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

// Whether v is neither NaN nor infinity, told by its bits, so that no compiler flag can fold the question away.
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
// e^x = 2^n e^r with x = n ln 2 + r, |r| <= ln 2 / 2, where e^r = 1 + r + r^2 p(r), p of degree 4, is good enough. x = 1: n = 1, r = 0.307.
HD float exp_(float x) {
    // Floats from 2^23 to 2^24 are the integers: adding 1.5 * 2^23 rounds to one, which then stands in the sum's low bits.
    float t = fmaf(x, 1.44269504f, 12582912.f);                  // x / ln 2
    float n = t - 12582912.f;                                    // (x out of range makes nonsense here, replaced at the end)
    float r = fmaf(n, -0.693145752f, x);                         // ln 2 in two parts, exact to 2^-35
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
// x = m 2^e with m in [sqrt(1/2), sqrt(2)), so that near x = 1 e is 0 and nothing cancels; ln m = 2 atanh(s), s = (m - 1) / (m + 1), a series
// in odd powers of s, |s| < 0.172. x = 6: e = 3, m = 0.75, s = -1/7.
HD float log_(float x) {
    uint32_t u = bits_of(x);
    int32_t e = (int32_t)(u - 0x3f3504f3u) >> 23;                // the bits of sqrt(1/2): how many binades x is above it
    float m = float_of(u - ((uint32_t)e << 23));
    float s = (m - 1.f) / (m + 1.f), z = s * s;
    float q = fmaf(0.23582155f, z, 0.2853731f);
    q = fmaf(q, z, 0.40000334f);
    q = fmaf(q, z, 0.6666666f);
    float y = fmaf((float)e, 0.693145752f, fmaf((float)e, 1.42860677e-6f, fmaf(q * z, s, 2.f * s)));          // e ln 2, in two parts
    // What has no ordinary answer is chosen at the end, without branches: loops over this function stay vectors.
    y = u < 0x00800000u ? -float_of(infinity_bits) : y;
    y = u >= infinity_bits ? x : y;
    y = u == 0x80000000u ? -float_of(infinity_bits) : y;
    return u > 0x80000000u ? float_of(quiet_nan_bits) : y;
}
HD double log_(double x) { return log(x); }

// sin and cos of any angle up to 1e6 or so. x = n pi/2 + r, |r| <= pi/4, in double, as float has no bits left for r when n is large; then
// polynomials of r, and the quadrant n mod 4 says which is which: sin x = sin r, cos r, -sin r, -cos r; cos x is the sine of the next one.
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
// Random numbers: Philox4x32-10 (Salmon et al., SC'11), counter-based: there is no state that one draw hands to the next. 128 bits that name a
// draw go through ten rounds of a small cipher, keyed by the seed, and what comes out are 128 random bits. A draw is named by what it
// is for, never by who draws it, so threads, order, recomputation and resuming cannot change it:
//
//     word 0   block of the stream, lower 32 bits      e.g. element / 4, as a block is four words
//     word 1   step
//     word 2   purpose (bits 0-7), operand (8-15), layer (16-31)
//     word 3   block, bits 32-47 (bits 0-15), micro-batch (16-31)
//     key      seed, 64 bits
//
// Under one key the cipher is one to one: names that differ in any bit never give the same block.

// What a draw is for: streams of different purposes have nothing in common. Values are part of every run's bits.
enum class Purpose : uint32_t { init = 1, data_order = 2, sampling = 3, test = 4, rounding = 5, signs = 6, rows = 7, sketch = 8, moments = 9 };

struct Clock { uint32_t step, micro; };      // see replay()
// The name of a stream.
struct RandomKey {
    uint64_t seed;                    // the run's
    uint32_t step, micro;             // of the optimiser; micro-batch of the step, < 2^16
    uint32_t layer, operand;          // < 2^16, < 2^8: whose numbers are rounded, signed, sampled
    Purpose purpose;
    const Clock* clock = nullptr;     // of a recorded launch (replay()): step and micro are what this shows, on the device, as it runs
};
// `key` as of now; for a kernel to ask once, before it draws.
HD RandomKey now(RandomKey key) {
    if (key.clock) key.step = key.clock->step, key.micro = key.clock->micro;
    return key;
}

struct Words { uint32_t w[4]; };             // a block

// The counter of block high * 2^32 + index (high < 2^16) of the stream that `key` names.
HD Words philox_counter(RandomKey key, uint32_t index, uint32_t high) {
    uint32_t what = (uint32_t)key.purpose | (key.operand & 0xff) << 8 | (key.layer & 0xffff) << 16;
    return {{index, key.step, what, high | (key.micro & 0xffff) << 16}};
}
// One of the ten rounds: two words are multiplied by odd constants, 32 bits to 64. The upper halves, which depend on all bits of a word, go by
// xor into the other two words, with the key; the lower halves, from which a word can be had back, stay: so a round can be undone.
HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
    uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ k0, c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ k1, c3 = (uint32_t)a;
}
// What is added to the key from round to round, so that no two are alike: the golden ratio and sqrt(3) - 1, in 32 bits.
constexpr uint32_t philox_step0 = 0x9E3779B9u, philox_step1 = 0xBB67AE85u;

// The 128 random bits of a block.
HD Words philox(RandomKey key, uint32_t index, uint32_t high) {
    Words c = philox_counter(key, index, high);
    uint32_t k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
    for (int round = 0; round < 10; round++, k0 += philox_step0, k1 += philox_step1) {
        philox_round(c.w[0], c.w[1], c.w[2], c.w[3], k0, k1);
    }
    return c;
}
HD Words philox(RandomKey key, uint64_t index) { return philox(key, (uint32_t)index, (uint32_t)(index >> 32)); }

// Uniform in (0, 1): 23 bits, centred, so that neither end is ever drawn (with 24 the half would round up to 1).
HD float uniform(uint32_t word) { return ((float)(word >> 9) + 0.5f) * 1.1920929e-7f; }

// Element `index` of a standard normal stream (Box-Muller: of a Gaussian point in the plane the angle is uniform and radius^2 / 2 is
// exponential, -ln u; elements 2 i and 2 i + 1 are the cosine and the sine of block i).
HD float normal(RandomKey key, uint64_t index) {
    Words r = philox(key, index >> 1);
    float radius = sqrtf(-2.f * log_(uniform(r.w[0]))), s, c;
    sincos_(6.2831853f * uniform(r.w[1]), &s, &c);
    return radius * (index & 1 ? s : c);
}

// ---------------------------------------------------------------------------------------------------------------------------
// The context: everything that is not an argument. One is made in main() and passed to every launch.

struct Cost { double bytes = 0, flops = 0; };   // what a launch must move and compute at the least; the profiler divides by time

// A row for every name that was launched while `on`, in order of first launch. Launches are waited for one by one: a step takes longer.
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
    // This thread's scratch, 64-byte aligned: a cache line, and the widest vector. Contents are not kept between calls.
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

// The name of a tag type, cut out of the compiler's own spelling of this function. A tag, declared and never defined, makes every kernel a type
// and a symbol of its own, and costs no macro and no string that may drift from it.
template <class Tag> const char* tag_name() {
    static const std::string name = [](std::string s) {          // "... [with Tag = rmsnorm_forward]", "... [Tag = rmsnorm_forward]"
        size_t from = s.find("Tag = ") + 6;
        return s.substr(from, s.find_first_of(";]", from) - from);
    }(__PRETTY_FUNCTION__);
    return name.c_str();
}

// ---------------------------------------------------------------------------------------------------------------------------
// Memory. A layout function takes its buffers from an Arena in order; run once with base == nullptr it only measures, so the
// plan that --dry-run prints and the memory that is used come from the same lines:
//
//     Arena measure;                layout(measure);        // every pointer is null; measure.used is what it takes
//     Arena arena = {(char*)device_alloc(measure.used, "activations")};
//     layout(arena);                                        // the same buffers, now somewhere

struct Arena {
    char* base = nullptr;
    size_t used = 0;
    // `count` elements; null while measuring.
    template <class T> T* take(size_t count) {
        T* p = base ? (T*)(base + used) : nullptr;
        used += (count * sizeof(T) + 255) & ~(size_t)255;        // 256: what cuBLASLt and vector loads like best
        return p;
    }
};

// device_alloc: zeroed memory, where kernels run; never null: too little is an error that names `what`. device_free: with its size, which the
// CPU's munmap wants. to_device, to_host, set_zero: n bytes, in the order of launches; after the copies their host memory may be used.
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
// Group: the lanes that work on one row. What it has, on both machines; f, value and op are functions, p rows of n contiguous elements:
//
//     lane(), lanes                    which lane this is, of how many; on the CPU 0 of 1
//     sync()                           all lanes are here, and see what the others have written
//     map(n, f, p...)                  f(an element of each p) for n elements
//     sum(n, f, p...)                  the sum of f; every lane has it
//     max(n, f, p...)                  the maximum of f, NaN passed over, -infinity of nothing; every lane has it
//     sum_double(n, f)                 the sum of f(i), i < n, in double; every lane has it
//     each(n, f)                       f(i), i < n
//     tile(height, width, shift, f)    f(r, c), r < height, c < width <= 2^shift
//     grid16(n, f, ahead)              f(i, j), i < n, j < 16; ahead(i) may fetch what a later i needs (CPU), or is left out
//     draw16(n, key, first, f)         f(i, j, words) likewise, words being block first(i) + j of key's stream; first(i) a multiple of 16
//     fold16<any>(n, value, op, to)    to[i] = value(i, 0..15) put together by op, i < n, n a multiple of 16; any: in whatever order
//     fold_rows16(n, value, op, to)    to[i] = value(0..15, i) likewise (CPU)
//     fetch(p, n)                      asks for the cache lines of n elements (CPU)
//
// Of map, sum and max: a row const T* is read, T* is read and written, out(T*) only written. f sees acc_t's, by reference where it may write
// (random words, const uint32_t*, as they are); sum's f may write, too. Which lane runs f for which element is the group's business, so
// between two calls that use each other's results through memory there is a sync().
//
// The order of additions never depends on threads or timing. sum: on the GPU a lane adds its elements in order and lanes are added in pairs
// (reduce()); on the CPU 16 partial sums, element i into sum i % 16, whatever the width of vectors, then halves. fold16 and fold_rows16: one
// tree (tree16()) on both machines, so that scales made of such sums have the same bits everywhere.

template <class T> struct Out { T* p; };
template <class T> HD Out<T> out(T* p) { return {p}; }
template <class T> HD T* at(T* p, int i) { return p + i; }
template <class T> HD Out<T> at(Out<T> o, int i) { return {o.p + i}; }

// One element of one argument: loaded on construction, stored back (if it may be) on destruction. get() is what f is given.
template <class T> struct Slot {                                 // T*: read and written
    acc_t v;
    T* p;
    HD Slot(T* row, int i) : v(load(row + i)), p(row + i) {}
    HD ~Slot() { store(p, v); }
    HD acc_t& get() { return v; }
};
// What f is given of a T: random words as they are, numbers as acc_t.
template <class T> using element = std::conditional_t<std::is_same_v<T, uint32_t>, uint32_t, acc_t>;
template <class T> struct Slot<const T> {                        // const T*: read
    element<T> v;
    HD Slot(const T* row, int i) : v(load(row + i)) {}
    HD element<T> get() { return v; }
};
template <class T> struct Slot<Out<T>> {                         // out(T*): written
    acc_t v;
    T* p;
    HD Slot(Out<T> row, int i) : p(row.p + i) {}
    HD ~Slot() { store(p, v); }
    HD acc_t& get() { return v; }
};
template <class P> struct slot_of;
template <class T> struct slot_of<T*> { typedef Slot<T> type; };
template <class T> struct slot_of<Out<T>> { typedef Slot<Out<T>> type; };

// f on element i of each argument. The Slots are temporaries of the call's expression, so they live until f has returned: loads come before
// f, stores after it, and what is read may be the row that is written.
template <class F, class... P> HD void apply_one(F& f, int i, P... p) { f(typename slot_of<P>::type(p, i).get()...); }
template <class F, class... P> HD acc_t value_one(F& f, int i, P... p) { return f(typename slot_of<P>::type(p, i).get()...); }

// The `ahead` of who has nothing to fetch.
struct Nothing { template <class... T> HD void operator()(T...) const {} };

// Sixteen values in one order on both machines, whichever axis they lie along: v0 + v8, v1 + v9, ... v7 + v15; of these eight the first four
// plus the last four; then two plus two, one plus one. Halves, not neighbours: that is one addition of vectors at each level.
template <class V, class Op> HD float tree16(V value, Op op) {
    float t[16];
    for (int j = 0; j < 16; j++) t[j] = value(j);
    for (int d = 8; d > 0; d /= 2)
        for (int j = 0; j < d; j++) t[j] = op(t[j], t[j + d]);
    return t[0];
}

#ifdef __CUDACC__
// 16 bytes an instruction: V elements of every argument sit in registers, then the function runs V times. V is what 16 bytes hold of the
// narrowest argument: with bf16 and float V = 8, one load of the former, two of the latter.
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
// V elements of one argument: what Slot is for one.
template <class P, int V> struct Lanes;
template <class T, int V> struct Lanes<T*, V> {                  // read and written
    acc_t v[V];
    T* p;
    __device__ Lanes(T* row, int i) : p(row + i) { load_packet<T, V>(v, p); }
    __device__ ~Lanes() { store_packet<T, V>(p, v); }
    __device__ acc_t& get(int j) { return v[j]; }
};
template <class T, int V> struct Lanes<const T*, V> {            // read
    element<T> v[V];
    __device__ Lanes(const T* row, int i) { load_packet<T, V>(v, row + i); }
    __device__ element<T> get(int j) { return v[j]; }
};
template <class T, int V> struct Lanes<Out<T>, V> {              // written
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
template <class... P> struct widest;                              // V, as above: the largest of 16 / sizeof
template <> struct widest<> { static constexpr int value = 1; };
template <class T, class... R> struct widest<T*, R...> {
    static constexpr int value = std::max<int>(16 / sizeof(T), widest<R...>::value);
};
template <class T, class... R> struct widest<Out<T>, R...> : widest<T*, R...> {};
template <class T> __device__ bool aligned(T* p) { return (uintptr_t)p % 16 == 0; }
template <class T> __device__ bool aligned(Out<T> o) { return (uintptr_t)o.p % 16 == 0; }

// W lanes of a warp, or of a block that is the group's own.
template <int W> struct Group {
    static_assert(W == 8 || W == 16 || W == 32 || W % 128 == 0, "part of a warp, a warp, or a block of its own");
    static constexpr int lanes = W;
    __device__ int lane() const { return threadIdx.x % W; }
    __device__ void sync() const {
        if (W > 32) __syncthreads();
        else __syncwarp(mask());
    }
    template <class T> __device__ static void fetch(T*, int) {}
    // This group's lanes among the 32 of its warp, a bit each: W = 8, lanes 16 to 23: 0x00ff0000.
    __device__ unsigned mask() const { return W >= 32 ? 0xffffffffu : ((1u << (W % 32)) - 1) << (threadIdx.x % 32 / W * W); }

    // By vectors where n and all addresses allow; lane i has elements i V ... i V + V - 1, so lanes read side by side. Else one by one.
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
    template <class F> __device__ void each(int n, F f) const {
        for (int i = lane(); i < n; i += W) f(i);
    }
    template <class F, class A = Nothing> __device__ void grid16(int n, F f, A = {}) const {
        for (int i = lane(); i < 16 * n; i += W) f(i / 16, i % 16);
    }
    template <class B, class F> __device__ void draw16(int n, RandomKey key, B first, F f) const {
        for (int i = lane(); i < 16 * n; i += W) f(i / 16, i % 16, philox(key, first(i / 16) + i % 16));
    }
    // Rows of 2^shift places, so that row and column are a shift and a mask; places beyond the width stay idle.
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
    template <class F> __device__ double sum_double(int n, F f) const {
        double s = 0;
        for (int i = lane(); i < n; i += W) s += f(i);
        return reduce(s, [](double a, double b) { return a + b; });
    }
    // The same value in every lane: a butterfly in the warp, then the warps' values in order. Each lane gives its value to the lane d away and
    // takes that one's; op must not care which comes first, as the two put them together in opposite order. For 8 lanes:
    //
    //     d = 4    0+4  1+5  2+6  3+7  4+0  5+1  6+2  7+3
    //     d = 2    (0+4)+(2+6)  (1+5)+(3+7)  (2+6)+(0+4)  ...
    //     d = 1    all eight, everywhere, in the same bits
    template <class T, class Op> __device__ T reduce(T v, Op op) const {
        for (int d = (W < 32 ? W : 32) / 2; d > 0; d /= 2) v = op(v, __shfl_xor_sync(mask(), v, d));
        if (W <= 32) return v;
        __shared__ T part[W / 32 > 0 ? W / 32 : 1];
        __syncthreads();                                        // part may still be read from the reduce() before
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

// Blocks of at least 128 lanes: small groups share one, a group of 128 or more has its own. The last block may have lanes without a row.
template <class Tag, int W, class F> __global__ void __launch_bounds__(W < 128 ? 128 : W) rows_kernel(int64_t n, F f) {
    constexpr int groups = W < 128 ? 128 / W : 1;
    int64_t r = (int64_t)blockIdx.x * groups + threadIdx.x / W;
    if (r < n) f(Group<W>(), r);
}
#else
// The function must become part of its loop, or the loop is not vectorised; a large kernel makes compilers think otherwise.
#define FLAT __attribute__((flatten))
// One thread, whatever W is; lanes are the elements of its vectors. Loops have constant lengths where they can, or `omp simd`.
template <int W> struct Group {
    static constexpr int lanes = 1;
    int lane() const { return 0; }
    void sync() const {}

    // A cache line is 64 bytes. On a GPU, where other warps hide what is not there yet, this does nothing.
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
    // 16 blocks at a time, whose counters differ in word 0 alone (first(i) is a multiple of 16, so nothing carries), round by round over all
    // 16: a loop that every compiler vectorises.
    template <class B, class F> FLAT void draw16(int n, RandomKey key, B first, F f) const {
        for (int i = 0; i < n; i++) {
            uint64_t block = first(i);
            Words c = philox_counter(key, (uint32_t)block, (uint32_t)(block >> 32));
            uint32_t c0[16], c1[16], c2[16], c3[16], k0 = (uint32_t)key.seed, k1 = (uint32_t)(key.seed >> 32);
            for (int j = 0; j < 16; j++) {
                c0[j] = c.w[0] + j;
                c1[j] = c.w[1], c2[j] = c.w[2], c3[j] = c.w[3];
            }
            for (int round = 0; round < 10; round++, k0 += philox_step0, k1 += philox_step1) {
                #pragma omp simd simdlen(8)                          // with 16 gcc multiplies 64 bits by 64, which takes 1.5 times as long
                for (int j = 0; j < 16; j++) philox_round(c0[j], c1[j], c2[j], c3[j], k0, k1);
            }
            #pragma omp simd
            for (int j = 0; j < 16; j++) f(i, j, Words{{c0[j], c1[j], c2[j], c3[j]}});
        }
    }
    template <class F> FLAT void tile(int height, int width, int, F f) const {
        for (int r = 0; r < height; r++) {
            #pragma omp simd
            for (int c = 0; c < width; c++) f(r, c);
        }
    }
    template <bool any_order = false, class V, class Op> FLAT void fold16(int n, V value, Op op, float* to) const {
        // 64 i's in two passes, the tree's first level and the others: what one stores as halves of vectors is long in the cache when the other
        // loads whole ones.
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
                    // tree16's d = 4, 2, 1
                    to[first + k] = op(op(op(t[0], t[4]), op(t[2], t[6])), op(op(t[1], t[5]), op(t[3], t[7])));
                }
            }
        }
    }
    // The same tree down the rows: 16 columns are a vector, and every level is an addition of whole vectors.
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
    // 8 partial sums: element i into sum i % 8.
    template <class F> FLAT double sum_double(int n, F f) const {
        double s[8] = {};
        for (int i = 0; i < (n & ~7); i += 8) {
            #pragma omp simd
            for (int j = 0; j < 8; j++) s[j] += f(i + j);
        }
        for (int i = n & ~7; i < n; i++) s[i & 7] += f(i);
        return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    }
    // 16 partial sums: one vector of AVX-512, two of AVX2, four of SSE, and the same additions by each.
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

// Runs kernel(group, row) for every row in [0, n), a group of W lanes each. Rows must not depend on each other: they run at any time, in any
// order. Which W: enough for a row's loads, 8 for 64 bf16, 32 for thousands of elements, 128 or more where rows are few. `cost` is for the
// profiler.
template <class Tag, int W = 32, class F> void for_rows(Ctx& ctx, Cost cost, int64_t n, F kernel) {
    Launch launch(ctx, tag_name<Tag>(), cost);
    if (n <= 0) return;
#ifdef __CUDACC__
    constexpr int groups = W < 128 ? 128 / W : 1;
    start(ctx, rows_kernel<Tag, W, F>, (n + groups - 1) / groups, W < 128 ? 128 : W, 0, n, kernel);
#else
    // Sixteen shares a thread, taken as threads come free: a core that is slower, or busy with something else, delays less.
    int64_t share = std::max<int64_t>(1, n / (16 * ctx.threads));
    #pragma omp parallel for schedule(dynamic, share) num_threads(ctx.threads)
    for (int64_t r = 0; r < n; r++) kernel(Group<W>(), r);
#endif
}

#ifdef __CUDACC__
// Four blocks on a multiprocessor, 64 registers a lane: a tile waits for memory and barriers, and others must fill the gaps. (Three on sm_89
// and sm_120, whose 100 KB of shared memory hold no four stages of 31.)
template <class Tag, class Stage, class F> __global__ void __launch_bounds__(256, 4) tiles_kernel(F f) {
    __shared__ Stage stage;
    f(Group<256>(), (int64_t)blockIdx.x, stage);
}
#endif

// Runs kernel(group, tile, stage) for every tile in [0, n). `stage` is a plain struct of arrays near the lanes (shared memory, or
// L1) that lanes fill and read together, with g.sync() between; its contents do not outlive the tile. At most 48 KB.
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
// Launches that repeat. A step of a small model on a GPU is thousands of launches of microseconds, which a CPU may not make fast enough. A CUDA
// graph is a list of launches that was recorded once, with their arguments, and is started as a whole.
//
// Arguments are frozen as they were when recorded, and of all that a step passes to kernels two numbers change: the step and the
// micro-batch in random keys. So keys that are recorded carry a pointer in their place, to a clock in device memory: now() reads it as
// the kernel runs. A kernel of its own sets that clock ahead of the graph whenever the time has changed:
//
//     call 1        f()                                   plans are made and code is loaded, neither of which can be recorded
//     call 2        f() recorded, made a graph, and then as call 3
//     call 3 ...    set_time(), cudaGraphLaunch()         two calls for the CPU, or one, whatever f() launches

// Names a list of launches: equal keys, equal launches with equal arguments. What goes in is the caller's: which block, which pointers.
typedef std::array<int64_t, 8> GraphKey;
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
// A launch like any other, so the stream keeps it behind the graph before and ahead of the one that reads it.
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
            ctx.clock = g.clock;                                                // f() copies it into the keys that it makes
            CUDA(cudaStreamBeginCapture(ctx.stream, cudaStreamCaptureModeRelaxed));
            f();
            CUDA(cudaStreamEndCapture(ctx.stream, &graph));
            ctx.clock = nullptr;
            CUDA(cudaGraphInstantiate(&r.graph, graph, 0));                     // nothing has run yet: recording only writes down
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
