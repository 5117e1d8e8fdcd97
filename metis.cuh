// metis.cuh: the quantised linear layer. A recipe is data: one row of a table a published system, one cell an operand.
//
// A linear layer Y = X W^T with X (l x m), W (n x m) and output gradient D (l x n) runs three GEMMs over six operands:
//
//     fprop  Y  (l x n)  = X   W^T      contracts over m      operands fprop_x, fprop_w
//     dgrad  dX (l x m)  = D   W        contracts over n      operands dgrad_d, dgrad_w
//     wgrad  dW (n x m) += D^T X        contracts over l      operands wgrad_d, wgrad_x
//
// A tensor core accepts blocks along the contracted axis only, so X, W and D are each prepared twice, along different axes.
// prepare() turns a matrix as it lies in memory into an operand as its cell says; the GEMMs below never know the recipe. A new
// paper is a new row, or a new cell value with its line in fp4.cuh; the call list of linear_forward and linear_backward stays.
//
// What backward keeps: X, in act_t, once per linear layer (the model's activation table owns it), and nothing else; W is read
// again from the master weights.
#pragma once
#include "fp4.cuh"      // Operand, quantise
#include "matmul.cuh"   // matmul, Mat, Type

// ---------------------------------------------------------------------------------------------------------------------------
// The recipe table

enum Which { fprop_x, fprop_w, dgrad_d, dgrad_w, wgrad_d, wgrad_x, operand_count };      // operands of GEMM Which / 2
constexpr const char* operand_names[] = {"fprop_x", "fprop_w", "dgrad_d", "dgrad_w", "wgrad_d", "wgrad_x"};

struct Recipe {
    std::string name, about;
    Operand cell[operand_count];
    double last_share = 0;          // share of the blocks, from the end, whose linear layers stay in bf16
};

constexpr auto vec = Block::vector, square = Block::square;
constexpr auto rn = Rounding::nearest, sr = Rounding::stochastic;
constexpr Operand f32 = {Format::f32}, b16 = {Format::bf16}, fp8 = {Format::fp8}, fp8g = {Format::fp8_e5m2};
constexpr Operand mx8 = {Format::mxfp8, vec, rn, Scale::ceil}, mx4 = {Format::mxfp4, vec, rn, Scale::ceil};
constexpr Operand nv = {Format::nvfp4}, nv_sr = {Format::nvfp4, vec, sr}, nv_sq = {Format::nvfp4, square};
constexpr Operand nv_h = {Format::nvfp4, vec, rn, Scale::te, 16}, nv_sr_h = {Format::nvfp4, vec, sr, Scale::te, 16};
constexpr Operand fs = {Format::nvfp4, vec, rn, Scale::four_six}, fs_sq = {Format::nvfp4, square, rn, Scale::four_six};
constexpr Operand fs_sr = {Format::nvfp4, vec, sr, Scale::four_six}, fs_h = {Format::nvfp4, vec, rn, Scale::four_six, 16};
constexpr Operand fs_sr_h = {Format::nvfp4, vec, sr, Scale::four_six, 16};

// Sources, in the order of the rows: FP8 current scaling and MXFP8 as TransformerEngine does them (E5M2 for D; E4M3 for all);
// nvfp4-sr: arXiv 2509.25149 found stochastic rounding to help D and to harm X and W; nvidia: that paper's recipe, the bf16 blocks
// being its advice of 15% at the end; mxfp4: 2506.08027's scales; four-over-six: 2512.02010 and its published configuration.
inline const std::vector<Recipe>& recipes() {
    static const std::vector<Recipe> table = {
        //                 fprop          dgrad          wgrad
        //                X     W        D      W       D        X
        {"float",         "float operands, float accumulation",
                          {f32,  f32,     f32,   f32,    f32,     f32}},
        {"bf16",          "bf16 operands, float accumulation: the baseline of every gap",
                          {b16,  b16,     b16,   b16,    b16,     b16}},
        {"fp8",           "FP8, one scale a tensor: E4M3, gradients E5M2",
                          {fp8,  fp8,     fp8g,  fp8,    fp8g,    fp8}},
        {"mxfp8",         "E4M3 in blocks of 32 under power-of-two scales",
                          {mx8,  mx8,     mx8,   mx8,    mx8,     mx8}},
        {"nvfp4",         "E2M1 in blocks of 16 under E4M3 scales, nearest everywhere",
                          {nv,   nv,      nv,    nv,     nv,      nv}},
        {"nvfp4-sr",      "the same, gradients rounded stochastically",
                          {nv,   nv,      nv_sr, nv,     nv_sr,   nv}},
        {"nvidia",        "NVIDIA's: square weight blocks, Hadamard in wgrad, stochastic D, 15% of blocks bf16",
                          {nv,   nv_sq,   nv_sr, nv_sq,  nv_sr_h, nv_h}, 0.15},
        {"mxfp4",         "E2M1 in blocks of 32 under power-of-two scales, nearest everywhere",
                          {mx4,  mx4,     mx4,   mx4,    mx4,     mx4}},
        {"four-over-six", "nvidia, each block's largest element on 6 or on 4, whichever errs less",
                          {fs,   fs_sq,   fs_sr, fs_sq,  fs_sr_h, fs_h}, 1. / 6},
    };
    return table;
}

