// bench_kernels.cu: every row kernel of llama.cuh and the quantisers of fp4.cuh against a copy of as many bytes, and GEMMs of FP4
// operands against float ones, each pair timed in turn in one run (make bench). Medians of `rounds`; arrays are larger than any cache.
//
//     bench_kernels [threads [part]]      part: rows, quantisers, gemms or metis; all of them without one
#include "../llama.cuh"
#include <functional>   // std::function

struct copy_bytes;

static void copy(Ctx& ctx, act_t* to, const act_t* from, int64_t rows, int cols) {
    for_rows<copy_bytes, 256>(ctx, {}, rows, KERNEL(Group<256> g, int64_t r) {
        g.map(cols, [](acc_t& o, acc_t v) { o = v; }, out(to + r * cols), from + r * cols);
    });
}

struct Bench {
    Ctx ctx;
    int64_t N;
    int rounds;
    // Median over rounds of bytes / seconds.
    template <class F> double rate(double bytes, F run) {
        std::vector<double> t;
        run();
        for (int i = 0; i < rounds; i++) {
            ctx.synchronise();
            double start = seconds();
            run();
            ctx.synchronise();
            t.push_back(seconds() - start);
        }
        std::sort(t.begin(), t.end());
        return bytes / t[t.size() / 2];
    }
    // The kernel and a copy that moves as much, side by side; bytes as the profiler's Cost counts them.
    void row(const char* name, act_t* to, const act_t* from, int64_t elements, const std::function<void()>& run) {
        ctx.profiler = {};
        ctx.profiler.on = true;
        run();
        ctx.profiler.on = false;
        double bytes = 0;
        for (auto& r : ctx.profiler.rows) bytes += r.bytes;
        double best = rate(2.0 * elements * sizeof(act_t), [&] { copy(ctx, to, from, elements / 4096, 4096); });
        double mine = rate(bytes, run);
        printf("%-22s %8.2f GB/s  copy %8.2f GB/s  ratio %.2f\n", name, mine * 1e-9, best * 1e-9, mine / best);
        fflush(stdout);
    }
};

