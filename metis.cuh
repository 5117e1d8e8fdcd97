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
// Metis (arXiv 2509.00404, section 3; DESIGN in README.md "Metis in one page") is cells with split = yes: an operand
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
#pragma once
#include "fp4.cuh"      // Operand, quantise
#include "subspace.cuh" // refresh_basis, SplitPlan; matmul, Mat, Type

// ---------------------------------------------------------------------------------------------------------------------------
// The recipe table

enum Which { fprop_x, fprop_w, dgrad_d, dgrad_w, wgrad_d, wgrad_x, operand_count };      // operands of GEMM Which / 2
constexpr const char* operand_names[] = {"fprop_x", "fprop_w", "dgrad_d", "dgrad_w", "wgrad_d", "wgrad_x"};

enum Matrix { matrix_x, matrix_w, matrix_d };
constexpr Matrix matrix_of[operand_count] = {matrix_x, matrix_w, matrix_d, matrix_w, matrix_d, matrix_x};
// The operand made of the same matrix before this one in a pass, or none.
constexpr Which made_before[operand_count] = {operand_count, operand_count, operand_count, fprop_w, dgrad_d, fprop_x};

struct Recipe {
    std::string name, about;
    Operand cell[operand_count];
    double last_share = 0;          // share of the blocks, from the end, whose linear layers stay in bf16
    SplitPlan split = {};           // for cells with split = yes
};

constexpr auto vec = Block::vector, square = Block::square;
constexpr auto rn = Rounding::nearest, sr = Rounding::stochastic;
constexpr Operand f32 = {Format::f32}, b16 = {Format::bf16}, fp8 = {Format::fp8}, fp8g = {Format::fp8_e5m2};
constexpr Operand f8r = {Format::fp8, Block::row};
constexpr Operand mx8 = {Format::mxfp8, vec, rn, Scale::ceil}, mx4 = {Format::mxfp4, vec, rn, Scale::ceil};
constexpr Operand nvf = {Format::nvfp4}, nvf_sr = {Format::nvfp4, vec, sr}, nvf_sq = {Format::nvfp4, square};
constexpr Operand nvf_h = {Format::nvfp4, vec, rn, Scale::te, 16}, nvf_sr_h = {Format::nvfp4, vec, sr, Scale::te, 16};
constexpr Operand fs = {Format::nvfp4, vec, rn, Scale::four_six}, fs_sq = {Format::nvfp4, square, rn, Scale::four_six};
constexpr Operand fs_sr = {Format::nvfp4, vec, sr, Scale::four_six}, fs_h = {Format::nvfp4, vec, rn, Scale::four_six, 16};
constexpr Operand fs_sr_h = {Format::nvfp4, vec, sr, Scale::four_six, 16};
constexpr Operand on_fp8(Operand c, Carrier carrier) {
    c.carrier = carrier;
    return c;
}
constexpr Operand po2 = {Format::nvfp4, vec, rn, Scale::po2};
constexpr Operand mx4_8 = on_fp8(mx4, Carrier::e4m3), mx4_8g = on_fp8(mx4, Carrier::e5m2), nvf_8 = on_fp8(po2, Carrier::e4m3), nvf_8g = on_fp8(po2, Carrier::e5m2);
constexpr Operand split(Operand c) {
    c.split = true;
    return c;
}
constexpr Operand ms = split(nvf), ms_sr = split(nvf_sr);
// Metis/bitlinear.py and quant.py: X and W in blocks along m, D along the tokens, in every GEMM; X and D are rounded once, W afresh.
constexpr Operand code(bool split, Along along, Draws draws) {
    return {Format::e2m1, vec, sr, Scale::te, 0, Signs::fixed, split, Factors::stochastic, Residual::exact, along, draws};
}
constexpr Operand mc = code(false, Along::contracted, Draws::own), mc_w = code(false, Along::other, Draws::own), mc_x = code(false, Along::other, Draws::before);
constexpr Operand mc_d = code(true, Along::other, Draws::own), mc_d2 = code(true, Along::contracted, Draws::before);

