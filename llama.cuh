// llama.cuh: LLaMA-3, forward and backward, layer by layer.
//
//     x = embed[token]
//     each layer:   x += o(attention(rope(qkv(rmsnorm(x)))))          grouped-query attention, rotate-half RoPE
//                   x += down(silu(gate) * up),  gate, up = gate_up(rmsnorm(x))
//     loss = cross_entropy(head(rmsnorm(x)), target), in nats, mean over tokens
//
// Read forward(), block_forward(), classify() and block_backward() first, at the end of the file: they are lists of calls. Before them
// come what they call: the kernels of the layers, then the model's memory.
//
// Shapes: N = B*T tokens, C = dim, H query heads, KV key/value heads, D = head size, F = ffn, V = vocabulary, L = layers.
// Weights are (out x in) row-major, as Hugging Face has them. Fused: qkv rows are [q | k | v], gate_up rows [gate | up]; a fused
// weight is one operand of one GEMM, and checkpoints store its row ranges under their own names.
// Types: act_t (activations and their gradients: bf16 on a GPU, float on a CPU), acc_t (weights, parameter gradients, sums: float).
// Conventions: activations and their gradients are overwritten (=), parameter gradients are added to (+=).
//
// The same bits from any number of threads, with and without recomputation: every sum has one owner and a fixed order, every random
// number is named by what it is for. So no kernel here adds atomically, and where many rows add to one vector (norm weights, the
// embedding) the rows are cut into chunks whose size does not depend on the machine.
//
// Sources: LLaMA-3 (arXiv 2407.21783), RMSNorm (1910.07467), RoPE (2104.09864), SwiGLU (2002.05202), GQA (2305.13245).
// Tested by test/test_model.cu (finite differences in double) and test/test_golden.cu (PyTorch's numbers).
#pragma once
#include "attention.cuh"    // attention_forward, attention_backward, Heads
#include "checkpoint.h"     // Tensor, TensorPart
#include "config.h"         // Config
#include "metis.cuh"        // Linear, linear_forward, linear_backward, Recipe

// config.h's, for this build's attention.
inline void check_config(const Config& c) { check_config(c, attention_max_d); }

// ---------------------------------------------------------------------------------------------------------------------------
// The tensor table: drives initialisation, the optimiser, checkpoints and tests.

// An arena is one allocation that holds a table's tensors one behind the other; params, grads, m and v have the same offsets.
// Every tensor starts on 64 elements (256 bytes of floats); the padding between tensors stays zero, so that sums over a whole arena
// (the gradient's norm) are sums over its tensors.
inline size_t padded(size_t elements) { return (elements + 63) / 64 * 64; }

// The model's parameters. Initialisation: N(0, 0.02), norm weights 1. Projections into the residual stream (o, down) start smaller by
// sqrt(2 L): 2 L of them are added up there, and their variances add (GPT-2, section 2.3).
inline std::vector<Tensor> tensor_table(const Config& c) {
    std::vector<Tensor> table;
    size_t offset = 0;
    auto add = [&](std::string name, int64_t rows, int64_t cols, int dims, bool quantised, float std, std::vector<TensorPart> parts) {
        table.push_back({name, rows, cols, dims, dims == 2, quantised, std, offset, std::move(parts)});
        offset += padded(table.back().size());
    };
    const float std = 0.02f, residual = 0.02f / std::sqrt(2.f * c.layers);
    int64_t q = (int64_t)c.heads * c.head_dim, kv = (int64_t)c.kv_heads * c.head_dim, dim = c.dim, ffn = c.ffn;
    add("embed", c.vocab, dim, 2, false, std, {{"model.embed_tokens.weight", c.vocab}});
    for (int l = 0; l < c.layers; l++) {
        std::string ours = "layers." + std::to_string(l) + ".", hf = "model." + ours;
        add(ours + "attn_norm", 1, dim, 1, false, 0, {{hf + "input_layernorm.weight", 1}});
        add(ours + "qkv", q + 2 * kv, dim, 2, true, std,
            {{hf + "self_attn.q_proj.weight", q}, {hf + "self_attn.k_proj.weight", kv}, {hf + "self_attn.v_proj.weight", kv}});
        add(ours + "o", dim, q, 2, true, residual, {{hf + "self_attn.o_proj.weight", dim}});
        add(ours + "ffn_norm", 1, dim, 1, false, 0, {{hf + "post_attention_layernorm.weight", 1}});
        add(ours + "gate_up", 2 * ffn, dim, 2, true, std, {{hf + "mlp.gate_proj.weight", ffn}, {hf + "mlp.up_proj.weight", ffn}});
        add(ours + "down", dim, ffn, 2, true, residual, {{hf + "mlp.down_proj.weight", dim}});
    }
    add("final_norm", 1, dim, 1, false, 0, {{"model.norm.weight", 1}});
    if (!c.tied) add("head", c.vocab, dim, 2, false, std, {{"lm_head.weight", c.vocab}});
    return table;
}

// The bases of every linear layer's X, W and D (k x in, k x in, k x out), in this order: state of the split recipes, which a checkpoint
// must hold beside the optimiser's. They are refreshed every few steps only, from a sample drawn then, and each starts from the last.
// That of a W whose factors are trained stays zero: V is its basis.
inline std::vector<Tensor> basis_table(const std::vector<Tensor>& tensors, int k) {
    std::vector<Tensor> table;
    size_t offset = 0;
    for (const Tensor& t : tensors)
        for (int m = 0; m < 3 && t.quantised; m++) {
            std::string name = t.name + (m == 0 ? ".basis_x" : m == 1 ? ".basis_w" : ".basis_d");
            table.push_back({name, k, m == 2 ? t.rows : t.cols, 2, false, false, 0, offset, {{name, k}}});
            offset += padded(table.back().size());
        }
    return table;
}

// Elements of an arena that holds the table.
inline size_t arena_size(const std::vector<Tensor>& table) { return padded(table.back().offset + table.back().size()); }

