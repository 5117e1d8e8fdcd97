// metis.cuh: the quantised linear layer. A recipe is data: one row of a table a published system, one cell an operand.
//
// A linear layer Y = X W^T with X (l x m), W (n x m) and output gradient D (l x n) runs three GEMMs over six operands:
//
//     fprop  Y  (l x n)  = X   W^T      contracts over m      operands fprop_x, fprop_w
//     dgrad  dX (l x m)  = D   W        contracts over n      operands dgrad_d, dgrad_w
//     wgrad  dW (n x m) += D^T X        contracts over l      operands wgrad_d, wgrad_x
//
// prepare() turns a matrix as it lies in memory into an operand as its cell says; the GEMMs below never know the recipe. Formats
// with blocks add cells and prepare() branches, not layers: the call list of linear_forward and linear_backward stays this one.
//
// What backward keeps: X, in act_t, once per linear layer (the model's activation table owns it), and nothing else; W is read
// again from the master weights. A packed operand takes X's place there when wgrad_x's cell says so.
#pragma once
#include "matmul.cuh"   // matmul, Mat, Type

// How one operand is prepared.
enum class Format {
    f32,        // float, as the CPU's matrices lie in memory (double in the gradient checks)
    bf16,       // rounded to bf16, nearest even
};
struct Operand {
    Format format;
};
inline bool operator==(Operand a, Operand b) { return a.format == b.format; }

struct Recipe {
    const char* name;
    const char* about;
    Operand fprop_x, fprop_w, dgrad_d, dgrad_w, wgrad_d, wgrad_x;
};

constexpr Operand f32 = {Format::f32}, b16 = {Format::bf16};

//                                                                       fprop        dgrad        wgrad
//                                                                      X     W      D     W      D     X
constexpr Recipe recipes[] = {
    {"float", "float operands, float accumulation",                     f32, f32,   f32, f32,   f32, f32},
    {"bf16",  "bf16 operands, float accumulation; every gap's baseline", b16, b16,   b16, b16,   b16, b16},
};

// The row called `name`, or null.
inline const Recipe* find_recipe(const std::string& name) {
    for (const Recipe& r : recipes)
        if (name == r.name) return &r;
    return nullptr;
}

// One weight matrix and how it is used. w and dw are (out x in), row-major.
struct Linear {
    std::string fprop, dgrad, wgrad;       // the profiler's names of its GEMMs
    int64_t in, out;
    const acc_t* w;
    acc_t* dw;
    const Recipe* recipe;
};

// Two buffers for the operands of one GEMM; null where no recipe in use needs them.
struct OperandScratch {
    void *a, *b;
};

// The element type an operand of this format is stored in: bf16-valued operands are floats where the CPU cannot multiply bf16.
inline Type operand_type(Format f) {
    if (f == Format::bf16 && MatmulPlans::bf16_units()) return Type::bf16;
    return type_of<acc_t>();
}

// Bytes that an operand of `elements` takes in scratch; 0 where it is used as it lies.
inline size_t operand_bytes(Operand cell, Type source, int64_t elements) {
    bool as_is = cell.format == Format::f32 ? source == operand_type(Format::f32) : source == Type::bf16;
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

// The operand that `cell` makes of `source` (rows x cols, contiguous), in `buffer` unless it can be used as it lies.
inline Mat prepare(Ctx& ctx, Operand cell, Mat source, int64_t rows, int64_t cols, void* buffer) {
    if (operand_bytes(cell, source.type, 1) == 0) return source;
    bool round = cell.format == Format::bf16;
    Mat made = {buffer, operand_type(cell.format), cols};
    if (source.type == Type::bf16) convert(ctx, (acc_t*)buffer, (const bf16*)source.data, rows, cols, round);
    else if (made.type == Type::bf16) convert(ctx, (bf16*)buffer, (const acc_t*)source.data, rows, cols, round);
    else convert(ctx, (acc_t*)buffer, (const acc_t*)source.data, rows, cols, round);
    return made;
}

// Y (rows x out) = X (rows x in) W^T.
template <class T> void linear_forward(Ctx& ctx, const Linear& lin, const OperandScratch& s, T* y, Mat x, int64_t rows) {
    const Recipe& r = *lin.recipe;
    Mat a = prepare(ctx, r.fprop_x, x, rows, lin.in, s.a);
    Mat b = prepare(ctx, r.fprop_w, mat(lin.w, lin.in), lin.out, lin.in, s.b);
    matmul(ctx, lin.fprop.c_str(), y, lin.out, a, b.transposed(), rows, lin.out, lin.in, 0);
}

// dX (rows x in) = D (rows x out) W; dW (out x in) += D^T X.
template <class T> void linear_backward(Ctx& ctx, const Linear& lin, const OperandScratch& s, T* dx, Mat d, Mat x, int64_t rows) {
    const Recipe& r = *lin.recipe;
    Mat a = prepare(ctx, r.dgrad_d, d, rows, lin.out, s.a);
    Mat b = prepare(ctx, r.dgrad_w, mat(lin.w, lin.in), lin.out, lin.in, s.b);
    matmul(ctx, lin.dgrad.c_str(), dx, lin.in, a, b, rows, lin.in, lin.out, 0);

    if (!(r.wgrad_d == r.dgrad_d)) a = prepare(ctx, r.wgrad_d, d, rows, lin.out, s.a);    // without blocks an operand has no axis
    b = prepare(ctx, r.wgrad_x, x, rows, lin.in, s.b);
    matmul(ctx, lin.wgrad.c_str(), lin.dw, lin.in, a.transposed(), b, lin.out, lin.in, rows, 1);
}
