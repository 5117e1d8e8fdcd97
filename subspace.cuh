// subspace.cuh: the dominant right singular subspace of a matrix, estimated from a few of its rows and kept warm.
//
// M (r x c) ~ A L B^T: B's columns span what most of M's rows have in common. The basis is stored as k rows of length c. A refresh
//
//     S = some rows of M (s x c)                                   sampled, or all
//     Z = [ old basis ; G S ]  or  G S                             warm or cold; G Gaussian, q = k + oversample rows in all
//     repeat: Y = orth(Z S^T),  Z = orth(Y S)                      power iterations (Halko, Martinsson, Tropp, arXiv 0909.4061)
//     H = (Z S^T)(Z S^T)^T = V diag(sigma^2) V^T                   Rayleigh-Ritz: sort the directions, drop the last q - k
//     basis = V_k^T Z
//
// needs a few thin GEMMs and q x q algebra: Cholesky-QR twice with the Gram matrix in double (arXiv 1809.11085), and Jacobi's method
// for the eigenproblem. No LAPACK. Rows of Z that are zero or dependent (M has too low a rank, or is zero) are replaced by pseudo-
// random ones, so that a basis is always orthonormal. If anything is not finite the old basis stays.
#pragma once
#include "matmul.cuh"

struct sample_rows; struct sketch_fill; struct orthonormalise_norms; struct orthonormalise_gram; struct orthonormalise_cholesky;
struct orthonormalise_solve; struct ritz_gram; struct ritz_jacobi; struct ritz_rotate;

// How bases are found. rank and sample are in percent: of the model's width, of the rows.
struct SplitPlan {
    double rank = 1.5, sample = 1;
    int refresh = 8, oversample = 8, cold = 2, warm = 1;      // steps between refreshes (0: at every call); extra directions; power iterations
    int restart = 0, k = 0;                                   // 1: refreshes start cold; the rank itself in place of a percentage
    int trained = 0;                                          // 1: W's factors are parameters, found once (metis.cuh, split_weight)
};
// k: the rank in use, a multiple of 16 (the block that A is quantised in).
inline int split_rank(const SplitPlan& p, int width) { return p.k ? (p.k + 15) / 16 * 16 : std::max(16, ((int)std::ceil(p.rank * width / 100) + 15) / 16 * 16); }
inline int64_t sampled_rows(const SplitPlan& p, int k, int64_t rows) {
    return std::min(rows, std::max<int64_t>((int64_t)std::ceil(p.sample * rows / 100), 4 * (k + p.oversample)));
}

// Buffers of one refresh at a time.
struct SubspaceScratch {
    acc_t *sample, *z, *y, *g;          // (s, c), (q, c), (q, s), (q, s)
    double *gram, *vectors;             // (q, q), (q, q) and a rotation for every pair
    int* state;                         // (q + 1): rows to replace, and whether there are any; the order of eigenvalues, and whether all is finite
};