// Parameters, and those without embedding and head.
inline int64_t parameter_count(const std::vector<Tensor>& table, bool body_only = false) {
    int64_t n = 0;
    for (const Tensor& t : table)
        if (!body_only || (t.name != "embed" && t.name != "head")) n += (int64_t)t.size();
    return n;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Layers. Each launcher states shapes; all matrices are row-major and contiguous unless a stride is given.
//
// A kernel is what a group of lanes does with row r: 32 lanes (or 8, 128, 256) of a warp or block on a GPU, one thread with SIMD loops
// on a CPU. g.map(n, f, a, b) is a[i] = f(...) over n elements in registers of acc_t, rounded to the array's type when it is stored;
// g.sum and g.max give every lane the result. Between a store and another lane's load of it stands g.sync().

struct init_weights; struct embedding_forward; struct embedding_backward; struct residual_rmsnorm_forward;
struct rmsnorm_backward; struct sum_chunks; struct swiglu_forward; struct swiglu_backward; struct cross_entropy;
struct sum_rows; struct square_chunks; struct copy_chunks; struct product_chunks; struct adamw;

// A flat array is worked on in chunks of one size on every machine: partial sums are then the same numbers everywhere.
constexpr int64_t chunk = 16384;
inline int64_t chunks_of(int64_t n) { return (n + chunk - 1) / chunk; }

// N(0, std) from the stream `key`, or ones where std is 0.
template <class T> void initialise(Ctx& ctx, T* w, int64_t n, float std, RandomKey key) {
    for_rows<init_weights, 128>(ctx, {n * sizeof(T) * 1., 0}, chunks_of(n), KERNEL(Group<128> g, int64_t r) {
        for (int64_t i = r * chunk + g.lane(); i < n && i < (r + 1) * chunk; i += g.lanes) store(w + i, std == 0 ? 1 : std * normal(key, i));
    });
}

// x (N x C) = embed[token].
inline void embed(Ctx& ctx, act_t* x, const acc_t* table, const int* tokens, int64_t N, int C) {
    for_rows<embedding_forward>(ctx, {N * C * (sizeof(acc_t) + sizeof(act_t) + 0.), 0}, N, KERNEL(Group<32> g, int64_t r) {
        g.map(C, [](acc_t& o, acc_t v) { o = v; }, out(x + r * C), table + (int64_t)tokens[r] * C);
    });
}

// Tokens gathered by value, so that the embedding's gradient has one owner per row and one order: bucket i is token[i] and the
// positions order[start[i]] .. order[start[i+1]-1], ascending.
//
//     tokens  7 3 7 9 3      token  3 7 9      start  0 2 4 5      order  1 4 | 0 2 | 3
struct TokenBuckets {
    std::vector<int> token, start, order;
    TokenBuckets(const int* tokens, int64_t N) : order(N) {
        for (int64_t i = 0; i < N; i++) order[i] = (int)i;
        std::stable_sort(order.begin(), order.end(), [=](int a, int b) { return tokens[a] < tokens[b]; });
        for (int64_t i = 0; i < N; i++)
            if (i == 0 || tokens[order[i]] != tokens[order[i - 1]]) token.push_back(tokens[order[i]]), start.push_back((int)i);
        start.push_back((int)N);
    }
};

// grad[token] += the rows of dx (N x C) at that token's positions. The index arrays are on the device. (Rows that scatter by atomic
// additions would be simpler, and come out differently at every run.)
inline void embed_backward(Ctx& ctx, acc_t* grad, const act_t* dx, const int* token, const int* start, const int* order, int64_t buckets,
                           int64_t N, int C) {
    for_rows<embedding_backward>(ctx, {N * C * (sizeof(acc_t) + sizeof(act_t) + 0.), 0}, buckets, KERNEL(Group<32> g, int64_t r) {
        for (int i = start[r]; i < start[r + 1]; i++)
            g.map(C, [](acc_t& o, acc_t v) { o += v; }, grad + (int64_t)token[r] * C, dx + (int64_t)order[i] * C);
    });
}

// x = a + b (b may be null: then x may be a itself, or null to leave a where it is); h = x * rstd * w, rstd = 1 / sqrt(mean(x^2) + eps).
// Torch: x = a + b; h = F.rms_norm(x, (C,), w, eps). Shapes: x, h, a, b (N x C); rstd (N), which backward reads.
// amax (N), here and below: max |h| of every row as stored, for the quantiser that comes next, which then need not read h once more to
// find its tensor's largest element; null: not wanted.
inline void residual_rmsnorm(Ctx& ctx, act_t* x, act_t* h, acc_t* rstd, const act_t* a, const act_t* b, const acc_t* w, int64_t N, int C, acc_t eps,
                             float* amax = nullptr) {
    Cost cost = {N * C * sizeof(act_t) * (b ? 4. : 2.), N * C * 5.};
    for_rows<residual_rmsnorm_forward>(ctx, cost, N, KERNEL(Group<32> g, int64_t r) {
        const act_t* row = b ? x + r * C : a + r * C;
        // The sum is rounded to act_t before it is squared: recomputing from the stored x must see the number that was squared here.
        acc_t squares = b ? g.sum(C, [](acc_t& o, acc_t u, acc_t v) {
            o = as_act(u + v);
            return o * o;
        }, out(x + r * C), a + r * C, b + r * C) : g.sum(C, [](acc_t v) { return v * v; }, row);
        g.sync();
        acc_t s = 1 / std::sqrt(squares / C + eps);
        g.map(C, [=](acc_t& o, acc_t v, acc_t u) { o = v * s * u; }, out(h + r * C), row, w);
        if (g.lane() == 0) rstd[r] = s;
        note_amax(g, amax ? amax + r : nullptr, (const act_t*)h + r * C, C);
    });
}

constexpr int norm_rows = 32;                                                 // rows whose weight gradient one group sums
inline int64_t norm_chunks(int64_t N) { return (N + norm_rows - 1) / norm_rows; }

// dx (N x C) += gradient through h = x * rstd * w given dh; dw (C) += sum over rows of dh * x * rstd. `partial`: norm_chunks(N) x C.
//
//     u = dh * w;   dx += rstd * u - x * rstd^3 * mean(u * x)
//
// The second term: rstd depends on every x of its row, d rstd / d x_j = -rstd^3 x_j / C. dx is added to, since x also goes past the
// block on the residual stream, and its gradient with it. dw takes two kernels: chunks of 32 rows, then the chunks in order.
inline void rmsnorm_grad(Ctx& ctx, act_t* dx, acc_t* dw, acc_t* partial, const act_t* dh, const act_t* x, const acc_t* rstd, const acc_t* w, int64_t N, int C,
                         float* amax = nullptr) {
    for_rows<rmsnorm_backward, 128>(ctx, {N * C * sizeof(act_t) * 4., N * C * 10.}, norm_chunks(N), KERNEL(Group<128> g, int64_t k) {
        acc_t* sums = partial + k * C;
        g.map(C, [](acc_t& o) { o = 0; }, out(sums));
        g.sync();
        for (int64_t r = k * norm_rows; r < N && r < (k + 1) * norm_rows; r++) {
            acc_t s = rstd[r];
            acc_t t = g.sum(C, [](acc_t d, acc_t v, acc_t u) { return d * u * v; }, dh + r * C, x + r * C, w) * (s * s * s / C);
            g.map(C, [=](acc_t& o, acc_t& p, acc_t d, acc_t v, acc_t u) {
                o += s * d * u - v * t;
                p += d * v * s;
            }, dx + r * C, sums, dh + r * C, x + r * C, w);
            note_amax(g, amax ? amax + r : nullptr, (const act_t*)dx + r * C, C);
        }
    });
    int64_t n = norm_chunks(N);
    for_rows<sum_chunks>(ctx, {n * C * sizeof(acc_t) * 1., 0}, (C + 63) / 64, KERNEL(Group<32> g, int64_t r) {
        int width = C - r * 64 < 64 ? (int)(C - r * 64) : 64;
        for (int64_t k = 0; k < n; k++) {
            g.map(width, [](acc_t& o, acc_t v) { o += v; }, dw + r * 64, (const acc_t*)partial + k * C + r * 64);
            g.sync();                                                         // an odd C changes which lane owns which column
        }
    });
}

// s (N x F) = silu(gate) * up, gu (N x 2F) = [gate | up]. Torch: F.silu(gate) * up.
inline void swiglu(Ctx& ctx, act_t* s, const act_t* gu, int64_t N, int F, float* amax = nullptr) {
    for_rows<swiglu_forward>(ctx, {N * F * sizeof(act_t) * 3., N * F * 8.}, N, KERNEL(Group<32> g, int64_t r) {
        g.map(F, [](acc_t& o, acc_t a, acc_t b) { o = a / (1 + exp_(-a)) * b; }, out(s + r * F), gu + r * 2 * F, gu + r * 2 * F + F);
        note_amax(g, amax ? amax + r : nullptr, (const act_t*)s + r * F, F);
    });
}

// gu (N x 2F) becomes its own gradient, given ds (N x F): nothing reads gate and up after this, and a buffer of their size, the
// largest activation of all, is saved. With sig = 1 / (1 + e^-a), silu(a) = a sig: dgate = ds * up * (sig + silu (1 - sig)), dup = ds * silu.
inline void swiglu_grad(Ctx& ctx, act_t* gu, const act_t* ds, int64_t N, int F, float* amax = nullptr) {
    for_rows<swiglu_backward>(ctx, {N * F * sizeof(act_t) * 5., N * F * 12.}, N, KERNEL(Group<32> g, int64_t r) {
        g.map(F, [](acc_t& a, acc_t& b, acc_t d) {
            acc_t sig = 1 / (1 + exp_(-a)), silu = a * sig;
            a = d * b * (sig + silu * (1 - sig));
            b = d * silu;
        }, gu + r * 2 * F, gu + r * 2 * F + F, ds + r * F);
        note_amax(g, amax ? amax + r : nullptr, (const act_t*)gu + r * 2 * F, 2 * F);
    });
}

// loss (N) = logsumexp(logits) - logits[target]; with scale != 0 logits (N x V) become scale * (softmax - onehot) in place: the gradient
// of scale * loss. The largest logit is taken out of every exponent, so that none overflows.
inline void softmax_cross_entropy(Ctx& ctx, acc_t* loss, acc_t* logits, const int* targets, int64_t N, int V, acc_t scale) {
    for_rows<cross_entropy, 256>(ctx, {N * V * sizeof(acc_t) * (scale == 0 ? 1. : 2.), N * V * 20.}, N, KERNEL(Group<256> g, int64_t r) {
        acc_t* row = logits + r * V;
        acc_t m = g.max(V, [](acc_t v) { return v; }, (const acc_t*)row);
        acc_t sum = g.sum(V, [=](acc_t v) { return exp_(v - m); }, (const acc_t*)row);
        acc_t at_target = row[targets[r]];
        g.sync();                                                             // every lane has read it before one overwrites it
        if (g.lane() == 0) loss[r] = m + log_(sum) - at_target;
        if (scale == 0) return;
        acc_t k = scale / sum;
        g.map(V, [=](acc_t& v) { v = k * exp_(v - m); }, row);
        g.sync();
        if (g.lane() == 0) row[targets[r]] -= scale;
    });
}

// out[0] += sum of x[0..n), in one fixed order: by one group, chunk after chunk. n is small: rows, or partial sums of chunks.
inline void add_sum(Ctx& ctx, acc_t* total, const acc_t* x, int64_t n) {
    for_rows<sum_rows, 256>(ctx, {n * sizeof(acc_t) * 1., 0}, 1, KERNEL(Group<256> g, int64_t) {
        acc_t s = 0;
        for (int64_t r = 0; r * chunk < n; r++) s += g.sum(piece(n, r, chunk), [](acc_t v) { return v; }, x + r * chunk);
        if (g.lane() == 0) total[0] += s;
    });
}

// partial[c] = sum of squares of chunk c of x.
inline void sum_squares(Ctx& ctx, acc_t* partial, const acc_t* x, int64_t n) {
    for_rows<square_chunks, 256>(ctx, {n * sizeof(acc_t) * 1., 2. * n}, chunks_of(n), KERNEL(Group<256> g, int64_t r) {
        acc_t s = g.sum(piece(n, r, chunk), [](acc_t v) { return v * v; }, x + r * chunk);
        if (g.lane() == 0) partial[r] = s;
    });
}

// to = from, n elements.
inline void copy(Ctx& ctx, acc_t* to, const acc_t* from, int64_t n) {
    for_rows<copy_chunks, 256>(ctx, {2. * n * sizeof(acc_t), 0}, chunks_of(n), KERNEL(Group<256> g, int64_t r) {
        g.map(piece(n, r, chunk), [](acc_t& o, acc_t v) { o = v; }, out(to + r * chunk), from + r * chunk);
    });
}

// partial[0][c], [1][c], [2][c] = the sums over chunk c of a a, b b and a b.
inline void products(Ctx& ctx, acc_t* partial, const acc_t* a, const acc_t* b, int64_t n) {
    int64_t chunks = chunks_of(n);
    for_rows<product_chunks, 256>(ctx, {2. * n * sizeof(acc_t), 6. * n}, chunks, KERNEL(Group<256> g, int64_t r) {
        int size = piece(n, r, chunk);
        const acc_t *p = a + r * chunk, *q = b + r * chunk;
        acc_t aa = g.sum(size, [](acc_t v) { return v * v; }, p), bb = g.sum(size, [](acc_t v) { return v * v; }, q);
        acc_t ab = g.sum(size, [](acc_t v, acc_t u) { return v * u; }, p, q);
        if (g.lane() == 0) partial[r] = aa, partial[chunks + r] = bb, partial[2 * chunks + r] = ab;
    });
}

// ---------------------------------------------------------------------------------------------------------------------------
// The optimiser

struct AdamW {
    acc_t lr, beta1, beta2, eps, decay;        // decay is 0 for tensors that are not decayed
    acc_t clip;                                // what gradients are multiplied by
    acc_t correction1, correction2;            // 1 - beta^t
};

// What a moment becomes when it is stored as an S, given 16 random bits.
template <class S> HD acc_t as_moment(acc_t x, uint32_t r) { return std::is_same_v<S, bf16> ? (acc_t)stochastic_bf16((float)x, r) : x; }

// The random words of a piece of a chunk, one an element. Moments that are not rounded draw nothing, and a piece is a whole chunk.
template <class S> struct MomentDraws {
    static constexpr bool rounds = std::is_same_v<S, bf16>;
    static constexpr int piece = rounds ? 2048 : (int)chunk;                 // 8 KB, so that they stay near the lanes
    alignas(16) uint32_t random[rounds ? piece : 1];
};

// AdamW with decoupled decay (arXiv 1711.05101, algorithm 2), in the order of operations of torch.optim.AdamW:
//
//     g = clip * grad;   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//     w = w (1 - lr decay) - lr m' / (sqrt(v') + eps),   m' = m / (1 - beta1^t),  v' = v / (1 - beta2^t)
//
// m and v are stored as acc_t, or as bf16 rounded stochastically. To nearest, v would stand still wherever its relative change
// (1 - beta2) (g^2 / v - 1) is under half a bf16 step, 2^-9: with beta2 = 0.95 wherever g^2 is within 4% of v. Weights move by what m
// and v are before they are rounded.
//
// Draws. A Philox block is four 32-bit words; an element takes one word, its low half to round m, its high half to round v. 64
// neighbouring elements take 16 blocks: element i the word i / 16 % 4 of block i / 64 * 16 + i % 16,
//
//     element    0 .. 15    16 .. 31    32 .. 47    48 .. 63    64 .. 79
//     block      0 .. 15     0 .. 15     0 .. 15     0 .. 15    16 .. 31         so that 16 lanes that draw side by side, a block each,
//     word             0           1           2           3           0         fill four runs of 16 neighbours
//
// which depends on i alone: pieces and chunks of another size would draw the same. `id`, the tensor's number, is part of the key.
template <class S> void adamw_step(Ctx& ctx, acc_t* w, S* m, S* v, const acc_t* grad, int64_t n, AdamW o, uint32_t id) {
    typedef MomentDraws<S> Drawn;
    acc_t step = o.lr / o.correction1, root = 1 / std::sqrt(o.correction2), keep = 1 - o.lr * o.decay;
    RandomKey key = {ctx.seed, ctx.step, 0, id, 0, Purpose::moments};
    for_tiles<adamw, Drawn>(ctx, {n * (sizeof(acc_t) * 3. + sizeof(S) * 4.), n * 12.}, chunks_of(n), KERNEL(Group<256> g, int64_t r, Drawn& s) {
        auto update = [=](acc_t& wi, acc_t& mi, acc_t& vi, acc_t gi, uint32_t random = 0) {
            gi *= o.clip;
            mi = o.beta1 * mi + (1 - o.beta1) * gi;
            vi = o.beta2 * vi + (1 - o.beta2) * gi * gi;
            wi = wi * keep - step * mi / (std::sqrt(vi) * root + o.eps);
            mi = as_moment<S>(mi, random & 0xffff), vi = as_moment<S>(vi, random >> 16);
        };
        int64_t end = n < (r + 1) * chunk ? n : (r + 1) * chunk;
        for (int64_t i = r * chunk; i < end; i += Drawn::piece) {
            int size = (int)(end - i < Drawn::piece ? end - i : Drawn::piece);
            auto rows = [&](auto... random) { g.map(size, update, w + i, m + i, v + i, grad + i, random...); };
            if (Drawn::rounds) {
                g.sync();                                                     // the piece before has read its draws
                // i is a multiple of 64, so i / 64 * 16 is i / 4: k counts the 64s of this piece.
                g.draw16((size + 63) / 64, key, [=](int k) { return (uint64_t)(i / 4 + 16 * k); }, [&](int k, int lane, Words words) {
                    for (int q = 0; q < 4; q++) s.random[64 * k + 16 * q + lane] = words.w[q];
                });
                g.sync();
            }
            if constexpr (Drawn::rounds) rows((const uint32_t*)s.random);
            else rows();
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------------------
// The model: its parts, memory, then forward and backward as lists of calls.

// What backward does not keep but computes again: nothing; the two norms and SwiGLU; everything but each layer's input. Bytes kept per
// token and layer, in elements of act_t, for a LLaMA whose H D = C (a few floats of rstd and lse left out):
//
//     none    x h1 att mid h2 (C each), qkv (C + 2 KV D), gu (2F), s (F)       6 C + 2 KV D + 3 F
//     norms   without h1, h2 and s: cheap to compute, dear to keep             4 C + 2 KV D + 2 F
//     block   x                                                                C
//
// A block computed again gives the same bits: its input x was rounded to act_t before anything read it, sums have a fixed order, and a
// random draw is named by (seed, step, micro-batch, layer, operand, element), not by how many came before. What is not a function of x
// is left alone the second time: bases of split operands are not refreshed, and quantisation statistics are not counted (block_backward).
enum class Recompute { none = 0, norms = 1, block = 2 };

struct LayerWeights { acc_t *attn_norm, *ffn_norm; };
struct LayerLinears {
    Linear qkv, o, gate_up, down;
    Linear* all[4] = {&qkv, &o, &gate_up, &down};
    LayerLinears() = default;
    LayerLinears(const LayerLinears&) = delete;                           // `all` points into this very object
};
constexpr const char* linear_classes[] = {"qkv", "o", "gate_up", "down"};

// Which linear layers leave the run's recipe for bf16, and when. The head always does (and the embedding is no GEMM).
struct Precision {
    Recipe recipe, high, late;                 // the run's row; bf16, or the row itself if nothing in it is quantised; near the end
    Recipe eval;                               // evaluation's row, if eval_own
    bool eval_own = false;
    int first = 0, last = 0;                   // blocks in bf16 at either end
    bool kept[4] = {};                         // classes in bf16 in every block
    double end = 0;                            // the last fraction of training that runs `late`
    Precision() = default;
    Precision(const Recipe* row) : recipe(*row), high(is_quantised(*row) ? *find_recipe("bf16") : *row), late(*row), eval(*row) {}
};
enum class Use { train, evaluate, reference }; // reference: everything in bf16, what a shadow step compares with

// The row by which linear layer `kind` of block `layer` runs. progress: share of training that is done.
inline const Recipe* recipe_of(const Precision& p, int layers, int layer, int kind, Use use, double progress) {
    if (use == Use::reference) return find_recipe("bf16");
    if (use == Use::evaluate && p.eval_own) return &p.eval;
    if (layer < p.first || layer >= layers - p.last || p.kept[kind]) return &p.high;
    return p.end > 0 && progress >= 1 - p.end ? &p.late : &p.recipe;
}

// What split.trained makes parameters, four tensors for every W that is split: W_R, in W's own place, then U, s and V, behind the model's
// tensors in every arena. Linear layers that begin in bf16 have none.
inline std::vector<Tensor> factor_table(const std::vector<Tensor>& tensors, const Precision& p, int layers, int k) {
    std::vector<Tensor> table;
    size_t offset = arena_size(tensors);
    int next = 0;
    for (const Tensor& t : tensors) {
        int linear = next;                     // quantised tensors are the blocks' linear layers in order, four a block
        next += t.quantised;
        if (!t.quantised || !recipe_of(p, layers, linear / 4, linear % 4, Use::train, 0)->split.trained) continue;
        table.push_back({t.name + ".w_r", t.rows, t.cols, 2, true, true, 0, t.offset, {{t.name + ".w_r", t.rows}}});
        auto add = [&](const std::string& name, int64_t rows, int64_t cols, int dims) {
            table.push_back({name, rows, cols, dims, dims == 2, false, 0, offset, {{name, rows}}});
            offset += padded(table.back().size());
        };
        add(t.name + ".u", t.rows, k, 2), add(t.name + ".s", 1, k, 1), add(t.name + ".v", k, t.cols, 2);
    }
    return table;
}

// Activations of one layer: what forward computes and backward reads. With recomputation several layers share a buffer.
struct LayerActs {
    act_t* x;            // (N, C)      the layer's input, on the residual stream
    act_t* h1;           // (N, C)      rmsnorm(x): X of qkv
    acc_t* rstd1;        // (N)
    act_t* qkv;          // (N, (H+2KV) D), rotated
    act_t* att;          // (N, H D)    X of o
    act_t* att_low;      // (N, H D)    what att's rounding lost; null unless training with bf16 activations
    acc_t* lse;          // (N, H)      log-sum-exp of each row of scores: backward makes the probabilities again from it
    act_t* mid;          // (N, C)      x + o(att)
    act_t* h2;           // (N, C)      rmsnorm(mid): X of gate_up
    acc_t* rstd2;        // (N)
    act_t* gu;           // (N, 2F)     [gate | up]; after its backward, their gradients
    act_t* s;            // (N, F)      silu(gate) * up: X of down
};

// Bytes by class, for --dry-run and for allocation: both come from plan_memory().
struct MemoryPlan {
    size_t parameters, gradients, optimiser, activations, scratch, tables;
    size_t total() const { return parameters + gradients + optimiser + activations + scratch + tables; }
};

struct Model {
    Config config;
    std::vector<Tensor> tensors;
    std::vector<Tensor> factors, trained;                    // W_R, U, s, V of every W that has them; all that the optimiser moves
    size_t arena = 0;                                        // elements of each of params, grads, m, v
    int B = 0, T = 0;                                        // the largest batch and length that activations have room for
    Recompute recompute = Recompute::none;

    acc_t *params = nullptr, *grads = nullptr;
    void *m = nullptr, *v = nullptr;                         // AdamW's, as `moments` says: acc_t or bf16
    Type moments = type_of<acc_t>();
    acc_t* shadow = nullptr;                                 // a second gradient arena, if shadow steps are asked for
    bool shadows = false;
    bool training = false;                                   // bases are refreshed
    acc_t *embed_w, *embed_grad, *final_norm, *final_norm_grad;
    std::vector<LayerWeights> weights, weight_grads;
    std::unique_ptr<LayerLinears[]> linears;
    std::vector<Tensor> bases;                               // of the split recipes, if one is in use: three a linear layer, rank k
    acc_t* basis = nullptr;                                  // their arena
    std::vector<acc_t*> projected;                           // M B of each
    int k = 0;
    Linear head;
    Precision precision;

    std::vector<LayerActs> acts;
    act_t *y, *x_final, *h_final;                            // (N, C) each: a branch's output; the stream's end; its rmsnorm
    acc_t *rstd_final, *row_loss, *sums;                     // (N), (N), (2): this step's summed loss and squared gradient norm
    acc_t* logits;                                           // (head_rows, V)
    int64_t head_rows;
    act_t *dx, *dh, *d_wide;                                 // gradients of: the stream (N, C); a norm's or attention's output; ds, dqkv
    acc_t *delta, *partial, *norm_partial;                   // (N, H); (norm_chunks, C); (3, chunks of the arena)
    acc_t *cosine, *sine;                                    // (T, D/2)
    int *tokens, *targets, *bucket_token, *bucket_start, *bucket_order;
    OperandScratch operands;
    float *x_amax, *d_amax;                                  // (N) each: max |x| of each row of what forward, and backward, made last; null: no use for it
    float* tally;                                            // (operand_count, tally_sums): the quantiser's Tally of each operand
    float* scales;                                           // (tensors, 6): every linear layer's tensor scales
    MemoryPlan plan;
};

// ---------------------------------------------------------------------------------------------------------------------------
// Memory. All of it is planned before any is allocated, from three arenas:
//
//     state         parameters, gradients, m, v, bases                         4 floats a parameter: 16 bytes (12 with bf16 moments)
//     activations   what backward reads, for each layer or shared by all       grows with B T
//     scratch       what lives within one call: operands of one GEMM, logits of some rows, the split's factors
//
// plan_memory() runs twice: with null bases it measures (--dry-run, and the check against free memory), with real ones it hands out the
// same pieces. So what is reported and what is taken cannot differ, as long as no size depends on a pointer; allocate() checks it.

// Rows of logits held at once: about 64 MB of them on the CPU; 1 GB on a GPU, where every chunk prepares the head's weight anew.
inline int64_t head_chunk(int64_t N, int64_t V) { return std::min(N, std::max<int64_t>(256, ((on_gpu ? 256 : 16) << 20) / V / 256 * 256)); }

inline void plan_state(Model& m, bool train, Arena& state, MemoryPlan& plan) {
    m.params = state.take<acc_t>(m.arena), plan.parameters = state.used;
    m.grads = train ? state.take<acc_t>(m.arena) : nullptr;
    m.shadow = train && m.shadows ? state.take<acc_t>(m.arena) : nullptr;
    plan.gradients = state.used - plan.parameters;
    for (void** moment : {&m.m, &m.v}) *moment = train ? state.take<char>(m.arena * size_of(m.moments)) : nullptr;
    m.basis = m.k ? state.take<acc_t>(arena_size(m.bases)) : nullptr;
    plan.optimiser = state.used - plan.parameters - plan.gradients;
}

inline void plan_activations(Model& m, bool train, Arena& acts) {
    const Config& c = m.config;
    int64_t N = (int64_t)m.B * m.T, C = c.dim, F = c.ffn, A = (int64_t)c.heads * c.head_dim, Q = A + 2 * (int64_t)c.kv_heads * c.head_dim;
    bool keep_norms = train && m.recompute == Recompute::none, keep_block = train && m.recompute != Recompute::block;
    m.acts.assign(c.layers, {});
    LayerActs shared = {};
    // A buffer of its own for every layer if it is kept for backward, else one that all layers take turns with.
    auto each = [&](auto LayerActs::*field, int64_t size, bool keep) {
        for (int64_t l = 0; l < c.layers; l++) {
            typedef std::remove_pointer_t<std::remove_reference_t<decltype(shared.*field)>> T;
            if (keep || l == 0) shared.*field = acts.take<T>(size);
            m.acts[l].*field = shared.*field;
        }
    };
    each(&LayerActs::x, N * C, train);
    each(&LayerActs::h1, N * C, keep_norms), each(&LayerActs::rstd1, N, keep_block);
    each(&LayerActs::qkv, N * Q, keep_block);
    each(&LayerActs::att, N * A, keep_block);
    if (train && type_of<act_t>() == Type::bf16) each(&LayerActs::att_low, N * A, keep_block);
    each(&LayerActs::lse, N * c.heads, keep_block);
    each(&LayerActs::mid, N * C, keep_block);
    each(&LayerActs::h2, N * C, keep_norms), each(&LayerActs::rstd2, N, keep_block);
    each(&LayerActs::gu, N * 2 * F, keep_block), each(&LayerActs::s, N * F, keep_norms);

    // M B of every split matrix. fprop makes those of X and W, and wgrad and dgrad use them again; D's are made and used within one
    // linear_backward(), so that one buffer, the first layer's, serves all layers. The table's order is X, W, D, X, W, D, ...
    m.projected.clear();
    for (size_t i = 0; i < m.bases.size(); i++) {
        bool is_d = i % 3 == matrix_d;
        int64_t rows = i % 3 == matrix_w ? m.bases[i + 1].cols : N;              // W has as many rows as D, next in the table, has columns
        m.projected.push_back(is_d && i > 3 ? m.projected[matrix_d] : acts.take<acc_t>(rows * m.k));
    }
    m.x_final = acts.take<act_t>(N * C), m.h_final = acts.take<act_t>(N * C), m.rstd_final = acts.take<acc_t>(N);
}

// Bytes of the operands of the widest GEMM under every row that may run: a holds X or D, b holds W or X, d the second of D, where both
// are made in one pass. partials: elements of the quantiser's partial results.
struct WidestOperands {
    const Model& m;
    bool train;
    size_t a = 0, b = 0, d = 0;
    int64_t partials = 0;

    // Room for a linear layer of `rows` tokens, in -> out, by row r. grad: the type of D (the head's is acc_t, the logits').
    void widen(const Recipe& r, int64_t rows, int64_t in, int64_t out, Type grad) {
        const Cell* c = r.cell;
        Type act = type_of<act_t>(), acc = type_of<acc_t>();
        auto bytes = [&](Which which, Type source, int64_t outer, int64_t contracted) {
            int64_t thin = thin_columns(r, which, m.k), elements = outer * (contracted + thin);
            return thin ? elements * size_of(operand_type(c[which].format)) : operand_bytes(c[which], source, elements);
        };
        a = std::max({a, bytes(fprop_x, act, rows, in), bytes(dgrad_d, grad, rows, out), bytes(wgrad_d, grad, out, rows)});
        if (train && &r != &m.precision.eval && in_one_pass(r)) d = std::max(d, bytes(wgrad_d, grad, out, rows));
        b = std::max({b, bytes(fprop_w, acc, out, in), bytes(dgrad_w, acc, in, out), bytes(wgrad_x, act, in, rows)});
        for (int i = 0; i < operand_count; i++)
            if (is_quantised(c[i].format))
                partials = std::max({partials, quantise_partials(c[i], rows, in), quantise_partials(c[i], rows, out), quantise_partials(c[i], out, in)});
    }
};

// Returns how many operands of a GEMM have a place: 3 with d, else 2.
inline int plan_operands(Model& m, bool train, Arena& scratch) {
    const Config& c = m.config;
    int64_t N = (int64_t)m.B * m.T, C = c.dim, F = c.ffn, A = (int64_t)c.heads * c.head_dim, Q = A + 2 * (int64_t)c.kv_heads * c.head_dim;
    const Precision& p = m.precision;
    Type act = type_of<act_t>();
    WidestOperands w = {m, train};
    for (const Recipe* r : {&p.recipe, &p.high, &p.late, &p.eval, m.shadows ? find_recipe("bf16") : &p.high}) {
        w.widen(*r, N, C, Q, act), w.widen(*r, N, A, C, act);                    // qkv, o
        w.widen(*r, N, C, 2 * F, act), w.widen(*r, N, F, C, act);                // gate_up, down
    }
    w.widen(p.high, m.head_rows, C, c.vocab, type_of<acc_t>());                  // the head, some rows at a time
    m.operands.a = w.a ? scratch.take<char>(w.a) : nullptr;
    m.operands.b = w.b ? scratch.take<char>(w.b) : nullptr;
    // d lies where the logits were. classify() is done with them, its backward included, when the blocks' backward begins; and the head,
    // whose operands are made while logits live, runs in bf16, which is never made in d. The two are among the largest buffers.
    m.logits = (acc_t*)scratch.take<char>(std::max(m.head_rows * c.vocab * sizeof(acc_t), w.d));
    m.operands.d = w.d ? m.logits : nullptr;
    m.operands.scales = scratch.take<float>(6);
    m.operands.partials = w.partials, m.operands.partial = scratch.take<float>(w.d ? 2 * w.partials : w.partials);
    return w.d ? 3 : 2;
}

// The factors of split operands, of each place for one, and the refresh of bases.
inline void plan_subspace(Model& m, int places, Arena& scratch) {
    const Config& c = m.config;
    const Precision& p = m.precision;
    int64_t N = (int64_t)m.B * m.T, C = c.dim, F = c.ffn, A = (int64_t)c.heads * c.head_dim, Q = A + 2 * (int64_t)c.kv_heads * c.head_dim;
    int64_t k = m.k, wide = std::max({A, Q, C, 2 * F}), tall = std::max(N, wide);         // the most columns, and rows, of any X, W or D
    int q = (int)k + p.recipe.split.oversample;
    size_t size = 0;
    for (const Cell& o : p.recipe.cell) size = std::max(size, size_of(operand_type(o.format)));
    for (const Cell& o : p.eval.cell) size = std::max(size, size_of(operand_type(o.format)));
    for (int i = 0; i < places; i++) {
        SideScratch& s = m.operands.side[i];
        s.unit = scratch.take<acc_t>(tall * k), s.norms = scratch.take<acc_t>(k), s.partial = scratch.take<acc_t>((tall / 256 + 1) * k);
        s.a = scratch.take<char>(tall * k * size), s.b = scratch.take<char>(wide * k * size);
        s.low_a = scratch.take<acc_t>(tall * k), s.low_b = scratch.take<acc_t>(wide * k), s.cross = scratch.take<acc_t>(tall * k);
        s.scales = scratch.take<float>(4);
    }
    m.operands.inner = scratch.take<acc_t>(k * k);
    m.operands.merged = m.factors.empty() ? nullptr : scratch.take<acc_t>(std::max({Q * C, C * A, 2 * F * C}));
    // Only X and D, of N rows, are sampled; W is read in place, all its rows (at most `wide`), which is why y and g have room for both.
    int64_t samples = sampled_rows(p.recipe.split, (int)k, N);
    SubspaceScratch& u = m.operands.subspace;
    u.sample = scratch.take<acc_t>(samples * wide), u.z = scratch.take<acc_t>(q * wide);
    u.y = scratch.take<acc_t>(q * std::max(samples, wide)), u.g = scratch.take<acc_t>(q * std::max(samples, wide));
    u.gram = scratch.take<double>(q * q), u.vectors = scratch.take<double>(q * q + q + 2), u.state = scratch.take<int>(q + 1);
}

// Points every buffer of the model at memory, or only measures (base pointers null). `train`: gradients, optimiser, backward's buffers.
inline MemoryPlan plan_memory(Model& m, bool train, char* state_base, char* acts_base, char* scratch_base) {
    const Config& c = m.config;
    int64_t N = (int64_t)m.B * m.T, C = c.dim, F = c.ffn, A = (int64_t)c.heads * c.head_dim, Q = A + 2 * (int64_t)c.kv_heads * c.head_dim;
    MemoryPlan plan;
    Arena state{state_base}, acts{acts_base}, scratch{scratch_base};
    plan_state(m, train, state, plan);
    plan_activations(m, train, acts);
    plan.activations = acts.used;

    m.y = scratch.take<act_t>(N * C);
    m.row_loss = scratch.take<acc_t>(N), m.sums = scratch.take<acc_t>(2);
    m.head_rows = head_chunk(N, c.vocab);
    m.tokens = scratch.take<int>(N), m.targets = scratch.take<int>(N);
    if (train) {
        m.dx = scratch.take<act_t>(N * C), m.dh = scratch.take<act_t>(N * std::max(C, A)), m.d_wide = scratch.take<act_t>(N * std::max(F, Q));
        m.delta = scratch.take<acc_t>(N * c.heads), m.partial = scratch.take<acc_t>(norm_chunks(N) * C);
        m.norm_partial = scratch.take<acc_t>(3 * chunks_of(m.arena));
        m.bucket_token = scratch.take<int>(N), m.bucket_start = scratch.take<int>(N + 1), m.bucket_order = scratch.take<int>(N);
    }
    int places = plan_operands(m, train, scratch);
    if (m.k) plan_subspace(m, places, scratch);
    bool amaxes = uses_amax(m.precision.recipe) || uses_amax(m.precision.eval);
    m.x_amax = amaxes ? scratch.take<float>(N) : nullptr, m.d_amax = amaxes ? scratch.take<float>(N) : nullptr;
    m.tally = scratch.take<float>(operand_count * tally_sums), m.scales = scratch.take<float>(m.tensors.size() * 6);
    plan.scratch = scratch.used;

    m.cosine = scratch.take<acc_t>((size_t)m.T * c.head_dim / 2), m.sine = scratch.take<acc_t>((size_t)m.T * c.head_dim / 2);
    plan.tables = scratch.used - plan.scratch;
    return plan;
}

// The model's shape and memory plan, nothing allocated. `shadows`: room for a second gradient. `moments`: AdamW's, acc_t or bf16.
inline MemoryPlan measure(Model& m, const Config& c, int B, int T, Recompute recompute, const Precision& precision, bool train, bool shadows = false,
                          Type moments = type_of<acc_t>()) {
    m.config = c, m.B = B, m.T = T, m.recompute = recompute, m.precision = precision, m.shadows = shadows, m.moments = moments;
    m.tensors = tensor_table(c);
    m.k = is_split(precision.recipe) || is_split(precision.eval) ? split_rank(precision.recipe.split, c.dim) : 0;
    m.factors = factor_table(m.tensors, precision, c.layers, m.k);
    m.trained = m.tensors;
    // All factors but W_R, whose place in the arena is W's: it is in the table already.
    std::copy_if(m.factors.begin(), m.factors.end(), std::back_inserter(m.trained), [](const Tensor& t) { return !t.quantised; });
    m.arena = arena_size(m.trained);
    m.bases = m.k ? basis_table(m.tensors, m.k) : std::vector<Tensor>();
    return m.plan = plan_memory(m, train, nullptr, nullptr, nullptr);
}

// Points every linear layer at the row it runs by. Evaluation rounds to nearest: a loss should not depend on draws.
inline void set_recipes(Model& m, Use use, double progress) {
    const Precision& p = m.precision;
    for (int l = 0; l < m.config.layers; l++)
        for (int kind = 0; kind < 4; kind++) m.linears[l].all[kind]->recipe = recipe_of(p, m.config.layers, l, kind, use, progress);
    m.head.recipe = use == Use::reference ? find_recipe("bf16") : &p.high;
    m.operands.nearest = use == Use::evaluate;
    m.training = use == Use::train;
}

// Linear layer `name` of tensor `index` of the table. basis, factor: the next unused of m.bases and m.factors, moved on.
inline Linear bind_linear(Model& m, const char* name, size_t index, size_t& basis, size_t& factor, bool train) {
    const Tensor& t = m.tensors[index];
    std::string n = name;
    acc_t* grad = train ? m.grads + t.offset : nullptr;
    Linear l = {n + " fprop", n + " dgrad", n + " wgrad", t.cols, t.rows, m.params + t.offset, grad, nullptr, (uint32_t)index, m.scales + 6 * index};
    if (!t.quantised || !m.k) return l;
    l.splits.k = m.k;
    for (int i = 0; i < 3; i++, basis++) l.splits.basis[i] = m.basis + m.bases[basis].offset, l.splits.projected[i] = m.projected[basis];
    if (factor == m.factors.size() || m.factors[factor].offset != t.offset) return l;      // the next W_R is another layer's
    auto in = [&](acc_t* arena) {
        auto at = [&](int i) { return arena + m.factors[factor + i].offset; };
        return Triplets{at(1), at(2), at(3)};                                              // U, s, V behind their W_R
    };
    l.splits.factors = in(m.params);
    if (train) l.splits.grads = in(m.grads);
    factor += 4;
    return l;
}

// Allocates what measure() planned and binds weights to it. Parameters are zero until initialised or loaded.
inline void allocate(Ctx& ctx, Model& m, bool train) {
    const Config& c = m.config;
    MemoryPlan p = m.plan;
    char* state = (char*)device_alloc(p.parameters + p.gradients + p.optimiser, "parameters and optimiser");
    char* acts = (char*)device_alloc(p.activations, "activations");
    char* scratch = (char*)device_alloc(p.scratch + p.tables, "scratch");
    if (plan_memory(m, train, state, acts, scratch).total() != p.total()) fail("internal error: two plans of one model's memory differ");

    std::vector<acc_t> cosine, sine;
    rope_table(cosine, sine, c, m.T);
    to_device(ctx, m.cosine, cosine.data(), cosine.size() * sizeof(acc_t));
    to_device(ctx, m.sine, sine.data(), sine.size() * sizeof(acc_t));

    // The table's order is the model's: embed, six tensors a layer, final_norm, head unless tied.
    size_t next = 0, basis = 0, factor = 0;
    auto take = [&](acc_t*& w, acc_t*& g) {
        w = m.params + m.tensors[next].offset, g = train ? m.grads + m.tensors[next].offset : nullptr;
        next++;
    };
    auto linear = [&](const char* name) { return bind_linear(m, name, next++, basis, factor, train); };
    take(m.embed_w, m.embed_grad);
    m.weights.resize(c.layers), m.weight_grads.resize(c.layers), m.linears.reset(new LayerLinears[c.layers]);
    for (int l = 0; l < c.layers; l++) {
        take(m.weights[l].attn_norm, m.weight_grads[l].attn_norm);
        m.linears[l].qkv = linear("qkv");
        m.linears[l].o = linear("o");
        take(m.weights[l].ffn_norm, m.weight_grads[l].ffn_norm);
        m.linears[l].gate_up = linear("gate_up");
        m.linears[l].down = linear("down");
    }
    take(m.final_norm, m.final_norm_grad);
    if (c.tied) next = 0;                     // the head is the embedding: one weight, and both add to one gradient
    m.head = linear("head");
    set_recipes(m, Use::train, 0);
}

inline void initialise(Ctx& ctx, Model& m) {
    for (size_t i = 0; i < m.tensors.size(); i++) {
        const Tensor& t = m.tensors[i];
        initialise(ctx, m.params + t.offset, (int64_t)t.size(), t.init_std, {ctx.seed, 0, 0, (uint32_t)i, 0, Purpose::init});
    }
}

// Calls f(linear) for every linear layer whose factors of W are trained.
template <class F> void for_trained(const Model& m, F f) {
    for (int l = 0; l < m.config.layers; l++)
        for (const Linear* lin : m.linears[l].all)
            if (lin->splits.factors.u) f(*lin);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Forward
//
// The residual stream is never one buffer: each layer's input x and its middle `mid` are kept, since backward through a norm needs what
// the norm saw. An addition to the stream is fused with the norm that reads it (residual_rmsnorm): one pass over memory in place of two.
// So a branch leaves its output in m.y, and the next norm adds it.
//
//     acts[l].x ---------------(+)--> acts[l].mid ------------(+)--> acts[l+1].x
//        | norm  h1             | y       | norm  h2           | y
//        +-> qkv -> att -> o ---+         +-> gate_up -> s -> down

// Block l from its normalised input h1 to down's input s; what it adds to the stream is down(s) on top of mid.
// x_amax: each kernel that makes the input of a linear layer notes the rows' largest elements, which its quantiser then finds there.
// (Attention does not; o's quantiser looks for itself.)
inline void block_forward(Ctx& ctx, Model& m, int l, Heads shape) {
    const Config& c = m.config;
    const LayerActs& a = m.acts[l];
    const LayerLinears& w = m.linears[l];
    int64_t N = (int64_t)shape.B * shape.T;
    linear_forward(ctx, w.qkv, m.operands, a.qkv, mat(a.h1, c.dim, m.x_amax), N);                  // (N, C) -> (N, (H + 2 KV) D)
    rotate(ctx, a.qkv, {m.cosine, m.sine}, shape, 1);                                              // q and k in place; v as it is
    attention_forward(ctx, a.att, a.att_low, a.lse, a.qkv, shape);                                 // -> (N, H D), lse (N, H)
    linear_forward(ctx, w.o, m.operands, m.y, mat(a.att, w.o.in), N);                              // -> y (N, C)
    // mid = x + y; h2 = rmsnorm(mid), both (N, C)
    residual_rmsnorm(ctx, a.mid, a.h2, a.rstd2, a.x, m.y, m.weights[l].ffn_norm, N, c.dim, (acc_t)c.norm_eps, m.x_amax);
    linear_forward(ctx, w.gate_up, m.operands, a.gu, mat(a.h2, c.dim, m.x_amax), N);               // (N, C) -> (N, 2F)
    swiglu(ctx, a.s, a.gu, N, c.ffn, m.x_amax);                                                    // -> (N, F)
}

// For replay(): the name of block l's launches, and whether they are those of the last micro-batch: training, nothing counted, no basis refreshed.
inline GraphKey block_key(const Model& m, int l, bool backward, int B, int T) {
    GraphKey key = {backward, l, B, T};
    for (int i = 0; i < 4; i++) key[4 + i] = (int64_t)m.linears[l].all[i]->recipe;
    return key;
}
inline bool repeats(const Ctx& ctx, const Model& m, int l) {
    bool same = m.training && !m.operands.tally;
    for (const Linear* lin : m.linears[l].all) same = same && !(is_split(*lin->recipe) && refresh_due(ctx, *lin));
    return same;
}

inline Heads heads_of(const Config& c, int B, int T) { return {B, T, c.heads, c.kv_heads, c.head_dim}; }

// Tokens (B x T, on the host) to h_final (N, C). B T may be less than the model has room for.
inline void forward(Ctx& ctx, Model& m, const int* tokens, int B, int T) {
    const Config& c = m.config;
    Heads shape = heads_of(c, B, T);
    int64_t N = (int64_t)B * T;
    acc_t eps = (acc_t)c.norm_eps;
    m.operands.refresh = m.training;
    to_device(ctx, m.tokens, tokens, N * sizeof(int));
    embed(ctx, m.acts[0].x, m.embed_w, m.tokens, N, c.dim);                                        // (N) -> (N, C)
    for (int l = 0; l < c.layers; l++) {
        const LayerActs& a = m.acts[l];
        const act_t* stream = l == 0 ? a.x : m.acts[l - 1].mid;               // the last block's output is mid + y, added here
        replay(ctx, block_key(m, l, false, B, T), repeats(ctx, m, l), [&] {
            // x = mid of the last block + y; h1 = rmsnorm(x), both (N, C)
            residual_rmsnorm(ctx, a.x, a.h1, a.rstd1, stream, l == 0 ? nullptr : m.y, m.weights[l].attn_norm, N, c.dim, eps, m.x_amax);
            block_forward(ctx, m, l, shape);
            linear_forward(ctx, m.linears[l].down, m.operands, m.y, mat(a.s, c.ffn, m.x_amax), N);  // (N, F) -> y (N, C)
        });
    }
    residual_rmsnorm(ctx, m.x_final, m.h_final, m.rstd_final, m.acts[c.layers - 1].mid, m.y, m.final_norm, N, c.dim, eps);
}

// sums[0] += the sum over tokens of the loss; with dloss != 0 also the head's backward: dh (N, C) = the gradient of h_final and
// the head's weight gradient, both of dloss times that sum. A chunk of rows at a time, since all logits (N, V) at once would be the
// largest buffer by far: 4.2 GB for 8192 tokens of LLaMA-3's 128256 words. Each chunk's logits become their own gradient, in place.
inline void classify(Ctx& ctx, Model& m, const int* targets, int64_t N, acc_t dloss) {
    const Config& c = m.config;
    to_device(ctx, m.targets, targets, N * sizeof(int));
    for (int64_t r = 0; r < N; r += m.head_rows) {
        int64_t rows = std::min(m.head_rows, N - r);
        Mat h = mat(m.h_final + r * c.dim, c.dim);
        linear_forward(ctx, m.head, m.operands, m.logits, h, rows);                                // (rows, C) -> (rows, V)
        softmax_cross_entropy(ctx, m.row_loss + r, m.logits, m.targets + r, rows, c.vocab, dloss); // logits -> dlogits
        if (dloss != 0) linear_backward(ctx, m.head, m.operands, m.dh + r * c.dim, mat(m.logits, c.vocab), h, rows);
    }
    add_sum(ctx, m.sums, m.row_loss, N);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Backward
//
// m.dx (N, C) is the gradient of the residual stream on its way up. A branch x + f(norm(x)) passes it on as it is, and rmsnorm_grad()
// adds to it what comes back through f. m.dh holds the gradient of a norm's output (or of attention's), m.d_wide that of s or of qkv.
// linear_backward(.., dx, d, x) reads D = d and X = x, writes dX over dx and adds dW to the gradient arena.

// Gradients through block l: m.dx, of its output, becomes that of its input.
inline void block_backward(Ctx& ctx, Model& m, int l, Heads shape) {
    const Config& c = m.config;
    int64_t N = (int64_t)shape.B * shape.T, C = c.dim;
    const LayerActs& a = m.acts[l];
    const LayerLinears& w = m.linears[l];
    const LayerWeights &p = m.weights[l], &g = m.weight_grads[l];
    acc_t eps = (acc_t)c.norm_eps;
    // What was not kept, from the kept x (or mid), by forward's own kernels on the same numbers.
    if (m.recompute != Recompute::none) residual_rmsnorm(ctx, nullptr, a.h1, a.rstd1, a.x, nullptr, p.attn_norm, N, c.dim, eps, m.x_amax);
    if (m.recompute == Recompute::block) {                                // done again, not anew: bases stay, nothing is counted twice
        float* tally = m.operands.tally;
        m.operands.refresh = false, m.operands.tally = nullptr;
        block_forward(ctx, m, l, shape);
        m.operands.refresh = m.training, m.operands.tally = tally;
    }
    if (m.recompute == Recompute::norms) {
        residual_rmsnorm(ctx, nullptr, a.h2, a.rstd2, a.mid, nullptr, p.ffn_norm, N, c.dim, eps);
        swiglu(ctx, a.s, a.gu, N, c.ffn);
    }
    // The second branch, mid + down(swiglu(gate_up(norm(mid)))): dx comes in as the gradient of the sum ...
    linear_backward(ctx, w.down, m.operands, m.d_wide, mat(m.dx, C, m.d_amax), mat(a.s, c.ffn), N);                 // ds (N, F)
    swiglu_grad(ctx, a.gu, m.d_wide, N, c.ffn, m.d_amax);                                                           // dgu (N, 2F)
    linear_backward(ctx, w.gate_up, m.operands, m.dh, mat(a.gu, 2 * c.ffn, m.d_amax), mat(a.h2, C), N);             // dh2 (N, C)
    // ... and is that of mid after this. The first branch, x + o(attention(rope(qkv(norm(x))))), likewise.
    rmsnorm_grad(ctx, m.dx, g.ffn_norm, m.partial, m.dh, a.mid, a.rstd2, p.ffn_norm, N, c.dim, m.d_amax);
    linear_backward(ctx, w.o, m.operands, m.dh, mat(m.dx, C, m.d_amax), mat(a.att, w.o.in), N);                     // datt (N, H D)
    // dqkv (N, (H + 2 KV) D), of q and k before they were rotated
    attention_backward(ctx, m.d_wide, m.delta, m.dh, a.qkv, a.att, a.att_low, a.lse, shape, {m.cosine, m.sine});
    linear_backward(ctx, w.qkv, m.operands, m.dh, mat(m.d_wide, w.qkv.out), mat(a.h1, C), N);                       // dh1 (N, C)
    rmsnorm_grad(ctx, m.dx, g.attn_norm, m.partial, m.dh, a.x, a.rstd1, p.attn_norm, N, c.dim, m.d_amax);
}

// Gradients of every parameter, added to m.grads, after forward() and classify() with dloss != 0 on the same tokens.
inline void backward(Ctx& ctx, Model& m, const int* tokens, int B, int T) {
    const Config& c = m.config;
    Heads shape = heads_of(c, B, T);
    int64_t N = (int64_t)B * T, C = c.dim;
    set_zero(ctx, m.dx, N * C * sizeof(act_t));                           // nothing goes past the last norm
    rmsnorm_grad(ctx, m.dx, m.final_norm_grad, m.partial, m.dh, m.x_final, m.rstd_final, m.final_norm, N, c.dim, m.d_amax);
    for (int l = c.layers - 1; l >= 0; l--)
        replay(ctx, block_key(m, l, true, B, T), repeats(ctx, m, l), [&] { block_backward(ctx, m, l, shape); });
    // dx is now the gradient of embed[token]. A tied embedding has the head's gradient in it already: this is added.
    TokenBuckets buckets(tokens, N);
    to_device(ctx, m.bucket_token, buckets.token.data(), buckets.token.size() * sizeof(int));
    to_device(ctx, m.bucket_start, buckets.start.data(), buckets.start.size() * sizeof(int));
    to_device(ctx, m.bucket_order, buckets.order.data(), buckets.order.size() * sizeof(int));
    embed_backward(ctx, m.embed_grad, m.dx, m.bucket_token, m.bucket_start, m.bucket_order, (int64_t)buckets.token.size(), N, c.dim);
}

// AdamW on trained tensor i; `o` but for its decay.
inline void adamw_step(Ctx& ctx, Model& m, size_t i, AdamW o, acc_t decay) {
    const Tensor& t = m.trained[i];
    o.decay = t.decay ? decay : 0;
    auto move = [&](auto* first, auto* second) {
        adamw_step(ctx, m.params + t.offset, first + t.offset, second + t.offset, m.grads + t.offset, (int64_t)t.size(), o, (uint32_t)i);
    };
    if (m.moments == Type::bf16) move((bf16*)m.m, (bf16*)m.v);
    else move((acc_t*)m.m, (acc_t*)m.v);
}

// Model FLOPs of one training token, PaLM's count (arXiv 2204.02311, appendix B) with the causal half of attention: 6 per weight
// of every GEMM (2 forward, 4 backward), and 6 H D (T + 1) a layer. Recomputation is not counted, nor what a recipe adds.
inline double flops_per_token(const Config& c, int T) {
    double weights = (double)c.vocab * c.dim;
    for (const Tensor& t : tensor_table(c))
        if (t.quantised) weights += t.size();
    return 6 * weights + 6.0 * c.layers * c.heads * c.head_dim * (T + 1);
}
