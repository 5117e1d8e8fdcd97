// test_metis.cu: Metis in metis.cuh against double: split operands, their products, the whole layer, when it refreshes its bases, and
// weights whose factors are trained.
//
//     make build/cpu/test_metis && build/cpu/test_metis          -v also prints how much of its tolerance each test used
//
// Exact are bits that must not change: across threads, in a recomputed forward, between a layer and its parts. All else has a bound that
// is derived beside it; u and how tests run: device_test.h. The bases themselves: test_subspace.cu; the program from outside: test_metis.py.
#include "metis_test.h"

// ---------------------------------------------------------------------------------------------------------------------------
// Split operands: one linear layer with matrices, bases and scratch of the sizes that metis.cuh states, NaN where nothing was written

enum class Kind { ordinary, low_rank, zero };
constexpr const char* kinds[] = {"ordinary", "rank 5", "zero"};

// ordinary: a dozen directions, each a fifth shorter than the one before, over noise, as activations and gradients are.
static Dense of_kind(Rng& rng, int64_t rows, int64_t cols, Kind kind) {
    Dense m(rows, cols);
    if (kind == Kind::zero) return m;
    for (int t = 0; t < (kind == Kind::ordinary ? 12 : 5); t++) {
        Dense a = gaussian(rng, 1, rows), b = gaussian(rng, 1, cols);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++) m[i][j] += std::pow(0.8, t) * a[0][i] * b[0][j];
    }
    for (double& v : m.v) v += kind == Kind::ordinary ? rng(0.2) : 0;
    return m;
}

struct Shape { int64_t rows, in, out; int k; };

struct Layer {
    Run& r;
    Recipe recipe;
    Shape shape;
    int64_t rows, in, out, k, tall, wide, samples, q;
    int64_t size;                                                             // bytes of an operand's element
    struct Side {
        Buffer<acc_t> unit, norms, partial, low_a, low_b, cross;
        Buffer<uint8_t> a, b;
        Buffer<float> scales;
        Side(Layer& l) : unit(l.r, l.tall * l.k), norms(l.r, l.k), partial(l.r, (l.tall + 255) / 256 * l.k), low_a(l.r, l.tall * l.k), low_b(l.r, l.wide * l.k),
            cross(l.r, l.tall * l.k), a(l.r, l.tall * l.k * l.size), b(l.r, l.wide * l.k * l.size), scales(l.r, 4) {}
        SideScratch scratch() { return {unit.p, norms.p, partial.p, a.p, b.p, low_a.p, low_b.p, cross.p, scales.p}; }
    };
    Buffer<act_t> x, d, y, dx;
    Buffer<acc_t> w, dw;
    Buffer<acc_t> factor_u, factor_s, factor_v, grad_u, grad_s, grad_v, merged;
    Buffer<acc_t> basis_x, basis_w, basis_d, projected_x, projected_w, projected_d, inner, sample, z, y_, g;
    Buffer<uint8_t> a, b, second_d;
    Buffer<float> scales, matrix_scales, partial;
    Buffer<double> gram, vectors;
    Buffer<int> state;
    Side first, second, third;
    Linear lin;
    OperandScratch s;

    int64_t partials() const {
        int64_t n = 0;
        for (const Cell& c : recipe.cell) n = std::max({n, quantise_partials(c, rows, in), quantise_partials(c, rows, out), quantise_partials(c, out, in)});
        return n;
    }
    int64_t largest() const {
        size_t n = 0;
        for (const Cell& c : recipe.cell) n = std::max(n, size_of(operand_type(c.format)));
        return (int64_t)n;
    }
    template <class T> static void fill(Buffer<T>& to, const Dense& m) {
        for (int64_t i = 0; i < to.n; i++) assign(&to.host[i], m.v[i]);
        to.send();
    }
    // `shared`: tensor scales are kept from operand to operand, as in the model.
    Layer(Run& run, const Recipe& cells, Shape sh, Kind kind, bool shared)
        : r(run), recipe(cells), shape(sh), rows(sh.rows), in(sh.in), out(sh.out), k(sh.k), tall(std::max({rows, in, out})), wide(std::max(in, out)),
          samples(std::max({out, sampled_rows(recipe.split, (int)k, rows)})), q(k + recipe.split.oversample), size(largest()),
          x(r, rows * in), d(r, rows * out), y(r, rows * out), dx(r, rows * in), w(r, out * in), dw(r, out * in, [](int64_t i) { return 0.25 * (i % 7) - 1; }),
          factor_u(r, out * k), factor_s(r, k), factor_v(r, k * in), grad_u(r, out * k), grad_s(r, k), grad_v(r, k * in), merged(r, out * in),
          basis_x(r, k * in), basis_w(r, k * in), basis_d(r, k * out), projected_x(r, rows * k), projected_w(r, out * k), projected_d(r, rows * k), inner(r, k * k),
          sample(r, samples * wide), z(r, q * wide), y_(r, q * std::max(samples, wide)), g(r, q * std::max(samples, wide)), a(r, (std::max(rows * in, rows * out) + 2 * k * tall) * size),
          b(r, (std::max(out * in, rows * in) + 2 * k * tall) * size), second_d(r, (rows * out + 2 * k * tall) * size), scales(r, 6), matrix_scales(r, 6),
          partial(r, 2 * partials()), gram(r, q * q), vectors(r, q * q + q + 2),
          state(r, q + 1), first(*this), second(*this), third(*this) {
        Rng rng{(uint64_t)(rows + in + out)};
        fill(x, of_kind(rng, rows, in, kind)), fill(w, of_kind(rng, out, in, kind)), fill(d, of_kind(rng, rows, out, kind));
        lin = {"fprop", "dgrad", "wgrad", in, out, w.p, dw.p, &recipe, 8, shared ? matrix_scales.p : nullptr};
        lin.splits = {(int)k, {basis_x.p, basis_w.p, basis_d.p}, {projected_x.p, projected_w.p, projected_d.p}};
        s.a = a.p, s.b = b.p, s.scales = scales.p, s.partial = partial.p, s.refresh = true, s.inner = inner.p;
        s.side[0] = first.scratch(), s.side[1] = second.scratch();
        s.subspace = {sample.p, z.p, y_.p, g.p, gram.p, vectors.p, state.p};
        r.ctx.seed = 11, r.ctx.step = r.ctx.micro = 0;
        if (!recipe.split.trained) return;
        lin.splits.factors = {factor_u.p, factor_s.p, factor_v.p}, lin.splits.grads = {grad_u.p, grad_s.p, grad_v.p}, s.merged = merged.p;
        split_weight(r.ctx, lin, s);
        w.fetch();
    }
    // Factors as training leaves them: neither orthonormal nor in order, and an s below zero.
    void drift() {
        Rng rng{5};
        for (Buffer<acc_t>* f : {&factor_u, &factor_s, &factor_v}) {
            for (acc_t& v : f->fetch().host) v += (acc_t)rng(0.05);
            f->send();
        }
        factor_s.host[1] *= -1, factor_s.send();
    }
    Layer(const Layer&) = delete;
    ~Layer() { r.ctx.step = r.ctx.micro = 0; }

