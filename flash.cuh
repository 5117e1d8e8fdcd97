// flash.cuh: causal grouped-query attention on tensor cores, for bf16 activations and heads of 64 or 128 (sm_80 and later).
//
// FlashAttention (arXiv 2205.14135, 2307.08691): tiles of scores live in registers, never in memory; a row's softmax is corrected as
// its maximum grows; backward computes P again from the log-sum-exp. Three kernels of 4 warps, each owner of its results, so that no
// sum depends on timing:
//
//     flash_forward    128 queries, 32 a warp: two fragments of rows share every fragment of K and V   O, lse
//     flash_queries     64 queries, 16 a warp, over the keys before them                              dQ
//     flash_keys        64 keys,    16 a warp, over the queries after them, of all heads of the group  dK, dV
//
// The softmax in one pass. With the scores of the tiles so far, a row keeps m = their maximum, l = sum of e^(s - m) and o = sum of
// e^(s - m) v. A tile with a larger maximum m' makes all of it fade by e^(m - m') before it adds its own; at the end O = o / l. For scores
// 1, 3 and then 5: m = 3, l = e^-2 + 1; then m = 5, l = (e^-2 + 1) e^-2 + 1, which is e^-4 + e^-2 + 1, as if the maximum had been known.
// Backward has no need of that: P = e^(s - lse) with lse = m + ln l, one number a row.
//
// The product of one step is the operand of the next without leaving registers (ptx.cuh): P of the forward, dS, P^T and dS^T of the
// backward. Both backward kernels make P and dP anew, each in the orientation that it needs:
//
//     flash_queries   S = Q K^T      dP = dO V^T      dQ += dS K                          3 products a tile
//     flash_keys      S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q        4
//
// 7 where one kernel would do with 5; but then all key blocks would add to the same dQ, in an order that atomics leave to chance, or
// semaphores enforce by waiting.
//
// O leaves twice: rounded to bf16, and what rounding lost, in bf16 again: 16 bits of mantissa together. delta = rowsum(dO * O) from the
// rounded O alone is biased where a row's largest score repeats, which is how low-precision attention diverged in arXiv 2510.04212.
//
// Tiles in shared memory are rows of D bf16 in chunks of 16 bytes, chunk c of row r in place c ^ (r % 8). D = 64 is 128 bytes a row, all 32
// banks once, so the same chunk of 8 rows, which is what ldmatrix reads at a time, would lie in the same 4 banks; now in 8 times 4:
//
//     place    0   1   2   3   4   5   6   7
//     row 0   c0  c1  c2  c3  c4  c5  c6  c7
//     row 1   c1  c0  c3  c2  c5  c4  c7  c6
//     row 2   c2  c3  c0  c1  c6  c7  c4  c5    ...
#pragma once
#include "device.cuh"   // Ctx, start, exp_, log_
#include "ptx.cuh"      // mma_bf16, ldmatrix_x4, copy_async, exp2_fast
#include "rope.cuh"     // Heads, Angles

#ifdef __CUDACC__
constexpr int flash_lanes = 128;
constexpr float log2_e = 1.44269504f;                      // e^x = 2^(x log2 e): the hardware has powers of 2

// Element (row, 8 chunk) of a tile whose rows are D wide.
template <int D> __device__ bf16* flash_at(bf16* tile, int row, int chunk) { return tile + row * D + (chunk ^ (row & 7)) * 8; }

// Starts copying `rows` rows, `stride` apart, into a tile; rows from `valid` on are zeros.
template <int D> __device__ void flash_load(bf16* tile, const bf16* from, int64_t stride, int rows, int valid) {
    for (int i = threadIdx.x; i < rows * (D / 8); i += flash_lanes) {
        int r = i / (D / 8), c = i % (D / 8);
        copy_async(flash_at<D>(tile, r, c), from + (r < valid ? r : 0) * stride + c * 8, r < valid);
    }
}

