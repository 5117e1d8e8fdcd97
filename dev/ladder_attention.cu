// ladder_attention.cu: the forward of causal attention in five rungs, from a dot product a lane to Hopper's asynchronous products.
//
//     make GPU=1 build/gpu-90a/ladder_attention && build/gpu-90a/ladder_attention          checks, then speeds; with --checks none (make GPU=1 print-dir)
//     make build/emulated/ladder_attention && build/emulated/ladder_attention              checks alone, on a machine without a GPU
//
//     1 plain          a warp a query, a lane a key, float FMAs (attention.cuh)             every FMA fetches an operand from shared memory
//     2 mma            a warp 16 queries, tensor cores, tiles loaded and then used          loads and products wait for each other
//     3 + cp.async     the same kernel, tiles arriving while products run                   a fragment of K or V feeds one product
//     4 production     32 queries a warp (flash.cuh)                                        a fragment feeds two
//     5 wgmma          64 queries a warpgroup, products run while lanes do softmax          no fragments of K and V; one barrier a tile
//       (for sm_90a, else left out; whether it is to take production's place there is to be measured)
//
// The work is 2 D multiply-adds a (query, key) pair, and a block's queries share every key that is read, so the yardstick is not bandwidth
// but a bf16 GEMM's FLOP/s, measured in the same run. All rungs keep a row's running maximum and sum (FlashAttention, arXiv
// 2205.14135), so that no score ever reaches global memory; it is how they multiply that differs.
// Bytes an element, the least: qkv read once and O, its rest and lse written: 2 (H + 2 KV) D + 4 H D + 4 H a token. A block of 8, 64, 64, 128
// or 128 queries reads all keys and values before it again, from the L2 cache if it can: 1/8, 1/64, 1/64, 1/128, 1/128 of 4 D bytes a
// (query, key) pair.
//
// What is checked: O (as bf16 and what that rounding lost) and lse against plain attention in double. Rung 1 holds P in float; the
// others round it to bf16 on its way into the second product, an error of at most 2^-9 of every term: the tolerance is that bound, doubled.
#include "../attention.cuh"     // Heads, attention_rows, flash_*
#include "wgmma.cuh"            // wgmma_*, has_wgmma
#include "ladder.h"             // timed, median_seconds, check, done

struct Problem {
    Heads s;
    bf16 *out, *low;                        // (B T) x (H D)
    float* lse;                             // (B T) x H
    size_t bytes;                           // of these three, which lie one after another
    bf16* qkv;                              // (B T) x row()
    float scale() const { return 1 / std::sqrt((float)s.D); }
    int64_t tokens() const { return (int64_t)s.B * s.T; }
};

// Rung 1, plain: attention.cuh's kernel for any head size. 8 warps, a query each, share tiles of 32 keys and values, kept in float. A lane
// scores its key by a dot product as long as D, and owns every 32nd element of O.
// Limit: instructions and shared memory. An SM's lanes do 128 FMAs a cycle, and each needs at least one 4-byte operand from shared
// memory, which gives 32 a cycle: at most a quarter of the FMAs' rate, and tensor cores are many times faster than that.
static void plain(Ctx& ctx, const Problem& p) {
    int64_t blocks = (int64_t)(p.s.T + attention_warps - 1) / attention_warps * p.s.B * p.s.H;
    start(ctx, attention_rows<0>, blocks, 32 * attention_warps, 0, p.out, p.low, (int64_t)p.s.H * p.s.D, p.lse, p.qkv, nullptr, nullptr, p.s, p.scale());
}

// A tile into shared memory by way of registers, which flash_load's cp.async goes without: the store waits for its load, and with it
// all that the thread would do next. Same places, same zeros beyond `valid`.
template <int D> __device__ void load_and_wait(bf16* tile, const bf16* from, int64_t stride, int rows, int valid) {
    for (int i = threadIdx.x; i < rows * (D / 8); i += flash_lanes) {
        int r = i / (D / 8), c = i % (D / 8);
        *(uint4*)flash_at<D>(tile, r, c) = r < valid ? *(const uint4*)(from + r * stride + c * 8) : uint4{};
    }
}