    Axis axis(int which) const { return which < dgrad_w ? Axis::row : Axis::column; }
    int64_t height(int which) const { return matrix_of[which] == matrix_w ? out : rows; }
    int64_t width(int which) const { return matrix_of[which] == matrix_d ? out : in; }
    int64_t outer(int which) const { return axis(which) == Axis::row ? height(which) : width(which); }
    int64_t contracted(int which) const { return axis(which) == Axis::row ? width(which) : height(which); }
    std::vector<double> matrix(int which) const { return matrix_of[which] == matrix_x ? x.values() : matrix_of[which] == matrix_w ? w.values() : d.values(); }
    bool trained(int which) const { return recipe.split.trained && matrix_of[which] == matrix_w; }
    Buffer<acc_t>& basis(int which) { return trained(which) ? factor_v : matrix_of[which] == matrix_x ? basis_x : matrix_of[which] == matrix_w ? basis_w : basis_d; }
    Buffer<acc_t>& projected(int which) { return matrix_of[which] == matrix_x ? projected_x : matrix_of[which] == matrix_w ? projected_w : projected_d; }
    Prepared prepare(int which) {
        Mat source = matrix_of[which] == matrix_x ? mat((const act_t*)x.p, in) : matrix_of[which] == matrix_w ? mat((const acc_t*)w.p, in) : mat((const act_t*)d.p, out);
        return ::prepare(r.ctx, lin, (Which)which, s, axis(which), source, height(which), width(which));
    }
    void forward() { linear_forward(r.ctx, lin, s, y.p, mat((const act_t*)x.p, in), rows); }
    // D's two operands in one pass over it, as in the model.
    void one_pass() { s.d = second_d.p, s.side[2] = third.scratch(), s.partials = partials(); }
    void backward() { linear_backward(r.ctx, lin, s, dx.p, mat((const act_t*)d.p, out), mat((const act_t*)x.p, in), rows); }
};

// What prepare() returned, on the host: codes times block scales, and the tensor's scale.
struct Factor {
    Dense v;
    double scale;
    Dense value() const {
        Dense t = v;
        for (double& e : t.v) e *= scale;
        return t;
    }
};
static Factor read(Run& r, const Mat& m, int64_t rows, int64_t cols) {
    r.verdict.note(m.ld >= (m.trans ? rows : cols), "rows of %ld elements", (long)m.ld);     // longer where thin products will follow
    std::vector<uint8_t> raw(((m.trans ? cols : rows) - 1) * m.ld * size_of(m.type) + (m.trans ? rows : cols) * size_of(m.type));
    to_host(r.ctx, raw.data(), m.data, raw.size());
    Factor f = {Dense(rows, cols), 1};
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            int64_t at = m.trans ? j * m.ld + i : i * m.ld + j;
            f.v[i][j] = m.type == Type::bf16 ? load((const bf16*)raw.data() + at) : load((const float*)raw.data() + at);
        }
    float scale = 1;
    if (m.scale) to_host(r.ctx, &scale, m.scale, sizeof scale);
    f.scale = scale;
    r.bits.update(f.v.v.data(), f.v.v.size() * sizeof(double)), r.bits.update(&scale, sizeof scale);
    return f;
}
struct Parts {
    bool split;
    Factor r, o, c;                       // (outer x contracted), (outer x k), (k x contracted)
    std::vector<double> l;
    Dense low() const {                   // O L C
        Dense ol = o.value();
        for (int64_t i = 0; i < ol.rows; i++)
            for (int64_t j = 0; j < ol.cols; j++) ol[i][j] *= l[j];
        return products(ol, transposed(c.value()));
    }
    Dense folded() const {
        Dense m = r.value(), t = low();
        for (size_t i = 0; i < m.v.size(); i++) m.v[i] += t.v[i];
        return m;
    }
};
static Parts read(Layer& t, int which, const Prepared& p) {
    int64_t outer = t.outer(which), contracted = t.contracted(which), k = p.split ? t.k : 0;
    Parts parts = {p.split, read(t.r, p.r, outer, contracted), {Dense(outer, k), 1}, {Dense(k, contracted), 1}, {}};
    if (!p.split) return parts;
    parts.o = read(t.r, p.o, outer, k), parts.c = read(t.r, p.c, k, contracted);
    std::vector<acc_t> l(k);
    to_host(t.r.ctx, l.data(), p.l, k * sizeof(acc_t));
    parts.l.assign(l.begin(), l.end());
    t.basis(which).fetch(), t.projected(which).fetch();
    t.r.bits.update(l.data(), k * sizeof(acc_t));
    return parts;
}