// From tiles to fragments: lanes 8 j ... 8 j + 7 name the rows of ldmatrix' matrix j, and registers 0 to 3 are then matrices 0 to 3. For A
// they are the upper left, lower left, upper right and lower right 8 x 8 of 16 x 16; for B (16 x 8) upper and lower half of two neighbours.
//
// The A fragment of rows first ... first + 15 and columns 16 k ... 16 k + 15.
template <int D> __device__ void flash_rows(uint32_t (&a)[4], bf16* tile, int first, int k) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4<false>(a, flash_at<D>(tile, first + lane % 16, 2 * k + lane / 16));
}
// Two B fragments (b[0], b[1] and b[2], b[3]) of the tile's transpose: their columns are the tile's rows first ... +7 and +8 ... +15, their
// rows its columns 16 k ... 16 k + 15. A lane's pair is two neighbours of a column of B, hence of a row of the tile: as it lies.
template <int D> __device__ void flash_columns(uint32_t (&b)[4], bf16* tile, int first, int k) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4<false>(b, flash_at<D>(tile, first + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}
// Two B fragments of the tile itself: rows first ... first + 15, columns 16 k ... +7 and +8 ... +15. Their pairs lie below each other, so
// matrices are transposed on the way.
template <int D> __device__ void flash_inner(uint32_t (&b)[4], bf16* tile, int first, int k) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4<true>(b, flash_at<D>(tile, first + lane % 16, 2 * k + lane / 16));
}

// c (16 x 64) = A (16 x D, its D / 16 fragments) times the transpose of `tile` (64 x D): scores, or dP. c[n] is columns 8 n ... 8 n + 7.
template <int D> __device__ void flash_product(float (&c)[8][4], const uint32_t (&a)[D / 16][4], bf16* tile) {
    for (auto& n : c)
        for (float& v : n) v = 0;
    #pragma unroll
    for (int k = 0; k < D / 16; k++)
        #pragma unroll
        for (int n = 0; n < 4; n++) {
            uint32_t b[4];
            flash_columns<D>(b, tile, 16 * n, k);
            mma_bf16(c[2 * n], a[k], b[0], b[1]);
            mma_bf16(c[2 * n + 1], a[k], b[2], b[3]);
        }
}
// Columns 16 k ... 16 k + 15 of P (16 x 64), which a product left as two C fragments side by side, as an A fragment: a C fragment's halves
// are pairs of columns 2t, 2t + 1 in rows g and g + 8, and just so A has them. No lane needs what another holds.
__device__ inline void flash_pairs(uint32_t (&a)[4], const float (&p)[8][4], int k) {
    a[0] = pair_of(p[2 * k][0], p[2 * k][1]);
    a[1] = pair_of(p[2 * k][2], p[2 * k][3]);
    a[2] = pair_of(p[2 * k + 1][0], p[2 * k + 1][1]);
    a[3] = pair_of(p[2 * k + 1][2], p[2 * k + 1][3]);
}
// sum (16 x D) += P (16 x 64, as a product left it) times `tile` (64 x D).
template <int D> __device__ void flash_accumulate(float (&sum)[D / 8][4], const float (&p)[8][4], bf16* tile) {
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t a[4];
        flash_pairs(a, p, k);
        #pragma unroll
        for (int d = 0; d < D / 16; d++) {
            uint32_t b[4];
            flash_inner<D>(b, tile, 16 * k, d);
            mma_bf16(sum[2 * d], a, b[0], b[1]);
            mma_bf16(sum[2 * d + 1], a, b[2], b[3]);
        }
    }
}