// Rows of z (q x n) made orthonormal, spanning the same. `salt` names the pseudo-random rows that replace dependent ones.
inline void orthonormalise(Ctx& ctx, acc_t* z, int q, int64_t n, const SubspaceScratch& s, uint32_t salt) {
    double* gram = s.gram;
    int* state = s.state;
    for (int pass = 0; pass < 3; pass++) {          // twice; rows that the second pass put in need a third
        for_rows<orthonormalise_norms, 128>(ctx, {2. * q * n * sizeof(acc_t), 0}, q, KERNEL(Group<128> g, int64_t r) {
            if (pass == 2 && !state[q]) return;
            acc_t* row = z + r * n;
            double norm2 = g.sum_double((int)n, [=](int i) { return (double)row[i] * row[i]; });
            bool fill = norm2 == 0 || (pass && state[r]);
            acc_t scale = (acc_t)(fill ? sqrt(3. / n) : 1 / sqrt(norm2));
            uint32_t named = (uint32_t)r * 0x85EBCA77u + salt + (uint32_t)pass * 0xC2B2AE3Du;
            g.each((int)n, [=](int i) {
                uint32_t h = ((uint32_t)i * 0x9E3779B1u) ^ named;
                h = (h ^ h >> 15) * 0x2C1B3C6Du, h = (h ^ h >> 12) * 0x297A2D39u;
                row[i] = scale * (fill ? acc_t((int32_t)h) * acc_t(4.6566129e-10) : row[i]);        // in [-1, 1]: signs alone are dependent too often
            });
        });
        for_rows<orthonormalise_gram, 128>(ctx, {(double)q * q * n * sizeof(acc_t), (double)q * q * n}, q * q, KERNEL(Group<128> g, int64_t p) {
            int i = (int)p / q, j = (int)p % q;
            if (j > i || (pass == 2 && !state[q])) return;                          // the lower triangle
            const acc_t *a = z + i * n, *b = z + j * n;
            double d = g.sum_double((int)n, [=](int t) { return (double)a[t] * b[t]; });
            if (g.lane() == 0) gram[p] = d;
        });
        // L L^T = Gram, rows of unit length: a pivot this small means a row that depends on those before it. It is made zero (an
        // infinite pivot), and the next pass puts another in its place.
        for_rows<orthonormalise_cholesky, 128>(ctx, {}, 1, KERNEL(Group<128> g, int64_t) {
            if (pass == 2 && !state[q]) return;
            bool any = pass == 1 && state[q];
            for (int j = 0; j < q; j++) {
                double d = gram[j * q + j];
                for (int i = 0; i < j; i++) d -= gram[j * q + i] * gram[j * q + i];
                bool dependent = !(d > 1e-11);
                double pivot = dependent ? 1e30 : sqrt(d);
                any = any || dependent;
                g.sync();
                if (g.lane() == 0) gram[j * q + j] = pivot, state[j] = dependent;
                g.each(q - j - 1, [=](int i) {
                    double* row = gram + (j + 1 + i) * q;
                    double v = row[j];
                    for (int t = 0; t < j; t++) v -= row[t] * gram[j * q + t];
                    row[j] = v / pivot;
                });
                g.sync();
            }
            if (g.lane() == 0 && pass < 2) state[q] = any;
        });
        for_rows<orthonormalise_solve>(ctx, {2. * q * n * sizeof(acc_t), (double)q * q * n}, (n + 63) / 64, KERNEL(Group<32> g, int64_t r) {
            if (pass == 2 && !state[q]) return;
            int width = piece(n, r, 64);
            acc_t* column = z + r * 64;
            for (int j = 0; j < q; j++) {
                for (int t = 0; t < j; t++) {
                    acc_t l = (acc_t)gram[j * q + t];
                    g.each(width, [=](int c) { column[j * n + c] -= l * column[t * n + c]; });
                }
                acc_t scale = (acc_t)(1 / gram[j * q + j]);
                g.each(width, [=](int c) { column[j * n + c] *= scale; });
            }
        });
    }
}