// `got` against `want`, known to within err: every element on its block's grid, and within half a step of want where rounding is to
// nearest, else within a step. Beyond the largest code, as a block's rounded scale allows, or one that another operand's tensor scale cuts
// off, it is that code. A block's scale follows from its amax, known to within err: it may be one of two neighbours, whichever fits.
// Scaling costs a float three roundings, 4 u. Blocks run along the rows of these matrices, or down their columns.
// Stochastic is not nearest: what lies at p between its neighbours goes to the farther one with probability min(p, 1 - p); how many of n
// do errs by sqrt(n L / 2), L = ln(2 / 10^-9) (Hoeffding). Counted where p is known to 1%: not where M is all low-rank part.
static std::vector<double> block_scales(Format f, double low, double high, double S) {      // of a block whose amax lies in [low, high]
    std::vector<double> scales;
    low *= 1 - 4 * u, high *= 1 + 4 * u;
    if (f == Format::nvfp4)
        for (int c = slow::nearest((float)(low / (6 * S)), slow::e4m3()); c <= slow::nearest((float)(high / (6 * S)), slow::e4m3()); c++) scales.push_back(slow::e4m3()[c]);
    if (f == Format::mxfp4)
        for (int e = -127; e < 127; e++)
            if (std::ldexp(6, e) >= low && (std::ldexp(3, e) < high || e == -127)) scales.push_back(std::ldexp(1, e));
    if (f == Format::e2m1) scales.push_back(high / 6 + 1e-9);
    return scales;
}
// The worst element: its error over what is allowed; and how many went to their farther neighbour, and should have.
struct Fit { double used = -1, code = 0, want = 0, allowed = 0; int64_t at = 0; double far = 0, expected = 0; };
static void check_rounded(Run& r, const Factor& got, const Dense& want, const Dense& err, Cell cell, bool down, const char* what) {
    if (down) return check_rounded(r, {transposed(got.v), got.scale}, transposed(want), transposed(err), cell, false, what);
    const std::vector<double>& grid = slow::e2m1().v;
    const int64_t B = block_length(cell.format);
    double far = 0, expected = 0;
    for (int64_t i = 0; i < want.rows; i++)
        for (int64_t first = 0; first < want.cols; first += B) {
            int64_t last = std::min(first + B, want.cols);
            double low = 0, high = 0;
            for (int64_t j = first; j < last; j++) low = std::max(low, std::fabs(want[i][j]) - err[i][j]), high = std::max(high, std::fabs(want[i][j]) + err[i][j]);
            Fit best;
            best.used = INFINITY;
            for (double scale : block_scales(cell.format, low, high, got.scale)) {
                Fit fit;
                for (int64_t j = first; j < last; j++) {
                    if (scale == 0) {                                         // such blocks vanish
                        if (got.v[i][j] != 0) fit.used = INFINITY, fit.code = got.v[i][j], fit.want = want[i][j], fit.at = j;
                        continue;
                    }
                    double code = got.v[i][j] / scale, w = want[i][j] / (scale * got.scale), slack = err[i][j] / (scale * got.scale) + 4 * u * std::fabs(w), step = 0;
                    double off = cell.format == Format::e2m1 ? (high - low) / scale + 8 * u * std::fabs(code) : 0;           // a float scale is known to so much
                    bool on_grid = false;
                    for (double g : grid) on_grid = on_grid || near(std::fabs(code), g, off);
                    for (size_t c = 0; c + 1 < grid.size(); c++)
                        if (grid[c] <= std::fabs(w) + slack && grid[c + 1] >= std::fabs(w) - slack) step = std::max(step, grid[c + 1] - grid[c]);
                    double allowed = (cell.rounding == rn ? step / 2 : step) + slack + off + std::max(0., std::fabs(w) - 6);
                    double used = !on_grid || !near(code, w, allowed) ? INFINITY : allowed > 0 ? std::fabs(code - w) / allowed : 0;
                    if (used > fit.used) fit.used = used, fit.code = code, fit.want = w, fit.allowed = allowed, fit.at = j;
                    int below = slow::below(std::min(std::fabs(w), 6.), slow::e2m1());
                    double gap = below < 7 ? grid[below + 1] - grid[below] : 1, p = std::min((std::fabs(w) - grid[below]) / gap, 1.);
                    if (below < 7 && slack + off < 0.01 * gap) fit.expected += std::min(p, 1 - p), fit.far += std::fabs(code - w) > gap / 2;
                }
                if (fit.used < best.used || !(best.used <= 1)) best = fit;
            }
            far += best.far, expected += best.expected;
            if (best.used <= 1) r.verdict.worst = std::max(r.verdict.worst, best.used);
            r.verdict.note(best.used <= 1, "%s (%ld, %ld) is %.9g of its block's scales, for %.9g +- %.3g", what, (long)i, (long)best.at, best.code, best.want, best.allowed);
        }
    if (cell.rounding == sr) r.verdict.close(far, expected, std::sqrt(want.v.size() * std::log(2e9) / 2) + 1, what, -1);
}
static double amax(const Dense& a) {
    double m = 0;
    for (double v : a.v) m = std::max(m, std::fabs(v));
    return m;
}
// The tensor's scale: amax on the largest block scale times the largest code. Three roundings, and err of what amax is known to.
static void check_scale(Run& r, const Factor& got, Cell cell, double amax, double err, const char* what) {
    double want = !has_tensor_scale(cell) || amax == 0 ? 1 : amax / (6 * 448.);
    r.verdict.close(got.scale, want, err / (6 * 448.) + 4 * u * want, what, 0);
}

