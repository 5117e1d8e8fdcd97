// test_linear.cu: the quantised linear layer of metis.cuh, for every recipe and for odd cells, against the slow quantiser and products
// in double; NaN on its way to the loss; cells that make no sense.
//
//     make build/cpu/test_linear && build/cpu/test_linear      -v also prints how much of its tolerance each test used
//
// Operands are exact: what lies in the scratch after a GEMM must be the slow quantiser's numbers to the bit, under the draws that their
// names promise. A GEMM of exact operands errs by its float additions alone, so that is the whole tolerance; a wrong axis, draw, sign
// or scale changes operands by whole steps of four bits. Rows with split operands: test_metis.cu. How tests run: device_test.h.
#include "../metis.cuh"
#include "slow_quantiser.h"
#include <sys/wait.h>       // waitpid

// A tensor core aligns a few products to the largest and cuts what falls off: less exact than a float addition, by up to 2^3.
static double product_u(Type t) { return on_gpu && t == Type::bf16 ? 8 * u : u; }

constexpr Axis axis_of[] = {Axis::row, Axis::row, Axis::row, Axis::column, Axis::column, Axis::column};     // where the contraction lies

static Recipe changed(const char* row, const std::string& changes) {
    Recipe r = *find_recipe(row);
    r.name += " " + changes;
    set_cells(r, changes);
    check_recipe(r);
    return r;
}
// Each rounding, scale, block, size and sign of the Hadamard in every place, and formats mixed.
static std::vector<Recipe> odd_recipes() {
    return {
        changed("nvfp4", "all.rounding=stochastic"),
        changed("nvfp4", "all.rounding=stochastic,all.scale=headroom"),
        changed("nvfp4", "all.block=square,d.rounding=stochastic"),
        changed("nvfp4", "all.scale=four_six,all.rounding=stochastic,w.block=square"),
        changed("nvfp4", "all.hadamard=16"),
        changed("nvfp4", "all.hadamard=32,all.signs=random,all.rounding=stochastic"),
        changed("nvfp4", "all.hadamard=64,fprop.signs=plus,dgrad.signs=random,d.scale=four_six"),
        changed("nvfp4", "wgrad.hadamard=128,wgrad.signs=random,d.rounding=stochastic,d.scale=headroom"),
        changed("nvfp4-sr", "dgrad.hadamard=64,wgrad.hadamard=128"),               // no tile suits both operands of D
        changed("nvfp4", "dgrad.hadamard=16,dgrad.signs=random,fprop_x.block=square,wgrad_x.rounding=stochastic"),
        changed("mxfp4", "all.scale=floor,d.rounding=stochastic"),
        changed("mxfp4", "all.block=square,all.rounding=stochastic"),
        changed("mxfp4", "all.hadamard=32,all.signs=random"),
        changed("mxfp8", "all.scale=floor,all.rounding=stochastic,w.block=square"),
        changed("mxfp8", "wgrad.hadamard=64"),
        changed("fp8", "all.rounding=stochastic"),
        changed("fp8", "wgrad.hadamard=16,wgrad.signs=random,fprop.hadamard=128"),
        changed("fp8", "all.format=fp8_e5m2"),
        changed("fp8", "wgrad_d.format=fp8"),
        changed("fp8-rows", "d.format=fp8_e5m2,d.rounding=stochastic,fprop_x.along=other,wgrad_x.block=vector"),
        changed("nvidia", "w.format=bf16,fprop_x.format=mxfp8,dgrad_d.format=fp8_e5m2"),
        changed("nvidia", "wgrad.format=bf16"),
        changed("nvfp4-sr", "wgrad.format=f32"),                              // leaves dgrad's operands in the scratch, to be looked at
        changed("nvfp4", "wgrad.format=f32,dgrad.hadamard=16,dgrad.signs=random,w.scale=four_six,dgrad_w.rounding=stochastic"),
        changed("mxfp4", "wgrad.format=f32,dgrad.rounding=stochastic"),
        changed("nvfp4", "all.scale=po2,d.rounding=stochastic,w.block=square"),
        changed("mxfp4-fp8", "all.scale=floor,d.rounding=stochastic,w.block=square,wgrad.hadamard=32"),
        changed("nvfp4-fp8", "all.rounding=stochastic,x.carrier=e5m2,fprop_w.carrier=own,wgrad.hadamard=16,wgrad.signs=random"),
        changed("mxfp4-fp8", "dgrad.scale=floor"),
        changed("mxfp4-fp8", "wgrad_d.carrier=e4m3,wgrad_x.carrier=e5m2"),
        changed("float", "dgrad.format=nvfp4"),
        changed("nvfp4", "all.format=e2m1"),
        changed("nvfp4", "all.format=e2m1,x.rounding=stochastic,fprop.hadamard=16,wgrad_x.block=square,dgrad.format=f32"),
        changed("nvfp4", "all.format=e2m1,all.rounding=stochastic,dgrad.along=other,wgrad_x.along=other,wgrad.draws=before,dgrad_w.draws=before"),
        changed("nvfp4-sr", "dgrad_d.along=other,wgrad_d.draws=before,all.rounding=stochastic"),
    };
}

