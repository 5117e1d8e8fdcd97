// metis.cuh: the quantised linear layer, for every recipe; and Metis' split of an operand.
//
// A linear layer Y = X W^T with X (l x m), W (n x m) and output gradient D (l x n) runs three GEMMs over six operands:
//
//     fprop  Y  (l x n)  = X   W^T      contracts over m      operands fprop_x, fprop_w
//     dgrad  dX (l x m)  = D   W        contracts over n      operands dgrad_d, dgrad_w
//     wgrad  dW (n x m) += D^T X        contracts over l      operands wgrad_d, wgrad_x
//
// A tensor core accepts blocks along the contracted axis only, so X, W and D are each prepared twice, along different axes.
// prepare() turns a matrix as it lies in memory into an operand as its cell says (recipes.cuh); the GEMMs below never know the recipe. A
// new paper is a new row there, or a new cell value with its line in fp4.cuh; linear_forward and linear_backward stay.
//
//     a matrix in memory (Mat) -> quant_call(): how -> quantise_operands(): one launch -> Prepared: where -> product(): the GEMM
//                                     split_operand(): what is taken away first, and the thin factors
//
// What backward keeps: X, in act_t, once per linear layer (the model's activation table owns it), and nothing else; W is read
// again from the master weights.
//
// Metis (arXiv 2509.00404, section 3; in words: README.md, "Metis in one page") is cells with split = yes: an operand
//
//     M = A L B^T + R        B: orthonormal basis of M's dominant right subspace (subspace.cuh); A L = M B, columns of A of length 1
//     M^ = Q(A) L Q(B)^T + Q(R)
//
// is never put together. With O the thin factor on the operand's own axis and C the one on the contracted axis (for X in fprop
// O = A, C = B; in wgrad, which contracts over tokens, O = B, C = A), the product of operands P and Q is
//
//     P^ Q^^T = R_p R_q^T  +  O_p (L_p C_p^T Q^^T)  +  (R_p C_q L_q) O_q^T
//
// one FP4 GEMM of residuals and two thin products, emulated as one GEMM with 2k more inner columns: product() below.
//
// Tests: make build/cpu/test_linear build/cpu/test_metis, then run them; test/test_metis.py repeats the split in NumPy.
#pragma once
#include "recipes.cuh"  // Recipe, Which; Cell, quantise; SplitPlan
#include "subspace.cuh" // refresh_basis; matmul, Mat, Type

// ---------------------------------------------------------------------------------------------------------------------------
// The linear layer

// Factors of W that are parameters beside W_R, which lies in W's place (split.trained): W = W_R + U diag(s) V. Or their gradients.
struct Triplets { acc_t *u = nullptr, *s = nullptr, *v = nullptr; };       // (out x k), (k), (k x in)

// What a linear layer keeps of its matrices' splits: bases, rows of length `cols`, part of the checkpoint; and M B from fprop to wgrad.
struct Splits {
    int k = 0;                             // the rank; 0: no cell of this layer's recipe splits
    acc_t* basis[3] = {};                  // of X (k x in), W (k x in), D (k x out)
    acc_t* projected[3] = {};              // X B (rows x k), W B (out x k), D B (rows x k; shared by all layers)
    Triplets factors = {}, grads = {};     // null: W is split on the fly, or not at all
};

// One weight matrix and how it is used. w and dw are (out x in), row-major.
struct Linear {
    std::string fprop, dgrad, wgrad;       // the profiler's names of its GEMMs
    int64_t in, out;
    acc_t *w, *dw;
    const Recipe* recipe;
    uint32_t id = 0;                       // which linear layer of the model: part of the names of its random draws
    float* scales = nullptr;               // S_enc and S_dec of X, of W and of D, kept from fprop to wgrad; null: made for every operand
    Splits splits = {};
};

// Scratch of one side of a GEMM for a split operand. Factors: A (rows x k), B (k x cols), in the operands' type.
struct SideScratch {
    acc_t *unit, *norms, *partial;         // A before rounding (rows x k); L (k); sums of squares (chunks x k)
    void *a, *b;                           // Q(A), Q(B)
    acc_t *low_a, *low_b;                  // Q(A) L and Q(B) as the residual is taken against: (rows x k), (k x cols)
    acc_t* cross;                          // R C of the other side's C (outer x k)
    float* scales;                         // S_enc, S_dec of A, of B
};

