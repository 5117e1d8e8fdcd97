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
// (orth() makes rows orthonormal.) Why it works: Z S^T S multiplies the part of Z's rows along a right singular direction by sigma^2, so
// after two iterations directions i and j differ by (sigma_i / sigma_j)^4; and what the q rows span Rayleigh-Ritz then sorts exactly. The
// basis of 8 steps ago is a start that noise is not: one iteration for it, two for noise.
//
// It needs a few thin GEMMs and q x q algebra: Cholesky-QR twice with the Gram matrix in double (arXiv 1809.11085), and Jacobi's method
// for the eigenproblem. No LAPACK. Rows of Z that are zero or dependent (M has too low a rank, or is zero) are replaced by pseudo-
// random ones, so that a basis is always orthonormal. If anything is not finite the old basis stays.
#pragma once
#include "matmul.cuh"

struct sample_rows; struct sketch_fill; struct orthonormalise_norms; struct orthonormalise_gram; struct orthonormalise_cholesky;
struct orthonormalise_solve; struct ritz_gram; struct ritz_jacobi; struct ritz_rotate;

// How bases are found (`--set split.*`).
struct SplitPlan {
    double rank = 1.5;          // percent of the model's width
    double sample = 1;          // percent of the rows
    int refresh = 8;            // steps from one refresh to the next; 0: at every call
    int oversample = 8;         // directions beyond k that are carried through a refresh and then dropped
    int cold = 2, warm = 1;     // power iterations, of a start from noise and of one from the old basis
    int restart = 0;            // 1: every refresh starts cold
    int k = 0;                  // the rank itself, in place of a percentage
    int trained = 0;            // 1: W's factors are parameters, found once (metis.cuh, split_weight)
};
// The rank in use, a multiple of 16, the block that A is quantised in: of 192, 1.5% is 2.88 and k 16; of 4096, 61.44 and 64.
inline int split_rank(const SplitPlan& p, int width) {
    auto whole_blocks = [](int k) { return (k + 15) / 16 * 16; };
    return p.k ? whole_blocks(p.k) : std::max(16, whole_blocks((int)std::ceil(p.rank * width / 100)));
}
// s: never fewer than 4 (k + oversample), so that q directions can be told from a sample, nor more than there are.
inline int64_t sampled_rows(const SplitPlan& p, int k, int64_t rows) {
    return std::min(rows, std::max<int64_t>((int64_t)std::ceil(p.sample * rows / 100), 4 * (k + p.oversample)));
}

// Buffers of one refresh at a time.
struct SubspaceScratch {
    acc_t *sample, *z, *y, *g;          // S (s x c), Z (q x c), Y (q x s), G (q x s)
    double *gram, *vectors;             // (q x q), (q x q) and a rotation, two numbers, for every pair
    int* state;                         // (q + 1): rows to replace, and whether there are any; the order of eigenvalues, and whether all is finite
};

// Element i of the pseudo-random row `named`, in [-1, 1] (signs alone are dependent too often): a hash, cheaper than Philox, since these
// rows need be no more than unlike all others.
HD acc_t refill(int i, uint32_t named) {
    uint32_t h = ((uint32_t)i * 0x9E3779B1u) ^ named;
    h = (h ^ h >> 15) * 0x2C1B3C6Du;
    h = (h ^ h >> 12) * 0x297A2D39u;
    return acc_t((int32_t)h) * acc_t(4.6566129e-10);                                // 2^-31
}