static int64_t multiple(int64_t n, int of) { return of ? (n + of - 1) / of * of : n; }

// X, W, D, outputs and scratch of a layer; run() is forward and backward.
template <class T> struct Layer {
    Run& r;
    const Recipe& recipe;
    int64_t rows, in, out, size[3], cols[3];              // of X, W, D: elements, and elements in a row
    Buffer<act_t> x;
    Buffer<acc_t> w;
    Buffer<T> d;
    Buffer<uint8_t> a, b, second;                         // second: of D's second operand
    Buffer<float> scales, kept, partial, tally;
    OperandScratch scratch;
    Linear lin;
    std::vector<double> y, dx, dw, before;                // what run() left; dW before it
    bool amax = false;                                    // X and D come with the amaxes of their rows

    static int64_t largest(const Recipe& c, int side, Type x, Type d, const int64_t* size) {
        int64_t bytes = 0;
        for (int i = side; i < operand_count; i += 2)
            bytes = std::max<int64_t>(bytes, operand_bytes(c.cell[i], std::array<Type, 3>{x, Type::f32, d}[matrix_of[i]], size[matrix_of[i]]));
        return bytes;
    }
    static int64_t partials(const Recipe& c, const int64_t* size, const int64_t* cols) {
        int64_t n = 0;
        for (int i = 0; i < operand_count; i++) n = std::max(n, quantise_partials(c.cell[i], size[matrix_of[i]] / cols[matrix_of[i]], cols[matrix_of[i]]));
        return n;
    }
    Layer(Run& run, const Recipe& c, int64_t rows_, int64_t in_, int64_t out_, Rng& rng)
        : r(run), recipe(c), rows(multiple(rows_, c.cell[wgrad_d].hadamard)), in(multiple(in_, c.cell[fprop_x].hadamard)),
          out(multiple(out_, c.cell[dgrad_d].hadamard)), size{rows * in, out * in, rows * out}, cols{in, in, out},
          x(r, size[0], [&](int64_t) { return number(rng); }), w(r, size[1], [&](int64_t) { return 0.1 * number(rng); }),
          d(r, size[2], [&](int64_t i) { return i ? 1e-3 * number(rng) : 0x1.f8p-4; }),       // amax near a power of two: MX's rules differ on it
          a(r, largest(c, 0, type_of<act_t>(), type_of<T>(), size)), b(r, largest(c, 1, type_of<act_t>(), type_of<T>(), size)),
          second(r, size[2] * size_of(type_of<acc_t>())), scales(r, 6), kept(r, 6), partial(r, 2 * partials(c, size, cols)), tally(r, tally_sums * operand_count, [](int64_t) { return 0; }) {
        scratch.a = a.n ? a.p : nullptr, scratch.b = b.n ? b.p : nullptr, scratch.scales = scales.p, scratch.partial = partial.p;
        scratch.partials = partials(c, size, cols);
        lin = {"fprop", "dgrad", "wgrad", in, out, w.p, nullptr, &recipe, 7};
        r.at("%s, %ld rows, %ld to %ld, %d-byte outputs", recipe.name.c_str(), (long)rows, (long)in, (long)out, (int)sizeof(T));
        r.ctx.seed = 0x123456789abcull, r.ctx.step = 11, r.ctx.micro = 3;
    }
    // Bell-shaped, an outlier now and then.
    static double number(Rng& rng) { return (rng(1) + rng(1) + rng(1)) * (rng.below(200) ? 1 : 20); }

    template <class F> void run(F between) {
        Rng rng{99};
        Buffer<T> y_(r, rows * out);
        Buffer<act_t> dx_(r, rows * in);
        Buffer<acc_t> dw_(r, out * in, [&](int64_t) { return rng(1e-3); });
        before = dw_.values(), lin.dw = dw_.p;
        auto row_amax = [&](const auto& of, int64_t row, int64_t width) {
            float most = 0;
            for (int64_t c = 0; c < width; c++) most = std::max(most, magnitude_or_infinity((float)of[row * width + c]));
            return most;
        };
        Buffer<float> x_amax(r, rows, [&](int64_t i) { return row_amax(x, i, in); }), d_amax(r, rows, [&](int64_t i) { return row_amax(d, i, out); });
        linear_forward(r.ctx, lin, scratch, y_.p, mat(x.p, in, amax ? x_amax.p : nullptr), rows);
        between();
        linear_backward(r.ctx, lin, scratch, dx_.p, mat(d.p, out, amax ? d_amax.p : nullptr), mat(x.p, in), rows);
        y = y_.fetch().values(), dx = dx_.fetch().values(), dw = dw_.fetch().values();
    }
    // D's two operands in one pass over it, where the recipe lets them.
    void one_pass() { scratch.d = second.p; }
    Type type(int which) const { return matrix_of[which] == matrix_x ? type_of<act_t>() : matrix_of[which] == matrix_w ? Type::f32 : type_of<T>(); }
    bool as_is(int which) const { return operand_bytes(recipe.cell[which], type(which), 1) == 0; }
    std::vector<double> source(Matrix m) const { return m == matrix_x ? x.values() : m == matrix_w ? w.values() : d.values(); }

    // Operand `which` as the slow quantiser makes it: its draws bear the seed, the step, the micro-batch, the layer and the operand, or
    // the one before it of the same matrix; its signs are its GEMM's.
    slow::Matrix wanted(int which) const {
        Cell cell = recipe.cell[which];
        if (scratch.nearest) cell.rounding = rn;
        std::vector<float> v;
        for (double e : source(matrix_of[which])) v.push_back((float)e);
        RandomKey key = {0x123456789abcull, 11, 3, 7, (uint32_t)which, Purpose::rounding};
        int64_t n = size[matrix_of[which]], c = cols[matrix_of[which]];
        if (cell.draws == Draws::before) key.operand = std::array<uint32_t, 6>{99, 99, 99, fprop_w, dgrad_d, fprop_x}[which];
        Axis blocks = cell.along == Along::contracted ? axis_of[which] : axis_of[which] == Axis::row ? Axis::column : Axis::row;
        return slow::quantise(v, n / c, c, cell, blocks, key, (uint32_t)which / 2);
    }
    // What lies in the scratch of one side is this operand, to the bit.
    void same_operand(Buffer<uint8_t>& side, const slow::Matrix& m, int which) {
        side.fetch();
        if (!r.compare) return;
        Type t = operand_type(recipe.cell[which].format);
        int64_t differ = 0, at = 0;
        for (int64_t i = 0; i < (int64_t)m.value.size(); i++) {
            float got = t == Type::bf16 ? load((const bf16*)side.host.data() + i) : load((const float*)side.host.data() + i);
            if (bits_of(got) != bits_of((float)m.value[i])) differ++, at = i;
        }
        r.verdict.note(differ == 0, "%s: %ld of %zu elements differ, such as %ld", operand_names[which], (long)differ, m.value.size(), (long)at);
    }
};

