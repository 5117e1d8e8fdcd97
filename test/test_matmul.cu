// test_matmul.cu: matmul.cuh, attention.cuh and the linear layer of metis.cuh against plain loops in double.
//
//     make build/cpu/test_matmul && build/cpu/test_matmul          -v also prints how much of its tolerance each test used
//
// How it tests, and where its bounds come from: device_test.h.
#include "../attention.cuh"
#include "../metis.cuh"
#include "device_test.h"

struct Shape { int64_t m, n, k; };

// ---------------------------------------------------------------------------------------------------------------------------
// matmul

// A tensor core aligns a few products to the largest and cuts what falls off: less exact than a float addition, by up to 2^3.
static double product_u(Type t) { return on_gpu && t == Type::bf16 ? 8 * u : u; }

// `integers`: operands in {-1, 0, 1} and C in [-8, 8]. Then every partial sum is an integer far below 256 (a walk of k <= 2049
// steps of variance 4/9 ends 30 away; 256 is 8 standard deviations), exact as float and as bf16: the result must be equal.
// Otherwise reals: products of floats are rounded once and each goes through at most k additions.
template <class A, class C> static void test_product(Run& r, int64_t m, int64_t n, int64_t k, bool ta, bool tb, int beta, bool integers) {
    int64_t pad = ta ^ tb ^ (beta != 0) ? 0 : 5, a_rows = ta ? k : m, a_cols = ta ? m : k, b_rows = tb ? n : k, b_cols = tb ? k : n;
    int64_t lda = a_cols + pad, ldb = b_cols + 2 * pad, ldc = n + pad;
    r.at("%s%s%s %ldx%ldx%ld beta %d, %d-byte operands, %s", ta ? "A^T " : "A ", tb ? "B^T " : "B ", pad ? "padded" : "", (long)m, (long)n,
         (long)k, beta, (int)sizeof(A), integers ? "integers" : "reals");
    Rng rng{(uint64_t)(m * 31 + n * 7 + k)};
    auto draw = [&](int64_t i, int64_t ld, int64_t cols) { return i % ld >= cols ? NAN : integers ? rng.below(3) - 1 : rng(1); };
    Buffer<A> a(r, (a_rows - 1) * lda + a_cols, [&](int64_t i) { return draw(i, lda, a_cols); });
    Buffer<A> b(r, (b_rows - 1) * ldb + b_cols, [&](int64_t i) { return draw(i, ldb, b_cols); });
    Buffer<C> c(r, (m - 1) * ldc + n);                                        // NaN: beta 0 must not multiply what is there
    if (beta) {
        for (int64_t i = 0; i < c.n; i++)
            if (i % ldc < n) assign(&c.host[i], integers ? rng.below(17) - 8 : rng(1));
        c.send();
    }
    std::vector<C> before = c.host;
    Mat A_ = mat(a.p, lda), B_ = mat(b.p, ldb);
    matmul(r.ctx, "test", c.p, ldc, ta ? A_.transposed() : A_, tb ? B_.transposed() : B_, m, n, k, beta);
    c.fetch();
    if (!r.compare) return;
    std::vector<double> x(m * k), y(n * k);                                   // A, and B's transpose: both read along k
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < k; p++) x[i * k + p] = ta ? a[p * lda + i] : a[i * lda + p];
    for (int64_t j = 0; j < n; j++)
        for (int64_t p = 0; p < k; p++) y[j * k + p] = tb ? b[j * ldb + p] : b[p * ldb + j];
    const double step = (k + 2) * product_u(type_of<A>());
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double s = beta ? value(before[i * ldc + j]) : 0, size = std::fabs(s);
            for (int64_t p = 0; p < k; p++) {
                double t = x[i * k + p] * y[j * k + p];
                s += t, size += std::fabs(t);
            }
            double tol = integers ? 0 : step * size + (sizeof(C) == 2 ? act_u : u) * std::fabs(s);
            r.verdict.close(c[i * ldc + j], s, tol, "C", i * ldc + j);
        }
    for (int64_t i = 0; i < c.n; i++)
        if (i % ldc >= n) r.verdict.note(!memcmp(&c.host[i], &before[i], sizeof(C)), "wrote between rows of C, at %ld", (long)i);
}

template <class A, class C> static void test_products(Run& r) {
    const Shape shapes[] = {{1, 1, 1}, {1, 7, 33}, {3, 5, 7}, {17, 33, 16}, {64, 48, 100}, {255, 96, 31}, {256, 1024, 8},
                            {257, 1025, 17}, {511, 64, 65}, {513, 1023, 3}, {33, 2049, 16}, {5, 16, 2049}, {600, 1, 5}};
    for (auto [m, n, k] : shapes)
        for (int combination = 0; combination < 8; combination++)
            for (bool integers : {true, false}) test_product<A, C>(r, m, n, k, combination & 1, combination & 2, combination >> 2, integers);
}