// Buffers for the operands of one GEMM (with room for thin_columns), and the quantiser's scratch; null where no recipe in use needs them.
struct OperandScratch {
    void *a = nullptr, *b = nullptr, *d = nullptr;         // d: of wgrad_d, where in_one_pass() makes it together with dgrad_d
    float *scales = nullptr, *partial = nullptr;           // S_enc and S_dec of a, b and d; the quantiser's partial results, twice if there is a d
    int64_t partials = 0;                                  // how many
    float* tally = nullptr;                                // a Tally of each operand; null: not now
    bool nearest = false;                                  // evaluation: no stochastic rounding
    bool refresh = false;                                  // bases may be refreshed: training, no recomputation
    SideScratch side[3] = {};                              // of a, b and d
    acc_t* inner = nullptr;                                // C_p^T C_q (k x k)
    acc_t* merged = nullptr;                               // W_R + U diag(s) V of any one W (out x in), if W's factors are trained
    SubspaceScratch subspace = {};
};

// The element type an operand of this format is stored in: bf16-valued operands are floats where the CPU cannot multiply bf16.
inline Type operand_type(Format f) {
    if (!is_float_stored(f) && MatmulPlans::bf16_units()) return Type::bf16;
    return type_of<acc_t>();
}

// Bytes that an operand of `elements` takes in scratch; 0 where it is used as it lies.
inline size_t operand_bytes(Cell cell, Type source, int64_t elements) {
    bool as_is = cell.format == Format::f32 ? source == operand_type(Format::f32) : cell.format == Format::bf16 && source == Type::bf16;
    return as_is ? 0 : elements * size_of(operand_type(cell.format));
}

// How many more inner columns the GEMM of operand `which` has for thin products: k for each of its two operands that is split.
inline int64_t thin_columns(const Recipe& r, Which which, int k) { return k * (r.cell[which].split + r.cell[which ^ 1].split); }

// The type of an operand of this cell that a tensor core reads itself; f32: there is none, or its blocks lie along the wrong axis, or it
// is split: then the GEMM is one of residuals beside thin factors (product()), which one block-scaled GEMM cannot hold.
inline Type narrow_type(const Cell& c) {
    if (c.split || c.along == Along::other) return Type::f32;
    if (is_carried(c)) return c.carrier == Carrier::e4m3 ? Type::fp8 : Type::fp8_e5m2;
    if (has_row_scales(c)) return c.format == Format::fp8 ? Type::fp8_row : Type::f32;
    return c.format == Format::fp8 ? Type::fp8 : c.format == Format::fp8_e5m2 ? Type::fp8_e5m2 : c.format == Format::mxfp8 ? Type::mxfp8
         : c.format == Format::nvfp4 ? Type::nvfp4 : Type::f32;
}
// Whether the GPU multiplies this GEMM's operands as they are: (m x k) (n x k)^T. Else they are emulated in bf16.
inline bool runs_natively(const Ctx& ctx, const Recipe& r, Which first, int64_t m, int64_t n, int64_t k, Type c, bool add) {
    const Cell &p = r.cell[first], &q = r.cell[first + 1];
    Type a = narrow_type(p), b = narrow_type(q);
    return ctx.plans->serves(a, b) && ctx.plans->has(narrow_key(a, b, m, n, k, c, add, has_tensor_scale(p) || has_tensor_scale(q)));
}

struct convert_rows; struct split_norms; struct split_lengths; struct split_factors; struct split_thin;
struct split_merged; struct split_gradients;

template <class To, class From> void convert(Ctx& ctx, To* to, int64_t ld, const From* from, int64_t rows, int64_t cols, bool round_bf16) {
    Cost cost = {double(rows) * cols * (sizeof(To) + sizeof(From)), 0};
    int n = (int)cols;
    for_rows<convert_rows>(ctx, cost, rows, KERNEL(Group<32> g, int64_t r) {
        g.map(n, [=](acc_t& o, acc_t v) {
            bf16 b;
            if (round_bf16) store(&b, (float)v), o = load(&b);
            else o = v;
        }, out(to + r * ld), from + r * n);
    });
}
inline void convert(Ctx& ctx, const Mat& to, const Mat& from, int64_t rows, int64_t cols, bool round_bf16) {
    if (from.type == Type::bf16 && to.type == Type::bf16) convert(ctx, (bf16*)to.data, to.ld, (const bf16*)from.data, rows, cols, false);
    else if (from.type == Type::bf16) convert(ctx, (acc_t*)to.data, to.ld, (const bf16*)from.data, rows, cols, round_bf16);
    else if (to.type == Type::bf16) convert(ctx, (bf16*)to.data, to.ld, (const acc_t*)from.data, rows, cols, round_bf16);
    else convert(ctx, (acc_t*)to.data, to.ld, (const acc_t*)from.data, rows, cols, round_bf16);
}

