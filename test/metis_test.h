// metis_test.h: what test_subspace.cu and test_metis.cu share: matrices in double, and one call of refresh_basis() with its scratch.
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