#ifndef __CUDACC__
// The plain loops promise more: a chain of fused multiply-adds over ascending k from 0, then one addition. To the bit.
template <class T> static void test_plain_loops(Run& r) {
    const Shape shapes[] = {{1, 1, 1}, {3, 15, 7}, {4, 16, 33}, {5, 17, 100}, {9, 40, 513}};
    for (auto [m, n, k] : shapes)
        for (int combination = 0; combination < 8; combination++) {
            bool ta = combination & 1, tb = combination & 2, add = combination & 4;
            r.at("%d-byte reals, %ldx%ldx%ld, combination %d", (int)sizeof(T), (long)m, (long)n, (long)k, combination);
            Rng rng{(uint64_t)(k + combination)};
            std::vector<T> a(m * k), b(k * n), c(m * n), before(m * n), panel(16 * k);
            for (T& v : a) v = (T)rng(1);
            for (T& v : b) v = (T)rng(1);
            for (T& v : before) v = (T)rng(1);
            c = add ? before : std::vector<T>(m * n, (T)NAN);
            plain_tile<T>(c.data(), n, {a.data(), type_of<T>(), ta ? m : k, ta}, {b.data(), type_of<T>(), tb ? k : n, tb}, m, n, k, add, panel.data());
            for (int64_t i = 0; i < m * n; i++) {
                T s = 0;
                for (int64_t p = 0; p < k; p++) s = std::fma(a[ta ? p * m + i / n : i / n * k + p], b[tb ? i % n * k + p : p * n + i % n], s);
                if (add) s = before[i] + s;
                r.verdict.note(c[i] == s, "C[%ld] is %.17g, not %.17g", (long)i, (double)c[i], (double)s);
            }
        }
}
#endif

#ifdef __CUDACC__
// ---------------------------------------------------------------------------------------------------------------------------
// Native FP8 and FP4. The emulated cuBLASLt decodes with tables of its own and refuses what NVIDIA's documentation refuses.

// P (m x k) Q (n x k)^T of the same operands, packed and as bf16 values. Rows and blocks differ by powers of two: a scale byte in a
// wrong place shows. The matrices lie as X, W or D do: the contracted axis along their rows, or down their columns.
template <class C> static void test_native_product(Run& r, Cell p, Cell q, Axis axis_p, Axis axis_q, int64_t m, int64_t n, int64_t k, int beta) {
    r.at("%s %s x %s %s, %ldx%ldx%ld, beta %d, %d-byte C", cell_text(p).c_str(), axis_p == Axis::row ? "rows" : "columns", cell_text(q).c_str(),
         axis_q == Axis::row ? "rows" : "columns", (long)m, (long)n, (long)k, beta, (int)sizeof(C));
    Rng rng{(uint64_t)(m * 31 + n * 7 + k)};
    struct Side {
        Cell cell;
        Axis axis;
        int64_t outer, inner, rows, cols;
        Buffer<float> from, scale, partial;
        Buffer<bf16> values;
        Buffer<uint8_t> packed;
        Mat wide, narrow;
        Side(Run& r, Rng& rng, Cell c, Axis a, int64_t outer_, int64_t inner_)
            : cell(c), axis(a), outer(outer_), inner(inner_), rows(a == Axis::row ? outer : inner), cols(a == Axis::row ? inner : outer),
              from(r, outer * inner, [&](int64_t i) {
                  int64_t o = axis == Axis::row ? i / cols : i % cols, in = axis == Axis::row ? i % cols : i / cols;
                  return rng(3) * std::ldexp(1, (int)((o * 5 + in / 16 * 3) % 7) - 3);
              }), scale(r, 2), partial(r, quantise_partials(c, rows, cols)), values(r, outer * inner), packed(r, outer * inner * 2) {
            QuantCall call = {cell, axis, rows, cols, {}, {}, scale.p, partial.p};
            wide = mat(values.p, cols), narrow = {nullptr, narrow_type(cell), inner};
            narrow.data = packed.p, narrow.scale = nullptr;
            if (has_scale_bytes(cell)) narrow.blocks = packed.p + packed_bytes(cell, outer, inner);
            quantise_operand(r.ctx, call, wide, mat(from.p, cols));
            if (has_row_scales(cell)) call.row_scale = (float*)(packed.p + packed_bytes(cell, outer, inner)), narrow.blocks = (const uint8_t*)call.row_scale;
            quantise_operand(r.ctx, call, narrow, mat(from.p, cols));
            if (has_tensor_scale(cell)) wide.scale = narrow.scale = scale.p + 1;
            if (axis == Axis::column) wide = wide.transposed();
            values.fetch();
            if (has_tensor_scale(cell)) scale.fetch();
        }
        double at(int64_t o, int64_t i) const { return values[axis == Axis::row ? o * cols + i : i * cols + o]; }
    };
    Side a(r, rng, p, axis_p, m, k), b(r, rng, q, axis_q, n, k);
    auto start = [&](int64_t) { return beta ? rng(1) : NAN; };
    Buffer<C> native(r, m * n, start), emulated(r, m * n);
    emulated.host = native.host, emulated.send();
    std::vector<double> before = native.values();
    MatmulKey key = matmul_key(a.narrow, b.narrow.transposed(), m, n, k, n, type_of<C>(), beta);
    if (!r.ctx.plans->has(key)) {                     // a layer falls back; on the emulated device every shape of this test is to be found
#ifdef METIS_EMULATED
        r.verdict.note(false, "no kernel");
#endif
        return;
    }
    matmul(r.ctx, "test", native.p, n, a.narrow, b.narrow.transposed(), m, n, k, beta);
    matmul(r.ctx, "test", emulated.p, n, a.wide, b.wide.transposed(), m, n, k, beta);
    native.fetch(), emulated.fetch();
    if (!r.compare) return;
    double alpha = (a.wide.scale ? a.scale[1] : 1) * (b.wide.scale ? b.scale[1] : 1);
    r.verdict.note(has_tensor_scale(p) == (alpha != 1), "alpha is %g: the test has no edge", alpha);
    for (int64_t i = 0; i < m * n; i++) {
        double s = 0, size = 0;
        for (int64_t x = 0; x < k; x++) s += a.at(i / n, x) * b.at(i % n, x), size += std::fabs(a.at(i / n, x) * b.at(i % n, x));
        s *= alpha, size *= alpha;
        if (beta) s += before[i], size += std::fabs(before[i]);
        double tol = (k + 5) * 8 * u * size + (sizeof(C) == 2 ? act_u : u) * std::fabs(s);
        r.verdict.close(native[i], s, tol + native_error(a.narrow.type) * size, "native C", i);
        r.verdict.close(emulated[i], s, tol, "emulated C", i);
    }
}