// Rungs 2, 3 and 5 have a warp's 16 rows of scores in C fragments (ptx.cuh): element [n][e] is of row g + 8 (e / 2), column 8 n + 2 t + e % 2.
// Keys behind a query are not seen. key: this lane's first column's; query: its first row's.
template <int N> __device__ void hide(float (&p)[N][4], int key, int query) {
    #pragma unroll
    for (int i = 0; i < 4 * N; i++)
        if (key + i / 4 * 8 + i % 2 > query + i % 4 / 2 * 8) p[i / 4][i % 4] = -INFINITY;
}
// P = 2^(c (S - m)), powers of 2 being what the hardware has; m and l, a row's running maximum and this lane's part of its sum, take
// the tile in; fade is what all sums so far lose to the new maximum.
template <int N> __device__ void soften(float (&p)[N][4], float (&m)[2], float (&l)[2], float (&fade)[2], float c) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = m[half], sum = 0;
        #pragma unroll
        for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(p[n][2 * half], p[n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));                 // the row's other columns are in the quad's other lanes
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        fade[half] = exp2_fast((m[half] - top) * c);
        #pragma unroll
        for (int n = 0; n < N; n++)
            #pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) sum += p[n][e] = exp2_fast(fmaf(p[n][e], c, -top * c));
        m[half] = top, l[half] = l[half] * fade[half] + sum;
    }
}
template <int N> __device__ void dim(float (&o)[N][4], const float (&fade)[2]) {
    #pragma unroll
    for (int i = 0; i < 4 * N; i++) o[i / 4][i % 4] *= fade[i % 4 / 2];
}
// O = o / l and lse of rows `at`, at + H, ... of out, `valid` of them, by way of 16 rows of shared memory that are the warp's own.
template <int D> __device__ void finish(bf16* out, bf16* low, float* lse, const float (&o)[D / 8][4], const float (&m)[2], const float (&l)[2],
                                       bf16* own, int64_t at, int valid, int H, float scale) {
    int lane = threadIdx.x % 32, g = lane / 4;
    float inverse[2];
    for (int half = 0; half < 2; half++) {
        float sum = l[half] + __shfl_xor_sync(0xffffffffu, l[half], 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        inverse[half] = 1 / sum;
        int row = 8 * half + g;
        if (lane % 4 == 0 && row < valid) lse[at + (int64_t)row * H] = fmaf(m[half], scale, log_(sum));
    }
    auto value = [&](int n, int e) { return o[n][e] * inverse[e / 2]; };
    flash_store<D>(out + at * D, (int64_t)H * D, valid, own, value);
    flash_store<D>(low + at * D, (int64_t)H * D, valid, own, [&](int n, int e) { return value(n, e) - as_act(value(n, e)); });
}

// Rungs 2 and 3, mma: 64 queries a block, 16 a warp, in tiles of 64 keys. One instruction of a warp, m16n8k16, does 2048 multiply-adds,
// and a fragment of four registers a lane is all that shared memory must give for two of them. Scores come out in the very layout in
// which the second product wants its left operand (ptx.cuh), so P goes from one to the other in registers, rounded to bf16.
// Limit of rung 2: at every tile the warps load, wait, multiply, load, wait, multiply; tensor cores idle while memory answers.
// Rung 3 has the copy of V under way during the scores, and the next K's during the second product. Its limit is shared memory again:
// every fragment of K and V is read for one product of 16 rows.
template <int D, bool asynchronous> __global__ void __launch_bounds__(flash_lanes) mma_forward(bf16* out, bf16* low, float* lse, const bf16* qkv, Heads s, float scale) {
    bf16 *Q = (bf16*)shared_memory(), *K = Q + 64 * D, *V = K + 64 * D;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int blocks = (s.T + 63) / 64, heads = s.B * s.H;
    int block = blocks - 1 - (int)blockIdx.x / heads, b = blockIdx.x % heads / s.H, h = blockIdx.x % s.H, kv = h / (s.H / s.KV);    // long ones first
    int q0 = 64 * block, first = q0 + 16 * warp;
    int64_t row = s.row();
    const bf16* base = qkv + (int64_t)b * s.T * row;
    const bf16 *keys = base + (s.H + kv) * D, *values = keys + s.KV * D;
    auto fetch = [=](bf16* tile, const bf16* from, int at) {                    // 64 rows from `at` on
        if (asynchronous) flash_load<D>(tile, from + at * row, row, 64, s.T - at), copy_commit();
        else load_and_wait<D>(tile, from + at * row, row, 64, s.T - at);
    };
    auto arrive = [] {
        if (asynchronous) copy_wait<0>();
        __syncthreads();
    };
    fetch(Q, base + h * D, q0), fetch(K, keys, 0);
    arrive();
    uint32_t q[D / 16][4];                                                      // this warp's queries stay in registers
    #pragma unroll
    for (int k = 0; k < D / 16; k++) flash_rows<D>(q[k], Q, 16 * warp, k);

    float o[D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};           // rows g and g + 8 of the warp's 16
    for (int j = 0; j <= block; j++) {
        fetch(V, values, 64 * j);
        float p[8][4];
        flash_product<D>(p, q, K);
        arrive();                                                               // V is here, and nobody reads K any more
        if (j < block) fetch(K, keys, 64 * (j + 1));
        hide<8>(p, 64 * j + 2 * t, first + g);
        float fade[2];
        soften<8>(p, m, l, fade, scale * log2_e);
        dim(o, fade);
        flash_accumulate<D>(o, p, V);
        arrive();                                                               // the next K is here, and nobody reads V any more
    }
    bf16* own = Q + 16 * warp * D;                                              // this warp alone read these rows
    finish<D>(out, low, lse, o, m, l, own, ((int64_t)b * s.T + first) * s.H + h, s.T - first, s.H, scale);
}
template <bool asynchronous> void mma(Ctx& ctx, const Problem& p) {
    int64_t blocks = (int64_t)(p.s.T + 63) / 64 * p.s.B * p.s.H;
    size_t shared = 192 * p.s.D * sizeof(bf16);
    if (p.s.D == 64) start(ctx, mma_forward<64, asynchronous>, blocks, flash_lanes, shared, p.out, p.low, p.lse, p.qkv, p.s, p.scale());
    else start(ctx, mma_forward<128, asynchronous>, blocks, flash_lanes, shared, p.out, p.low, p.lse, p.qkv, p.s, p.scale());
}

// Rung 4, production: flash.cuh. 128 queries a block, 32 a warp: two fragments of rows share every fragment of K and V, half the reads of
// shared memory a product. Q stays in shared memory: there are no registers left for it.
static void production(Ctx& ctx, const Problem& p) {
    (p.s.D == 64 ? flash_forward_run<64> : flash_forward_run<128>)(ctx, p.out, p.low, p.lse, p.qkv, p.s, p.scale());
}

// Rung 5, wgmma: 128 queries a block, 64 a warpgroup, in tiles of 128 keys. An instruction of a warpgroup (wgmma.cuh), m64n128k16, does 131072
// multiply-adds; tensor cores read K and V from shared memory themselves, once for 64 rows, and P from the registers where the scores
// came out, rounded to bf16. And it is asynchronous: O += P V of one tile runs while lanes compute the softmax of the next.
//
//     tensor cores |  S = Q K(i)^T               |  O += P V(i-1)       |            |  S = Q K(i+1)^T ...
//     lanes        |  copies of K(i+1) and V(i)  |  softmax of S        | wait for P V(i-1), P from S,
//                  |  start; O *= fade           |                      | barrier: K(i+1), V(i) are here
//
// Tiles go from the diagonal down: only the first, before the loop, has keys to hide. Shared memory: Q and two stages of K and V, 128 x D bf16
// each (D = 128: 160 KiB, a block a multiprocessor). Registers a lane: S 64, O D / 2, P 32.
// Limit: per 128 x 128 (query, key) pairs tensor cores need 16 D clocks (D = 128: 2048; 4096 FLOPs a clock), the exponentials alone 1024 (16 a
// clock). Both warpgroups keep step by the barrier, so that both are at their softmax at once, and what is left of it when P V is done finds tensor
// cores idle. FlashAttention-3 (arXiv 2407.08608) has a third warpgroup copy, so that the two can take turns.
constexpr int group_lanes = 256;            // two warpgroups
template <int D> __device__ void wgmma_block(bf16* out, bf16* low, float* lse, const bf16* qkv, Heads s, float scale) {
    bf16 *Q = (bf16*)shared_memory(), *stages = Q + 128 * D;
    auto K = [=](int i) { return stages + i % 2 * 256 * D; };
    auto V = [=](int i) { return K(i) + 128 * D; };
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int blocks = (s.T + 127) / 128, heads = s.B * s.H;
    int block = blocks - 1 - (int)blockIdx.x / heads, b = blockIdx.x % heads / s.H, h = blockIdx.x % s.H, kv = h / (s.H / s.KV);    // long ones first
    int q0 = 128 * block, first = q0 + 16 * warp;
    int64_t row = s.row();
    const bf16* base = qkv + (int64_t)b * s.T * row;
    auto fetch = [=](bf16* tile, int head, int tokens) { panel_load<128, D, group_lanes>(tile, base + tokens * row + head * D, row, s.T - tokens); };
    auto arrive = [] { copy_wait<0>(), fence_async(), __syncthreads(); };       // what was copied is here, for products too
    float S[16][4] = {}, o[D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {}, fade[2];    // rows g and g + 8 of the warp's 16
    uint32_t p[8][4];                                                           // P as A fragments, 16 keys each
    auto scores = [&](int i) {                                                  // starts S = Q K(i)^T
        #pragma unroll
        for (int k = 0; k < D / 16; k++) {
            int at = k / 4 * (128 * 64) + k % 4 * 16;                           // columns 16 k ... 16 k + 15
            wgmma_shared(S, wgmma_operand(Q + warp / 4 * (64 * 64) + at), wgmma_operand(K(i) + at), k > 0);
        }
        wgmma_commit();
    };
    auto values = [&](int i) {                                                  // starts O += P V(i)
        #pragma unroll
        for (int k = 0; k < 8; k++) wgmma_registers(o, p[k], wgmma_operand(V(i) + 16 * k * 64, 128 * 64 * sizeof(bf16)));
        wgmma_commit();
    };
    auto copies = [&](int i) {                                                  // for the next tile's turn; tile i has keys 128 (block - i) ...
        if (i < block) fetch(K(i + 1), s.H + kv, 128 * (block - i - 1));
        fetch(V(i), s.H + s.KV + kv, 128 * (block - i));
        copy_commit();
    };
    auto pack = [&] {                                                           // the accumulators of S are the fragments of P
        #pragma unroll
        for (int i = 0; i < 32; i++) p[i / 4][i % 4] = pair_of(S[i / 2][i % 2 * 2], S[i / 2][i % 2 * 2 + 1]);
    };

    fetch(Q, h, q0), fetch(K(0), s.H + kv, q0), copy_commit();
    arrive();
    wgmma_fence(S);
    scores(0);
    copies(0);
    wgmma_wait<0>(S);
    hide<16>(S, q0 + 2 * t, first + g);
    soften<16>(S, m, l, fade, scale * log2_e);
    // The wait for the second product is where the next turn begins: ptxas moves a wait up past arithmetic that does not need it, though not out
    // of a turn of the loop, and a wait behind the softmax would be one before it.
    for (int i = 1; i <= block; i++) {
        wgmma_wait<0>(o);                                                       // (the first time there is none)
        pack();
        arrive();                                                               // K(i) and V(i - 1); and nobody reads the other stages any more
        wgmma_fence(S);
        scores(i);
        copies(i);
        dim(o, fade);
        wgmma_fence(o, p);
        values(i - 1);
        wgmma_wait<1>(S);
        soften<16>(S, m, l, fade, scale * log2_e);
    }
    wgmma_wait<0>(o);
    pack();
    dim(o, fade);
    arrive();
    wgmma_fence(o, p);
    values(block);
    wgmma_wait<0>(o);
    bf16* own = Q + 16 * warp * D;                                              // nobody reads Q any more
    finish<D>(out, low, lse, o, m, l, own, ((int64_t)b * s.T + first) * s.H + h, s.T - first, s.H, scale);
}
template <int D> __global__ void __launch_bounds__(group_lanes, 1) wgmma_forward(bf16* out, bf16* low, float* lse, const bf16* qkv, Heads s, float scale) {
    if constexpr (has_wgmma) wgmma_block<D>(out, low, lse, qkv, s, scale);
}
static void wgmma(Ctx& ctx, const Problem& p) {
    int64_t blocks = (int64_t)(p.s.T + 127) / 128 * p.s.B * p.s.H;
    size_t shared = 5 * 128 * p.s.D * sizeof(bf16);
    start(ctx, p.s.D == 64 ? wgmma_forward<64> : wgmma_forward<128>, blocks, group_lanes, shared, p.out, p.low, p.lse, p.qkv, p.s, p.scale());
}

struct Rung {
    const char* name;
    double tolerance;                       // of O, as a share of the sum of |P V|'s terms
    void (*run)(Ctx&, const Problem&);
};
static const Rung rungs[] = {{"1 plain", 1e-5, plain}, {"2 mma", 0x1p-8, mma<false>}, {"3 + cp.async", 0x1p-8, mma<true>}, {"4 production", 0x1p-8, production},
                             {"5 wgmma", 0x1p-8, wgmma}};

// ---------------------------------------------------------------------------------------------------------------------------
// Checks and speeds

static Problem make_problem(Ctx& ctx, Arena& arena, Heads s, std::vector<bf16>& qkv) {
    int64_t n = (int64_t)s.B * s.T * s.row(), outputs = (int64_t)s.B * s.T * s.H;
    size_t from = arena.used;
    Problem p = {s, arena.take<bf16>(outputs * s.D), arena.take<bf16>(outputs * s.D), arena.take<float>(outputs), arena.used - from, arena.take<bf16>(n)};
    qkv.resize(n);
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) store(&qkv[i], 2 * normal({7, 0, 0, 0, 0, Purpose::test}, (uint64_t)i));      // scores of deviation 4: some rows nearly one key's
    to_device(ctx, p.qkv, qkv.data(), n * sizeof(bf16));
    return p;
}

static void compare(Ctx& ctx, Arena arena, const Rung& rung, Heads s) {
    std::vector<bf16> qkv;
    Problem p = make_problem(ctx, arena, s, qkv);
    // Six times, for the emulated device has three orders of lanes, and early and late copies and products; every run must give the same bits.
    bool same = true;
    std::vector<uint8_t> seen, before;
    for (int turn = 0; turn < 6; turn++) {
        seen.assign(p.bytes, 0xff);                                 // NaN in either type: what a rung forgets is seen
        to_device(ctx, p.out, seen.data(), p.bytes);
        rung.run(ctx, p);
        CUDA(cudaGetLastError());
        to_host(ctx, seen.data(), p.out, p.bytes);
        same = same && (turn == 0 || seen == before);
        before = seen;
    }
    auto here = [&](void* there) { return seen.data() + ((char*)there - (char*)p.out); };
    const bf16 *out = (const bf16*)here(p.out), *low = (const bf16*)here(p.low);
    const float* lse = (const float*)here(p.lse);
    int64_t rows = p.tokens() * s.H;
    double worst = 0, worst_lse = 0;
    auto widen = [](double& to, double off) { to = off <= to || std::isnan(to) ? to : off; };      // a NaN stays
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = r / s.H, h = r % s.H, i = token % s.T, group = s.H / s.KV;
        auto part = [&](int64_t t, int64_t head) { return &qkv[t * s.row() + head * s.D]; };      // heads: queries, keys, values
        std::vector<double> score(i + 1);
        double top = -INFINITY, sum = 0;
        for (int64_t j = 0; j <= i; j++) {
            for (int d = 0; d < s.D; d++) score[j] += (double)load(part(token, h) + d) * load(part(token - i + j, s.H + h / group) + d);
            top = std::max(top, score[j] /= std::sqrt((double)s.D));
        }
        for (double& x : score) sum += x = std::exp(x - top);
        for (int d = 0; d < s.D; d++) {
            double o = 0, terms = 0;
            for (int64_t j = 0; j <= i; j++) {
                double term = score[j] / sum * load(part(token - i + j, s.H + s.KV + h / group) + d);
                o += term, terms += std::fabs(term);
            }
            widen(worst, std::fabs((double)load(out + r * s.D + d) + load(low + r * s.D + d) - o) / (terms + 1e-30));
        }
        widen(worst_lse, std::fabs(lse[r] - (top + std::log(sum))));
    }
    char name[100];
    snprintf(name, sizeof name, "%s, %d x %d tokens, %d heads on %d of %d", rung.name, s.B, s.T, s.H, s.KV, s.D);
    check(same && near(worst, 0, rung.tolerance) && near(worst_lse, 0, 2e-5), name, "%sO off by %.3g of its terms' sum (%.3g allowed), lse by %.3g", same ? "" : "runs differ; ", worst, rung.tolerance, worst_lse);
}

