// attention.cuh: causal grouped-query attention, forward and backward, without a T x T buffer on either machine.
//
//     S = Q K^T / sqrt(D), causal      P = softmax(S)      O = P V
//     dV = P^T dO    dP = dO V^T    delta = rowsum(dO * O)    dS = P * (dP - delta)    dQ = dS K / sqrt(D)    dK = dS^T Q / sqrt(D)
//
// Layout: qkv is (B*T) x (H + 2 KV) D, a row holding the query heads, then the key heads, then the value heads (rope.cuh), queries and keys
// already rotated. Query head h reads key/value head h / (H / KV). Forward keeps the log-sum-exp of each row, (B*T) x H; backward
// computes P = e^(S - lse) again from it (FlashAttention's bookkeeping, arXiv 2205.14135): T numbers a head instead of T x T / 2.
// No atomics: every sum has one owner and one order.
//
// Why delta: the softmax of a row has dS_j = P_j (dP_j - sum over k of P_k dP_k), and that sum needs no row of P: with dP_k = dO . V_k it is
// dO . (sum of P_k V_k) = dO . O. In attention_rows and elsewhere below L is a row's log-sum-exp and dl its delta.
//
// CPU: 64 query rows at a time, scores through matmul tiles, softmax by rows. GPU: flash.cuh's tensor-core kernels for bf16 activations
// and heads of 64 or 128; for the rest (float activations, other sizes) plain ones, one warp a row, key tiles in shared memory.
#pragma once
#include "flash.cuh"    // the tensor-core kernels (GPU)
#include "matmul.cuh"   // MatmulPlans, Mat (CPU); device.cuh: Ctx, Group, for_rows
#include "rope.cuh"     // Heads, Angles, rotate

// FLOPs of the causal half, T (T + 1) / 2 pairs a head: 2 D per (query, key) pair for each of `products` matrix products.
inline double attention_flops(const Heads& s, int products) { return (double)products * s.B * s.H * s.D * s.T * (s.T + 1.0); }

#ifdef __CUDACC__
// ------------------------------------------------------------------------------------------------------------------- the GPU
// The plain kernels: for what flash.cuh does not serve, and the ones to read first (dev/ladder_attention.cu goes from these to those). Dot
// products in float by ordinary arithmetic; each key read from memory serves the 8 queries of a block.
constexpr int attention_warps = 8, attention_max_d = 128;