static void test_native(Run& r) {
    typedef std::vector<std::pair<Cell, Cell>> Pairs;
    const Cell mx8_sq = {Format::mxfp8, Block::square, rn, Scale::ceil};
    const Pairs tensorwise = {{fp8, fp8}, {fp8g, fp8}, {fp8, fp8g}, {mx4_8, mx4_8}, {mx4_8g, mx4_8}, {nvf_8, nvf_8g}, {fp8, mx4_8}}, blocks = {{mx8, mx8}, {mx8, mx8_sq}, {nvf, nvf}, {nvf, nvf_sq}, {f8r, f8r}};
    const Shape shapes[] = {{16, 16, 32}, {48, 80, 96}, {144, 272, 160}, {272, 16, 256}};      // tiles of 128 x 4 scales: parts of one, several
    int served = 0;
    for (const std::string& sm : targets({"90", "100", "120"})) {
        with_plans(r, sm, true, [&] {
            MatmulPlans& plans = *r.ctx.plans;
            r.at("sm_%s", sm.c_str());
            for (const Pairs& pairs : {tensorwise, blocks})
                for (auto [p, q] : pairs) {
                    bool offered = plans.serves(narrow_type(p), narrow_type(q));
                    served += offered;
#ifdef METIS_EMULATED
                    r.verdict.note(offered == (has_row_scales(p) ? std::stoi(sm) == 90 : !has_scale_bytes(p) || std::stoi(sm) >= 100), "%s x %s is %soffered", cell_text(p).c_str(), cell_text(q).c_str(), offered ? "" : "not ");
#endif
                    if (!offered) continue;
                    for (auto [m, n, k] : shapes)
                        for (int i = 0; i < 4; i++) {
                            Axis a = i & 1 ? Axis::column : Axis::row, b = i & 2 ? Axis::column : Axis::row;
                            test_native_product<float>(r, p, q, a, b, m, n, k, i == 2);
                            test_native_product<act_t>(r, p, q, a, b, m, n, k, i == 1);
                        }
                }
            r.at("sm_%s, what is not offered", sm.c_str());
            auto refused = [&](Mat a, Mat b, int64_t m, int64_t n, int64_t k) { r.verdict.note(!plans.has(matmul_key(a, b, m, n, k, n, Type::f32, false)), "a %ldx%ldx%ld product is offered", (long)m, (long)n, (long)k); };
            auto sides = [&](Type t, int64_t k) { return Mat{nullptr, t, k}; };
            r.verdict.note(!plans.serves(Type::fp8_e5m2, Type::fp8_e5m2) && !plans.serves(Type::f32, Type::f32) && !plans.serves(Type::nvfp4, Type::fp8) &&
                           !plans.serves(Type::mxfp8, Type::fp8) && !plans.serves(Type::fp8_row, Type::fp8) && !plans.serves(Type::nvfp4, Type::bf16) && !plans.serves(Type::mxfp8, Type::nvfp4), "pairs that cuBLASLt has not");
            for (Type t : {Type::fp8, Type::fp8_row, Type::mxfp8, Type::nvfp4}) {
                refused(sides(t, 64), sides(t, 64).transposed(), 40, 64, 64), refused(sides(t, 64), sides(t, 64).transposed(), 64, 40, 64);
                refused(sides(t, 72), sides(t, 72).transposed(), 64, 64, 72);
                if (t != Type::fp8 && t != Type::fp8_row) refused(sides(t, 48), sides(t, 48).transposed(), 64, 64, 48);
                if (t != Type::nvfp4 && sm != "90") continue;             // "TN" is all that FP4 has, and on sm_90 all that FP8 has
                refused(sides(t, 64), sides(t, 64), 64, 64, 64), refused(sides(t, 64).transposed(), sides(t, 64).transposed(), 64, 64, 64);
            }
        });
#ifdef METIS_EMULATED
        setenv("EMULATED_NO_BETA", "1", 1);
        with_plans(r, sm, true, [&] { r.verdict.note(!r.ctx.plans->serves(Type::fp8, Type::fp8), "products that are refused once they are asked for"); });
        unsetenv("EMULATED_NO_BETA");
#endif
        with_plans(r, sm, false, [&] { r.verdict.note(!r.ctx.plans->serves(Type::fp8, Type::fp8) && !r.ctx.plans->serves(Type::nvfp4, Type::nvfp4), "METIS_NATIVE=0 is not obeyed"); });
    }
    if (!served) printf("left out: native FP8 and FP4 GEMMs, which this GPU has not\n");
}
#endif

