// bench_kernels.cu: every row kernel of llama.cuh against a copy of as many bytes, timed in turn in one run (make bench).
// Prints a line a kernel: NAME GB/s and its share of the copy's GB/s, medians of `rounds`. Arrays are larger than any cache.
#include "../llama.cuh"

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
    b.row("residual_rmsnorm", gu, x, N * C, [&] { residual_rmsnorm(ctx, z, s, rstd, x, y, w, N, C, 1e-5f); });
    b.row("rmsnorm_backward", gu, x, N * C, [&] { rmsnorm_grad(ctx, z, w, partial, x, y, rstd, w, N, C); });
    b.row("rope", gu, x, N * C, [&] { rotate(ctx, qkv, cosine, sine, heads, 1); });
    b.row("swiglu_forward", y, x, N * C, [&] { swiglu(ctx, s, gu, N, F); });
    b.row("swiglu_backward", y, x, N * C, [&] { swiglu_grad(ctx, gu, s, N, F); });
    b.row("square_chunks", y, x, N * C, [&] { sum_squares(ctx, partial, g, P); });
    b.row("adamw", y, x, N * C, [&] { adamw_step(ctx, p, m, v, g, P, {1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 1, 0.1f, 0.05f}); });
    return 0;
}