// One operand: T = M B, L, both factors and the residual, each against double from what precedes it in memory; so that what is put
// together errs by the residual's rounding and nothing else (or, residual=exact, by that of the factors, too, as it should).
// `of`: amax of the residual that this matrix's tensor scale was made of, per matrix, for scales that are kept.
static void check_prepared(Layer& t, int which, const Parts& p, double* of) {
    Run& r = t.r;
    Cell cell = t.recipe.cell[which];
    if (t.s.nearest) cell.rounding = rn, cell.factors = cell.factors == Factors::exact ? Factors::exact : Factors::nearest;
    int64_t rows = t.height(which), cols = t.width(which), k = t.k;
    bool turned = t.axis(which) == Axis::column, code = cell.format == Format::e2m1, other = cell.along == Along::other;
    Dense m(rows, cols, t.matrix(which));
    auto logical = [&](const Dense& a) { return turned ? transposed(a) : a; };
    Dense want = logical(m), err = magnitudes(want);
    if (p.split) {
        bool own = t.trained(which);                                          // U, s and V as they are stored, and all of W_R
        Dense b(k, cols, t.basis(which).values()), proj(rows, k, own ? t.factor_u.values() : t.projected(which).values()), seen = b;
        if (!own) check_orthonormal(r, b, (int)t.q);
        bool half = sizeof(act_t) == 2 && matrix_of[which] != matrix_w;       // then B is rounded for the tensor cores, too
        for (double& v : seen.v) v = half ? as_bf16(v) : v;
        Dense exact = products(m, seen), size = products(magnitudes(m), magnitudes(seen));
        for (int64_t i = 0; i < rows * k && !own; i++) r.verdict.close(proj.v[i], exact.v[i], (half && on_gpu ? 8 : 1) * (cols + 2) * u * size.v[i], "M B", i);
        Dense unit = proj;
        for (int64_t j = 0; j < k; j++) {
            double ss = 0;
            if (own) {
                r.verdict.note(p.l[j] == t.factor_s[j], "L[%ld] is %.9g, s is %.9g", (long)j, p.l[j], t.factor_s[j]);
                continue;
            }
            for (int64_t i = 0; i < rows; i++) ss += proj[i][j] * proj[i][j];
            // A square is rounded, goes through 256 additions and one a chunk; the root halves a relative error, and rounds.
            r.verdict.close(p.l[j], std::sqrt(ss), (131 + rows / 512.) * u * std::sqrt(ss), "L", j);
            for (int64_t i = 0; i < rows; i++) unit[i][j] = p.l[j] > 0 ? (float)(proj[i][j] / p.l[j]) : 0;
        }
        const Factor &A = turned ? p.c : p.o, &B = turned ? p.o : p.c;        // in their own orientation: (rows x k), (k x cols)
        Factor a = {turned ? transposed(A.v) : A.v, A.scale}, bb = {turned ? transposed(B.v) : B.v, B.scale};
        if (cell.factors == Factors::exact) {
            for (int64_t i = 0; i < rows * k; i++) r.verdict.note(a.v.v[i] == as_bf16(unit.v[i]), "A[%ld] is %.9g, not %.9g", (long)i, a.v.v[i], unit.v[i]);
            for (int64_t i = 0; i < k * cols; i++) r.verdict.note(bb.v.v[i] == as_bf16(b.v[i]), "B[%ld] is %.9g, not %.9g", (long)i, bb.v.v[i], b.v[i]);
        } else {
            Cell thin = cell;
            thin.rounding = cell.factors == Factors::stochastic ? sr : rn;
            check_scale(r, a, thin, amax(unit), 0, "S of A"), check_scale(r, bb, thin, amax(b), 0, "S of B");
            check_rounded(r, a, unit, Dense(rows, k), thin, code || turned, "A");
            check_rounded(r, bb, b, Dense(k, cols), thin, !code && turned, "B");
        }
        // R = M - low-rank part: k fused multiply-adds, each rounded; the factor Q(A) L with three roundings before them.
        Dense low = cell.residual == Residual::exact ? logical(products(proj, transposed(b))) : p.low();
        Dense low_size(low.rows, low.cols);
        if (cell.residual == Residual::exact) low_size = logical(products(magnitudes(proj), transposed(magnitudes(b))));
        else {
            Parts abs = p;
            for (Factor* f : {&abs.o, &abs.c}) f->v = magnitudes(f->v);
            low_size = abs.low();
        }
        for (size_t i = 0; i < want.v.size(); i++) want.v[i] -= own ? 0 : low.v[i], err.v[i] = own ? 0 : (k + 4) * u * (err.v[i] + low_size.v[i]);
    } else
        for (double& v : err.v) v = 0;
    if (!is_quantised(cell.format)) {
        for (size_t i = 0; i < want.v.size(); i++) r.verdict.note(p.r.v.v[i] == as_bf16(want.v[i]), "element %zu", i);
        return;
    }
    double most = amax(want), slack = amax(err);
    Which before = made_before[which];
    const Cell& then = t.recipe.cell[before == operand_count ? which : before];
    bool alike = then.split == cell.split && (!cell.split || (then.factors == t.recipe.cell[which].factors && then.residual == cell.residual));
    bool kept = t.lin.scales && before != operand_count && has_tensor_scale(then) && alike;
    if (!kept) of[matrix_of[which]] = most;
    check_scale(r, p.r, cell, of[matrix_of[which]], slack, "S of R");
    check_rounded(r, p.r, want, err, cell, other, "R");
}

// P^ Q^^T, put together in double, against product(). Of each term its magnitude is added up beside it, and errs by
//     R_p R_q^T                   (K + 2) u of |R_p||R_q|, and alpha's three roundings
//     O_p (L_p C_p Q^^T)          store_u of the thin factor, (K + 2k + 8) u of all magnitudes in it; then 2k + 2 additions
//     (R_p C_q L_q) O_q^T         the same
// where a thin factor is rounded to bf16 (2^-8), but of e2m1, which is float all over.
static void check_product(Run& r, const Dense& got, const double* before, double out_u, const Parts& p, const Parts& q, Cell cell, const char* what) {
    const int64_t K = p.r.v.cols, m = p.r.v.rows, n = q.r.v.rows, k = std::max(p.c.v.rows, q.c.v.rows);
    const double pu = on_gpu && operand_type(cell.format) == Type::bf16 ? 8 * u : u, thin_u = is_float_stored(cell.format) ? u : 0x1p-8;
    auto part = [&](const Dense& full, const Dense& c, const std::vector<double>& l) {      // full C^T L
        Dense t = products(full, c);
        for (int64_t i = 0; i < t.rows; i++)
            for (int64_t j = 0; j < t.cols; j++) t[i][j] *= l[j];
        return t;
    };
    Parts abs_q = q;
    for (Factor* f : {&abs_q.r, &abs_q.o, &abs_q.c}) f->v = magnitudes(f->v);
    for (double& l : abs_q.l) l = std::fabs(l);                               // a trained s may be below zero
    Dense rp = p.r.value(), rq = q.r.value(), want = products(p.folded(), q.folded()), main = products(rp, rq), size = products(magnitudes(rp), magnitudes(rq));
    Dense v2 = part(q.folded(), p.c.value(), p.l), s2 = part(abs_q.folded(), magnitudes(p.c.value()), p.l);      // X and D: L >= 0
    Dense v1 = part(rp, q.c.value(), q.l), s1 = part(magnitudes(rp), magnitudes(q.c.value()), abs_q.l);
    Dense op = magnitudes(p.o.value()), oq = magnitudes(q.o.value());
    for (auto [v, s] : {std::pair<Dense*, Dense*>{&v2, &s2}, {&v1, &s1}})
        for (size_t i = 0; i < v->v.size(); i++) s->v[i] = thin_u * std::fabs(v->v[i]) + (K + 4 * k + 10) * pu * s->v[i];
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double start = before ? before[i * n + j] : 0, tol = (K + 5) * pu * size[i][j] + out_u * (std::fabs(main[i][j]) + std::fabs(want[i][j] + start)) + 2 * u * std::fabs(start);
            if (p.split) tol += dot(op[i], s2[j], k);
            if (q.split) tol += dot(oq[j], s1[i], k);
            r.verdict.close(got[i][j], start + want[i][j], tol, what, i * n + j);
        }
}