// ---------------------------------------------------------------------------------------------------------------------------
// attention

// Bounds. A score s = q.k / sqrt(D) errs by e <= (D + 4) u |q|.|k| / sqrt(D), hence p = exp(s - m) by 2 e + 8 u of itself (the
// difference of two scores, a subtraction of numbers as large as them, exp_). A sum over keys adds T u. act_u per p allows a
// kernel to feed tensor cores probabilities in act_t. Backward is computed from the forward's own stored results, so that only its
// own errors count; the reference reads the same ones.
static void test_attention_shape(Run& r, Heads s, double spread) {
    int T = s.T, H = s.H, D = s.D, group = s.H / s.KV;
    int64_t N = (int64_t)s.B * T, Q = s.row(), A = (int64_t)H * D;
    r.at("T %d, heads %d/%d of %d, spread %g", T, H, s.KV, D, spread);
    Rng rng{(uint64_t)(T * 100 + H)};
    Buffer<act_t> qkv(r, N * Q, [&](int64_t) { return rng(spread); }), dout(r, N * A, [&](int64_t) { return rng(1); }), out(r, N * A), low(r, N * A), dqkv(r, N * Q);
    bool lossy = sizeof(act_t) == 2;                                          // then O is out + low, and backward reads both
    Buffer<acc_t> lse(r, N * H), delta(r, N * H);
    attention_forward(r.ctx, out.p, lossy ? low.p : nullptr, lse.p, qkv.p, s);
    out.fetch(), low.fetch(), lse.fetch();
    attention_backward(r.ctx, dqkv.p, delta.p, dout.p, qkv.p, out.p, lossy ? low.p : nullptr, lse.p, s);
    dqkv.fetch();
    // The same, turned back by angles: any will do.
    Buffer<acc_t> cosine(r, (int64_t)T * D / 2, [](int64_t i) { return std::cos(0.7 * i); }), sine(r, (int64_t)T * D / 2, [](int64_t i) { return std::sin(0.7 * i); });
    Buffer<act_t> back(r, N * Q);
    attention_backward(r.ctx, back.p, delta.p, dout.p, qkv.p, out.p, lossy ? low.p : nullptr, lse.p, s, {cosine.p, sine.p});
    back.fetch();
    if (!r.compare) return;
    const double scale = 1 / std::sqrt((double)D), sum_u = (2 * T + 8 * group + 40) * u;
    std::vector<double> x = qkv.values(), g = dout.values(), o = out.values(), want(N * Q), tol(N * Q);
    std::vector<double> score(T), err(T);
    for (int b = 0; b < s.B; b++)
        for (int h = 0; h < H; h++)
            for (int i = 0; i < T; i++) {
                int64_t row = (int64_t)b * T + i, q_at = row * Q + h * D, o_at = row * A + h * D;
                auto key = [&](int j) { return ((int64_t)b * T + j) * Q + (H + h / group) * D; };
                auto val = [&](int j) { return key(j) + s.KV * D; };
                double m = -INFINITY, e = 0, sum = 0;
                for (int j = 0; j <= i; j++) {
                    double dot = 0, size = 0;
                    for (int d = 0; d < D; d++) dot += x[q_at + d] * x[key(j) + d], size += std::fabs(x[q_at + d] * x[key(j) + d]);
                    score[j] = dot * scale, err[j] = (D + 4) * u * size * scale;
                    m = std::max(m, score[j]), e = std::max(e, err[j]);
                }
                for (int j = 0; j <= i; j++) sum += std::exp(score[j] - m);
                double log_sum = m + std::log(sum), L = lse[row * H + h];
                r.verdict.close(L, log_sum, e + sum_u + 4 * u * (1 + std::fabs(m) + std::fabs(log_sum)), "lse", row * H + h);
                for (int d = 0; d < D; d++) {
                    double v = 0, size = 0;
                    for (int j = 0; j <= i; j++) {
                        double t = std::exp(score[j] - log_sum) * x[val(j) + d];
                        v += t, size += std::fabs(t);
                    }
                    r.verdict.close(o[o_at + d], v, (2 * e + sum_u + act_u) * size + act_u * std::fabs(v) + 1e-36, "out", o_at + d);
                    if (lossy) r.verdict.note(std::fabs(low[o_at + d]) <= act_u * std::fabs(o[o_at + d]) + 1e-36, "low is more than rounding lost");
                    if (lossy) o[o_at + d] += low[o_at + d];
                }
                double dl = 0, dl_size = 0;
                for (int d = 0; d < D; d++) dl += g[o_at + d] * o[o_at + d], dl_size += std::fabs(g[o_at + d] * o[o_at + d]);
                for (int j = 0; j <= i; j++) {
                    double p = std::exp(score[j] - L), dp = 0, dp_size = 0, p_err = err[j] + 4 * u * (2 + std::fabs(L)) + act_u;
                    for (int d = 0; d < D; d++) dp += g[o_at + d] * x[val(j) + d], dp_size += std::fabs(g[o_at + d] * x[val(j) + d]);
                    double ds = p * (dp - dl) * scale;
                    double ds_err = p * scale * (p_err * std::fabs(dp - dl) + (D + 8) * u * (dp_size + dl_size)) + (act_u + sum_u) * std::fabs(ds);
                    for (int d = 0; d < D; d++) {
                        want[q_at + d] += ds * x[key(j) + d], tol[q_at + d] += ds_err * std::fabs(x[key(j) + d]);
                        want[key(j) + d] += ds * x[q_at + d], tol[key(j) + d] += ds_err * std::fabs(x[q_at + d]);
                        want[val(j) + d] += p * g[o_at + d], tol[val(j) + d] += p * (p_err + sum_u) * std::fabs(g[o_at + d]);
                    }
                }
            }
    for (int64_t i = 0; i < N * Q; i++) r.verdict.close(dqkv[i], want[i], tol[i] + act_u * std::fabs(want[i]) + 1e-36, "dqkv", i);
    const bool twice = lossy && D != 64 && D != 128;                          // plain kernels round before they turn, too
    for (int64_t i = 0; i < N * Q; i++) {
        int64_t d = i % D, half = D / 2, head = i % Q / D, at = i / Q % T * half + d % half, other = d < half ? i + half : i - half;
        if (head >= H + s.KV) {
            r.verdict.note(back[i] == dqkv[i], "dV[%ld] is turned", (long)i);
            continue;
        }
        double cs = cosine[at], sn = d < half ? sine[at] : -sine[at], v = want[i] * cs + want[other] * sn, size = std::fabs(want[i] * cs) + std::fabs(want[other] * sn);
        r.verdict.close(back[i], v, tol[i] * std::fabs(cs) + tol[other] * std::fabs(sn) + 4 * u * size + act_u * (std::fabs(v) + twice * size) + 1e-36, "dqkv turned back", i);
    }
}

