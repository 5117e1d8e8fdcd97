// attention.cuh: causal grouped-query attention, forward and backward, without a T x T buffer on either machine.
//
//     S = Q K^T / sqrt(D), causal      P = softmax(S)      O = P V
//     dV = P^T dO    dP = dO V^T    delta = rowsum(dO * O)    dS = P * (dP - delta)    dQ = dS K / sqrt(D)    dK = dS^T Q / sqrt(D)
//
// Layout: qkv is (B*T) x (H + 2 KV) D, a row holding the query heads, then the key heads, then the value heads, queries and keys
// already rotated. Query head h reads key/value head h / (H / KV). Forward keeps the log-sum-exp of each row, (B*T) x H; backward
// computes P again from it (FlashAttention's bookkeeping, arXiv 2205.14135). No atomics: every sum has one owner and one order.
//
// CPU: 64 query rows at a time, scores through matmul tiles, softmax by rows. GPU: flash.cuh's tensor-core kernels for bf16 activations
// and heads of 64 or 128; for the rest (float activations, other sizes) plain ones, one warp a row, key tiles in shared memory.
#pragma once
#include "flash.cuh"    // the tensor-core kernels (GPU)
#include "matmul.cuh"   // MatmulPlans, Mat (CPU); device.cuh: Ctx, Group, for_rows
#include "rope.cuh"     // Heads, Angles, rotate

// FLOPs of the causal half: 2 D per (query, key) pair for each of `products` matrix products.
inline double attention_flops(const Heads& s, int products) { return (double)products * s.B * s.H * s.D * s.T * (s.T + 1.0); }

#ifdef __CUDACC__
// ------------------------------------------------------------------------------------------------------------------- the GPU
constexpr int attention_warps = 8, attention_max_d = 128;

// A tile of 32 rows x D floats; the odd pitch lets 32 lanes read 32 rows of one column without a bank conflict.
struct AttentionTile {
    float v[32][attention_max_d + 1];
    template <class T> __device__ void load_rows(const T* first, int64_t stride, int rows, int D) {
        for (int i = threadIdx.x; i < 32 * D; i += blockDim.x) {
            int r = i / D, d = i % D;
            v[r][d] = r < rows ? load(first + r * stride + d) : 0.f;
        }
    }
};
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

// Block: 8 query rows of one (sequence, head), a warp each; lane j scores key j of the current tile of 32.
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
    float m = -INFINITY, l = 0, acc[attention_max_d / 32] = {}, L = 0, dl = 0;
    if (MODE == 1) L = lse[row * s.H + h], dl = delta[row * s.H + h];
    int last = min(first + attention_warps, s.T) - 1;
    for (int j0 = 0; j0 <= last; j0 += 32) {
        __syncthreads();
        const act_t* k_first = qkv + base + j0 * s.row() + (s.H + kv) * s.D;
        K.load_rows(k_first, s.row(), s.T - j0, s.D);
        V.load_rows(k_first + s.KV * s.D, s.row(), s.T - j0, s.D);
        __syncthreads();
        bool valid = j0 + lane <= i;
        float score = valid ? scale * dot(q_row[warp], K.v[lane], s.D) : -INFINITY, p;
        if (MODE == 0) {
            float m_new = fmaxf(m, warp_max(score)), fade = exp_(m - m_new);
            p = valid ? exp_(score - m_new) : 0.f;
            l = l * fade + warp_sum(p);
            m = m_new;
            for (float& a : acc) a *= fade;
        } else {
            p = valid ? exp_(score - L) : 0.f;
            p *= (dot(do_row[warp], V.v[lane], s.D) - dl) * scale;            // dS / sqrt(D)
        }
        for (int j = 0; j < 32; j++) {
            float pj = __shfl_sync(0xffffffffu, p, j);
            const float* r = MODE == 0 ? V.v[j] : K.v[j];
            for (int c = 0; c < attention_max_d / 32; c++)
                if (lane + 32 * c < s.D) acc[c] = fmaf(pj, r[lane + 32 * c], acc[c]);
        }
    }
    if (i >= s.T) return;
    for (int c = 0; c < attention_max_d / 32; c++)
        if (lane + 32 * c < s.D) {
            float v = MODE == 0 ? acc[c] / l : acc[c];
            int64_t at = row * out_stride + h * s.D + lane + 32 * c;
            store(out + at, v);
            if (MODE == 0 && low) store(low + at, v - as_act(v));
        }
    if (MODE == 0 && lane == 0) lse[row * s.H + h] = m + log_(l);
}