// Sources, in the order of the rows: FP8 current scaling and MXFP8 as TransformerEngine does them (E5M2 for D; E4M3 for all);
// nvfp4-sr: arXiv 2509.25149 found stochastic rounding to help D and to harm X and W; nvidia: that paper's recipe, the bf16 blocks
// being its advice of 15% at the end; mxfp4: 2506.08027's scales; four-over-six: 2512.02010 and its published configuration; metis:
// 2509.00404, but for nearest rounding of X and W and of all factors, and residuals taken against the rounded low-rank part.
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
        {"fp8-rows",      "E4M3, a power-of-two scale for each row of an operand",
                          {f8r,  f8r,     f8r,   f8r,    f8r,     f8r}},
        {"mxfp8",         "E4M3 in blocks of 32 under power-of-two scales",
                          {mx8,  mx8,     mx8,   mx8,    mx8,     mx8}},
        {"nvfp4",         "E2M1 in blocks of 16 under E4M3 scales, nearest everywhere",
                          {nvf,   nvf,      nvf,    nvf,     nvf,      nvf}},
        {"nvfp4-sr",      "the same, gradients rounded stochastically",
                          {nvf,   nvf,      nvf_sr, nvf,     nvf_sr,   nvf}},
        {"nvidia",        "NVIDIA's: square weight blocks, Hadamard in wgrad, stochastic D, 15% of blocks bf16",
                          {nvf,   nvf_sq,   nvf_sr, nvf_sq,  nvf_sr_h, nvf_h}, 0.15},
        {"mxfp4",         "E2M1 in blocks of 32 under power-of-two scales, nearest everywhere",
                          {mx4,  mx4,     mx4,   mx4,    mx4,     mx4}},
        {"mxfp4-fp8",     "mxfp4 on FP8 units: codes times scales as E4M3, of gradients as E5M2",
                          {mx4_8, mx4_8,    mx4_8g, mx4_8,   mx4_8g,   mx4_8}},
        {"nvfp4-fp8",     "nvfp4 on FP8 units likewise, its block scales powers of two",
                          {nvf_8, nvf_8,    nvf_8g, nvf_8,   nvf_8g,   nvf_8}},
        {"four-over-six", "nvidia, each block's largest element on 6 or on 4, whichever errs less",
                          {fs,   fs_sq,   fs_sr, fs_sq,  fs_sr_h, fs_h}, 1. / 6},
        {"metis-code",    "what Metis' published code does: D alone split, 64 directions at every call, float scales, one quantisation for two GEMMs",
                          {mc,   mc,      mc_d,  mc_w,   mc_d2,   mc_x}, 0, {0, 100, 0, 0, 0, 0, 1, 64}},
        {"metis",         "X, W and D split: a part of rank 1.5% of the width, at least 16, and a residual, each NVFP4; residuals of D stochastic",
                          {ms,   ms,      ms_sr, ms,     ms_sr,   ms}},
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
    void (*set)(Operand& c, int value);
};
inline const std::vector<CellKey>& cell_keys() {
    static const std::vector<CellKey> keys = {
        {"format", {"f32", "bf16", "fp8", "fp8_e5m2", "mxfp8", "nvfp4", "mxfp4", "e2m1"}, [](Operand& c, int v) {
            c.format = (Format)v;                                    // and what the new format cannot have becomes its usual
            if (!is_quantised(c.format)) c = {c.format};
            if (is_mx(c.format) && c.scale < Scale::floor) c.scale = Scale::ceil;
            if (!is_mx(c.format) && (c.format != Format::nvfp4 || c.scale >= Scale::floor)) c.scale = Scale::te;
            if (!is_4bit(c.format)) c.carrier = Carrier::own;
            if (!is_fp8(c.format) && c.block == Block::row) c.block = Block::vector;
        }},
        {"block", {"vector", "square", "row"}, [](Operand& c, int v) { c.block = (Block)v; }},
        {"rounding", {"nearest", "stochastic"}, [](Operand& c, int v) { c.rounding = (Rounding)v; }},
        {"scale", {"te", "headroom", "four_six", "po2", "floor", "ceil"}, [](Operand& c, int v) { c.scale = (Scale)v; }},
        {"hadamard", {"0", "16", "32", "64", "128"}, [](Operand& c, int v) { c.hadamard = v ? 8 << v : 0; }},
        {"signs", {"fixed", "random", "plus"}, [](Operand& c, int v) { c.signs = (Signs)v; }},
        {"split", {"no", "yes"}, [](Operand& c, int v) { c.split = v; }},
        {"factors", {"nearest", "stochastic", "exact"}, [](Operand& c, int v) { c.factors = (Factors)v; }},
        {"residual", {"quantised", "exact"}, [](Operand& c, int v) { c.residual = (Residual)v; }},
        {"along", {"contracted", "other"}, [](Operand& c, int v) { c.along = (Along)v; }},
        {"draws", {"own", "before"}, [](Operand& c, int v) { c.draws = (Draws)v; }},
        {"carrier", {"own", "e4m3", "e5m2"}, [](Operand& c, int v) { c.carrier = (Carrier)v; }},
    };
    return keys;
}