struct Ablation { const char *recipe, *changes; };
static const Ablation ablations[] = {
    {"metis", ""}, {"metis", "x.split=no"}, {"metis", "w.split=no"}, {"metis", "d.split=no"}, {"metis", "x.split=no,w.split=no"}, {"metis", "fprop.split=no"},
    {"metis", "fprop_x.factors=exact"}, {"metis", "wgrad_d.residual=exact"}, {"metis", "x.format=bf16"}, {"metis", "all.factors=exact"}, {"metis", "all.residual=exact"}, {"metis", "all.factors=exact,all.residual=exact"},
    {"metis", "all.rounding=stochastic,all.factors=stochastic"}, {"metis", "all.format=mxfp4"}, {"metis-code", ""},
    {"metis", "split.trained=1"}, {"metis", "split.trained=1,w.factors=exact,x.split=no,d.split=no"}, {"metis", "split.trained=1,all.rounding=stochastic,dgrad_w.factors=stochastic"},
};
static const Shape shapes[] = {{40, 48, 64, 16}, {37, 53, 70, 16}, {9, 48, 32, 16}, {100, 96, 80, 32}, {64, 32, 48, 32}, {70, 64, 150, 48}};

// Where bases are used, not tested: the emulated device spends most of its time on them. An odd number of directions, for once.
static Recipe small_bases(Recipe recipe) {
    if (on_emulated) recipe.split.oversample = 3, recipe.split.cold = 1;
    return recipe;
}

// All six operands and the three products, in the order of a step; then the same by linear_forward and linear_backward, D's operands
// made in one pass: the same bits.
static void test_layer(Run& r, const Ablation& a, Shape shape, Kind kind, bool shared, bool nearest) {
    Recipe recipe = small_bases(*find_recipe(a.recipe));
    set_cells(recipe, a.changes);
    if (on_gpu && sizeof(act_t) == 2 && is_float_stored(recipe.cell[fprop_x].format)) return;          // the program refuses this pair, too
    r.at("%s %s, %s, %ld rows, %ld to %ld, rank %d%s%s", a.recipe, a.changes, kinds[(int)kind], (long)shape.rows, (long)shape.in, (long)shape.out, shape.k,
         shared ? ", scales kept" : "", nearest ? ", nearest" : "");
    Layer t(r, recipe, shape, kind, shared);
    t.s.nearest = nearest;
    if (recipe.split.trained) t.drift();
    double of[3] = {};
    std::vector<double> before = t.dw.values();
    for (int gemm = 0; gemm < 3; gemm++) {
        Prepared P = t.prepare(2 * gemm), Q = t.prepare(2 * gemm + 1);
        Parts p = read(t, 2 * gemm, P), q = read(t, 2 * gemm + 1, Q);
        if (r.compare) check_prepared(t, 2 * gemm, p, of), check_prepared(t, 2 * gemm + 1, q, of);
        int64_t m = t.outer(2 * gemm), n = t.outer(2 * gemm + 1), K = t.contracted(2 * gemm);
        if (gemm == 2) product(r.ctx, t.s, "test", t.dw.p, n, P, Q, m, n, K, 1, (int)t.k);
        else product(r.ctx, t.s, "test", gemm == 0 ? t.y.p : t.dx.p, n, P, Q, m, n, K, 0, (int)t.k);
        Dense got(m, n, gemm == 0 ? t.y.fetch().values() : gemm == 1 ? t.dx.fetch().values() : t.dw.fetch().values());
        auto bf16_all_over = [&](const Prepared& side, int64_t outer) {       // thin factors behind the residuals, too, whatever type holds them
            int64_t odd = 0;
            for (double v : read(r, side.r, outer, K + thin_columns(recipe, Which(2 * gemm), (int)t.k)).v.v) odd += v != as_bf16(v);
            r.verdict.note(odd == 0, "%ld elements of an operand are no bf16 numbers", (long)odd);
        };
        if (!is_float_stored(recipe.cell[2 * gemm].format) && (P.split || Q.split)) bf16_all_over(P, m), bf16_all_over(Q, n);
        if (r.compare) check_product(r, got, gemm == 2 ? before.data() : nullptr, gemm == 2 ? u : act_u, p, q, recipe.cell[2 * gemm], gemm == 0 ? "Y" : gemm == 1 ? "dX" : "dW");
    }
    Layer whole(r, recipe, shape, kind, shared);
    whole.s.nearest = nearest;
    if (recipe.split.trained) whole.drift();
    whole.one_pass();
    whole.forward(), whole.backward();
    whole.y.fetch(), whole.dx.fetch(), whole.dw.fetch();
    auto same = [&](auto& x, auto& y, const char* what) { r.verdict.note(!memcmp(x.host.data(), y.host.data(), x.n * sizeof x.host[0]), "%s of the layer is not that of its parts", what); };
    same(t.y, whole.y, "Y"), same(t.dx, whole.dx, "dX"), same(t.dw, whole.dw, "dW");
}
static void test_layers(Run& r) {
    const int n = std::size(ablations), m = std::size(shapes);
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < m; j++) {
            if (on_emulated && j != (i + m / 2) % m) continue;                // there one shape each, a small one for trained factors
            bool shared = (shapes[j].rows + shapes[j].k) % 3 != 0;
            test_layer(r, ablations[i], shapes[j], Kind::ordinary, shared, false);
        }
        if (on_emulated && i % 3) continue;
        test_layer(r, ablations[i], shapes[1], Kind::low_rank, true, false);
        test_layer(r, ablations[i], shapes[on_emulated ? 2 : 3], Kind::ordinary, false, true);          // evaluation: nothing is stochastic
    }
    test_layer(r, ablations[0], shapes[1], Kind::zero, true, false);
    test_layer(r, ablations[0], {600, 300, 280, 32}, Kind::ordinary, true, false);
}

