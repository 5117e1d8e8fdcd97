// test_quantise.cu: quantise() of fp4.cuh on whole matrices: against the slow quantiser, and properties that hold whatever the rules are.
//
//     make build/cpu/test_quantise && build/cpu/test_quantise  -v also prints how much of its tolerance each test used
//
// Exact, but where chance or sums of floats come in; those tolerances are derived where they stand, and the seeds are fixed.
// Single numbers and the conformance vectors: test_fp4.cu. How tests run: device_test.h.
#include "quantise_test.h"
#include <map>

// ---------------------------------------------------------------------------------------------------------------------------
// Whole matrices of many tiles against the slow quantiser: exact

// Every cell that makes sense without a Hadamard.
static std::vector<Cell> plain_cells() {
    std::vector<Cell> all;
    for (Rounding rounding : {rn, sr}) {
        for (Block block : {vec, square}) {
            for (Scale scale : {Scale::te, Scale::headroom, Scale::four_six, Scale::po2}) all.push_back({Format::nvfp4, block, rounding, scale});
            for (Scale scale : {Scale::floor, Scale::ceil})
                for (Format f : {Format::mxfp4, Format::mxfp8}) all.push_back({f, block, rounding, scale});
        }
        for (Format f : {Format::fp8, Format::fp8_e5m2, Format::e2m1}) all.push_back({f, vec, rounding});
        for (Format f : {Format::fp8, Format::fp8_e5m2}) all.push_back({f, Block::row, rounding});
        all.push_back({Format::e2m1, square, rounding});
        for (Carrier carrier : {Carrier::e4m3, Carrier::e5m2})
            for (Block block : {vec, square})
                for (Cell c : {Cell{Format::nvfp4, block, rounding, Scale::po2}, Cell{Format::mxfp4, block, rounding, Scale::ceil},
                                  Cell{Format::mxfp4, block, rounding, Scale::floor}}) all.push_back(on_fp8(c, carrier));
    }
    return all;
}
static std::string text(const Case& c) {
    return cell_text(c.cell) + (c.axis == Axis::row ? ", rows of " : ", columns of ") + std::to_string(c.rows) + "x" + std::to_string(c.cols);
}

static RandomKey any_key(Rng& rng) {
    return {rng.next(), (uint32_t)rng.next(), (uint32_t)rng.below(65536), (uint32_t)rng.below(65536), (uint32_t)rng.below(256), Purpose::rounding};
}

