// test_metis.cu: Metis: bases (subspace.cuh), split operands, their products and the linear layer (metis.cuh), against double.
//
//     make build/cpu/test_metis && build/cpu/test_metis          -v also prints how much of its tolerance each test used
//
// Exact are bits that must not change: across threads, after a repetition, where nothing may be read. Everything else has a bound
// that is derived beside it; u and how tests run: device_test.h. Randomised statements are expectations over draws: the seeds are fixed,
// so a test gives the same answer every time. The program from outside: test_metis.py.
#include "../metis.cuh"
#include "slow_quantiser.h"

// ---------------------------------------------------------------------------------------------------------------------------
// Double: matrices, and their singular values by one-sided Jacobi

struct Dense {
    int64_t rows = 0, cols = 0;
    std::vector<double> v = {};
    Dense(int64_t r, int64_t c) : rows(r), cols(c), v(r * c) {}
    Dense(int64_t r, int64_t c, std::vector<double> values) : rows(r), cols(c), v(std::move(values)) {}
    double* operator[](int64_t i) { return v.data() + i * cols; }
    const double* operator[](int64_t i) const { return v.data() + i * cols; }
};
static double dot(const double* a, const double* b, int64_t n) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}
static double energy(const Dense& a) { return dot(a.v.data(), a.v.data(), (int64_t)a.v.size()); }
static Dense transposed(const Dense& a) {
    Dense t(a.cols, a.rows);
    for (int64_t i = 0; i < a.rows; i++)
        for (int64_t j = 0; j < a.cols; j++) t[j][i] = a[i][j];
    return t;
}
static Dense magnitudes(Dense a) {
    for (double& v : a.v) v = std::fabs(v);
    return a;
}
// A B^T: rows against rows.
static Dense products(const Dense& a, const Dense& b) {
    Dense c(a.rows, b.rows);
    for (int64_t i = 0; i < a.rows; i++)
        for (int64_t j = 0; j < b.rows; j++) c[i][j] = dot(a[i], b[j], a.cols);
    return c;
}
// Rows made orthonormal, by Gram-Schmidt twice.
static Dense orthonormal(Dense a) {
    for (int64_t i = 0; i < a.rows; i++)
        for (int pass = 0; pass < 2; pass++) {
            for (int64_t j = 0; j < i; j++) {
                double d = dot(a[i], a[j], a.cols);
                for (int64_t c = 0; c < a.cols; c++) a[i][c] -= d * a[j][c];
            }
            double length = std::sqrt(dot(a[i], a[i], a.cols));
            for (int64_t c = 0; c < a.cols; c++) a[i][c] /= length;
        }
    return a;
}

// Columns are rotated in pairs until all are orthogonal (Hestenes): their lengths are the singular values, the rotations' product the
// right singular vectors, here as rows, largest first.
struct Svd {
    std::vector<double> sigma;
    Dense right;
    double squares(int64_t from) const {                                      // of sigma[from] and all after it
        double s = 0;
        for (size_t i = from; i < sigma.size(); i++) s += sigma[i] * sigma[i];
        return s;
    }
};
static Svd svd(const Dense& m) {
    Dense a = transposed(m), v(m.cols, m.cols);
    for (int64_t i = 0; i < v.rows; i++) v[i][i] = 1;
    const double noise = 1e-18 * energy(m);
    for (int sweep = 0, rotated = 1; rotated && sweep < 50; sweep++) {
        rotated = 0;
        for (int64_t i = 0; i < a.rows; i++)
            for (int64_t j = i + 1; j < a.rows; j++) {
                double x = dot(a[i], a[i], a.cols), y = dot(a[j], a[j], a.cols), z = dot(a[i], a[j], a.cols);
                if (!(std::fabs(z) > noise && std::fabs(z) > 1e-14 * std::sqrt(x * y))) continue;
                double theta = (y - x) / (2 * z), t = (theta >= 0 ? 1 : -1) / (std::fabs(theta) + std::sqrt(theta * theta + 1)), c = 1 / std::sqrt(t * t + 1), s = t * c;
                auto rotate = [&](double* p, double* q, int64_t n) {
                    for (int64_t k = 0; k < n; k++) {
                        double before = p[k];
                        p[k] = c * before - s * q[k], q[k] = s * before + c * q[k];
                    }
                };
                rotate(a[i], a[j], a.cols), rotate(v[i], v[j], v.cols);
                rotated++;
            }
    }
    std::vector<std::pair<double, int64_t>> order;
    for (int64_t i = 0; i < a.rows; i++) order.push_back({-std::sqrt(dot(a[i], a[i], a.cols)), i});
    std::sort(order.begin(), order.end());
    Svd result = {{}, Dense(m.cols, m.cols)};
    for (int64_t i = 0; i < a.rows; i++) {
        result.sigma.push_back(-order[i].first);
        std::copy(v[order[i].second], v[order[i].second] + v.cols, result.right[i]);
    }
    return result;
}

static Dense gaussian(Rng& rng, int64_t rows, int64_t cols) {
    Dense a(rows, cols);
    for (double& v : a.v)
        for (int i = 0; i < 12; i++) v += 0.5 * rng(1);                       // twelve uniform numbers of variance 1/12
    return a;
}
// U diag(sigma) V^T with random orthonormal U and V, rounded to T.
template <class T> static Dense with_spectrum(Rng& rng, int64_t rows, int64_t cols, double (*sigma)(int)) {
    int64_t n = std::min(rows, cols);
    Dense left = orthonormal(gaussian(rng, n, rows)), right = orthonormal(gaussian(rng, n, cols));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < rows; j++) left[i][j] *= sigma((int)i);
    Dense m = products(transposed(left), transposed(right));
    for (double& v : m.v) v = sizeof(T) == 2 ? as_bf16(v) : (float)v;
    return m;
}

// ---------------------------------------------------------------------------------------------------------------------------
// refresh_basis