// What the split is for: twelve directions over noise leave a residual a tenth as large, and with it goes the error. A basis of other
// directions would pass every test above. (Measured: 0.1 to 0.2 of the unsplit operand's; 0.5 is allowed.)
static void test_purpose(Run& r) {
    const Shape shape = {200, 96, 80, 16};
    double error[2][operand_count];
    for (bool split : {false, true}) {
        Recipe recipe = *find_recipe("metis");
        set_cells(recipe, split ? "" : "all.split=no");
        Layer t(r, recipe, shape, Kind::ordinary, true);
        for (int which = 0; which < operand_count; which++) {
            Dense m(t.height(which), t.width(which), t.matrix(which)), made = read(t, which, t.prepare(which)).folded();
            if (t.axis(which) == Axis::column) m = transposed(m);
            for (size_t i = 0; i < m.v.size(); i++) made.v[i] -= m.v[i];
            error[split][which] = std::sqrt(energy(made) / energy(m));
        }
    }
    for (int which = 0; which < operand_count; which++) {
        r.at("%s: relative error %.3g, unsplit %.3g", operand_names[which], error[1][which], error[0][which]);
        if (verbose && r.compare) printf("   %s\n", r.verdict.where.c_str());
        r.verdict.note(error[1][which] <= 0.5 * error[0][which], "too large");
    }
}

// Which calls refresh which bases, and to what: those of refresh_basis with all rows of W, sampled ones of X and D, drawn in the name of
// this step, layer and operand; cold at step 0, warm later. Layer 8 of the model is due at steps 0, 8, 16, layer 11 at 0, 5, 13. Bits.
static void test_refreshes(Run& r) {
    const Shape shape = {300, 48, 112, 16};                                   // both X and W have more rows than a sample of 96
    Recipe recipe = *find_recipe("metis");
    Layer t(r, recipe, shape, Kind::ordinary, true);
    Rng rng{3};
    auto bases = [&]() {
        std::vector<acc_t> all;
        for (Buffer<acc_t>* b : {&t.basis_x, &t.basis_w, &t.basis_d}) b->fetch(), all.insert(all.end(), b->host.begin(), b->host.end());
        return all;
    };
    auto equal = [](const std::vector<acc_t>& a, const std::vector<acc_t>& b) { return !memcmp(a.data(), b.data(), a.size() * sizeof(acc_t)); };
    auto output = [&]() {
        t.forward();
        return t.y.fetch().values();
    };
    auto change = [&]() {                                                     // another batch, and weights that have moved
        Layer::fill(t.x, of_kind(rng, shape.rows, shape.in, Kind::ordinary)), Layer::fill(t.d, of_kind(rng, shape.rows, shape.out, Kind::ordinary));
        Layer::fill(t.w, of_kind(rng, shape.out, shape.in, Kind::ordinary));
    };
    struct { uint32_t id, step, micro; bool refresh, due; } calls[] = {
        {8, 0, 0, true, true}, {8, 0, 1, true, false}, {8, 1, 0, true, false}, {8, 7, 0, true, false}, {8, 8, 0, false, false}, {8, 8, 1, true, false},
        {8, 8, 0, true, true}, {8, 16, 0, true, true}, {11, 16, 0, true, false}, {11, 20, 0, true, false}, {11, 21, 0, true, true}, {11, 0, 0, true, true}};
    for (auto& c : calls) {
        r.at("layer %u, step %u, micro-batch %u, %s", c.id, c.step, c.micro, c.refresh ? "forward" : "recomputation");
        change();
        t.lin.id = c.id, r.ctx.step = c.step, r.ctx.micro = c.micro, t.s.refresh = c.refresh;
        std::vector<acc_t> before = bases(), want;
        for (int which : {fprop_x, fprop_w, dgrad_d}) {
            Buffer<acc_t> b(r, t.basis(which).n, [&](int64_t i) { return t.basis(which).host[i]; });
            int64_t rows = t.height(which), samples = which == fprop_w ? rows : sampled_rows(recipe.split, shape.k, rows);
            r.verdict.note(which == fprop_w || samples == 4 * (16 + 8), "%ld rows are sampled", (long)samples);
            Refresh f = {rows, t.width(which), samples, shape.k, recipe.split, c.step > 0, {r.ctx.seed, c.step, 0, c.id, (uint32_t)which, Purpose::rows}};
            if (!c.due) b.fetch();
            else if (which == fprop_x) refresh(r, b, t.x, f);
            else if (which == fprop_w) refresh(r, b, t.w, f);
            else refresh(r, b, t.d, f);
            want.insert(want.end(), b.host.begin(), b.host.end());
        }
        std::vector<double> y = output();
        t.backward();
        std::vector<acc_t> after = bases();
        r.verdict.note(equal(after, want), c.due ? "not refresh_basis' bases" : "the bases changed");
        r.verdict.note(!c.due || !equal(after, before), "the bases did not change: the test sees nothing");
        t.s.refresh = false;                                                  // recomputation: the same bits, and nothing moves
        r.verdict.note(output() == y && equal(bases(), after), "a recomputed forward differs");
    }
    r.at("refresh = 0: every call, every micro-batch");
    t.recipe.split.refresh = 0, t.s.refresh = true, r.ctx.step = 3;
    for (uint32_t micro = 0; micro < 3; micro++) {
        r.ctx.micro = micro;
        change();
        std::vector<acc_t> before = bases();
        t.forward(), t.backward();
        std::vector<acc_t> after = bases();
        for (size_t i = 0; i < before.size(); i += 16 * 16) r.verdict.note(memcmp(&before[i], &after[i], 16 * 16 * sizeof(acc_t)), "element %zu of the bases did not change", i);
    }
}