static void test_attention(Run& r) {
    for (int T : {1, 17, 63, 64, 65, 130, 200}) {
        test_attention_shape(r, {2, T, 6, 2, 8}, 2);
        test_attention_shape(r, {2, T, 4, 4, 64}, 1);
        test_attention_shape(r, {1, T, 3, 1, 128}, 1);
    }
    test_attention_shape(r, {1, 70, 2, 1, 16}, 20);                           // scores of hundreds: one-hot rows, no overflow
}

// A NaN in one key or value reaches every output that may look at it: this query head's group, this row and later ones.
static void test_attention_nan(Run& r) {
    for (int D : {8, 64})
    for (int part : {0, 1, 2}) {                                              // of the query, key, value of row 66
        Heads s = {1, 70, 4, 2, D};
        r.at("NaN in part %d of heads of %d", part, D);
        Rng rng{3};
        Buffer<act_t> qkv(r, s.T * s.row(), [&](int64_t) { return rng(1); }), out(r, s.T * 4 * D);
        Buffer<acc_t> lse(r, s.T * 4);
        assign(&qkv.host[66 * s.row() + (part == 0 ? 2 : part == 1 ? 4 + 1 : 4 + 2 + 1) * D], NAN);
        qkv.send();
        attention_forward(r.ctx, out.p, nullptr, lse.p, qkv.p, s);
        out.fetch();
        auto finite = [&](int i) { return is_finite((float)out[i * 4 * D + 2 * D]); };                               // head 2
        for (int i = 66; i < (part == 0 ? 67 : s.T); i++) r.verdict.note(!finite(i), "row %d is finite", i);
        for (int i = 0; i < 64; i++) r.verdict.note(finite(i), "row %d is not finite", i);
    }
}

