// spectrum.cu: what the spectral split leaves of an operand, measured on a trained model (dev/spectrum.py draws it).
//
//     spectrum CHECKPOINT HELD_OUT_DATA [BLOCK [THREADS]]
//
// CHECKPOINT is a folder step_* of a run by a split recipe. Its model runs forward and backward on one batch of held-out windows, by the
// run's own recipe and with the bases as they were saved. Looked at are X, W and D of gate_up in one block (the middle one unless given, or -1):
// the one layer whose D outlives backward. JSON on stdout; for each matrix, as it is ("before") and less its rounded low-rank part, as
// the quantiser sees it ("after"), with blocks along a row:
//
//     sigma        singular values, over the largest one of the matrix
//     energy       sum of squares, over the matrix'
//     values       quantiles of |element|, over the matrix' root mean square; blocks: of the largest |element| of a block
//     histogram, block_histogram      the same in bins of 1/8 octave from 2^-12 to 2^12 (ends: what lies beyond)
//     zero, error  what rounding by the operand's cell does: share of non-zero elements that become zero, |Q - M| over |M|
//
// Everything but the singular values is made by the functions that training calls: split_operand, subtract, tensor_scale, quantise.
#include "../llama.cuh"
#include "../data.h"

typedef std::vector<double> Doubles;

// Eigenvalues, descending, of the symmetric a (n x n), which is overwritten: Householder's reduction to a tridiagonal matrix (d, e), then
// bisection: the count of negative pivots of T - x is the number of eigenvalues below x.
static Doubles eigenvalues(Doubles& a, int64_t n) {
    Doubles d(n), e(n), v(n), w(n), values(n);
    for (int64_t k = 0; k < n; k++) {
        d[k] = a[k * n + k];
        double length2 = 0;
        for (int64_t i = k + 1; i < n; i++) v[i] = a[k * n + i], length2 += v[i] * v[i];
        if (k + 1 == n || length2 == 0) continue;
        e[k] = v[k + 1] > 0 ? -std::sqrt(length2) : std::sqrt(length2);
        v[k + 1] -= e[k];
        double half = length2 - e[k] * (v[k + 1] + e[k]), pv = 0;              // |v|^2 / 2
        #pragma omp parallel for schedule(static)
        for (int64_t i = k + 1; i < n; i++) {
            double s = 0;
            #pragma omp simd reduction(+ : s)
            for (int64_t j = k + 1; j < n; j++) s += a[i * n + j] * v[j];
            w[i] = s / half;
        }
        for (int64_t i = k + 1; i < n; i++) pv += w[i] * v[i];
        for (int64_t i = k + 1; i < n; i++) w[i] -= pv / (2 * half) * v[i];
        #pragma omp parallel for schedule(static)
        for (int64_t i = k + 1; i < n; i++)
            #pragma omp simd
            for (int64_t j = k + 1; j < n; j++) a[i * n + j] -= v[i] * w[j] + w[i] * v[j];
    }
    double bound = 0;
    for (int64_t i = 0; i < n; i++) bound = std::max(bound, std::fabs(d[i]) + std::fabs(e[i]) + (i ? std::fabs(e[i - 1]) : 0));
    #pragma omp parallel for schedule(static)
    for (int64_t rank = 0; rank < n; rank++) {
        double low = -bound, high = bound;
        for (int bit = 0; bit < 64; bit++) {
            double x = (low + high) / 2, pivot = d[0] - x;
            int64_t below = pivot < 0;
            for (int64_t i = 1; i < n; i++) {
                pivot = d[i] - x - e[i - 1] * e[i - 1] / (pivot == 0 ? 1e-300 : pivot);
                below += pivot < 0;
            }
            (below > n - 1 - rank ? high : low) = x;
        }
        values[rank] = std::max(0., (low + high) / 2);
    }
    return values;
}

// Singular values of m (rows x cols): roots of the eigenvalues of the smaller of M M^T and M^T M, in double.
static Doubles singular_values(const std::vector<float>& m, int64_t rows, int64_t cols) {
    int64_t n = std::min(rows, cols), inner = std::max(rows, cols);
    Doubles a(n * inner), gram(n * n);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) a[rows <= cols ? r * cols + c : c * rows + r] = m[r * cols + c];
    #pragma omp parallel for schedule(dynamic, 8)
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            double s = 0;
            #pragma omp simd reduction(+ : s)
            for (int64_t k = 0; k < inner; k++) s += a[i * inner + k] * a[j * inner + k];
            gram[i * n + j] = gram[j * n + i] = s;
        }
    Doubles sigma = eigenvalues(gram, n);
    for (double& s : sigma) s = std::sqrt(s);
    return sigma;
}

static double sum_squares(const std::vector<float>& v) {
    double s = 0;
    for (float x : v) s += (double)x * x;
    return s;
}