// Operands that are to be quantised, all of one matrix, up to the launch that does it: how, and into which memory; as a tensor core reads
// it if that Mat's type is narrow.
template <int n> struct Making {
    QuantCall call[n];
    Mat into[n];
    int count = 0;
    void add(const QuantCall& how, const Mat& where) { call[count] = how, into[count++] = where; }
};
template <class To, int n, class From> void quantise_as(Ctx& ctx, const Making<n>& made, const From* from) {
    QuantJobs<To, n> jobs;
    for (int i = 0; i < n; i++) {
        const QuantCall& call = made.call[i];
        const Mat& to = made.into[i];
        bool down = call.axis == Axis::column;
        // What lies between the last block and a tile's edge must be no NaN: padding is zero.
        int64_t outer = down ? call.cols : call.rows, inner = down ? call.rows : call.cols;
        if (to.blocks && has_scale_bytes(call.cell)) set_zero(ctx, (void*)to.blocks, packed_scale_bytes(call.cell, outer, inner, ScaleOrder::tiled));
        jobs.job[i].call = call;
        if (is_narrow(to.type)) jobs.job[i].packed = {(uint8_t*)to.data, (uint8_t*)to.blocks, ScaleOrder::tiled};
        else jobs.job[i].to = (To*)to.data;
    }
    quantise(ctx, jobs, from);
}
// One launch for all of them, after outer_scales() of each.
template <int n> void quantise_operands(Ctx& ctx, const Making<n>& made, const Mat& from) {
    if (made.count != n) fail("internal error: %d operands of %d are to be quantised", made.count, n);
    Type type = operand_type(made.call[0].cell.format);
    if (from.type == Type::bf16) {
        if (type == Type::bf16) quantise_as<bf16>(ctx, made, (const bf16*)from.data);
        else quantise_as<acc_t>(ctx, made, (const bf16*)from.data);
    } else if (type == Type::bf16) quantise_as<bf16>(ctx, made, (const acc_t*)from.data);
    else quantise_as<acc_t>(ctx, made, (const acc_t*)from.data);
}
// The scales that must be there before quantise(): the tensor's, unless it is, or the rows'.
inline void outer_scales(Ctx& ctx, const QuantCall& call, const Mat& from) {
    auto make = [&](auto* data) {
        if (has_tensor_scale(call.cell) && !call.scaled) tensor_scale(ctx, call, data);
        if (has_row_scales(call.cell)) row_scales(ctx, call, data);
    };
    if (from.type == Type::bf16) make((const bf16*)from.data);
    else make((const acc_t*)from.data);
}
inline void quantise_operand(Ctx& ctx, const QuantCall& call, const Mat& to, const Mat& from) {
    outer_scales(ctx, call, from);
    quantise_operands(ctx, Making<1>{{call}, {to}, 1}, from);
}

// Whether an operand of this cell is the same along either axis, and whenever it is made.
inline bool has_no_axis(const Cell& c) {
    return !has_blocks(c.format) && !has_row_scales(c) && !c.hadamard && !c.split && c.rounding == Rounding::nearest;
}
// Whether D needs to be made once only: wgrad's operand is dgrad's, transposed. (Where both GEMMs are emulated: a tensor core reads (outer x
// inner) alone.)
inline bool serves_twice(const Recipe& r) { return r.cell[dgrad_d] == r.cell[wgrad_d] && has_no_axis(r.cell[dgrad_d]); }

// Whether D's two operands are made in one pass over it, which costs a third operand's memory and saves a read of D.
inline bool in_one_pass(const Recipe& r) {
    const Cell &p = r.cell[dgrad_d], &q = r.cell[wgrad_d];
    if (!on_gpu && serves_twice(r)) return false;
    auto blocks = [](const Cell& c, Axis axis) { return (c.along == Along::contracted) == (axis == Axis::row) ? Axis::row : Axis::column; };
    return is_quantised(p.format) && is_quantised(q.format) && is_float_stored(p.format) == is_float_stored(q.format) &&
           in_one_pass(p, blocks(p, Axis::row), q, blocks(q, Axis::column));
}
// Which of a, b and d, and what goes with them, operand `which` is made in.
inline int place_of(const Recipe& r, Which which, const OperandScratch& s) { return which == wgrad_d && s.d && in_one_pass(r) ? 2 : which & 1; }

// Whether operand `which` takes over the tensor scale of the operand that was made of the same matrix before it in this pass: half
// of the passes over memory that amaxes cost. Without a split it is the same number. The two residuals of a split matrix whose factors
// are rounded alike differ by chance; should the second have a block beyond the first's amax, that block's scale saturates at 448.
inline bool same_scale(const Recipe& r, Which which, bool nearest) {
    if (made_before[which] == operand_count) return false;
    Cell a = r.cell[made_before[which]], b = r.cell[which];
    if (nearest) a.rounding = b.rounding = Rounding::nearest;
    bool alike = a.split == b.split && (!a.split || (a.factors == b.factors && a.residual == b.residual));
    bool one_rule = is_mx(a.format) == is_mx(b.format) && a.scale == b.scale && a.carrier == b.carrier && scale_rule(a).full == scale_rule(b).full;
    return has_tensor_scale(a) && has_tensor_scale(b) && !a.hadamard && !b.hadamard && alike && one_rule;
}

