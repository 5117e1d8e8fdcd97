// metis_test.h: what test_subspace.cu and test_metis.cu share: matrices in double, their singular value decomposition, one call of
// refresh_basis() with its scratch, and what it owes.
#pragma once
#include "../metis.cuh"
#include "slow_quantiser.h"

// ---------------------------------------------------------------------------------------------------------------------------
// Matrices in double

struct Dense {
    int64_t rows = 0, cols = 0;
    std::vector<double> v = {};
    Dense(int64_t r, int64_t c) : rows(r), cols(c), v(r * c) {}
    Dense(int64_t r, int64_t c, std::vector<double> values) : rows(r), cols(c), v(std::move(values)) {}
    double* operator[](int64_t i) { return v.data() + i * cols; }
    const double* operator[](int64_t i) const { return v.data() + i * cols; }
};
inline double dot(const double* a, const double* b, int64_t n) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}
inline double energy(const Dense& a) { return dot(a.v.data(), a.v.data(), (int64_t)a.v.size()); }
inline Dense transposed(const Dense& a) {
    Dense t(a.cols, a.rows);
    for (int64_t i = 0; i < a.rows; i++)
        for (int64_t j = 0; j < a.cols; j++) t[j][i] = a[i][j];
    return t;
}
inline Dense magnitudes(Dense a) {
    for (double& v : a.v) v = std::fabs(v);
    return a;
}
// A B^T: rows against rows.
inline Dense products(const Dense& a, const Dense& b) {
    Dense c(a.rows, b.rows);
    for (int64_t i = 0; i < a.rows; i++)
        for (int64_t j = 0; j < b.rows; j++) c[i][j] = dot(a[i], b[j], a.cols);
    return c;
}
// Rows made orthonormal, by Gram-Schmidt twice.
inline Dense orthonormal(Dense a) {
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

inline Dense gaussian(Rng& rng, int64_t rows, int64_t cols) {
    Dense a(rows, cols);
    for (double& v : a.v)
        for (int i = 0; i < 12; i++) v += 0.5 * rng(1);                       // twelve uniform numbers of variance 1/12
    return a;
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
template <class T> Dense refresh(Run& r, Buffer<acc_t>& basis, Buffer<T>& source, const Refresh& f) {
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
inline double orthonormality(int q) { return 2 * (q + 3) * (1 + std::sqrt(q)) * u; }

inline void check_orthonormal(Run& r, const Dense& basis, int q) {
    for (int64_t i = 0; i < basis.rows; i++)
        for (int64_t j = 0; j <= i; j++) r.verdict.close(dot(basis[i], basis[j], basis.cols), i == j, orthonormality(q), "basis row . row", i * basis.rows + j);
}

// ---------------------------------------------------------------------------------------------------------------------------
// The reference: one-sided Jacobi

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
inline Svd svd(const Dense& m) {
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

// U diag(sigma) V^T with random orthonormal U and V, rounded to T.
template <class T> Dense with_spectrum(Rng& rng, int64_t rows, int64_t cols, double (*sigma)(int)) {
    int64_t n = std::min(rows, cols);
    Dense left = orthonormal(gaussian(rng, n, rows)), right = orthonormal(gaussian(rng, n, cols));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < rows; j++) left[i][j] *= sigma((int)i);
    Dense m = products(transposed(left), transposed(right));
    for (double& v : m.v) v = sizeof(T) == 2 ? as_bf16(v) : (float)v;
    return m;
}

// ---------------------------------------------------------------------------------------------------------------------------
// What a refresh owes

// Energy of S (the sampled rows) outside the basis; its rows made orthonormal again in double, so that this is no more than the
// subspace's. Rayleigh and Ritz choose the k best directions of z, from z S^T, which errs by (cols + 2) u of the lengths' product: so
// quadratic forms, and the energy, may err by twice that, and by as much as z lacks in orthonormality, 2 (q + 3) u.
inline double energy_u(const Refresh& f) { return 2 * (f.cols + f.q() + 5) * u; }
inline double lost(const Dense& s, const Dense& basis) { return energy(s) - energy(products(s, orthonormal(basis))); }

// What every refresh owes, whatever S is: rows orthonormal; no more energy than the best subspace has; Ritz's order: S B has orthogonal
// columns, their lengths descending, none longer than the singular value at its place.
inline void check_basis(Run& r, const Dense& s, const Svd& best, const Dense& basis, const Refresh& f) {
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
// second term, |Sigma_2^(2P+1) W Sigma_1^(-2P)|^2, keeps at most (sigma_k+1 / sigma_k)^4P of what it was. Where q is S's rank or more, the
// range is all of S.
inline double expected_loss(const Svd& best, const Refresh& f) {
    double tail = best.squares(f.k);
    if (f.q() >= std::min(f.cols, f.samples) || tail == 0) return tail;
    return tail * (1 + std::pow(best.sigma[f.k] / best.sigma[f.k - 1], 4 * f.plan.cold) * f.k / (f.plan.oversample - 1));
}