// basis (k x cols) := the refreshed one. source: (rows x cols); type act_t, or acc_t (weights). warm: basis holds an earlier one.
inline void refresh_basis(Ctx& ctx, acc_t* basis, int k, const Mat& source, int64_t rows, int64_t cols, int64_t samples, const SplitPlan& plan,
                          bool warm, RandomKey key, const SubspaceScratch& s) {
    int q = (int)std::min<int64_t>(k + plan.oversample, cols);
    int64_t n = samples;
    Mat sample = source;
    key.purpose = Purpose::rows;
    if (n < rows || source.type != type_of<acc_t>()) {
        acc_t* to = s.sample;
        bool half = source.type == Type::bf16, all = n == rows;
        const void* from = source.data;
        for_rows<sample_rows>(ctx, {2. * n * cols * sizeof(acc_t), 0}, n, KERNEL(Group<32> g, int64_t r) {
            int64_t row = all ? r : (int64_t)(((uint64_t)philox(key, (uint64_t)r).w[0] * (uint64_t)rows) >> 32);
            if (half) g.map((int)cols, [](acc_t& o, acc_t v) { o = v; }, out(to + r * cols), (const bf16*)from + row * cols);
            else g.map((int)cols, [](acc_t& o, acc_t v) { o = v; }, out(to + r * cols), (const acc_t*)from + row * cols);
        });
        sample = mat((const acc_t*)to, cols);
    }
    int kept = warm ? k : 0;
    acc_t *z = s.z, *g0 = s.g;
    key.purpose = Purpose::sketch;
    for_rows<sketch_fill>(ctx, {}, q - kept, KERNEL(Group<32> g, int64_t r) {
        for (int64_t i = g.lane(); i < n; i += g.lanes) g0[r * n + i] = normal(key, (uint64_t)(r * n + i));
    });
    if (kept) for_rows<sketch_fill>(ctx, {}, kept, KERNEL(Group<32> g, int64_t r) {
        g.map((int)cols, [](acc_t& o, acc_t v) { o = v; }, out(z + r * cols), (const acc_t*)basis + r * cols);
    });
    if (q > kept) matmul(ctx, "subspace sketch", z + kept * cols, cols, mat((const acc_t*)g0, n), sample, q - kept, cols, n, 0);
    int powers = warm ? plan.warm : plan.cold;
    orthonormalise(ctx, z, q, cols, s, key.step);
    Mat zm = mat((const acc_t*)z, cols), ym = mat((const acc_t*)s.y, n);
    for (int i = 0; i < powers; i++) {
        matmul(ctx, "subspace power", s.y, n, zm, sample.transposed(), q, n, cols, 0);
        if (n >= q) orthonormalise(ctx, s.y, q, n, s, key.step);
        matmul(ctx, "subspace power", z, cols, ym, sample, q, cols, n, 0);
        orthonormalise(ctx, z, q, cols, s, key.step + 1 + i);
    }
    matmul(ctx, "subspace ritz", s.y, n, zm, sample.transposed(), q, n, cols, 0);

    double *h = s.gram, *v = s.vectors;
    const acc_t* y = s.y;
    int* state = s.state;
    for_rows<ritz_gram, 128>(ctx, {}, q * q, KERNEL(Group<128> g, int64_t p) {
        int i = (int)p / q, j = (int)p % q;
        if (j > i) return;
        const acc_t *a = y + i * n, *b = y + j * n;
        double d = g.sum_double((int)n, [=](int t) { return (double)a[t] * b[t]; });
        if (g.lane() == 0) h[p] = h[j * q + i] = d, v[p] = v[j * q + i] = i == j;
    });
    // Jacobi: rotations in the order of a round-robin tournament, q / 2 disjoint pairs at a time, until the off-diagonal is noise.
    for_rows<ritz_jacobi, 128>(ctx, {}, 1, KERNEL(Group<128> g, int64_t) {
        int players = q + (q & 1);
        double trace = 0;
        for (int i = 0; i < q; i++) trace += h[i * q + i];
        bool finite = is_finite(trace);
        for (int sweep = 0; sweep < 12 && finite && trace > 0; sweep++) {
            double off = g.sum_double(q * q, [=](int i) { return i / q == i % q ? 0. : h[i] * h[i]; });
            if (!(off > 1e-18 * trace * trace)) break;
            for (int round = 0; round < players - 1; round++) {
                auto seat = [=](int i) { return i == 0 ? 0 : (i - 1 + round) % (players - 1) + 1; };
                // Rows, then columns, of each pair: nobody else touches them in the same phase.
                for (int phase = 0; phase < 2; phase++) {
                    g.sync();
                    for (int i = g.lane(); i < players / 2; i += g.lanes) {
                        int a = seat(i), b = seat(players - 1 - i);
                        if (a > b) { int t = a; a = b; b = t; }
                        if (b >= q) continue;
                        double* cs = v + (int64_t)q * q + 2 * i;
                        if (phase == 0) {
                            double apq = h[a * q + b], c = 1, sn = 0;
                            if (apq != 0) {
                                double theta = (h[b * q + b] - h[a * q + a]) / (2 * apq);
                                double t = (theta >= 0 ? 1 : -1) / (fabs(theta) + sqrt(theta * theta + 1));
                                c = 1 / sqrt(t * t + 1), sn = t * c;
                            }
                            cs[0] = c, cs[1] = sn;
                            for (int j = 0; j < q; j++) {
                                double p = h[a * q + j], r = h[b * q + j];
                                h[a * q + j] = c * p - sn * r, h[b * q + j] = sn * p + c * r;
                                p = v[a * q + j], r = v[b * q + j];
                                v[a * q + j] = c * p - sn * r, v[b * q + j] = sn * p + c * r;
                            }
                        } else {
                            double c = cs[0], sn = cs[1];
                            for (int j = 0; j < q; j++) {
                                double p = h[j * q + a], r = h[j * q + b];
                                h[j * q + a] = c * p - sn * r, h[j * q + b] = sn * p + c * r;
                            }
                        }
                    }
                }
            }
            g.sync();
        }
        g.sync();
        // state[i] = the row of v with the i-th largest eigenvalue; state[q]: whether there is one.
        if (g.lane() != 0) return;
        for (int i = 0; i < q; i++) {
            int rank = 0;
            for (int j = 0; j < q; j++) rank += h[j * q + j] > h[i * q + i] || (h[j * q + j] == h[i * q + i] && j < i);
            if (finite) state[rank] = i;
        }
        state[q] = finite;
    });
    for_rows<ritz_rotate>(ctx, {2. * q * cols * sizeof(acc_t), 2. * k * q * cols}, (cols + 63) / 64, KERNEL(Group<32> g, int64_t r) {
        if (!state[q]) return;
        int width = piece(cols, r, 64);
        for (int i = 0; i < k; i++) {
            acc_t* to = basis + i * cols + r * 64;
            const double* weight = v + (int64_t)state[i] * q;
            for (int j = 0; j < q; j++) {
                acc_t w = (acc_t)weight[j];
                const acc_t* from = z + j * cols + r * 64;
                g.each(width, [=](int c) { to[c] = (j == 0 ? 0 : to[c]) + w * from[c]; });
            }
        }
    });
}