// A tile of 32 rows x D floats. The odd pitch of 129 floats lets 32 lanes read 32 rows of one column without a bank conflict: element
// (r, d) lies in bank (129 r + d) % 32 = (r + d) % 32.
struct AttentionTile {
    float v[32][attention_max_d + 1];
    // By the whole block: `rows` rows of D, `stride` apart in memory; those beyond are zeros.
    template <class T> __device__ void load_rows(const T* first, int64_t stride, int rows, int D) {
        for (int i = threadIdx.x; i < 32 * D; i += blockDim.x) {
            int r = i / D, d = i % D;
            v[r][d] = r < rows ? load(first + r * stride + d) : 0.f;
        }
    }
};
// The same in every lane: after five exchanges with lanes 16, 8, 4, 2 and 1 away each has met all 32.
__device__ inline float warp_max(float v) {
    for (int d = 16; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
    return v;
}
__device__ inline float warp_sum(float v) {
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}
__device__ inline float dot(const float* a, const float* b, int D) {
    float s = 0;
    for (int d = 0; d < D; d++) s = fmaf(a[d], b[d], s);
    return s;
}

// Block: 8 query rows of one (sequence, head), a warp each, over tiles of 32 keys that all 8 read. A lane changes its part twice a tile:
//
//     scores    lane j: q . k_j, a whole dot product, for key j of the tile
//     sums      lane d: elements d, d + 32, ... of the result, += p_j times row j of the tile, p_j shown by lane j
//
// MODE 0: forward (out = O, low = what its rounding lost, lse). MODE 1: dQ (out = dq; reads dout, lse, delta).
template <int MODE> __global__ void attention_rows(act_t* out, act_t* low, int64_t out_stride, float* lse, const act_t* qkv, const act_t* dout,
                                                   const float* delta, Heads s, float scale) {
    __shared__ AttentionTile K, V;
    __shared__ float q_row[attention_warps][attention_max_d], do_row[attention_warps][attention_max_d];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = (s.T + attention_warps - 1) / attention_warps;
    int h = blockIdx.x / blocks % s.H, b = blockIdx.x / blocks / s.H, kv = h / (s.H / s.KV);
    int first = blockIdx.x % blocks * attention_warps, i = first + warp;               // this warp's query
    int64_t row = (int64_t)b * s.T + min(i, s.T - 1), base = (int64_t)b * s.T * s.row();
    for (int d = lane; d < s.D; d += 32) {
        q_row[warp][d] = load(qkv + row * s.row() + h * s.D + d);
        if (MODE == 1) do_row[warp][d] = load(dout + row * s.H * s.D + h * s.D + d);
    }
    // m, l: maximum of the scores so far, and the sum of e^(score - m): the softmax in one pass, as flash.cuh explains it.
    float m = -INFINITY, l = 0, acc[attention_max_d / 32] = {}, L = 0, dl = 0;
    if (MODE == 1) L = lse[row * s.H + h], dl = delta[row * s.H + h];
    int last = min(first + attention_warps, s.T) - 1;                                   // the block's: all warps must meet all barriers
    for (int j0 = 0; j0 <= last; j0 += 32) {
        __syncthreads();
        const act_t* k_first = qkv + base + j0 * s.row() + (s.H + kv) * s.D;
        K.load_rows(k_first, s.row(), s.T - j0, s.D);
        V.load_rows(k_first + s.KV * s.D, s.row(), s.T - j0, s.D);
        __syncthreads();
        bool valid = j0 + lane <= i;                                                    // causal
        float score = valid ? scale * dot(q_row[warp], K.v[lane], s.D) : -INFINITY, p;
        if (MODE == 0) {
            // What was added up so far was relative to m: it fades by e^(m - m_new), 1 if the maximum stays.
            float m_new = fmaxf(m, warp_max(score)), fade = exp_(m - m_new);
            p = valid ? exp_(score - m_new) : 0.f;
            l = l * fade + warp_sum(p);
            m = m_new;
            for (float& a : acc) a *= fade;
        } else {
            p = valid ? exp_(score - L) : 0.f;
            p *= (dot(do_row[warp], V.v[lane], s.D) - dl) * scale;            // dS / sqrt(D)
        }
        for (int j = 0; j < 32; j++) {                                                  // acc += p_j row j of V, or dS_j row j of K
            float pj = __shfl_sync(0xffffffffu, p, j);
            const float* r = MODE == 0 ? V.v[j] : K.v[j];
            for (int c = 0; c < attention_max_d / 32; c++)
                if (lane + 32 * c < s.D) acc[c] = fmaf(pj, r[lane + 32 * c], acc[c]);
        }
    }
    if (i >= s.T) return;
    for (int c = 0; c < attention_max_d / 32; c++)
        if (lane + 32 * c < s.D) {
            float v = MODE == 0 ? acc[c] / l : acc[c];                                  // normalised once, at the end
            int64_t at = row * out_stride + h * s.D + lane + 32 * c;
            store(out + at, v);
            if (MODE == 0 && low) store(low + at, v - as_act(v));
        }
    if (MODE == 0 && lane == 0) lse[row * s.H + h] = m + log_(l);
}

// delta (n) = rowsum(dO * (O + low)), n = B T H rows of D, a warp each; low may be null.
__global__ void attention_delta(float* delta, const act_t* dout, const act_t* out, const act_t* low, int64_t n, int D) {
    int64_t r = (int64_t)blockIdx.x * 4 + threadIdx.x / 32;
    if (r >= n) return;
    Group<32> g;
    float v = low ? g.sum(D, [](acc_t a, acc_t b, acc_t c) { return a * (b + c); }, dout + r * D, out + r * D, low + r * D)
                  : g.sum(D, [](acc_t a, acc_t b) { return a * b; }, dout + r * D, out + r * D);
    if (g.lane() == 0) delta[r] = v;
}

// Block: 8 key rows of one (sequence, kv head), a warp each; lane q is query q of the current tile of 32, over all heads of the group: the
// warp that owns a key adds up all of its dK and dV. attention_rows with queries and keys exchanged; query tiles begin at the diagonal.
__global__ void attention_keys(act_t* dqkv, const float* lse, const act_t* qkv, const act_t* dout, const float* delta, Heads s, float scale) {
    __shared__ AttentionTile Q, DO;
    __shared__ float k_row[attention_warps][attention_max_d], v_row[attention_warps][attention_max_d];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = (s.T + attention_warps - 1) / attention_warps;
    int kv = blockIdx.x / blocks % s.KV, b = blockIdx.x / blocks / s.KV;
    int first = blockIdx.x % blocks * attention_warps, j = first + warp;               // this warp's key
    int64_t row = (int64_t)b * s.T + min(j, s.T - 1), start = (int64_t)b * s.T;
    for (int d = lane; d < s.D; d += 32) {
        k_row[warp][d] = load(qkv + row * s.row() + (s.H + kv) * s.D + d);
        v_row[warp][d] = load(qkv + row * s.row() + (s.H + s.KV + kv) * s.D + d);
    }
    float dk[attention_max_d / 32] = {}, dv[attention_max_d / 32] = {};
    for (int h = kv * (s.H / s.KV); h < (kv + 1) * (s.H / s.KV); h++)
        for (int i0 = first / 32 * 32; i0 < s.T; i0 += 32) {
            __syncthreads();
            Q.load_rows(qkv + (start + i0) * s.row() + h * s.D, s.row(), s.T - i0, s.D);
            DO.load_rows(dout + (start + i0) * s.H * s.D + h * s.D, (int64_t)s.H * s.D, s.T - i0, s.D);
            __syncthreads();
            int i = i0 + lane;
            float p = 0, ds = 0;                                                        // of earlier queries, and beyond T: zero
            if (i >= j && i < s.T) {
                p = exp_(scale * dot(k_row[warp], Q.v[lane], s.D) - lse[(start + i) * s.H + h]);
                ds = p * (dot(v_row[warp], DO.v[lane], s.D) - delta[(start + i) * s.H + h]) * scale;
            }
            for (int q = 0; q < 32; q++) {                                              // dV += p_q dO_q, dK += dS_q Q_q
                float pq = __shfl_sync(0xffffffffu, p, q), dsq = __shfl_sync(0xffffffffu, ds, q);
                for (int c = 0; c < attention_max_d / 32; c++)
                    if (lane + 32 * c < s.D) {
                        dv[c] = fmaf(pq, DO.v[q][lane + 32 * c], dv[c]);
                        dk[c] = fmaf(dsq, Q.v[q][lane + 32 * c], dk[c]);
                    }
            }
        }
    if (j >= s.T) return;
    for (int c = 0; c < attention_max_d / 32; c++)
        if (lane + 32 * c < s.D) {
            store(dqkv + row * s.row() + (s.H + kv) * s.D + lane + 32 * c, dk[c]);
            store(dqkv + row * s.row() + (s.H + s.KV + kv) * s.D + lane + 32 * c, dv[c]);
        }
}

// Arguments as of attention_forward() and attention_backward() at the end of this file.
inline void attention_forward_run(Ctx& ctx, act_t* out, act_t* low, acc_t* lse, const act_t* qkv, Heads s, acc_t scale) {
    if (flash_serves(s)) return (s.D == 64 ? flash_forward_run<64> : flash_forward_run<128>)(ctx, out, low, lse, qkv, s, scale);
    int64_t grid = (int64_t)(s.T + attention_warps - 1) / attention_warps * s.B * s.H, width = (int64_t)s.H * s.D;
    start(ctx, attention_rows<0>, grid, 32 * attention_warps, 0, out, low, width, lse, qkv, nullptr, nullptr, s, scale);
}
// Returns whether dQ and dK are turned back already.
inline bool attention_backward_run(Ctx& ctx, act_t* dqkv, acc_t* delta, const act_t* dout, const act_t* qkv, const act_t* out,
                                   const act_t* low, const acc_t* lse, Heads s, acc_t scale, Angles turned) {
    int64_t n = (int64_t)s.B * s.T * s.H;
    start(ctx, attention_delta, (n + 3) / 4, 128, 0, delta, dout, out, low, n, s.D);
    if (flash_serves(s)) {
        (s.D == 64 ? flash_backward_run<64> : flash_backward_run<128>)(ctx, dqkv, qkv, dout, lse, delta, s, scale, turned);
        return true;
    }
    int64_t blocks = (s.T + attention_warps - 1) / attention_warps;
    int lanes = 32 * attention_warps;
    start(ctx, attention_rows<1>, blocks * s.B * s.H, lanes, 0, dqkv, nullptr, s.row(), (float*)lse, qkv, dout, delta, s, scale);
    start(ctx, attention_keys, blocks * s.B * s.KV, lanes, 0, dqkv, lse, qkv, dout, delta, s, scale);
    return false;
}
#else
// ------------------------------------------------------------------------------------------------------------------- the CPU
constexpr int attention_max_d = 1 << 20;                // no limit
constexpr int query_block = 64;                         // 64 x 1024 scores are 256 KB, which a core's cache holds between the two products

// The scores of 192 tokens in blocks of 64 queries: x are 64 x 64 of them, 0 those of which the half above the diagonal is computed with
// the rest and then put to zero, so that products need no mask; what is beyond is never touched.
//
//     keys      0.. 64..128..
//     block 0   0                 64 x 64 x D
//     block 1   x   0             64 x 128 x D
//     block 2   x   x   0         64 x 192 x D
//
// Plans of the matmul tiles for one block: `rows` queries against all keys up to the last of them, `keys`.
struct AttentionPlans {
    const MatmulPlans::Plan *scores, *values, *dp, *dq, *dk[2], *dv[2];       // [0]: overwrite, [1]: add
    AttentionPlans(Ctx& ctx, const Heads& s, int rows, int keys, bool backward) {
        Type t = type_of<acc_t>();
        int64_t q = s.row(), o = (int64_t)s.H * s.D, D = s.D;                 // from row to row of qkv and dqkv; of out and dout
        auto plan = [&](int64_t m, int64_t n, int64_t k, int64_t lda, bool ta, int64_t ldb, bool tb, int64_t ldc, bool add) {
            return &ctx.plans->plan(MatmulKey{m, n, k, lda, ldb, ldc, ta, tb, t, t, t, add, false});
        };
        scores = plan(rows, keys, D, q, false, q, true, keys, false);         // Q K^T: scores and P lie with rows of `keys` elements
        if (!backward) values = plan(rows, D, keys, keys, false, q, false, o, false);
        if (!backward) return;
        dp = plan(rows, keys, D, o, false, q, true, keys, false);             // dO V^T
        dq = plan(rows, D, keys, keys, false, q, false, q, false);
        for (int add = 0; add < 2; add++) {
            dk[add] = plan(keys, D, rows, keys, true, q, false, q, add);      // dS^T Q
            dv[add] = plan(keys, D, rows, keys, true, o, false, q, add);      // P^T dO
        }
    }
};

// Of all blocks of a sequence, found before threads start (MatmulPlans::plan() is not for several).
inline std::vector<AttentionPlans> attention_plans(Ctx& ctx, const Heads& s, bool backward) {
    std::vector<AttentionPlans> plans;
    for (int q0 = 0; q0 < s.T; q0 += query_block) {
        int rows = std::min(query_block, s.T - q0);
        plans.emplace_back(ctx, s, rows, q0 + rows, backward);
    }
    return plans;
}

// A task is a block of query rows of one (sequence, head): S by one product, a softmax by rows, O by another.
inline void attention_forward_run(Ctx& ctx, act_t* out, act_t*, acc_t* lse, const act_t* qkv, Heads s, acc_t scale) {
    std::vector<AttentionPlans> plans = attention_plans(ctx, s, false);
    int blocks = (int)plans.size(), heads = s.B * s.H;
    #pragma omp parallel for schedule(dynamic) num_threads(ctx.threads)
    for (int task = 0; task < blocks * heads; task++) {
        // The last block sees the most keys: long tasks first, so that no thread starts one when the others are about to finish.
        int block = blocks - 1 - task / heads, b = task % heads / s.H, h = task % s.H, kv = h / (s.H / s.KV);
        int q0 = block * query_block, rows = std::min(query_block, s.T - q0), keys = q0 + rows;
        const act_t* q = qkv + ((int64_t)b * s.T + q0) * s.row() + h * s.D;
        const act_t* k = qkv + (int64_t)b * s.T * s.row() + (s.H + kv) * s.D;
        act_t* o = out + ((int64_t)b * s.T + q0) * s.H * s.D + h * s.D;
        acc_t* score = (acc_t*)ctx.scratch(0, sizeof(acc_t) * rows * keys);
        ctx.plans->run(ctx, *plans[block].scores, score, q, k);              // on this thread alone, as every product here
        Group<32> g;
        acc_t sum[query_block];
        for (int i = 0; i < rows; i++) {
            acc_t* p = score + i * keys;
            int n = q0 + i + 1;                                               // keys that this query sees
            acc_t m = scale * g.max(n, [](acc_t v) { return v; }, (const acc_t*)p);
            sum[i] = g.sum(n, [=](acc_t& v) { return v = exp_(v * scale - m); }, p);
            std::fill(p + n, p + keys, acc_t(0));                             // later keys weigh nothing in P V
            lse[((int64_t)b * s.T + q0 + i) * s.H + h] = m + log_(sum[i]);
        }
        ctx.plans->run(ctx, *plans[block].values, o, score, k + s.KV * s.D);
        for (int i = 0; i < rows; i++) {
            acc_t r = 1 / sum[i];                                             // D divisions of O instead of n of P
            g.map(s.D, [=](acc_t& v) { v *= r; }, o + (int64_t)i * s.H * s.D);
        }
    }
}

// A task is a (sequence, kv head): it alone writes these dK and dV. Blocks run from the last, which covers every key and
// overwrites, to the first; the rest of the group's heads add. Returns false: dQ and dK are not turned back.
inline bool attention_backward_run(Ctx& ctx, act_t* dqkv, acc_t*, const act_t* dout, const act_t* qkv, const act_t* out, const act_t*,
                                   const acc_t* lse, Heads s, acc_t scale, Angles) {
    std::vector<AttentionPlans> plans = attention_plans(ctx, s, true);
    #pragma omp parallel for schedule(dynamic) num_threads(ctx.threads)
    for (int task = 0; task < s.B * s.KV; task++) {
        int b = task / s.KV, kv = task % s.KV, group = s.H / s.KV;
        int64_t k_at = (int64_t)b * s.T * s.row() + (s.H + kv) * s.D, v_at = k_at + s.KV * s.D;
        acc_t* p = (acc_t*)ctx.scratch(0, 2 * sizeof(acc_t) * query_block * s.T);
        acc_t* dp = p + query_block * s.T;
        Group<32> g;
        for (int h = kv * group; h < (kv + 1) * group; h++)
            for (int block = (int)plans.size() - 1; block >= 0; block--) {
                // Scores and dP of the block, then in their places P and dS, row by row; then three products with these.
                const AttentionPlans& plan = plans[block];
                int q0 = block * query_block, rows = std::min(query_block, s.T - q0), keys = q0 + rows;
                bool add = h > kv * group || block < (int)plans.size() - 1;   // to dK and dV; the first product of all puts them
                int64_t q_at = ((int64_t)b * s.T + q0) * s.row() + h * s.D;   // where this head's rows begin: in qkv and dqkv,
                int64_t o_at = ((int64_t)b * s.T + q0) * s.H * s.D + h * s.D; // in out and dout
                ctx.plans->run(ctx, *plan.scores, p, qkv + q_at, qkv + k_at);
                ctx.plans->run(ctx, *plan.dp, dp, dout + o_at, qkv + v_at);
                for (int i = 0; i < rows; i++) {
                    int n = q0 + i + 1;
                    int64_t o_row = o_at + (int64_t)i * s.H * s.D;
                    acc_t L = lse[((int64_t)b * s.T + q0 + i) * s.H + h];
                    acc_t delta = g.sum(s.D, [](acc_t x, acc_t y) { return x * y; }, dout + o_row, out + o_row);
                    g.map(n, [=](acc_t& pv, acc_t& dv) {
                        pv = exp_(pv * scale - L);
                        dv = pv * (dv - delta) * scale;
                    }, p + i * keys, dp + i * keys);
                    std::fill(p + i * keys + n, p + (i + 1) * keys, acc_t(0));
                    std::fill(dp + i * keys + n, dp + (i + 1) * keys, acc_t(0));
                }
                ctx.plans->run(ctx, *plan.dq, dqkv + q_at, dp, qkv + k_at);
                ctx.plans->run(ctx, *plan.dk[add], dqkv + k_at, dp, qkv + q_at);
                ctx.plans->run(ctx, *plan.dv[add], dqkv + v_at, p, dout + o_at);
            }
    }
    return false;
}
#endif

// out (B*T x H D), lse (B*T x H) = attention of qkv (B*T x (H + 2 KV) D). D at most attention_max_d. low (as out): what rounding out to act_t
// lost, in act_t, for backward's delta (flash.cuh says why); null if there is no backward, or nothing is lost because act_t is a float.
inline void attention_forward(Ctx& ctx, act_t* out, act_t* low, acc_t* lse, const act_t* qkv, Heads s) {
    double rows = (double)s.B * s.T;
    Launch launch(ctx, "attention_forward", {rows * sizeof(act_t) * (s.row() + s.H * s.D), attention_flops(s, 2)});      // Q K^T, P V
    attention_forward_run(ctx, out, low, lse, qkv, s, 1 / std::sqrt((acc_t)s.D));
}

// dqkv (B*T x (H + 2 KV) D), overwritten, = gradient of qkv, given dout (B*T x H D) and what attention_forward() read and wrote. delta: B*T x H
// of scratch. With a table it is the gradient of the heads before rotate() turned them: tensor-core kernels turn dQ and dK back in
// registers, before their only rounding.
inline void attention_backward(Ctx& ctx, act_t* dqkv, acc_t* delta, const act_t* dout, const act_t* qkv, const act_t* out,
                               const act_t* low, const acc_t* lse, Heads s, Angles turned = {}) {
    double rows = (double)s.B * s.T;
    bool back;
    {
        // 5 products: S, dP, dQ, dK, dV; what a kernel computes twice is not counted.
        Launch launch(ctx, "attention_backward", {rows * sizeof(act_t) * (2 * s.row() + 2 * s.H * s.D), attention_flops(s, 5)});
        back = attention_backward_run(ctx, dqkv, delta, dout, qkv, out, low, lse, s, 1 / std::sqrt((acc_t)s.D), turned);
    }
    if (turned.cosine && !back) rotate(ctx, dqkv, turned, s, -1);
}