// Writes value(n, i) of a warp's 16 x D result (n: 8 columns, i: as in a C fragment) to rows `stride` apart, the first `valid` of them. By
// way of 16 rows of shared memory that are the warp's own, so that lanes write 16 bytes side by side.
template <int D, class F> __device__ void flash_store(bf16* to, int64_t stride, int valid, bf16* own, F value) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    __syncwarp();
    #pragma unroll
    for (int n = 0; n < D / 8; n++)
        for (int half = 0; half < 2; half++)
            *(uint32_t*)(flash_at<D>(own, g + 8 * half, n) + 2 * t) = pair_of(value(n, 2 * half), value(n, 2 * half + 1));
    __syncwarp();
    for (int i = lane; i < 16 * (D / 8); i += 32) {
        int r = i / (D / 8), c = i % (D / 8);
        if (r < valid) *(uint4*)(to + r * stride + c * 8) = *(const uint4*)flash_at<D>(own, r, c);
    }
}

// Turns rows first ... first + 15 of a warp's 16 x D gradient back (rope.cuh): (a, b) -> (a cos + b sin, b cos - a sin). b is half a head
// after a, D / 16 fragments further in the same lane, so nothing is exchanged, and gradients are rounded once, after the turn.
template <int D> __device__ void flash_turn_back(float (&x)[D / 8][4], Angles table, int first, int T) {
    if (!table.cosine) return;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    #pragma unroll
    for (int n = 0; n < D / 16; n++)
        #pragma unroll
        for (int e = 0; e < 4; e++) {
            int64_t at = (int64_t)min(first + 8 * (e / 2) + g, T - 1) * (D / 2) + 8 * n + 2 * t + e % 2;
            float &a = x[n][e], &b = x[n + D / 16][e], cs = table.cosine[at], sn = table.sine[at], u = a * cs + b * sn;
            b = b * cs - a * sn;
            a = u;
        }
}

// One tile of the softmax for 16 queries of a warp, from `query` on: p (16 x 64), scores against keys from `key` on, becomes e^(scale (s - m)),
// and m, l and o (16 x D) go from the tiles before to this one included. c = scale log2 e, m is of scores before scaling.
//
// Lane 4 g + t holds of p[n][e] the score of query + 8 (e / 2) + g against key + 8 n + 2 t + e % 2: two rows, `half` 0 and 1, of which it has
// 16 columns and its three neighbours, the other t, the rest. The maximum must be that of the whole row: two shuffles. l stays this lane's
// share until the end, as all shares fade alike.
template <int D>
__device__ void flash_softmax(float (&p)[8][4], float (&o)[D / 8][4], float (&m)[2], float (&l)[2], int query, int key, float c) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        int own = query + 8 * half + g;
        float top = m[half], sum = 0;
        #pragma unroll
        for (int n = 0; n < 8; n++)
            #pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
                // Causal: what comes later is not seen. That hides keys beyond T, too, from all queries that are stored.
                if (key + 8 * n + 2 * t + e % 2 > own) p[n][e] = -INFINITY;
                top = fmaxf(top, p[n][e]);
            }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        // A larger maximum fades what there is by 2^((m - top) c). In the first tile m is -infinity, fade 0; top never is, as all see key 0.
        float fade = exp2_fast((m[half] - top) * c), shift = top * c;
        #pragma unroll
        for (int n = 0; n < 8; n++)
            #pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) sum += p[n][e] = exp2_fast(fmaf(p[n][e], c, -shift));
        m[half] = top, l[half] = l[half] * fade + sum;
        #pragma unroll
        for (int n = 0; n < D / 8; n++) o[n][2 * half] *= fade, o[n][2 * half + 1] *= fade;
    }
}

