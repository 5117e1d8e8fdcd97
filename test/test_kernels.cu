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
static void assign(float* p, double v) { *p = (float)v; }
static void assign(bf16* p, double v) { store(p, (float)v); }
static void assign(int* p, double v) { *p = (int)v; }

// n elements on the device between guards. Guards and what is not yet written are 0x7fa5 over and over: as float and as bf16 a
// signalling NaN, which turns quiet, hence other bits, even if a kernel only adds to it; as int an index far out of anything.
static uint8_t filler(int64_t byte) { return byte % 2 ? 0x7f : 0xa5; }

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

static float as_bf16(double v) {
    bf16 b;
    store(&b, (float)v);
    return load(&b);
}

constexpr int widths[] = {1, 7, 16, 48, 64, 100, 513};
constexpr int row_counts[] = {1, 31, 33, 300};
struct Shape { int64_t m, n, k; };

// ---------------------------------------------------------------------------------------------------------------------------
// Scalars: bits, conversions, math. Kernels that apply one function to an array; each result is also compared with a call on the
// host, since both machines promise the same bits.

struct apply;

HD int chunk_size(int64_t n, int64_t r) { return (int)(n - r * chunk < chunk ? n - r * chunk : chunk); }

struct Same { HD acc_t operator()(acc_t v) const { return v; } };
struct Exp { HD acc_t operator()(acc_t v) const { return exp_(v); } };
struct Log { HD acc_t operator()(acc_t v) const { return log_(v); } };
struct Sine { HD acc_t operator()(acc_t v) const { acc_t s, c; sincos_(v, &s, &c); return s; } };
struct Cosine { HD acc_t operator()(acc_t v) const { acc_t s, c; sincos_(v, &s, &c); return c; } };
struct Finite { HD acc_t operator()(acc_t v) const { return is_finite(v); } };

template <class F, class To, class From> static void apply_to(Ctx& ctx, To* y, const From* x, int64_t n) {
    for_rows<apply, 128>(ctx, {}, chunks_of(n), KERNEL(Group<128> g, int64_t r) {
        g.map(chunk_size(n, r), [](acc_t& o, acc_t v) { o = F()(v); }, out(y + r * chunk), x + r * chunk);
    });
}
static void draw_normal(Ctx& ctx, float* y, float* z, RandomKey key, int64_t n) {
    for_rows<apply, 128>(ctx, {}, chunks_of(n), KERNEL(Group<128> g, int64_t r) {
        for (int64_t i = r * chunk + g.lane(); i < n && i < (r + 1) * chunk; i += g.lanes) y[i] = normal(key, i), z[i] = uniform(philox(key, i).w[3]);
    });
}

static const float infinity = float_of(0x7f800000);

// |got - exact| in units of the float that is next to exact.
static double ulps(float got, double exact) {
    int e;
    std::frexp(exact, &e);
    return std::fabs(got - exact) / std::ldexp(1.0, std::max(e, -125) - 24);
}

static void test_bf16(Run& r) {
    r.at("every bf16");
    Buffer<bf16> all(r, 65536), back(r, 65536);
    for (int i = 0; i < 65536; i++) all.host[i].bits = (uint16_t)i;
    all.send();
    Buffer<float> wide(r, 65536);
    apply_to<Same>(r.ctx, wide.p, (const bf16*)all.p, 65536);
    wide.fetch();
    apply_to<Same>(r.ctx, back.p, (const float*)wide.p, 65536);
    back.fetch();
    for (uint32_t i = 0; i < 65536 && r.compare; i++) {
        bool nan = (i & 0x7fff) > 0x7f80;
        r.verdict.note(bits_of(wide.host[i]) == i << 16, "0x%04x is read as 0x%08x", i, bits_of(wide.host[i]));
        r.verdict.note(back.host[i].bits == (nan ? i | 0x40 : i), "0x%04x comes back as 0x%04x", i, back.host[i].bits);
    }
    r.at("float to bf16");
    const uint32_t low[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};             // exact, just off it, around half-way
    int64_t n = 6 * 65536;
    Buffer<float> x(r, n);
    for (int64_t i = 0; i < n; i++) x.host[i] = float_of((uint32_t)(i / 6) << 16 | low[i % 6]);
    x.send();
    Buffer<bf16> y(r, n);
    apply_to<Same>(r.ctx, y.p, (const float*)x.p, n);
    y.fetch();
    for (int64_t i = 0; i < n && r.compare; i++) {
        uint32_t bits = (uint32_t)(i / 6) << 16 | low[i % 6], h = bits >> 16, want;
        if ((bits & 0x7fffffff) > 0x7f800000) want = h | 0x40;
        else if ((h & 0x7fff) == 0x7f80) want = h;
        else {                                                                // the nearer of the two neighbours, or the even one
            double v = std::fabs((double)float_of(bits)), below = std::fabs((double)float_of(h << 16));
            double above = (h & 0x7fff) == 0x7f7f ? 0x1p128 : std::fabs((double)float_of((h + 1) << 16));
            want = v - below < above - v ? h : v - below > above - v ? h + 1 : h + (h & 1);
        }
        r.verdict.note(y.host[i].bits == want, "0x%08x becomes 0x%04x, not 0x%04x", bits, y.host[i].bits, want);
    }
}

static void test_is_finite(Run& r) {
    const uint32_t f[] = {0, 1, 0x007fffff, 0x00800000, 0x3f800000, 0x7f7fffff, 0x7f800000, 0x7f800001, 0x7fbfffff, 0x7fc00000, 0x7fffffff};
    Buffer<float> x(r, 22), y(r, 22);
    for (int i = 0; i < 22; i++) x.host[i] = float_of(f[i / 2] | (i % 2 ? 0x80000000 : 0));
    x.send();
    apply_to<Finite>(r.ctx, y.p, (const float*)x.p, 22);
    y.fetch();
    for (int i = 0; i < 22; i++) {
        r.verdict.note(is_finite(float_of(f[i / 2] | (i % 2 ? 0x80000000 : 0))) == (i / 2 < 6), "float 0x%08x on the host", f[i / 2]);
        r.verdict.note(y[i] == (i / 2 < 6), "float 0x%08x on the device", f[i / 2]);
    }
    const uint64_t d[] = {0, 1, 0x000fffffffffffff, 0x0010000000000000, 0x7fefffffffffffff,
                          0x7ff0000000000000, 0x7ff0000000000001, 0x7ff8000000000000, 0x7fffffffffffffff};
    for (int i = 0; i < 18; i++) {
        uint64_t bits = d[i / 2] | (i % 2 ? 0x8000000000000000u : 0);
        double v;
        memcpy(&v, &bits, 8);
        r.verdict.note(is_finite(v) == (i / 2 < 5), "double 0x%016lx", (unsigned long)bits);
    }
}

// 2 units in the last place wherever e^x is a normal float; 0 below and infinity above the stated limits; NaN stays NaN.
static void test_exp(Run& r) {
    std::vector<float> x = {0, -0.f, -87.3f, std::nextafterf(-87.3f, -100), 88.37f, std::nextafterf(88.37f, 100), 89, -88, 1e30f, -1e30f, FLT_MAX,
                            -FLT_MAX, infinity, -infinity, NAN, -(float)NAN, 1e-40f, -1e-40f, FLT_MIN, -FLT_MIN};
    for (uint32_t b = 0x30000000; b < 0x42b10000; b += 641) x.push_back(float_of(b)), x.push_back(float_of(b | 0x80000000));   // to 88.5
    for (uint32_t b = 0x42b10000; b < 0x7f800000; b += 100003) x.push_back(float_of(b)), x.push_back(float_of(b | 0x80000000));   // to FLT_MAX
    for (int n = -125; n < 128; n++)                                          // where the power of two changes
        for (int k = -3; k <= 3; k++) x.push_back(float_of(bits_of((float)((n + 0.5) * M_LN2)) + k));
    int64_t n = (int64_t)x.size();
    Buffer<float> in(r, n, [&](int64_t i) { return x[i]; }), y(r, n);
    apply_to<Exp>(r.ctx, y.p, (const float*)in.p, n);
    y.fetch();
    if (!r.compare) return;
    for (int64_t i = 0; i < n; i++) {
        float v = x[i], got = y.host[i], host = exp_(v);
        bool nan = (bits_of(v) & 0x7fffffff) > 0x7f800000;
        r.verdict.note(nan || !memcmp(&host, &got, 4), "exp_(%.9g) is %.9g on the host, %.9g in a kernel", v, host, got);
        if (nan) r.verdict.note((bits_of(got) & 0x7fffffff) > 0x7f800000, "exp_(NaN) is %g", got);
        else if (v < -87.3f) r.verdict.note(bits_of(got) == 0, "exp_(%.9g) is %g, not 0", v, got);
        else if (v > 88.37f) r.verdict.note(got == infinity, "exp_(%.9g) is %g, not infinity", v, got);
        else r.verdict.close(ulps(got, std::exp((double)v)), 0, 2, "exp_: units in the last place at bits", (int64_t)bits_of(v));
    }
}

// 2 units in the last place over all normal floats, dense around 1 where the logarithm vanishes (1.97 is the worst of all floats).
// What is not a positive number must not become one: NaN would hide from the loss.
static void test_log(Run& r) {
    std::vector<float> x = {infinity, NAN, -(float)NAN, -infinity, -1, 0, 1e-45f, 1e-39f, 1, FLT_MIN, FLT_MAX, 2, 0.5f,
                            float_of(0x3f3504f2), float_of(0x3f3504f3), float_of(0x3f3504f4), float_of(0x3fb504f3)};
    for (uint32_t b = 0x00800000; b < 0x7f800000; b += 1669) x.push_back(float_of(b));
    for (uint32_t b = 0x3f666666; b < 0x3f8ccccd; b += 5) x.push_back(float_of(b));                                            // 0.9 to 1.1
    int64_t n = (int64_t)x.size();
    Buffer<float> in(r, n, [&](int64_t i) { return x[i]; }), y(r, n);
    apply_to<Log>(r.ctx, y.p, (const float*)in.p, n);
    y.fetch();
    for (int64_t i = 0; i < n && r.compare; i++) {
        float host = log_(x[i]);
        r.verdict.note(i < 5 || !memcmp(&host, &y.host[i], 4), "log_(%.9g) is %.9g on the host, %.9g in a kernel", x[i], host, y.host[i]);
        if (i < 8) r.verdict.note(i == 0 ? y.host[i] == infinity : i < 5 ? std::isnan(y.host[i]) : y.host[i] == -infinity, "log_(%g) is %g", x[i], y[i]);
        else if (x[i] == 1) r.verdict.close(y[i], 0, 0, "log_(1)", 0);
        else r.verdict.close(ulps(y.host[i], std::log((double)x[i])), 0, 2, "log_: units in the last place at bits", (int64_t)bits_of(x[i]));
    }
}