// Numbers as matrices have them: bell-shaped, patches of 16 x 16 of very different sizes, some of zeros, single spikes.
static std::vector<float> ragged(Rng& rng, int64_t rows, int64_t cols) {
    int64_t across = (cols + 15) / 16;
    std::vector<float> size((rows + 15) / 16 * across), x(rows * cols);
    for (float& s : size) s = rng.below(12) == 0 ? 0 : std::ldexp(1.f, -rng.below(rng.below(4) == 0 ? 40 : 8));
    for (int64_t i = 0; i < rows * cols; i++) {
        double v = rng(1) + rng(1) + rng(1) + rng(1);
        x[i] = as_bf16(v * size[i / cols / 16 * across + i % cols / 16] * (rng.below(500) ? 1 : 40));
    }
    return x;
}
template <class To, class From> static void test_matrix(Run& r, const Case& c, const std::vector<float>& x) {
    Made got = make<To, From>(r, c, x);
    if (r.compare) compare<To>(r, got, slow::quantise(x, c.rows, c.cols, c.cell, c.axis, c.key, c.gemm));
}
static void test_matrices(Run& r) {
    const std::pair<int64_t, int64_t> shapes[] = {{1, 1}, {3, 5}, {1, 700}, {130, 1}, {17, 257}, {40, 300}, {300, 40}, {65, 129}};
    Rng rng{7};
    for (auto [rows, cols] : shapes) {
        std::vector<float> x = ragged(rng, rows, cols);
        for (Cell cell : plain_cells())
            for (Axis axis : {Axis::row, Axis::column}) {
                Case c = {cell, axis, rows, cols, any_key(rng)};
                r.at("%s", text(c).c_str());
                int types = rng.below(4);                                     // the vectors have gone through every pair of types
                switch (cell.format == Format::e2m1 ? types & 2 : types) {
                    case 0: test_matrix<float, float>(r, c, x); break;
                    case 1: test_matrix<bf16, float>(r, c, x); break;
                    case 2: test_matrix<float, bf16>(r, c, x); break;
                    case 3: test_matrix<bf16, bf16>(r, c, x); break;
                }
            }
    }
    const Cell formats[] = {nvf, fs_sr, mx4, mx4_8, nvf_8g, {Format::mxfp8, vec, sr, Scale::floor}, fp8, {Format::e2m1}};
    for (Cell cell : formats)
        for (int n : {16, 32, 64, 128})
            for (Signs signs : {Signs::fixed, Signs::random, Signs::plus})
                for (Axis axis : {Axis::row, Axis::column}) {
                    if (has_blocks(cell.format) && n % block_length(cell.format)) continue;
                    cell.hadamard = n, cell.signs = signs;
                    int64_t across = rng.below(2) ? 70 : 33, along = n * (1 + rng.below(n == 16 ? 20 : 3));
                    Case c = {cell, axis, axis == Axis::row ? across : along, axis == Axis::row ? along : across, any_key(rng), (uint32_t)rng.below(3)};
                    r.at("%s", text(c).c_str());
                    if (rng.below(2) || cell.format == Format::e2m1) test_matrix<float, float>(r, c, ragged(rng, c.rows, c.cols));
                    else test_matrix<bf16, float>(r, c, ragged(rng, c.rows, c.cols));
                }
}

// ---------------------------------------------------------------------------------------------------------------------------
// Properties

// Edges with their answers written out. Zero blocks keep signs under a scale of zero; a tensor of zeros has the scale 1; numbers below
// the normal floats vanish in NVFP4 (their S_enc ends at FLT_MAX) and survive in MX, whose scales reach 2^-127.
static void test_edges(Run& r) {
    const float d = 0x1p-128f;                                                // half of 2^-127
    auto row = [&](Cell cell, std::vector<float> x) { return make<float, float>(r, {cell, Axis::row, 1, (int64_t)x.size()}, x); };
    std::vector<float> x(64, 0.f);
    for (int i = 0; i < 64; i += 2) x[i] = -0.f;
    for (Cell cell : plain_cells()) {
        r.at("zeros, %s", cell_text(cell).c_str());
        Made m = row(cell, x);
        r.verdict.note(m.S_enc == 1 && m.S_dec == 1, "S_enc %g, S_dec %g", m.S_enc, m.S_dec);
        for (int i = 0; i < 64; i++) r.verdict.note(same(m.value[i], x[i]), "element %d is %g", i, m.value[i]);
        for (size_t i = 0; i < m.scales.size(); i++) r.verdict.note(m.scales[i] == 0, "scale %zu is 0x%02x", i, m.scales[i]);
        for (size_t i = 0; i < m.codes.size(); i++)
            r.verdict.note(m.codes[i] == (is_nibbles(cell) ? 0x08 : i % 2 ? 0 : 0x80), "codes %zu are 0x%02x", i, m.codes[i]);
    }
    for (int i = 0; i < 64; i++) x[i] = (i % 2 ? 1 : -1) * (i < 32 ? 3.f : d * (i % 16) / 8);
    for (Cell cell : plain_cells()) {
        r.at("subnormals beside ordinary numbers, %s", cell_text(cell).c_str());
        Made m = row(cell, x);
        for (int i = 32; i < 64; i++) {
            if (!is_mx(cell.format) || is_carried(cell)) r.verdict.note(std::fabs(m.value[i]) == 0, "element %d, %g, is %g", i, x[i], m.value[i]);
            else r.verdict.note(std::fabs(m.value[i] - x[i]) <= 0x1p-128f, "element %d, %g, is %g", i, x[i], m.value[i]);         // a step there
        }
        if (is_mx(cell.format) && !is_carried(cell)) r.verdict.note(m.scales.back() == 0, "the last scale is 0x%02x", m.scales.back());
    }
    for (int i = 0; i < 64; i++) x[i] = (i % 2 ? 1 : -1) * d * (i % 16) / 8;
    for (Cell cell : plain_cells()) {
        r.at("nothing but subnormals, %s", cell_text(cell).c_str());
        Made m = row(cell, x);
        for (int i = 0; i < 64; i++) {
            float v = m.value[i] * m.S_dec;
            r.verdict.note(std::fabs(v - x[i]) <= 0x1p-127f, "element %d, %g, is %g", i, x[i], v);
        }
    }
}