// The row called `name`, or null.
inline const Recipe* find_recipe(const std::string& name) {
    for (const Recipe& r : recipes())
        if (name == r.name) return &r;
    return nullptr;
}

// Cells as people write them: KEY=VALUE of --set, and the table's short form. One list for both and for the error lines.
struct CellKey {
    const char* name;
    std::vector<const char*> values;      // in the order of the enum
};
inline const std::vector<CellKey>& cell_keys() {
    static const std::vector<CellKey> keys = {
        {"format", {"f32", "bf16", "fp8", "fp8_e5m2", "mxfp8", "nvfp4", "mxfp4"}},
        {"block", {"vector", "square"}},
        {"rounding", {"nearest", "stochastic"}},
        {"scale", {"te", "headroom", "four_six", "floor", "ceil"}},
        {"hadamard", {"0", "16", "32", "64", "128"}},
        {"signs", {"fixed", "random", "plus"}},
    };
    return keys;
}

// "nvfp4", and what differs from the format's usual: "nvfp4 16x16", "nvfp4 sr h16", "mxfp4 floor".
inline std::string cell_text(Operand c) {
    std::string text = cell_keys()[0].values[(int)c.format];
    if (has_blocks(c.format) && c.block == Block::square) text += is_mx(c.format) ? " 32x32" : " 16x16";
    if (c.rounding == Rounding::stochastic) text += " sr";
    if (c.scale == Scale::headroom) text += " 17/16";
    if (c.scale == Scale::four_six) text += " 4/6";
    if (is_mx(c.format) && c.scale == Scale::floor) text += " floor";
    if (c.hadamard) text += " h" + std::to_string(c.hadamard) + (c.signs == Signs::random ? "r" : c.signs == Signs::plus ? "+" : "");
    return text;
}

// Changes cells of r by "WHICH.KEY=VALUE,...", WHICH an operand's name, or a part of it (x, w, d, fprop, dgrad, wgrad), or all.
inline void set_cells(Recipe& r, const std::string& changes) {
    for (size_t at = 0, comma; at < changes.size(); at = comma + 1) {
        comma = std::min(changes.find(',', at), changes.size());
        std::string change = changes.substr(at, comma - at);
        size_t dot = change.find('.'), equals = change.find('=');
        if (dot == std::string::npos || equals == std::string::npos || equals < dot)
            fail("--set %s: want WHICH.KEY=VALUE, such as wgrad_d.rounding=stochastic", change.c_str());
        std::string which = change.substr(0, dot), key = change.substr(dot + 1, equals - dot - 1), value = change.substr(equals + 1);
        size_t k = 0, v = 0;
        std::string all;
        while (k < cell_keys().size() && key != cell_keys()[k].name) all += (k ? ", " : "") + std::string(cell_keys()[k].name), k++;
        if (k == cell_keys().size()) fail("--set %s: there is no %s; keys are %s", change.c_str(), key.c_str(), all.c_str());
        all = "";
        const CellKey& known = cell_keys()[k];
        while (v < known.values.size() && value != known.values[v]) all += (v ? ", " : "") + std::string(known.values[v]), v++;
        if (v == known.values.size()) fail("--set %s: %s is one of %s", change.c_str(), key.c_str(), all.c_str());
        int matched = 0;
        for (int i = 0; i < operand_count; i++) {
            std::string name = operand_names[i];
            if (which != "all" && which != name && which != name.substr(0, 5) && which != name.substr(6)) continue;
            matched++;
            Operand& c = r.cell[i];
            if (k == 0) {
                c.format = (Format)v;
                if (!is_quantised(c.format)) c = {c.format};
                if (is_mx(c.format) && c.scale < Scale::floor) c.scale = Scale::ceil;
                if (!is_mx(c.format) && c.scale >= Scale::floor) c.scale = Scale::te;
            }
            if (k == 1) c.block = (Block)v;
            if (k == 2) c.rounding = (Rounding)v;
            if (k == 3) c.scale = (Scale)v;
            if (k == 4) c.hadamard = atoi(known.values[v]);
            if (k == 5) c.signs = (Signs)v;
        }
        if (!matched) fail("--set %s: %s names no operand; they are %s ... %s, or x, w, d, fprop, dgrad, wgrad, all", change.c_str(), which.c_str(),
                           operand_names[0], operand_names[operand_count - 1]);
    }
}