// 1.2e-7, one unit in the last place of 1, up to 10^6; and next to the multiples of pi/2, where a poor reduction shows.
static void test_sincos(Run& r) {
    std::vector<float> x = {0.f, -0.f, 1e-40f, FLT_MIN, 1e6f, -1e6f};
    for (uint32_t b = 0x20000000; b < 0x49742400; b += 1669) x.push_back(float_of(b)), x.push_back(float_of(b | 0x80000000));
    for (int k = -600000; k < 600000; k += 101) x.push_back((float)(k * M_PI_2));
    int64_t n = (int64_t)x.size();
    Buffer<float> in(r, n, [&](int64_t i) { return x[i]; }), s(r, n), c(r, n);
    apply_to<Sine>(r.ctx, s.p, (const float*)in.p, n);
    apply_to<Cosine>(r.ctx, c.p, (const float*)in.p, n);
    s.fetch(), c.fetch();
    for (int64_t i = 0; i < n && r.compare; i++) {
        float hs, hc;
        sincos_(x[i], &hs, &hc);
        r.verdict.note(!memcmp(&hs, &s.host[i], 4) && !memcmp(&hc, &c.host[i], 4), "sincos_(%.9g) differs between host and kernel", x[i]);
        r.verdict.close(s[i], std::sin((double)x[i]), 1.2e-7, "sin of float with bits", (int64_t)bits_of(x[i]));
        r.verdict.close(c[i], std::cos((double)x[i]), 1.2e-7, "cos of float with bits", (int64_t)bits_of(x[i]));
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// Random numbers

// Random123's known answers for philox4x32-10 (kat_vectors of its distribution). Its counter is our four packed words:
//     c0 = index's low half    c1 = step    c2 = purpose | operand << 8 | layer << 16    c3 = index's high half | micro << 16
// and its key is the seed, low word first.
static void test_philox(Run& r) {
    struct { uint32_t c[4], k[2], w[4]; } known[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
    for (auto& t : known) {
        RandomKey key = {t.k[0] | (uint64_t)t.k[1] << 32, t.c[1], t.c[3] >> 16, t.c[2] >> 16, t.c[2] >> 8 & 0xff, (Purpose)(t.c[2] & 0xff)};
        Words seen = philox(key, t.c[0] | (uint64_t)(t.c[3] & 0xffff) << 32);
        for (int i = 0; i < 4; i++) r.verdict.note(seen.w[i] == t.w[i], "counter %08x..: word %d is %08x, not %08x", t.c[0], i, seen.w[i], t.w[i]);
    }
    // Streams that differ in any one field differ.
    RandomKey base = {1, 2, 3, 4, 5, Purpose::test}, other[] = {base, base, base, base, base, base, base};
    other[1].seed ^= 1ull << 40, other[2].step++, other[3].micro++, other[4].layer++, other[5].operand++, other[6].purpose = Purpose::init;
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < i; j++) {
            Words a = philox(other[i], 9), b = philox(other[j], 9);
            r.verdict.note(memcmp(&a, &b, sizeof a) != 0, "keys %d and %d name one stream", i, j);
        }
}

// A draw is Box-Muller of the first two words of block i / 2, even elements by the cosine, in double; errors are those of the angle,
// of sincos_ and of log_ under the root. Moments of 2^20 draws within 5 standard errors (one in 10^6 seeds would miss; this one is
// fixed). The k-th moment of n draws has standard error sqrt((E x^2k - (E x^k)^2) / n).
static void test_distributions(Run& r) {
    const int64_t n = 1 << 20;
    RandomKey key = {77, 1, 2, 3, 4, Purpose::test};
    Buffer<float> y(r, n), z(r, n);
    draw_normal(r.ctx, y.p, z.p, key, n);
    y.fetch(), z.fetch();
    if (!r.compare) return;
    double m[5] = {}, pairs = 0, steps = 0, w[3] = {};
    for (int64_t i = 0; i < n; i++) {
        double v = y[i], t = z[i] - 0.5;
        if (i % 64 < 2) {
            float host = normal(key, i);
            r.verdict.note(!memcmp(&host, &y.host[i], 4), "normal(%ld) is %.9g on the host, %.9g in a kernel", (long)i, host, v);
            Words block = philox(key, i / 2);
            double radius = std::sqrt(-2 * std::log((double)uniform(block.w[0]))), angle = 2 * M_PI * uniform(block.w[1]);
            r.verdict.close(v, radius * (i % 2 ? std::sin(angle) : std::cos(angle)), radius * (3 * u * angle + 1.2e-7 + 4 * u), "normal", i);
        }
        for (int k = 1; k <= 4; k++) m[k] += std::pow(v, k) / n;
        if (i % 2) pairs += v * y[i - 1] / (n / 2);                            // the two elements of a block
        else if (i) steps += v * y[i - 1] / (n / 2);                           // neighbours in different blocks
        w[1] += t / n, w[2] += t * t / n;
        r.verdict.note(z[i] > 0 && z[i] < 1, "uniform draws %.9g", z[i]);
        r.verdict.note(std::fabs(v) < 5.8, "normal draws %.9g", v);            // sqrt(-2 ln 2^-24) = 5.768
    }
    double e = 5 / std::sqrt((double)n);
    r.verdict.close(m[1], 0, e, "normal: mean", 0);
    r.verdict.close(m[2], 1, e * std::sqrt(2), "normal: second moment", 0);
    r.verdict.close(m[3], 0, e * std::sqrt(15), "normal: third moment", 0);
    r.verdict.close(m[4], 3, e * std::sqrt(96), "normal: fourth moment", 0);
    r.verdict.close(pairs, 0, e * std::sqrt(2), "normal: correlation within a block", 0);
    r.verdict.close(steps, 0, e * std::sqrt(2), "normal: correlation between blocks", 0);
    r.verdict.close(w[1], 0, e * std::sqrt(1 / 12.), "uniform: mean", 0);
    r.verdict.close(w[2], 1 / 12., e * std::sqrt(1 / 80. - 1 / 144.), "uniform: variance", 0);
    // Ends, and the grid: the middle of the interval that the word's high bits name.
    r.verdict.note(uniform(0) > 0 && uniform(0) < 1e-6, "the smallest uniform is %.9g", uniform(0));
    r.verdict.note(uniform(0xffffffff) < 1, "the largest uniform is %.9g", uniform(0xffffffff));
    for (uint64_t word = 0; word < 1ull << 32; word += 1000003)
        r.verdict.close(uniform((uint32_t)word), word * 0x1p-32, 0x1p-23, "uniform at word", (int64_t)word);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Context, memory, Group

static void test_names(Run& r) {
    r.verdict.note(!strcmp(tag_name<rope>(), "rope"), "tag_name<rope> is %s", tag_name<rope>());
    r.verdict.note(!strcmp(tag_name<residual_rmsnorm_forward>(), "residual_rmsnorm_forward"), "it is %s", tag_name<residual_rmsnorm_forward>());
    r.verdict.note(tag_name<rope>() == tag_name<rope>(), "a name moves");
    Buffer<float> x(r, 100, [](int64_t) { return 1; }), y(r, 100);
    Ctx& ctx = r.ctx;
    apply_to<Same>(ctx, y.p, (const float*)x.p, 100);
    r.verdict.note(ctx.profiler.rows.empty(), "a profiler that is off books");
    ctx.profiler.on = true;
    add_sum(ctx, y.p, x.p, 100), add_sum(ctx, y.p, x.p, 50);
    matmul(ctx, "a matmul", y.p, 4, mat(x.p, 5), mat(x.p, 4), 3, 4, 5, 0);
    ctx.profiler.on = false;
    r.verdict.note(ctx.profiler.rows.size() == 2, "%zu rows", ctx.profiler.rows.size());
    Profiler::Row sum = ctx.profiler.row("sum_rows"), product = ctx.profiler.row("a matmul");
    r.verdict.note(sum.calls == 2 && sum.bytes == 600 && sum.seconds > 0, "sum_rows: %ld calls, %g bytes", (long)sum.calls, sum.bytes);
    bool right = product.calls == 1 && product.flops == 2 * 3 * 4 * 5 && product.bytes == 4 * (15 + 20 + 12);
    r.verdict.note(right, "matmul: %g FLOPs, %g bytes", product.flops, product.bytes);
    ctx.profiler = {};
}

static void test_memory(Run& r) {
    for (int64_t n : {0, 1, 255, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 19}) {
        r.at("set_zero of %ld bytes", (long)n);
        Buffer<uint8_t> x(r, n + 1);
        set_zero(r.ctx, x.p, n);
        x.fetch();
        for (int64_t i = 0; i <= n; i++)
            if (x.host[i] != (i < n ? 0 : filler(i))) r.verdict.note(false, "byte %ld is %d", (long)i, x.host[i]);
        r.verdict.note(true, " ");
    }
    r.at("device_alloc");
    for (size_t n : {(size_t)1, (size_t)256, (size_t)3 << 20}) {
        std::vector<char> seen(n, 1);
        void* p = device_alloc(n, "a test");
        to_host(r.ctx, seen.data(), p, n);
        r.verdict.note(std::count(seen.begin(), seen.end(), 0) == (long)n, "%zu bytes are not zeroed", n);
        r.verdict.note((uintptr_t)p % 256 == 0, "not aligned");
        device_free(p, n);
    }
    r.at("Arena");
    char memory[2048];
    Arena measure, real{memory};
    for (Arena* a : {&measure, &real}) {
        char* c = a->take<char>(1);
        float* f = a->take<float>(64);
        double* d = a->take<double>(33);
        char* none = a->take<char>(0);
        r.verdict.note(a->used == 256 + 256 + 512, "used %zu", a->used);
        if (a == &measure) r.verdict.note(!c && !f && !d && !none, "an address without memory");
        else r.verdict.note(c == memory && (char*)f == memory + 256 && (char*)d == memory + 512 && none == memory + 1024, "buffers overlap");
    }
}

struct group_test;

// o = 3 a + b, c += a for rows of n, sums and maxima, for any alignment of the rows.
template <int W, class A, class O>
static void run_group(Ctx& ctx, int64_t rows, int n, O* o, acc_t* c, acc_t* sums, acc_t* maxima, const A* a, const acc_t* b) {
    for_rows<group_test, W>(ctx, {}, rows, KERNEL(Group<W> g, int64_t r) {
        g.map(n, [](acc_t& to, acc_t& add, acc_t v, acc_t w) { to = 3 * v + w, add += v; }, out(o + r * n), c + r * n, a + r * n, b + r * n);
        acc_t s = g.sum(n, [](acc_t v, acc_t w) { return v * w; }, a + r * n, b + r * n);
        acc_t m = g.max(n, [](acc_t v) { return -v; }, a + r * n);
        if (g.lane() == 0) sums[r] += s, maxima[r] = m;
    });
}

// Integers up to 32: every product, and every sum of up to 1000 of them (2^20), is a float and 3 a + b a bf16, so all is exact.
template <int W, class A, class O> static void test_group_exact(Run& r, int n, int64_t rows, int shift) {
    r.at("Group<%d>, %d columns, %ld rows, %d-byte elements, shift %d", W, n, (long)rows, (int)sizeof(A), shift);
    Rng rng{(uint64_t)n * 100 + W};
    int64_t all = rows * n + shift;
    Buffer<A> a(r, all, [&](int64_t) { return rng.below(65) - 32; });
    Buffer<acc_t> b(r, all, [&](int64_t) { return rng.below(65) - 32; }), c(r, all, [&](int64_t) { return rng.below(9); });
    Buffer<acc_t> sums(r, rows, [](int64_t i) { return i; }), maxima(r, rows);
    Buffer<O> o(r, all);
    std::vector<double> before = c.values();
    run_group<W>(r.ctx, rows, n, o.p + shift, c.p + shift, sums.p, maxima.p, (const A*)a.p + shift, (const acc_t*)b.p + shift);
    o.fetch(), c.fetch(), sums.fetch(), maxima.fetch();
    if (!r.compare) return;
    for (int64_t k = 0; k < rows; k++) {
        double sum = (double)k, largest = -INFINITY;
        for (int64_t i = shift + k * n; i < shift + (k + 1) * n; i++) {
            r.verdict.close(o[i], 3 * a[i] + b[i], 0, "map", i);
            r.verdict.close(c[i], before[i] + a[i], 0, "map adding", i);
            sum += a[i] * b[i], largest = std::max(largest, -a[i]);
        }
        r.verdict.close(sums[k], sum, 0, "sum", k);
        r.verdict.close(maxima[k], largest, 0, "max", k);
    }
}

struct group_sum;
template <int W> static void run_sum(Ctx& ctx, int n, acc_t* s, const acc_t* a) {
    for_rows<group_sum, W>(ctx, {}, 1, KERNEL(Group<W> g, int64_t) {
        acc_t v = g.sum(n, [](acc_t x) { return x; }, a);
        if (g.lane() == 0) s[0] = v;
    });
}

// Reals. On the CPU the order is a promise: element i joins partial sum i % 16, then halves are added.
template <int W> static void test_group_sum(Run& r, int n) {
    r.at("Group<%d>, %d columns", W, n);
    Rng rng{(uint64_t)n};
    Buffer<acc_t> a(r, n, [&](int64_t) { return rng(1); }), s(r, 1);
    run_sum<W>(r.ctx, n, s.p, (const acc_t*)a.p);
    s.fetch();
    double want = 0, size = 0;
    float part[16] = {};
    for (int i = 0; i < n; i++) want += a[i], size += std::fabs(a[i]), part[i % 16] += a.host[i];
    r.verdict.close(s[0], want, depth(n) * u * size, "sum", 0);
    for (int d = 8; d > 0; d /= 2)
        for (int j = 0; j < d; j++) part[j] += part[j + d];
    if (!on_gpu) r.verdict.close(s[0], part[0], 0, "sum in its order", 0);
}

struct count_rows;
static void run_count(Ctx& ctx, acc_t* count, int64_t rows) {
    for_rows<count_rows, 8>(ctx, {}, rows, KERNEL(Group<8> g, int64_t r) { g.map(1, [](acc_t& o) { o += 1; }, count + r); });
}

static void test_group(Run& r) {
    for (int n : {0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 48, 64, 100, 256, 513, 1000})
        for (int shift : {0, 1}) {
            test_group_exact<8, act_t, act_t>(r, n, 5, shift);
            test_group_exact<32, bf16, acc_t>(r, n, 9, shift);
            test_group_exact<128, acc_t, bf16>(r, n, 3, shift);
            test_group_exact<256, acc_t, acc_t>(r, n, 2, shift);
        }
    for (int n : {1, 15, 16, 17, 100, 513, 4096, 50304}) test_group_sum<8>(r, n), test_group_sum<32>(r, n), test_group_sum<256>(r, n);
    for (int64_t rows : {0, 1, 15, 16, 17, 1000}) {
        r.at("%ld rows", (long)rows);
        Buffer<acc_t> count(r, rows + 1, [](int64_t i) { return i; });
        run_count(r.ctx, count.p, rows);
        count.fetch();
        for (int64_t i = 0; i <= rows; i++) r.verdict.close(count[i], double(i + (i < rows)), 0, "visits of row", i);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// matmul

// A tensor core aligns a few products to the largest and cuts what falls off: less exact than a float addition, by up to 2^3.
static double product_u(Type t) { return on_gpu && t == Type::bf16 ? 8 * u : u; }

// `integers`: operands in {-1, 0, 1} and C in [-8, 8]. Then every partial sum is an integer far below 256 (a walk of k <= 2049
// steps of variance 4/9 ends 30 away; 256 is 8 standard deviations), exact as float and as bf16: the result must be equal.
// Otherwise reals: products of floats are rounded once and each goes through at most k additions.
template <class A, class C> static void test_product(Run& r, int64_t m, int64_t n, int64_t k, bool ta, bool tb, int beta, bool integers) {
    int64_t pad = ta ^ tb ^ (beta != 0) ? 0 : 5, a_rows = ta ? k : m, a_cols = ta ? m : k, b_rows = tb ? n : k, b_cols = tb ? k : n;
    int64_t lda = a_cols + pad, ldb = b_cols + 2 * pad, ldc = n + pad;
    r.at("%s%s%s %ldx%ldx%ld beta %d, %d-byte operands, %s", ta ? "A^T " : "A ", tb ? "B^T " : "B ", pad ? "padded" : "", (long)m, (long)n,
         (long)k, beta, (int)sizeof(A), integers ? "integers" : "reals");
    Rng rng{(uint64_t)(m * 31 + n * 7 + k)};
    auto draw = [&](int64_t i, int64_t ld, int64_t cols) { return i % ld >= cols ? NAN : integers ? rng.below(3) - 1 : rng(1); };
    Buffer<A> a(r, (a_rows - 1) * lda + a_cols, [&](int64_t i) { return draw(i, lda, a_cols); });
    Buffer<A> b(r, (b_rows - 1) * ldb + b_cols, [&](int64_t i) { return draw(i, ldb, b_cols); });
    Buffer<C> c(r, (m - 1) * ldc + n);                                        // NaN: beta 0 must not multiply what is there
    if (beta) {
        for (int64_t i = 0; i < c.n; i++)
            if (i % ldc < n) assign(&c.host[i], integers ? rng.below(17) - 8 : rng(1));
        c.send();
    }
    std::vector<C> before = c.host;
    Mat A_ = mat(a.p, lda), B_ = mat(b.p, ldb);
    matmul(r.ctx, "test", c.p, ldc, ta ? A_.transposed() : A_, tb ? B_.transposed() : B_, m, n, k, beta);
    c.fetch();
    if (!r.compare) return;
    std::vector<double> x(m * k), y(n * k);                                   // A, and B's transpose: both read along k
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < k; p++) x[i * k + p] = ta ? a[p * lda + i] : a[i * lda + p];
    for (int64_t j = 0; j < n; j++)
        for (int64_t p = 0; p < k; p++) y[j * k + p] = tb ? b[j * ldb + p] : b[p * ldb + j];
    const double step = (k + 2) * product_u(type_of<A>());
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double s = beta ? value(before[i * ldc + j]) : 0, size = std::fabs(s);
            for (int64_t p = 0; p < k; p++) {
                double t = x[i * k + p] * y[j * k + p];
                s += t, size += std::fabs(t);
            }
            double tol = integers ? 0 : step * size + (sizeof(C) == 2 ? act_u : u) * std::fabs(s);
            r.verdict.close(c[i * ldc + j], s, tol, "C", i * ldc + j);
        }
    for (int64_t i = 0; i < c.n; i++)
        if (i % ldc >= n) r.verdict.note(!memcmp(&c.host[i], &before[i], sizeof(C)), "wrote between rows of C, at %ld", (long)i);
}

template <class A, class C> static void test_products(Run& r) {
    const Shape shapes[] = {{1, 1, 1}, {1, 7, 33}, {3, 5, 7}, {17, 33, 16}, {64, 48, 100}, {255, 96, 31}, {256, 1024, 8},
                            {257, 1025, 17}, {511, 64, 65}, {513, 1023, 3}, {33, 2049, 16}, {5, 16, 2049}, {600, 1, 5}};
    for (auto [m, n, k] : shapes)
        for (int combination = 0; combination < 8; combination++)
            for (bool integers : {true, false}) test_product<A, C>(r, m, n, k, combination & 1, combination & 2, combination >> 2, integers);
}

#ifndef __CUDACC__
// The plain loops promise more: a chain of fused multiply-adds over ascending k from 0, then one addition. To the bit.
template <class T> static void test_plain_loops(Run& r) {
    const Shape shapes[] = {{1, 1, 1}, {3, 15, 7}, {4, 16, 33}, {5, 17, 100}, {9, 40, 513}};
    for (auto [m, n, k] : shapes)
        for (int combination = 0; combination < 8; combination++) {
            bool ta = combination & 1, tb = combination & 2, add = combination & 4;
            r.at("%d-byte reals, %ldx%ldx%ld, combination %d", (int)sizeof(T), (long)m, (long)n, (long)k, combination);
            Rng rng{(uint64_t)(k + combination)};
            std::vector<T> a(m * k), b(k * n), c(m * n), before(m * n), panel(16 * k);
            for (T& v : a) v = (T)rng(1);
            for (T& v : b) v = (T)rng(1);
            for (T& v : before) v = (T)rng(1);
            c = add ? before : std::vector<T>(m * n, (T)NAN);
            plain_tile<T>(c.data(), n, {a.data(), type_of<T>(), ta ? m : k, ta}, {b.data(), type_of<T>(), tb ? k : n, tb}, m, n, k, add, panel.data());
            for (int64_t i = 0; i < m * n; i++) {
                T s = 0;
                for (int64_t p = 0; p < k; p++) s = std::fma(a[ta ? p * m + i / n : i / n * k + p], b[tb ? i % n * k + p : p * n + i % n], s);
                if (add) s = before[i] + s;
                r.verdict.note(c[i] == s, "C[%ld] is %.17g, not %.17g", (long)i, (double)c[i], (double)s);
            }
        }
}
#endif

// ---------------------------------------------------------------------------------------------------------------------------
// attention

// Bounds. A score s = q.k / sqrt(D) errs by e <= (D + 4) u |q|.|k| / sqrt(D), hence p = exp(s - m) by 2 e + 8 u of itself (the
// difference of two scores, a subtraction of numbers as large as them, exp_). A sum over keys adds T u. act_u per p allows a
// kernel to feed tensor cores probabilities in act_t. Backward is computed from the forward's own stored results, so that only its
// own errors count; the reference reads the same ones.
static void test_attention_shape(Run& r, Heads s, double spread) {
    int T = s.T, H = s.H, D = s.D, group = s.H / s.KV;
    int64_t N = (int64_t)s.B * T, Q = s.row(), A = (int64_t)H * D;
    r.at("T %d, heads %d/%d of %d, spread %g", T, H, s.KV, D, spread);
    Rng rng{(uint64_t)(T * 100 + H)};
    Buffer<act_t> qkv(r, N * Q, [&](int64_t) { return rng(spread); }), dout(r, N * A, [&](int64_t) { return rng(1); }), out(r, N * A), dqkv(r, N * Q);
    Buffer<acc_t> lse(r, N * H), delta(r, N * H);
    attention_forward(r.ctx, out.p, lse.p, qkv.p, s);
    out.fetch(), lse.fetch();
    attention_backward(r.ctx, dqkv.p, delta.p, dout.p, qkv.p, out.p, lse.p, s);
    dqkv.fetch();
    if (!r.compare) return;
    const double scale = 1 / std::sqrt((double)D), sum_u = (2 * T + 8 * group + 40) * u;
    std::vector<double> x = qkv.values(), g = dout.values(), o = out.values(), want(N * Q), tol(N * Q);
    std::vector<double> score(T), err(T);
    for (int b = 0; b < s.B; b++)
        for (int h = 0; h < H; h++)
            for (int i = 0; i < T; i++) {
                int64_t row = (int64_t)b * T + i, q_at = row * Q + h * D, o_at = row * A + h * D;
                auto key = [&](int j) { return ((int64_t)b * T + j) * Q + (H + h / group) * D; };
                auto val = [&](int j) { return key(j) + s.KV * D; };
                double m = -INFINITY, e = 0, sum = 0;
                for (int j = 0; j <= i; j++) {
                    double dot = 0, size = 0;
                    for (int d = 0; d < D; d++) dot += x[q_at + d] * x[key(j) + d], size += std::fabs(x[q_at + d] * x[key(j) + d]);
                    score[j] = dot * scale, err[j] = (D + 4) * u * size * scale;
                    m = std::max(m, score[j]), e = std::max(e, err[j]);
                }
                for (int j = 0; j <= i; j++) sum += std::exp(score[j] - m);
                double log_sum = m + std::log(sum), L = lse[row * H + h];
                r.verdict.close(L, log_sum, e + sum_u + 4 * u * (1 + std::fabs(m) + std::fabs(log_sum)), "lse", row * H + h);
                for (int d = 0; d < D; d++) {
                    double v = 0, size = 0;
                    for (int j = 0; j <= i; j++) {
                        double t = std::exp(score[j] - log_sum) * x[val(j) + d];
                        v += t, size += std::fabs(t);
                    }
                    r.verdict.close(o[o_at + d], v, (2 * e + sum_u + act_u) * size + act_u * std::fabs(v) + 1e-36, "out", o_at + d);
                }
                double dl = 0, dl_size = 0;
                for (int d = 0; d < D; d++) dl += g[o_at + d] * o[o_at + d], dl_size += std::fabs(g[o_at + d] * o[o_at + d]);
                for (int j = 0; j <= i; j++) {
                    double p = std::exp(score[j] - L), dp = 0, dp_size = 0, p_err = err[j] + 4 * u * (2 + std::fabs(L)) + act_u;
                    for (int d = 0; d < D; d++) dp += g[o_at + d] * x[val(j) + d], dp_size += std::fabs(g[o_at + d] * x[val(j) + d]);
                    double ds = p * (dp - dl) * scale;
                    double ds_err = p * scale * (p_err * std::fabs(dp - dl) + (D + 8) * u * (dp_size + dl_size)) + (act_u + sum_u) * std::fabs(ds);
                    for (int d = 0; d < D; d++) {
                        want[q_at + d] += ds * x[key(j) + d], tol[q_at + d] += ds_err * std::fabs(x[key(j) + d]);
                        want[key(j) + d] += ds * x[q_at + d], tol[key(j) + d] += ds_err * std::fabs(x[q_at + d]);
                        want[val(j) + d] += p * g[o_at + d], tol[val(j) + d] += p * (p_err + sum_u) * std::fabs(g[o_at + d]);
                    }
                }
            }
    for (int64_t i = 0; i < N * Q; i++) r.verdict.close(dqkv[i], want[i], tol[i] + act_u * std::fabs(want[i]) + 1e-36, "dqkv", i);
}

static void test_attention(Run& r) {
    for (int T : {1, 17, 63, 64, 65, 130}) {
        test_attention_shape(r, {2, T, 6, 2, 8}, 2);
        test_attention_shape(r, {2, T, 4, 4, 64}, 1);
        test_attention_shape(r, {1, T, 3, 1, 128}, 1);
    }
    test_attention_shape(r, {1, 70, 2, 1, 16}, 20);                           // scores of hundreds: one-hot rows, no overflow
}

// A NaN in one key or value reaches every output that may look at it: this query head's group, this row and later ones.
static void test_attention_nan(Run& r) {
    Heads s = {1, 70, 4, 2, 8};
    for (int part : {0, 1, 2}) {                                              // of the query, key, value of row 66
        r.at("NaN in part %d", part);
        Rng rng{3};
        Buffer<act_t> qkv(r, s.T * s.row(), [&](int64_t) { return rng(1); }), out(r, s.T * 4 * 8);
        Buffer<acc_t> lse(r, s.T * 4);
        assign(&qkv.host[66 * s.row() + (part == 0 ? 2 : part == 1 ? 4 + 1 : 4 + 2 + 1) * 8], NAN);
        qkv.send();
        attention_forward(r.ctx, out.p, lse.p, qkv.p, s);
        out.fetch();
        auto finite = [&](int i) { return is_finite((float)out[i * 32 + 2 * 8]); };                                  // head 2
        for (int i = 66; i < (part == 0 ? 67 : s.T); i++) r.verdict.note(!finite(i), "row %d is finite", i);
        for (int i = 0; i < 64; i++) r.verdict.note(finite(i), "row %d is not finite", i);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// The linear layer

// prepare() against the rounding of test_bf16: equal, NaN and infinity kept, or the very same memory where nothing is to be done.
template <class S> static void test_prepare_source(Run& r, Operand cell, int64_t rows, int64_t cols) {
    r.at("%s of %d-byte elements, %ldx%ld", cell.format == Format::bf16 ? "bf16" : "f32", (int)sizeof(S), (long)rows, (long)cols);
    Rng rng{(uint64_t)cols};
    Buffer<S> x(r, rows * cols, [&](int64_t i) { return i == 5 ? NAN : i == 6 ? -INFINITY : rng(3); });
    size_t bytes = operand_bytes(cell, type_of<S>(), rows * cols);
    bool as_is = cell.format == Format::bf16 ? type_of<S>() == Type::bf16 : type_of<S>() == type_of<acc_t>();
    r.verdict.note((bytes == 0) == as_is, "%zu bytes", bytes);
    Buffer<uint8_t> made(r, (int64_t)bytes);
    Mat m = prepare(r.ctx, cell, mat(x.p, cols), rows, cols, bytes ? made.p : nullptr);
    r.verdict.note(m.ld == cols && !m.trans && m.type == operand_type(cell.format), "wrong shape or type");
    if (as_is) return r.verdict.note(m.data == x.p, "copied for nothing");
    made.fetch();
    r.verdict.note(m.data == made.p && bytes == rows * cols * size_of(m.type), "%zu bytes", bytes);
    for (int64_t i = 0; i < rows * cols; i++) {
        float got = m.type == Type::bf16 ? load((const bf16*)made.host.data() + i) : load((const float*)made.host.data() + i);
        float want = cell.format == Format::bf16 ? as_bf16(x[i]) : (float)x[i];
        r.verdict.note(got == want || (got != got && want != want), "element %ld is %.9g, not %.9g", (long)i, got, want);
    }
}
static void test_prepare(Run& r) {
    const std::pair<int64_t, int64_t> shapes[] = {{1, 1}, {7, 13}, {33, 64}, {300, 100}};
    for (auto [rows, cols] : shapes)
        for (Operand cell : {f32, b16}) {
            test_prepare_source<acc_t>(r, cell, rows, cols);
            if (on_gpu) test_prepare_source<act_t>(r, cell, rows, cols);
        }
    r.verdict.note(find_recipe("bf16") && !strcmp(find_recipe("bf16")->name, "bf16") && !find_recipe("bf1") && !find_recipe(""), "find_recipe");
    for (const Recipe& row : recipes) r.verdict.note(find_recipe(row.name) == &row, "the name %s is taken twice", row.name);
}

// Y = X W^T, dX = D W, dW += D^T X. Y and D are activations, or floats as the head's logits are.
template <class T> static void test_linear_shape(Run& r, const Recipe& recipe, int64_t rows, int64_t in, int64_t out_) {
    bool floats = recipe.fprop_x == f32 || recipe.dgrad_d == f32 || recipe.wgrad_d == f32;
    if (on_gpu && sizeof(act_t) == 2 && floats) return;                       // the program refuses this pair too
    r.at("%s, %ld rows, %ld to %ld, %d-byte outputs", recipe.name, (long)rows, (long)in, (long)out_, (int)sizeof(T));
    Rng rng{(uint64_t)(rows + in)};
    Buffer<act_t> x(r, rows * in, [&](int64_t) { return rng(1); }), dx(r, rows * in);
    Buffer<acc_t> w(r, in * out_, [&](int64_t) { return rng(1); }), dw(r, in * out_, [&](int64_t) { return rng(1); });
    Buffer<T> y(r, rows * out_), d(r, rows * out_, [&](int64_t) { return rng(1); });
    Type act = type_of<act_t>(), acc = type_of<acc_t>(), type_d = type_of<T>();
    auto bytes = [](Operand p, Type tp, Operand q, Type tq, int64_t n) { return std::max(operand_bytes(p, tp, n), operand_bytes(q, tq, n)); };
    size_t a_bytes = std::max(operand_bytes(recipe.fprop_x, act, rows * in), bytes(recipe.dgrad_d, type_d, recipe.wgrad_d, type_d, rows * out_));
    size_t b_bytes = std::max(operand_bytes(recipe.wgrad_x, act, rows * in), bytes(recipe.fprop_w, acc, recipe.dgrad_w, acc, in * out_));
    Buffer<uint8_t> a(r, (int64_t)a_bytes), b(r, (int64_t)b_bytes);
    OperandScratch scratch = {a_bytes ? a.p : nullptr, b_bytes ? b.p : nullptr};
    Linear layer = {"fprop", "dgrad", "wgrad", in, out_, w.p, dw.p, &recipe};
    std::vector<double> before = dw.values();
    linear_forward(r.ctx, layer, scratch, y.p, mat(x.p, in), rows);
    linear_backward(r.ctx, layer, scratch, dx.p, mat(d.p, out_), mat(x.p, in), rows);
    y.fetch(), dx.fetch(), dw.fetch();
    if (!r.compare) return;
    auto cell = [](Operand o, std::vector<double> v) {
        if (o.format == Format::bf16)
            for (double& e : v) e = as_bf16(e);
        return v;
    };
    std::vector<double> fx = cell(recipe.fprop_x, x.values()), fw = cell(recipe.fprop_w, w.values()), gd = cell(recipe.dgrad_d, d.values());
    std::vector<double> gw = cell(recipe.dgrad_w, w.values()), wd = cell(recipe.wgrad_d, d.values()), wx = cell(recipe.wgrad_x, x.values());
    // sum over k of p[i k] q[k j], by the strides of i, j and k
    auto compare = [&](auto& got, const double* start, double store_u, int64_t I, int64_t J, int64_t K, const double* p, int64_t pi, int64_t pk,
                       const double* q, int64_t qj, int64_t qk, Operand o, const char* what) {
        double step = (K + 2) * product_u(o.format == Format::bf16 ? Type::bf16 : Type::f32);
        for (int64_t i = 0; i < I; i++)
            for (int64_t j = 0; j < J; j++) {
                double s = start ? start[i * J + j] : 0, size = std::fabs(s);
                for (int64_t k = 0; k < K; k++) {
                    double t = p[i * pi + k * pk] * q[j * qj + k * qk];
                    s += t, size += std::fabs(t);
                }
                r.verdict.close(got[i * J + j], s, step * size + store_u * std::fabs(s), what, i * J + j);
            }
    };
    compare(y, nullptr, sizeof(T) == 2 ? act_u : u, rows, out_, in, fx.data(), in, 1, fw.data(), in, 1, recipe.fprop_x, "Y");
    compare(dx, nullptr, act_u, rows, in, out_, gd.data(), out_, 1, gw.data(), 1, in, recipe.dgrad_d, "dX");
    compare(dw, before.data(), u, out_, in, rows, wd.data(), 1, out_, wx.data(), 1, in, recipe.wgrad_d, "dW");
}
static void test_linear(Run& r) {
    const Shape shapes[] = {{1, 16, 8}, {31, 48, 64}, {33, 7, 100}, {257, 100, 16}, {40, 64, 1025}, {300, 24, 40}};
    for (const Recipe& recipe : recipes)
        for (auto [rows, in, out_] : shapes) {
            test_linear_shape<act_t>(r, recipe, rows, in, out_);
            if (sizeof(act_t) != sizeof(acc_t)) test_linear_shape<acc_t>(r, recipe, rows, in, out_);
        }
    // Each cell has a table entry of its own: six different formats must end up in the six places.
    Recipe mixed = {"mixed", "", f32, f32, f32, f32, f32, f32};
    Operand* cells[] = {&mixed.fprop_x, &mixed.fprop_w, &mixed.dgrad_d, &mixed.dgrad_w, &mixed.wgrad_d, &mixed.wgrad_x};
    if (!on_gpu && !MatmulPlans::bf16_units())                                // where the operands of one GEMM may differ in type
        for (Operand* c : cells) *c = b16, test_linear_shape<act_t>(r, mixed, 33, 20, 24), *c = f32;
    for (int i = 0; i < 6; i += 2) {                                          // one GEMM at a time
        *cells[i] = *cells[i + 1] = b16, test_linear_shape<act_t>(r, mixed, 33, 20, 24), *cells[i] = *cells[i + 1] = f32;
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// The layers of llama.cuh

static void test_initialise(Run& r) {
    RandomKey key = {5, 0, 0, 3, 0, Purpose::init};
    for (int64_t n : {(int64_t)1, (int64_t)100, chunk - 1, chunk, chunk + 1, 2 * chunk + 500}) {
        r.at("%ld elements", (long)n);
        Buffer<acc_t> ones(r, n), w(r, n);
        initialise(r.ctx, ones.p, n, 0, key);
        initialise(r.ctx, w.p, n, 0.02f, key);
        ones.fetch(), w.fetch();
        if (!r.compare) continue;
        for (int64_t i = 0; i < n; i++) {
            r.verdict.close(ones[i], 1, 0, "ones", i);
            r.verdict.close(w[i], 0.02f * normal(key, i), 0, "N(0, 0.02)", i);
        }
    }
}

// A move, and its gradient: row t of the table gathers the rows of dx where t was read, whoever does it, in ascending order.
static void test_embed(Run& r) {
    for (int64_t N : row_counts)
        for (int C : widths) {
            r.at("N %ld, C %d", (long)N, C);
            const int V = 40;
            Rng rng{(uint64_t)(N + C)};
            Buffer<int> tokens(r, N, [&](int64_t i) { return i == 0 ? V - 1 : rng.below(V - 1) / 2 * 2; });   // odd ones never, the last once
            Buffer<acc_t> table(r, (int64_t)V * C, [&](int64_t) { return rng(1); }), grad(r, (int64_t)V * C, [&](int64_t) { return rng(1); });
            Buffer<act_t> x(r, N * C), dx(r, N * C, [&](int64_t) { return rng(1); });
            embed(r.ctx, x.p, table.p, tokens.p, N, C);
            x.fetch();
            TokenBuckets buckets(tokens.host.data(), N);
            auto send = [&](std::vector<int>& v) { return [&](int64_t i) { return v[i]; }; };
            int64_t count = (int64_t)buckets.token.size();
            Buffer<int> token(r, count, send(buckets.token)), start(r, count + 1, send(buckets.start)), order(r, N, send(buckets.order));
            std::vector<double> want = grad.values(), size = want;
            embed_backward(r.ctx, grad.p, dx.p, token.p, start.p, order.p, count, N, C);
            grad.fetch();
            if (!r.compare) continue;
            for (double& v : size) v = std::fabs(v);
            for (int64_t i = 0; i < N; i++)
                for (int c = 0; c < C; c++) {
                    acc_t v = table.host[(int64_t)tokens.host[i] * C + c];
                    act_t stored;
                    store(&stored, v);
                    r.verdict.close(x[i * C + c], value(stored), 0, "x", i * C + c);
                    want[tokens.host[i] * C + c] += dx[i * C + c], size[tokens.host[i] * C + c] += std::fabs(dx[i * C + c]);
                }
            for (int64_t i = 0; i < (int64_t)V * C; i++) {
                bool never = i / C % 2 && i / C < V - 1;                      // not a bit of what no token reads
                r.verdict.close(grad[i], want[i], never ? 0 : N * u * size[i], "grad", i);
            }
        }
}

static void test_buckets(Run& r) {
    for (int64_t N : {1, 2, 7, 300})
        for (int V : {1, 3, 1000}) {
            r.at("N %ld, V %d", (long)N, V);
            Rng rng{(uint64_t)(N + V)};
            std::vector<int> tokens(N), seen(N);
            for (int& t : tokens) t = rng.below(V);
            TokenBuckets b(tokens.data(), N);
            size_t n = b.token.size();
            r.verdict.note(b.start.size() == n + 1 && b.start[0] == 0 && b.start[n] == N && (int64_t)b.order.size() == N, "sizes");
            for (size_t i = 0; i < n; i++) {
                r.verdict.note(i == 0 || b.token[i] > b.token[i - 1], "a token has two buckets");
                r.verdict.note(b.start[i + 1] > b.start[i], "an empty bucket");
                for (int k = b.start[i]; k < b.start[i + 1]; k++) {
                    r.verdict.note(tokens[b.order[k]] == b.token[i], "position %d is in a wrong bucket", b.order[k]);
                    r.verdict.note(k == b.start[i] || b.order[k] > b.order[k - 1], "positions do not ascend");
                    seen[b.order[k]]++;
                }
            }
            r.verdict.note(std::count(seen.begin(), seen.end(), 1) == N, "not every position once");
        }
}

// rstd errs by half of what the mean of squares does (depth u) and a few u; h by that, two products and its own rounding. Rows are
// scaled from 1 down to 1e-3, where eps is ten times the mean square, and to 0, where rstd is 1 / sqrt(eps).
static void test_rmsnorm(Run& r) {
    const double eps = 1e-5;
    for (int64_t N : row_counts)
        for (int C : widths)
            for (int mode : {0, 1, 2}) {                                      // x = a + b; x stays (null); x is a itself
                r.at("N %ld, C %d, mode %d", (long)N, C, mode);
                Rng rng{(uint64_t)(N * 10 + C)};
                const double scales[] = {1, 0.1, 1e-3, 0};
                auto draw = [&](int64_t i) { return scales[i / C % 4] * rng(2); };
                Buffer<act_t> a(r, N * C, draw), b(r, N * C, draw);
                Buffer<acc_t> w(r, C, [&](int64_t) { return 1 + rng(0.5); }), rstd(r, N);
                Buffer<act_t> x(r, N * C), h(r, N * C);
                std::vector<double> before = a.values();
                act_t *to = mode == 0 ? x.p : mode == 1 ? nullptr : a.p, *second = mode == 0 ? b.p : nullptr;
                residual_rmsnorm(r.ctx, to, h.p, rstd.p, a.p, second, w.p, N, C, (acc_t)eps);
                a.fetch(), x.fetch(), h.fetch(), rstd.fetch();
                if (!r.compare) continue;
                for (int64_t i = 0; i < N * C; i++) r.verdict.close(a[i], before[i], 0, "a", i);
                const Buffer<act_t>& from = mode == 0 ? x : a;
                for (int64_t row = 0; row < N; row++) {
                    double squares = 0;
                    for (int64_t i = row * C; i < (row + 1) * C; i++) {
                        if (mode == 0) r.verdict.close(x[i], a[i] + b[i], (u + act_u) * std::fabs(a[i] + b[i]), "x", i);
                        squares += from[i] * from[i];
                    }
                    double s = 1 / std::sqrt(squares / C + eps), s_err = (depth(C) / 2 + 4) * u * s;
                    r.verdict.close(rstd[row], s, s_err, "rstd", row);
                    for (int c = 0; c < C; c++) {
                        double v = from[row * C + c] * s * w[c];
                        r.verdict.close(h[row * C + c], v, (s_err / s + 2 * u + act_u) * std::fabs(v), "h", row * C + c);
                    }
                }
            }
}

// The reference is the quotient rule on h_c = x_c w_c (mean x^2 + eps)^-1/2, term by term.
static void test_rmsnorm_grad(Run& r) {
    for (int64_t N : {1, 31, 32, 33, 300})
        for (int C : widths) {
            r.at("N %ld, C %d", (long)N, C);
            Rng rng{(uint64_t)(N * 3 + C)};
            auto draw = [&](int64_t) { return rng(1); };
            Buffer<act_t> dx(r, N * C, draw), dh(r, N * C, draw), x(r, N * C, [&](int64_t) { return rng(2); });
            Buffer<acc_t> w(r, C, [&](int64_t) { return 1 + rng(0.5); }), dw(r, C, draw), partial(r, norm_chunks(N) * C);
            Buffer<acc_t> rstd(r, N, [&](int64_t row) {
                double squares = 0;
                for (int64_t i = row * C; i < (row + 1) * C; i++) squares += x[i] * x[i];
                return 1 / std::sqrt(squares / C + 1e-5);
            });
            std::vector<double> dx0 = dx.values(), dw0 = dw.values(), dw_size(C);
            for (int c = 0; c < C; c++) dw_size[c] = std::fabs(dw0[c]);
            rmsnorm_grad(r.ctx, dx.p, dw.p, partial.p, dh.p, x.p, rstd.p, w.p, N, C);
            dx.fetch(), dw.fetch();
            if (!r.compare) continue;
            for (int64_t row = 0; row < N; row++) {
                double s = rstd[row], dot = 0, dot_size = 0;
                for (int c = 0; c < C; c++) {
                    double t = dh[row * C + c] * w[c] * x[row * C + c];
                    dot += t, dot_size += std::fabs(t);
                }
                for (int c = 0; c < C; c++) {
                    int64_t i = row * C + c;
                    double direct = dh[i] * w[c] * s, through = x[i] * s * s * s * dot / C, want = dx0[i] + direct - through;
                    double size = std::fabs(dx0[i]) + std::fabs(direct) + std::fabs(x[i]) * s * s * s * dot_size / C;
                    r.verdict.close(dx[i], want, (depth(C) + 8) * u * size + act_u * std::fabs(want), "dx", i);
                    dw0[c] += dh[i] * x[i] * s, dw_size[c] += std::fabs(dh[i] * x[i] * s);
                }
            }
            for (int c = 0; c < C; c++) r.verdict.close(dw[c], dw0[c], (norm_rows + norm_chunks(N) + 4) * u * dw_size[c], "dw", c);
        }
}

static Config rope_config(int head_dim, double theta, RopeScaling scaling) {
    Config c{1, head_dim, 1, 1, head_dim, 1, 1, true, scaling};
    c.rope_theta = theta;
    return c;
}

// Hugging Face's _compute_llama3_parameters, in double. A table entry errs by the angle's two roundings and sincos_.
static void test_rope_table(Run& r) {
    struct { int D, T; double theta; RopeScaling s; } cases[] = {
        {8, 300, 10000, {}}, {128, 2100, 500000, {}}, {128, 2100, 500000, {8, 1, 4, 8192}}, {64, 2100, 500000, {32, 1, 4, 8192}},
        {8, 300, 500000, {8, 1, 4, 256}}, {2, 5, 500000, {8, 1, 4, 256}}, {30, 100, 10000, {4, 2, 8, 512}}};
    int seen[3] = {};
    for (auto& k : cases) {
        r.at("D %d, T %d, theta %g, factor %g", k.D, k.T, k.theta, k.s.factor);
        std::vector<acc_t> cosine, sine;
        rope_table(cosine, sine, rope_config(k.D, k.theta, k.s), k.T);
        r.verdict.note(cosine.size() == (size_t)k.T * k.D / 2 && sine.size() == cosine.size(), "%zu entries", cosine.size());
        for (int i = 0; i < k.D / 2; i++) {
            double inv_freq = std::pow(k.theta, -(2.0 * i) / k.D), wavelen = 2 * M_PI / inv_freq;
            if (k.s.factor > 0) {
                double low_wavelen = k.s.original / k.s.low, high_wavelen = k.s.original / k.s.high;
                double scaled = wavelen > low_wavelen ? inv_freq / k.s.factor : inv_freq;
                double smooth = (k.s.original / wavelen - k.s.low) / (k.s.high - k.s.low);
                bool medium = !(wavelen < high_wavelen) && !(wavelen > low_wavelen);
                inv_freq = medium ? (1 - smooth) * scaled / k.s.factor + smooth * scaled : scaled;
                seen[medium ? 1 : wavelen > low_wavelen ? 2 : 0]++;
            }
            for (int t = 0; t < k.T; t++) {
                double angle = t * inv_freq, tol = 2.01 * u * angle + 1.2e-7;
                r.verdict.close(cosine[(size_t)t * k.D / 2 + i], std::cos(angle), tol, "cosine", (int64_t)t * k.D / 2 + i);
                r.verdict.close(sine[(size_t)t * k.D / 2 + i], std::sin(angle), tol, "sine", (int64_t)t * k.D / 2 + i);
            }
        }
    }
    r.verdict.note(seen[0] > 0 && seen[1] > 0 && seen[2] > 0, "branches: %d high, %d medium, %d low", seen[0], seen[1], seen[2]);
}

// Torch: emb = cat(freqs, freqs); x * emb.cos() + rotate_half(x) * emb.sin(), on query and key heads; values keep their bits. The
// angle belongs to the position in the sequence, so tables are longer than T and a second sequence starts again at 0.
static void test_rotate(Run& r) {
    const Heads shapes[] = {{2, 1, 6, 2, 8}, {2, 17, 6, 2, 8}, {2, 33, 3, 1, 2}, {1, 64, 4, 4, 64}, {2, 20, 3, 1, 128}, {2, 9, 2, 2, 30}};
    for (Heads s : shapes)
        for (int direction : {1, -1}) {
            r.at("T %d, heads %d/%d of %d, direction %d", s.T, s.H, s.KV, s.D, direction);
            int64_t N = (int64_t)s.B * s.T, Q = s.row();
            std::vector<acc_t> cosine, sine;
            rope_table(cosine, sine, rope_config(s.D, 10000, {}), s.T + 3);
            Rng rng{(uint64_t)s.D};
            int64_t n = (int64_t)cosine.size();
            Buffer<acc_t> cs(r, n, [&](int64_t i) { return cosine[i]; }), sn(r, n, [&](int64_t i) { return sine[i]; });
            Buffer<act_t> qkv(r, N * Q, [&](int64_t) { return rng(2); });
            std::vector<double> x = qkv.values();
            rotate(r.ctx, qkv.p, cs.p, sn.p, s, (acc_t)direction);
            qkv.fetch();
            for (int64_t i = 0; i < N * Q && r.compare; i++) {
                int64_t t = i / Q % s.T, head = i % Q / s.D, d = i % s.D, half = s.D / 2;
                if (head >= s.H + s.KV) {
                    r.verdict.close(qkv[i], x[i], 0, "value", i);
                    continue;
                }
                double angle = t * std::pow(10000.0, -2.0 * (d % half) / s.D), turned = d < half ? -x[i + half] : x[i - half];
                double a = x[i] * std::cos(angle), b = direction * turned * std::sin(angle);
                double tol = (2.01 * u * angle + 1.2e-7) * (std::fabs(x[i]) + std::fabs(turned)) + 2 * u * (std::fabs(a) + std::fabs(b));
                tol += act_u * std::fabs(a + b);
                r.verdict.close(qkv[i], a + b, tol, "qkv", i);
            }
        }
}

// silu's relative error: exp_ 4 u, an addition, a division, a product. Where e^-a overflows, silu is 0 and should be below 1e-36. The
// gradient sigmoid + silu - silu sigmoid errs by a few u of silu, however small what is left of it.
static void test_swiglu(Run& r) {
    for (int64_t N : row_counts)
        for (int F : widths) {
            r.at("N %ld, F %d", (long)N, F);
            Rng rng{(uint64_t)(N + 5 * F)};
            const double scales[] = {1, 1, 5, 30, 120, 0};
            Buffer<act_t> gu(r, N * 2 * F, [&](int64_t i) { return i % (2 * F) < F ? rng(scales[rng.below(6)]) : rng(2); });
            Buffer<act_t> s(r, N * F), ds(r, N * F, [&](int64_t) { return rng(1); });
            std::vector<double> x = gu.values();
            swiglu(r.ctx, s.p, gu.p, N, F);
            swiglu_grad(r.ctx, gu.p, ds.p, N, F);
            s.fetch(), gu.fetch();
            for (int64_t i = 0; i < N * F && r.compare; i++) {
                int64_t at = i / F * 2 * F + i % F;
                double a = x[at], b = x[at + F], d = ds[i], sigmoid = 1 / (1 + std::exp(-a)), silu = a * sigmoid, off = 1 / (1 + std::exp(a));
                r.verdict.close(s[i], silu * b, (10 * u + act_u) * std::fabs(silu * b) + 1e-36, "s", i);
                double up = d * silu, gate = d * b * (sigmoid + silu * off), size = std::fabs(d * b) * (sigmoid + std::fabs(silu) * off);
                r.verdict.close(gu[at + F], up, (10 * u + act_u) * std::fabs(up) + 1e-36, "d up", i);
                r.verdict.close(gu[at], gate, 20 * u * size + 4 * u * std::fabs(d * b * silu) + act_u * std::fabs(gate) + 1e-36, "d gate", i);
            }
        }
}

// p = exp(v - m) / sum errs by the rounding of v - m, exp_ and the sum; the loss is a difference of numbers as large as the logits.
static void test_cross_entropy(Run& r) {
    for (int V : {1, 2, 96, 257, 1000, 50304})
        for (int64_t N : row_counts) {
            if (V > 1000 && N > 1) continue;
            for (double spread : {3., 1e4}) {
                r.at("N %ld, V %d, spread %g", (long)N, V, spread);
                Rng rng{(uint64_t)(N + V)};
                Buffer<acc_t> logits(r, N * V, [&](int64_t) { return rng(spread); }), row_loss(r, N), again(r, N);
                Buffer<int> targets(r, N, [&](int64_t i) {                    // anywhere; the first; the last; the largest; the smallest
                    const float* row = &logits.host[i * V];
                    if (i % 5 < 3) return (int64_t)(i % 5 == 0 ? rng.below(V) : i % 5 == 1 ? 0 : V - 1);
                    return (i % 5 == 3 ? std::max_element(row, row + V) : std::min_element(row, row + V)) - row;
                });
                std::vector<double> x = logits.values();
                const double scale = 1. / 64;
                softmax_cross_entropy(r.ctx, row_loss.p, logits.p, targets.p, N, V, 0);
                logits.fetch();
                for (int64_t i = 0; i < N * V && r.compare; i++) r.verdict.close(logits[i], x[i], 0, "logits without a gradient", i);
                softmax_cross_entropy(r.ctx, again.p, logits.p, targets.p, N, V, (acc_t)scale);
                row_loss.fetch(), again.fetch(), logits.fetch();
                if (!r.compare) continue;
                for (int64_t i = 0; i < N; i++) {
                    const double *v = &x[i * V], m = *std::max_element(v, v + V);
                    double sum = 0, total = 0, total_tol = 0;
                    for (int j = 0; j < V; j++) sum += std::exp(v[j] - m);
                    double want = m + std::log(sum) - v[targets.host[i]];
                    double tol = depth(V) * u + 4 * u * (std::fabs(m) + std::log(sum) + std::fabs(v[targets.host[i]]) + 1);
                    r.verdict.close(row_loss[i], want, tol, "loss", i);
                    r.verdict.close(again[i], row_loss[i], 0, "loss with a gradient", i);
                    for (int j = 0; j < V; j++) {
                        double p = std::exp(v[j] - m) / sum, hot = j == targets.host[i], p_tol = p * ((depth(V) + 12) * u + 2 * u * (m - v[j]));
                        r.verdict.close(logits[i * V + j], scale * (p - hot), scale * (p_tol + 2 * u * hot) + 1e-37, "gradient", i * V + j);
                        total += logits[i * V + j], total_tol += scale * (p_tol + 2 * u * hot);
                    }
                    r.verdict.close(total, 0, total_tol + 1e-36, "sum of a row's gradient", i);
                }
            }
        }
}

// What the guard in train_step needs: nothing that is not finite stays hidden from the loss, wherever in the row it is.
static void test_cross_entropy_nan(Run& r) {
    for (int V : {17, 300})
        for (float bad : {(float)NAN, -(float)NAN, infinity}) {
            r.at("V %d, %g", V, bad);
            int64_t N = 2 * V;                                                // row 2 k has it at k, its target; row 2 k + 1 beside its target
            Rng rng{(uint64_t)V};
            Buffer<acc_t> logits(r, N * V, [&](int64_t i) { return i % V == i / V / 2 ? bad : rng(2); }), row_loss(r, N), again(r, N);
            Buffer<int> targets(r, N, [&](int64_t i) { return (i / 2 + i % 2) % V; });
            softmax_cross_entropy(r.ctx, row_loss.p, logits.p, targets.p, N, V, 0);
            softmax_cross_entropy(r.ctx, again.p, logits.p, targets.p, N, V, 1);
            row_loss.fetch(), again.fetch(), logits.fetch();
            for (int64_t i = 0; i < N; i++) {
                r.verdict.note(!is_finite(row_loss.host[i]) && !is_finite(again.host[i]), "the loss of row %ld is %g", (long)i, row_loss[i]);
                int finite = 0;
                for (int j = 0; j < V; j++) finite += is_finite(logits.host[i * V + j]);
                r.verdict.note(finite < V, "the gradient of row %ld is finite", (long)i);
            }
        }
    r.at("-infinity");                                                        // a masked class: nothing is lost, unless it is the target
    Buffer<acc_t> logits(r, 4, [](int64_t i) { return i == 2 ? -INFINITY : 0; }), row_loss(r, 1);
    Buffer<int> targets(r, 1, [](int64_t) { return 0; });
    softmax_cross_entropy(r.ctx, row_loss.p, logits.p, targets.p, 1, 4, 0);
    r.verdict.close(row_loss.fetch()[0], std::log(3.), 4 * u, "loss", 0);
    targets.host[0] = 2, targets.send();
    softmax_cross_entropy(r.ctx, row_loss.p, logits.p, targets.p, 1, 4, 0);
    r.verdict.note(row_loss.fetch().host[0] == infinity, "a loss of %g for an impossible target", row_loss[0]);
}

static void test_sums(Run& r) {
    for (int64_t n : {(int64_t)1, (int64_t)100, chunk - 1, chunk, chunk + 1, 3 * chunk + 5}) {
        r.at("%ld elements", (long)n);
        Rng rng{(uint64_t)n};
        int64_t chunks = (n + 16383) / 16384;                                 // chunk is part of the contract: it fixes the order
        Buffer<acc_t> x(r, n, [&](int64_t) { return 1 + rng(2); }), total(r, 2, [](int64_t i) { return 100 + i; }), partial(r, chunks);
        add_sum(r.ctx, total.p, x.p, n);
        sum_squares(r.ctx, partial.p, x.p, n);
        total.fetch(), partial.fetch();
        double sum = 100, size = 100;
        std::vector<double> squares(chunks);
        for (int64_t i = 0; i < n; i++) sum += x[i], size += std::fabs(x[i]), squares[i / 16384] += x[i] * x[i];
        r.verdict.close(total[0], sum, (depth(std::min(n, chunk)) + chunks) * u * size, "total", 0);
        r.verdict.close(total[1], 101, 0, "what is beside it", 1);
        for (int64_t k = 0; k < chunks; k++) r.verdict.close(partial[k], squares[k], (depth(chunk) + 1) * u * squares[k], "partial", k);
    }
}

// Five steps against AdamW in double with the true constants. 1 - 0.9f is 4 u off, relative; m, v and w stay within 40 u of the size
// of what went in. Every tenth gradient is 1e-8 and every eleventh 0: there eps decides.
static void test_adamw(Run& r) {
    for (int64_t n : {(int64_t)1, (int64_t)7, (int64_t)100, chunk, chunk + 7})
        for (double decay : {0., 0.1}) {
            r.at("%ld elements, decay %g", (long)n, decay);
            Rng rng{(uint64_t)n};
            const double lr = 0.01, clip = 0.37, eps = 1e-8;
            Buffer<acc_t> w(r, n, [&](int64_t) { return rng(1); }), m(r, n, [](int64_t) { return 0; }), v(r, n, [](int64_t) { return 0; });
            std::vector<double> W = w.values(), M(n), V(n), moved(n), m_size(n);
            for (double& s : moved) s = 1;
            for (int t = 1; t <= 5; t++) {
                Buffer<acc_t> g(r, n, [&](int64_t i) { return i % 10 == 3 ? rng(1e-8) : i % 11 == 4 ? 0 : rng(1); });
                std::vector<double> drawn = g.values();
                double c1 = 1 - std::pow(0.9, t), c2 = 1 - std::pow(0.95, t);
                AdamW o = {(acc_t)lr, acc_t(0.9), acc_t(0.95), acc_t(eps), (acc_t)decay, (acc_t)clip, (acc_t)c1, (acc_t)c2};
                adamw_step(r.ctx, w.p, m.p, v.p, g.p, n, o);
                w.fetch(), m.fetch(), v.fetch(), g.fetch();
                for (int64_t i = 0; i < n && r.compare; i++) {
                    double grad = clip * g[i];
                    M[i] = 0.9 * M[i] + 0.1 * grad, m_size[i] = 0.9 * m_size[i] + 0.1 * std::fabs(grad);
                    V[i] = 0.95 * V[i] + 0.05 * grad * grad;
                    double down = std::sqrt(V[i] / c2) + eps;
                    W[i] = W[i] * (1 - lr * decay) - lr * M[i] / c1 / down;
                    moved[i] += lr * m_size[i] / c1 / down;
                    r.verdict.close(g[i], drawn[i], 0, "gradient", i);
                    r.verdict.close(m[i], M[i], 40 * u * m_size[i] + 1e-44, "m", i);
                    r.verdict.close(v[i], V[i], 40 * u * V[i] + 1e-44, "v", i);
                    r.verdict.close(w[i], W[i], 5 * u + 40 * u * (moved[i] - 1), "w", i);
                }
            }
        }
}

// ---------------------------------------------------------------------------------------------------------------------------
// The model's tables

static void test_tables(Run& r) {
    // Parameters of the published models, as Hugging Face counts them.
    const std::pair<const char*, int64_t> published[] = {
        {"llama3-8b", 8030261248}, {"llama3.1-8b", 8030261248}, {"llama3.2-1b", 1235814400}, {"llama3.2-3b", 3212749824}};
    int found = 0;
    for (const Preset& p : presets) {
        r.at("%s", p.name);
        Config c = config_of(p, 128256);
        check_config(c);
        std::vector<Tensor> table = tensor_table(c);
        for (auto [name, count] : published)
            if (!strcmp(p.name, name)) found++, r.verdict.note(parameter_count(table) == count, "%ld parameters", (long)parameter_count(table));
        int64_t A = c.heads * c.head_dim, K = c.kv_heads * c.head_dim;
        int64_t body = c.layers * (int64_t)(c.dim * (2 * A + 2 * K + 3 * c.ffn) + 2 * c.dim) + c.dim;
        r.verdict.note(parameter_count(table, true) == body, "body %ld", (long)parameter_count(table, true));
        // 6 FLOPs a weight of every GEMM; attention's two products forward and four backward of (T + 1) / 2 keys on average.
        double flops = 6. * (body - (2 * c.layers + 1) * c.dim) + 6. * c.vocab * c.dim + 12. * c.layers * A * (1001 / 2.);
        r.verdict.close(flops_per_token(c, 1000), flops, 1e-12 * flops, "flops_per_token", 0);
        size_t end = 0;
        std::set<std::string> names;
        for (const Tensor& t : table) {
            int64_t rows = 0;
            for (const TensorPart& part : t.parts) rows += part.rows, r.verdict.note(names.insert(part.name).second, "%s twice", part.name.c_str());
            bool norm = t.name.find("norm") != std::string::npos;
            r.verdict.note(rows == t.rows && t.offset >= end && t.offset % 64 == 0 && t.offset < end + 64, "%s: rows or offset", t.name.c_str());
            r.verdict.note(t.dims == (norm ? 1 : 2) && t.decay == !norm, "%s: dims or decay", t.name.c_str());
            bool residual = t.parts.size() == 1 && (t.parts[0].name.find("o_proj") < 999 || t.parts[0].name.find("down_proj") < 999);
            double std = norm ? 0 : residual ? 0.02 / std::sqrt(2. * c.layers) : 0.02;               // GPT-2's rule for what ends on the stream
            r.verdict.note(near(t.init_std, std, 1e-8) && (!norm || t.rows == 1), "%s: initialised by %g", t.name.c_str(), t.init_std);
            r.verdict.note(t.quantised == (!norm && t.name != "embed" && t.name != "head"), "%s: quantised", t.name.c_str());
            end = t.offset + t.size();
        }
        r.verdict.note(arena_size(table) >= end && arena_size(table) < end + 64 && arena_size(table) % 64 == 0, "arena");
        r.verdict.note(names.size() == 9u * c.layers + 2 + !c.tied, "%zu Hugging Face tensors", names.size());
    }
    r.verdict.note(found == 4, "presets are missing");
    r.at("head_chunk");
    r.verdict.note(head_chunk(10, 256) == 10 && head_chunk(1 << 20, 128256) == (on_gpu ? 2048 : 256), "too few or too many rows");
    r.verdict.note(head_chunk(1 << 20, 32000) == (on_gpu ? 8192 : 512) && head_chunk(1 << 20, 256) == (on_gpu ? 1 << 20 : 65536), "not 64 MB, or 1 GB");
}

// A NaN or an infinity in any parameter that is used reaches the summed loss, forward alone, as evaluation runs it.
static void test_model_nan(Run& r) {
    Config c{2, 24, 4, 2, 6, 40, 32, false, {}};
    const Recipe* recipe = find_recipe("bf16");
    const int B = 2, T = 19;
    Model m;
    measure(m, c, B, T, Recompute::none, recipe, false);
    allocate(r.ctx, m, recipe, false);
    Rng rng{17};
    std::vector<acc_t> good(m.arena);
    for (const Tensor& t : m.tensors)
        for (size_t i = 0; i < t.size(); i++) good[t.offset + i] = (acc_t)((t.dims == 1 ? 1 : 0) + rng(0.4));
    std::vector<int> tokens(B * T), targets(B * T);
    for (int i = 0; i < B * T; i++) tokens[i] = rng.below(c.vocab), targets[i] = 1 + rng.below(c.vocab - 1);      // class 0 is never a target
    tokens[3] = 0;
    auto loss = [&](const std::vector<acc_t>& params) {
        to_device(r.ctx, m.params, params.data(), m.arena * sizeof(acc_t));
        set_zero(r.ctx, m.sums, 2 * sizeof(acc_t));
        forward(r.ctx, m, tokens.data(), B, T);
        classify(r.ctx, m, targets.data(), B * T, 0);
        acc_t sum;
        to_host(r.ctx, &sum, m.sums, sizeof sum);
        return sum;
    };
    acc_t sum = loss(good);
    r.bits.update(&sum, sizeof sum);
    r.verdict.note(sum > 0 && is_finite(sum), "the loss of good weights is %g", sum);
    for (const Tensor& t : m.tensors)
        for (float bad : {(float)NAN, infinity, -infinity}) {
            if (!r.compare) continue;                                         // the passes are many, and small: threads have nothing to do
            std::vector<acc_t> params = good;
            params[t.offset] = bad;
            acc_t seen = loss(params);
            r.verdict.note(!is_finite(seen), "%g in %s leaves a loss of %g", bad, t.name.c_str(), seen);
        }
    device_free(m.params, m.plan.parameters), device_free(m.acts[0].x, m.plan.activations), device_free(m.y, m.plan.scratch + m.plan.tables);
}

int main(int argc, char** argv) {
    verbose = argc > 1 && !strcmp(argv[1], "-v");
    // Idle threads must sleep, not spin: on shared cores, with more threads than cores, spinning costs ten times the work. OpenMP
    // reads its environment before main(), so start again.
    if (!getenv("OMP_WAIT_POLICY") && setenv("OMP_WAIT_POLICY", "passive", 1) == 0) execv("/proc/self/exe", argv);
    test("bf16 conversion", test_bf16);
    test("is_finite", test_is_finite);
    test("exp_", test_exp);
    test("log_", test_log);
    test("sincos_", test_sincos);
    test("philox", test_philox);
    test("uniform and normal", test_distributions);
    test("tag names and profiler", test_names);
    test("memory", test_memory);
    test("Group and for_rows", test_group);
    test("matmul", [](Run& r) {
        test_products<acc_t, acc_t>(r);
        if (on_gpu) test_products<bf16, float>(r), test_products<bf16, bf16>(r);
        else if (MatmulPlans::bf16_units()) test_products<bf16, float>(r);
    });
#ifndef __CUDACC__
    test("matmul: plain loops", [](Run& r) { test_plain_loops<float>(r), test_plain_loops<double>(r); });
#endif
    test("attention", test_attention);
    test("attention: NaN", test_attention_nan);
    test("prepare", test_prepare);
    test("linear layer", test_linear);
    test("initialise", test_initialise);
    test("embedding", test_embed);
    test("TokenBuckets", test_buckets);
    test("residual and rmsnorm", test_rmsnorm);
    test("rmsnorm gradient", test_rmsnorm_grad);
    test("rope_table", test_rope_table);
    test("rotate", test_rotate);
    test("swiglu", test_swiglu);
    test("cross entropy", test_cross_entropy);
    test("cross entropy: NaN and infinity", test_cross_entropy_nan);
    test("sums", test_sums);
    test("adamw", test_adamw);
    test("presets and tensor table", test_tables);
    test("model: NaN and infinity reach the loss", test_model_nan);
    return done();
}