// Rows of z (q x n) made orthonormal, spanning the same. `salt` names the pseudo-random rows that replace dependent ones.
//
// Cholesky QR: with Z Z^T = L L^T the rows of L^-1 Z are orthonormal, for L^-1 (L L^T) L^-T = 1. One Gram matrix and one triangular solve, all
// parallel along n, where Gram-Schmidt would go row by row. The Gram matrix squares the condition number, so what one pass leaves is
// orthonormal to a few digits only, and a second pass makes it so to float's precision: passes 0 and 1.
//
// Rows that depend on earlier ones: Cholesky finds a pivot near zero and marks the row, state[r]. An infinite pivot in its place (1e30)
// makes the row zero and keeps it out of all later ones. The next pass puts a pseudo-random row there. A row that came in with pass 1
// has been through one pass alone, so if anything was marked (state[q]) there is pass 2; otherwise its kernels return at once. That
// is decided on the device: nobody waits for an answer.
inline void orthonormalise(Ctx& ctx, acc_t* z, int q, int64_t n, const SubspaceScratch& s, uint32_t salt) {
    double* gram = s.gram;
    int* state = s.state;
    for (int pass = 0; pass < 3; pass++) {
        // Rows of unit length, so that a pivot can be called small.
        for_rows<orthonormalise_norms, 128>(ctx, {2. * q * n * sizeof(acc_t), 0}, q, KERNEL(Group<128> g, int64_t r) {
            if (pass == 2 && !state[q]) return;
            acc_t* row = z + r * n;
            double norm2 = g.sum_double((int)n, [=](int i) { return (double)row[i] * row[i]; });
            bool fill = norm2 == 0 || (pass && state[r]);
            acc_t scale = (acc_t)(fill ? sqrt(3. / n) : 1 / sqrt(norm2));
            uint32_t named = (uint32_t)r * 0x85EBCA77u + salt + (uint32_t)pass * 0xC2B2AE3Du;
            g.each((int)n, [=](int i) { row[i] = scale * (fill ? refill(i, named) : row[i]); });      // sqrt(3 / n): uniform numbers' length
        });
        Cost gram_cost = {(double)q * q * n * sizeof(acc_t), (double)q * q * n};
        for_rows<orthonormalise_gram, 128>(ctx, gram_cost, q * q, KERNEL(Group<128> g, int64_t p) {
            int i = (int)p / q, j = (int)p % q;
            if (j > i || (pass == 2 && !state[q])) return;                          // the lower triangle
            const acc_t *a = z + i * n, *b = z + j * n;
            double d = g.sum_double((int)n, [=](int t) { return (double)a[t] * b[t]; });
            if (g.lane() == 0) gram[p] = d;
        });
        // L in the place of Gram's lower triangle, column by column, the entries of a column by all lanes. d is what is left of a row of length
        // 1 beyond those before it, squared: 1e-11 is a rest of 3e-6, which float's rounding leaves of a dependent row.
        for_rows<orthonormalise_cholesky, 128>(ctx, {}, 1, KERNEL(Group<128> g, int64_t) {
            if (pass == 2 && !state[q]) return;
            bool any = pass == 1 && state[q];
            for (int j = 0; j < q; j++) {
                double d = gram[j * q + j];
                for (int i = 0; i < j; i++) d -= gram[j * q + i] * gram[j * q + i];
                bool dependent = !(d > 1e-11);
                double pivot = dependent ? 1e30 : sqrt(d);
                any = any || dependent;
                g.sync();                                                           // all have read the diagonal before it is written
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
        // z := L^-1 z, 64 columns a group: row j less what it has in common with those before it, then divided by the pivot.
        Cost solve_cost = {2. * q * n * sizeof(acc_t), (double)q * q * n};
        for_rows<orthonormalise_solve>(ctx, solve_cost, (n + 63) / 64, KERNEL(Group<32> g, int64_t r) {
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

// A rotation of two rows or columns: x := c x - s y, y := s x + c y.
struct Rotation { double c, s; };
// The one that makes element (a, b) of a symmetric matrix zero: the smaller of the two angles that do, at most 45 degrees. Matrices settle that
// way (Golub, Van Loan, Matrix Computations, "Jacobi methods").
HD Rotation rotation_for(double aa, double bb, double ab) {
    if (ab == 0) return {1, 0};
    double theta = (bb - aa) / (2 * ab);
    double t = (theta >= 0 ? 1 : -1) / (fabs(theta) + sqrt(theta * theta + 1));
    double c = 1 / sqrt(t * t + 1);
    return {c, t * c};
}
HD void turn(double* x, double* y, int n, int stride, Rotation r) {
    for (int j = 0; j < n; j++) {
        double p = x[j * stride], q = y[j * stride];
        x[j * stride] = r.c * p - r.s * q, y[j * stride] = r.s * p + r.c * q;
    }
}

// Eigenvalues of a symmetric h (q x q) onto its diagonal, eigenvectors into the rows of v (the identity before), by Jacobi's method: rotation
// after rotation makes one element off the diagonal zero; later ones bring it back, but smaller. `turns`: room for q / 2 rotations.
//
// A sweep meets every pair once, in the order of a round-robin tournament: player 0 keeps his seat, the others move on by one each round, and
// seats face each other. For q = 6:
//
//     round 0    0-5  1-4  2-3
//     round 1    0-1  2-5  3-4
//     round 2    0-2  1-3  4-5    ...    5 rounds, 15 pairs
//
// Pairs of a round have no row in common, so lanes turn them at once: h := J h by rows, v by rows with it, and after a barrier h := h J^T by
// columns. Sweeps end when the sum of squares off the diagonal is noise beside the trace's square; the last ones converge quadratically.
template <class G> HD void jacobi(G g, double* h, double* v, Rotation* turns, int q, double trace) {
    int players = q + (q & 1);                                                      // of an odd number one sits out
    for (int sweep = 0; sweep < 12; sweep++) {
        double off = g.sum_double(q * q, [=](int i) { return i / q == i % q ? 0. : h[i] * h[i]; });
        if (!(off > 1e-18 * trace * trace)) break;
        for (int round = 0; round < players - 1; round++) {
            auto seat = [=](int i) { return i == 0 ? 0 : (i - 1 + round) % (players - 1) + 1; };
            for (int phase = 0; phase < 2; phase++) {
                g.sync();
                for (int i = g.lane(); i < players / 2; i += g.lanes) {
                    int one = seat(i), two = seat(players - 1 - i);
                    int a = one < two ? one : two, b = one < two ? two : one;
                    if (b >= q) continue;
                    if (phase == 0) {
                        turns[i] = rotation_for(h[a * q + a], h[b * q + b], h[a * q + b]);
                        turn(h + a * q, h + b * q, q, 1, turns[i]);
                        turn(v + a * q, v + b * q, q, 1, turns[i]);
                    } else turn(h + a, h + b, q, q, turns[i]);
                }
            }
        }
        g.sync();
    }
}

// S (n x cols): n rows of source by chance, or all of them, as acc_t. What is whole and acc_t already is used where it lies.
inline Mat take_sample(Ctx& ctx, acc_t* to, const Mat& source, int64_t rows, int64_t cols, int64_t n, RandomKey key) {
    if (n >= rows && source.type == type_of<acc_t>()) return source;
    key.purpose = Purpose::rows;
    bool half = source.type == Type::bf16, all = n == rows;
    const void* from = source.data;
    for_rows<sample_rows>(ctx, {2. * n * cols * sizeof(acc_t), 0}, n, KERNEL(Group<32> g, int64_t r) {
        // A word times `rows`, upper half: uniform below `rows`. A row may come twice, which does no harm.
        int64_t row = all ? r : (int64_t)(((uint64_t)philox(key, (uint64_t)r).w[0] * (uint64_t)rows) >> 32);
        if (half) g.map((int)cols, [](acc_t& o, acc_t v) { o = v; }, out(to + r * cols), (const bf16*)from + row * cols);
        else g.map((int)cols, [](acc_t& o, acc_t v) { o = v; }, out(to + r * cols), (const acc_t*)from + row * cols);
    });
    return mat((const acc_t*)to, cols);
}

// basis (k x cols) := the k strongest directions of what the rows of z (q x cols) span, given y = Z S^T (q x n), strongest first. H = Y Y^T is
// S^T S seen within that span; its eigenvectors say how to turn Z's rows, its eigenvalues, sigma^2, in what order. Not finite: basis stays.
inline void rayleigh_ritz(Ctx& ctx, acc_t* basis, int k, int q, int64_t cols, int64_t n, const SubspaceScratch& s) {
    double *h = s.gram, *v = s.vectors;
    const acc_t *y = s.y, *z = s.z;
    int* state = s.state;
    for_rows<ritz_gram, 128>(ctx, {}, q * q, KERNEL(Group<128> g, int64_t p) {
        int i = (int)p / q, j = (int)p % q;
        if (j > i) return;                                                          // the lower triangle, written to both
        const acc_t *a = y + i * n, *b = y + j * n;
        double d = g.sum_double((int)n, [=](int t) { return (double)a[t] * b[t]; });
        if (g.lane() == 0) h[p] = h[j * q + i] = d, v[p] = v[j * q + i] = i == j;
    });
    for_rows<ritz_jacobi, 128>(ctx, {}, 1, KERNEL(Group<128> g, int64_t) {
        double trace = 0;                                                           // of squares: a NaN or infinity in Y is one here
        for (int i = 0; i < q; i++) trace += h[i * q + i];
        bool finite = is_finite(trace);
        if (finite && trace > 0) jacobi(g, h, v, (Rotation*)(v + (int64_t)q * q), q, trace);
        g.sync();
        // state[i] = the row of v with the i-th largest eigenvalue; state[q]: whether there is one. Equal ones: the first first.
        if (g.lane() != 0) return;
        for (int i = 0; i < q; i++) {
            int rank = 0;
            for (int j = 0; j < q; j++) rank += h[j * q + j] > h[i * q + i] || (h[j * q + j] == h[i * q + i] && j < i);
            if (finite) state[rank] = i;
        }
        state[q] = finite;
    });
    // basis_i = sum over j of v_(state[i]) j z_j, 64 columns a group.
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

// basis (k x cols) := the refreshed one. source: M (rows x cols); type act_t, or acc_t (weights). samples: s. warm: basis holds an earlier one.
// key: seed, step, micro-batch, layer and operand that this refresh's random numbers belong to; its purpose is set here.
inline void refresh_basis(Ctx& ctx, acc_t* basis, int k, const Mat& source, int64_t rows, int64_t cols, int64_t samples, const SplitPlan& plan,
                          bool warm, RandomKey key, const SubspaceScratch& s) {
    int q = (int)std::min<int64_t>(k + plan.oversample, cols);                      // no more directions than there are
    int64_t n = samples;
    Mat sample = take_sample(ctx, s.sample, source, rows, cols, n, key);
    // Z: the old basis, if it is there to start from, and below it G S, q - kept Gaussian mixtures of S's rows: likelier along the strong ones.
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
    // Power iterations. Without orth() between all rows would turn to the strongest direction and differ by what rounding leaves. With fewer
    // samples than rows of Y (n < q) these cannot be orthonormal, and go on as they are.
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
    rayleigh_ritz(ctx, basis, k, q, cols, n, s);
}