// A NaN or an infinity: the tensor's scale is NaN, or the block's where there is none, and no other block's bits change.
static void test_not_finite(Run& r) {
    Rng rng{5};
    const int64_t rows = 40, cols = 72;
    std::vector<float> x = ragged(rng, rows, cols);
    for (float bad : {not_a_number, -not_a_number, infinity, -infinity})
        for (Cell cell : plain_cells())
            for (Axis axis : {Axis::row, Axis::column}) {
                Case c = {cell, axis, rows, cols};
                r.at("%g, %s", bad, text(c).c_str());
                std::vector<float> y = x;
                int64_t at = rng.below((int)(rows * cols));
                y[at] = bad;
                Made before = make<float, float>(r, c, x), after = make<float, float>(r, c, y);
                if (has_tensor_scale(cell)) {
                    r.verdict.note(slow::is_nan(after.S_dec) && is_finite(before.S_dec), "S_dec %g, before %g", after.S_dec, before.S_dec);
                    continue;
                }
                bool tall = cell.block == square || axis == Axis::column, broad = cell.block == square || axis == Axis::row;
                int64_t R = !tall ? 1 : has_row_scales(cell) ? rows : block_length(cell.format), C = !broad ? 1 : has_row_scales(cell) ? cols : block_length(cell.format);
                for (int64_t i = 0; i < rows * cols; i++) {
                    bool hit = i / cols / R == at / cols / R && i % cols / C == at % cols / C;
                    if (hit) r.verdict.note(slow::is_nan(after.value[i]), "element %ld is %g", (long)i, after.value[i]);
                    else r.verdict.note(same(after.value[i], before.value[i]), "element %ld is %g, before %g", (long)i, after.value[i], before.value[i]);
                }
            }
}

// Down the columns of X is along the rows of its transpose: values and packed bytes. (Random draws have places, so nearest only.) Square
// blocks have one set of values for both axes, under random draws too: a matrix that is prepared twice is the same matrix.
static void test_axes(Run& r) {
    Rng rng{11};
    std::vector<Cell> cells = plain_cells();
    for (int n : {16, 32, 128})
        for (Cell cell : {nvf, fp8}) cell.hadamard = n, cell.signs = Signs::random, cells.push_back(cell);
    for (Cell cell : cells) {
        int64_t rows = 67, cols = cell.hadamard ? 384 : 300;
        std::vector<float> x = ragged(rng, rows, cols), turned(rows * cols);
        for (int64_t i = 0; i < rows * cols; i++) turned[i % cols * rows + i / cols] = x[i];
        r.at("%s", cell_text(cell).c_str());
        Made along = make<float, float>(r, {cell, Axis::row, rows, cols}, x);
        if (cell.rounding == rn) {
            Made down = make<float, float>(r, {cell, Axis::column, cols, rows}, turned);
            int64_t differ = 0;
            for (int64_t i = 0; i < rows * cols; i++) differ += !same(along.value[i], down.value[i % cols * rows + i / cols]);
            r.verdict.note(differ == 0 && same(along.S_dec, down.S_dec), "%ld values differ; S_dec %g and %g", (long)differ, along.S_dec, down.S_dec);
            bool packs = cell.format != Format::e2m1;
            r.verdict.note(along.codes == down.codes && along.scales == down.scales && along.codes.empty() != packs, "packed bytes differ");
        }
        if (cell.block == square || (!has_blocks(cell.format) && !has_row_scales(cell))) {
            if (cell.hadamard) continue;
            Made other = make<float, float>(r, {cell, Axis::column, rows, cols}, x);
            int64_t differ = 0;
            for (int64_t i = 0; i < rows * cols; i++) differ += !same(along.value[i], other.value[i]);
            r.verdict.note(differ == 0, "%ld values differ between the axes", (long)differ);
        }
    }
}