// "nvfp4", and what differs from the format's usual: "nvfp4 16x16", "nvfp4 sr h16", "mxfp4 floor".
inline std::string cell_text(Operand c) {
    std::string text = (c.split ? "split " : "") + std::string(cell_keys()[0].values[(int)c.format]);
    if (has_blocks(c.format) && c.block == Block::square) text += is_mx(c.format) ? " 32x32" : " 16x16";
    if (has_row_scales(c)) text += " rows";
    if (c.rounding == Rounding::stochastic) text += " sr";
    if (c.scale == Scale::headroom) text += " 17/16";
    if (c.scale == Scale::four_six) text += " 4/6";
    if (c.scale == Scale::po2) text += " po2";
    if (is_mx(c.format) && c.scale == Scale::floor) text += " floor";
    if (c.hadamard) text += " h" + std::to_string(c.hadamard) + (c.signs == Signs::random ? "r" : c.signs == Signs::plus ? "+" : "");
    if (c.split && c.factors != Factors::nearest) text += c.factors == Factors::exact ? " AB exact" : " AB sr";
    if (c.split && c.residual == Residual::exact) text += " R exact";
    if (c.along == Along::other) text += " across";
    if (c.draws == Draws::before) text += " again";
    if (is_carried(c)) text += c.carrier == Carrier::e4m3 ? " in e4m3" : " in e5m2";
    return text;
}

// split.KEY=VALUE: how bases are found, and whether W's factors are trained.
inline void set_split(SplitPlan& p, const std::string& change, const std::string& key, const std::string& value) {
    struct { const char* name; double* real; int* whole; double low, high; } numbers[] = {
        {"rank", &p.rank, nullptr, 0.01, 100}, {"sample", &p.sample, nullptr, 0.001, 100}, {"refresh", nullptr, &p.refresh, 0, 1e6},
        {"oversample", nullptr, &p.oversample, 0, 64}, {"cold", nullptr, &p.cold, 0, 20}, {"warm", nullptr, &p.warm, 0, 20},
        {"restart", nullptr, &p.restart, 0, 1}, {"k", nullptr, &p.k, 0, 4096}, {"trained", nullptr, &p.trained, 0, 1}};
    std::string all;
    for (auto& n : numbers) {
        all += (all.empty() ? "" : ", ") + std::string(n.name);
        if (key != n.name) continue;
        char* end;
        double v = strtod(value.c_str(), &end);
        if (value.empty() || *end || !(v >= n.low && v <= n.high) || (n.whole && v != std::floor(v)))
            fail("--set %s: want a%s number between %g and %g", change.c_str(), n.whole ? " whole" : "", n.low, n.high);
        if (key == "k" && std::fmod(v, 16)) fail("--set %s: want a multiple of 16", change.c_str());
        if (n.whole) *n.whole = (int)v;
        else *n.real = v;
        return;
    }
    fail("--set %s: there is no split.%s; there are %s", change.c_str(), key.c_str(), all.c_str());
}