// An operand of a GEMM as product() takes it. r: the residual, or all of it, (outer x contracted). Of a split one also the thin
// factors o (outer x k) and c (k x contracted), each with its tensor scale, and l, the k singular values.
struct Prepared {
    Mat r;
    bool split = false;
    Mat o = {}, c = {};
    const acc_t* l = nullptr;
    bool half = false;          // what lies beside the codes is rounded to bf16, as where bf16 units multiply them
};

// l: the lengths of the columns of t = M B (rows x k), in a fixed order; unit = t / l, which may be t itself. partial: (chunks x k).
inline void unit_columns(Ctx& ctx, acc_t* unit, acc_t* l, const acc_t* t, int64_t rows, int k, acc_t* partial) {
    int64_t chunks = (rows + 255) / 256;
    for_rows<split_norms>(ctx, {(double)rows * k * sizeof(acc_t), 0}, chunks, KERNEL(Group<32> g, int64_t r) {
        acc_t* sum = partial + r * k;
        g.each(k, [=](int j) {
            sum[j] = 0;
            for (int64_t i = r * 256; i < rows && i < (r + 1) * 256; i++) sum[j] += t[i * k + j] * t[i * k + j];
        });
    });
    for_rows<split_lengths>(ctx, {}, 1, KERNEL(Group<32> g, int64_t) {
        g.each(k, [=](int j) {
            acc_t sum = 0;
            for (int64_t i = 0; i < chunks; i++) sum += partial[i * k + j];
            l[j] = std::sqrt(sum);
        });
    });
    for_rows<split_factors>(ctx, {2. * rows * k * sizeof(acc_t), 0}, rows, KERNEL(Group<32> g, int64_t r) {
        g.each(k, [=](int j) { unit[r * k + j] = l[j] > 0 ? t[r * k + j] / l[j] : l[j]; });
    });
}

// to (out x in) = W_R + sign U diag(s) V. With -1, W_R standing for W, it is what the factors leave of W.
inline void merge_factors(Ctx& ctx, acc_t* to, const Linear& lin, acc_t sign) {
    const acc_t *w = lin.w, *u = lin.splits.factors.u, *s = lin.splits.factors.s, *v = lin.splits.factors.v;
    int k = lin.splits.k, cols = (int)lin.in;
    for_rows<split_merged>(ctx, {2. * lin.out * cols * sizeof(acc_t), 2. * lin.out * cols * k}, lin.out, KERNEL(Group<32> g, int64_t r) {
        acc_t* row = to + r * cols;
        if (to != w) g.map(cols, [](acc_t& o, acc_t x) { o = x; }, out(row), w + r * cols);
        for (int j = 0; j < k; j++) {
            acc_t a = sign * u[r * k + j] * s[j];
            g.sync();                                                         // rows of odd lengths change which lane owns which column
            g.map(cols, [=](acc_t& o, acc_t x) { o += a * x; }, row, v + (int64_t)j * cols);
        }
    });
}

// W becomes W_R, U, s and V: its k largest singular triplets as 30 power iterations from a cold start find them, and what they leave. A
// direction's error falls with (sigma_q+1 / sigma_k)^60: where a spectrum is that flat, the factors are of others as large. Nothing is
// lost either way: V is orthonormal, s and U are W V^T, and merge_factors() gives W back but for float rounding.
inline void split_weight(Ctx& ctx, const Linear& lin, const OperandScratch& s) {
    const Triplets& f = lin.splits.factors;
    SplitPlan plan = lin.recipe->split;
    plan.cold = 30;
    Mat w = mat(lin.w, lin.in);
    refresh_basis(ctx, f.v, lin.splits.k, w, lin.out, lin.in, lin.out, plan, false, {ctx.seed, 0, 0, lin.id, fprop_w, Purpose::rows}, s.subspace);
    matmul(ctx, "split M B", f.u, lin.splits.k, w, mat(f.v, lin.in).transposed(), lin.out, lin.splits.k, lin.in, 0);
    unit_columns(ctx, f.u, f.s, f.u, lin.out, lin.splits.k, s.side[1].partial);
    merge_factors(ctx, lin.w, lin, -1);
}

