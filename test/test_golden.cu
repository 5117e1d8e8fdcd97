// test_golden.cu: the whole model against PyTorch. test/golden/make_golden.py computed logits, loss, gradients and ten AdamW steps of
// two tiny Llama-3.x models in double, and how far transformers' float32 was from that; here the same files go through this program.
//
//     make build/cpu/test_golden && build/cpu/test_golden          from the repository root; -v prints how close everything is
//
// Limits. Recipe `float` with float activations: both programs round at the same places by the same amount but add in another
// order, so errors are of one size and differ by luck. Of every tensor the largest error, and the rms, may be 4 times what
// transformers' own was, plus 2^-22 of the largest element (golden values are stored as float; an error of exactly 0 is luck too).
// A wrong term, or a missing one, is off by 10^-3 and more: make_golden.py measures what each branch of the RoPE scaling is worth.
// Recipe `bf16`: every operand is rounded by 2^-8, uniformly: 0.2% rms. An emulation of the same roundings in PyTorch, with
// activations stored in bf16 too, as on a GPU, is off by 1.3% of the rms in logits, 3.7% in the worst gradient (layer 0's q and
// k: behind two layers, through the softmax), 0.15% in weights after ten steps, 0.003 in losses, 0.3% in norms. Limits: thrice that.
#include "../llama.cuh"
#include "test.h"

static bool verbose = false;
static const bool float_acts = sizeof(act_t) == 4;

// ---------------------------------------------------------------------------------------------------------------------------
// What PyTorch said

struct Golden {
    std::string name, folder;
    Config config;
    WeightFiles weights;
    SafeTensors file;
    std::vector<int> tokens, targets;
    int B, T;

    explicit Golden(const std::string& n)
        : name(n), folder("test/golden/" + n), config(read_config(folder + "/config.json")), weights(folder), file(folder + "/golden.safetensors") {
        tokens = get("tokens").read<int>(), targets = get("targets").read<int>();
        B = (int)get("tokens").shape[0], T = (int)get("tokens").shape[1];
    }
    const StoredTensor& get(const std::string& key) const {
        const StoredTensor* t = file.find(key);
        if (!t) fail("%s/golden.safetensors has no %s: make it again with test/golden/make_golden.py", folder.c_str(), key.c_str());
        return *t;
    }
};

// All comparisons of one kind; prints one line. Limits are of the largest error and of the rms; NaN in either fails.
struct Verdict {
    std::string name, first;
    int compared = 0, failed = 0;
    double worst = 0;
    std::string worst_at;

    explicit Verdict(const std::string& n) : name(n) {}
    void limit(double seen, double limit, const std::string& what) {
        compared++;
        if (!near(seen, 0, limit)) {
            char text[100];
            snprintf(text, sizeof text, " is off by %.3g, the limit is %.3g", seen, limit);
            if (!failed++) first = what + text;
        } else if (limit > 0 && std::fabs(seen) / limit >= worst) worst = std::fabs(seen) / limit, worst_at = what;
    }
    ~Verdict() {
        if (verbose) printf("   %s: %d comparisons, up to %.2g of the limit (%s)\n", name.c_str(), compared, worst, worst_at.c_str());
        check(failed == 0 && compared > 0, name.c_str(), "%d of %d; %s", failed, compared, first.c_str());
    }
};