// One line on the first cell, or pair of cells, that makes no sense.
inline void check_recipe(const Recipe& r) {
    for (int i = 0; i < operand_count; i++) {
        const Operand& c = r.cell[i];
        auto refuse = [&](const char* why) { fail("%s of recipe %s: %s", operand_names[i], r.name.c_str(), why); };
        if (!is_quantised(c.format) && !(c == Operand{c.format})) refuse("f32 and bf16 take no block, rounding, scale or hadamard");
        if (!has_blocks(c.format) && c.block == Block::square) refuse("only nvfp4, mxfp4 and mxfp8 have blocks");
        if (c.format == Format::nvfp4 && c.scale >= Scale::floor) refuse("nvfp4's scale is te, headroom or four_six");
        if (is_mx(c.format) && c.scale < Scale::floor) refuse("an MX format's scale is floor or ceil");
        if (c.format != Format::nvfp4 && !is_mx(c.format) && c.scale != Scale::te) refuse("only block formats have scale rules");
        if (c.hadamard && c.block == Block::square) refuse("a square block cannot have a hadamard: it would serve one axis only");
        if (c.hadamard && has_blocks(c.format) && c.hadamard % block_length(c.format)) refuse("the hadamard must cover whole blocks");
        const Operand& other = r.cell[i ^ 1];
        if (c.hadamard != other.hadamard || (c.hadamard && c.signs != other.signs)) refuse("both operands of a GEMM need the same hadamard and signs, or they do not cancel");
        if ((c.format == Format::f32) != (other.format == Format::f32)) refuse("f32 meets only f32 in a GEMM");
    }
}

inline bool is_quantised(const Recipe& r) {
    for (int i = 0; i < operand_count; i++)
        if (is_quantised(r.cell[i].format)) return true;
    return false;
}

// ---------------------------------------------------------------------------------------------------------------------------
// The linear layer

// One weight matrix and how it is used. w and dw are (out x in), row-major.
struct Linear {
    std::string fprop, dgrad, wgrad;       // the profiler's names of its GEMMs
    int64_t in, out;
    const acc_t* w;
    acc_t* dw;
    const Recipe* recipe;
    uint32_t id = 0;                       // which linear layer of the model: part of the names of its random draws
    float* scales = nullptr;               // S_enc and S_dec of X, of W and of D, kept from fprop to wgrad; null: made for every operand
};

// Buffers for the operands of one GEMM, and the quantiser's scratch; null where no recipe in use needs them.
struct OperandScratch {
    void *a = nullptr, *b = nullptr;
    float *scales = nullptr, *partial = nullptr;           // S_enc and S_dec of a and of b; the quantiser's partial results
    float* tally = nullptr;                                // operand_count x 5: Tally of each operand; null: not now
    bool nearest = false;                                  // evaluation: no stochastic rounding
};

// The element type an operand of this format is stored in: bf16-valued operands are floats where the CPU cannot multiply bf16.
inline Type operand_type(Format f) {
    if (f != Format::f32 && MatmulPlans::bf16_units()) return Type::bf16;
    return type_of<acc_t>();
}

// Bytes that an operand of `elements` takes in scratch; 0 where it is used as it lies.
inline size_t operand_bytes(Operand cell, Type source, int64_t elements) {
    bool as_is = cell.format == Format::f32 ? source == operand_type(Format::f32) : cell.format == Format::bf16 && source == Type::bf16;
    return as_is ? 0 : elements * size_of(operand_type(cell.format));
}

struct prepare_operand;

template <class To, class From> void convert(Ctx& ctx, To* to, const From* from, int64_t rows, int64_t cols, bool round_bf16) {
    Cost cost = {double(rows) * cols * (sizeof(To) + sizeof(From)), 0};
    int n = (int)cols;
    for_rows<prepare_operand>(ctx, cost, rows, KERNEL(Group<32> g, int64_t r) {
        g.map(n, [=](acc_t& o, acc_t v) {
            bf16 b;
            if (round_bf16) store(&b, (float)v), o = load(&b);
            else o = v;
        }, out(to + r * n), from + r * n);
    });
}

template <class To, class From> void quantise_operand(Ctx& ctx, const QuantCall& call, bool scaled, void* to, const Mat& source) {
    if (has_tensor_scale(call.cell.format) && !scaled) tensor_scale(ctx, call, (const From*)source.data);
    quantise(ctx, call, (To*)to, (const From*)source.data);
}