// Mean over many draws. In units of the code's grid an element that lies at p between its neighbours, gap apart, has mean 0 and variance
// p (1 - p) gap^2 around its place. The code makes p up to 2^-17 wrong (half a draw) and scales with three roundings, 4 u of the
// element. So the sum over elements and K draws may be off by 5 standard deviations (1 in 2 million) plus those; a single element's by
// Bernstein's bound for one chance in a billion.
struct Bias { double sum = 0, variance = 0, slack = 0; };
static Bias measure(Run& r, Cell cell, bool maxima_only, int K) {
    const int64_t rows = 64, cols = 64, n = rows * cols;
    r.at("%s, %s", cell_text(cell).c_str(), maxima_only ? "the largest of each block" : "all");
    Rng rng{21};
    std::vector<float> x(n);
    for (float& v : x) v = (float)(rng(1) + rng(1) + rng(1));
    Buffer<float> from(r, n, [&](int64_t i) { return x[i]; }), to(r, n), scale(r, 2), partial(r, quantise_partials(cell, rows, cols));
    QuantCall call = {cell, Axis::row, rows, cols, {}, {}, scale.p, partial.p};
    if (has_tensor_scale(cell)) tensor_scale(r.ctx, call, (const float*)from.p);
    std::vector<double> sum(n);
    for (int k = 0; k < K; k++) {                                             // every field of the key takes part
        uint32_t i = (uint32_t)k;
        call.key = {(uint64_t)(i % 3) << 32 | (77 + i % 5), i, i % 7, i % 11, i % 6, Purpose::rounding};
        quantise(r.ctx, call, to.p, (const float*)from.p);
        to.fetch();
        for (int64_t i = 0; i < n; i++) sum[i] += to[i];
    }
    Bias bias;
    slow::Matrix m = slow::quantise(x, rows, cols, cell, Axis::row, {}, 0);
    const slow::Grid& g = slow::elements(cell.format);
    bool tensor = !has_blocks(cell.format), tiles = cell.block == square && !tensor;
    int64_t B = block_length(cell.format);
    std::map<int64_t, int64_t> largest;
    auto block = [&](int64_t i) { return tensor ? 0 : (tiles ? i / cols / B : i / cols) * cols + i % cols / B; };
    for (int64_t i = 0; i < n; i++)
        if (!largest.count(block(i)) || std::fabs(x[i]) > std::fabs(x[largest[block(i)]])) largest[block(i)] = i;
    for (int64_t i = 0; i < n; i++) {
        double s = m.scale[i], a = std::fabs((double)x[i]) / (s * m.S_dec);
        if (s == 0 || (maxima_only && largest[block(i)] != i)) continue;
        int low = slow::below(std::min(a, g.max()), g), high = std::min(low + 1, (int)g.v.size() - 1);
        double gap = g.v[high] - g.v[low], p = gap > 0 ? std::min(std::max((a - g.v[low]) / gap, 0.), 1.) : 0, variance = p * (1 - p) * gap * gap;
        double off = std::copysign(1., x[i]) * sum[i] / s - K * a, slack = K * (0x1p-17 * gap + 4 * u * a), L = std::log(2e9);
        bias.sum += off, bias.variance += K * variance, bias.slack += slack;
        bool clips = cell.scale == Scale::te && !tensor ? a > g.max() * (1 - 4 * u) : cell.scale == Scale::floor && a > g.max();
        double bernstein = gap * L / 3 + std::sqrt(gap * gap * L * L / 9 + 2 * L * K * variance);
        if (!clips) r.verdict.close(off, 0, slack + bernstein, "the sum of errors of element", i);
    }
    return bias;
}
static void test_unbiased(Run& r) {
    const int K = 600;
    const Cell unbiased[] = {{Format::nvfp4, vec, sr, Scale::headroom}, {Format::nvfp4, square, sr, Scale::headroom},
                                {Format::nvfp4, vec, sr, Scale::po2}, on_fp8({Format::nvfp4, vec, sr, Scale::po2}, Carrier::e5m2),
                                {Format::mxfp4, vec, sr, Scale::ceil}, {Format::mxfp8, vec, sr, Scale::ceil}, {Format::fp8, vec, sr},
                                {Format::fp8_e5m2, vec, sr}, {Format::e2m1, vec, sr}};
    for (Cell cell : unbiased)
        for (bool maxima : {false, true}) {
            if (maxima && !has_blocks(cell.format)) continue;                 // one element: its code is the largest, exactly
            Bias b = measure(r, cell, maxima, K);
            r.verdict.close(b.sum, 0, 5 * std::sqrt(b.variance) + b.slack, "the sum of errors", 0);
        }
    // The known bias: TransformerEngine's rule rounds some block scales down, and elements beyond 6 then saturate; so does MX's floor
    // rule, by more. Largest elements come out too small, far beyond what chance allows.
    for (Cell cell : {Cell{Format::nvfp4, vec, sr, Scale::te}, Cell{Format::mxfp4, vec, sr, Scale::floor}}) {
        Bias b = measure(r, cell, true, K);
        double chance = 5 * std::sqrt(b.variance) + b.slack;
        r.verdict.note(b.sum < -4 * chance, "the sum of errors is %g, and chance makes %g of it", b.sum, chance);
    }
}