// delta (n) = rowsum(dO * (O + low)), a warp a row; low may be null.
__global__ void attention_delta(float* delta, const act_t* dout, const act_t* out, const act_t* low, int64_t n, int D) {
    int64_t r = (int64_t)blockIdx.x * 4 + threadIdx.x / 32;
    if (r >= n) return;
    Group<32> g;
    float v = low ? g.sum(D, [](acc_t a, acc_t b, acc_t c) { return a * (b + c); }, dout + r * D, out + r * D, low + r * D)
                  : g.sum(D, [](acc_t a, acc_t b) { return a * b; }, dout + r * D, out + r * D);
    if (g.lane() == 0) delta[r] = v;
}

// Block: 8 key rows of one (sequence, kv head), a warp each; lane j is query j of the current tile, over all heads of the group.
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
            float p = 0, ds = 0;
            if (i >= j && i < s.T) {
                p = exp_(scale * dot(k_row[warp], Q.v[lane], s.D) - lse[(start + i) * s.H + h]);
                ds = p * (dot(v_row[warp], DO.v[lane], s.D) - delta[(start + i) * s.H + h]) * scale;
            }
            for (int q = 0; q < 32; q++) {
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

inline void attention_forward_run(Ctx& ctx, act_t* out, act_t* low, acc_t* lse, const act_t* qkv, Heads s, acc_t scale) {
    if (flash_serves(s)) return (s.D == 64 ? flash_forward_run<64> : flash_forward_run<128>)(ctx, out, low, lse, qkv, s, scale);
    int64_t grid = (int64_t)(s.T + attention_warps - 1) / attention_warps * s.B * s.H;
    start(ctx, attention_rows<0>, grid, 32 * attention_warps, 0, out, low, (int64_t)s.H * s.D, lse, qkv, nullptr, nullptr, s, scale);
}
inline bool attention_backward_run(Ctx& ctx, act_t* dqkv, acc_t* delta, const act_t* dout, const act_t* qkv, const act_t* out, const act_t* low, const acc_t* lse,
                                   Heads s, acc_t scale, Angles turned) {
    int64_t n = (int64_t)s.B * s.T * s.H;
    start(ctx, attention_delta, (n + 3) / 4, 128, 0, delta, dout, out, low, n, s.D);
    if (flash_serves(s)) return (s.D == 64 ? flash_backward_run<64> : flash_backward_run<128>)(ctx, dqkv, qkv, dout, lse, delta, s, scale, turned), true;
    int64_t blocks = (s.T + attention_warps - 1) / attention_warps;
    start(ctx, attention_rows<1>, blocks * s.B * s.H, 32 * attention_warps, 0, dqkv, nullptr, s.row(), (float*)lse, qkv, dout, delta, s, scale);
    start(ctx, attention_keys, blocks * s.B * s.KV, 32 * attention_warps, 0, dqkv, lse, qkv, dout, delta, s, scale);
    return false;
}
#else
// ------------------------------------------------------------------------------------------------------------------- the CPU
constexpr int attention_max_d = 1 << 20;
constexpr int query_block = 64;

// Plans of the matmul tiles for one block of query rows: `rows` queries against its first `keys` keys.
struct AttentionPlans {
    const MatmulPlans::Plan *scores, *values, *dp, *dq, *dk[2], *dv[2];       // [0]: overwrite, [1]: add
    AttentionPlans(Ctx& ctx, const Heads& s, int rows, int keys, bool backward) {
        Type t = type_of<acc_t>();
        int64_t q = s.row(), o = (int64_t)s.H * s.D, D = s.D;
        auto plan = [&](int64_t m, int64_t n, int64_t k, int64_t lda, bool ta, int64_t ldb, bool tb, int64_t ldc, bool add) {
            return &ctx.plans->plan(MatmulKey{m, n, k, lda, ldb, ldc, ta, tb, t, t, t, add, false});
        };
        scores = plan(rows, keys, D, q, false, q, true, keys, false);
        if (!backward) values = plan(rows, D, keys, keys, false, q, false, o, false);
        if (!backward) return;
        dp = plan(rows, keys, D, o, false, q, true, keys, false);
        dq = plan(rows, D, keys, keys, false, q, false, q, false);
        for (int add = 0; add < 2; add++) {
            dk[add] = plan(keys, D, rows, keys, true, q, false, q, add);
            dv[add] = plan(keys, D, rows, keys, true, o, false, q, add);
        }
    }
};

inline std::vector<AttentionPlans> attention_plans(Ctx& ctx, const Heads& s, bool backward) {
    std::vector<AttentionPlans> plans;
    for (int q0 = 0; q0 < s.T; q0 += query_block) {
        int rows = std::min(query_block, s.T - q0);
        plans.emplace_back(ctx, s, rows, q0 + rows, backward);
    }
    return plans;
}

inline void attention_forward_run(Ctx& ctx, act_t* out, act_t*, acc_t* lse, const act_t* qkv, Heads s, acc_t scale) {
    std::vector<AttentionPlans> plans = attention_plans(ctx, s, false);
    int blocks = (int)plans.size(), heads = s.B * s.H;
    #pragma omp parallel for schedule(dynamic) num_threads(ctx.threads)
    for (int task = 0; task < blocks * heads; task++) {
        int block = blocks - 1 - task / heads, b = task % heads / s.H, h = task % s.H, kv = h / (s.H / s.KV);   // long ones first
        int q0 = block * query_block, rows = std::min(query_block, s.T - q0), keys = q0 + rows;
        const act_t* q = qkv + ((int64_t)b * s.T + q0) * s.row() + h * s.D;
        const act_t* k = qkv + (int64_t)b * s.T * s.row() + (s.H + kv) * s.D;
        act_t* o = out + ((int64_t)b * s.T + q0) * s.H * s.D + h * s.D;
        acc_t* score = (acc_t*)ctx.scratch(0, sizeof(acc_t) * rows * keys);
        ctx.plans->run(ctx, *plans[block].scores, score, q, k);
        Group<32> g;
        acc_t sum[query_block];
        for (int i = 0; i < rows; i++) {
            acc_t* p = score + i * keys;
            int n = q0 + i + 1;
            acc_t m = scale * g.max(n, [](acc_t v) { return v; }, (const acc_t*)p);
            sum[i] = g.sum(n, [=](acc_t& v) { return v = exp_(v * scale - m); }, p);
            std::fill(p + n, p + keys, acc_t(0));
            lse[((int64_t)b * s.T + q0 + i) * s.H + h] = m + log_(sum[i]);
        }
        ctx.plans->run(ctx, *plans[block].values, o, score, k + s.KV * s.D);
        for (int i = 0; i < rows; i++) {
            acc_t r = 1 / sum[i];
            g.map(s.D, [=](acc_t& v) { v *= r; }, o + (int64_t)i * s.H * s.D);
        }
    }
}

// A task is a (sequence, kv head): it alone writes these dK and dV. Blocks run from the last, which covers every key and
// overwrites, to the first; the rest of the group's heads add.
inline bool attention_backward_run(Ctx& ctx, act_t* dqkv, acc_t*, const act_t* dout, const act_t* qkv, const act_t* out, const act_t*, const acc_t* lse,
                                   Heads s, acc_t scale, Angles) {
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
                const AttentionPlans& plan = plans[block];
                int q0 = block * query_block, rows = std::min(query_block, s.T - q0), keys = q0 + rows;
                bool add = h > kv * group || block < (int)plans.size() - 1;
                int64_t q_at = ((int64_t)b * s.T + q0) * s.row() + h * s.D, o_at = ((int64_t)b * s.T + q0) * s.H * s.D + h * s.D;
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

// out (B*T x H D), lse (B*T x H) = attention of qkv. low: what rounding out to act_t lost, in act_t, for backward's delta (flash.cuh says
// why); null if there is no backward, or nothing is lost because act_t is a float.
inline void attention_forward(Ctx& ctx, act_t* out, act_t* low, acc_t* lse, const act_t* qkv, Heads s) {
    double rows = (double)s.B * s.T;
    Launch launch(ctx, "attention_forward", {rows * sizeof(act_t) * (s.row() + s.H * s.D), attention_flops(s, 2)});
    attention_forward_run(ctx, out, low, lse, qkv, s, 1 / std::sqrt((acc_t)s.D));
}

// dqkv (B*T x (H + 2 KV) D), overwritten. delta: B*T x H of scratch. With a table it is the gradient of the heads before rotate() turned them:
// tensor-core kernels turn dQ and dK back in registers, before their only rounding.
inline void attention_backward(Ctx& ctx, act_t* dqkv, acc_t* delta, const act_t* dout, const act_t* qkv, const act_t* out, const act_t* low, const acc_t* lse,
                               Heads s, Angles turned = {}) {
    double rows = (double)s.B * s.T;
    bool back;
    {
        Launch launch(ctx, "attention_backward", {rows * sizeof(act_t) * (2 * s.row() + 2 * s.H * s.D), attention_flops(s, 5)});
        back = attention_backward_run(ctx, dqkv, delta, dout, qkv, out, low, lse, s, 1 / std::sqrt((acc_t)s.D), turned);
    }
    if (turned.cosine && !back) rotate(ctx, dqkv, turned, s, -1);
}