// Changes r by "WHICH.KEY=VALUE,...", WHICH an operand's name, or a part of it (x, w, d, fprop, dgrad, wgrad), or all, or split.
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
        if (which == "split") {
            set_split(r.split, change, key, value);
            continue;
        }
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
            known.set(r.cell[i], (int)v);
        }
        if (!matched) fail("--set %s: %s names no operand; they are %s ... %s, or x, w, d, fprop, dgrad, wgrad, all", change.c_str(), which.c_str(),
                           operand_names[0], operand_names[operand_count - 1]);
    }
}

// One line on the first cell, or pair of cells, that makes no sense; "" if there is none.
inline std::string recipe_error(const Recipe& r) {
    std::string error;
    for (int i = 0; i < operand_count && error.empty(); i++) {
        const Operand& c = r.cell[i];
        auto refuse = [&](const char* why) { if (error.empty()) error = std::string(operand_names[i]) + " of recipe " + r.name + ": " + why; };
        if (!is_quantised(c.format) && !(c == Operand{c.format})) refuse("f32 and bf16 take no block, rounding, scale, hadamard or split");
        if (!has_blocks(c.format) && c.block == Block::square) refuse("only nvfp4, mxfp4 and mxfp8 have blocks");
        if (!is_fp8(c.format) && c.block == Block::row) refuse("only fp8 and fp8_e5m2 have scales of whole rows");
        if (has_row_scales(c) && (c.hadamard || c.split)) refuse("an operand with scales of whole rows takes no hadamard and no split");
        if (c.format == Format::nvfp4 && c.scale >= Scale::floor) refuse("nvfp4's scale is te, headroom, four_six or po2");
        if (is_mx(c.format) && c.scale < Scale::floor) refuse("an MX format's scale is floor or ceil");
        if (c.format != Format::nvfp4 && !is_mx(c.format) && c.scale != Scale::te) refuse("only nvfp4 and MX formats have scale rules");
        if (c.hadamard && c.block == Block::square) refuse("a square block cannot have a hadamard: it would serve one axis only");
        if (is_carried(c) && c.format != Format::mxfp4 && !(c.format == Format::nvfp4 && c.scale == Scale::po2))
            refuse("FP8 carries mxfp4, and nvfp4 under scale=po2: other block scales are no powers of two");
        if (is_carried(c) && c.split) refuse("a split operand has no FP8 carrier: beside it lie thin factors");
        if (c.split && c.hadamard) refuse("a split operand cannot have a hadamard: its thin products are not rotated");
        if (c.hadamard && has_blocks(c.format) && c.hadamard % block_length(c.format)) refuse("the hadamard must cover whole blocks");
        const Operand& other = r.cell[i ^ 1];
        if (c.hadamard != other.hadamard || (c.hadamard && c.signs != other.signs)) refuse("both operands of a GEMM need the same hadamard and signs, or they do not cancel");
        if (is_float_stored(c.format) != is_float_stored(other.format)) refuse("f32 and e2m1 meet only f32 and e2m1 in a GEMM");
        if (c.along == Along::other && c.hadamard) refuse("a hadamard lies along the contracted axis");
        if (c.draws == Draws::before && made_before[i] == operand_count) refuse("it is the first operand of its matrix: there are no draws before");
        if (r.split.trained && matrix_of[i] == matrix_w && !c.split) refuse("split.trained=1 needs W split in both of its GEMMs");
    }
    return error;
}
inline void check_recipe(const Recipe& r) {
    if (std::string error = recipe_error(r); !error.empty()) fail("%s", error.c_str());
}

inline bool is_quantised(const Recipe& r) {
    for (int i = 0; i < operand_count; i++)
        if (is_quantised(r.cell[i].format)) return true;
    return false;
}