// Draws have names: a key that differs in one field gives another matrix, and two independent draws round an element that lies at p
// differently with probability 2 p (1 - p). Their number over n elements errs by sqrt(n L / 2), L = ln(2 / 10^-9) (Hoeffding). The same
// name gives the same bits, whatever was quantised in between.
static void test_keys(Run& r) {
    const int64_t rows = 48, cols = 144, n = rows * cols;
    Rng rng{31};
    std::vector<float> x(n);
    for (float& v : x) v = (float)(rng(1) + rng(1));
    Case base = {{Format::nvfp4, vec, sr, Scale::headroom}, Axis::row, rows, cols, {9, 8, 7, 6, 5, Purpose::rounding}};
    Made first = make<float, float>(r, base, x);
    slow::Matrix m = slow::quantise(x, rows, cols, base.cell, base.axis, base.key, 0);
    double expected = 0;
    for (int64_t i = 0; i < n; i++) {
        int low;
        double p = slow::chances((float)(x[i] / (slow::e4m3()[m.byte[i]] * m.S_dec)), slow::e2m1(), &low) / 65536.;
        expected += 2 * p * (1 - p);
    }
    std::vector<std::pair<const char*, RandomKey>> others;
    for (const char* field : {"seed", "the seed's upper half", "step", "micro", "layer", "operand"}) others.push_back({field, base.key});
    others[0].second.seed++, others[1].second.seed += 1ull << 32, others[2].second.step++;
    others[3].second.micro++, others[4].second.layer++, others[5].second.operand++;
    for (auto& [field, key] : others) {
        r.at("another %s", field);
        Case c = base;
        c.key = key;
        Made other = make<float, float>(r, c, x);
        int64_t differ = 0;
        for (int64_t i = 0; i < n; i++) differ += first.value[i] != other.value[i];
        r.verdict.close((double)differ, expected, std::sqrt(n * std::log(2e9) / 2), "elements that differ", 0);
    }
    r.at("the same key");
    Made again = make<float, float>(r, base, x);
    r.verdict.note(again.value == first.value && again.codes == first.codes, "other bits");
    r.verdict.note(expected > n / 10., "the test has no edge: %g of %ld", expected, (long)n);
}