// Gradients of the factors from G = dL/dW (which is W_R's), once it holds all of a step's micro-batches:
//     dU = G V^T diag(s),  ds_i = u_i^T G v_i,  dV = diag(s) U^T G
// of the factors as they are stored, straight through their rounding, as G is through W_R's: fprop and dgrad round along different axes.
inline void factor_gradients(Ctx& ctx, const Linear& lin) {
    const Triplets &f = lin.splits.factors, &d = lin.splits.grads;
    const acc_t *s = f.s, *v = f.v;
    acc_t *du = d.u, *ds = d.s, *dv = d.v;
    int k = lin.splits.k, cols = (int)lin.in;
    Mat grad = mat(lin.dw, lin.in);
    matmul(ctx, "split G V", du, k, grad, mat(v, lin.in).transposed(), lin.out, k, lin.in, 0);
    matmul(ctx, "split U G", dv, lin.in, mat(f.u, k).transposed(), grad, k, lin.in, lin.out, 0);
    for_rows<split_gradients, 128>(ctx, {3. * k * cols * sizeof(acc_t), 0}, k, KERNEL(Group<128> g, int64_t j) {
        acc_t sum = g.sum(cols, [](acc_t a, acc_t b) { return a * b; }, (const acc_t*)dv + j * cols, v + j * cols);
        g.map(cols, [=](acc_t& o) { o *= s[j]; }, dv + j * cols);
        if (g.lane() == 0) ds[j] = sum;
    });
    for_rows<split_gradients>(ctx, {2. * lin.out * k * sizeof(acc_t), 0}, lin.out, KERNEL(Group<32> g, int64_t r) {
        g.each(k, [=](int j) { du[r * k + j] *= s[j]; });
    });
}

// Whether this micro-batch refreshes the bases of `lin`, a layer whose recipe splits.
inline bool refresh_due(const Ctx& ctx, const Linear& lin) {
    int every = lin.recipe->split.refresh;
    return every == 0 || (ctx.micro == 0 && (ctx.step == 0 || (ctx.step + lin.id) % every == 0));
}

// The thin factors have random draws of their own: operands are numbered below 8.
constexpr uint32_t draws_of_a = 8, draws_of_b = 16;

// The part of prepare() that is Metis: A, L and B of `source` (rows x cols), and what they leave of it to quantise. In five steps:
//
//     1. B (k x cols): the basis, refreshed if it is due, else that of some steps ago: a stale B costs range, never correctness
//     2. T = M B^T (rows x k), L its columns' lengths, A = T / L
//     3. Q(A), Q(B), rounded like R but never transformed, in blocks along the same axis as R's: their products contract along it, too
//     4. p.o, p.c, p.l: the factors as product() multiplies them, as of axis row
//     5. call.low_a, low_b, k: Q(A) L and Q(B) in float, which the quantiser takes away from M tile by tile: R is never stored
//
// The second operand of a matrix in a pass (say wgrad_x) skips 1, and takes T from the first. Of a W whose factors are trained, `source` is
// W_R, the factors are what they are, and nothing is taken away.
inline void split_operand(Ctx& ctx, const Linear& lin, Which which, const OperandScratch& s, QuantCall& call, Mat source, Prepared& p) {
    const SideScratch& side = s.side[place_of(*lin.recipe, which, s)];
    const Recipe& recipe = *lin.recipe;
    const Matrix matrix = matrix_of[which];
    const Cell cell = call.cell;
    const int k = lin.splits.k;
    const int64_t rows = call.rows, cols = call.cols;
    const Type type = operand_type(cell.format);
    acc_t *basis = lin.splits.basis[matrix], *t = lin.splits.projected[matrix];
    const acc_t *unit = side.unit, *l = side.norms;
    Mat qa = {side.a, type, k}, qb = {side.b, type, cols};

    const Triplets& own = lin.splits.factors;
    const bool trained = matrix == matrix_w && own.u;
    if (trained) unit = own.u, l = own.s, basis = own.v;
    const bool first = made_before[which] == operand_count || !recipe.cell[made_before[which]].split;
    if (first && !trained) {
        const SplitPlan& plan = recipe.split;
        int64_t samples = matrix_of[which] == matrix_w ? rows : sampled_rows(plan, k, rows);       // of tokens a sample, of W all
        RandomKey key = {ctx.seed, ctx.step, ctx.micro, lin.id, (uint32_t)which, Purpose::rows};
        if (s.refresh && refresh_due(ctx, lin)) refresh_basis(ctx, basis, k, source, rows, cols, samples, plan, ctx.step > 0 && !plan.restart, key, s.subspace);
        Mat b = mat((const acc_t*)basis, cols);
        if (source.type == Type::bf16) {                          // a GEMM's operands are of one type
            convert(ctx, qb, b, k, cols, true);
            b = qb;
        }
        matmul(ctx, "split M B", t, k, source, b.transposed(), rows, k, cols, 0);
    }
    if (!trained) unit_columns(ctx, side.unit, side.norms, t, rows, k, side.partial);

    if (cell.factors == Factors::exact) {
        convert(ctx, qa, mat((const acc_t*)unit, k), rows, k, true);
        convert(ctx, qb, mat((const acc_t*)basis, cols), k, cols, true);
    } else {
        Cell thin = {cell.format, Block::vector, cell.factors == Factors::stochastic ? Rounding::stochastic : Rounding::nearest, cell.scale};
        QuantCall a = call, b = call;
        a.cell = b.cell = thin, a.tally = b.tally = nullptr, a.scaled = b.scaled = false;
        a.cols = k, a.key.operand += draws_of_a, a.scale = side.scales;
        b.rows = k, b.key.operand += draws_of_b, b.scale = side.scales + 2;
        if (cell.format == Format::e2m1) a.axis = Axis::column, b.axis = Axis::row;     // the published code: each along its long side
        quantise_operand(ctx, a, qa, mat((const acc_t*)unit, k));
        quantise_operand(ctx, b, qb, mat((const acc_t*)basis, cols));
        if (has_tensor_scale(cell)) qa.scale = a.scale + 1, qb.scale = b.scale + 1;
    }
    p.split = true, p.o = qa, p.c = qb, p.l = l;
    if (trained) return;

    call.k = k;
    if (cell.residual == Residual::exact) {
        call.low_a = t, call.low_b = basis;
        return;
    }
    // As they were rounded, decoded: what rounding lost of the low-rank part is in R then, and R's own rounding alone errs.
    const float *sa = qa.scale, *sb = qb.scale;
    const void *a = qa.data, *b = qb.data;
    acc_t *low_a = side.low_a, *low_b = side.low_b;
    bool half = type == Type::bf16;
    for_rows<split_factors>(ctx, {2. * rows * k * sizeof(acc_t), 0}, rows, KERNEL(Group<32> g, int64_t r) {
        acc_t scale = (sa ? *sa : 1.f) * (sb ? *sb : 1.f);
        g.each(k, [=](int j) { low_a[r * k + j] = (half ? (acc_t)load((const bf16*)a + r * k + j) : ((const acc_t*)a)[r * k + j]) * (scale * l[j]); });
    });
    for_rows<split_factors>(ctx, {2. * cols * k * sizeof(acc_t), 0}, k, KERNEL(Group<32> g, int64_t r) {
        g.each((int)cols, [=](int j) { low_b[r * cols + j] = half ? (acc_t)load((const bf16*)b + r * cols + j) : ((const acc_t*)b)[r * cols + j]; });
    });
    call.low_a = low_a, call.low_b = low_b;
}