// Block: 128 queries of one (sequence, head). out and low: O as bf16 and what that lost (low may be null), (B T x H D); lse (B T x H).
//
// Shared memory holds the queries and one tile of 64 keys and one of values, and each is copied while the other is worked on:
//
//     copied          K0 | V0            | K1                 | V1            | K2
//     worked on          | S = Q K0^T    | softmax, O += P V0 | S = Q K1^T    | softmax, O += P V1    ...
template <int D>
__global__ void __launch_bounds__(flash_lanes, 2) flash_forward(bf16* out, bf16* low, float* lse, const bf16* qkv, Heads s, float scale) {
    bf16 *Q = (bf16*)shared_memory(), *K = Q + 128 * D, *V = K + 64 * D;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // Blocks start in the order of their numbers, and the last queries see the most keys: long ones first, short ones fill what is left.
    int blocks = (s.T + 127) / 128, heads = s.B * s.H;
    int block = blocks - 1 - (int)blockIdx.x / heads, b = blockIdx.x % heads / s.H, h = blockIdx.x % s.H, kv = h / (s.H / s.KV);
    int q0 = block * 128, first = q0 + 32 * warp, tiles = (min(q0 + 128, s.T) + 63) / 64;   // first: of this warp's queries
    int64_t row = s.row();
    const bf16* base = qkv + (int64_t)b * s.T * row;
    const bf16 *keys = base + (s.H + kv) * D, *values = keys + s.KV * D;
    flash_load<D>(Q, base + q0 * row + h * D, row, 128, s.T - q0);
    flash_load<D>(K, keys, row, 64, s.T);
    copy_commit();

    // Queries first ... + 15 and first + 16 ... + 31, [i]; of each fragment's rows g and g + 8, [half].
    float o[2][D / 8][4] = {}, m[2][2], l[2][2] = {};
    for (auto& r : m) r[0] = r[1] = -INFINITY;
    const float c = scale * log2_e;
    for (int j = 0; j < tiles; j++) {
        copy_wait<0>();
        __syncthreads();                                                        // K is here, and nobody reads V any more
        flash_load<D>(V, values + 64 * j * row, row, 64, s.T - 64 * j);
        copy_commit();
        bool visible = 64 * j < first + 32;                                     // a tile beyond the diagonal is nothing to this warp
        float p[2][8][4];
        if (visible) {
            for (auto& half : p)
                for (auto& n : half)
                    for (float& v : n) v = 0;
            #pragma unroll
            for (int k = 0; k < D / 16; k++) {
                // Q comes from shared memory at every tile: in registers it would take D / 2 of them beside o's D.
                uint32_t a[2][4];
                flash_rows<D>(a[0], Q, 32 * warp, k);
                flash_rows<D>(a[1], Q, 32 * warp + 16, k);
                #pragma unroll
                for (int n = 0; n < 4; n++) {
                    uint32_t bk[4];
                    flash_columns<D>(bk, K, 16 * n, k);
                    #pragma unroll
                    for (int i = 0; i < 2; i++) {
                        mma_bf16(p[i][2 * n], a[i], bk[0], bk[1]);
                        mma_bf16(p[i][2 * n + 1], a[i], bk[2], bk[3]);
                    }
                }
            }
        }
        copy_wait<0>();
        __syncthreads();                                                        // V is here, and nobody reads K any more
        if (j + 1 < tiles) flash_load<D>(K, keys + 64 * (j + 1) * row, row, 64, s.T - 64 * (j + 1));
        copy_commit();
        if (!visible) continue;
        #pragma unroll
        for (int i = 0; i < 2; i++) flash_softmax<D>(p[i], o[i], m[i], l[i], first + 16 * i, 64 * j, c);
        // o += P V, P rounded to bf16; 16 keys at a time, their fragment of V read once for both halves of the queries.
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t a[2][4];
            #pragma unroll
            for (int i = 0; i < 2; i++) flash_pairs(a[i], p[i], k);
            #pragma unroll
            for (int d = 0; d < D / 16; d++) {
                uint32_t bv[4];
                flash_inner<D>(bv, V, 16 * k, d);
                #pragma unroll
                for (int i = 0; i < 2; i++) {
                    mma_bf16(o[i][2 * d], a[i], bv[0], bv[1]);
                    mma_bf16(o[i][2 * d + 1], a[i], bv[2], bv[3]);
                }
            }
        }
    }
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        float inverse[2];
        int rows = first + 16 * i;                                              // this fragment's first query
        for (int half = 0; half < 2; half++) {
            float sum = l[i][half];                                             // the four lanes of a row put their shares together
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            inverse[half] = 1 / sum;
            int query = rows + 8 * half + g;
            // m is of scores before scaling, sum of e^(scale (s - m)): the log-sum-exp is scale m + ln sum.
            if (t == 0 && query < s.T) lse[((int64_t)b * s.T + query) * s.H + h] = fmaf(m[i][half], scale, log_(sum));
        }
        int64_t at = (((int64_t)b * s.T + rows) * s.H + h) * D;
        bf16* own = Q + (32 * warp + 16 * i) * D;                               // this warp alone read these rows
        flash_store<D>(out + at, (int64_t)s.H * D, s.T - rows, own, [&](int n, int e) { return o[i][n][e] * inverse[e / 2]; });
        if (low) flash_store<D>(low + at, (int64_t)s.H * D, s.T - rows, own, [&](int n, int e) {
            float v = o[i][n][e] * inverse[e / 2];
            return v - as_act(v);
        });
    }
}