// Both operands transformed, the product is the old one. Each of the log2 n levels and the last factor, itself rounded, errs by u of
// every number it makes, and an orthogonal step spreads errors without making their norm larger: a vector errs by (log2 n + 2) u of its
// norm, so a product of two by twice that of the product of the norms.
static void test_hadamard(Run& r) {
    Rng rng{41};
    for (int n : {16, 32, 64, 128})
        for (Signs signs : {Signs::fixed, Signs::random, Signs::plus})
            for (Axis axis : {Axis::row, Axis::column}) {
                const int64_t k = 3 * n, m = 20;
                Case c = {{Format::nvfp4, vec, rn, Scale::te, n, signs}, axis, axis == Axis::row ? m : k, axis == Axis::row ? k : m};
                r.at("%s", text(c).c_str());
                std::vector<std::vector<double>> x, y;
                for (int side = 0; side < 2; side++) {
                    Buffer<float> from(r, m * k, [&](int64_t) { return rng(1); }), to(r, m * k);
                    transform(r.ctx, to.p, from.p, c);
                    to.fetch();
                    x.push_back(from.values()), y.push_back(to.values());
                }
                int64_t moved = 0;
                for (int64_t i = 0; i < m * k; i++) moved += x[0][i] != y[0][i];
                r.verdict.note(moved > m * k * 9 / 10, "only %ld of %ld changed", (long)moved, (long)(m * k));
                auto dot = [&](const std::vector<double>& a, const std::vector<double>& b, int64_t i, int64_t j) {
                    double s = 0;
                    for (int64_t p = 0; p < k; p++) s += axis == Axis::row ? a[i * k + p] * b[j * k + p] : a[p * m + i] * b[p * m + j];
                    return s;
                };
                for (int64_t i = 0; i < m; i++)
                    for (int64_t j = 0; j < m; j++) {
                        double norms = std::sqrt(dot(x[0], x[0], i, i) * dot(x[1], x[1], j, j));
                        r.verdict.close(dot(y[0], y[1], i, j), dot(x[0], x[1], i, j), 2 * (std::log2(n) + 2) * u * norms * 1.01, "product", i * m + j);
                    }
            }
}

// Mean squared error on a normal matrix, against what the literature measures (arXiv 2601.22813, table 1), of which it gives two or three
// digits: half a last digit is up to 0.7%. Ours, over 4096 blocks whose errors spread by about a third, is 0.5% uncertain; four
// times that and the digit: 3%. (Their stochastic
// rounding has the headroom; TransformerEngine's rule has 18.7e-3. Their 17.5e-3 for it with four_six draws anew for either candidate;
// ours shares the draws, 18.6e-3.)
static void test_mse(Run& r) {
    const int64_t rows = 256, cols = 256, n = rows * cols;
    std::vector<float> x(n);
    Rng rng{51};
    for (float& v : x) v = (float)(std::sqrt(-2 * std::log(rng(0.5) + 0.5 + 0x1p-30)) * std::cos(rng(M_PI)));
    const std::pair<Cell, double> known[] = {{{Format::nvfp4, vec, rn, Scale::te}, 9.0e-3}, {{Format::nvfp4, vec, rn, Scale::four_six}, 7.6e-3},
                                                {{Format::nvfp4, square, rn, Scale::te}, 12.4e-3}, {{Format::nvfp4, square, rn, Scale::four_six}, 12.4e-3},
                                                {{Format::nvfp4, vec, sr, Scale::headroom}, 23.5e-3}};
    for (auto& [cell, want] : known) {
        r.at("%s", cell_text(cell).c_str());
        Made m = make<float, float>(r, {cell, Axis::row, rows, cols}, x, false);
        double sum = 0;
        for (int64_t i = 0; i < n; i++) sum += std::pow((double)m.value[i] * m.S_dec - x[i], 2);
        r.verdict.close(sum / n, want, 0.03 * want, "mean squared error", 0);
    }
}

