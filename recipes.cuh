// recipes.cuh: a recipe is data. One row of a table is a published system, one cell of it says how one operand of one GEMM is rounded.
//
// Every linear layer runs three GEMMs (metis.cuh), each with two operands; the cell of an operand is its column here:
//
//     fprop  Y  = X   W^T      fprop_x, fprop_w
//     dgrad  dX = D   W        dgrad_d, dgrad_w
//     wgrad  dW = D^T X        wgrad_d, wgrad_x
//
// To add a recipe: a row in recipes(), its cells from those above it, its source in the comment; then `./train_llama --list-recipes` shows
// it, dev/shadow.py compares it with the others on one checkpoint, and dev/readme.py puts it into the README. To add a cell value: an enum
// and a field of Cell in fp4.cuh, a line of cell_keys() and of cell_text() below, what contradicts it in recipe_error(), and its branch in
// quantise_tile() (fp4.cuh) or prepare() (metis.cuh). If it changes scales or storage, same_scale() and narrow_type() there must know.
#pragma once
#include "fp4.cuh"      // Cell
#include "subspace.cuh" // SplitPlan

enum Which { fprop_x, fprop_w, dgrad_d, dgrad_w, wgrad_d, wgrad_x, operand_count };      // operands of GEMM Which / 2
constexpr const char* operand_names[] = {"fprop_x", "fprop_w", "dgrad_d", "dgrad_w", "wgrad_d", "wgrad_x"};

enum Matrix { matrix_x, matrix_w, matrix_d };
constexpr Matrix matrix_of[operand_count] = {matrix_x, matrix_w, matrix_d, matrix_w, matrix_d, matrix_x};
// The operand made of the same matrix before this one in a pass, or none.
constexpr Which made_before[operand_count] = {operand_count, operand_count, operand_count, fprop_w, dgrad_d, fprop_x};

struct Recipe {
    std::string name, about;
    Cell cell[operand_count];    // all that the linear layer knows of a recipe
    double last_share = 0;          // share of the blocks, from the end, whose linear layers stay in bf16
    SplitPlan split = {};           // for cells with split = yes
};

// The cells that the table is made of, each named by what it is: nvf_sr_h is NVFP4, stochastic rounding, Hadamard.
constexpr auto vec = Block::vector, square = Block::square;
constexpr auto rn = Rounding::nearest, sr = Rounding::stochastic;
constexpr Cell f32 = {Format::f32}, b16 = {Format::bf16}, fp8 = {Format::fp8}, fp8g = {Format::fp8_e5m2};
constexpr Cell f8r = {Format::fp8, Block::row};
constexpr Cell mx8 = {Format::mxfp8, vec, rn, Scale::ceil}, mx4 = {Format::mxfp4, vec, rn, Scale::ceil};
constexpr Cell nvf = {Format::nvfp4}, nvf_sr = {Format::nvfp4, vec, sr}, nvf_sq = {Format::nvfp4, square};
constexpr Cell nvf_h = {Format::nvfp4, vec, rn, Scale::te, 16}, nvf_sr_h = {Format::nvfp4, vec, sr, Scale::te, 16};
constexpr Cell fs = {Format::nvfp4, vec, rn, Scale::four_six}, fs_sq = {Format::nvfp4, square, rn, Scale::four_six};
constexpr Cell fs_sr = {Format::nvfp4, vec, sr, Scale::four_six}, fs_h = {Format::nvfp4, vec, rn, Scale::four_six, 16};
constexpr Cell fs_sr_h = {Format::nvfp4, vec, sr, Scale::four_six, 16};
constexpr Cell on_fp8(Cell c, Carrier carrier) {
    c.carrier = carrier;
    return c;
}
constexpr Cell po2 = {Format::nvfp4, vec, rn, Scale::po2};
constexpr Cell mx4_8 = on_fp8(mx4, Carrier::e4m3), mx4_8g = on_fp8(mx4, Carrier::e5m2);
constexpr Cell nvf_8 = on_fp8(po2, Carrier::e4m3), nvf_8g = on_fp8(po2, Carrier::e5m2);
constexpr Cell split(Cell c) {
    c.split = true;
    return c;
}
constexpr Cell ms = split(nvf), ms_sr = split(nvf_sr);
// Metis/bitlinear.py and quant.py: X and W in blocks along m, D along the tokens, in every GEMM; X and D are rounded once, W afresh.
constexpr Cell code(bool split, Along along, Draws draws) {
    return {Format::e2m1, vec, sr, Scale::te, 0, Signs::fixed, split, Factors::stochastic, Residual::exact, along, draws};
}
constexpr Cell mc = code(false, Along::contracted, Draws::own), mc_w = code(false, Along::other, Draws::own);
constexpr Cell mc_x = code(false, Along::other, Draws::before);
constexpr Cell mc_d = code(true, Along::other, Draws::own), mc_d2 = code(true, Along::contracted, Draws::before);
// And its bases: 64 directions of all rows, drawn anew at every call, without a power iteration (torch.svd_lowrank, niter=0).
inline SplitPlan code_plan() {
    SplitPlan p;
    p.k = 64, p.rank = 0, p.sample = 100, p.refresh = 0, p.oversample = 0, p.cold = p.warm = 0, p.restart = 1;
    return p;
}