// Quantiles and histogram of magnitudes over `unit`.
static void distribution(nlohmann::ordered_json& to, const std::string& name, const std::string& histogram, std::vector<float> v, double unit) {
    std::sort(v.begin(), v.end());
    for (double q : {0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1.}) to[name].push_back(v[(size_t)std::lround(q * (v.size() - 1))] / unit);
    std::vector<int64_t> bins(24 * 8);
    for (float x : v) bins[std::min(24 * 8 - 1, std::max(0, x > 0 ? (int)std::floor((std::log2(x / unit) + 12) * 8) : 0))]++;
    to[histogram] = bins;
}

struct residual_tiles;

// One matrix as the quantiser sees it under `call`, and what it makes of it. whole: sigma_1, sum of squares and root mean square of the
// matrix itself; filled if empty.
template <class From> nlohmann::ordered_json look(Ctx& ctx, const QuantCall& call, const From* from, Doubles& whole) {
    int64_t n = call.rows * call.cols;
    size_t bytes = n * sizeof(float);
    float* buffer = (float*)device_alloc(bytes, "a residual");
    std::vector<float> seen(n), rounded(n), magnitudes(n), blocks;
    TileShape t = tile_shape(call.cell, call.axis, call.rows, call.cols);
    const acc_t *low_a = call.low_a, *low_b = call.low_b;
    int k = call.k;
    for_tiles<residual_tiles, QuantStage>(ctx, {}, t.count, KERNEL(Group<256> g, int64_t i, QuantStage& s) {
        int64_t r0 = i / t.across * t.R, c0 = i % t.across * t.C, ld = t.cols;
        load_tile(g, t, s.v, from, r0, c0);
        if (k) subtract(g, t, s, low_a, low_b, k, r0, c0);
        int height = (int)(t.rows - r0 < t.R ? t.rows - r0 : t.R), width = (int)(t.cols - c0 < t.C ? t.cols - c0 : t.C);
        g.tile(height, width, t.shift, [&](int r, int c) { buffer[(r0 + r) * ld + c0 + c] = s.v[(r << t.shift) + c]; });
    });
    to_host(ctx, seen.data(), buffer, bytes);
    float scale[2] = {1, 1};
    if (has_tensor_scale(call.cell)) tensor_scale(ctx, call, from), to_host(ctx, scale, call.scale, sizeof scale);
    quantise(ctx, call, buffer, from);
    to_host(ctx, rounded.data(), buffer, bytes);
    device_free(buffer, bytes);

    double error = 0, energy = sum_squares(seen);
    int64_t zero = 0, some = 0, length = block_length(call.cell.format);
    for (int64_t i = 0; i < n; i++) {
        double off = (double)rounded[i] * scale[1] - seen[i];
        error += off * off;
        zero += seen[i] != 0 && rounded[i] == 0, some += seen[i] != 0;
        magnitudes[i] = std::fabs(seen[i]);
    }
    for (int64_t r = 0; r < call.rows; r++)
        for (int64_t c = 0; c < call.cols; c += length)
            blocks.push_back(*std::max_element(&magnitudes[r * call.cols + c], &magnitudes[r * call.cols] + std::min(call.cols, c + length)));
    Doubles sigma = singular_values(seen, call.rows, call.cols);
    double total = 0;
    for (double s : sigma) total += s * s;
    if (!(std::fabs(total - energy) <= 1e-6 * energy)) fail("internal error: squares of singular values add up to %g, squares of elements to %g", total, energy);
    if (whole.empty()) whole = {sigma[0], energy, std::sqrt(energy / n)};
    for (double& s : sigma) s /= whole[0];
    nlohmann::ordered_json j = {{"sigma", sigma}, {"energy", energy / whole[1]}, {"zero", (double)zero / some}, {"error", std::sqrt(error / whole[1])}};
    distribution(j, "values", "histogram", magnitudes, whole[2]), distribution(j, "blocks", "block_histogram", blocks, whole[2]);
    return j;
}

template <class From> nlohmann::ordered_json before_and_after(Ctx& ctx, const Model& m, const Linear& lin, Which which, const From* from, int64_t rows, int64_t cols) {
    Cell cell = lin.recipe->cell[which];
    int64_t partials = quantise_partials(cell, rows, cols);
    float* scratch = (float*)device_alloc((partials + 2) * sizeof(float), "scales");
    QuantCall call = {cell, Axis::row, rows, cols, {ctx.seed, ctx.step, 0, lin.id, (uint32_t)which, Purpose::rounding}, {}, scratch + partials, scratch};
    Doubles whole;
    nlohmann::ordered_json j = {{"name", std::string(1, "XWD"[matrix_of[which]])}, {"rows", rows}, {"cols", cols}, {"cell", cell_text(cell)}};
    j["before"] = look(ctx, call, from, whole);
    Prepared p;
    split_operand(ctx, lin, which, m.operands, call, mat(from, cols), p);
    j["after"] = look(ctx, call, from, whole);
    device_free(scratch, (partials + 2) * sizeof(float));
    return j;
}