// got (I x J) = start + sum over k of p[i k] q[k j], times both tensor scales; by the strides of i, j and k. Of exact operands: products
// of f32 alone are rounded (u); each goes through at most K additions, the scales' product, the scaling, the addition to start.
static void compare_product(Run& r, const std::vector<double>& got, const double* start, double store_u, int64_t I, int64_t J, int64_t K,
                            const slow::Matrix& p, int64_t pi, int64_t pk, const slow::Matrix& q, int64_t qj, int64_t qk, const char* what, bool native = false) {
    double step = (K + 5) * product_u(operand_type(p.cell.format)) + (native ? native_error(narrow_type(p.cell)) : 0), alpha = (double)p.S_dec * q.S_dec;
    for (int64_t i = 0; i < I; i++)
        for (int64_t j = 0; j < J; j++) {
            double s = 0, size = 0;
            for (int64_t k = 0; k < K; k++) {
                double t = p.value[i * pi + k * pk] * q.value[j * qj + k * qk];
                s += t, size += std::fabs(t);
            }
            s *= alpha, size *= alpha;
            if (start) s += start[i * J + j], size += std::fabs(start[i * J + j]);
            r.verdict.close(got[i * J + j], s, step * size + store_u * std::fabs(s), what, i * J + j);
        }
}