struct Refresh {
    int64_t rows, cols, samples;
    int k;
    SplitPlan plan = {};
    bool warm = false;
    RandomKey key = {1, 0, 0, 5, 2, Purpose::rows};
    int q() const { return (int)std::min<int64_t>(k + plan.oversample, cols); }
};
// Scratch of exactly the sizes that subspace.cuh states, all NaN before; the basis as it was comes back changed.
template <class T> static Dense refresh(Run& r, Buffer<acc_t>& basis, Buffer<T>& source, const Refresh& f) {
    int q = f.q();
    Buffer<acc_t> sample(r, f.samples * f.cols), z(r, q * f.cols), y(r, q * f.samples), g(r, q * f.samples);
    Buffer<double> gram(r, q * q), vectors(r, q * q + q + 2);
    Buffer<int> state(r, q + 1);
    refresh_basis(r.ctx, basis.p, f.k, mat((const T*)source.p, f.cols), f.rows, f.cols, f.samples, f.plan, f.warm, f.key,
                  {sample.p, z.p, y.p, g.p, gram.p, vectors.p, state.p});
    basis.fetch();
    return Dense(f.k, f.cols, basis.values());
}

// The last Cholesky-QR pass takes q multiples of other rows away from a row that is nearly orthogonal to them: (q + 2) u of its length,
// so products of two rows err by 2 (q + 3) u. The rotation adds q rows under weights of length 1, whose magnitudes add up to sqrt(q).
static double orthonormality(int q) { return 2 * (q + 3) * (1 + std::sqrt(q)) * u; }

static void check_orthonormal(Run& r, const Dense& basis, int q) {
    for (int64_t i = 0; i < basis.rows; i++)
        for (int64_t j = 0; j <= i; j++) r.verdict.close(dot(basis[i], basis[j], basis.cols), i == j, orthonormality(q), "basis row . row", i * basis.rows + j);
}

// Energy of S (the sampled rows) outside the basis; its rows made orthonormal again in double, so that this is no more than the
// subspace's. Rayleigh and Ritz choose the k best directions of z, from z S^T, which errs by (cols + 2) u of the lengths' product: so
// quadratic forms, and the energy, may err by twice that, and by as much as z lacks in orthonormality, 2 (q + 3) u.
static double energy_u(const Refresh& f) { return 2 * (f.cols + f.q() + 5) * u; }
static double lost(const Dense& s, const Dense& basis) { return energy(s) - energy(products(s, orthonormal(basis))); }

// What every refresh owes, whatever S is: rows orthonormal; no more energy than the best subspace has; Ritz's order: S B has orthogonal
// columns, their lengths descending, none longer than the singular value at its place.
static void check_basis(Run& r, const Dense& s, const Svd& best, const Dense& basis, const Refresh& f) {
    check_orthonormal(r, basis, f.q());
    double total = energy(s), tol = (energy_u(f) + orthonormality(f.q())) * total;
    r.verdict.note(lost(s, basis) >= best.squares(f.k) - tol, "lost %g, and the best subspace loses %g", lost(s, basis), best.squares(f.k));
    Dense sb = transposed(products(s, basis));
    for (int i = 0; i < f.k; i++) {
        double e = dot(sb[i], sb[i], s.rows);
        r.verdict.note(e <= best.sigma[i] * best.sigma[i] + tol, "direction %d holds %g, sigma^2 is %g", i, e, best.sigma[i] * best.sigma[i]);
        if (i) r.verdict.note(e <= dot(sb[i - 1], sb[i - 1], s.rows) + tol, "direction %d holds %g, more than the one before", i, e);
        for (int j = 0; j < i; j++) r.verdict.close(dot(sb[i], sb[j], s.rows), 0, tol, "S b . S b", i * f.k + j);
    }
}

// Expected loss of the cold basis. Halko, Martinsson, Tropp (0909.4061), theorem 10.5: E |S - QQ'S|^2 <= (1 + k / (p - 1)) tail, tail =
// the energy beyond the k largest directions, p = oversampling. Its proof (of theorem 9.1) exhibits k directions inside the range that
// lose no more; Ritz's k lose the least of all, so the bound holds for them. P power iterations put S (S'S)^P in the place of S, and the
// second term, |Sigma_2^(2P+1) W Sigma_1^(-2P)|, shrinks by (sigma_k+1 / sigma_k)^2P, its square by that to the fourth. Where q is S's
// rank or more, the range is all of S.
static double expected_loss(const Svd& best, const Refresh& f) {
    double tail = best.squares(f.k);
    if (f.q() >= std::min(f.cols, f.samples) || tail == 0) return tail;
    return tail * (1 + std::pow(best.sigma[f.k] / best.sigma[f.k - 1], 4 * f.plan.cold) * f.k / (f.plan.oversample - 1));
}

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