// got, n values, against the golden tensor `key` or, if `prefix`, its first n.
static void compare(Verdict& v, const Golden& g, const std::string& key, const float* got, size_t n, bool exact, bool prefix = false) {
    std::vector<double> want = g.get(key).read<double>(), err = g.get("err." + key).read<double>();
    if (want.size() < n || (want.size() > n && !prefix)) return v.limit(NAN, 0, key + ": its size");
    double largest = 0, squares = 0, size = 0, size2 = 0;
    bool finite = true;
    for (size_t i = 0; i < n; i++) {
        double d = std::fabs(got[i] - want[i]);
        finite = finite && is_finite(got[i]);
        largest = std::max(largest, d), squares += d * d, size = std::max(size, std::fabs(want[i])), size2 += want[i] * want[i];
    }
    if (!finite) largest = NAN;
    double rms = std::sqrt(squares / n), rms_size = std::sqrt(size2 / n);
    if (exact) {
        v.limit(largest, 4 * err[0] + 0x1p-22 * size, key);
        v.limit(rms, 4 * err[1] + 0x1p-22 * rms_size, key + " (rms)");
    } else {
        double share = key == "logits" ? 0.04 : key.compare(0, 5, "after") == 0 ? 0.005 : 0.11;
        v.limit(finite ? rms : NAN, share * rms_size, key + " (rms)");
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// What we say: a model with the golden weights, its memory full of NaN wherever nothing has been written yet.

static Ctx& context(int threads) {
    static Ctx all[3];
    Ctx& ctx = all[threads - 1];
    if (!ctx.plans) ctx.threads = threads, ctx.plans = std::make_shared<MatmulPlans>(ctx);
    return ctx;
}

struct Trainer {
    const Golden& g;
    Ctx& ctx;
    Model m;
    int64_t N;

    Trainer(const Golden& golden, const char* recipe, Recompute recompute = Recompute::none, int threads = 1, int64_t head_rows = 0)
        : Trainer(golden, recipe, recompute, context(threads), head_rows) {}
    Trainer(const Golden& golden, const char* recipe, Recompute recompute, Ctx& context, int64_t head_rows = 0)
        : g(golden), ctx(context), N((int64_t)g.B * g.T) {
        measure(m, g.config, g.B, g.T, recompute, find_recipe(recipe), true);
        allocate(ctx, m, true);
        if (head_rows) m.head_rows = head_rows;                                // fewer than there is room for
        poison(m.acts[0].x, m.plan.activations), poison(m.y, m.plan.scratch), poison(m.grads, m.arena * sizeof(acc_t));
        load_parameters(g.weights, m.tensors, [&](size_t first, const float* values, size_t count) {
            to_device(ctx, m.params + first, values, count * sizeof(float));
        });
    }
    Trainer(const Trainer&) = delete;
    ~Trainer() {
        device_free(m.params, m.plan.parameters + m.plan.gradients + m.plan.optimiser);
        device_free(m.acts[0].x, m.plan.activations), device_free(m.y, m.plan.scratch + m.plan.tables);
    }
    void poison(void* p, size_t n) {
        std::vector<uint8_t> nan(n, 0xff);
        to_device(ctx, p, nan.data(), n);
    }
    std::vector<float> fetch(const acc_t* arena) {
        std::vector<float> all(m.arena);
        to_host(ctx, all.data(), arena, m.arena * sizeof(float));
        return all;
    }

    // Logits of the first B sequences' first T tokens, a chunk of rows at a time as classify() makes them.
    std::vector<float> logits(const std::vector<int>& tokens, int B, int T) {
        forward(ctx, m, tokens.data(), B, T);
        int64_t n = (int64_t)B * T, V = g.config.vocab, C = g.config.dim;
        std::vector<float> all(n * V);
        for (int64_t r = 0; r < n; r += m.head_rows) {
            int64_t rows = std::min(m.head_rows, n - r);
            linear_forward(ctx, m.head, m.operands, m.logits, mat(m.h_final + r * C, C), rows);
            to_host(ctx, all.data() + r * V, m.logits, rows * V * sizeof(float));
        }
        return all;
    }
    // The mean loss, and its gradient in m.grads, over the batch in micro-batches of these many sequences.
    double gradient(const std::vector<int>& sequences) {
        set_zero(ctx, m.grads, m.arena * sizeof(acc_t));
        set_zero(ctx, m.sums, 2 * sizeof(acc_t));
        int64_t at = 0;
        for (int b : sequences) {
            forward(ctx, m, g.tokens.data() + at, b, g.T);
            classify(ctx, m, g.targets.data() + at, (int64_t)b * g.T, acc_t(1) / N);
            backward(ctx, m, g.tokens.data() + at, b, g.T);
            at += (int64_t)b * g.T;
        }
        acc_t sum;
        to_host(ctx, &sum, m.sums, sizeof sum);
        return (double)sum / N;
    }
    // An optimiser step, as train_step() of train_llama.cu makes it; t counts from 1.
    void step(int t, double* loss, double* norm) {
        *loss = gradient({g.B});
        sum_squares(ctx, m.norm_partial, m.grads, m.arena);
        add_sum(ctx, m.sums + 1, m.norm_partial, chunks_of(m.arena));
        acc_t sums[2];
        to_host(ctx, sums, m.sums, sizeof sums);
        *norm = std::sqrt(sums[1]);
        AdamW adam = {acc_t(1e-3), acc_t(0.9), acc_t(0.95), acc_t(1e-8), 0, 1, (acc_t)(1 - std::pow(0.9, t)), (acc_t)(1 - std::pow(0.95, t))};
        adam.clip = std::min<acc_t>(1, (acc_t)(1 / (*norm + 1e-6)));
        for (size_t i = 0; i < m.trained.size(); i++) adamw_step(ctx, m, i, adam, acc_t(0.1));
    }
};

// Every Hugging Face tensor that golden.safetensors has under `prefix`, and no fewer.
static void compare_arena(Verdict& v, Trainer& t, const std::string& prefix, const acc_t* arena, bool exact) {
    std::vector<float> all = t.fetch(arena);
    size_t want = 0, seen = 0;
    for (const auto& [key, stored] : t.g.file.tensors) want += key.compare(0, prefix.size(), prefix) == 0;
    for_parts(t.m.tensors, [&](const std::string& name, const std::vector<int64_t>& shape, size_t offset) {
        if (!t.g.file.find(prefix + name)) return;
        size_t n = 1;
        for (int64_t d : shape) n *= (size_t)d;
        compare(v, t.g, prefix + name, all.data() + offset, n, exact), seen++;
    });
    v.limit((double)want - (double)seen, 0.5, "the number of tensors");
}

static void test_model(const Golden& g, const char* recipe, bool exact) {
    std::string name = g.name + ", " + recipe + ": ";
    const Config& c = g.config;
    // A mean over 120 rows is itself a float sum: 16 u beside what the logits' errors make of it.
    double want_loss = g.get("loss64").read<double>()[0], torch_loss = g.get("loss").read<double>()[0];
    double loss_limit = exact ? 4 * std::fabs(torch_loss - want_loss) + 0x1p-20 * want_loss : 0.01;
    {
        Verdict v(name + "logits");
        Trainer t(g, recipe, Recompute::none, 1, 50);                          // 120 rows: chunks of 50, 50 and 20
        std::vector<float> all = t.logits(g.tokens, g.B, g.T);
        compare(v, g, "logits", all.data(), all.size(), exact);
        // Fewer, shorter sequences than there is room for: what is yet to come has no influence.
        std::vector<float> some = t.logits(g.tokens, 1, g.T - 7);
        compare(v, g, "logits", some.data(), some.size(), exact, true);
    }
    {
        Verdict loss(name + "loss"), v(name + "gradients");
        Trainer t(g, recipe);
        loss.limit(t.gradient({g.B}) - want_loss, loss_limit, "loss");
        compare_arena(v, t, "grad.", t.m.grads, exact);
        Trainer chunked(g, recipe, Recompute::none, 1, 50);
        loss.limit(chunked.gradient({g.B}) - want_loss, loss_limit, "loss by chunks of the head");
        compare_arena(v, chunked, "grad.", chunked.m.grads, exact);
        Verdict sum(name + "gradients of two micro-batches add up");
        Trainer parts(g, recipe);
        sum.limit(parts.gradient({1, g.B - 1}) - want_loss, loss_limit, "loss");
        compare_arena(sum, parts, "grad.", parts.m.grads, exact);
    }
    {
        Verdict v(name + "ten AdamW steps");
        Trainer t(g, recipe);
        std::vector<float> start = t.fetch(t.m.params);
        std::vector<double> losses = g.get("losses").read<double>(), losses64 = g.get("losses64").read<double>();
        std::vector<double> norms = g.get("norms").read<double>(), norms64 = g.get("norms64").read<double>();
        double loss_err = 0, norm_err = 0;                                    // transformers' own, at its worst step
        for (int i = 0; i < 10; i++) {
            loss_err = std::max(loss_err, std::fabs(losses[i] - losses64[i]));
            norm_err = std::max(norm_err, std::fabs(norms[i] - norms64[i]));
        }
        int clipped = 0;
        for (int i = 0; i < 10; i++) {
            double loss, norm;
            t.step(i + 1, &loss, &norm);
            clipped += norm > 1;
            v.limit(loss - losses64[i], exact ? 4 * loss_err + 0x1p-20 * losses64[i] : 0.01, "loss of step " + std::to_string(i + 1));
            v.limit(norm - norms64[i], exact ? 4 * norm_err + 0x1p-22 * norms64[i] : 0.01 * norms64[i], "norm of step " + std::to_string(i + 1));
        }
        v.limit(c.tied ? clipped - 4 : clipped - 10, 0, "the number of clipped steps");
        compare_arena(v, t, "after.", t.m.params, exact);
        // Tokens 1 to 7 do not occur: untied, their rows only decay; (1 - 1e-3 * 0.1)^10, and a rounding a step.
        std::vector<float> end = t.fetch(t.m.params);
        for (int64_t i = c.dim; !c.tied && i < 8 * c.dim; i++)
            v.limit(end[i] - start[i] * std::pow(1 - 1e-4, 10), 11 * 0x1p-23 * std::fabs(start[i]), "an unused row's weight " + std::to_string(i));
    }
    {
        // Threads and recomputation only move work: after two steps every parameter has the bits it has without them.
        Verdict v(name + "the same bits for any threads and recomputation");
        auto run = [&](Recompute recompute, int threads) {
            Trainer t(g, recipe, recompute, threads);
            double loss, norm;
            for (int i = 1; i <= 2; i++) t.step(i, &loss, &norm);
            return t.fetch(t.m.params);
        };
        std::vector<float> plain = run(Recompute::none, 1);
        auto same = [&](const std::vector<float>& other, const char* what) {
            v.limit(memcmp(other.data(), plain.data(), plain.size() * sizeof(float)), 0, what);
        };
        same(run(Recompute::none, 2), "2 threads"), same(run(Recompute::none, 3), "3 threads");
        same(run(Recompute::norms, 1), "recompute norms"), same(run(Recompute::block, 2), "recompute block");
    }
}

// ---------------------------------------------------------------------------------------------------------------------------
// Files

static bool same_config(const Config& a, const Config& b) {
    auto fields = [](const Config& c) {
        RopeScaling s = c.scaling.factor ? c.scaling : RopeScaling{};
        return std::make_tuple(c.layers, c.dim, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab, c.tied, s.factor, s.low, s.high, s.original,
                               c.rope_theta, c.norm_eps, c.max_seq);
    };
    return fields(a) == fields(b);
}

#ifdef __CUDACC__
// Replayed launches give the bits of those made one by one: draws of this step and micro-batch, bases refreshed when they are due,
// parameters that move. Of every block a forward and a backward are recorded.
static void test_graphs(const Golden& g, const char* recipe, Recompute recompute) {
    Ctx ctx[2];
    std::vector<std::unique_ptr<Trainer>> run;
    for (Ctx& c : ctx) {
        CUDA(cudaStreamCreate(&c.stream));
        c.plans = std::make_shared<MatmulPlans>(c), c.seed = 5;
        run.emplace_back(new Trainer(g, recipe, recompute, c));
        if (run.back()->m.basis) set_zero(c, run.back()->m.basis, arena_size(run.back()->m.bases) * sizeof(acc_t));
        for (void* moment : {run.back()->m.m, run.back()->m.v}) set_zero(c, moment, run.back()->m.arena * sizeof(acc_t));
    }
    ctx[1].graphs = std::make_shared<Graphs>();
    std::vector<float> before;
    bool same = true, moves = true;
    for (uint32_t step = 0; step < 4; step++) {
        std::vector<float> grads[2];
        for (int i = 0; i < 2; i++) {
            Trainer& t = *run[i];
            set_zero(t.ctx, t.m.grads, t.m.arena * sizeof(acc_t));
            set_zero(t.ctx, t.m.sums, 2 * sizeof(acc_t));
            t.ctx.step = step, t.ctx.micro = 0;
            for (int64_t at = 0; at < t.N; at += g.T, t.ctx.micro++) {
                forward(t.ctx, t.m, g.tokens.data() + at, 1, g.T);
                classify(t.ctx, t.m, g.targets.data() + at, g.T, acc_t(1) / t.N);
                backward(t.ctx, t.m, g.tokens.data() + at, 1, g.T);
            }
            grads[i] = t.fetch(t.m.grads);
            for (size_t n = 0; n < t.m.trained.size(); n++) adamw_step(t.ctx, t.m, n, {1e-3f, 0.9f, 0.95f, 1e-8f, 0, 1, 0.1f, 0.05f}, 0);
        }
        same = same && !memcmp(grads[0].data(), grads[1].data(), grads[0].size() * sizeof(float));
        moves = moves && grads[0] != before, before = grads[0];
    }
    size_t recorded = 0;
    for (auto& [key, graph] : ctx[1].graphs->all) recorded += graph.graph != nullptr;
    std::string what = g.name + ", " + recipe + (recompute == Recompute::block ? ", recomputing blocks" : "") + ": replayed launches give the same bits";
    check(same && moves && recorded == 2 * (size_t)g.config.layers, what.c_str(), "%s; %zu graphs of %d blocks", same ? "nothing changes" : "they differ", recorded, g.config.layers);
}
#endif

static void test_files(const Golden& g, const std::string& scratch) {
    std::string path = scratch + "/config.json";
    auto through = [&](const std::string& text) {
        FILE* f = fopen(path.c_str(), "w");
        if (!f || fwrite(text.data(), 1, text.size(), f) != text.size() || fclose(f) != 0) fail("cannot write %s", path.c_str());
        return read_config(path);
    };
    const Config& c = g.config;
    Config made{2, 48, 6, 2, 8, 80, 96, false, {8, 1, 4, 256}};               // as make_golden.py has it
    if (g.name == "tied") made.layers = 1, made.ffn = 32, made.vocab = 80, made.tied = true, made.scaling.factor = 32;
    made.rope_theta = 500000, made.norm_eps = 1e-5, made.max_seq = 2048;
    bool read = same_config(c, made);
    check(read, (g.name + ": read_config").c_str(), "a field differs from what make_golden.py wrote");

    Config odd = c;                                                           // nothing at its default; no scaling
    odd.scaling = {}, odd.rope_theta = 12345.5, odd.norm_eps = 3e-6, odd.max_seq = 777, odd.head_dim = 10, odd.kv_heads = 3, odd.tied = !c.tied;
    bool same = same_config(through(write_config(c)), c) && same_config(through(write_config(odd)), odd);
    for (const Preset& p : presets) same = same && same_config(through(write_config(config_of(p, 1000))), config_of(p, 1000));
    check(same, (g.name + ": write_config, then read_config").c_str(), "a field is lost");

    // transformers 5 writes all of RoPE into one object, and other keys that change nothing.
    nlohmann::json j = nlohmann::json::parse(write_config(c));
    nlohmann::json rope = j["rope_scaling"];
    rope["rope_theta"] = j["rope_theta"];
    j.erase("rope_scaling"), j.erase("rope_theta"), j.erase("torch_dtype");
    j["rope_parameters"] = rope, j["dtype"] = "float32", j["transformers_version"] = "5.0.0", j["use_cache"] = true, j["initializer_range"] = 0.02;
    check(same_config(through(j.dump()), c), (g.name + ": read_config of transformers 5").c_str(), "a field is lost");

    // A checkpoint holds the very bytes it was loaded from, tensor for tensor.
    Trainer t(g, float_acts ? "float" : "bf16");
    std::vector<float> all = t.fetch(t.m.params);
    FloatSource source = [&](size_t first, size_t) { return (const float*)all.data() + first; };
    CheckpointFile weights = {"model.safetensors", tensor_entries(t.m.tensors, {{"", source}})};
    std::string saved = save_checkpoint(scratch, 1, write_config(c), {weights}, nlohmann::ordered_json::object());
    WeightFiles again(saved);
    bool equal = again.tensors.size() == g.weights.tensors.size() && same_config(read_config(saved + "/config.json"), c);
    for (const auto& [name, want] : g.weights.tensors) {
        const StoredTensor* seen = again.find(name);
        equal = equal && seen && seen->shape == want->shape && seen->dtype == "F32" && !memcmp(seen->data, want->data, want->count * sizeof(float));
    }
    check(equal, (g.name + ": save_checkpoint gives back the loaded weights").c_str(), "a tensor, its shape or its name differs");
}

int main(int argc, char** argv) {
    verbose = argc > 1 && !strcmp(argv[1], "-v");
    calm_openmp(argv);
    const char* tmp = getenv("TMPDIR");
    std::string scratch = std::string(tmp && *tmp ? tmp : "/tmp") + "/test_golden.XXXXXX";
    if (!mkdtemp(scratch.data())) fail("cannot create %s", scratch.c_str());
    for (const char* name : {"untied", "tied"}) {
        Golden g(name);
        if (float_acts) test_model(g, "float", true);
        test_model(g, "bf16", false);
        test_files(g, scratch);
#ifdef __CUDACC__
        if (g.name == "untied") test_graphs(g, "bf16", Recompute::none), test_graphs(g, "nvidia", Recompute::block);
        else test_graphs(g, "metis", Recompute::norms);
#endif
    }
    std::error_code ec;
    std::filesystem::remove_all(scratch, ec);
    return done();
}
