// test_subspace.cu: bases of subspace.cuh against a singular value decomposition in double, on matrices whose spectrum is known.
//
//     make build/cpu/test_subspace && build/cpu/test_subspace          -v also prints how much of its tolerance each test used
//
// Exact are bits that must not change: across threads, and where nothing may be read. All else has a bound that is derived beside it; u
// and how tests run: device_test.h. Of randomised methods theory knows expectations: means over draws whose seeds are fixed, so that a
// test says the same every time. What the bases are used for: test_metis.cu.
#include "metis_test.h"

// ---------------------------------------------------------------------------------------------------------------------------
// All rows

struct Known { const char* name; int64_t rows, cols; int k; double (*sigma)(int); };
static const Known known[] = {
    {"flat", 160, 96, 16, [](int) { return 1.; }},
    {"one spike", 160, 96, 16, [](int i) { return i ? 0.01 : 1.; }},
    {"power law", 200, 96, 16, [](int i) { return 1. / (1 + i); }},
    {"power law, rank 48", 200, 96, 48, [](int i) { return 1. / (1 + i); }},
    {"power law with a step", 200, 96, 16, [](int i) { return (i < 16 ? 1. : 0.3) / (1 + i); }},
    {"power law of 1e-25", 150, 64, 16, [](int i) { return 1e-25 / (1 + i); }},
    {"power law of 1e15", 150, 64, 32, [](int i) { return 1e15 / (1 + i); }},
    {"sixteen decades", 150, 64, 16, [](int i) { return std::pow(10, -i / 4.); }},
    {"rank 5", 120, 64, 16, [](int i) { return i < 5 ? 1. / (1 + i) : 0; }},
    {"rank 20", 120, 64, 16, [](int i) { return i < 20 ? 1. / (1 + i) : 0; }},
    {"zero", 60, 64, 16, [](int) { return 0.; }},
    {"12 rows", 12, 64, 16, [](int i) { return 1. / (1 + i); }},
    {"20 rows", 20, 64, 16, [](int i) { return 1. / (1 + i); }},
    {"one row", 1, 32, 16, [](int) { return 1.; }},
    {"k nearly all columns", 90, 36, 32, [](int i) { return 1. / (1 + i); }},
    {"k all columns", 80, 32, 32, [](int i) { return 1. / (1 + i); }},
    {"k all columns and rows", 48, 48, 48, [](int i) { return 1. / (1 + i); }},
    {"k all columns, rank 5", 80, 48, 48, [](int i) { return i < 5 ? 1. / (1 + i) : 0; }},
    {"k all columns, zero", 30, 16, 16, [](int) { return 0.; }},
};

// Cold, of all rows. The mean of eight draws against the expected loss; of two on the emulated device.
constexpr int cold_draws = on_emulated ? 2 : 8;

template <class T> static void test_known(Run& r, const Known& c, int powers) {
    Rng rng{(uint64_t)(c.rows + c.k)};
    Dense m = with_spectrum<T>(rng, c.rows, c.cols, c.sigma);
    Buffer<T> source(r, c.rows * c.cols, [&](int64_t i) { return m.v[i]; });
    Refresh f = {c.rows, c.cols, c.rows, c.k};
    f.plan.cold = powers;
    double loss = 0, total = energy(m);
    Svd best = r.compare ? svd(m) : Svd{{}, m};
    r.at("%s, %ldx%ld, %d-byte elements, %d power iterations", c.name, (long)c.rows, (long)c.cols, (int)sizeof(T), powers);
    // The reference itself: rounding moves every singular value by no more than all of the rounding errors' energy (Weyl).
    for (int64_t i = 0; r.compare && i < c.cols; i++)
        r.verdict.close(best.sigma[i], i < c.rows ? c.sigma((int)i) : 0, (sizeof(T) == 2 ? 0x1p-8 : u) * std::sqrt(total) + 1e-12 * best.sigma[0], "sigma", i);
    for (int draw = 0; draw < cold_draws; draw++) {
        Buffer<acc_t> basis(r, c.k * c.cols);
        f.key.seed = draw + 1, f.key.step = 3 * draw;
        Dense b = refresh(r, basis, source, f);
        if (!r.compare) continue;
        check_basis(r, m, best, b, f);
        loss += lost(m, b) / cold_draws;
    }
    if (!r.compare) return;
    double bound = expected_loss(best, f) + energy_u(f) * total;
    r.verdict.note(loss <= bound, "loses %g on average, the bound is %g", loss, bound);
}