// How operand `which` of lin is quantised as its cell says, but for a low-rank part and the form it is stored in. `axis`: where in the
// source (rows x cols) the contracted dimension is.
inline QuantCall quant_call(const Ctx& ctx, const Linear& lin, Which which, const OperandScratch& s, Axis axis, int64_t rows, int64_t cols) {
    Cell cell = lin.recipe->cell[which];
    if (s.nearest) {                                               // evaluation gives the same loss each time
        cell.rounding = Rounding::nearest;
        if (cell.factors != Factors::exact) cell.factors = Factors::nearest;
    }
    bool again = cell.draws == Draws::before;
    RandomKey key = {ctx.seed, ctx.step, ctx.micro, lin.id, (uint32_t)(again ? made_before[which] : which), Purpose::rounding, ctx.clock};
    RandomKey sign_key = key;
    sign_key.operand = (uint32_t)which / 2, sign_key.purpose = Purpose::signs;           // the GEMM's: both its operands turn the same signs
    Axis blocks = cell.along == Along::contracted ? axis : axis == Axis::row ? Axis::column : Axis::row;
    // A matrix's tensor scale is kept, where there is a place for it, for its next operand to take over. But D's second operand, made in one
    // pass with the first (place 2), would overwrite the first's, if it has one of its own.
    int place = place_of(*lin.recipe, which, s);
    bool scaled = lin.scales && same_scale(*lin.recipe, which, s.nearest);
    float* scale = lin.scales && (scaled || place < 2) ? lin.scales + 2 * matrix_of[which] : s.scales + 2 * place;
    float* partial = s.partial + (place == 2 ? s.partials : 0);
    QuantCall call = {cell, blocks, rows, cols, key, sign_key, scale, partial, s.tally ? s.tally + tally_sums * which : nullptr};
    call.scaled = scaled;
    return call;
}

// Turns the Mat of an operand's place into that of its packed form (outer x inner), codes and behind them scales, and tells the call.
// For the dimensions that has() admits both fit where the bf16 operand would.
inline void store_packed(QuantCall& call, Mat& to, int64_t outer, int64_t inner) {
    char* behind = (char*)to.data + packed_bytes(call.cell, outer, inner);
    to.type = narrow_type(call.cell), to.ld = inner;
    if (has_scale_bytes(call.cell)) to.blocks = (const uint8_t*)behind;
    if (has_row_scales(call.cell)) call.row_scale = (float*)behind, to.blocks = (const uint8_t*)behind;
}