// Cold, of all rows. The mean of eight draws against the expected loss.
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
    for (int draw = 0; draw < 8; draw++) {
        Buffer<acc_t> basis(r, c.k * c.cols);
        f.key.seed = draw + 1, f.key.step = 3 * draw;
        Dense b = refresh(r, basis, source, f);
        if (!r.compare) continue;
        check_basis(r, m, best, b, f);
        loss += lost(m, b) / 8;
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
    for (; f.key.step < 100; f.key.step++) {
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
        const int64_t rows = 4000, cols = 48, k = 16, n = step ? 300 : 3000, draws = 40;
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
        if (!r.compare) continue;
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
                for (bool everywhere : {true, false}) {
                    if (!everywhere && samples < rows) continue;              // one row may not be drawn
                    r.at("%g %s, %ld of %ld rows, %s", bad, everywhere ? "in every row" : "once", (long)samples, (long)rows, warm ? "warm" : "cold");
                    Buffer<T> source(r, rows * cols, [&](int64_t i) { return i % cols == 7 && (everywhere || i / cols == 33) ? bad : m.v[i]; });
                    Buffer<acc_t> basis(r, k * cols, [&](int64_t) { return rng(1); });
                    std::vector<acc_t> before = basis.host;
                    Refresh f = {rows, cols, samples, (int)k};
                    f.warm = warm;
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

// ---------------------------------------------------------------------------------------------------------------------------
// Split operands: one linear layer with matrices, bases and scratch of the sizes that metis.cuh states, NaN where nothing was written

enum class Kind { ordinary, low_rank, zero };
constexpr const char* kinds[] = {"ordinary", "rank 5", "zero"};

// ordinary: a dozen directions, each a fifth shorter than the one before, over noise, as activations and gradients are.
static Dense of_kind(Rng& rng, int64_t rows, int64_t cols, Kind kind) {
    Dense m(rows, cols);
    if (kind == Kind::zero) return m;
    for (int t = 0; t < (kind == Kind::ordinary ? 12 : 5); t++) {
        Dense a = gaussian(rng, 1, rows), b = gaussian(rng, 1, cols);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++) m[i][j] += std::pow(0.8, t) * a[0][i] * b[0][j];
    }
    for (double& v : m.v) v += kind == Kind::ordinary ? rng(0.2) : 0;
    return m;
}

struct Shape { int64_t rows, in, out; int k; };

struct Layer {
    Run& r;
    Recipe recipe;
    Shape shape;
    int64_t rows, in, out, k, tall, wide, samples, q;
    int64_t size;                                                             // bytes of an operand's element
    struct Side {
        Buffer<acc_t> unit, norms, partial, low_a, low_b, cross;
        Buffer<uint8_t> a, b, thin;
        Buffer<float> scales;
        Side(Layer& l) : unit(l.r, l.tall * l.k), norms(l.r, l.k), partial(l.r, (l.tall + 255) / 256 * l.k), low_a(l.r, l.tall * l.k), low_b(l.r, l.wide * l.k),
            cross(l.r, l.tall * l.k), a(l.r, l.tall * l.k * l.size), b(l.r, l.wide * l.k * l.size), thin(l.r, l.tall * 2 * l.k * l.size), scales(l.r, 4) {}
        SideScratch scratch() { return {unit.p, norms.p, partial.p, a.p, b.p, low_a.p, low_b.p, cross.p, thin.p, scales.p}; }
    };
    Buffer<act_t> x, d, y, dx;
    Buffer<acc_t> w, dw;
    Buffer<acc_t> basis_x, basis_w, basis_d, projected_x, projected_w, projected_d, inner, sample, z, y_, g;
    Buffer<uint8_t> a, b;
    Buffer<float> scales, matrix_scales, partial;
    Buffer<double> gram, vectors;
    Buffer<int> state;
    Side first, second;
    Linear lin;
    OperandScratch s;

    int64_t partials() const {
        int64_t n = 0;
        for (const Operand& c : recipe.cell) n = std::max({n, quantise_partials(c, rows, in), quantise_partials(c, rows, out), quantise_partials(c, out, in)});
        return n;
    }
    int64_t largest() const {
        size_t n = 0;
        for (const Operand& c : recipe.cell) n = std::max(n, size_of(operand_type(c.format)));
        return (int64_t)n;
    }
    template <class T> static void fill(Buffer<T>& to, const Dense& m) {
        for (int64_t i = 0; i < to.n; i++) assign(&to.host[i], m.v[i]);
        to.send();
    }
    // `shared`: tensor scales are kept from operand to operand, as in the model. Draws are those of step 16, where a refresh is due.
    Layer(Run& run, const Recipe& cells, Shape sh, Kind kind, bool shared)
        : r(run), recipe(cells), shape(sh), rows(sh.rows), in(sh.in), out(sh.out), k(sh.k), tall(std::max({rows, in, out})), wide(std::max(in, out)),
          samples(std::max({out, sampled_rows(recipe.split, (int)k, rows)})), q(k + recipe.split.oversample), size(largest()),
          x(r, rows * in), d(r, rows * out), y(r, rows * out), dx(r, rows * in), w(r, out * in), dw(r, out * in, [](int64_t i) { return 0.25 * (i % 7) - 1; }),
          basis_x(r, k * in), basis_w(r, k * in), basis_d(r, k * out), projected_x(r, rows * k), projected_w(r, out * k), projected_d(r, rows * k), inner(r, k * k),
          sample(r, samples * wide), z(r, q * wide), y_(r, q * std::max(samples, wide)), g(r, q * std::max(samples, wide)), a(r, std::max(rows * in, rows * out) * size),
          b(r, std::max(out * in, rows * in) * size), scales(r, 4), matrix_scales(r, 6), partial(r, partials()), gram(r, q * q), vectors(r, q * q + q + 2),
          state(r, q + 1), first(*this), second(*this) {
        Rng rng{(uint64_t)(rows + in + out)};
        fill(x, of_kind(rng, rows, in, kind)), fill(w, of_kind(rng, out, in, kind)), fill(d, of_kind(rng, rows, out, kind));
        lin = {"fprop", "dgrad", "wgrad", in, out, w.p, dw.p, &recipe, 8, shared ? matrix_scales.p : nullptr};
        lin.splits = {(int)k, {basis_x.p, basis_w.p, basis_d.p}, {projected_x.p, projected_w.p, projected_d.p}};
        s.a = a.p, s.b = b.p, s.scales = scales.p, s.partial = partial.p, s.refresh = true, s.inner = inner.p;
        s.side[0] = first.scratch(), s.side[1] = second.scratch();
        s.subspace = {sample.p, z.p, y_.p, g.p, gram.p, vectors.p, state.p};
        r.ctx.seed = 11, r.ctx.step = r.ctx.micro = 0;
    }
    Layer(const Layer&) = delete;
    ~Layer() { r.ctx.step = r.ctx.micro = 0; }

    Axis axis(int which) const { return which < dgrad_w ? Axis::row : Axis::column; }
    int64_t height(int which) const { return matrix_of[which] == matrix_w ? out : rows; }
    int64_t width(int which) const { return matrix_of[which] == matrix_d ? out : in; }
    int64_t outer(int which) const { return axis(which) == Axis::row ? height(which) : width(which); }
    int64_t contracted(int which) const { return axis(which) == Axis::row ? width(which) : height(which); }
    std::vector<double> matrix(int which) const { return matrix_of[which] == matrix_x ? x.values() : matrix_of[which] == matrix_w ? w.values() : d.values(); }
    Buffer<acc_t>& basis(int which) { return matrix_of[which] == matrix_x ? basis_x : matrix_of[which] == matrix_w ? basis_w : basis_d; }
    Buffer<acc_t>& projected(int which) { return matrix_of[which] == matrix_x ? projected_x : matrix_of[which] == matrix_w ? projected_w : projected_d; }
    Prepared prepare(int which) {
        Mat source = matrix_of[which] == matrix_x ? mat((const act_t*)x.p, in) : matrix_of[which] == matrix_w ? mat((const acc_t*)w.p, in) : mat((const act_t*)d.p, out);
        return ::prepare(r.ctx, lin, (Which)which, s, axis(which), source, height(which), width(which));
    }
    void forward() { linear_forward(r.ctx, lin, s, y.p, mat((const act_t*)x.p, in), rows); }
    void backward() { linear_backward(r.ctx, lin, s, dx.p, mat((const act_t*)d.p, out), mat((const act_t*)x.p, in), rows); }
};

// What prepare() returned, on the host: codes times block scales, and the tensor's scale.
struct Factor {
    Dense v;
    double scale;
    Dense value() const {
        Dense t = v;
        for (double& e : t.v) e *= scale;
        return t;
    }
};
static Factor read(Run& r, const Mat& m, int64_t rows, int64_t cols) {
    r.verdict.note(m.ld == (m.trans ? rows : cols), "rows of %ld elements", (long)m.ld);
    std::vector<uint8_t> raw(rows * cols * size_of(m.type));
    to_host(r.ctx, raw.data(), m.data, raw.size());
    Factor f = {Dense(rows, cols), 1};
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            int64_t at = m.trans ? j * rows + i : i * cols + j;
            f.v[i][j] = m.type == Type::bf16 ? load((const bf16*)raw.data() + at) : load((const float*)raw.data() + at);
        }
    float scale = 1;
    if (m.scale) to_host(r.ctx, &scale, m.scale, sizeof scale);
    f.scale = scale;
    r.bits.update(raw.data(), raw.size()), r.bits.update(&scale, sizeof scale);
    return f;
}
struct Parts {
    bool split;
    Factor r, o, c;                       // (outer x contracted), (outer x k), (k x contracted)
    std::vector<double> l;
    Dense low() const {                   // O L C
        Dense ol = o.value();
        for (int64_t i = 0; i < ol.rows; i++)
            for (int64_t j = 0; j < ol.cols; j++) ol[i][j] *= l[j];
        return products(ol, transposed(c.value()));
    }
    Dense folded() const {
        Dense m = r.value(), t = low();
        for (size_t i = 0; i < m.v.size(); i++) m.v[i] += t.v[i];
        return m;
    }
};
static Parts read(Layer& t, int which, const Prepared& p) {
    int64_t outer = t.outer(which), contracted = t.contracted(which), k = p.split ? t.k : 0;
    Parts parts = {p.split, read(t.r, p.r, outer, contracted), {Dense(outer, k), 1}, {Dense(k, contracted), 1}, {}};
    if (!p.split) return parts;
    parts.o = read(t.r, p.o, outer, k), parts.c = read(t.r, p.c, k, contracted);
    std::vector<acc_t> l(k);
    to_host(t.r.ctx, l.data(), p.l, k * sizeof(acc_t));
    parts.l.assign(l.begin(), l.end());
    t.basis(which).fetch(), t.projected(which).fetch();
    t.r.bits.update(l.data(), k * sizeof(acc_t));
    return parts;
}

// `got` against `want`, known to within err: every element on its block's grid and, where rounding is to nearest, within half a step of
// want; else within a step, on either side. Beyond the largest code, which a block's rounded scale or a scale taken over from another
// operand allows, it is the largest code. A block's scale comes from its amax, known to within err, so it may be one of two neighbours.
// Blocks run along rows of these matrices, or down their columns. Scaling costs float three roundings, 4 u.
static void check_rounded(Run& r, const Factor& got, const Dense& want, const Dense& err, Operand cell, bool down, const char* what) {
    if (down) return check_rounded(r, {transposed(got.v), got.scale}, transposed(want), transposed(err), cell, false, what);
    const std::vector<double>& grid = slow::e2m1().v;
    const int64_t B = block_length(cell.format);
    const double S = got.scale;
    for (int64_t i = 0; i < want.rows; i++)
        for (int64_t j0 = 0; j0 < want.cols; j0 += B) {
            int64_t n = std::min(B, want.cols - j0);
            double low = 0, high = 0;
            for (int64_t j = j0; j < j0 + n; j++) low = std::max(low, std::fabs(want[i][j]) - err[i][j]), high = std::max(high, std::fabs(want[i][j]) + err[i][j]);
            std::vector<double> scales;
            if (cell.format == Format::nvfp4) {
                int from = slow::nearest((float)(low / (6 * S) * (1 - 4 * u)), slow::e4m3()), to = slow::nearest((float)(high / (6 * S) * (1 + 4 * u)), slow::e4m3());
                for (int s = from; s <= to; s++) scales.push_back(slow::e4m3()[s]);
            } else if (cell.format == Format::mxfp4) {
                for (int e = -126; e < 127; e++)
                    if (6 * std::ldexp(1., e) >= low * (1 - 4 * u) && 6 * std::ldexp(1., e - 1) < high * (1 + 4 * u)) scales.push_back(std::ldexp(1., e));
                if (scales.empty()) scales.push_back(std::ldexp(1., -127));
            } else scales.push_back(high / 6 + 1e-9);
            // The scale under which the worst element does best.
            double best = INFINITY, seen = 0, at = 0, slack = 0;
            int64_t where = j0;
            for (double s : scales) {
                double worst = -1, worst_seen = 0, worst_at = 0, worst_slack = 0;
                int64_t worst_j = j0;
                for (int64_t j = j0; j < j0 + n; j++) {
                    double q = s == 0 ? got.v[i][j] == 0 ? 0 : NAN : got.v[i][j] / s, a = s == 0 ? 0 : want[i][j] / (s * S), tol = s == 0 ? 0 : err[i][j] / (s * S) + 4 * u * std::fabs(a);
                    double exact = cell.format == Format::e2m1 ? (high - low) / s + 8 * u * std::fabs(q) : 0, step = 0;        // its scale is no grid
                    bool on_grid = false;
                    for (double v : grid) on_grid = on_grid || near(std::fabs(q), v, exact);
                    for (size_t c = 0; c + 1 < grid.size(); c++)
                        if (grid[c] <= std::fabs(a) + tol && grid[c + 1] >= std::fabs(a) - tol) step = std::max(step, grid[c + 1] - grid[c]);
                    double allowed = (cell.rounding == rn ? step / 2 : step) + tol + exact + std::max(0., std::fabs(a) - 6);
                    double used = !on_grid || !(std::fabs(q - a) <= allowed) ? 2 : allowed > 0 ? std::fabs(q - a) / allowed : 0;
                    if (used > worst) worst = used, worst_seen = q, worst_at = a, worst_slack = allowed, worst_j = j;
                }
                if (worst < best) best = worst, seen = worst_seen, at = worst_at, slack = worst_slack, where = worst_j;
            }
            if (best <= 1) r.verdict.worst = std::max(r.verdict.worst, best);
            r.verdict.note(best <= 1, "%s (%ld, %ld) is %.9g in units of its block's scale, for %.9g +- %.3g", what, (long)i, (long)where, seen, at, slack);
        }
}
static double amax(const Dense& a) {
    double m = 0;
    for (double v : a.v) m = std::max(m, std::fabs(v));
    return m;
}
// The tensor's scale: amax on the largest block scale times the largest code. Three roundings, and err of what amax is known to.
static void check_scale(Run& r, const Factor& got, Operand cell, double amax, double err, const char* what) {
    double want = !has_tensor_scale(cell.format) || amax == 0 ? 1 : amax / (6 * 448.);
    r.verdict.close(got.scale, want, err / (6 * 448.) + 4 * u * want, what, 0);
}

// One operand: T = M B, L, both factors and the residual, each against double from what precedes it in memory; so that what is put
// together errs by the residual's rounding and nothing else (or, residual=exact, by that of the factors, too, as it should).
// `of`: amax of the residual that this matrix's tensor scale was made of, per matrix, for scales that are kept.
static void check_prepared(Layer& t, int which, const Parts& p, double* of) {
    Run& r = t.r;
    Operand cell = t.recipe.cell[which];
    if (t.s.nearest) cell.rounding = rn, cell.factors = cell.factors == Factors::exact ? Factors::exact : Factors::nearest;
    int64_t rows = t.height(which), cols = t.width(which), k = t.k;
    bool turned = t.axis(which) == Axis::column, code = cell.format == Format::e2m1, other = cell.along == Along::other;
    Dense m(rows, cols, t.matrix(which));
    auto logical = [&](const Dense& a) { return turned ? transposed(a) : a; };
    Dense want = logical(m), err = magnitudes(want);
    if (p.split) {
        Dense b(k, cols, t.basis(which).values()), proj(rows, k, t.projected(which).values()), seen = b;
        check_orthonormal(r, b, (int)t.q);
        bool half = sizeof(act_t) == 2 && matrix_of[which] != matrix_w;       // then B is rounded for the tensor cores, too
        for (double& v : seen.v) v = half ? as_bf16(v) : v;
        Dense exact = products(m, seen), size = products(magnitudes(m), magnitudes(seen));
        for (int64_t i = 0; i < rows * k; i++) r.verdict.close(proj.v[i], exact.v[i], (half && on_gpu ? 8 : 1) * (cols + 2) * u * size.v[i], "M B", i);
        Dense unit(rows, k), none(rows, k), nothing(k, cols), t_err(rows, k);
        for (int64_t j = 0; j < k; j++) {
            double ss = 0;
            for (int64_t i = 0; i < rows; i++) ss += proj[i][j] * proj[i][j];
            // A square goes through its own rounding, at most 256 additions, and one a chunk; the root halves what is relative.
            r.verdict.close(p.l[j], std::sqrt(ss), (130 + rows / 512. + 2) * u * std::sqrt(ss), "L", j);
            for (int64_t i = 0; i < rows; i++) unit[i][j] = p.l[j] > 0 ? (float)(proj[i][j] / p.l[j]) : 0;
        }
        const Factor &A = turned ? p.c : p.o, &B = turned ? p.o : p.c;        // in their own orientation: (rows x k), (k x cols)
        Factor a = {turned ? transposed(A.v) : A.v, A.scale}, bb = {turned ? transposed(B.v) : B.v, B.scale};
        if (cell.factors == Factors::exact) {
            for (int64_t i = 0; i < rows * k; i++) r.verdict.note(a.v.v[i] == as_bf16(unit.v[i]), "A[%ld] is %.9g, not %.9g", (long)i, a.v.v[i], unit.v[i]);
            for (int64_t i = 0; i < k * cols; i++) r.verdict.note(bb.v.v[i] == as_bf16(b.v[i]), "B[%ld] is %.9g, not %.9g", (long)i, bb.v.v[i], b.v[i]);
        } else {
            Operand thin = cell;
            thin.rounding = cell.factors == Factors::stochastic ? sr : rn;
            check_scale(r, a, thin, amax(unit), 0, "S of A"), check_scale(r, bb, thin, amax(b), 0, "S of B");
            check_rounded(r, a, unit, none, thin, code || turned, "A");
            check_rounded(r, bb, b, nothing, thin, !code && turned, "B");
        }
        // R = M - low-rank part: k fused multiply-adds, each rounded; the factor Q(A) L with three roundings before them.
        Dense low = cell.residual == Residual::exact ? logical(products(proj, transposed(b))) : p.low();
        Dense low_size(low.rows, low.cols);
        if (cell.residual == Residual::exact) low_size = logical(products(magnitudes(proj), transposed(magnitudes(b))));
        else {
            Parts abs = p;
            for (Factor* f : {&abs.o, &abs.c}) f->v = magnitudes(f->v);
            low_size = abs.low();
        }
        for (size_t i = 0; i < want.v.size(); i++) want.v[i] -= low.v[i], err.v[i] = (k + 4) * u * (err.v[i] + low_size.v[i]);
    } else
        for (double& v : err.v) v = 0;
    if (!is_quantised(cell.format)) {
        for (size_t i = 0; i < want.v.size(); i++) r.verdict.note(p.r.v.v[i] == as_bf16(want.v[i]), "element %zu", i);
        return;
    }
    double most = amax(want), slack = amax(err);
    Which before = made_before[which];
    bool kept = t.lin.scales && before != operand_count && has_tensor_scale(t.recipe.cell[before].format) && t.recipe.cell[before].split == cell.split;
    if (!kept) of[matrix_of[which]] = most;
    check_scale(r, p.r, cell, of[matrix_of[which]], slack, "S of R");
    check_rounded(r, p.r, want, err, cell, other, "R");
    if (verbose && p.split && t.lin.scales && kept) {
        static double worst = 0;
        if (most / of[matrix_of[which]] > worst) worst = most / of[matrix_of[which]], printf("   %s: residual %.3g of the one whose scale it takes over\n", r.verdict.where.c_str(), worst);
    }
}

// P^ Q^^T, put together in double, against product(). Of each term its magnitude is added up beside it, and errs by
//     R_p R_q^T                   (K + 2) u of |R_p||R_q|, and alpha's three roundings
//     O_p (L_p C_p Q^^T)          store_u of the thin factor, (K + 2k + 8) u of all magnitudes in it; then 2k + 2 additions
//     (R_p C_q L_q) O_q^T         the same
// where a thin factor is stored in the operands' type: bf16 (2^-8) where that is what the machine multiplies.
static void check_product(Run& r, const Dense& got, const double* before, double out_u, const Parts& p, const Parts& q, Operand cell, const char* what) {
    const int64_t K = p.r.v.cols, m = p.r.v.rows, n = q.r.v.rows, k = std::max(p.c.v.rows, q.c.v.rows);
    const double pu = on_gpu && operand_type(cell.format) == Type::bf16 ? 8 * u : u, thin_u = operand_type(cell.format) == Type::bf16 ? 0x1p-8 : u;
    auto part = [&](const Dense& full, const Dense& c, const std::vector<double>& l) {      // full C^T L
        Dense t = products(full, c);
        for (int64_t i = 0; i < t.rows; i++)
            for (int64_t j = 0; j < t.cols; j++) t[i][j] *= l[j];
        return t;
    };
    Parts abs_q = q;
    for (Factor* f : {&abs_q.r, &abs_q.o, &abs_q.c}) f->v = magnitudes(f->v);
    Dense rp = p.r.value(), rq = q.r.value(), want = products(p.folded(), q.folded()), main = products(rp, rq), size = products(magnitudes(rp), magnitudes(rq));
    Dense v2 = part(q.folded(), p.c.value(), p.l), s2 = part(abs_q.folded(), magnitudes(p.c.value()), p.l);
    Dense v1 = part(rp, q.c.value(), q.l), s1 = part(magnitudes(rp), magnitudes(q.c.value()), q.l);
    Dense op = magnitudes(p.o.value()), oq = magnitudes(q.o.value());
    for (auto [v, s] : {std::pair<Dense*, Dense*>{&v2, &s2}, {&v1, &s1}})
        for (size_t i = 0; i < v->v.size(); i++) s->v[i] = thin_u * std::fabs(v->v[i]) + (K + 4 * k + 10) * pu * s->v[i];
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double start = before ? before[i * n + j] : 0, tol = (K + 5) * pu * size[i][j] + out_u * (std::fabs(main[i][j]) + std::fabs(want[i][j] + start)) + 2 * u * std::fabs(start);
            if (p.split) tol += dot(op[i], s2[j], k);
            if (q.split) tol += dot(oq[j], s1[i], k);
            r.verdict.close(got[i][j], start + want[i][j], tol, what, i * n + j);
        }
}