// A NaN or an infinity in X, W or D reaches every output that it enters, where the training loop's guard looks; no basis learns of it.
static void test_not_finite(Run& r) {
    const Shape shape = {40, 48, 64, 16};
    for (const Ablation& a : {ablations[0], ablations[1], ablations[8], ablations[9]})
        for (double bad : {(double)NAN, (double)INFINITY})
            for (Matrix where : {matrix_x, matrix_w, matrix_d}) {
                Recipe recipe = small_bases(*find_recipe(a.recipe));
                set_cells(recipe, a.changes);
                r.at("%s %s, %g in %c", a.recipe, a.changes, bad, "XWD"[where]);
                Layer t(r, recipe, shape, Kind::ordinary, true);
                t.forward(), t.backward();                                    // bases of a good step
                Buffer<acc_t>* bases[] = {&t.basis_x, &t.basis_w, &t.basis_d};
                std::vector<acc_t> before[3];
                for (int i = 0; i < 3; i++) before[i] = bases[i]->fetch().host;
                const int64_t row = 7, col = 21;
                if (where == matrix_x) assign(&t.x.host[row * t.in + col], bad), t.x.send();
                if (where == matrix_w) assign(&t.w.host[row * t.in + col], bad), t.w.send();
                if (where == matrix_d) assign(&t.d.host[row * t.out + col], bad), t.d.send();
                r.ctx.step = 8;
                t.forward(), t.backward();
                t.y.fetch(), t.dx.fetch(), t.dw.fetch();
                auto all = [&](auto& out, int64_t rows, int64_t cols, int64_t i0, int64_t j0, const char* what) {
                    for (int64_t i = i0 < 0 ? 0 : i0; i < (i0 < 0 ? rows : i0 + 1); i++)
                        for (int64_t j = j0 < 0 ? 0 : j0; j < (j0 < 0 ? cols : j0 + 1); j++)
                            r.verdict.note(!is_finite(out[i * cols + j]), "%s(%ld, %ld) is %g", what, (long)i, (long)j, out[i * cols + j]);
                };
                if (where == matrix_x) all(t.y, t.rows, t.out, row, -1, "Y"), all(t.dw, t.out, t.in, -1, col, "dW");
                if (where == matrix_w) all(t.y, t.rows, t.out, -1, row, "Y"), all(t.dx, t.rows, t.in, -1, col, "dX");
                if (where == matrix_d) all(t.dx, t.rows, t.in, row, -1, "dX"), all(t.dw, t.out, t.in, col, -1, "dW");
                bool split = recipe.cell[where == matrix_x ? fprop_x : where == matrix_w ? fprop_w : dgrad_d].split;
                bases[where]->fetch();
                if (split) r.verdict.note(!memcmp(before[where].data(), bases[where]->host.data(), before[where].size() * sizeof(acc_t)), "its basis changed");
            }
}

// ---------------------------------------------------------------------------------------------------------------------------
// Weights whose factors are trained

static const Shape trained_shapes[] = {{8, 96, 200, 16}, {8, 53, 70, 16}, {8, 64, 48, 32}};

// W_R + U diag(s) V in double, and its terms' magnitudes.
static Dense merged(const Dense& w_r, const Dense& u_, const std::vector<double>& s, const Dense& v, Dense* size = nullptr) {
    Dense us = u_;
    for (int64_t i = 0; i < us.rows; i++)
        for (int64_t j = 0; j < us.cols; j++) us[i][j] *= s[j];
    Dense sum = products(us, transposed(v));
    if (size) *size = products(magnitudes(us), transposed(magnitudes(v)));
    for (size_t i = 0; i < sum.v.size(); i++) {
        sum.v[i] += w_r.v[i];
        if (size) size->v[i] += std::fabs(w_r.v[i]);
    }
    return sum;
}

// The first split against the decomposition in double. V is a basis as test_subspace.cu knows them. Direction i has converged if
// (sigma_q / sigma_i)^60 is beyond a float; then s_i^2 errs by no more than the energies that Ritz compares, e, and v_i turns by
// sin <= 2 e / gap, the gap being that of the squares (Davis and Kahan). Nothing may be lost: what merge_factors() puts together again is W.
static void test_factors(Run& r) {
    struct { const char* name; double (*sigma)(int); } spectra[] = {
        {"as initialised", nullptr}, {"power law", [](int i) { return 1. / (1 + i); }}, {"a step after 16", [](int i) { return (i < 16 ? 1. : 0.3) / (1 + i); }},
        {"rank 5", [](int i) { return i < 5 ? 1. / (1 + i) : 0; }}, {"zero", [](int) { return 0.; }}};
    Recipe recipe = *find_recipe("metis");
    set_cells(recipe, "split.trained=1");
    for (auto& c : spectra)
        for (const Shape& shape : trained_shapes) {
            if (on_emulated && &shape - trained_shapes != (&c - spectra) % 3) continue;
            r.at("%s, %ldx%ld, rank %d", c.name, (long)shape.out, (long)shape.in, shape.k);
            Layer t(r, recipe, shape, Kind::ordinary, true);
            Rng rng{7};
            Dense w = c.sigma ? with_spectrum<acc_t>(rng, t.out, t.in, c.sigma) : gaussian(rng, t.out, t.in), size = w;
            for (double& x : w.v) x = (float)x;
            Layer::fill(t.w, w);
            split_weight(r.ctx, t.lin, t.s);
            merge_factors(r.ctx, t.merged.p, t.lin, 1);
            Dense w_r(t.out, t.in, t.w.fetch().values()), U(t.out, t.k, t.factor_u.fetch().values()), V(t.k, t.in, t.factor_v.fetch().values()), zero(t.out, t.in);
            std::vector<double> s = t.factor_s.fetch().values(), again = t.merged.fetch().values();
            if (!r.compare) continue;
            Refresh f = {t.out, t.in, t.out, shape.k};
            f.plan.cold = 30;
            Svd best = svd(w);
            check_basis(r, w, best, V, f);
            double total = energy(w), e = (energy_u(f) + orthonormality(f.q())) * total;
            r.verdict.note(lost(w, V) <= expected_loss(best, f) + energy_u(f) * total, "loses %g, the bound is %g", lost(w, V), expected_loss(best, f));
            Dense wv = products(w, V), wv_size = products(magnitudes(w), magnitudes(V));
            int turned = 0;
            for (int64_t j = 0; j < t.k; j++) {
                double length = 0, error = 0, square = best.sigma[j] * best.sigma[j];
                for (int64_t i = 0; i < t.out; i++) {
                    length += wv[i][j] * wv[i][j], error += std::pow((t.in + 2) * u * wv_size[i][j], 2);
                    r.verdict.close(U[i][j] * s[j], wv[i][j], (t.in + 4) * u * wv_size[i][j], "U s", i * t.k + j);
                }
                r.verdict.close(s[j], std::sqrt(length), std::sqrt(error) + (131 + t.out / 512.) * u * s[j], "s", j);
                if (!(square > 0) || std::pow(f.q() < t.in ? best.sigma[f.q()] / best.sigma[j] : 0, 60) > u) continue;
                r.verdict.close(s[j] * s[j], square, e + 300 * u * square, "s^2", j);
                double gap = std::min(j ? best.sigma[j - 1] * best.sigma[j - 1] - square : 1e30, square - (j + 1 < t.in ? std::pow(best.sigma[j + 1], 2) : 0));
                if (!(2 * e < 0.3 * gap)) continue;
                turned++;
                double cosine = std::fabs(dot(V[j], best.right[j], t.in));
                r.verdict.note(1 - cosine * cosine <= std::pow(2 * e / gap, 2) + orthonormality(f.q()), "v[%ld]: sin^2 is %g, allowed %g", (long)j, 1 - cosine * cosine, std::pow(2 * e / gap, 2));
            }
            r.verdict.note(turned >= (c.sigma && total > 0 ? 5 : 0), "only %d directions could be compared", turned);
            Dense low = merged(zero, U, s, V, &size);
            for (int64_t i = 0; i < t.out * t.in; i++) {                      // k products and sums, each rounded, of terms this large
                double all = std::fabs(w.v[i]) + size.v[i];
                r.verdict.close(w_r.v[i], w.v[i] - low.v[i], (t.k + 4) * u * all, "W_R", i);
                r.verdict.close(again[i], w.v[i], (2 * t.k + 4) * u * all, "W_R + U s V", i);
            }
        }
}