// The tally: one tile in 64, and of those the squared error, the squares of x, what became zero, what lies beyond the largest code. Counts
// are exact; the two sums are of up to 3 tiles of 4096 positive floats, each after three or four roundings.
static void test_tally_of(Run& r, int64_t rows, int64_t cols, int least) {
    Rng rng{61};
    std::vector<float> x = ragged(rng, rows, cols);
    const Cell cells[] = {nvf, nvf_sr, fs_sq, {Format::mxfp4, vec, rn, Scale::floor}, fp8, f8r, mx4_8, mx4_8g, nvf_8};
    for (Cell cell : cells)
        for (Axis axis : {Axis::row, Axis::column}) {
            Case c = {cell, axis, rows, cols};
            r.at("%s", text(c).c_str());
            Buffer<float> from(r, rows * cols, [&](int64_t i) { return x[i]; }), to(r, rows * cols);
            Buffer<float> scale(r, 2), partial(r, quantise_partials(cell, rows, cols)),
                          tally(r, tally_sums, [](int64_t i) { return 1000. * (i + 1); });                 // it adds
            QuantCall call = {cell, axis, rows, cols, c.key, {}, scale.p, partial.p, tally.p};
            if (has_tensor_scale(cell)) tensor_scale(r.ctx, call, (const float*)from.p);
            if (has_row_scales(cell)) row_scales(r.ctx, call, (const float*)from.p);
            quantise(r.ctx, call, to.p, (const float*)from.p);
            tally.fetch();
            if (!r.compare) continue;
            slow::Matrix m = slow::quantise(x, rows, cols, cell, axis, c.key, 0);
            TileShape t = tile_shape(cell, axis, rows, cols);
            double want[tally_sums] = {};
            int sampled = 0;
            for (int64_t i = 0; i < t.count; i += tally_every, sampled++)
                for (int64_t row = i / t.across * t.R; row < std::min(rows, (i / t.across + 1) * t.R); row++)
                    for (int64_t col = i % t.across * t.C; col < std::min(cols, (i % t.across + 1) * t.C); col++) {
                        int64_t at = row * cols + col;
                        float y = m.decoded(at), s = (float)m.scale[at];
                        float enc = is_mx(cell.format) || has_row_scales(cell) ? 1 / (s * m.S_dec) : !has_blocks(cell.format) ? m.S_enc : s == 0 ? 0 : slow::clamped(1.f / (s * m.S_dec));
                        want[0] += std::pow((double)y - x[at], 2), want[1] += (double)x[at] * x[at];
                        want[2] += y == 0 && x[at] != 0, want[3] += std::fabs(x[at] * enc) > (float)slow::elements(cell.format).max(), want[4]++;
                        want[5] += is_carried(cell) && m.lost[at];
                    }
            r.verdict.note(sampled >= least && want[2] > 0, "the test has no edge: %d tiles, %g zeros", sampled, want[2]);
            const char* names[] = {"the sum of squared errors", "the sum of squares", "zeros", "saturated", "elements", "lost"};
            if (cell == mx4_8 && least > 1) r.verdict.note(want[5] > 0 && want[5] < want[4] / 10, "the test has no edge: %g lost of %g", want[5], want[4]);
            for (int i = 0; i < tally_sums; i++) {
                double start = 1000. * (i + 1), tol = i < 2 ? (depth(tile_size) + 8) * u * want[i] + 4 * u * (start + want[i]) : 0;
                r.verdict.close(tally[i], start + want[i], tol, names[i], 0);
            }
        }
}
static void test_tally(Run& r) {
    test_tally_of(r, 16 * 70 + 5, 500, 2);
    test_tally_of(r, 100, 72, 1);                                             // a tile that the matrix does not fill
}

int main(int argc, char** argv) {
    begin(argc, argv);
    test("matrices of many tiles", test_matrices);
    test("zeros and subnormals", test_edges);
    test("NaN and infinity", test_not_finite);
    test("rows, columns, squares", test_axes);
    test("stochastic rounding is unbiased", test_unbiased);
    test("every draw has its name", test_keys);
    test("Hadamard cancels", test_hadamard);
    test("errors on normal data", test_mse);
    test("tally", test_tally);
    return done();
}
