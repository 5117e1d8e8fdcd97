// device_test.h: what tests of kernels share (test_kernels.cu, test_matmul.cu): verdicts, contexts, guarded buffers, error bounds.
//
// The same source tests both machines: buffers live on the device, are filled and fetched by to_device and to_host, and everything
// is compared on the host. Outputs hold NaN before a kernel writes them, sums (+=) start from known values, and 64 elements of NaN
// lie on either side of every buffer: a stray write changes them, a stray read poisons the result. Every test runs with 1, 2 and 3
// threads in a context of its own; what it fetches must agree to the bit (on a GPU: three runs must).
//
// What is exact is tested for equality: moves, roundings, maxima, sums of small integers. The rest has a bound derived where it
// stands, from three facts. A float operation errs by u = 2^-24 of its result; storing an activation by act_u (2^-8 for bf16, u for
// float); a sum by d u times the sum of its terms' magnitudes, where no term goes through more than d additions. So each
// reference computes, beside the value, the magnitude of what was added up. exp_ and log_ err by 2 units in the last place, 4 u.
#pragma once
#include "../matmul.cuh"    // MatmulPlans; device.cuh: Ctx, Group, for_rows
#include "test.h"

static_assert(sizeof(acc_t) == 4, "finite differences in double are test_model.cu's");

constexpr double u = 0x1p-24, act_u = sizeof(act_t) == 2 ? 0x1p-8 : u;

// Additions that a term of a Group's sum of n goes through at most: 16 partial sums on the CPU, W >= 8 lanes and 32 warps on a GPU.
inline double depth(int64_t n) { return n / 8. + 40; }

// The emulated device takes microseconds for an addition: there a test repeats less often what is the algorithm's, not the machine's.
#ifdef METIS_EMULATED
constexpr bool on_emulated = true;
#else
constexpr bool on_emulated = false;
#endif

inline bool verbose = false;              // -v: how much of its tolerance each test used

inline void begin(int argc, char** argv) {
    verbose = argc > 1 && !strcmp(argv[1], "-v");
    calm_openmp(argv);
}

// ---------------------------------------------------------------------------------------------------------------------------
// What one test saw: the first comparison that failed, printed as one `ok` or `FAIL` line.
struct Verdict {
    const char* name;
    std::string where, first;                 // the shape at work; the first failure
    int64_t compared = 0, failed = 0;
    double worst = 0;                         // the largest error, in units of its tolerance

    void note(bool ok, const char* format, ...) __attribute__((format(printf, 3, 4))) {
        compared++;
        if (ok || failed++) return;
        char text[300];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        first = where + ": " + text;
    }
    void close(double got, double want, double tol, const char* what, int64_t i) {
        if (tol > 0 && near(got, want, tol)) worst = std::max(worst, std::fabs(got - want) / tol);
        note(got == want || near(got, want, tol), "%s[%ld] is %.9g, not %.9g +- %.2g", what, (long)i, got, want, tol);
    }
    double start = seconds();
    void print() {
        if (verbose) printf("   %s: %ld comparisons, up to %.2g of the tolerance, %.2f s\n", name, (long)compared, worst, seconds() - start);
        check(failed == 0 && compared > 0, name, "%ld of %ld; %s", (long)failed, (long)compared, first.c_str());
    }
};

// One execution of a test: its context, and a checksum of all it fetched.
struct Run {
    Ctx& ctx;
    Verdict& verdict;
    bool compare;                             // false: only the bits are wanted
    Checksum bits = {};

    void at(const char* format, ...) __attribute__((format(printf, 2, 3))) {
        char text[200];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        verdict.where = text;
    }
};

inline Ctx& context(int threads) {
    static Ctx all[3];
    Ctx& ctx = all[threads - 1];
    if (!ctx.plans) ctx.threads = threads, ctx.plans = std::make_shared<MatmulPlans>(ctx);
    return ctx;
}

// What float additions of an FP8 GEMM err by: on Hopper a tensor core keeps 13 bits below the largest of 32 products and the sum so far
// (DeepSeek-V3, arXiv 2412.19437, 3.5.2), hence by 33 * 2^-13 of the sum of magnitudes at the worst. The emulated device adds in double.
inline double native_error(Type t) {
#ifdef METIS_EMULATED
    const double loses = 0;
#else
    const double loses = 33 * 0x1p-13;
#endif
    return is_narrow(t) && t != Type::nvfp4 ? loses : 0;
}

