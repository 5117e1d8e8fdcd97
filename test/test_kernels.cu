// test_kernels.cu: every kernel of device.cuh, matmul.cuh, attention.cuh, metis.cuh and llama.cuh against plain loops in double.
//
//     make build/cpu/test_kernels && build/cpu/test_kernels        -v also prints how much of its tolerance each test used
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
#include "../llama.cuh"
#include "test.h"
#include <cfloat>       // FLT_MAX, FLT_MIN

static_assert(sizeof(acc_t) == 4, "finite differences in double are test_model.cu's");

constexpr double u = 0x1p-24, act_u = sizeof(act_t) == 2 ? 0x1p-8 : u;

// Additions that a term of a Group's sum of n goes through at most: 16 partial sums on the CPU, W >= 8 lanes and 32 warps on a GPU.
static double depth(int64_t n) { return n / 8. + 40; }

static bool verbose = false;

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
    void print() {
        if (verbose) printf("   %s: %ld comparisons, up to %.2g of the tolerance\n", name, (long)compared, worst);
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

static Ctx& context(int threads) {
    static Ctx all[3];
    Ctx& ctx = all[threads - 1];
    if (!ctx.plans) ctx.threads = threads, ctx.plans = std::make_shared<MatmulPlans>(ctx);
    return ctx;
}

template <class F> static void test(const char* name, F body) {
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

static double value(float v) { return v; }
static double value(bf16 v) { return load(&v); }
static double value(int v) { return v; }
static double value(uint8_t v) { return v; }
static void assign(float* p, double v) { *p = (float)v; }
static void assign(bf16* p, double v) { store(p, (float)v); }
static void assign(int* p, double v) { *p = (int)v; }

// n elements on the device between guards. Guards and what is not yet written are bytes 0xff: NaN as float and as bf16, -1 as int.
template <class T> struct Buffer {
    static constexpr int64_t guard = 64;
    Run& run;
    int64_t n;
    T *base, *p;                              // p: the first of the n, 16-byte aligned
    std::vector<T> host;                      // the n elements as last sent or fetched

    Buffer(Run& r, int64_t count) : run(r), n(count), base((T*)device_alloc((n + 2 * guard) * sizeof(T), "a test")), p(base + guard), host(n) {
        memset((void*)host.data(), 0xff, n * sizeof(T));
        std::vector<uint8_t> all((n + 2 * guard) * sizeof(T), 0xff);
        to_device(r.ctx, base, all.data(), all.size());
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
    void send() { to_device(run.ctx, p, host.data(), n * sizeof(T)); }
    Buffer& fetch() {
        to_host(run.ctx, host.data(), p, n * sizeof(T));
        run.bits.update(host.data(), n * sizeof(T));
        return *this;
    }
    void guards() {
        std::vector<uint8_t> seen(guard * sizeof(T));
        for (T* side : {base, p + n}) {
            to_host(run.ctx, seen.data(), side, seen.size());
            bool ok = std::all_of(seen.begin(), seen.end(), [](uint8_t b) { return b == 0xff; });
            run.verdict.note(ok, "wrote %s a buffer of %ld elements", side == base ? "before" : "after", (long)n);
        }
    }
    double operator[](int64_t i) const { return value(host[i]); }
    std::vector<double> values() const { return std::vector<double>(begin(), begin() + n); }
    struct Iterator {                         // only what std::vector's constructor needs
        typedef std::forward_iterator_tag iterator_category;
        typedef double value_type;
        typedef std::ptrdiff_t difference_type;
        typedef const double* pointer;
        typedef double reference;
        const T* at;
        double operator*() const { return value(*at); }
        Iterator& operator++() { at++; return *this; }
        bool operator!=(Iterator o) const { return at != o.at; }
        bool operator==(Iterator o) const { return at == o.at; }
        Iterator operator+(int64_t k) const { return {at + k}; }
    };
    Iterator begin() const { return {host.data()}; }
};

static float as_bf16(double v) {
    bf16 b;
    store(&b, (float)v);
    return load(&b);
}

constexpr int widths[] = {1, 7, 16, 48, 64, 100, 513};
constexpr int row_counts[] = {1, 31, 33, 300};