// Whether amaxes of whole rows are of use: for their own scales, or a tensor scale, of the matrix as it is.
inline bool uses_amax(const Recipe& r) {
    for (const Operand& c : r.cell)
        if ((has_tensor_scale(c) || has_row_scales(c)) && !c.split && !c.hadamard) return true;
    return false;
}
inline bool is_split(const Recipe& r) {
    for (const Operand& c : r.cell)
        if (c.split) return true;
    return false;
}

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
inline size_t operand_bytes(Operand cell, Type source, int64_t elements) {
    bool as_is = cell.format == Format::f32 ? source == operand_type(Format::f32) : cell.format == Format::bf16 && source == Type::bf16;
    return as_is ? 0 : elements * size_of(operand_type(cell.format));
}

// How many more inner columns the GEMM of operand `which` has for thin products: k for each of its two operands that is split.
inline int64_t thin_columns(const Recipe& r, Which which, int k) { return k * (r.cell[which].split + r.cell[which ^ 1].split); }

// The type of an operand of this cell that a tensor core reads itself; f32: there is none, or its blocks lie along the wrong axis, or it
// is split: then the GEMM is one of residuals beside thin factors (product()), which one block-scaled GEMM cannot hold.
inline Type narrow_type(const Operand& c) {
    if (c.split || c.along == Along::other) return Type::f32;
    if (is_carried(c)) return c.carrier == Carrier::e4m3 ? Type::fp8 : Type::fp8_e5m2;
    if (has_row_scales(c)) return c.format == Format::fp8 ? Type::fp8_row : Type::f32;
    return c.format == Format::fp8 ? Type::fp8 : c.format == Format::fp8_e5m2 ? Type::fp8_e5m2 : c.format == Format::mxfp8 ? Type::mxfp8
         : c.format == Format::nvfp4 ? Type::nvfp4 : Type::f32;
}
// The mark of an operand (outer x inner) of this cell, without memory. All narrow GEMMs read (outer x inner): "TN", the only layout of FP4,
// and of FP8 on sm_89, sm_90 and sm_120.
inline Mat narrow_mat(const Operand& c, int64_t inner) {
    static const float mark = 1;
    return {nullptr, narrow_type(c), inner, false, has_tensor_scale(c) ? &mark : nullptr};
}
// Whether the GPU multiplies this GEMM's operands as they are: (m x k) (n x k)^T. Else they are emulated in bf16.
inline bool runs_natively(const Ctx& ctx, const Recipe& r, Which first, int64_t m, int64_t n, int64_t k, Type c, bool add) {
    const Operand &p = r.cell[first], &q = r.cell[first + 1];
    return ctx.plans->serves(narrow_type(p), narrow_type(q)) && ctx.plans->has(matmul_key(narrow_mat(p, k), narrow_mat(q, k).transposed(), m, n, k, n, c, add));
}

struct prepare_operand; struct split_norms; struct split_lengths; struct split_factors; struct split_thin;
struct split_merged; struct split_gradients;