// The compute capabilities to ask with_plans() for: these, on the emulated device; on a GPU its own.
inline std::vector<std::string> targets(std::vector<std::string> emulated) {
#if defined(__CUDACC__) && !defined(METIS_EMULATED)
    int major = 0, minor = 0;
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
    return {std::to_string(10 * major + minor)};
#endif
    return emulated;
}
// body() where cuBLASLt offers what a GPU of this compute capability does (emulated device), or what this GPU does; native: METIS_NATIVE. On the CPU
// there is no such choice.
template <class F> void with_plans(Run& r, const std::string& sm, bool native, F body) {
    if (!on_gpu) return (void)body();
    std::shared_ptr<MatmulPlans> kept = r.ctx.plans;
    setenv("EMULATED_SM", sm.c_str(), 1), setenv("METIS_NATIVE", native ? "1" : "0", 1);
    static std::shared_ptr<MatmulPlans> plans[2];                             // kept: each has a workspace
    if (!plans[native]) plans[native] = std::make_shared<MatmulPlans>(r.ctx);
    r.ctx.plans = plans[native], r.ctx.plans->cache.clear();
    body();
    unsetenv("EMULATED_SM"), unsetenv("METIS_NATIVE");
    r.ctx.plans = kept;
}

template <class F> void test(const char* name, F body) {
    Verdict verdict{name, "", ""};
    uint64_t first = 0;
    for (int threads = 1; threads <= 3; threads++) {
        Run run{context(threads), verdict, threads == 1};
        body(run);
        if (threads == 1) first = run.bits.value();
        run.at("%d threads", threads);
        verdict.note(run.bits.value() == first, "not the bits of one thread");
    }
    verdict.print();
}

// Random numbers that owe nothing to the code under test (splitmix64).
struct Rng {
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
    int below(int n) { return (int)(next() % n); }
    double operator()(double scale) { return scale * ((double)(next() >> 40) * 0x1p-23 - 1); }      // uniform in [-scale, scale)
};

inline double value(float v) { return v; }
inline double value(bf16 v) { return load(&v); }
inline void assign(float* p, double v) { *p = (float)v; }
inline void assign(bf16* p, double v) { store(p, (float)v); }
inline void assign(int* p, double v) { *p = (int)v; }

// n elements on the device between guards. Guards and what is not yet written are 0x7fa5 over and over: as float and as bf16 a
// signalling NaN, which turns quiet, hence other bits, even if a kernel only adds to it; as int an index far out of anything.
inline uint8_t filler(int64_t byte) { return byte % 2 ? 0x7f : 0xa5; }

template <class T> struct Buffer {
    static constexpr int64_t guard = 64;
    Run& run;
    int64_t n;
    T *base, *p;                              // p: the first of the n, 16-byte aligned
    std::vector<T> host;                      // the n elements as last sent or fetched

    Buffer(Run& r, int64_t count) : run(r), n(count), base((T*)device_alloc((n + 2 * guard) * sizeof(T), "a test")), p(base + guard), host(n) {
        std::vector<uint8_t> all((n + 2 * guard) * sizeof(T));
        for (size_t i = 0; i < all.size(); i++) all[i] = filler((int64_t)i);
        to_device(r.ctx, base, all.data(), all.size());
        if (n) memcpy((void*)host.data(), all.data(), n * sizeof(T));
    }
    template <class F> Buffer(Run& r, int64_t count, F f) : Buffer(r, count) {
        for (int64_t i = 0; i < n; i++) assign(&host[i], (double)f(i));
        send();
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() {
        guards();
        device_free(base, (n + 2 * guard) * sizeof(T));
    }
    void send() { if (n) to_device(run.ctx, p, host.data(), n * sizeof(T)); }
    Buffer& fetch() {
        if (n) to_host(run.ctx, host.data(), p, n * sizeof(T)), run.bits.update(host.data(), n * sizeof(T));
        return *this;
    }
    void guards() {
        std::vector<uint8_t> seen(guard * sizeof(T));
        for (T* side : {base, p + n}) {
            to_host(run.ctx, seen.data(), side, seen.size());
            bool ok = true;
            for (size_t i = 0; i < seen.size(); i++) ok = ok && seen[i] == filler((side - base) * (int64_t)sizeof(T) + (int64_t)i);
            run.verdict.note(ok, "wrote %s a buffer of %ld elements", side == base ? "before" : "after", (long)n);
        }
    }
    double operator[](int64_t i) const { return value(host[i]); }
    std::vector<double> values() const {
        std::vector<double> all(n);
        for (int64_t i = 0; i < n; i++) all[i] = value(host[i]);
        return all;
    }
};

inline float as_bf16(double v) {
    bf16 b;
    store(&b, (float)v);
    return load(&b);
}