static void test_cold(Run& r) {
    for (const Known& c : known)
        for (int powers : {0, 2}) test_known<acc_t>(r, c, powers);
    test_known<bf16>(r, known[2], 2), test_known<bf16>(r, known[11], 2);
    // What stands in for the rows of a zero matrix is drawn by the step: orthonormal for every one of them.
    Buffer<acc_t> zero(r, 20 * 16, [](int64_t) { return 0; });
    Refresh f = {20, 16, 20, 16};
    for (; f.key.step < (on_emulated ? 8 : 100); f.key.step++) {
        r.at("zero, step %u", f.key.step);
        Buffer<acc_t> basis(r, 16 * 16);
        check_orthonormal(r, refresh(r, basis, zero, f), 16);
    }
}

// Warm, of all rows. The old basis is among the rows that the refresh begins with; Ritz's k capture the most of that span; and a power
// iteration loses nothing: |SAx|^2/|Ax|^2 >= |Ax|^2/|Sx|^2 >= |Sx|^2/|x|^2 with A = S'S (Cauchy-Schwarz twice), so by Courant and Fischer
// no Ritz value falls. From a cold basis, from the worst one there is, from zeros (step 0 was not finite), and from random rows.
static void test_warm(Run& r) {
    for (const Known& c : known) {
        Rng rng{(uint64_t)(c.cols + c.k)};
        Dense m = with_spectrum<acc_t>(rng, c.rows, c.cols, c.sigma);
        Svd best = svd(m);
        Buffer<acc_t> source(r, c.rows * c.cols, [&](int64_t i) { return m.v[i]; });
        double total = energy(m);
        for (int start = 0; start < 4; start++) {
            if (on_emulated && start != (&c - known) % 4) continue;
            r.at("%s, %ldx%ld, rank %d, start %d", c.name, (long)c.rows, (long)c.cols, c.k, start);
            Dense random = orthonormal(gaussian(rng, c.k, c.cols));
            Buffer<acc_t> basis(r, c.k * c.cols, [&](int64_t i) {
                return start == 1 ? best.right[c.cols - c.k + i / c.cols][i % c.cols] : start == 2 ? 0 : random.v[i];
            });
            Refresh f = {c.rows, c.cols, c.rows, c.k};
            Dense b = start == 0 ? refresh(r, basis, source, f) : Dense(c.k, c.cols, basis.values());
            for (f.warm = true; f.key.step < 24; ) {
                f.key.step += 8;
                double before = start == 2 && f.key.step == 8 ? total : lost(m, b);
                b = refresh(r, basis, source, f);
                if (!r.compare) continue;
                check_basis(r, m, best, b, f);
                r.verdict.note(lost(m, b) <= before + energy_u(f) * total, "step %u loses %g, before it %g", f.key.step, lost(m, b), before);
            }
            // Nothing but the old basis to choose from: its span comes back. z is that to orthonormality(k), the rotation orthogonal.
            f.plan.oversample = 0, f.plan.warm = 0;
            Dense same = refresh(r, basis, source, f), inside = products(b, same);
            for (int i = 0; i < c.k; i++) r.verdict.close(dot(inside[i], inside[i], c.k), 1, 4 * orthonormality(c.k), "old direction in the new span", i);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// Sampled rows

// Row number i of the sample, by test/vectors/README.md's Philox: drawn uniformly, with replacement. 7 is Purpose::rows.
static int64_t sampled(const Refresh& f, int64_t i) { return (int64_t)(((uint64_t)slow::draw(f.key, 7, f.key.operand, i).w[0] * (uint64_t)f.rows) >> 32); }

// On the rows that were drawn all of the above holds, cold and warm; no other row is read: they are NaN.
static void test_sample(Run& r) {
    const Known c = known[2];
    for (int draw = 0; draw < 3; draw++) {
        r.at("draw %d", draw);
        Rng rng{77};
        Dense m = with_spectrum<acc_t>(rng, c.rows, c.cols, c.sigma), s(64, c.cols);
        Refresh f = {c.rows, c.cols, s.rows, c.k};
        f.key = {(uint64_t)draw << 33 | 5, 3, 0, 4, 1, Purpose::rows};
        std::vector<bool> drawn(c.rows);
        for (int64_t i = 0; i < s.rows; i++) drawn[sampled(f, i)] = true, std::copy(m[sampled(f, i)], m[sampled(f, i)] + c.cols, s[i]);
        Buffer<acc_t> source(r, c.rows * c.cols, [&](int64_t i) { return drawn[i / c.cols] ? m.v[i] : NAN; }), basis(r, c.k * c.cols);
        Svd best = r.compare ? svd(s) : Svd{{}, s};
        Dense b = refresh(r, basis, source, f);
        double cold = lost(s, b);
        if (r.compare) {
            check_basis(r, s, best, b, f);
            r.verdict.note(cold <= expected_loss(best, f) + energy_u(f) * energy(s), "loses %g of the sample, the bound is %g", cold, expected_loss(best, f));
        }
        f.warm = true;
        b = refresh(r, basis, source, f);
        if (r.compare) check_basis(r, s, best, b, f);
        r.verdict.note(lost(s, b) <= cold + energy_u(f) * energy(s), "warm loses %g of the sample, cold %g", lost(s, b), cold);
    }
}

// Alignment with the full matrix's subspace. n rows drawn with replacement give a covariance whose element (i, j), in the basis of the
// right singular vectors, errs by variance v_ij / n, v_ij = the mean over rows of (x_i x_j)^2. To first order, that is where this noise
// is small beside the gap between eigenvalues l = sigma^2 / rows, it turns direction i <= k towards j > k by its error over l_i - l_j. So
//     k - |B V_k|^2 = sum v_ij / (l_i - l_j)^2 / n      and the energy lost beyond the best subspace is  rows sum v_ij / (l_i - l_j) / n,
// on average. Where it is largest, between k and k + 1, the squared angle is l_k l_k+1 / (l_k - l_k+1)^2 / n: 2% for a power law and 3000
// rows, less for 300 rows if it steps down by 4 there. The next order is smaller by as much; and the mean of 40 draws, each a sum over
// many pairs, is known to some percent. So 20% decides, from both sides: too few rows, or too many, would show.
static void test_alignment(Run& r) {
    for (bool step : {true, false}) {
        r.at(step ? "power law with a step" : "power law");
        const int64_t rows = 4000, cols = 48, k = 16, n = step ? 300 : 3000, draws = on_emulated ? 2 : 40;
        Rng rng{5};
        Dense m = step ? with_spectrum<acc_t>(rng, rows, cols, [](int i) { return (i < 16 ? 1. : 0.25) / (1 + i); })
                       : with_spectrum<acc_t>(rng, rows, cols, [](int i) { return 1. / (1 + i); });
        Buffer<acc_t> source(r, rows * cols, [&](int64_t i) { return m.v[i]; });
        Refresh f = {rows, cols, n, k};
        Svd best = r.compare ? svd(m) : Svd{{}, Dense(cols, cols)};
        double missing = 0, loss = 0;
        for (int draw = 0; draw < draws; draw++) {
            Buffer<acc_t> basis(r, k * cols);
            f.key.seed = draw + 1, f.plan.oversample = step ? 8 : cols - k;     // what the sketch misses is not the question
            Dense b = refresh(r, basis, source, f);
            if (!r.compare) continue;
            check_orthonormal(r, b, f.q());
            missing += k / (double)draws, loss += (lost(m, b) - best.squares(k)) / draws;
            for (int i = 0; i < k; i++)
                for (int j = 0; j < k; j++) missing -= std::pow(dot(b[i], best.right[j], cols), 2) / draws;
        }
        if (!r.compare || on_emulated) continue;                              // statistics are not the device's
        Dense x = products(m, best.right);
        double turned = 0, wasted = 0;
        for (int i = 0; i < k; i++)
            for (int j = k; j < cols; j++) {
                double v = 0, gap = (best.sigma[i] * best.sigma[i] - best.sigma[j] * best.sigma[j]) / rows;
                for (int64_t t = 0; t < rows; t++) v += x[t][i] * x[t][i] * x[t][j] * x[t][j] / rows;
                turned += v / (gap * gap) / n, wasted += rows * v / gap / n;
            }
        r.verdict.close(missing / turned, 1, 0.2, "directions missing, of first order's", 0);
        r.verdict.close(loss / wasted, 1, 0.2, "energy lost, of first order's", 0);
        if (verbose) printf("   %s: %.3g of %ld directions missing, first order %.3g; energy %.3g, %.3g\n", r.verdict.where.c_str(), missing, (long)k, turned, loss, wasted);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// What is not finite leaves the basis as it was, bit for bit; bf16 rows give the bits of the same numbers as floats.
template <class T> static void test_not_finite_source(Run& r) {
    const int64_t rows = 60, cols = 48, k = 16;
    Rng rng{9};
    Dense m = with_spectrum<bf16>(rng, rows, cols, [](int i) { return 1. / (1 + i); });
    for (double bad : {(double)NAN, (double)INFINITY, -(double)INFINITY})
        for (int64_t samples : {rows, (int64_t)40})
            for (bool warm : {false, true})
                for (int row : {-1, 33}) {                                    // -1: in all, so that one is drawn
                    if (row >= 0 && samples < rows) continue;
                    r.at("%g in row %d, %ld of %ld rows, %s", bad, row, (long)samples, (long)rows, warm ? "warm" : "cold");
                    Buffer<T> source(r, rows * cols, [&](int64_t i) { return i % cols == 7 && (row < 0 || i / cols == row) ? bad : m.v[i]; });
                    Buffer<acc_t> basis(r, k * cols, [&](int64_t) { return rng(1); });
                    std::vector<acc_t> before = basis.host;
                    Refresh f = {rows, cols, samples, (int)k, {}, warm};
                    refresh(r, basis, source, f);
                    r.verdict.note(!memcmp(before.data(), basis.host.data(), before.size() * sizeof(acc_t)), "the basis changed");
                }
}
static void test_sources(Run& r) {
    test_not_finite_source<acc_t>(r), test_not_finite_source<bf16>(r);
    Rng rng{9};
    for (int64_t samples : {100, 60}) {
        r.at("bf16 and float, %ld of 100 rows", (long)samples);
        Dense m = with_spectrum<bf16>(rng, 100, 48, [](int i) { return 1. / (1 + i); });
        Buffer<bf16> half(r, 100 * 48, [&](int64_t i) { return m.v[i]; });
        Buffer<acc_t> whole(r, 100 * 48, [&](int64_t i) { return m.v[i]; }), a(r, 16 * 48), b(r, 16 * 48);
        Refresh f = {100, 48, samples, 16};
        refresh(r, a, half, f), refresh(r, b, whole, f);
        r.verdict.note(!memcmp(a.host.data(), b.host.data(), a.n * sizeof(acc_t)), "not the same bits");
    }
}

int main(int argc, char** argv) {
    begin(argc, argv);
    test("cold, all rows", test_cold);
    test("warm, all rows", test_warm);
    test("sampled rows", test_sample);
    test("alignment of sampled rows", test_alignment);
    test("sources", test_sources);
    return done();
}