// Rows that do not split W see it merged: the bits of a layer that has those weights and no factors.
static void test_merged(Run& r) {
    for (const char* name : {"float", "bf16", "nvfp4", "nvidia"})
        for (const Shape& shape : {Shape{48, 53, 70, 16}, Shape{64, 64, 48, 32}}) {
            Recipe plain = *find_recipe(name);
            if ((on_gpu && sizeof(act_t) == 2 && is_float_stored(plain.cell[fprop_x].format)) || (plain.cell[wgrad_x].hadamard && shape.in % 16)) continue;
            if (on_emulated && shape.k > 16) continue;
            r.at("%s, %ldx%ld", name, (long)shape.out, (long)shape.in);
            Recipe recipe = plain;
            recipe.split.trained = 1;
            Layer t(r, recipe, shape, Kind::ordinary, true), other(r, plain, shape, Kind::ordinary, true);
            t.drift();
            merge_factors(r.ctx, t.merged.p, t.lin, 1);
            Dense size(0, 0), want = merged({t.out, t.in, t.w.values()}, {t.out, t.k, t.factor_u.values()}, t.factor_s.values(), {t.k, t.in, t.factor_v.values()}, &size);
            t.merged.fetch();
            for (int64_t i = 0; i < t.out * t.in; i++) r.verdict.close(t.merged[i], want.v[i], (t.k + 4) * u * size.v[i], "W", i);
            Layer::fill(other.w, {t.out, t.in, t.merged.values()});
            for (Layer* l : {&t, &other}) l->forward(), l->backward(), l->y.fetch(), l->dx.fetch(), l->dw.fetch();
            auto same = [&](auto& a, auto& b, const char* what) { r.verdict.note(!memcmp(a.host.data(), b.host.data(), a.n * sizeof a.host[0]), "%s is not that of the merged weights", what); };
            same(t.y, other.y, "Y"), same(t.dx, other.dx, "dX"), same(t.dw, other.dw, "dW");
        }
}

// The factors' gradients against central differences of the loss that they follow from, sum of G W: linear in each number by itself, so
// that no step is too large.
static void test_factor_gradients(Run& r) {
    Recipe recipe = *find_recipe("metis");
    set_cells(recipe, "split.trained=1");
    for (const Shape& shape : {Shape{8, 24, 20, 16}, Shape{8, 37, 53, 16}}) {
        r.at("%ldx%ld", (long)shape.out, (long)shape.in);
        Layer t(r, recipe, shape, Kind::ordinary, true);
        Rng rng{9};
        t.drift();
        Dense G = gaussian(rng, t.out, t.in);
        Layer::fill(t.dw, G);
        factor_gradients(r.ctx, t.lin);
        t.grad_u.fetch(), t.grad_s.fetch(), t.grad_v.fetch();
        if (!r.compare) continue;
        G.v = t.dw.values();
        Dense w_r(t.out, t.in), U(t.out, t.k, t.factor_u.values()), V(t.k, t.in, t.factor_v.values());
        std::vector<double> s = t.factor_s.values();
        auto slope = [&](double& x) {
            double before = x, at[2];
            for (int side : {0, 1}) x = before + (side ? 1 : -1), at[side] = dot(G.v.data(), merged(w_r, U, s, V).v.data(), (int64_t)G.v.size());
            x = before;
            return (at[1] - at[0]) / 2;
        };
        // Of each sum the magnitudes of what was added up: |G| |V|^T, |U|^T |G|.
        Dense gv = products(magnitudes(G), magnitudes(V)), ug = products(transposed(magnitudes(U)), transposed(magnitudes(G)));
        for (int64_t i = 0; i < t.out * t.k; i++) r.verdict.close(t.grad_u[i], slope(U.v[i]), (t.in + 4) * u * std::fabs(s[i % t.k]) * gv.v[i], "dU", i);
        for (int64_t i = 0; i < t.k * t.in; i++) r.verdict.close(t.grad_v[i], slope(V.v[i]), (t.out + 4) * u * std::fabs(s[i / t.in]) * ug.v[i], "dV", i);
        for (int64_t j = 0; j < t.k; j++) r.verdict.close(t.grad_s[j], slope(s[j]), (t.in + t.out + 4) * u * dot(ug[j], magnitudes(V)[j], t.in), "ds", j);
    }
}

int main(int argc, char** argv) {
    begin(argc, argv);
    test("split operands, products and layers", test_layers);
    test("split operands err less", test_purpose);
    test("when bases are refreshed", test_refreshes);
    test("NaN and infinity", test_not_finite);
    test("trained factors of W: the first split", test_factors);
    test("trained factors of W: merged for rows that do not split it", test_merged);
    test("trained factors of W: gradients", test_factor_gradients);
    return done();
}