// The failure of arXiv 2510.04212, made to order: two keys share the largest score, all others weigh little and have the lowest values.
// O then lies a little below (v1 + v2) / 2, which half of the time is a midpoint of two bf16 numbers: rounding it errs downwards, never
// upwards, and so does delta = rowsum(dO * O) where dO has one sign. With what rounding lost beside it, delta is right.
static void test_attention_bias(Run& r) {
    if (sizeof(act_t) != 2) return r.verdict.note(true, " ");                 // float activations lose nothing
    for (int D : {64, 128, 16}) {
        Heads s = {1, 64, 1, 1, D};
        r.at("heads of %d", D);
        Rng rng{5};
        std::vector<double> v(s.T * D);
        // Keys 0 and 1 are all ones, as every query is; the rest point elsewhere. Values of 0 and 1: in (-2, -1] in steps of a bf16's last place.
        Buffer<act_t> qkv(r, s.T * s.row(), [&](int64_t i) {
            int64_t t = i / (3 * D), part = i % (3 * D) / D, d = i % D;
            return part == 0 ? 1. : part == 1 ? (t < 2 ? 1. : d % 2 ? -1. : 1. - 12. / std::sqrt((double)D)) : v[t * D + d] = t < 2 ? -1 - rng.below(128) / 128. : -2;
        }), dout(r, s.T * D, [](int64_t) { return 1; }), out(r, s.T * D), low(r, s.T * D), dqkv(r, s.T * s.row());
        Buffer<acc_t> lse(r, s.T), rounded(r, s.T), whole(r, s.T);
        attention_forward(r.ctx, out.p, low.p, lse.p, qkv.p, s);
        attention_backward(r.ctx, dqkv.p, rounded.p, dout.p, qkv.p, out.p, nullptr, lse.p, s);
        attention_backward(r.ctx, dqkv.p, whole.p, dout.p, qkv.p, out.p, low.p, lse.p, s);
        out.fetch(), low.fetch(), lse.fetch(), rounded.fetch(), whole.fetch();
        if (!r.compare) continue;
        std::vector<double> x = qkv.values();
        double bias[2] = {};                                                  // mean errors of delta
        for (int i = 8; i < s.T; i++) {
            double exact = 0, sum = 0;
            std::vector<double> o(D);
            for (int j = 0; j <= i; j++) {
                double score = 0;
                for (int d = 0; d < D; d++) score += x[i * 3 * D + d] * x[j * 3 * D + D + d];
                double p = std::exp((score - D) / std::sqrt((double)D));
                sum += p;
                for (int d = 0; d < D; d++) o[d] += p * v[j * D + d];
            }
            for (int d = 0; d < D; d++) exact += o[d] / sum;
            bias[0] += (rounded[i] - exact) / (s.T - 8), bias[1] += (whole[i] - exact) / (s.T - 8);
        }
        double chance = 0x1p-7 * std::sqrt(D / 12.);                          // what D roundings without a common sign add up to
        r.verdict.note(std::fabs(bias[0]) > 2 * chance, "delta of a rounded O is off by %g, chance would give %g: no bias to be seen", bias[0], chance);
        r.verdict.note(std::fabs(bias[1]) < 0.02 * std::fabs(bias[0]), "delta of O and what it lost is off by %g, of the rounded O by %g", bias[1], bias[0]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// The linear layer

// prepare() against the rounding of test_bf16: equal, NaN and infinity kept, or the very same memory where nothing is to be done.
template <class S> static void test_prepare_source(Run& r, Cell cell, int64_t rows, int64_t cols) {
    r.at("%s of %d-byte elements, %ldx%ld", cell.format == Format::bf16 ? "bf16" : "f32", (int)sizeof(S), (long)rows, (long)cols);
    Rng rng{(uint64_t)cols};
    Buffer<S> x(r, rows * cols, [&](int64_t i) { return i == 5 ? NAN : i == 6 ? -INFINITY : rng(3); });
    size_t bytes = operand_bytes(cell, type_of<S>(), rows * cols);
    bool as_is = cell.format == Format::bf16 ? type_of<S>() == Type::bf16 : type_of<S>() == type_of<acc_t>();
    r.verdict.note((bytes == 0) == as_is, "%zu bytes", bytes);
    Buffer<uint8_t> made(r, (int64_t)bytes);
    Recipe row = {"one cell", "", {cell}};
    Linear layer = {"", "", "", cols, 1, nullptr, nullptr, &row};
    OperandScratch scratch;
    scratch.a = bytes ? made.p : nullptr;
    Mat m = prepare(r.ctx, layer, fprop_x, scratch, Axis::row, mat(x.p, cols), rows, cols).r;
    r.verdict.note(m.ld == cols && !m.trans && m.type == operand_type(cell.format), "wrong shape or type");
    if (as_is) return r.verdict.note(m.data == x.p, "copied for nothing");
    made.fetch();
    r.verdict.note(m.data == made.p && bytes == rows * cols * size_of(m.type), "%zu bytes", bytes);
    for (int64_t i = 0; i < rows * cols; i++) {
        float got = m.type == Type::bf16 ? load((const bf16*)made.host.data() + i) : load((const float*)made.host.data() + i);
        float want = cell.format == Format::bf16 ? as_bf16(x[i]) : (float)x[i];
        r.verdict.note(got == want || (got != got && want != want), "element %ld is %.9g, not %.9g", (long)i, got, want);
    }
}
static void test_prepare(Run& r) {
    const std::pair<int64_t, int64_t> shapes[] = {{1, 1}, {7, 13}, {33, 64}, {300, 100}};
    for (auto [rows, cols] : shapes)
        for (Cell cell : {f32, b16}) {
            test_prepare_source<acc_t>(r, cell, rows, cols);
            if (on_gpu) test_prepare_source<act_t>(r, cell, rows, cols);
        }
    r.verdict.note(find_recipe("bf16") && find_recipe("bf16")->name == "bf16" && !find_recipe("bf1") && !find_recipe(""), "find_recipe");
    for (const Recipe& row : recipes()) r.verdict.note(find_recipe(row.name) == &row, "the name %s is taken twice", row.name.c_str());
}

// Y = X W^T, dX = D W, dW += D^T X. Y and D are activations, or floats as the head's logits are.
template <class T> static void test_linear_shape(Run& r, const Recipe& recipe, int64_t rows, int64_t in, int64_t out_) {
    bool floats = recipe.cell[fprop_x] == f32 || recipe.cell[dgrad_d] == f32 || recipe.cell[wgrad_d] == f32;
    if (on_gpu && sizeof(act_t) == 2 && floats) return;                       // the program refuses this pair too
    r.at("%s, %ld rows, %ld to %ld, %d-byte outputs", recipe.name.c_str(), (long)rows, (long)in, (long)out_, (int)sizeof(T));
    Rng rng{(uint64_t)(rows + in)};
    Buffer<act_t> x(r, rows * in, [&](int64_t) { return rng(1); }), dx(r, rows * in);
    Buffer<acc_t> w(r, in * out_, [&](int64_t) { return rng(1); }), dw(r, in * out_, [&](int64_t) { return rng(1); });
    Buffer<T> y(r, rows * out_), d(r, rows * out_, [&](int64_t) { return rng(1); });
    Type act = type_of<act_t>(), acc = type_of<acc_t>(), type_d = type_of<T>();
    auto bytes = [](Cell p, Type tp, Cell q, Type tq, int64_t n) { return std::max(operand_bytes(p, tp, n), operand_bytes(q, tq, n)); };
    size_t a_bytes = std::max(operand_bytes(recipe.cell[fprop_x], act, rows * in), bytes(recipe.cell[dgrad_d], type_d, recipe.cell[wgrad_d], type_d, rows * out_));
    size_t b_bytes = std::max(operand_bytes(recipe.cell[wgrad_x], act, rows * in), bytes(recipe.cell[fprop_w], acc, recipe.cell[dgrad_w], acc, in * out_));
    Buffer<uint8_t> a(r, (int64_t)a_bytes), b(r, (int64_t)b_bytes);
    OperandScratch scratch;
    scratch.a = a_bytes ? a.p : nullptr, scratch.b = b_bytes ? b.p : nullptr;
    Linear layer = {"fprop", "dgrad", "wgrad", in, out_, w.p, dw.p, &recipe};
    std::vector<double> before = dw.values();
    linear_forward(r.ctx, layer, scratch, y.p, mat(x.p, in), rows);
    linear_backward(r.ctx, layer, scratch, dx.p, mat(d.p, out_), mat(x.p, in), rows);
    y.fetch(), dx.fetch(), dw.fetch();
    if (!r.compare) return;
    auto cell = [](Cell o, std::vector<double> v) {
        if (o.format == Format::bf16)
            for (double& e : v) e = as_bf16(e);
        return v;
    };
    std::vector<double> fx = cell(recipe.cell[fprop_x], x.values()), fw = cell(recipe.cell[fprop_w], w.values()), gd = cell(recipe.cell[dgrad_d], d.values());
    std::vector<double> gw = cell(recipe.cell[dgrad_w], w.values()), wd = cell(recipe.cell[wgrad_d], d.values()), wx = cell(recipe.cell[wgrad_x], x.values());
    // sum over k of p[i k] q[k j], by the strides of i, j and k
    auto compare = [&](auto& got, const double* start, double store_u, int64_t I, int64_t J, int64_t K, const double* p, int64_t pi, int64_t pk,
                       const double* q, int64_t qj, int64_t qk, Cell o, const char* what) {
        double step = (K + 2) * product_u(o.format == Format::bf16 ? Type::bf16 : Type::f32);
        for (int64_t i = 0; i < I; i++)
            for (int64_t j = 0; j < J; j++) {
                double s = start ? start[i * J + j] : 0, size = std::fabs(s);
                for (int64_t k = 0; k < K; k++) {
                    double t = p[i * pi + k * pk] * q[j * qj + k * qk];
                    s += t, size += std::fabs(t);
                }
                r.verdict.close(got[i * J + j], s, step * size + store_u * std::fabs(s), what, i * J + j);
            }
    };
    compare(y, nullptr, sizeof(T) == 2 ? act_u : u, rows, out_, in, fx.data(), in, 1, fw.data(), in, 1, recipe.cell[fprop_x], "Y");
    compare(dx, nullptr, act_u, rows, in, out_, gd.data(), out_, 1, gw.data(), 1, in, recipe.cell[dgrad_d], "dX");
    compare(dw, before.data(), u, out_, in, rows, wd.data(), 1, out_, wx.data(), 1, in, recipe.cell[wgrad_d], "dW");
}
static void test_linear(Run& r) {
    const Shape shapes[] = {{1, 16, 8}, {31, 48, 64}, {33, 7, 100}, {257, 100, 16}, {40, 64, 1025}, {300, 24, 40}};
    for (const Recipe& recipe : recipes())
        for (auto [rows, in, out_] : shapes) {
            if (is_quantised(recipe)) continue;                               // test_fp4.cu
            test_linear_shape<act_t>(r, recipe, rows, in, out_);
            if (sizeof(act_t) != sizeof(acc_t)) test_linear_shape<acc_t>(r, recipe, rows, in, out_);
        }
    // Each cell has a table entry of its own: six different formats must end up in the six places.
    Recipe mixed = {"mixed", "", {f32, f32, f32, f32, f32, f32}};
    Cell* cells[] = {&mixed.cell[0], &mixed.cell[1], &mixed.cell[2], &mixed.cell[3], &mixed.cell[4], &mixed.cell[5]};
    if (!on_gpu && !MatmulPlans::bf16_units())                                // where the operands of one GEMM may differ in type
        for (Cell* c : cells) *c = b16, test_linear_shape<act_t>(r, mixed, 33, 20, 24), *c = f32;
    for (int i = 0; i < 6; i += 2) {                                          // one GEMM at a time
        *cells[i] = *cells[i + 1] = b16, test_linear_shape<act_t>(r, mixed, 33, 20, 24), *cells[i] = *cells[i + 1] = f32;
    }
}

int main(int argc, char** argv) {
    begin(argc, argv);
    test("matmul", [](Run& r) {
        test_products<acc_t, acc_t>(r);
        if (on_gpu) test_products<bf16, float>(r), test_products<bf16, bf16>(r);
        else if (MatmulPlans::bf16_units()) test_products<bf16, float>(r);
    });
#ifndef __CUDACC__
    test("matmul: plain loops", [](Run& r) { test_plain_loops<float>(r), test_plain_loops<double>(r); });
#endif
#ifdef __CUDACC__
    test("matmul: native FP8 and FP4", test_native);
#endif
    test("attention", test_attention);
    test("attention: NaN", test_attention_nan);
    test("attention: delta is not biased by a bf16 O", test_attention_bias);
    test("prepare", test_prepare);
    test("linear layer", test_linear);
    return done();
}