// A row's source stands above it.
inline const std::vector<Recipe>& recipes() {
    static const std::vector<Recipe> table = {
        //                 fprop          dgrad          wgrad
        //                X     W        D      W       D        X
        {"float",         "float operands, float accumulation",
                          {f32,  f32,     f32,   f32,    f32,     f32}},
        {"bf16",          "bf16 operands, float accumulation: the baseline of every gap",
                          {b16,  b16,     b16,   b16,    b16,     b16}},
        // TransformerEngine's current scaling: E4M3's finer steps for X and W, E5M2's wider range for D.
        {"fp8",           "FP8, one scale a tensor: E4M3, gradients E5M2",
                          {fp8,  fp8,     fp8g,  fp8,    fp8g,    fp8}},
        // cuBLASLt's outer-vector scales on sm_90: tokens with small activations no longer fall among E4M3's subnormals (dev/LOG.md).
        {"fp8-rows",      "E4M3, a power-of-two scale for each row of an operand",
                          {f8r,  f8r,     f8r,   f8r,    f8r,     f8r}},
        // TransformerEngine's MXFP8: with a scale for every 32 elements E4M3 has range enough for D, too. Scales: arXiv 2506.08027.
        {"mxfp8",         "E4M3 in blocks of 32 under power-of-two scales",
                          {mx8,  mx8,     mx8,   mx8,    mx8,     mx8}},
        // What the format gives without any further care: the baseline of the 4-bit recipes.
        {"nvfp4",         "E2M1 in blocks of 16 under E4M3 scales, nearest everywhere",
                          {nvf,   nvf,      nvf,    nvf,     nvf,      nvf}},
        // arXiv 2509.25149 found stochastic rounding to help D (errors of nearest rounding add up over a backward pass), and to harm X and W.
        {"nvfp4-sr",      "the same, gradients rounded stochastically",
                          {nvf,   nvf,      nvf_sr, nvf,     nvf_sr,   nvf}},
        // arXiv 2509.25149: square blocks, that W be the same matrix in fprop and dgrad; a Hadamard, that outliers of D and X be spread; and of
        // the blocks 15%, at the end, in bf16.
        {"nvidia",        "NVIDIA's: square weight blocks, Hadamard in wgrad, stochastic D, 15% of blocks bf16",
                          {nvf,   nvf_sq,   nvf_sr, nvf_sq,  nvf_sr_h, nvf_h}, 0.15},
        // arXiv 2506.08027's scales, that nothing saturate, in place of the OCP's (scale=floor).
        {"mxfp4",         "E2M1 in blocks of 32 under power-of-two scales, nearest everywhere",
                          {mx4,  mx4,     mx4,   mx4,    mx4,     mx4}},
        // Ours: the same numbers on FP8 units, which GPUs had before FP4's (fp4.cuh, Carrier).
        {"mxfp4-fp8",     "mxfp4 on FP8 units: codes times scales as E4M3, of gradients as E5M2",
                          {mx4_8, mx4_8,    mx4_8g, mx4_8,   mx4_8g,   mx4_8}},
        {"nvfp4-fp8",     "nvfp4 on FP8 units likewise, its block scales powers of two",
                          {nvf_8, nvf_8,    nvf_8g, nvf_8,   nvf_8g,   nvf_8}},
        // arXiv 2512.02010 and its published configuration.
        {"four-over-six", "nvidia, each block's largest element on 6 or on 4, whichever errs less",
                          {fs,   fs_sq,   fs_sr, fs_sq,  fs_sr_h, fs_h}, 1. / 6},
        // The published code, which differs from the paper: blocks no tensor core takes, so it is always emulated.
        {"metis-code",    "what Metis' published code does: D alone split, 64 directions at every call, float scales, one quantisation for two GEMMs",
                          {mc,   mc,      mc_d,  mc_w,   mc_d2,   mc_x}, 0, code_plan()},
        // arXiv 2509.00404, section 3, but for two points: nearest rounding of X and W and of all factors (2509.25149, above); and
        // residuals taken against the low-rank part as it is rounded, so that they hold what its rounding lost.
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

// Cells as people write them: KEY=VALUE of --set, and the table's short form. One list for both, for the error lines and for --list-recipes.
struct CellKey {
    const char* name;
    std::vector<const char*> values;      // in the order of the enum
    void (*set)(Cell& c, int value);
    const char* about;                    // what the values mean, and in backquotes how cell_text() shows them
};
inline const std::vector<CellKey>& cell_keys() {
    static const std::vector<CellKey> keys = {
        {"format", {"f32", "bf16", "fp8", "fp8_e5m2", "mxfp8", "nvfp4", "mxfp4", "e2m1"}, [](Cell& c, int v) {
            c.format = (Format)v;                                    // and what the new format cannot have becomes its usual
            if (!is_quantised(c.format)) c = {c.format};
            if (is_mx(c.format) && c.scale < Scale::floor) c.scale = Scale::ceil;
            if (!is_mx(c.format) && (c.format != Format::nvfp4 || c.scale >= Scale::floor)) c.scale = Scale::te;
            if (!is_4bit(c.format)) c.carrier = Carrier::own;
            if (!is_fp8(c.format) && c.block == Block::row) c.block = Block::vector;
        }, "of the elements; fp8 is E4M3; e2m1 is 4 bits under float scales"},
        {"block", {"vector", "square", "row"}, [](Cell& c, int v) { c.block = (Block)v; },
         "what shares a scale: 16 elements (MX: 32) along the contracted axis; a square of them, `16x16`; FP8: a row of the operand, `rows`"},
        {"rounding", {"nearest", "stochastic"}, [](Cell& c, int v) { c.rounding = (Rounding)v; }, "of elements; `sr` stochastic"},
        {"scale", {"te", "headroom", "four_six", "po2", "floor", "ceil"}, [](Cell& c, int v) { c.scale = (Scale)v; },
         "of blocks. nvfp4: TransformerEngine's, amax on 6; `17/16` of it, so that nothing saturates; `4/6` amax on 6 or on 4, whichever errs less; "
         "`po2` a power of two. MX: amax's exponent less 2, `floor`; the least under which nothing saturates (ceil)"},
        {"hadamard", {"0", "16", "32", "64", "128"}, [](Cell& c, int v) { c.hadamard = v ? 8 << v : 0; },
         "`h16` a Hadamard of this size along the contracted axis, on both operands of a GEMM, which cancels"},
        {"signs", {"fixed", "random", "plus"}, [](Cell& c, int v) { c.signs = (Signs)v; },
         "that the Hadamard is multiplied by: TransformerEngine's 16; drawn at every call, `h16r`; none, `h16+`"},
        {"split", {"no", "yes"}, [](Cell& c, int v) { c.split = v; }, "`split` into low-rank part A L B^T and residual R (Metis)"},
        {"factors", {"nearest", "stochastic", "exact"}, [](Cell& c, int v) { c.factors = (Factors)v; },
         "of a split operand, A and B: rounded like R, to nearest or stochastically, `AB sr`; or kept in bf16, `AB exact`"},
        {"residual", {"quantised", "exact"}, [](Cell& c, int v) { c.residual = (Residual)v; },
         "R is what the rounded low-rank part leaves, or, `R exact`, what the unrounded one leaves"},
        {"along", {"contracted", "other"}, [](Cell& c, int v) { c.along = (Along)v; },
         "blocks lie along the axis that the GEMM contracts, as tensor cores need them, or `across`"},
        {"draws", {"own", "before"}, [](Cell& c, int v) { c.draws = (Draws)v; },
         "random bits of its own, or, `again`, those of the operand made of the same matrix before"},
        {"carrier", {"own", "e4m3", "e5m2"}, [](Cell& c, int v) { c.carrier = (Carrier)v; },
         "4 bits under power-of-two scales: codes and scale bytes, or their products as FP8 numbers, `in e4m3` or `in e5m2`"},
    };
    return keys;
}

// "nvfp4", and what differs from the format's usual: "nvfp4 16x16", "nvfp4 sr h16", "mxfp4 floor".
inline std::string cell_text(Cell c) {
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

// split.KEY=VALUE: how bases are found, and whether W's factors are trained. Real numbers, or whole ones, within bounds.
struct SplitKey {
    const char* name;
    double SplitPlan::*real;
    int SplitPlan::*whole;
    double low, high;
    const char* about;
};
inline const std::vector<SplitKey>& split_keys() {
    static const std::vector<SplitKey> keys = {
        {"rank", &SplitPlan::rank, nullptr, 0.01, 100, "of the low-rank part, in percent of the model's width, rounded up to a multiple of 16"},
        {"k", nullptr, &SplitPlan::k, 0, 4096, "the rank itself, a multiple of 16; 0: as `rank` says"},
        {"sample", &SplitPlan::sample, nullptr, 0.001, 100, "rows of X and of D that bases come from, in percent"},
        {"refresh", nullptr, &SplitPlan::refresh, 0, 1e6, "steps between refreshes of a basis; 0: at every call"},
        {"oversample", nullptr, &SplitPlan::oversample, 0, 64, "directions that are sketched beyond the rank"},
        {"cold", nullptr, &SplitPlan::cold, 0, 20, "power iterations of a basis' first time"},
        {"warm", nullptr, &SplitPlan::warm, 0, 20, "power iterations of a refresh, which begins with the old basis"},
        {"restart", nullptr, &SplitPlan::restart, 0, 1, "1: refreshes begin anew"},
        {"trained", nullptr, &SplitPlan::trained, 0, 1, "1: W's factors are found once and trained as parameters"},
    };
    return keys;
}
inline void set_split(SplitPlan& p, const std::string& change, const std::string& key, const std::string& value) {
    std::string all;
    for (const SplitKey& n : split_keys()) {
        all += (all.empty() ? "" : ", ") + std::string(n.name);
        if (key != n.name) continue;
        char* end;
        double v = strtod(value.c_str(), &end);
        if (value.empty() || *end || !(v >= n.low && v <= n.high) || (n.whole && v != std::floor(v)))
            fail("--set %s: want a%s number between %g and %g", change.c_str(), n.whole ? " whole" : "", n.low, n.high);
        if (key == "k" && std::fmod(v, 16)) fail("--set %s: want a multiple of 16", change.c_str());
        if (n.whole) p.*n.whole = (int)v;
        else p.*n.real = v;
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
// What --set can change, as a table in Markdown.
inline std::string set_table() {
    std::string text = "| key | values (of split: the usual one) | meaning |\n|---|---|---|\n";
    for (const CellKey& k : cell_keys()) {
        text += "| `" + std::string(k.name) + "` |";
        for (const char* v : k.values) text += (v == k.values[0] ? " " : ", ") + std::string(v);
        text += " | " + std::string(k.about) + " |\n";
    }
    const SplitPlan usual;
    for (const SplitKey& k : split_keys()) {
        char number[40];
        snprintf(number, sizeof number, "%g", k.real ? usual.*k.real : usual.*k.whole);
        text += "| `split." + std::string(k.name) + "` | " + number + " | " + k.about + " |\n";
    }
    return text;
}

// One line on the first cell, or pair of cells, that makes no sense; "" if there is none. What a GPU could not compute in 4 bits is no
// error (metis-code's blocks lie across the contracted axis): it is emulated.
inline std::string recipe_error(const Recipe& r) {
    std::string error;
    for (int i = 0; i < operand_count && error.empty(); i++) {
        const Cell& c = r.cell[i];
        auto refuse = [&](const char* why) { if (error.empty()) error = std::string(operand_names[i]) + " of recipe " + r.name + ": " + why; };
        if (!is_quantised(c.format) && !(c == Cell{c.format})) refuse("f32 and bf16 take no block, rounding, scale, hadamard or split");
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
        const Cell& other = r.cell[i ^ 1];
        if (c.hadamard != other.hadamard || (c.hadamard && c.signs != other.signs))
            refuse("both operands of a GEMM need the same hadamard and signs, or they do not cancel");
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
    for (const Cell& c : r.cell)
        if ((has_tensor_scale(c) || has_row_scales(c)) && !c.split && !c.hadamard) return true;
    return false;
}
inline bool is_split(const Recipe& r) {
    for (const Cell& c : r.cell)
        if (c.split) return true;
    return false;
}