template <class T> static void test_layer(Run& r, const Recipe& recipe, int64_t rows_, int64_t in_, int64_t out_, bool nearest, bool native = false) {
    for (const Cell& c : recipe.cell)
        if (on_gpu && sizeof(act_t) == 2 && c == f32) return;                 // the program refuses it
    Rng rng{(uint64_t)(rows_ + in_)};
    Layer<T> l(r, recipe, rows_, in_, out_, rng);
    l.scratch.nearest = nearest;
    std::vector<slow::Matrix> want;
    for (int i = 0; i < operand_count && r.compare; i++) want.push_back(l.wanted(i));
    auto look = [&](int first, int second, int third) {
        if (native) return;                                                   // packed: what they are shows in the products
        // the last of these that was made lies in the scratch
        for (int which : {first, second, third})
            if (which >= 0 && !l.as_is(which)) return l.same_operand(which & 1 ? l.b : l.a, r.compare ? want[which] : slow::Matrix(), which);
    };
    l.run([&] { look(fprop_x, -1, -1), look(fprop_w, -1, -1); });
    look(wgrad_d, dgrad_d, fprop_x), look(wgrad_x, dgrad_w, fprop_w);
    std::vector<double> y = l.y, dx = l.dx, dw = l.dw;
    auto again = [&](const char* what) {
        l.run([] {});
        r.verdict.note(y == l.y && dx == l.dx && dw == l.dw, "%s change bits", what);
    };
    bool made_twice = !(recipe.cell[dgrad_d] == recipe.cell[wgrad_d] && !has_blocks(recipe.cell[dgrad_d].format) && !has_row_scales(recipe.cell[dgrad_d])) || recipe.cell[dgrad_d].rounding == sr;
    l.one_pass();
    again("D's operands made in one pass");
    if (in_one_pass(recipe) && made_twice && !native) {
        l.same_operand(l.second, r.compare ? want[wgrad_d] : slow::Matrix(), wgrad_d);
        l.same_operand(l.a, r.compare ? want[dgrad_d] : slow::Matrix(), dgrad_d);      // nothing has come into a since
    }
    l.lin.scales = l.kept.p, l.amax = true;                                   // tensor scales kept from one operand to the next, of amaxes noted before
    again("kept tensor scales, or noted amaxes, of operands made in one pass");
    l.scratch.d = nullptr;
    again("kept tensor scales, or noted amaxes,");
    if (!r.compare) return;
    int64_t rows = l.rows, in = l.in, out = l.out;
    compare_product(r, y, nullptr, sizeof(T) == 2 ? act_u : u, rows, out, in, want[fprop_x], in, 1, want[fprop_w], in, 1, "Y", native);
    compare_product(r, dx, nullptr, act_u, rows, in, out, want[dgrad_d], out, 1, want[dgrad_w], 1, in, "dX", native);
    compare_product(r, dw, l.before.data(), u, out, in, rows, want[wgrad_d], 1, out, want[wgrad_x], 1, in, "dW", native);
}
template <class T> static void test_layers(Run& r, const Recipe& recipe) {
    const struct { int64_t rows, in, out; } shapes[] = {{1, 16, 8}, {31, 48, 64}, {33, 7, 100}, {300, 20, 33}, {64, 130, 16}, {16, 16, 260}};
    bool random = false;
    for (const Cell& c : recipe.cell) random = random || c.rounding == sr;
    for (auto [rows, in, out] : shapes) test_layer<T>(r, recipe, rows, in, out, false);
    if (random) test_layer<T>(r, recipe, 33, 48, 40, true);                   // evaluation: nearest whatever the cells say
}
static void test_recipes(Run& r, const std::vector<Recipe>& all) {
    for (const Recipe& recipe : all) {
        if (is_split(recipe)) continue;
        check_recipe(recipe);
        with_plans(r, "90", false, [&, &recipe = recipe] {                        // emulated in bf16, so that the operands can be looked at
            test_layers<act_t>(r, recipe);
            if (sizeof(act_t) != sizeof(acc_t)) test_layers<acc_t>(r, recipe);
        });
    }
}