// Block: 64 queries of one (sequence, head): dQ = scale sum over keys of P (dP - delta) K, into their place in dqkv; lse, delta (B T x H).
// S and dP have a product each, 16 x 64 a warp, and dS is made from both where they lie.
//
// Tiles of keys and values come in two stages: while one is worked on, the next is copied into the other. One barrier a tile does for
// both: whoever is past it has finished the tile before, so that its stage may be written.
template <int D>
__global__ void __launch_bounds__(flash_lanes, 2) flash_queries(bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse,
                                                                const float* delta, Heads s, float scale, Angles turned) {
    bf16* stages = (bf16*)shared_memory();                                      // two, of 64 keys and 64 values
    auto K = [=](int j) { return stages + j % 2 * 128 * D; };
    auto V = [=](int j) { return K(j) + 64 * D; };
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int blocks = (s.T + 63) / 64, heads = s.B * s.H;
    int block = blocks - 1 - (int)blockIdx.x / heads, b = blockIdx.x % heads / s.H, h = blockIdx.x % s.H, kv = h / (s.H / s.KV);
    int q0 = 64 * block, first = q0 + 16 * warp;
    int64_t row = s.row(), start = (int64_t)b * s.T;
    const bf16* base = qkv + start * row;
    const bf16 *keys = base + (s.H + kv) * D, *values = keys + s.KV * D;
    // The queries and dO pass through the second stage on their way to registers, where they stay: the sum dQ takes half of forward's o.
    flash_load<D>(K(1), base + q0 * row + h * D, row, 64, s.T - q0);
    flash_load<D>(V(1), dout + ((start + q0) * s.H + h) * D, (int64_t)s.H * D, 64, s.T - q0);
    flash_load<D>(K(0), keys, row, 64, s.T);
    flash_load<D>(V(0), values, row, 64, s.T);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    uint32_t q[D / 16][4], go[D / 16][4];
    #pragma unroll
    for (int k = 0; k < D / 16; k++) {
        flash_rows<D>(q[k], K(1), 16 * warp, k);
        flash_rows<D>(go[k], V(1), 16 * warp, k);
    }
    float L[2], dl[2];                                                          // of rows g and g + 8: lse / ln 2, delta
    for (int half = 0; half < 2; half++) {
        int64_t at = (start + min(first + 8 * half + g, s.T - 1)) * s.H + h;
        L[half] = lse[at] * log2_e, dl[half] = delta[at];
    }
    float dq[D / 8][4] = {};
    for (int j = 0; j <= block; j++) {                                          // tiles beyond the block's own are all later keys
        copy_wait<0>();
        __syncthreads();                                                        // tile j is here; nobody reads the other stage any more
        if (j < block) {
            flash_load<D>(K(j + 1), keys + 64 * (j + 1) * row, row, 64, s.T - 64 * (j + 1));
            flash_load<D>(V(j + 1), values + 64 * (j + 1) * row, row, 64, s.T - 64 * (j + 1));
        }
        copy_commit();
        float p[8][4], dp[8][4];
        flash_product<D>(p, q, K(j));
        flash_product<D>(dp, go, V(j));
        #pragma unroll
        for (int n = 0; n < 8; n++)
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                bool seen = 64 * j + 8 * n + 2 * t + e % 2 <= first + 8 * (e / 2) + g;
                float v = exp2_fast(fmaf(p[n][e], scale * log2_e, -L[e / 2]));          // P = e^(scale s - lse), no maximum, no sum
                p[n][e] = seen ? v * (dp[n][e] - dl[e / 2]) * scale : 0.f;
            }
        flash_accumulate<D>(dq, p, K(j));
    }
    flash_turn_back<D>(dq, turned, first, s.T);
    __syncthreads();                                                            // every warp has read its last tile
    flash_store<D>(dqkv + (start + first) * row + h * D, row, s.T - first, K(0) + 16 * warp * D, [&](int n, int e) { return dq[n][e]; });
}