// Whether operand `which` has the tensor scale of the operand that was made of the same matrix before it in this pass: a third of
// the passes over memory that amaxes cost, and no bit of difference.
inline bool same_scale(const Recipe& r, Which which, bool nearest) {
    const Which before[] = {operand_count, operand_count, operand_count, fprop_w, dgrad_d, fprop_x};
    if (before[which] == operand_count) return false;
    Operand a = r.cell[before[which]], b = r.cell[which];
    if (nearest) a.rounding = b.rounding = Rounding::nearest;
    return has_tensor_scale(a.format) && has_tensor_scale(b.format) && !a.hadamard && !b.hadamard && scale_rule(a).full == scale_rule(b).full;
}

// Operand number `which` of `lin`, made of `source` (rows x cols, contiguous) as its cell says, in s.a or s.b unless it can be used
// as it lies. `axis`: where in `source` the contracted dimension is.
inline Mat prepare(Ctx& ctx, const Linear& lin, Which which, const OperandScratch& s, Axis axis, Mat source, int64_t rows, int64_t cols) {
    Operand cell = lin.recipe->cell[which];
    if (operand_bytes(cell, source.type, 1) == 0) return source;
    bool second = which & 1;
    void* buffer = second ? s.b : s.a;
    Mat made = {buffer, operand_type(cell.format), cols};
    if (!is_quantised(cell.format)) {
        bool round = cell.format == Format::bf16;
        if (source.type == Type::bf16) convert(ctx, (acc_t*)buffer, (const bf16*)source.data, rows, cols, round);
        else if (made.type == Type::bf16) convert(ctx, (bf16*)buffer, (const acc_t*)source.data, rows, cols, round);
        else convert(ctx, (acc_t*)buffer, (const acc_t*)source.data, rows, cols, round);
        return made;
    }
    if (s.nearest) cell.rounding = Rounding::nearest;
    RandomKey key = {ctx.seed, ctx.step, ctx.micro, lin.id, (uint32_t)which, Purpose::rounding}, sign_key = key;
    sign_key.operand = (uint32_t)which / 2, sign_key.purpose = Purpose::signs;
    const int matrix[] = {0, 1, 2, 1, 2, 0};                // X, W or D
    float* scale = lin.scales ? lin.scales + 2 * matrix[which] : s.scales + 2 * second;
    bool scaled = lin.scales && same_scale(*lin.recipe, which, s.nearest);
    QuantCall call = {cell, axis, rows, cols, key, sign_key, scale, s.partial, s.tally ? s.tally + 5 * which : nullptr};
    if (source.type == Type::bf16) {
        if (made.type == Type::bf16) quantise_operand<bf16, bf16>(ctx, call, scaled, buffer, source);
        else quantise_operand<acc_t, bf16>(ctx, call, scaled, buffer, source);
    } else if (made.type == Type::bf16) quantise_operand<bf16, acc_t>(ctx, call, scaled, buffer, source);
    else quantise_operand<acc_t, acc_t>(ctx, call, scaled, buffer, source);
    if (has_tensor_scale(cell.format)) made.scale = call.scale + 1;
    return made;
}

// Y (rows x out) = X (rows x in) W^T.
template <class T> void linear_forward(Ctx& ctx, const Linear& lin, const OperandScratch& s, T* y, Mat x, int64_t rows) {
    Mat a = prepare(ctx, lin, fprop_x, s, Axis::row, x, rows, lin.in);
    Mat b = prepare(ctx, lin, fprop_w, s, Axis::row, mat(lin.w, lin.in), lin.out, lin.in);
    matmul(ctx, lin.fprop.c_str(), y, lin.out, a, b.transposed(), rows, lin.out, lin.in, 0);
}

// dX (rows x in) = D (rows x out) W; dW (out x in) += D^T X.
template <class T> void linear_backward(Ctx& ctx, const Linear& lin, const OperandScratch& s, T* dx, Mat d, Mat x, int64_t rows) {
    Mat a = prepare(ctx, lin, dgrad_d, s, Axis::row, d, rows, lin.out);
    Mat b = prepare(ctx, lin, dgrad_w, s, Axis::column, mat(lin.w, lin.in), lin.out, lin.in);
    matmul(ctx, lin.dgrad.c_str(), dx, lin.in, a, b, rows, lin.in, lin.out, 0);

    // Without blocks, a Hadamard or random draws an operand has no axis: D serves twice.
    const Operand &once = lin.recipe->cell[dgrad_d], &again = lin.recipe->cell[wgrad_d];
    bool same = once == again && !has_blocks(once.format) && !once.hadamard && once.rounding == Rounding::nearest;
    if (!same) a = prepare(ctx, lin, wgrad_d, s, Axis::column, d, rows, lin.out);
    b = prepare(ctx, lin, wgrad_x, s, Axis::column, x, rows, lin.in);
    matmul(ctx, lin.wgrad.c_str(), lin.dw, lin.in, a.transposed(), b, lin.out, lin.in, rows, 1);
}