struct Ablation { const char *recipe, *changes; };
static const Ablation ablations[] = {
    {"metis", ""}, {"metis", "x.split=no"}, {"metis", "w.split=no"}, {"metis", "d.split=no"}, {"metis", "x.split=no,w.split=no"}, {"metis", "fprop.split=no"},
    {"metis", "x.format=bf16"}, {"metis", "all.factors=exact"}, {"metis", "all.residual=exact"}, {"metis", "all.factors=exact,all.residual=exact"},
    {"metis", "all.rounding=stochastic,all.factors=stochastic"}, {"metis", "all.format=mxfp4"}, {"metis-code", ""},
};
static const Shape shapes[] = {{40, 48, 64, 16}, {37, 53, 70, 16}, {9, 48, 32, 16}, {100, 96, 80, 32}, {64, 32, 48, 32}, {70, 64, 150, 48}};

// All six operands and the three products, in the order of a step; then the same by linear_forward and linear_backward: the same bits.
static void test_layer(Run& r, const Ablation& a, Shape shape, Kind kind, bool shared, bool nearest) {
    Recipe recipe = *find_recipe(a.recipe);
    set_cells(recipe, a.changes);
    r.at("%s %s, %s, %ld rows, %ld to %ld, rank %d%s%s", a.recipe, a.changes, kinds[(int)kind], (long)shape.rows, (long)shape.in, (long)shape.out, shape.k,
         shared ? ", scales kept" : "", nearest ? ", nearest" : "");
    Layer t(r, recipe, shape, kind, shared);
    t.s.nearest = nearest;
    double of[3] = {};
    std::vector<double> before = t.dw.values();
    for (int gemm = 0; gemm < 3; gemm++) {
        Prepared P = t.prepare(2 * gemm), Q = t.prepare(2 * gemm + 1);
        Parts p = read(t, 2 * gemm, P), q = read(t, 2 * gemm + 1, Q);
        if (r.compare) check_prepared(t, 2 * gemm, p, of), check_prepared(t, 2 * gemm + 1, q, of);
        int64_t m = t.outer(2 * gemm), n = t.outer(2 * gemm + 1), K = t.contracted(2 * gemm);
        if (gemm == 2) product(r.ctx, t.s, "test", t.dw.p, n, P, Q, m, n, K, 1, (int)t.k);
        else product(r.ctx, t.s, "test", gemm == 0 ? t.y.p : t.dx.p, n, P, Q, m, n, K, 0, (int)t.k);
        Dense got(m, n, gemm == 0 ? t.y.fetch().values() : gemm == 1 ? t.dx.fetch().values() : t.dw.fetch().values());
        if (r.compare) check_product(r, got, gemm == 2 ? before.data() : nullptr, gemm == 2 ? u : act_u, p, q, recipe.cell[2 * gemm], gemm == 0 ? "Y" : gemm == 1 ? "dX" : "dW");
    }
    Layer whole(r, recipe, shape, kind, shared);
    whole.s.nearest = nearest;
    whole.forward(), whole.backward();
    whole.y.fetch(), whole.dx.fetch(), whole.dw.fetch();
    auto same = [&](auto& x, auto& y, const char* what) { r.verdict.note(!memcmp(x.host.data(), y.host.data(), x.n * sizeof x.host[0]), "%s of the layer is not that of its parts", what); };
    same(t.y, whole.y, "Y"), same(t.dx, whole.dx, "dX"), same(t.dw, whole.dw, "dW");
}
static void test_layers(Run& r) {
    for (const Ablation& a : ablations)
        for (Shape shape : shapes) {
            if (on_gpu && sizeof(act_t) == 2 && is_float_stored(find_recipe(a.recipe)->cell[0].format)) continue;
            bool shared = (shape.rows + shape.k) % 3 != 0;
            test_layer(r, a, shape, Kind::ordinary, shared, false);
        }
    for (Kind kind : {Kind::low_rank, Kind::zero})
        for (int i : {0, 7, 8, 10, 12}) test_layer(r, ablations[i], shapes[1], kind, true, false);
    for (int i : {0, 10, 12}) test_layer(r, ablations[i], shapes[3], Kind::ordinary, false, true);
    test_layer(r, ablations[0], {600, 300, 280, 32}, Kind::ordinary, true, false);
}