// Block: 64 keys of one (sequence, key/value head), over all queries after them of every head of the group:
// dV = sum of P^T dO, dK = scale sum of (P (dP - delta))^T Q. Everything is transposed: rows are keys, columns queries, so that P^T and dS^T
// come out as the A fragments that these products need. The statistics of a query, for flash_queries two numbers a lane in registers, belong
// to columns here, which every lane sees 16 of: they lie in shared memory.
//
// Visits are pairs of a head and a tile of 64 queries: with a group of 2 heads and 3 tiles left, (h, 0) (h, 1) (h, 2) (h + 1, 0) ... One
// block adds over all of them in this order; a block a head would leave dK and dV to be added up afterwards.
template <int D>
__global__ void __launch_bounds__(flash_lanes, 2) flash_keys(bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse,
                                                             const float* delta, Heads s, float scale, Angles turned) {
    bf16 *K = (bf16*)shared_memory(), *V = K + 64 * D, *stages = V + 64 * D;    // two stages, of 64 queries and their dO
    auto Q = [=](int n) { return stages + n % 2 * 128 * D; };
    auto G = [=](int n) { return Q(n) + 64 * D; };
    float* stats = (float*)(stages + 256 * D);                                  // two stages of: lse of 64 queries, delta of 64
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int heads = s.B * s.KV, block = blockIdx.x / heads, b = blockIdx.x % heads / s.KV, kv = blockIdx.x % s.KV, group = s.H / s.KV;
    int k0 = 64 * block, first = k0 + 16 * warp, tiles = (s.T + 63) / 64 - block;       // query tiles of one head
    int64_t row = s.row(), start = (int64_t)b * s.T, key_at = (s.H + kv) * D, value_at = key_at + s.KV * D;
    const bf16* base = qkv + start * row;
    // Visit n: head and query tile.
    auto head = [&](int n) { return kv * group + n / tiles; };
    auto query = [&](int n) { return k0 + 64 * (n % tiles); };
    auto load = [&](int n) {
        int h = head(n), i0 = query(n);
        flash_load<D>(Q(n), base + i0 * row + h * D, row, 64, s.T - i0);
        flash_load<D>(G(n), dout + ((start + i0) * s.H + h) * D, (int64_t)s.H * D, 64, s.T - i0);
    };
    auto statistic = [&](int n) {                                               // this lane's of visit n: lse or delta of one query
        int i = query(n) + (int)threadIdx.x % 64;
        const float* from = threadIdx.x < 64 ? lse : delta;
        return i < s.T ? from[(start + i) * s.H + head(n)] * (threadIdx.x < 64 ? log2_e : 1.f) : 0.f;
    };
    flash_load<D>(K, base + k0 * row + key_at, row, 64, s.T - k0);
    flash_load<D>(V, base + k0 * row + value_at, row, 64, s.T - k0);
    load(0);
    copy_commit();
    stats[threadIdx.x] = statistic(0);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    int visits = group * tiles;
    for (int n = 0; n < visits; n++) {
        copy_wait<0>();
        __syncthreads();                                                        // visit n is here; nobody reads the other stage any more
        float next = 0;
        if (n + 1 < visits) {
            load(n + 1);
            next = statistic(n + 1);                                            // in a register while we work: it may take its time
        }
        copy_commit();
        const float* stat = stats + n % 2 * 128;
        int i0 = query(n);
        float p[8][4], dp[8][4];
        {
            uint32_t a[D / 16][4];                                              // K's fragments, then V's: dk and dv leave no room for both
            #pragma unroll
            for (int k = 0; k < D / 16; k++) flash_rows<D>(a[k], K, 16 * warp, k);
            flash_product<D>(p, a, Q(n));
            #pragma unroll
            for (int k = 0; k < D / 16; k++) flash_rows<D>(a[k], V, 16 * warp, k);
            flash_product<D>(dp, a, G(n));
        }
        #pragma unroll
        for (int c = 0; c < 8; c++)
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                int i = 8 * c + 2 * t + e % 2, key = first + 8 * (e / 2) + g;
                bool seen = i0 + i >= key && i0 + i < s.T;                      // queries beyond T must not count: here they are the inner axis
                p[c][e] = seen ? exp2_fast(fmaf(p[c][e], scale * log2_e, -stat[i])) : 0.f;
                dp[c][e] = seen ? p[c][e] * (dp[c][e] - stat[64 + i]) * scale : 0.f;
            }
        flash_accumulate<D>(dv, p, G(n));
        flash_accumulate<D>(dk, dp, Q(n));
        stats[(n + 1) % 2 * 128 + threadIdx.x] = next;                          // read after the next barrier; last read before this one
    }
    flash_turn_back<D>(dk, turned, first, s.T);
    bf16* to = dqkv + (start + first) * row;
    flash_store<D>(to + key_at, row, s.T - first, K + 16 * warp * D, [&](int n, int e) { return dk[n][e]; });
    flash_store<D>(to + value_at, row, s.T - first, V + 16 * warp * D, [&](int n, int e) { return dv[n][e]; });
}

