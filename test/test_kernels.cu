// test_kernels.cu: every kernel of device.cuh and llama.cuh against plain loops in double; bits, functions, random numbers, tables.
// (Matmul, attention and the linear layer: test_matmul.cu.)
//
//     make build/cpu/test_kernels && build/cpu/test_kernels        -v also prints how much of its tolerance each test used
//
// How it tests, and where its bounds come from: device_test.h.
#include "../llama.cuh"
#include "device_test.h"
#include <cfloat>       // FLT_MAX, FLT_MIN

constexpr int widths[] = {1, 7, 16, 48, 64, 100, 513};
constexpr int row_counts[] = {1, 31, 33, 300};

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
    std::vector<float> x = {infinity, NAN, -(float)NAN, -infinity, -1, 0, -0.f, 1e-45f, 1e-39f, 1, FLT_MIN, FLT_MAX, 2, 0.5f,
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
        if (i < 9) r.verdict.note(i == 0 ? y.host[i] == infinity : i < 5 ? std::isnan(y.host[i]) : y.host[i] == -infinity, "log_(%g) is %g", x[i], y[i]);
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

// The amax that a kernel noted of every row that it wrote: exact.
static void check_amax(Run& r, Buffer<float>& amax, const Buffer<act_t>& rows, int64_t width) {
    amax.fetch();
    for (int64_t i = 0; i < amax.n && r.compare; i++) {
        double want = 0;
        for (int64_t c = 0; c < width; c++) want = std::max(want, std::fabs(rows[i * width + c]));
        r.verdict.close(amax[i], want, 0, "amax of row", i);
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
                Buffer<float> amax(r, N);
                residual_rmsnorm(r.ctx, to, h.p, rstd.p, a.p, second, w.p, N, C, (acc_t)eps, amax.p);
                a.fetch(), x.fetch(), h.fetch(), rstd.fetch();
                check_amax(r, amax, h, C);
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
            Buffer<float> amax(r, N);
            rmsnorm_grad(r.ctx, dx.p, dw.p, partial.p, dh.p, x.p, rstd.p, w.p, N, C, amax.p);
            dx.fetch(), dw.fetch();
            check_amax(r, amax, dx, C);
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
            rotate(r.ctx, qkv.p, {cs.p, sn.p}, s, (acc_t)direction);
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
            Buffer<float> amax(r, N), amax_grad(r, N);
            swiglu(r.ctx, s.p, gu.p, N, F, amax.p);
            swiglu_grad(r.ctx, gu.p, ds.p, N, F, amax_grad.p);
            s.fetch(), gu.fetch();
            check_amax(r, amax, s, F), check_amax(r, amax_grad, gu, 2 * F);
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
// of what went in. Every tenth gradient is 1e-8 and every eleventh 0: there eps decides. Moments in bf16 lose less than 2^-7 of themselves a step,
// of which the later ones see 0.9 and 0.95 parts at most: t 2^-7 (1 + 2^-7)^t of what went in; sqrt(v) half as much.
template <class S> static void test_adamw(Run& r) {
    const double lost = sizeof(S) == 2 ? 1.04 * 0x1p-7 : 0;
    for (int64_t n : {(int64_t)1, (int64_t)7, (int64_t)100, chunk, chunk + 7})
        for (double decay : {0., 0.1}) {
            r.at("%ld elements, decay %g", (long)n, decay);
            Rng rng{(uint64_t)n};
            const double lr = 0.01, clip = 0.37, eps = 1e-8;
            Buffer<acc_t> w(r, n, [&](int64_t) { return rng(1); });
            Buffer<S> m(r, n, [](int64_t) { return 0; }), v(r, n, [](int64_t) { return 0; });
            std::vector<double> W = w.values(), M(n), V(n), moved(n), m_size(n);
            for (double& s : moved) s = 1;
            for (int t = 1; t <= 5; t++) {
                Buffer<acc_t> g(r, n, [&](int64_t i) { return i % 10 == 3 ? rng(1e-8) : i % 11 == 4 ? 0 : rng(1); });
                std::vector<double> drawn = g.values();
                double c1 = 1 - std::pow(0.9, t), c2 = 1 - std::pow(0.95, t);
                AdamW o = {(acc_t)lr, acc_t(0.9), acc_t(0.95), acc_t(eps), (acc_t)decay, (acc_t)clip, (acc_t)c1, (acc_t)c2};
                adamw_step(r.ctx, w.p, m.p, v.p, g.p, n, o, 3);
                w.fetch(), m.fetch(), v.fetch(), g.fetch();
                for (int64_t i = 0; i < n && r.compare; i++) {
                    double grad = clip * g[i];
                    M[i] = 0.9 * M[i] + 0.1 * grad, m_size[i] = 0.9 * m_size[i] + 0.1 * std::fabs(grad);
                    V[i] = 0.95 * V[i] + 0.05 * grad * grad;
                    double down = std::sqrt(V[i] / c2) + eps;
                    W[i] = W[i] * (1 - lr * decay) - lr * M[i] / c1 / down;
                    moved[i] += lr * m_size[i] / c1 / down;
                    r.verdict.close(g[i], drawn[i], 0, "gradient", i);
                    r.verdict.close(m[i], M[i], (40 * u + t * lost) * m_size[i] + 1e-44, "m", i);
                    r.verdict.close(v[i], V[i], (40 * u + t * lost) * V[i] + 1e-44, "v", i);
                    r.verdict.close(w[i], W[i], 5 * u + (40 * u + 1.6 * t * lost) * (moved[i] - 1), "w", i);
                }
            }
        }
}

// A float becomes one of the two bf16 next to it, the upper one for exactly as many of the 65536 r as its cut bits say, so that the mean is the
// float itself; bf16's own values stay, NaNs and infinities too, and nothing finite becomes infinite.
static void test_stochastic_bf16(Run& r) {
    if (!r.compare) return;
    r.at("mean over r");
    for (float x : {1.f, 1.f + 0x1p-23f, -1.f - 0x1p-8f, 3.14159265f, -2.71828e-20f, 0x1.fffffep0f, 1e-45f, -0x1p-130f, FLT_MIN, 1e38f}) {
        double sum = 0;
        for (uint32_t k = 0; k < 65536; k++) sum += (double)stochastic_bf16(x, k) - x;                 // exact: multiples of x's last bit
        r.verdict.note(sum == 0, "%.9g is off by %.9g in the mean", x, sum / 65536);
    }
    r.at("all upper halves");
    for (uint32_t i = 0; i < 65536; i++)
        for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0xffffu})
            for (uint32_t k : {0u, 1u, 0x8000u, 0xffffu}) {
                uint32_t bits = i << 16 | low, a = bits & 0x7fffffff, seen = bits_of(stochastic_bf16(float_of(bits), k)), up = low + k > 0xffff;
                bool nan = a > 0x7f800000, top = a >= 0x7f7f0000;                                      // top: no larger finite bf16
                r.verdict.note(nan ? (seen & 0x7fffffff) > 0x7f800000 && !(seen & 0xffff) && seen >> 31 == bits >> 31
                                   : seen == (i + (up && !top)) << 16, "%08x with %04x becomes %08x", bits, k, seen);
            }
}

// bf16 moments. The weights are the float kernel's to the bit, and so are m and v before they are rounded; which way each goes is told by Philox.
static void test_moments(Run& r) {
    Ctx& ctx = r.ctx;
    const AdamW o = {acc_t(0.01), acc_t(0.9), acc_t(0.95), acc_t(1e-8), acc_t(0.1), acc_t(0.37), acc_t(0.3), acc_t(0.2)};
    struct Reset { Ctx& ctx; ~Reset() { ctx.seed = 0, ctx.step = 0; } } reset{ctx};
    for (int64_t n : {(int64_t)1, (int64_t)7, (int64_t)2048 + 65, chunk + 77}) {
        r.at("%ld elements", (long)n);
        ctx.seed = 0x123456789abcdefu + n, ctx.step = 11;
        RandomKey key = {ctx.seed, 11, 0, 517, 0, Purpose::moments};
        Rng rng{(uint64_t)n};
        Buffer<acc_t> w(r, n, [&](int64_t) { return rng(1); }), g(r, n, [&](int64_t) { return rng(1); });
        Buffer<bf16> m(r, n, [&](int64_t) { return rng(0.3); }), v(r, n, [&](int64_t) { return std::fabs(rng(0.3)); });
        Buffer<acc_t> w2(r, n, [&](int64_t i) { return w[i]; }), m2(r, n, [&](int64_t i) { return m[i]; }), v2(r, n, [&](int64_t i) { return v[i]; });
        adamw_step(ctx, w.p, m.p, v.p, g.p, n, o, 517);
        adamw_step(ctx, w2.p, m2.p, v2.p, g.p, n, o, 517);
        w.fetch(), m.fetch(), v.fetch(), w2.fetch(), m2.fetch(), v2.fetch();
        for (int64_t i = 0; i < n && r.compare; i++) {
            uint32_t word = philox(key, (uint64_t)(i / 64 * 16 + i % 16)).w[i % 64 / 16];
            r.verdict.note(bits_of(w.host[i]) == bits_of(w2.host[i]), "w[%ld] is %.9g, %.9g of float moments", (long)i, w[i], w2[i]);
            r.verdict.note(m.host[i].bits == (bits_of(m2.host[i]) + (word & 0xffff)) >> 16, "m[%ld] is %.9g of %.9g", (long)i, m[i], m2[i]);
            r.verdict.note(v.host[i].bits == (bits_of(v2.host[i]) + (word >> 16)) >> 16, "v[%ld] is %.9g of %.9g", (long)i, v[i], v2[i]);
        }
    }

    // Over seeds, steps and tensors the means are the floats, and m goes up independently of v. Bernstein: a sum of draws whose variances add up to s is
    // off by more than sqrt(40 s) + 13.4 with probability e^-20 at most, if no draw is off by more than 1; the product of two neither.
    {
        const int64_t n = 1024;
        const int tries = 192;
        r.at("%d draws of %ld elements", tries, (long)n);
        Rng rng{5};
        Buffer<acc_t> g(r, n, [&](int64_t) { return rng(1); }), w(r, n), m2(r, n), v2(r, n);
        Buffer<bf16> m0(r, n, [&](int64_t) { return rng(0.3); }), v0(r, n, [&](int64_t) { return std::fabs(rng(0.3)); }), m(r, n), v(r, n);
        for (int64_t i = 0; i < n; i++) w.host[i] = 0, m2.host[i] = (float)m0[i], v2.host[i] = (float)v0[i];
        w.send(), m2.send(), v2.send();
        adamw_step(ctx, w.p, m2.p, v2.p, g.p, n, o, 0);
        m2.fetch(), v2.fetch();
        std::vector<double> ups[2] = {std::vector<double>(n), std::vector<double>(n)};
        auto chance = [](float x) { return (bits_of(x) & 0xffff) * 0x1p-16; };
        double both = 0, variance = 0;
        for (int t = 0; t < tries; t++) {
            ctx.seed = 1 + t % 6, ctx.step = (uint32_t)(t / 6 % 8);
            m.host = m0.host, v.host = v0.host, m.send(), v.send();
            adamw_step(ctx, w.p, m.p, v.p, g.p, n, o, (uint32_t)(t / 48));
            m.fetch(), v.fetch();
            for (int64_t i = 0; i < n && r.compare; i++) {
                double up[2] = {(double)(m.host[i].bits - (bits_of(m2.host[i]) >> 16)), (double)(v.host[i].bits - (bits_of(v2.host[i]) >> 16))};
                double p = chance(m2.host[i]), q = chance(v2.host[i]);
                r.verdict.note((up[0] == 0 || up[0] == 1) && (up[1] == 0 || up[1] == 1), "%ld moves by %g and %g", (long)i, up[0], up[1]);
                ups[0][i] += up[0], ups[1][i] += up[1], both += (up[0] - p) * (up[1] - q), variance += p * (1 - p) * q * (1 - q);
            }
        }
        for (int which = 0; which < 2 && r.compare; which++) {
            double all = 0, spread = 0;
            for (int64_t i = 0; i < n; i++) {
                double p = chance(which ? v2.host[i] : m2.host[i]), s = tries * p * (1 - p);
                r.verdict.close(ups[which][i], tries * p, std::sqrt(40 * s) + 13.4, which ? "times v went up" : "times m went up", i);
                all += ups[which][i] - tries * p, spread += s;
            }
            r.verdict.close(all, 0, std::sqrt(40 * spread) + 13.4, which ? "all of v" : "all of m", 0);
        }
        if (r.compare) r.verdict.close(both, 0, std::sqrt(40 * variance) + 13.4, "m and v go up together", 0);
    }

    // beta2 = 0.999 and v on its way from 0.5 to 1: a step adds at most 2^-11, an eighth of bf16's 2^-8 there. To nearest v stays where it is; stochastically
    // the mean of 1024 elements follows 1 - 0.999^t / 2. A step's rounding has a variance of 2^-18 at most (half a bf16 step, squared): 6.5 standard errors.
    {
        const int64_t n = 1024;
        const int steps = 200;
        r.at("beta2 0.999");
        AdamW slow = {0, acc_t(0.9), acc_t(0.999), acc_t(1e-8), 0, 1, 1, 1};
        Buffer<acc_t> w(r, n, [](int64_t) { return 0; }), g(r, n, [](int64_t) { return 1; });
        Buffer<bf16> m(r, n, [](int64_t) { return 1; }), v(r, n, [](int64_t) { return 0.5; });
        float nearest = 0.5f;
        ctx.seed = 1;
        for (int t = 0; t < steps; t++) {
            ctx.step = (uint32_t)t;
            adamw_step(ctx, w.p, m.p, v.p, g.p, n, slow, 1);
            nearest = as_bf16(0.999 * nearest + 0.001);
        }
        v.fetch();
        double mean = 0, want = 1 - 0.5 * std::pow(0.999, steps), bound = 6.5 * std::sqrt(steps * 0x1p-18 / n) + steps * 4 * u;
        for (int64_t i = 0; i < n; i++) mean += v[i] / n;
        r.verdict.close(mean, want, bound, "mean of v", 0);
        r.verdict.note(nearest == 0.5f && want - nearest > 10 * bound, "to nearest v reaches %g: this test sees nothing", nearest);
    }

    // What is not finite stays so, beside neighbours that it does not touch; what bf16 cannot reach stops at its largest value.
    r.at("NaN, infinity and the largest");
    const float most = float_of(0x7f7f0000), bad[] = {NAN, infinity, -infinity, 1e30f, 1, FLT_MAX};
    AdamW plain = {acc_t(0.01), acc_t(0.9), acc_t(0.95), acc_t(1e-8), 0, 1, 1, 1};
    Buffer<acc_t> w(r, 96, [](int64_t) { return 0; }), g(r, 96, [&](int64_t i) { return bad[i % 6]; });
    Buffer<bf16> m(r, 96, [&](int64_t i) { return i % 6 == 5 ? most : 0; }), v(r, 96, [](int64_t) { return 0; });
    adamw_step(ctx, w.p, m.p, v.p, g.p, 96, plain, 0);
    m.fetch(), v.fetch();
    for (int64_t i = 0; i < 96 && r.compare; i += 6) {
        auto is = [&](bool ok, const char* what) { r.verdict.note(ok, "%s, at %ld: m %g, v %g", what, (long)i, m[i], v[i]); };
        is(std::isnan(m[i]) && std::isnan(v[i]), "NaN");
        is(m[i + 1] == infinity && v[i + 1] == infinity && m[i + 2] == -infinity && v[i + 2] == infinity && v[i + 3] == infinity, "infinity");
        is(near(m[i + 4], 0.1, 0.1 * 0x1p-7) && near(v[i + 4], 0.05, 0.05 * 0x1p-7), "1");
        is(m[i + 5] == most && v[i + 5] == infinity, "the largest");
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
    allocate(r.ctx, m, false);
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
    begin(argc, argv);
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
    test("adamw", test_adamw<acc_t>);
    test("adamw, moments in bf16", test_adamw<bf16>);
    test("stochastic_bf16", test_stochastic_bf16);
    test("bf16 moments: their roundings", test_moments);
    test("presets and tensor table", test_tables);
    test("model: NaN and infinity reach the loss", test_model_nan);
    return done();
}