// What the split is for: twelve directions over noise leave a residual a tenth as large, and with it goes the error. A basis of other
// directions would pass every test above. (Measured: 0.1 to 0.2 of the unsplit operand's; 0.5 is allowed.)
static void test_purpose(Run& r) {
    const Shape shape = {200, 96, 80, 16};
    double error[2][operand_count];
    for (bool split : {false, true}) {
        Recipe recipe = *find_recipe("metis");
        set_cells(recipe, split ? "" : "all.split=no");
        Layer t(r, recipe, shape, Kind::ordinary, true);
        for (int which = 0; which < operand_count; which++) {
            Dense m(t.height(which), t.width(which), t.matrix(which)), made = read(t, which, t.prepare(which)).folded();
            if (t.axis(which) == Axis::column) m = transposed(m);
            for (size_t i = 0; i < m.v.size(); i++) made.v[i] -= m.v[i];
            error[split][which] = std::sqrt(energy(made) / energy(m));
        }
    }
    for (int which = 0; which < operand_count; which++) {
        r.at("%s: relative error %.3g, unsplit %.3g", operand_names[which], error[1][which], error[0][which]);
        if (verbose && r.compare) printf("   %s\n", r.verdict.where.c_str());
        r.verdict.note(error[1][which] <= 0.5 * error[0][which], "too large");
    }
}