#ifdef __CUDACC__
// The same layers multiplied as FP8 and FP4, GEMM by GEMM as far as dimensions allow, and emulated: both must be the products of the slow
// quantiser's operands. A tensor's two operands are packed along different axes; weights in square blocks, Hadamards, draws as ever.
static void test_native(Run& r) {
    const std::vector<Recipe> all = {*find_recipe("fp8"), *find_recipe("fp8-rows"), *find_recipe("mxfp8"), *find_recipe("nvfp4"), *find_recipe("nvfp4-sr"), *find_recipe("nvidia"),
                                     *find_recipe("four-over-six"), changed("fp8", "all.format=fp8_e5m2"), changed("fp8", "all.rounding=stochastic,wgrad.hadamard=16"),
                                     changed("mxfp8", "w.block=square,d.rounding=stochastic,wgrad.hadamard=32"),
                                     *find_recipe("mxfp4-fp8"), *find_recipe("nvfp4-fp8"), changed("mxfp4-fp8", "w.block=square,d.rounding=stochastic,wgrad.hadamard=32,x.scale=floor"), changed("nvfp4", "dgrad_d.along=other,wgrad_x.format=bf16")};
    // Which GEMMs are native: all; all, scales of several tiles; rows = 48 cannot be contracted in FP4; 33 rows none; in = 80 not in fprop; none
    const struct { int64_t rows, in, out; } shapes[] = {{32, 64, 96}, {160, 96, 288}, {48, 64, 96}, {33, 64, 96}, {64, 80, 96}, {64, 60, 40}};
    int seen = 0;
    for (const std::string& sm : targets({"90", "100"}))
        for (const Recipe& recipe : all)
            for (auto [rows, in, out] : shapes)
                for (bool native : {true, false})
                    with_plans(r, sm, native, [&, &rows = rows, &in = in, &out = out] {
                        test_layer<act_t>(r, recipe, rows, in, out, false, native);
                        if (sizeof(act_t) != sizeof(acc_t) && rows < 200) test_layer<acc_t>(r, recipe, rows, in, out, true, native);
                        int made = 0;
                        for (auto& [key, plan] : r.ctx.plans->cache) made += plan.found && is_narrow(key.a) && key.m != 1024 && key.m != 128;      // serves()'
                        seen += made;
#ifdef METIS_EMULATED
                        int want = 0;
                        int64_t l = multiple(rows, recipe.cell[wgrad_d].hadamard), of[3][3] = {{l, out, in}, {l, in, out}, {out, in, l}};     // as Layer has them
                        for (int g = 0; g < 3; g++) {
                            Type a = narrow_type(recipe.cell[2 * g]), b = narrow_type(recipe.cell[2 * g + 1]);
                            bool pair = is_tensorwise(a) ? is_tensorwise(b) && (a == Type::fp8 || b == Type::fp8) : is_narrow(a) && a == b && (std::stoi(sm) >= 100) == (a != Type::fp8_row);
                            want += native && pair && of[g][0] % 16 == 0 && of[g][1] % 16 == 0 && of[g][2] % (is_tensorwise(a) || a == Type::fp8_row ? 16 : 32) == 0;
                        }
                        // FP8's fprop may have two types of output, each a plan
                        r.verdict.note(made >= want && made <= want + 1 && (want || !made), "%d plans of native GEMMs, not %d", made, want);
#endif
                    });
    if (!seen) printf("left out: native FP8 and FP4 layers, which this GPU has not\n");
}
#endif

// A NaN or an infinity in X, W or D: whatever multiplies it must not be finite, for the trainer's guard to see it. More may be: a tensor
// scale poisons all. What does not depend on it stays.
static void test_not_finite(Run& r) {
    const int64_t rows = 32, in = 48, out = 64;
    for (const Recipe& recipe : recipes())
        for (float bad : {(float)NAN, INFINITY, -INFINITY})
            for (int source : {matrix_x, matrix_w, matrix_d}) {
                bool floats = recipe.cell[fprop_x] == f32;
                if (is_split(recipe) || (on_gpu && sizeof(act_t) == 2 && floats)) continue;
                Rng rng{17};
                Layer<act_t> l(r, recipe, rows, in, out, rng);
                r.at("%s, %g in %s", recipe.name.c_str(), bad, source == matrix_x ? "X" : source == matrix_w ? "W" : "D");
                int64_t i = rng.below((int)(l.size[source] / l.cols[source])), j = rng.below((int)l.cols[source]), at = i * l.cols[source] + j;
                if (source == matrix_x) assign(&l.x.host[at], bad), l.x.send();
                if (source == matrix_w) assign(&l.w.host[at], bad), l.w.send();
                if (source == matrix_d) assign(&l.d.host[at], bad), l.d.send();
                l.run([] {});
                auto line = [&](const std::vector<double>& m, int64_t columns, bool row, int64_t which, const char* what) {
                    int64_t finite = 0, n = row ? columns : (int64_t)m.size() / columns;
                    for (int64_t k = 0; k < n; k++) finite += std::isfinite(row ? m[which * columns + k] : m[k * columns + which]);
                    r.verdict.note(finite == 0, "%ld elements of %s %ld of %s are finite", (long)finite, row ? "row" : "column", (long)which, what);
                };
                auto clean = [&](const std::vector<double>& m, const char* what) {
                    int64_t finite = 0;
                    for (double v : m) finite += std::isfinite(v);
                    r.verdict.note(finite == (int64_t)m.size(), "%s has nothing to do with it; %ld of %zu are finite", what, (long)finite, m.size());
                };
                if (source == matrix_x) line(l.y, out, true, i, "Y"), line(l.dw, in, false, j, "dW"), clean(l.dx, "dX");
                if (source == matrix_w) line(l.y, out, false, i, "Y"), line(l.dx, in, false, j, "dX"), clean(l.dw, "dW");
                if (source == matrix_d) line(l.dx, in, true, i, "dX"), line(l.dw, in, true, j, "dW"), clean(l.y, "Y");
            }
}