// Operand number `which` of `lin`, made of `source` (rows x cols, contiguous) as its cell says, in its place of s unless it can be used
// as it lies. `axis`: where in `source` the contracted dimension is. What comes back is (outer x contracted). native: as a tensor core
// reads it. If `later` is given, the operand's elements await quantise_operands(), which makes all of a matrix's operands in one launch.
inline Prepared prepare(Ctx& ctx, const Linear& lin, Which which, const OperandScratch& s, Axis axis, Mat source, int64_t rows, int64_t cols,
                        bool native = false, Making<2>* later = nullptr) {
    const Cell cell = lin.recipe->cell[which];
    const int64_t thin = thin_columns(*lin.recipe, which, lin.splits.k);
    // Of a W whose factors are trained, a row without a split (one in bf16, or evaluation's) wants all of W.
    if (matrix_of[which] == matrix_w && lin.splits.factors.u && !cell.split) {
        merge_factors(ctx, s.merged, lin, 1);
        source = mat((const acc_t*)s.merged, cols);
    }
    Prepared p;
    p.r = source, p.half = !is_float_stored(cell.format);
    if (thin || operand_bytes(cell, source.type, 1) != 0) {
        // Behind the inner columns of an operand that lies along rows there is room for its thin factor; down columns it is below.
        void* const places[] = {s.a, s.b, s.d};
        p.r = {places[place_of(*lin.recipe, which, s)], operand_type(cell.format), axis == Axis::row ? cols + thin : cols};
        if (!is_quantised(cell.format)) convert(ctx, p.r, source, rows, cols, cell.format == Format::bf16);
        else {
            QuantCall call = quant_call(ctx, lin, which, s, axis, rows, cols);
            if (cell.split) split_operand(ctx, lin, which, s, call, source, p);
            else call.row_amax = source.row_amax;
            call.ld = p.r.ld;
            if (native) store_packed(call, p.r, axis == Axis::row ? rows : cols, axis == Axis::row ? cols : rows);
            outer_scales(ctx, call, source);
            if (later) later->add(call, p.r);
            else quantise_operands(ctx, Making<1>{{call}, {p.r}, 1}, source);
            if (has_tensor_scale(cell)) p.r.scale = call.scale + 1;
        }
    }
    if (axis == Axis::column && !native) {                         // M^T = B L A^T + R^T
        p.r = p.r.transposed();
        Mat a = p.o;
        p.o = p.c.transposed(), p.c = a.transposed();
    }
    return p;
}

// The GEMM of two split operands, P (m x contracted) and Q (n x contracted), each with thin factors O (outer x k) and C (k x contracted):
//
//     side of P:  [ R_p | O_p                                   | (R_p C_q^T) L_q ]
//     side of Q:  [ R_q | (R_q C_p^T + O_q L_q (C_q C_p^T)) L_p | O_q             ]        rows times rows: P^ Q^^T
//
// for the middle of Q's side is Q^ C_p^T. If only one operand is split, the other's half is not there. thin_factor() writes the two halves of
// one side behind its residual's inner columns. cross: R C^T of this side's R and the other's C (outer x k); inner: C_p C_q^T (k x k).
// The GEMM multiplies all columns by S(R_p) S(R_q). Codes of O stand there as they are, without their scale S(O): it moves into the partner
// of each, the column of the other side that meets it, which is also divided by S(R_p) S(R_q).
template <class To> void thin_factor(Ctx& ctx, const acc_t* cross, const Prepared& own, const Prepared& other, const acc_t* inner, bool second, int64_t outer,
                                     int64_t contracted, int k) {
    int64_t row = own.r.trans ? 1 : own.r.ld, col = own.r.trans ? own.r.ld : 1;
    To* to = (To*)own.r.data + contracted * col;
    const void* o = own.o.data;
    int64_t o_row = own.o.trans ? 1 : own.o.ld, o_col = own.o.trans ? own.o.ld : 1;
    const float *own_scale = own.o.scale, *other_scale = other.o.scale, *own_r_scale = own.r.scale, *other_r_scale = other.r.scale;
    const acc_t *own_l = own.l, *other_l = other.l;
    bool has_own = own.split, has_other = other.split, both = has_own && has_other, half = own.half;
    int own_column = second && both ? k : 0, other_column = !second && both ? k : 0;
    Cost cost = {(double)outer * (both ? 2 : 1) * k * sizeof(To) * 2, second && both ? 2. * outer * k * k : 0};
    for_rows<split_thin>(ctx, cost, outer, KERNEL(Group<32> g, int64_t r) {
        auto code = [=](int i) { return (acc_t)load((const To*)o + r * o_row + i * o_col); };
        if (has_own) g.each(k, [=](int i) { store(to + r * row + (own_column + i) * col, (float)code(i)); });
        if (!has_other) return;
        acc_t s_own = own_scale ? (acc_t)*own_scale : 1, s_other = other_scale ? (acc_t)*other_scale : 1;
        acc_t s_own_r = own_r_scale ? (acc_t)*own_r_scale : 1, s_other_r = other_r_scale ? (acc_t)*other_r_scale : 1;
        g.each(k, [=](int j) {
            acc_t v = cross[r * k + j];
            if (second && both)
                for (int i = 0; i < k; i++) v += code(i) * (s_own * own_l[i]) * inner[j * k + i];
            bf16 rounded;
            v = v * (other_l[j] * s_other) / s_own_r / s_other_r;
            if (half) store(&rounded, (float)v), v = load(&rounded);          // also where a CPU holds bf16 operands as floats
            store(to + r * row + (other_column + j) * col, (float)v);
        });
    });
}