// Which calls refresh which bases, and to what: those of refresh_basis with all rows of W, sampled ones of X and D, drawn in the name of
// this step, layer and operand; cold at step 0, warm later. Layer 8 of the model is due at steps 0, 8, 16, layer 11 at 0, 5, 13. Bits.
static void test_refreshes(Run& r) {
    const Shape shape = {300, 48, 64, 16};
    Recipe recipe = *find_recipe("metis");
    Layer t(r, recipe, shape, Kind::ordinary, true);
    Rng rng{3};
    auto bases = [&]() {
        std::vector<acc_t> all;
        for (Buffer<acc_t>* b : {&t.basis_x, &t.basis_w, &t.basis_d}) b->fetch(), all.insert(all.end(), b->host.begin(), b->host.end());
        return all;
    };
    auto equal = [](const std::vector<acc_t>& a, const std::vector<acc_t>& b) { return !memcmp(a.data(), b.data(), a.size() * sizeof(acc_t)); };
    auto output = [&]() {
        t.forward();
        return t.y.fetch().values();
    };
    auto change = [&]() {                                                     // another batch, and weights that have moved
        Layer::fill(t.x, of_kind(rng, shape.rows, shape.in, Kind::ordinary)), Layer::fill(t.d, of_kind(rng, shape.rows, shape.out, Kind::ordinary));
        Layer::fill(t.w, of_kind(rng, shape.out, shape.in, Kind::ordinary));
    };
    struct { uint32_t id, step, micro; bool refresh, due; } calls[] = {
        {8, 0, 0, true, true}, {8, 0, 1, true, false}, {8, 1, 0, true, false}, {8, 7, 0, true, false}, {8, 8, 0, false, false}, {8, 8, 1, true, false},
        {8, 8, 0, true, true}, {8, 16, 0, true, true}, {11, 16, 0, true, false}, {11, 20, 0, true, false}, {11, 21, 0, true, true}, {11, 0, 0, true, true}};
    for (auto& c : calls) {
        r.at("layer %u, step %u, micro-batch %u, %s", c.id, c.step, c.micro, c.refresh ? "forward" : "recomputation");
        change();
        t.lin.id = c.id, r.ctx.step = c.step, r.ctx.micro = c.micro, t.s.refresh = c.refresh;
        std::vector<acc_t> before = bases(), want;
        for (int which : {fprop_x, fprop_w, dgrad_d}) {
            Buffer<acc_t> b(r, t.basis(which).n, [&](int64_t i) { return t.basis(which).host[i]; });
            int64_t rows = t.height(which), samples = which == fprop_w ? rows : sampled_rows(recipe.split, shape.k, rows);
            r.verdict.note(which == fprop_w || samples == 4 * (16 + 8), "%ld rows are sampled", (long)samples);
            Refresh f = {rows, t.width(which), samples, shape.k, recipe.split, c.step > 0, {r.ctx.seed, c.step, 0, c.id, (uint32_t)which, Purpose::rows}};
            if (!c.due) b.fetch();
            else if (which == fprop_x) refresh(r, b, t.x, f);
            else if (which == fprop_w) refresh(r, b, t.w, f);
            else refresh(r, b, t.d, f);
            want.insert(want.end(), b.host.begin(), b.host.end());
        }
        std::vector<double> y = output();
        t.backward();
        std::vector<acc_t> after = bases();
        r.verdict.note(equal(after, want), c.due ? "not refresh_basis' bases" : "the bases changed");
        r.verdict.note(!c.due || !equal(after, before), "the bases did not change: the test sees nothing");
        t.s.refresh = false;                                                  // recomputation: the same bits, and nothing moves
        r.verdict.note(output() == y && equal(bases(), after), "a recomputed forward differs");
    }
    r.at("refresh = 0: every call, every micro-batch");
    t.recipe.split.refresh = 0, t.s.refresh = true, r.ctx.step = 3;
    for (uint32_t micro = 0; micro < 3; micro++) {
        r.ctx.micro = micro;
        change();
        std::vector<acc_t> before = bases();
        t.forward(), t.backward();
        std::vector<acc_t> after = bases();
        for (size_t i = 0; i < before.size(); i += 16 * 16) r.verdict.note(memcmp(&before[i], &after[i], 16 * 16 * sizeof(acc_t)), "element %zu of the bases did not change", i);
    }
}