int main(int argc, char** argv) {
    if (argc < 3 || argc > 5) fail("usage: spectrum CHECKPOINT HELD_OUT_DATA [BLOCK [THREADS]]");
    std::string checkpoint = argv[1];
    nlohmann::ordered_json state = open_checkpoint(checkpoint), options = state["options"];
    auto text = [&](const char* key) { return options.value(key, std::string()); };
    Config c = read_config(checkpoint + "/config.json");
    check_config(c);
    if (!find_recipe(text("recipe"))) fail("%s was trained by recipe %s, which this program does not have", checkpoint.c_str(), text("recipe").c_str());
    Recipe recipe = *find_recipe(text("recipe"));
    set_cells(recipe, text("set"));
    check_recipe(recipe);
    for (Which which : {fprop_x, fprop_w, dgrad_d})
        if (!recipe.cell[which].split) fail("%s was trained by recipe %s%s%s, which does not split %s: take a run by metis", checkpoint.c_str(), recipe.name.c_str(),
                                            text("set").empty() ? "" : " with ", text("set").c_str(), operand_names[which]);
    int block = argc > 3 && strcmp(argv[3], "-1") ? atoi(argv[3]) : c.layers / 2, B = std::max(1, atoi(text("batch").c_str())), T = std::max(1, atoi(text("seq").c_str()));
    if (block < 0 || block >= c.layers) fail("there is no block %d: the model has blocks 0 to %d", block, c.layers - 1);

    Ctx ctx;
    ctx.threads = argc > 4 ? std::max(1, atoi(argv[4])) : on_gpu ? 1 : omp_get_num_procs();
    omp_set_num_threads(ctx.threads);
#ifdef __CUDACC__
    CUDA(cudaStreamCreate(&ctx.stream));
#endif
    ctx.seed = strtoull(text("seed").c_str(), nullptr, 10), ctx.step = (uint32_t)std::max<int64_t>(0, checkpoint_step(checkpoint));
    ctx.plans = std::make_shared<MatmulPlans>(ctx);
    Corpus data = Corpus::open(argv[2], c.vocab);
    Split windows = data.all(T);
    int64_t N = (int64_t)B * T;
    std::vector<int> tokens(N), targets(N);
    for (int b = 0; b < B; b++) data.window(windows.first + b * windows.count / B, T, &tokens[(size_t)b * T], &targets[(size_t)b * T]);

    Model m;
    measure(m, c, B, T, Recompute::none, Precision(&recipe), true);
    allocate(ctx, m, true);
    auto sink = [&](acc_t* arena) -> FloatSink {
        return [&ctx, arena](size_t first, const float* v, size_t count) {
            std::vector<acc_t> converted(v, v + count);
            to_device(ctx, arena + first, converted.data(), count * sizeof(acc_t));
        };
    };
    load_parameters(WeightFiles(checkpoint), m.tensors, sink(m.params));
    load_tensors(WeightFiles(checkpoint + "/bases.safetensors"), m.bases, {{"", sink(m.basis)}});
    set_recipes(m, Use::evaluate, 1);                                          // bases stay; but D is rounded as in training
    m.operands.nearest = false;
    set_zero(ctx, m.sums, 2 * sizeof(acc_t)), set_zero(ctx, m.grads, m.arena * sizeof(acc_t));
    forward(ctx, m, tokens.data(), B, T);
    classify(ctx, m, targets.data(), N, acc_t(1) / N);
    backward(ctx, m, tokens.data(), B, T);
    acc_t loss;
    to_host(ctx, &loss, m.sums, sizeof loss);

    const Linear& lin = m.linears[block].gate_up;
    nlohmann::ordered_json j = {{"model", text("model")}, {"step", ctx.step}, {"recipe", text("recipe")}, {"set", text("set")}, {"layer", "layers." + std::to_string(block) + ".gate_up"},
                                {"tokens", N}, {"rank", m.k}, {"loss", loss / N}, {"build", state["build"]}};
    j["operands"].push_back(before_and_after(ctx, m, lin, fprop_x, (const act_t*)m.acts[block].h2, N, lin.in));
    j["operands"].push_back(before_and_after(ctx, m, lin, fprop_w, lin.w, lin.out, lin.in));
    j["operands"].push_back(before_and_after(ctx, m, lin, dgrad_d, (const act_t*)m.acts[block].gu, N, lin.out));      // swiglu_grad left it there
    printf("%s\n", j.dump().c_str());
    return 0;
}