// Where the time of a Metis layer goes: forward and backward of every linear layer of a block of `15m`, 4096 tokens, by part; the
// refresh of its bases is spread over the steps between two. FLOPs and bytes as the launches state them, the least they could be.
static void metis_table(Ctx& ctx) {
    Model m;
    Config c = config_of(presets[1], 256);
    c.layers = 1;
    const int B = 16, T = 256, N = B * T, rounds = 8;
    measure(m, c, B, T, Recompute::none, find_recipe("metis"), true);
    allocate(ctx, m, true);
    initialise(ctx, m);
    struct { const char* name; Linear* lin; act_t *x, *y, *d, *dx; } layers[] = {
        {"qkv", &m.linears[0].qkv, m.acts[0].h1, m.acts[0].qkv, m.d_wide, m.dh}, {"o", &m.linears[0].o, m.acts[0].att, m.y, m.dx, m.dh},
        {"gate_up", &m.linears[0].gate_up, m.acts[0].h2, m.acts[0].gu, m.acts[0].gu, m.dh}, {"down", &m.linears[0].down, m.acts[0].s, m.y, m.dx, m.d_wide}};
    struct { const char *part, *precision; std::vector<std::string> kernels; } parts[] = {
        {"M B", on_gpu ? "bf16" : "float", {"split M B"}}, {"A, L, Q(A), Q(B)", "float", {"split_norms", "split_lengths", "split_factors"}},
        {"amax of residuals", "float", {"quantise_amax", "quantise_scale"}}, {"residual + quantise", "float", {"quantise_tiles"}},
        {"R C, C C", "NVFP4", {"split R C", "split C C"}}, {"thin factors", "float", {"split_thin"}}, {"refresh / 8", "float", {}},
        {"fprop: R R + thin", "NVFP4, bf16", {" fprop"}}, {"dgrad: R R + thin", "NVFP4, bf16", {" dgrad"}}, {"wgrad: R R + thin", "NVFP4, bf16", {" wgrad"}}};
    printf("a Metis layer by parts, %d tokens: ms, GFLOP, GB\n%-22s %-12s", N, "", "precision");
    for (auto& l : layers) printf("  %-22s", (std::string(l.name) + " " + std::to_string(l.lin->in) + " to " + std::to_string(l.lin->out)).c_str());
    printf("\n");
    std::vector<std::vector<Profiler::Row>> seen;                               // per layer: a row for every kernel, of one pass
    for (auto& l : layers) {
        initialise(ctx, l.x, N * l.lin->in, 1, {1, 0, 0, 0, 1, Purpose::test}), initialise(ctx, l.d, N * l.lin->out, 1e-3f, {1, 0, 0, 0, 2, Purpose::test});
        m.operands.refresh = true;
        for (int step = 0; step <= rounds * 8; step++) {
            if (step == 1) ctx.profiler.rows.clear();                           // the first is cold
            ctx.step = (uint32_t)step, ctx.profiler.on = true;
            linear_forward(ctx, *l.lin, m.operands, l.y, mat((const act_t*)l.x, l.lin->in), N);
            if (l.y == l.d) initialise(ctx, l.d, N * l.lin->out, 1e-3f, {1, 0, 0, 0, 2, Purpose::test});
            linear_backward(ctx, *l.lin, m.operands, l.dx, mat((const act_t*)l.d, l.lin->out), mat((const act_t*)l.x, l.lin->in), N);
            ctx.profiler.on = false;
        }
        seen.push_back(ctx.profiler.rows);
    }
    for (auto& part : parts) {
        printf("%-22s %-12s", part.part, part.precision);
        for (auto& rows : seen) {
            double ms = 0, flops = 0, bytes = 0;
            for (auto& r : rows) {
                std::string name = r.name;
                bool listed = false, any = name == "init_weights";
                for (auto& p : parts)
                    for (auto& k : p.kernels) {
                        bool is = k[0] == ' ' ? name.size() > k.size() && name.substr(name.size() - k.size()) == k : name == k;
                        any |= is, listed |= is && &p == &part;
                    }
                if (part.kernels.empty() ? any : !listed) continue;
                ms += 1e3 * r.seconds, flops += r.flops, bytes += r.bytes;
            }
            double n = rounds * 8;
            printf("  %6.2f %7.2f %7.3f", ms / n, 1e-9 * flops / n, 1e-9 * bytes / n);
        }
        printf("\n");
    }
}