// Y (m x n) = P (m x contracted) Q^T, plus beta Y. Thin products are 2k more inner columns of the same GEMM.
template <class T> void product(Ctx& ctx, const OperandScratch& s, const std::string& name, T* y, int64_t ld, const Prepared& p, const Prepared& q, int64_t m,
                                int64_t n, int64_t contracted, int beta, int k) {
    int64_t thin = (p.split + q.split) * (int64_t)k;
    if (thin) {
        const SideScratch &sp = s.side[0], &sq = s.side[1];
        if (q.split) matmul(ctx, "split R C", sp.cross, k, p.r, q.c.transposed(), m, k, contracted, 0);
        if (p.split) matmul(ctx, "split R C", sq.cross, k, q.r, p.c.transposed(), n, k, contracted, 0);
        if (p.split && q.split) matmul(ctx, "split C C", s.inner, k, p.c, q.c.transposed(), k, k, contracted, 0);
        auto make = [&](auto type) {
            typedef decltype(type) To;
            thin_factor<To>(ctx, sp.cross, p, q, s.inner, false, m, contracted, k);
            thin_factor<To>(ctx, sq.cross, q, p, s.inner, true, n, contracted, k);
        };
        if (p.r.type == Type::bf16) make(bf16());
        else make(acc_t());
    }
    matmul(ctx, name.c_str(), y, ld, p.r, q.r.transposed(), m, n, contracted + thin, beta);
}

// Y (rows x out) = X (rows x in) W^T.
template <class T> void linear_forward(Ctx& ctx, const Linear& lin, const OperandScratch& s, T* y, Mat x, int64_t rows) {
    bool native = runs_natively(ctx, *lin.recipe, fprop_x, rows, lin.out, lin.in, type_of<T>(), false);
    Prepared p = prepare(ctx, lin, fprop_x, s, Axis::row, x, rows, lin.in, native);
    Prepared q = prepare(ctx, lin, fprop_w, s, Axis::row, mat(lin.w, lin.in), lin.out, lin.in, native);
    product(ctx, s, lin.fprop, y, lin.out, p, q, rows, lin.out, lin.in, 0, lin.splits.k);
}

// dX (rows x in) = D (rows x out) W; dW (out x in) += D^T X.
template <class T> void linear_backward(Ctx& ctx, const Linear& lin, const OperandScratch& s, T* dx, Mat d, Mat x, int64_t rows) {
    bool native = runs_natively(ctx, *lin.recipe, dgrad_d, rows, lin.in, lin.out, type_of<T>(), false);
    bool native_w = runs_natively(ctx, *lin.recipe, wgrad_d, lin.out, lin.in, rows, type_of<acc_t>(), true);
    // D becomes two operands: one that serves twice; two, in one pass over D; or two, one after the other, where there is no place for both.
    bool twice = serves_twice(*lin.recipe) && !native && !native_w;
    bool together = !twice && place_of(*lin.recipe, wgrad_d, s) == 2;
    Prepared p, turned;
    if (together) {
        Making<2> made;
        p = prepare(ctx, lin, dgrad_d, s, Axis::row, d, rows, lin.out, native, &made);
        turned = prepare(ctx, lin, wgrad_d, s, Axis::column, d, rows, lin.out, native_w, &made);
        quantise_operands(ctx, made, d);
    } else p = prepare(ctx, lin, dgrad_d, s, Axis::row, d, rows, lin.out, native);
    Prepared q = prepare(ctx, lin, dgrad_w, s, Axis::column, mat(lin.w, lin.in), lin.out, lin.in, native);
    product(ctx, s, lin.dgrad, dx, lin.in, p, q, rows, lin.in, lin.out, 0, lin.splits.k);

    if (twice) turned = p, turned.r = p.r.transposed();
    else if (!together) turned = prepare(ctx, lin, wgrad_d, s, Axis::column, d, rows, lin.out, native_w);
    q = prepare(ctx, lin, wgrad_x, s, Axis::column, x, rows, lin.in, native_w);
    product(ctx, s, lin.wgrad, lin.dw, lin.in, turned, q, lin.out, lin.in, rows, 1, lin.splits.k);
}