template <class To, class From> void convert(Ctx& ctx, To* to, int64_t ld, const From* from, int64_t rows, int64_t cols, bool round_bf16) {
    Cost cost = {double(rows) * cols * (sizeof(To) + sizeof(From)), 0};
    int n = (int)cols;
    for_rows<prepare_operand>(ctx, cost, rows, KERNEL(Group<32> g, int64_t r) {
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

// Operands that are to be quantised, all of one matrix, up to the launch that does it: each `into`, as a tensor core reads it if that is narrow.
template <int n> struct Making {
    QuantCall call[n];
    Mat into[n];
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
// After outer_scales() of each.
template <int n> void quantise_operands(Ctx& ctx, const Making<n>& made, const Mat& from) {
    Type type = operand_type(made.call[0].cell.format);
    if (from.type == Type::bf16) {
        if (type == Type::bf16) quantise_as<bf16>(ctx, made, (const bf16*)from.data);
        else quantise_as<acc_t>(ctx, made, (const bf16*)from.data);
    } else if (type == Type::bf16) quantise_as<bf16>(ctx, made, (const acc_t*)from.data);
    else quantise_as<acc_t>(ctx, made, (const acc_t*)from.data);
}
// The scales that are there before quantise(): the tensor's, or the rows'.
inline void outer_scales(Ctx& ctx, const QuantCall& call, const Mat& from) {
    auto make = [&](auto* data) {
        if (has_tensor_scale(call.cell)) tensor_scale(ctx, call, data);
        if (has_row_scales(call.cell)) row_scales(ctx, call, data);
    };
    if (from.type == Type::bf16) make((const bf16*)from.data);
    else make((const acc_t*)from.data);
}
inline void quantise_operand(Ctx& ctx, const QuantCall& call, const Mat& to, const Mat& from) {
    outer_scales(ctx, call, from), quantise_operands(ctx, Making<1>{{call}, {to}}, from);
}

// Whether D's two operands are made in one pass over it, which costs a third operand's memory and saves a read of D.
inline bool in_one_pass(const Recipe& r) {
    const Operand &p = r.cell[dgrad_d], &q = r.cell[wgrad_d];
    auto blocks = [](const Operand& c, Axis axis) { return (c.along == Along::contracted) == (axis == Axis::row) ? Axis::row : Axis::column; };
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
    Operand a = r.cell[made_before[which]], b = r.cell[which];
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

// A, L and B of `source` (rows x cols) and what they leave of it to quantise: fills call.low_a, low_b, k; p's o, c, l as of axis row.
// Of a W whose factors are trained, `source` is W_R: all of it is left.
inline void split_operand(Ctx& ctx, const Linear& lin, Which which, const OperandScratch& s, QuantCall& call, Mat source, Prepared& p) {
    const SideScratch& side = s.side[place_of(*lin.recipe, which, s)];
    const Recipe& recipe = *lin.recipe;
    Operand cell = call.cell;
    int k = lin.splits.k;
    int64_t rows = call.rows, cols = call.cols;
    Type type = operand_type(cell.format);
    acc_t *basis = lin.splits.basis[matrix_of[which]], *t = lin.splits.projected[matrix_of[which]];
    const acc_t *unit = side.unit, *l = side.norms;
    Mat qa = {side.a, type, k}, qb = {side.b, type, cols};

    const Triplets& own = lin.splits.factors;
    bool trained = matrix_of[which] == matrix_w && own.u;
    if (trained) unit = own.u, l = own.s, basis = own.v;
    bool first = made_before[which] == operand_count || !recipe.cell[made_before[which]].split;
    if (first && !trained) {
        const SplitPlan& plan = recipe.split;
        int64_t samples = matrix_of[which] == matrix_w ? rows : sampled_rows(plan, k, rows);
        RandomKey key = {ctx.seed, ctx.step, ctx.micro, lin.id, (uint32_t)which, Purpose::rows};
        if (s.refresh && refresh_due(ctx, lin)) refresh_basis(ctx, basis, k, source, rows, cols, samples, plan, ctx.step > 0 && !plan.restart, key, s.subspace);
        Mat b = mat((const acc_t*)basis, cols);
        if (source.type == Type::bf16) convert(ctx, qb, b, k, cols, true), b = qb;
        matmul(ctx, "split M B", t, k, source, b.transposed(), rows, k, cols, 0);
    }
    if (!trained) unit_columns(ctx, side.unit, side.norms, t, rows, k, side.partial);
    if (cell.factors == Factors::exact) convert(ctx, qa, mat((const acc_t*)unit, k), rows, k, true), convert(ctx, qb, mat((const acc_t*)basis, cols), k, cols, true);
    else {
        Operand thin = {cell.format, Block::vector, cell.factors == Factors::stochastic ? Rounding::stochastic : Rounding::nearest, cell.scale};
        QuantCall a = call, b = call;
        a.cell = b.cell = thin, a.tally = b.tally = nullptr;
        a.cols = k, a.key.operand += 8, a.scale = side.scales;
        b.rows = k, b.key.operand += 16, b.scale = side.scales + 2;
        if (cell.format == Format::e2m1) a.axis = Axis::column, b.axis = Axis::row;     // the published code: each along its long side
        quantise_operand(ctx, a, qa, mat((const acc_t*)unit, k));
        quantise_operand(ctx, b, qb, mat((const acc_t*)basis, cols));
        if (has_tensor_scale(cell)) qa.scale = a.scale + 1, qb.scale = b.scale + 1;
    }
    p.split = true, p.o = qa, p.c = qb, p.l = l;
    if (trained) return;
    // The low-rank part that the residual is taken against, in float.
    call.k = k;
    if (cell.residual == Residual::exact) call.low_a = t, call.low_b = basis;
    else {
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
}

// Operand number `which` of `lin`, made of `source` (rows x cols, contiguous) as its cell says, in its slot of s unless it can be used
// as it lies. `axis`: where in `source` the contracted dimension is. What comes back is (outer x contracted). native: as a tensor core
// reads it, codes and behind them scales; for the dimensions that has() admits both fit where the bf16 operand would. If it is
// one of D's and `later` is given, its elements await quantise_operands(), in the place of its GEMM.
inline Prepared prepare(Ctx& ctx, const Linear& lin, Which which, const OperandScratch& s, Axis axis, Mat source, int64_t rows, int64_t cols, bool native = false,
                        Making<2>* later = nullptr) {
    Operand cell = lin.recipe->cell[which];
    int slot = place_of(*lin.recipe, which, s);
    int64_t thin = thin_columns(*lin.recipe, which, lin.splits.k);
    if (matrix_of[which] == matrix_w && lin.splits.factors.u && !cell.split)      // a bf16 row, or another of evaluation's: it knows no factors
        merge_factors(ctx, s.merged, lin, 1), source = mat((const acc_t*)s.merged, cols);
    Prepared p;
    p.r = source, p.half = !is_float_stored(cell.format);
    if (thin || operand_bytes(cell, source.type, 1) != 0) {
        p.r = {slot == 0 ? s.a : slot == 1 ? s.b : s.d, operand_type(cell.format), axis == Axis::row ? cols + thin : cols};
        if (!is_quantised(cell.format)) convert(ctx, p.r, source, rows, cols, cell.format == Format::bf16);
        else {
            if (s.nearest) cell.rounding = Rounding::nearest, cell.factors = cell.factors == Factors::exact ? Factors::exact : Factors::nearest;
            bool again = cell.draws == Draws::before;
            RandomKey key = {ctx.seed, ctx.step, ctx.micro, lin.id, (uint32_t)(again ? made_before[which] : which), Purpose::rounding, ctx.clock};
            Axis blocks = cell.along == Along::contracted ? axis : axis == Axis::row ? Axis::column : Axis::row;
            RandomKey sign_key = key;
            sign_key.operand = (uint32_t)which / 2, sign_key.purpose = Purpose::signs;
            bool scaled = lin.scales && same_scale(*lin.recipe, which, s.nearest);
            float* scale = lin.scales && (scaled || slot < 2) ? lin.scales + 2 * matrix_of[which] : s.scales + 2 * slot;
            float* partial = s.partial + (slot == 2 ? s.partials : 0);
            QuantCall call = {cell, blocks, rows, cols, key, sign_key, scale, partial, s.tally ? s.tally + tally_sums * which : nullptr};
            if (cell.split) split_operand(ctx, lin, which, s, call, source, p);
            else call.row_amax = source.row_amax;
            call.ld = p.r.ld;
            if (native) {
                int64_t outer = axis == Axis::row ? rows : cols, inner = axis == Axis::row ? cols : rows;
                p.r.type = narrow_type(cell), p.r.ld = inner;
                if (has_scale_bytes(cell)) p.r.blocks = (const uint8_t*)p.r.data + packed_bytes(cell, outer, inner);
                if (has_row_scales(cell)) call.row_scale = (float*)((char*)p.r.data + packed_bytes(cell, outer, inner)), p.r.blocks = (const uint8_t*)call.row_scale;
            }
            if (!scaled) outer_scales(ctx, call, source);
            if (later) later->call[which / 2 - 1] = call, later->into[which / 2 - 1] = p.r;
            else quantise_operands(ctx, Making<1>{{call}, {p.r}}, source);
            if (has_tensor_scale(cell)) p.r.scale = call.scale + 1;
        }
    }
    if (axis == Axis::column && !native) {
        p.r = p.r.transposed();
        Mat a = p.o;
        p.o = p.c.transposed(), p.c = a.transposed();
    }
    return p;
}

// One side's factor of the thin product, behind its residual's inner columns. Column j of `width` is, for the first operand of the GEMM
// [own O | cross L_other S_other], for the second [L_other S_other (cross + O L S inner) | own O]; a half is there only if its operand is
// split. The GEMM multiplies everything by both residuals' scales, so the halves that are no codes are divided by them.
template <class To> void thin_factor(Ctx& ctx, const acc_t* cross, const Prepared& own, const Prepared& other, const acc_t* inner, bool second, int64_t outer,
                                     int64_t contracted, int k) {
    int64_t row = own.r.trans ? 1 : own.r.ld, col = own.r.trans ? own.r.ld : 1;
    To* to = (To*)own.r.data + contracted * col;
    const void* o = own.o.data;
    int64_t o_row = own.o.trans ? 1 : own.o.ld, o_col = own.o.trans ? own.o.ld : 1;
    const float *own_scale = own.o.scale, *other_scale = other.o.scale, *all_own = own.r.scale, *all_other = other.r.scale;
    const acc_t *own_l = own.l, *other_l = other.l;
    bool has_own = own.split, has_other = other.split, both = has_own && has_other, half = own.half;
    int own_at = second && both ? k : 0, other_at = !second && both ? k : 0;
    for_rows<split_thin>(ctx, {(double)outer * (both ? 2 : 1) * k * sizeof(To) * 2, 0}, outer, KERNEL(Group<32> g, int64_t r) {
        auto code = [=](int i) { return (acc_t)load((const To*)o + r * o_row + i * o_col); };
        if (has_own) g.each(k, [=](int i) { store(to + r * row + (own_at + i) * col, (float)code(i)); });
        if (!has_other) return;
        acc_t scale = other_scale ? (acc_t)*other_scale : 1, mine = own_scale ? (acc_t)*own_scale : 1;
        acc_t first = all_own ? (acc_t)*all_own : 1, next = all_other ? (acc_t)*all_other : 1;
        g.each(k, [=](int j) {
            acc_t v = cross[r * k + j];
            if (second && both)
                for (int i = 0; i < k; i++) v += code(i) * (mine * own_l[i]) * inner[j * k + i];
            bf16 rounded;
            v = v * (other_l[j] * scale) / first / next;
            if (half) store(&rounded, (float)v), v = load(&rounded);          // also where a CPU holds bf16 operands as floats
            store(to + r * row + (other_at + j) * col, (float)v);
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
    // Without blocks, a Hadamard, a split or random draws an operand has no axis: D serves twice. A tensor core reads (outer x inner) alone.
    const Operand &once = lin.recipe->cell[dgrad_d], &again = lin.recipe->cell[wgrad_d];
    bool same = once == again && !has_blocks(once.format) && !has_row_scales(once) && !once.hadamard && !once.split && once.rounding == Rounding::nearest && !native && !native_w;
    bool together = !same && place_of(*lin.recipe, wgrad_d, s) == 2;
    Making<2> made;
    Prepared p = prepare(ctx, lin, dgrad_d, s, Axis::row, d, rows, lin.out, native, together ? &made : nullptr), turned;
    if (together) turned = prepare(ctx, lin, wgrad_d, s, Axis::column, d, rows, lin.out, native_w, &made), quantise_operands(ctx, made, d);
    Prepared q = prepare(ctx, lin, dgrad_w, s, Axis::column, mat(lin.w, lin.in), lin.out, lin.in, native);
    product(ctx, s, lin.dgrad, dx, lin.in, p, q, rows, lin.in, lin.out, 0, lin.splits.k);

    if (same) turned = p, turned.r = p.r.transposed();
    else if (!together) turned = prepare(ctx, lin, wgrad_d, s, Axis::column, d, rows, lin.out, native_w);
    q = prepare(ctx, lin, wgrad_x, s, Axis::column, x, rows, lin.in, native_w);
    product(ctx, s, lin.wgrad, lin.dw, lin.in, turned, q, lin.out, lin.in, rows, 1, lin.splits.k);
}