// The tally of every operand is in its own place and of its own numbers: counts of the first tile, exact, and its squared error, a sum of
// 4096 positive floats at most, each after four roundings. It changes nothing. (D that serves twice is counted once.)
static void test_tally(Run& r) {
    for (auto [name, together] : {std::pair<const char*, bool>{"nvidia", false}, {"mxfp4", false}, {"fp8", false}, {"nvidia", true}, {"mxfp4", true}}) {
        Rng rng{3};
        Layer<act_t> l(r, *find_recipe(name), 96, 80, 112, rng);
        if (together) l.one_pass();
        l.run([] {});
        std::vector<double> y = l.y, dw = l.dw;
        l.scratch.tally = l.tally.p;
        l.run([] {});
        r.verdict.note(y == l.y && dw == l.dw, "counting changes the result");
        l.tally.fetch();
        for (int which = 0; which < operand_count && r.compare; which++) {
            slow::Matrix m = l.wanted(which);
            int beside = together && which / 2 != 0 && matrix_of[which] == matrix_d ? tile_height(l.recipe.cell[wgrad_d], Axis::column) : 0;
            TileShape t = tile_shape(m.cell, m.axis, m.rows, m.cols, beside);
            double error = 0, zero = 0, count = 0;
            for (int64_t i = 0; i < std::min<int64_t>(t.R, m.rows); i++)
                for (int64_t j = 0; j < std::min<int64_t>(t.C, m.cols); j++) {
                    int64_t at = i * m.cols + j;
                    error += std::pow((double)m.decoded(at) - m.x[at], 2), zero += m.decoded(at) == 0 && m.x[at] != 0, count++;
                }
            bool reused = which == wgrad_d && !strcmp(name, "fp8");
            if (reused) error = zero = count = 0;
            r.verdict.note(reused || (error > 0 && t.count < tally_every), "the test has no edge");
            r.verdict.close(l.tally[tally_sums * which], error, (depth(tile_size) + 8) * u * error, "the sum of squared errors of operand", which);
            r.verdict.close(l.tally[tally_sums * which + 2], zero, 0, "zeros of operand", which);
            r.verdict.close(l.tally[tally_sums * which + 4], count, 0, "elements of operand", which);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// Cells

// What f() prints on standard error and its exit status, in a process of its own; "" and 0 if it comes back.
template <class F> static std::pair<std::string, int> refusal(F f) {
    int ends[2], status = 0;
    if (pipe(ends) != 0) return {"no pipe", -1};
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2), close(ends[0]);
        f();
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char buffer[512];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, n);
    close(ends[0]), waitpid(child, &status, 0);
    return {text, WIFEXITED(status) ? WEXITSTATUS(status) : -1};
}

// Every refusal of set_cells() and check_recipe(): exit status 2 and one line that names the place and the reason.
static void test_bad_cells() {
    const struct { const char *row, *changes, *place, *reason; } bad[] = {
        {"nvfp4", "rounding=stochastic", "--set rounding=stochastic", "want WHICH.KEY=VALUE"},
        {"nvfp4", "x.rounding", "--set x.rounding", "want WHICH.KEY=VALUE"},
        {"nvfp4", "x=y.z", "--set x=y.z", "want WHICH.KEY=VALUE"},
        {"nvfp4", "x.format=nvfp4,,w.format=bf16", "--set :", "want WHICH.KEY=VALUE"},
        {"nvfp4", "x.colour=red", "--set x.colour=red", "keys are format, block, rounding, scale, hadamard, signs"},
        {"nvfp4", "x.format=fp5", "--set x.format=fp5", "is one of f32, bf16, fp8, fp8_e5m2, mxfp8, nvfp4, mxfp4"},
        {"nvfp4", "x.format=", "--set x.format=", "is one of f32"},
        {"nvfp4", "x.hadamard=8", "--set x.hadamard=8", "is one of 0, 16, 32, 64, 128"},
        {"nvfp4", "x.rounding=nearest ", "--set x.rounding=nearest ", "is one of nearest, stochastic"},
        {"nvfp4", "z.block=square", "z names no operand", "fprop, dgrad, wgrad, all"},
        {"nvfp4", "fprop_.block=square", "fprop_ names no operand", "fprop_x ... wgrad_x"},
        {"nvfp4", ".block=square", " names no operand", "or x, w, d"},
        {"bf16", "dgrad_d.rounding=stochastic", "dgrad_d of recipe bf16", "f32 and bf16 take no block, rounding, scale, hadamard or split"},
        {"float", "fprop.hadamard=16", "fprop_x of recipe float", "f32 and bf16 take no block, rounding, scale, hadamard or split"},
        {"fp8", "fprop_w.block=square", "fprop_w of recipe fp8", "only nvfp4, mxfp4 and mxfp8 have blocks"},
        {"nvfp4", "dgrad_w.scale=ceil", "dgrad_w of recipe nvfp4", "nvfp4's scale is te, headroom, four_six or po2"},
        {"mxfp4", "wgrad_d.scale=headroom", "wgrad_d of recipe mxfp4", "an MX format's scale is floor or ceil"},
        {"mxfp4", "wgrad_d.scale=po2", "wgrad_d of recipe mxfp4", "an MX format's scale is floor or ceil"},
        {"nvfp4", "w.carrier=e4m3", "fprop_w of recipe nvfp4", "FP8 carries mxfp4, and nvfp4 under scale=po2"},
        {"mxfp8", "dgrad_d.carrier=e5m2", "dgrad_d of recipe mxfp8", "FP8 carries mxfp4, and nvfp4 under scale=po2"},
        {"nvfp4-fp8", "wgrad_d.scale=te", "wgrad_d of recipe nvfp4-fp8", "FP8 carries mxfp4, and nvfp4 under scale=po2"},
        {"metis", "all.format=mxfp4,x.carrier=e4m3", "fprop_x of recipe metis", "a split operand has no FP8 carrier"},
        {"nvfp4", "x.carrier=fp8", "--set x.carrier=fp8", "is one of own, e4m3, e5m2"},
        {"fp8", "wgrad_x.scale=four_six", "wgrad_x of recipe fp8", "only nvfp4 and MX formats have scale rules"},
        {"fp8", "wgrad_x.scale=ceil", "wgrad_x of recipe fp8", "only nvfp4 and MX formats have scale rules"},
        {"nvidia", "dgrad.hadamard=16", "dgrad_w of recipe nvidia", "a square block cannot have a hadamard"},
        {"mxfp4", "fprop.hadamard=16", "fprop_x of recipe mxfp4", "the hadamard must cover whole blocks"},
        {"nvfp4", "fprop_x.hadamard=16", "fprop_x of recipe nvfp4", "both operands of a GEMM need the same hadamard and signs"},
        {"nvidia", "wgrad_x.hadamard=32", "wgrad_d of recipe nvidia", "both operands of a GEMM need the same hadamard and signs"},
        {"nvidia", "wgrad_x.signs=random", "wgrad_d of recipe nvidia", "both operands of a GEMM need the same hadamard and signs"},
        {"nvfp4", "fprop_w.format=f32", "fprop_x of recipe nvfp4", "f32 and e2m1 meet only f32 and e2m1"},
        {"nvfp4", "wgrad_x.format=e2m1", "wgrad_d of recipe nvfp4", "f32 and e2m1 meet only f32 and e2m1"},
        {"nvfp4", "wgrad.hadamard=16,wgrad_x.along=other", "wgrad_x of recipe nvfp4", "a hadamard lies along the contracted axis"},
        {"nvfp4", "dgrad_d.draws=before", "dgrad_d of recipe nvfp4", "it is the first operand of its matrix"},
        {"nvfp4", "wgrad_d.split=yes,wgrad.hadamard=16", "wgrad_d of recipe nvfp4", "a split operand cannot have a hadamard"},
        {"metis", "split.rank=0", "--set split.rank=0", "want a number between 0.01 and 100"},
        {"metis", "split.refresh=1.5", "--set split.refresh=1.5", "want a whole number between"},
        {"metis", "split.k=17", "--set split.k=17", "want a multiple of 16"},
        {"metis", "split.warm=", "--set split.warm=", "want a whole number between"},
        {"metis", "split.depth=3", "there is no split.depth", "there are rank, k, sample, refresh"},
        {"float", "dgrad_w.format=bf16", "dgrad_d of recipe float", "f32 and e2m1 meet only f32 and e2m1"},
    };
    int failed = 0;
    std::string first;
    for (auto& c : bad) {
        auto [text, status] = refusal([&c = c] {
            Recipe r = *find_recipe(c.row);
            set_cells(r, c.changes);
            check_recipe(r);
        });
        bool line = !text.empty() && text.find('\n') == text.size() - 1;
        if (status == 2 && line && text.find(c.place) != std::string::npos && text.find(c.reason) != std::string::npos) continue;
        if (!failed++) first = std::string(c.row) + ", " + c.changes + ": status " + std::to_string(status) + ", " + text;
    }
    check(!failed, "cells that make no sense", "%d; %s", failed, first.c_str());
}

// What set_cells() changes, in the words of --list-recipes, and that it leaves the rest alone.
static void test_set_cells() {
    const struct { const char *row, *changes, *cells[operand_count]; } good[] = {
        {"nvfp4", "", {"nvfp4", "nvfp4", "nvfp4", "nvfp4", "nvfp4", "nvfp4"}},
        {"nvidia", "", {"nvfp4", "nvfp4 16x16", "nvfp4 sr", "nvfp4 16x16", "nvfp4 sr h16", "nvfp4 h16"}},
        {"four-over-six", "", {"nvfp4 4/6", "nvfp4 16x16 4/6", "nvfp4 sr 4/6", "nvfp4 16x16 4/6", "nvfp4 sr 4/6 h16", "nvfp4 4/6 h16"}},
        {"nvfp4", "d.rounding=stochastic,wgrad_d.scale=headroom", {"nvfp4", "nvfp4", "nvfp4 sr", "nvfp4", "nvfp4 sr 17/16", "nvfp4"}},
        {"nvfp4", "w.block=square,wgrad.hadamard=32,wgrad.signs=random", {"nvfp4", "nvfp4 16x16", "nvfp4", "nvfp4 16x16", "nvfp4 h32r", "nvfp4 h32r"}},
        {"nvfp4", "fprop.hadamard=128,fprop.signs=plus", {"nvfp4 h128+", "nvfp4 h128+", "nvfp4", "nvfp4", "nvfp4", "nvfp4"}},
        {"nvidia", "x.format=bf16,wgrad.hadamard=0", {"bf16", "nvfp4 16x16", "nvfp4 sr", "nvfp4 16x16", "nvfp4 sr", "bf16"}},
        {"four-over-six", "w.format=mxfp4", {"nvfp4 4/6", "mxfp4 32x32", "nvfp4 sr 4/6", "mxfp4 32x32", "nvfp4 sr 4/6 h16", "nvfp4 4/6 h16"}},
        {"metis", "d.split=no,fprop_x.factors=exact,fprop_w.residual=exact",
         {"split nvfp4 AB exact", "split nvfp4 R exact", "nvfp4 sr", "split nvfp4", "nvfp4 sr", "split nvfp4"}},
        {"nvfp4", "all.format=e2m1,wgrad.along=other,wgrad_x.draws=before", {"e2m1", "e2m1", "e2m1", "e2m1", "e2m1 across", "e2m1 across again"}},
        {"mxfp4-fp8", "dgrad_w.block=square,wgrad_d.carrier=own,wgrad_x.format=fp8",
         {"mxfp4 in e4m3", "mxfp4 in e4m3", "mxfp4 in e5m2", "mxfp4 32x32 in e4m3", "mxfp4", "fp8"}},
        {"nvfp4", "d.scale=po2,dgrad_d.carrier=e5m2", {"nvfp4", "nvfp4", "nvfp4 po2 in e5m2", "nvfp4", "nvfp4 po2", "nvfp4"}},
        {"mxfp4", "dgrad.scale=floor,wgrad_x.format=fp8,fprop.format=f32", {"f32", "f32", "mxfp4 floor", "mxfp4 floor", "mxfp4", "fp8"}},
    };
    int failed = 0;
    std::string first;
    for (auto& c : good) {
        Recipe r = *find_recipe(c.row);
        auto [text, status] = refusal([&r, &c = c] { set_cells(r, c.changes), check_recipe(r); });
        std::string seen = status ? text : "";
        if (!status) set_cells(r, c.changes);
        for (int i = 0; i < operand_count && !status; i++)
            if (cell_text(r.cell[i]) != c.cells[i]) seen += " " + cell_text(r.cell[i]);
        if (!seen.empty() && !failed++) first = std::string(c.row) + ", " + c.changes + ": " + seen;
    }
    for (const Recipe& r : recipes()) {
        auto [text, status] = refusal([&r = r] { check_recipe(r); });
        if ((status || find_recipe(r.name) != &r) && !failed++) first = r.name + ": " + text;
    }
    check(!failed, "cells that are set", "%d; %s", failed, first.c_str());
}

int main(int argc, char** argv) {
    begin(argc, argv);
    test_bad_cells();                                                         // these fork: before a GPU is touched
    test_set_cells();
    test("linear layer, every recipe", [](Run& r) { test_recipes(r, recipes()); });
    test("linear layer, odd cells", [](Run& r) { test_recipes(r, odd_recipes()); });
#ifdef __CUDACC__
    test("linear layer, native FP8 and FP4", test_native);
    test("NaN and infinity reach the outputs of native GEMMs", [](Run& r) {
        for (const std::string& sm : targets({"90", "100"})) with_plans(r, sm, true, [&] { test_not_finite(r); });
    });
#endif
    test("NaN and infinity reach the outputs", [](Run& r) { with_plans(r, "90", false, [&] { test_not_finite(r); }); });
    test("tally of every operand", [](Run& r) { with_plans(r, "90", false, [&] { test_tally(r); }); });
    return done();
}
