// report.cuh: what the program says about the machine and about a recipe: the memory a run takes and what is free, the measured ceilings
// (matmul and copy), the tables of --profile and --list-recipes, and what share of a step's arithmetic is done in 4 bits.
#pragma once
#include "llama.cuh"        // Model, Recipe, copy, initialise
#include "options.h"        // Options

// JSON has no NaN.
inline std::string json_number(double v) {
    char text[32];
    snprintf(text, sizeof text, "%.9g", v);
    return is_finite(v) ? text : "null";
}

// "42s", "3m07s", "11h20m".
inline std::string duration(double s) {
    char text[32];
    if (s < 60) snprintf(text, sizeof text, "%.0fs", s);
    else if (s < 3600) snprintf(text, sizeof text, "%dm%02ds", (int)s / 60, (int)s % 60);
    else snprintf(text, sizeof text, "%dh%02dm", (int)(s / 3600), (int)s / 60 % 60);
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------------
// The machine

// Bytes this process may still take.
//
// On the CPU what the kernel counts as available (free, and caches that it can drop), but no more than a container's limit leaves.
inline double available_memory() {
#ifdef __CUDACC__
    size_t free_bytes, total;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    return (double)free_bytes;
#else
    double available = 0;
    char line[256];
    if (FILE* f = fopen("/proc/meminfo", "r")) {
        while (fgets(line, sizeof line, f))
            if (sscanf(line, "MemAvailable: %lf", &available) == 1) break;
        fclose(f);
    }
    available *= 1024;
    // In a container the kernel's number is the whole machine's; the container's own limit kills first.
    double group[2] = {NAN, NAN};                                                // a container's limit, and what it has taken of it
    const char* files[] = {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"};
    for (int i = 0; i < 2; i++)
        if (FILE* f = fopen(files[i], "r")) {
            if (fscanf(f, "%lf", &group[i]) != 1) group[i] = NAN;                // "max": none
            fclose(f);
        }
    if (double left = group[0] - group[1]; left < available) available = std::max(left, 0.);
    return available;
#endif
}

// Beside the model's arenas: tiles of attention scores (64 queries x T keys, twice) and the library's packing buffers of every thread;
// the program itself.
inline double overhead_bytes(const Ctx& ctx, int T) {
    // Free memory is counted after the context was made; what modules, kernels' local memory and graphs take later no GPU has shown yet.
    if (on_gpu) return 1e9;
    return 24e6 + ctx.threads * (2.0 * 64 * T * sizeof(acc_t) + 4e6);
}

// What this run would take with micro-batches of B sequences. Only activations and scratch grow with B, but not in proportion: rows of
// logits are capped, operands are those of the widest GEMM. So the plan is made anew.
inline double planned_bytes(const Ctx& ctx, const Model& of, const Options& o, int B) {
    Model m;
    MemoryPlan p = measure(m, of.config, B, o.seq, of.recompute, of.precision, o.trains(), of.shadows, of.moments);
    return p.total() + overhead_bytes(ctx, o.seq);
}

// The plan by class beside what is free: for --dry-run on stdout, for a run that does not fit on stderr.
inline void print_memory(const Ctx& ctx, const Model& m, const Options& o, FILE* to) {
    const MemoryPlan& p = m.plan;
    double process = overhead_bytes(ctx, o.seq), available = available_memory();
    auto row = [&](const char* name, double bytes) { fprintf(to, "  %-14s %9.3f GB\n", name, bytes * 1e-9); };
    fprintf(to, "memory\n");
    row("parameters", p.parameters), row("gradients", p.gradients), row("optimiser", p.optimiser), row("activations", p.activations);
    row("scratch", p.scratch + p.tables), row("process", process), row("total", p.total() + process), row("available", available);
    int64_t fits = 0;                                                            // the largest batch, bit by bit from the highest
    for (int64_t bit = 1 << 20; bit > 0; bit /= 2)
        if ((double)(fits + bit) * o.seq < 2e9 && planned_bytes(ctx, m, o, (int)(fits + bit)) <= available) fits += bit;
    fprintf(to, "  largest --batch that fits: %lld\n", (long long)fits);
}

// What --dry-run prints: nothing of it has been allocated.
inline void print_plan(const Ctx& ctx, const Model& m, const Options& o) {
    print_memory(ctx, m, o, stdout);
    double flops = flops_per_token(m.config, o.seq) * o.batch * o.seq * o.accum;
    printf("compute\n  %-14s %9.3f TFLOP a step (6 per weight and token, and causal attention)\n", "training", flops * 1e-12);
    // What save() writes: floats but for the moments. --keep N are there beside the one that is being written.
    double disk = 4.0 * (parameter_count(m.tensors) + parameter_count(m.bases) + parameter_count(m.factors)) +
                  2.0 * size_of(m.moments) * parameter_count(m.trained);
    printf("disk\n  %-14s %9.3f GB each, %.3f GB at most with --keep %d\n", "checkpoint", disk * 1e-9, disk * (o.keep + 1) * 1e-9, o.keep);
}

// FLOP/s of one large matmul with operands as this format is stored: what "% of peak" is a percentage of. The best of up to 50 runs in
// 0.15 s: interruptions only ever slow one down.
inline double measure_matmul(Ctx& ctx, Format format) {
    // (m x n) (n x n)^T, large enough for every core: on a CPU at least a tile of 256 rows for each thread.
    int64_t n = on_gpu ? 8192 : 1024, m = on_gpu ? 8192 : std::max<int64_t>(1024, 256 * ctx.threads);
    Type type = operand_type(format);
    size_t size_a = m * n * size_of(type), size_b = n * n * size_of(type), total = size_a + size_b + m * n * sizeof(acc_t);
    char* p = (char*)device_alloc(total, "measuring the matmul peak");
    // Random operands: zeros would flatter (less power drawn, higher clocks).
    RandomKey key = {1, 0, 0, 0, 0, Purpose::test};
    if (type == Type::bf16) initialise(ctx, (bf16*)p, m * n + n * n, 1, key);
    else initialise(ctx, (acc_t*)p, m * n + n * n, 1, key);
    // The first runs also load code and find a plan; three at least, so that one is undisturbed.
    double best = 1e9, begin = seconds();
    for (int i = 0; i < 50 && (i < 3 || seconds() - begin < 0.15); i++) {
        ctx.synchronise();
        double t = seconds();
        matmul(ctx, "peak", (acc_t*)(p + size_a + size_b), n, {p, type, n}, Mat{p + size_a, type, n}.transposed(), m, n, n, 0);
        ctx.synchronise();
        best = std::min(best, seconds() - t);
    }
    device_free(p, total);
    return 2.0 * m * n * n / best;
}

// Bytes/s (read and written) of a copy far larger than any cache: the ceiling of every kernel that is bound by memory.
inline double measure_copy(Ctx& ctx) {
    const int64_t n = (on_gpu ? 65536 : 8192) * (int64_t)4096;                   // 1 GB each on a GPU, 134 MB on a CPU
    size_t bytes = n * sizeof(acc_t);
    acc_t* p = (acc_t*)device_alloc(2 * bytes, "measuring the copy bandwidth");
    double best = 1e9;
    for (int i = 0; i < 6; i++) {
        ctx.synchronise();
        double t = seconds();
        copy(ctx, p + n, p, n);
        ctx.synchronise();
        if (i > 0) best = std::min(best, seconds() - t);                         // the first touches new pages
    }
    device_free(p, 2 * bytes);
    return 2.0 * bytes / best;
}

// Every kernel's time, and its bytes and FLOPs a second against the two ceilings. peak: measure_matmul()'s. A kernel near neither
// ceiling is where speed is lost; "% copy" beyond 100 means that its data came from a cache.
inline void print_profile(Ctx& ctx, double peak, int64_t steps) {
    std::vector<Profiler::Row> rows = ctx.profiler.rows;
    double copy = measure_copy(ctx), total = 0;
    std::sort(rows.begin(), rows.end(), [](auto& a, auto& b) { return a.seconds > b.seconds; });
    for (auto& r : rows) total += r.seconds;
    printf("profile of %lld step%s: %.1f ms of kernels a step; ceilings measured: matmul %.0f GFLOP/s, copy %.1f GB/s\n", (long long)steps,
           steps == 1 ? "" : "s", 1e3 * total / steps, peak * 1e-9, copy * 1e-9);
    printf("  %-26s %8s %10s %6s %9s %6s %10s %6s\n", "kernel", "calls", "ms/step", "share", "GB/s", "% copy", "GFLOP/s", "% peak");
    for (auto& r : rows)
        printf("  %-26s %8.1f %10.3f %5.1f%% %9.2f %5.0f%% %10.1f %5.0f%%\n", r.name, (double)r.calls / steps, 1e3 * r.seconds / steps,
               100 * r.seconds / total, 1e-9 * r.bytes / r.seconds, 100 * r.bytes / r.seconds / copy, 1e-9 * r.flops / r.seconds,
               100 * r.flops / r.seconds / peak);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Recipes

// The table as README.md shows it, with --set's changes.
inline void list_recipes(const std::string& changes) {
    std::vector<std::vector<std::string>> lines = {{"recipe", "fprop X", "fprop W", "dgrad D", "dgrad W", "wgrad D", "wgrad X", "blocks in bf16"}, {}};
    std::string about;
    for (Recipe r : recipes()) {
        set_cells(r, changes);
        lines.push_back({r.name});
        for (const Cell& c : r.cell) lines.back().push_back(cell_text(c));
        lines.back().push_back(r.last_share > 0 ? "last " + std::to_string((int)std::lround(100 * r.last_share)) + "%" : "");
        std::string error = recipe_error(r);
        about += "- `" + r.name + "`: " + (error.empty() ? r.about : "cannot be changed so, " + error) + "\n";
    }
    // Columns as wide as their widest cell; the empty second line becomes markdown's rule.
    for (auto& line : lines) {
        for (size_t i = 0; i < lines[0].size(); i++) {
            size_t width = 0;
            for (auto& other : lines) width = std::max(width, i < other.size() ? other[i].size() : 0);
            std::string text = line.empty() ? std::string(width, '-') : line[i];
            printf("| %s%s ", text.c_str(), std::string(width - text.size(), ' ').c_str());
        }
        printf("|\n");
    }
    printf("\n%s\n`--set WHICH.KEY=VALUE,...`: WHICH is %s ... %s, or a part of it (x, w, d, fprop, dgrad, wgrad), or all, or split:\n\n%s", about.c_str(),
           operand_names[0], operand_names[operand_count - 1], set_table().c_str());
}

// FLOPs of one micro-batch by what they multiply. gemms: of the three GEMMs whose operands are both 4-bit codes, 2 l m n each, as the
// model needs them in any precision. The rest is what splits cost beside: README.md, "Metis in one page", has the table of terms.
struct StepFlops {
    double gemms = 0;            // R_p R_q^T, or P Q^T of operands without a split
    double codes = 0;            // R_p C_q, R_q C_p and C_p^T C_q: codes times codes
    double thin = 0;             // the thin product's inner columns: codes of one factor times the other factor's numbers
    double wide = 0;             // M B, residuals, refreshes: no 4-bit operand
};

// An example, X (l x m) and W (n x m) both split, in fprop: gemms 2 l m n; codes 2 k m (l + n) + 2 k^2 m; thin 4 k l n; wide, for M B of X,
// R of X, and R of X again for its amax, 6 k l m; and as much of W, 6 k n m. With k = m / 64, l = n = m: 2, 0.06, 0.06 and 0.19 m^3.
//
// Adds those of a linear layer (l tokens, m inputs, n outputs) by row r with splits of rank k. `accum`: micro-batches a step, the
// first of which may refresh bases.
inline void add_flops(StepFlops& f, const Recipe& r, double l, double m, double n, int k, int accum, bool trained) {
    // Rows of the two operands of each GEMM, and the axis it contracts: Y = X W^T, dX = D W, dW = D^T X.
    const double outer[3][2] = {{l, n}, {l, m}, {n, m}}, contracted[3] = {m, n, l};
    // What is counted once a GEMM: the product itself, and the split's products of thin factors with the other operand.
    for (int g = 0; g < 3; g++) {
        const Cell &p = r.cell[2 * g], &q = r.cell[2 * g + 1];
        double c = contracted[g];
        bool four = is_4bit(p.format) && is_4bit(q.format);
        if (four) f.gemms += 2 * outer[g][0] * outer[g][1] * c;
        (four ? f.codes : f.wide) += 2 * c * k * (q.split * outer[g][0] + p.split * outer[g][1] + (p.split && q.split ? k : 0));
        (four ? f.thin : f.wide) += 2 * outer[g][0] * outer[g][1] * k * (p.split + q.split);
    }
    // What is counted once an operand, or once a matrix (by its first operand that is split).
    for (int i = 0; i < operand_count; i++) {
        Matrix of = matrix_of[i];
        if (!r.cell[i].split || (of == matrix_w && trained)) continue;           // trained factors are there already, and W_R is stored
        double rows = of == matrix_w ? n : l, cols = of == matrix_d ? n : m, element = 2 * k;
        bool first = made_before[i] == operand_count || !r.cell[made_before[i]].split;
        bool own_amax = has_tensor_scale(r.cell[i]) && !same_scale(r, (Which)i, false);
        f.wide += rows * cols * element * (first + 1 + own_amax);                // M B once a matrix; R, and R once more for its amax
        if (!first) continue;
        double sample = of == matrix_w ? rows : (double)sampled_rows(r.split, k, (int64_t)rows);
        double every = r.split.refresh ? (double)r.split.refresh * accum : 1;    // micro-batches between two refreshes
        f.wide += 8 * sample * cols * (k + r.split.oversample) / every;
    }
}

// Of each GEMM of `rows` tokens its two operands and how it is computed: by the GPU's own units of that format, or emulated exactly.
//
//     fprop: X nvfp4, W nvfp4; emulated exactly as a bf16 GEMM
inline void report_gemms(const Ctx& ctx, const Model& m, int64_t rows) {
    const Recipe& r = m.precision.recipe;
    const char* gemms[] = {"fprop", "dgrad", "wgrad"};
    for (int g = 0; g < 3; g++) {
        const Cell &a = r.cell[2 * g], &b = r.cell[2 * g + 1];
        // A GEMM's sizes decide too whether the GPU's library has a kernel, so the four linear layers of a block are asked one by one.
        int native = 0;
        for (const Linear* lin : m.linears[0].all) {
            int64_t of[3][3] = {{rows, lin->out, lin->in}, {rows, lin->in, lin->out}, {lin->out, lin->in, rows}};      // m, n, k
            Type to = g == 2 ? type_of<acc_t>() : type_of<act_t>();
            native += runs_natively(ctx, r, Which(2 * g), of[g][0], of[g][1], of[g][2], to, g == 2);
        }
        std::string how = "as they are";
        if (is_quantised(a.format) || is_quantised(b.format)) {
            if (is_float_stored(a.format)) how = "multiplied as float: float scales fit no bf16";
            else if (native == 4) how = "natively";
            else if (native) how = "natively in " + std::to_string(native) + " of a block's 4 linear layers, else emulated exactly as a bf16 GEMM";
            else if (MatmulPlans::bf16_units()) how = "emulated exactly as a bf16 GEMM";
            else how = "emulated exactly as a float GEMM (faster here than bf16)";
        }
        printf("         | %s: %s %s, %s %s; %s\n", gemms[g], g ? "D" : "X", cell_text(a).c_str(), g == 2 ? "X" : "W", cell_text(b).c_str(), how.c_str());
    }
}

// Which GEMMs of which layers run in which format, how, the share of the model's FLOPs in 4 bits, and what splits add to them.
inline void report_precision(const Ctx& ctx, const Model& m, const Options& o) {
    const Precision& p = m.precision;
    const Recipe& r = p.recipe;
    int layers = m.config.layers;
    if (o.set.empty()) printf("recipe   | %s: %s\n", r.name.c_str(), r.about.c_str());
    else printf("recipe   | %s with %s\n", r.name.c_str(), o.set.c_str());
    // The rank is 1.5% of the width, but at least 16: of a small model's width that is more, and the lines below show what it costs.
    if (is_split(r)) printf("         | split: rank %d of a width of %d (%.1f%%)\n", m.k, m.config.dim, 100. * m.k / m.config.dim);
    if (!is_quantised(r)) return;                                                // float and bf16: nothing more to say
    report_gemms(ctx, m, (int64_t)o.batch * o.seq);

    // Of one micro-batch: shares are the same for all.
    int64_t high = 0;
    StepFlops f;
    double tokens = (double)o.batch * o.seq;
    for (int l = 0; l < layers; l++)
        for (int kind = 0; kind < 4; kind++) {
            const Linear& lin = *m.linears[l].all[kind];
            const Recipe* row = recipe_of(p, layers, l, kind, Use::train, 0);
            high += row == &p.high;
            add_flops(f, *row, tokens, lin.in, lin.out, m.k, o.accum, lin.splits.factors.u);
        }
    // What is not in the recipe's formats. The head always is not, nor are embedding, norms and attention, which are no linear layers.
    printf("         | bf16: the head");
    if (high) printf(" and %lld of %d linear layers", (long long)high, 4 * layers);
    if (p.first) printf(", of the first %d block%s", p.first, p.first > 1 ? "s" : "");
    if (p.last) printf(", of the last %d block%s", p.last, p.last > 1 ? "s" : "");
    for (int kind = 0; kind < 4; kind++)
        if (p.kept[kind]) printf(", every %s", linear_classes[kind]);
    if (p.end > 0)
        printf("; from step %lld %s", (long long)std::ceil((1 - p.end) * o.steps) + 1, o.bf16_end_gemms == "all" ? "everything" : "all fprop");
    double more = (parameter_count(m.trained) - parameter_count(m.tensors)) * 1e-6;
    if (!m.factors.empty()) printf("; W_R, U, s and V are trained: %.2fM parameters more", more);
    // Two different things: what share of the arithmetic that any precision needs is done in 4 bits, and how much more a split computes.
    double percent = 100 / (flops_per_token(m.config, o.seq) * tokens);
    printf("\n         | %.1f%% of the model's FLOPs in 4 bits\n", percent * f.gemms);
    if (!is_split(r)) return;
    const char* other = is_float_stored(r.cell[dgrad_d].format) ? "float" : "bf16";
    printf("         | the split adds %.1f%% of 4 bits x 4 bits, %.1f%% of 4 bits x %s (thin products), %.1f%% in %s (M B, residuals, bases)\n",
           percent * f.codes, percent * f.thin, other, percent * f.wide, on_gpu && other[0] == 'b' ? "bf16 and float" : "float");
}