// Whether these kernels serve this shape; if not, attention.cuh has plain ones.
inline bool flash_serves(const Heads& s) { return sizeof(act_t) == sizeof(bf16) && (s.D == 64 || s.D == 128); }

// (act_t is bf16 where flash_serves() agrees; the casts let a build with float activations, which never comes here, compile.)
// Shared memory: Q, K and V of 128, 64 and 64 rows; two stages of 64 + 64 rows; K, V, two stages and statistics. For D = 128 that is 64, 64
// and 97 KB: two blocks on a multiprocessor of sm_90 (228 KB), and their registers, up to 255 a lane, allow no more.
template <int D> void flash_forward_run(Ctx& ctx, act_t* out, act_t* low, float* lse, const act_t* qkv, Heads s, float scale) {
    int64_t blocks = (s.T + 127) / 128;
    size_t shared = 256 * D * sizeof(bf16);
    start(ctx, flash_forward<D>, blocks * s.B * s.H, flash_lanes, shared, (bf16*)out, (bf16*)low, lse, (const bf16*)qkv, s, scale);
}
template <int D> void flash_backward_run(Ctx& ctx, act_t* dqkv, const act_t* qkv, const act_t* dout, const float* lse, const float* delta,
                                         Heads s, float scale, Angles turned) {
    int64_t blocks = (s.T + 63) / 64;
    bf16* to = (bf16*)dqkv;
    const bf16 *from = (const bf16*)qkv, *grad = (const bf16*)dout;
    start(ctx, flash_queries<D>, blocks * s.B * s.H, flash_lanes, 256 * D * sizeof(bf16), to, from, grad, lse, delta, s, scale, turned);
    size_t shared = 384 * D * sizeof(bf16) + 256 * sizeof(float);
    start(ctx, flash_keys<D>, blocks * s.B * s.KV, flash_lanes, shared, to, from, grad, lse, delta, s, scale, turned);
}
#endif