int main(int argc, char** argv) {
    Bench b;
    b.ctx.threads = argc > 1 ? atoi(argv[1]) : on_gpu ? 1 : omp_get_num_procs();
    b.ctx.plans = std::make_shared<MatmulPlans>(b.ctx);
    b.rounds = on_gpu ? 30 : 11;
    Config c = config_of(presets[1], 256);
    int T = 256, C = c.dim, F = c.ffn, B = on_gpu ? 256 : 64;
    int64_t N = (int64_t)B * T, W = 2 * F;
    Heads heads = {B, T, c.heads, c.kv_heads, c.head_dim};
    Ctx& ctx = b.ctx;
    std::string only = argc > 2 ? argv[2] : "";
    auto wanted = [&](const char* part) { return only.empty() || only == part; };
    Arena size, memory;
    act_t *x, *y, *z, *gu, *s, *qkv;
    acc_t *w, *rstd, *partial, *cosine, *sine, *p, *m, *v, *g;
    int64_t P = on_gpu ? 1 << 27 : 1 << 24;
    auto take = [&](Arena& a) {
        x = a.take<act_t>(N * C), y = a.take<act_t>(N * C), z = a.take<act_t>(N * C), gu = a.take<act_t>(N * W), s = a.take<act_t>(N * F);
        qkv = a.take<act_t>(N * heads.row()), w = a.take<acc_t>(C), rstd = a.take<acc_t>(N), partial = a.take<acc_t>(norm_chunks(N) * C);
        cosine = a.take<acc_t>(T * c.head_dim), sine = a.take<acc_t>(T * c.head_dim);
        p = a.take<acc_t>(P), m = a.take<acc_t>(P), v = a.take<acc_t>(P), g = a.take<acc_t>(P);
    };
    take(size);
    memory.base = (char*)device_alloc(size.used, "benchmark");
    take(memory);
    initialise(ctx, x, N * C, 1, {1, 0, 0, 0, 0, Purpose::test}), initialise(ctx, y, N * C, 0, {}), initialise(ctx, z, N * C, 0, {});
    initialise(ctx, w, C, 0, {}), initialise(ctx, rstd, N, 0, {}), initialise(ctx, p, P, 0, {}), initialise(ctx, g, P, 0, {});
    set_zero(ctx, m, P * sizeof(acc_t)), set_zero(ctx, v, P * sizeof(acc_t));
    if (wanted("rows")) {
        AdamW adam = {1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1, 0.1f, 0.05f};
        b.row("residual_rmsnorm", gu, x, N * C, [&] { residual_rmsnorm(ctx, z, s, rstd, x, y, w, N, C, 1e-5f); });
        b.row("rmsnorm_backward", gu, x, N * C, [&] { rmsnorm_grad(ctx, z, w, partial, x, y, rstd, w, N, C); });
        b.row("rope", gu, x, N * C, [&] { rotate(ctx, qkv, {cosine, sine}, heads, 1); });
        b.row("swiglu_forward", y, x, N * C, [&] { swiglu(ctx, s, gu, N, F); });
        b.row("swiglu_backward", y, x, N * C, [&] { swiglu_grad(ctx, gu, s, N, F); });
        b.row("square_chunks", y, x, N * C, [&] { sum_squares(ctx, partial, g, P); });
        b.row("adamw", y, x, N * C, [&] { adamw_step(ctx, p, m, v, g, P, adam, 0); });
        set_zero(ctx, m, P * sizeof(acc_t)), set_zero(ctx, v, P * sizeof(acc_t));
        b.row("adamw, bf16 m and v", y, x, N * C, [&] { adamw_step(ctx, p, (bf16*)m, (bf16*)v, g, P, adam, 0); });
    }

    // Quantisers, with their amax pass; bytes: both reads and the write.
    Type type = operand_type(Format::nvfp4);
    std::vector<Recipe> rows;
    for (const char* name : {"nvfp4", "nvfp4-sr", "nvidia", "mxfp4", "fp8", "four-over-six", "mxfp8", "fp8-rows"}) rows.push_back(*find_recipe(name));
    Arena quant_size, quant;
    OperandScratch scratch;
    acc_t *product, *weight;
    float *kept, *noted;
    auto take_quant = [&](Arena& a) {
        scratch.a = a.take<char>(N * W * size_of(type)), scratch.b = a.take<char>(W * C * size_of(type));
        scratch.d = a.take<char>(N * W * size_of(type)), scratch.scales = a.take<float>(6);
        scratch.partials = quantise_partials(rows[3].cell[0], N, W), scratch.partial = a.take<float>(2 * scratch.partials);
        product = a.take<acc_t>(N * W), weight = a.take<acc_t>(W * C), kept = a.take<float>(6), noted = a.take<float>(N);
    };
    take_quant(quant_size);
    quant.base = (char*)device_alloc(quant_size.used, "benchmark");
    take_quant(quant);
    initialise(ctx, gu, N * W, 1, {1, 0, 0, 0, 1, Purpose::test}), initialise(ctx, weight, W * C, 0.02f, {1, 0, 0, 0, 2, Purpose::test});
    initialise(ctx, x, N * C, 1, {1, 0, 0, 0, 3, Purpose::test});
    Linear lin = {"", "", "", C, W, weight, nullptr, nullptr};
    auto quantiser = [&](int row, Which which, Axis axis, const char* name) {
        lin.recipe = &rows[row];
        b.row(name, y, x, N * C, [&, which, axis] { prepare(ctx, lin, which, scratch, axis, mat(gu, W), N, W); });
    };
    if (wanted("quantisers")) {
        printf("quantisers: amax, scales, rounding (bytes: two reads and a write)\n");
        quantiser(0, fprop_x, Axis::row, "nvfp4 rows"), quantiser(0, wgrad_d, Axis::column, "nvfp4 columns");
        quantiser(1, dgrad_d, Axis::row, "nvfp4 sr rows"), quantiser(1, wgrad_d, Axis::column, "nvfp4 sr columns");
        quantiser(2, dgrad_w, Axis::column, "nvfp4 16x16"), quantiser(2, wgrad_d, Axis::column, "nvfp4 sr h16 columns");
        quantiser(3, fprop_x, Axis::row, "mxfp4 rows"), quantiser(3, wgrad_d, Axis::column, "mxfp4 columns"), quantiser(6, fprop_x, Axis::row, "mxfp8 rows");
        quantiser(4, fprop_x, Axis::row, "fp8, tensor scale"), quantiser(5, fprop_x, Axis::row, "nvfp4 4/6 rows");
        quantiser(7, fprop_x, Axis::row, "fp8-rows rows"), quantiser(7, wgrad_d, Axis::column, "fp8-rows columns");

        // The same operands in two passes and in one, after D's amaxes were noted by whoever wrote it.
        printf("both operands of D, in one pass against two (bytes: one read and two writes)\n");
        for_rows<copy_bytes>(ctx, {}, N, KERNEL(Group<32> g, int64_t r) { note_amax(g, noted + r, gu + r * W, (int)W); });
        Mat d = mat((const act_t*)gu, W, noted);
        lin.scales = kept;
        for (int row : {0, 1, 3}) {
            lin.recipe = &rows[row];
            auto both = [&](bool together) {
                Making<2> made;
                prepare(ctx, lin, dgrad_d, scratch, Axis::row, d, N, W, false, together ? &made : nullptr);
                prepare(ctx, lin, wgrad_d, scratch, Axis::column, d, N, W, false, together ? &made : nullptr);
                if (together) quantise_operands(ctx, made, d);
            };
            double bytes = double(N) * W * (sizeof(act_t) + 2 * size_of(type)), one = b.rate(bytes, [&] { both(true); }), two = b.rate(bytes, [&] { both(false); });
            printf("%-22s %8.2f GB/s  in two %6.2f GB/s  ratio %.2f\n", rows[row].name.c_str(), one * 1e-9, two * 1e-9, one / two);
        }
        lin.scales = nullptr;
    }

    // The three GEMMs of gate_up (4096 tokens): float operands, and FP4 ones as they are emulated, scales and all.
    if (wanted("gemms")) printf("GEMMs of FP4 operands against float ones, %s\n", type == Type::bf16 ? "multiplied as bf16" : "multiplied as float: no bf16 units");
    int64_t l = std::min<int64_t>(N, 4096);
    lin.recipe = &rows[0];
    Mat px = prepare(ctx, lin, fprop_x, scratch, Axis::row, mat(gu, W), l, W).r, pw = prepare(ctx, lin, fprop_w, scratch, Axis::row, mat(weight, C), W, C).r;
    struct { const char* name; int64_t m, n, k; bool ta, tb; int beta; } gemms[] = {{"fprop", l, W, C, false, true, 0}, {"dgrad", l, C, W, false, false, 0}, {"wgrad", W, C, l, true, false, 1}};
    for (auto& q : gemms) {
        if (!wanted("gemms")) break;
        auto operand = [&](const Mat& m, int64_t height, int64_t width, bool trans) { return Mat{m.data, m.type, trans ? height : width, trans, m.scale}; };
        double flops = 2. * q.m * q.n * q.k;
        Mat fa = operand(mat((const acc_t*)g, 1), q.m, q.k, q.ta), fb = operand(mat((const acc_t*)p, 1), q.k, q.n, q.tb);
        Mat ea = operand(px, q.m, q.k, q.ta), eb = operand(pw, q.k, q.n, q.tb);
        double plain = b.rate(flops, [&] { matmul(ctx, "", product, q.n, fa, fb, q.m, q.n, q.k, q.beta); });
        double four = b.rate(flops, [&] { matmul(ctx, "", product, q.n, ea, eb, q.m, q.n, q.k, q.beta); });
        printf("%-22s %8.0f GFLOP/s  float %7.0f GFLOP/s  ratio %.2f\n", q.name, four * 1e-9, plain * 1e-9, four / plain);
    }
    if (wanted("metis")) metis_table(ctx);
    return 0;
}