// A NaN or an infinity in X, W or D reaches every output that it enters, where the training loop's guard looks; no basis learns of it.
static void test_not_finite(Run& r) {
    const Shape shape = {40, 48, 64, 16};
    for (const Ablation& a : {ablations[0], ablations[1], ablations[7], ablations[8]})
        for (double bad : {(double)NAN, (double)INFINITY})
            for (Matrix where : {matrix_x, matrix_w, matrix_d}) {
                Recipe recipe = *find_recipe(a.recipe);
                set_cells(recipe, a.changes);
                r.at("%s %s, %g in %c", a.recipe, a.changes, bad, "XWD"[where]);
                Layer t(r, recipe, shape, Kind::ordinary, true);
                t.forward(), t.backward();                                    // bases of a good step
                Buffer<acc_t>* bases[] = {&t.basis_x, &t.basis_w, &t.basis_d};
                std::vector<acc_t> before[3];
                for (int i = 0; i < 3; i++) before[i] = bases[i]->fetch().host;
                const int64_t row = 7, col = 21;
                if (where == matrix_x) assign(&t.x.host[row * t.in + col], bad), t.x.send();
                if (where == matrix_w) assign(&t.w.host[row * t.in + col], bad), t.w.send();
                if (where == matrix_d) assign(&t.d.host[row * t.out + col], bad), t.d.send();
                r.ctx.step = 8;
                t.forward(), t.backward();
                t.y.fetch(), t.dx.fetch(), t.dw.fetch();
                auto all = [&](auto& out, int64_t rows, int64_t cols, int64_t i0, int64_t j0, const char* what) {
                    for (int64_t i = i0 < 0 ? 0 : i0; i < (i0 < 0 ? rows : i0 + 1); i++)
                        for (int64_t j = j0 < 0 ? 0 : j0; j < (j0 < 0 ? cols : j0 + 1); j++)
                            r.verdict.note(!is_finite(out[i * cols + j]), "%s(%ld, %ld) is %g", what, (long)i, (long)j, out[i * cols + j]);
                };
                if (where == matrix_x) all(t.y, t.rows, t.out, row, -1, "Y"), all(t.dw, t.out, t.in, -1, col, "dW");
                if (where == matrix_w) all(t.y, t.rows, t.out, -1, row, "Y"), all(t.dx, t.rows, t.in, -1, col, "dX");
                if (where == matrix_d) all(t.dx, t.rows, t.in, row, -1, "dX"), all(t.dw, t.out, t.in, col, -1, "dW");
                bool split = recipe.cell[where == matrix_x ? fprop_x : where == matrix_w ? fprop_w : dgrad_d].split;
                bases[where]->fetch();
                if (split) r.verdict.note(!memcmp(before[where].data(), bases[where]->host.data(), before[where].size() * sizeof(acc_t)), "its basis changed");
            }
}

int main(int argc, char** argv) {
    begin(argc, argv);
    test("basis: cold, all rows", test_cold);
    test("basis: warm, all rows", test_warm);
    test("basis: sampled rows", test_sample);
    test("basis: alignment of sampled rows", test_alignment);
    test("basis: sources", test_sources);
    test("split operands, products and layers", test_layers);
    test("split operands err less", test_purpose);
    test("when bases are refreshed", test_refreshes);
    test("NaN and infinity", test_not_finite);
    return done();
}