static void speeds(Ctx& ctx, Arena arena, const Rung* end, Heads s) {
    std::vector<bf16> qkv;
    Problem p = make_problem(ctx, arena, s, qkv);
    const int64_t n = 4096;                                         // the yardstick: 4096^3, of the same numbers
    ctx.plans = std::make_shared<MatmulPlans>(ctx);
    acc_t* product = arena.take<acc_t>(n * n);
    Mat a = mat((const act_t*)p.qkv, n), b = mat((const act_t*)p.qkv + n * n, n);
    double best = 2. * n * n * n / median_seconds(ctx, [&] { matmul(ctx, "", product, n, a, b, n, n, n, 0); });
    printf("%d x %d tokens, %d heads on %d of %d; a bf16 GEMM of 4096^3 runs at %.0f TFLOP/s\n%-20s %9s %9s %9s\n", s.B, s.T, s.H, s.KV, s.D, best * 1e-12, "rung", "ms", "TFLOP/s", "% of GEMM");
    for (const Rung* rung = rungs; rung < end; rung++) {
        double t = median_seconds(ctx, [&] { rung->run(ctx, p); }), rate = attention_flops(s, 2) / t;
        printf("%-20s %9.3f %9.1f %9.1f\n", rung->name, 1e3 * t, rate * 1e-12, 100 * rate / best);
    }
}

int main(int argc, char** argv) {
    calm_openmp(argv);
    Ctx ctx;
    Arena arena = {(char*)device_alloc((size_t)1 << (timed ? 30 : 24), "the ladder")};
    const Rung* end = std::end(rungs);
    if (!compiled_for_wgmma(ctx, arena)) printf("left out: rung %s, which is for sm_90a alone\n", (--end)->name);
    // Tiles full, half full, of one row; enough of them that stages are used again.
    const Heads shapes[] = {{1, 1, 1, 1, 64}, {2, 64, 2, 1, 64}, {1, 150, 4, 2, 64}, {1, 400, 1, 1, 64},
                            {2, 37, 2, 2, 128}, {1, 193, 2, 1, 128}, {1, 385, 1, 1, 128}};
    for (const Rung* rung = rungs; rung < end; rung++)
        for (const Heads& s : shapes) compare(ctx, arena, *rung, s);
    if (timed && !test_failures && argc == 1) speeds(ctx, arena, end, {4, 4096, 32, 8, 128});
    return done();
}
