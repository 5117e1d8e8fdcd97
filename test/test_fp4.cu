// test_fp4.cu: the numbers of fp4.cuh, bit for bit: small floats, rounding, Hadamard, blocks, packing.
//
//     make build/cpu/test_fp4 && build/cpu/test_fp4            from the repository root; -v also prints how much of its tolerance each test used
//
// Almost everything here is exact: a code is right or wrong. There are four witnesses: tables (slow_quantiser.h), CUDA's own headers
// where they are installed, the conformance vectors of test/vectors (written by a Python program), and properties that hold whatever
// the rules are. Tolerances appear where chance or float sums do, derived where they stand; the seeds are fixed, so nothing is flaky.
// The linear layer that uses all this: test_linear.cu. How tests run: device_test.h.
#include "quantise_test.h"
#include <fstream>          // std::ifstream
#include <nlohmann/json.hpp>
#if __has_include(<cuda_fp4.h>) && __has_include(<cuda_fp8.h>)
#include <cuda_fp4.h>       // __nv_cvt_float_to_fp4, CUDA 12.8 and later
#include <cuda_fp8.h>       // __nv_cvt_float_to_fp8, __nv_cvt_float_to_e8m0
constexpr bool cuda_headers = true;
#else
constexpr bool cuda_headers = false;
#endif

struct Kind { const char* name; Minifloat f; const slow::Grid& grid; };
static const Kind kinds[] = {{"E2M1", e2m1, slow::e2m1()}, {"E4M3", e4m3, slow::e4m3()}, {"E5M2", e5m2, slow::e5m2()}};

// ---------------------------------------------------------------------------------------------------------------------------
// What CUDA's headers say. They run on the host, without a GPU.

#if __has_include(<cuda_fp4.h>) && __has_include(<cuda_fp8.h>)
static int cuda_code(int kind, float x) {
    return kind == 0 ? __nv_cvt_float_to_fp4(x, __NV_E2M1, cudaRoundNearest) : __nv_cvt_float_to_fp8(x, __NV_SATFINITE, kind == 1 ? __NV_E4M3 : __NV_E5M2);
}
static float cuda_value(int kind, int code) {
    __half_raw h = kind == 0 ? __nv_cvt_fp4_to_halfraw((__nv_fp4_storage_t)code, __NV_E2M1)
                             : __nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, kind == 1 ? __NV_E4M3 : __NV_E5M2);
    return __half2float(__half(h));
}
static int cuda_e8m0(float x, bool up) { return __nv_cvt_float_to_e8m0(x, __NV_SATFINITE, up ? cudaRoundPosInf : cudaRoundZero); }
static float cuda_e8m0_value(int code) { return float_of((uint32_t)__nv_cvt_e8m0_to_bf16raw((__nv_fp8_storage_t)code).x << 16); }
#else
static int cuda_code(int, float) { return -1; }
static float cuda_value(int, int) { return 0; }
static int cuda_e8m0(float, bool) { return -1; }
static float cuda_e8m0_value(int) { return 0; }
#endif

// ---------------------------------------------------------------------------------------------------------------------------
// Elements and scales, one at a time: exact

struct apply_number;
static void codes_of(Ctx& ctx, uint8_t* to, const float* x, int64_t n, Minifloat f) {
    for_rows<apply_number, 256>(ctx, {}, (n + 4095) / 4096, KERNEL(Group<256> g, int64_t r) {
        int64_t first = r * 4096;
        g.each((int)(n - first < 4096 ? n - first : 4096), [=](int i) { to[first + i] = convert_to(x[first + i], f); });
    });
}
static void draws_to(Ctx& ctx, float* to, const float* x, const int* random, int64_t n, Minifloat f) {
    for_rows<apply_number, 256>(ctx, {}, (n + 4095) / 4096, KERNEL(Group<256> g, int64_t r) {
        int64_t first = r * 4096;
        g.each((int)(n - first < 4096 ? n - first : 4096), [=](int i) { to[first + i] = round_stochastic(x[first + i], (uint32_t)random[first + i], f); });
    });
}
// Scale bytes of amaxes, and what mx_scale() makes of them: multipliers of elements and of codes.
static void scales_of(Ctx& ctx, uint8_t* to, float* enc, float* dec, const float* amax, int64_t n, Minifloat f, bool ceil) {
    for_rows<apply_number, 256>(ctx, {}, (n + 4095) / 4096, KERNEL(Group<256> g, int64_t r) {
        int64_t first = r * 4096;
        g.each((int)(n - first < 4096 ? n - first : 4096), [=](int k) {
            int64_t i = first + k;
            BlockScale b = mx_scale(amax[i], f, ceil);
            to[i] = (uint8_t)(ceil ? e8m0_ceil(amax[i], f) : e8m0_floor(amax[i], f)), enc[i] = b.code, dec[i] = b.value;
        });
    });
}

// Every code: its value, and the way back by every function that can go it.
static void test_codes(Run& r) {
    if (!r.compare) return;
    for (int k = 0; k < 3; k++) {
        const Minifloat f = kinds[k].f;
        const slow::Grid& g = kinds[k].grid;
        r.at("%s", kinds[k].name);
        for (int code = 0; code < 2 * g.sign; code++) {
            int a = code & (g.sign - 1);
            bool finite = a < (int)g.v.size(), infinite = k == 2 && a == 0x7c;
            float size = finite ? (float)g.v[a] : infinite ? infinity : not_a_number, want = code & g.sign ? -size : size, got = decode((uint8_t)code, f);
            r.verdict.note(same(got, want), "code 0x%02x means %.9g, not %.9g", code, got, want);
            if (cuda_headers) r.verdict.note(same(got, cuda_value(k, code)), "code 0x%02x means %.9g, CUDA says %.9g", code, got, cuda_value(k, code));
            if (!finite) continue;
            r.verdict.note(encode(want, f) == code, "%.9g is encoded as 0x%02x, not 0x%02x", want, encode(want, f), code);
            r.verdict.note(convert_to(want, f) == code, "%.9g is converted to 0x%02x, not 0x%02x", want, convert_to(want, f), code);
            r.verdict.note(same(round_nearest(want, f), want), "%.9g is rounded to %.9g", want, round_nearest(want, f));
            int moved = 0;
            for (uint32_t d = 0; d < 65536; d += k == 0 ? 1 : 255) moved += !same(round_stochastic(want, d, f), want);
            r.verdict.note(moved == 0, "%.9g is moved by %d draws", want, moved);
        }
    }
}

// Floats to convert: of all upper halves the exact one, those next to it, those around the half; every 10007th float; every value, every
// middle, 2 max and their neighbours. Subnormals, both zeros, infinities and NaNs are among the first.
static std::vector<float> sweep(const slow::Grid& g) {
    std::vector<float> x;
    for (uint32_t high = 0; high < 65536; high++)
        for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) x.push_back(float_of(high << 16 | low));
    for (uint64_t b = 0; b < 1ull << 32; b += 10007) x.push_back(float_of((uint32_t)b));
    std::vector<double> points = g.v;
    for (size_t i = 0; i + 1 < g.v.size(); i++) points.push_back((g.v[i] + g.v[i + 1]) / 2);
    points.push_back(g.max() + (g.max() - g.v[g.v.size() - 2]) / 2), points.push_back(2 * g.max());
    for (double p : points)
        for (int d = -3; d <= 3; d++)
            for (uint32_t sign : {0u, 0x80000000u})
                if (p > 0 || d >= 0) x.push_back(float_of((bits_of((float)p) + d) | sign));
    return x;
}

static void test_nearest(Run& r) {
    for (int k = 0; k < 3; k++) {
        const slow::Grid& g = kinds[k].grid;
        r.at("%s", kinds[k].name);
        std::vector<float> x = sweep(g);
        int64_t n = (int64_t)x.size();
        Buffer<float> from(r, n);
        from.host = x, from.send();
        Buffer<uint8_t> to(r, n);
        codes_of(r.ctx, to.p, from.p, n, kinds[k].f);
        to.fetch();
        if (!r.compare) continue;
        for (int64_t i = 0; i < n; i++) {
            int want = slow::nearest(x[i], g), host = convert_to(x[i], kinds[k].f);
            r.verdict.note(to.host[i] == want && host == want, "%.9g becomes 0x%02x, on the host 0x%02x, not 0x%02x", x[i], to.host[i], host, want);
            if (cuda_headers) r.verdict.note(want == cuda_code(k, x[i]), "%.9g becomes 0x%02x, CUDA says 0x%02x", x[i], want, cuda_code(k, x[i]));
        }
    }
}

// Of all 65536 draws, as many take x up as its place between its neighbours says, to half a draw (2^-17), plus what lifting a subnormal
// of the format loses (2^-24 of its smallest normal); the largest draws do. Exact; and against the true place, so that a mistake in
// both forms of the rule would show.
static void test_stochastic(Run& r) {
    std::vector<int> all(65536);
    for (int d = 0; d < 65536; d++) all[d] = d;
    for (int k = 0; k < 3; k++) {
        const slow::Grid& g = kinds[k].grid;
        r.at("%s", kinds[k].name);
        Rng rng{(uint64_t)k};
        std::vector<float> x = {0, -0.f, 1e-42f, (float)g.min_normal * 0x1p-24f, (float)g.max(), (float)g.max() * 1.01f, flt_max, -infinity};
        for (size_t i = 0; i + 1 < g.v.size(); i += k == 0 ? 1 : 1 + rng.below(10))
            for (double at : {0x1p-18, 0x1p-17, 0x1p-16, 0.25, 0.5, 1 - 0x1p-16, 1 - 0x1p-18, rng(0.5) + 0.5})
                x.push_back((float)(rng.below(2) ? 1 : -1) * (float)(g.v[i] + at * (g.v[i + 1] - g.v[i])));
        if (r.compare)
            for (float v : x) {
                int low, up = slow::chances(v, g, &low), went = 0, elsewhere = 0, early = 0;
                float down = std::copysign((float)g.v[low], v), next = low + 1 < (int)g.v.size() ? std::copysign((float)g.v[low + 1], v) : down;
                for (int d = 0; d < 65536; d++) {
                    float q = round_stochastic(v, d, kinds[k].f);
                    bool upper = up && same(q, next);
                    went += upper, elsewhere += !upper && !same(q, down), early += upper && d < 65536 - up;
                }
                r.verdict.note(went == up && !elsewhere && !early, "%.9g goes up by %d draws, not %d, elsewhere by %d, by %d low ones", v, went, up, elsewhere, early);
                double a = std::min(std::fabs((double)v), g.max()), gap = g.v[std::min(low + 1, (int)g.v.size() - 1)] - g.v[low];
                double tol = 0x1p-17 + (a < g.min_normal ? 0x1p-24 * g.min_normal / gap : 0);
                r.verdict.close(went / 65536., gap > 0 ? (a - g.v[low]) / gap : 0, tol, "the share that goes up, of bits", bits_of(v));
            }
        int64_t n = (int64_t)x.size() * 64;                                   // in a kernel: a few draws of each
        Buffer<float> from(r, n, [&](int64_t i) { return x[i / 64]; }), to(r, n);
        Buffer<int> draw(r, n, [&](int64_t) { return rng.below(65536); });
        draws_to(r.ctx, to.p, from.p, draw.p, n, kinds[k].f);
        to.fetch();
        for (int64_t i = 0; i < n && r.compare; i++) {
            float want = round_stochastic(from.host[i], draw.host[i], kinds[k].f);
            r.verdict.note(same(to.host[i], want), "%.9g by draw %d is %.9g in a kernel, %.9g on the host", from.host[i], draw.host[i], to.host[i], want);
        }
    }
}

// E8M0. A made-up format of max 1 shows the bare rounding, which must be CUDA's: up for `ceil`, down for `floor`. Ours differs in one
// decision: infinity is NaN, not the largest scale. Then both rules for the true formats against powers of two in double.
static void test_e8m0(Run& r) {
    const Minifloat one = {0, 1, 1, 0, 0};
    for (int code = 0; code < 256 && r.compare; code++) {
        r.at("byte 0x%02x", code);
        float want = code == 255 ? not_a_number : (float)std::ldexp(1., code - 127), back = code == 255 ? not_a_number : (float)std::ldexp(1., 127 - code);
        r.verdict.note(same(decode_e8m0(code), want) && same(inverse_e8m0(code), back), "means %g and %g", decode_e8m0(code), inverse_e8m0(code));
        if (cuda_headers) r.verdict.note(same(want, cuda_e8m0_value(code)), "means %g, CUDA says %g", want, cuda_e8m0_value(code));
        if (code == 255) continue;
        int up = e8m0_ceil(want, one), down = e8m0_floor(want, one);
        r.verdict.note(up == code && down == code, "2^%d becomes 0x%02x, 0x%02x", code - 127, up, down);
    }
    std::vector<float> amax;
    for (float v : sweep(slow::e4m3()))
        if (!(bits_of(v) >> 31)) amax.push_back(magnitude_or_infinity(v));
    for (float max : {6.f, 448.f})
        for (int e = -149; e < 120; e++)
            for (int d = -3; d <= 3; d++) {
                uint32_t b = bits_of(std::ldexp(max, e)) + d;
                if (b <= 0x7f800000) amax.push_back(float_of(b));
            }
    int64_t n = (int64_t)amax.size();
    Buffer<float> from(r, n);
    from.host = amax, from.send();
    for (Minifloat f : {one, e2m1, e4m3})
        for (bool ceil : {true, false}) {
            r.at("max %g, %s", f.max, ceil ? "ceil" : "floor");
            Buffer<uint8_t> to(r, n);
            Buffer<float> enc(r, n), dec(r, n);
            scales_of(r.ctx, to.p, enc.p, dec.p, from.p, n, f, ceil);
            to.fetch(), enc.fetch(), dec.fetch();
            for (int64_t i = 0; i < n && r.compare; i++) {
                float a = amax[i];
                int got = to.host[i], want = slow::e8m0(a, f.max, ceil);
                r.verdict.note(got == want, "amax %.9g has the scale 0x%02x, not 0x%02x", a, got, want);
                bool fits = same(enc.host[i], inverse_e8m0(got)) && same(dec.host[i], decode_e8m0(got));
                r.verdict.note(fits, "amax %.9g is multiplied by %g and %g", a, enc.host[i], dec.host[i]);
                if (!is_finite(a) || a == 0) continue;
                if (cuda_headers && (ceil || f.max == 1)) {                   // (floor subtracts emax after rounding: nothing of CUDA's)
                    int theirs = cuda_e8m0(a * (1.f / f.max), ceil);
                    r.verdict.note(got == theirs, "amax %.9g has the scale 0x%02x, CUDA says 0x%02x", a, got, theirs);
                }
                // Under ceil's power of two nothing saturates but by a float's last place, under half of it something would;
                // floor's puts amax into the binade of max.
                double scaled = a / std::ldexp(1., got - 127), binade = std::exp2(std::floor(std::log2(f.max)));
                if (ceil) fits = got == 254 || (scaled <= f.max * (1 + 0x1p-23) && (got == 0 || scaled > f.max / 2));
                else fits = got == 0 || (scaled >= binade && scaled < 2 * binade);
                r.verdict.note(fits, "amax %.9g is %g under the scale 0x%02x", a, scaled, got);
            }
        }
}

// ---------------------------------------------------------------------------------------------------------------------------
// The conformance vectors, byte for byte; their fields are explained in test/vectors/README.md

using nlohmann::json;
static const std::vector<json>& lines(const char* name) {
    static std::map<std::string, std::vector<json>> files;
    std::vector<json>& all = files[name];
    if (!all.empty()) return all;
    std::ifstream file(std::string("test/vectors/") + name);
    for (std::string line; std::getline(file, line);) all.push_back(json::parse(line));
    return all;
}
static Bytes hex(const json& field) {
    const std::string& text = field.get_ref<const std::string&>();
    Bytes b;
    for (size_t i = 0; i < text.size(); i += 2) {
        int byte = 0, mask = 0;
        for (int k = 0; k < 2; k++) {
            char c = text[i + k];
            byte = byte << 4 | (c == '?' ? 0 : c <= '9' ? c - '0' : c - 'a' + 10), mask = mask << 4 | (c == '?' ? 0 : 15);
        }
        b.byte.push_back((uint8_t)byte), b.mask.push_back((uint8_t)mask);
    }
    return b;
}
template <class T> static std::vector<T> array(const json& field) {
    Bytes b = hex(field);
    std::vector<T> v(b.byte.size() / sizeof(T));
    if (!v.empty()) memcpy((void*)v.data(), b.byte.data(), v.size() * sizeof(T));
    return v;
}
static RandomKey key_of(const json& k, Purpose purpose) { return {k["seed"], k["step"], k["micro"], k["layer"], k["operand"], purpose}; }
template <class T> static T named(const json& field, std::initializer_list<std::pair<const char*, T>> names) {
    for (auto& [name, value] : names)
        if (field == name) return value;
    fail("test/vectors holds an unknown %s", field.dump().c_str());
}
static Signs signs_of(const json& field) { return named<Signs>(field, {{"plus", Signs::plus}, {"fixed", Signs::fixed}, {"random", Signs::random}}); }
static Cell cell_of(const json& line, const char* format) {
    Cell c;
    c.format = named<Format>(format, {{"nvfp4", Format::nvfp4}, {"mxfp4", Format::mxfp4}, {"mxfp8", Format::mxfp8}, {"e4m3", Format::fp8},
                                      {"e5m2", Format::fp8_e5m2}});
    c.block = line["block"] == "square" ? square : vec;
    c.rounding = named<Rounding>(line["rounding"], {{"nearest", rn}, {"stochastic", sr}});
    if (!line["scale"].is_null())
        c.scale = named<Scale>(line["scale"], {{"te", Scale::te}, {"headroom", Scale::headroom}, {"four_six", Scale::four_six}, {"po2", Scale::po2}, {"floor", Scale::floor},
                                               {"ceil", Scale::ceil}});
    c.hadamard = line.value("hadamard", 0);
    c.signs = signs_of(line.value("signs", "plus"));
    c.carrier = named<Carrier>(line.value("carrier", "own"), {{"own", Carrier::own}, {"e4m3", Carrier::e4m3}, {"e5m2", Carrier::e5m2}});
    return c;
}
static Case case_of(const json& line, const char* format) {
    Axis axis = line["axis"] == "row" ? Axis::row : Axis::column;
    return {cell_of(line, format), axis, line["rows"], line["cols"], key_of(line["key"], Purpose::rounding), line.value("gemm", 0u)};
}

// The random bits of a matrix, tile by tile.
static void draws(Ctx& ctx, int* to, const Case& c) {
    TileShape t = tile_shape(c.cell, c.axis, c.rows, c.cols);
    RandomKey key = c.key;
    for_tiles<apply_number, QuantStage>(ctx, {}, t.count, KERNEL(Group<256> g, int64_t i, QuantStage& s) {
        int64_t r0 = i / t.across * t.R, c0 = i % t.across * t.C;
        draw_tile(g, t, s.random, key, r0, c0);
        for (int k = g.lane(); k < tile_size; k += g.lanes) {
            int64_t r = r0 + (k >> t.shift), col = c0 + (k & (t.C - 1));
            if (r < t.rows && col < t.cols) to[r * t.cols + col] = s.random[k];
        }
    });
}

static void test_vector_conversions(Run& r) {
    std::map<std::string, int> seen;
    for (const json& l : lines("conversions.jsonl")) {
        std::string kind = l["kind"];
        seen[kind]++;
        r.at("%s %d of conversions.jsonl", kind.c_str(), seen[kind]);
        auto element = [&] { return named<int>(l["format"], {{"e2m1", 0}, {"e4m3", 1}, {"e5m2", 2}, {"mxfp4", 0}, {"mxfp8", 1}}); };
        if (kind == "decode") {
            std::vector<float> v = array<float>(l["values"]);
            for (size_t c = 0; c < v.size(); c++) {
                float got = decode((uint8_t)c, kinds[element()].f);
                r.verdict.note(same(got, v[c]), "code 0x%02zx means %.9g, not %.9g", c, got, v[c]);
            }
        } else if (kind == "element") {
            std::vector<float> x = array<float>(l["values"]);
            Bytes codes = hex(l["codes"]);
            Minifloat f = kinds[element()].f;
            std::vector<uint16_t> random = l.contains("random") ? array<uint16_t>(l["random"]) : std::vector<uint16_t>();
            for (size_t i = 0; i < x.size(); i++) {
                int got = random.empty() ? convert_to(x[i], f) : slow::is_nan(x[i]) ? f.nan : encode(round_stochastic(x[i], random[i], f), f);
                r.verdict.note(got == codes.byte[i], "%.9g becomes 0x%02x, not 0x%02x", x[i], got, codes.byte[i]);
            }
        } else if (kind == "scale") {
            std::vector<float> x = array<float>(l["values"]);
            Bytes codes = hex(l["codes"]);
            for (size_t i = 0; i < x.size(); i++) {
                float amax = magnitude_or_infinity(x[i]);
                int got = l["scale"] == "ceil" ? e8m0_ceil(amax, kinds[element()].f) : e8m0_floor(amax, kinds[element()].f);
                r.verdict.note(got == codes.byte[i], "amax %.9g has the scale 0x%02x, not 0x%02x", x[i], got, codes.byte[i]);
            }
        } else if (kind == "philox") {
            uint64_t index = l["index"];
            Words w = philox(key_of(l["key"], (Purpose)l["purpose"].get<int>()), index);
            std::vector<uint32_t> want = array<uint32_t>(l["words"]);
            for (int i = 0; i < 4; i++) r.verdict.note(w.w[i] == want[i], "word %d is 0x%08x, not 0x%08x", i, w.w[i], want[i]);
        } else if (kind == "random16") {
            std::vector<uint16_t> want = array<uint16_t>(l["random"]);
            for (int hadamard : {0, 32, 64, 128})                                // tiles of four shapes, the first along rows
                for (Axis axis : {Axis::row, Axis::column}) {
                    Case c = {{Format::nvfp4, vec, sr, Scale::te, hadamard}, axis, l["rows"], l["cols"], key_of(l["key"], Purpose::rounding)};
                    Buffer<int> got(r, c.rows * c.cols);
                    draws(r.ctx, got.p, c);
                    got.fetch();
                    for (size_t i = 0; i < want.size(); i++)
                        r.verdict.note(got.host[i] == want[i], "draw %zu is 0x%04x, not 0x%04x", i, got.host[i], want[i]);
                }
        } else if (kind == "hadamard") {
            std::vector<float> x = array<float>(l["values"]), want = array<float>(l["transformed"]);
            int n = l["hadamard"];
            for (Axis axis : {Axis::row, Axis::column}) {
                Case c = {{Format::nvfp4, vec, rn, Scale::te, n, signs_of(l["signs"])}, axis, axis == Axis::row ? 1 : n, axis == Axis::row ? n : 1,
                          key_of(l["key"], Purpose::rounding), l["gemm"]};
                Buffer<float> from(r, n, [&](int64_t i) { return x[i]; }), to(r, n);
                transform(r.ctx, to.p, from.p, c);
                to.fetch();
                for (int i = 0; i < n; i++) r.verdict.note(same(to.host[i], want[i]), "element %d becomes %.9g, not %.9g", i, to.host[i], want[i]);
            }
        } else if (kind == "tiled") {
            int64_t rows = l["rows"], blocks = l["blocks"];
            Bytes plain = hex(l["scales"]), want = hex(l["scales_tiled"]);
            std::vector<uint8_t> got(packed_scale_bytes({Format::nvfp4}, rows, 16 * blocks, ScaleOrder::tiled));
            for (int64_t row = 0; row < rows; row++)
                for (int64_t b = 0; b < blocks; b++)
                    got.at(scale_offset(row, b, blocks, ScaleOrder::tiled)) = plain.byte[scale_offset(row, b, blocks, ScaleOrder::plain)];
            compare_bytes(r, got, want, "scales_tiled");
        } else r.verdict.note(false, "unknown kind");
    }
    r.at("conversions.jsonl");
    for (const char* kind : {"decode", "element", "scale", "philox", "random16", "hadamard", "tiled"})
        r.verdict.note(seen[kind] > 0, "no line of kind %s", kind);
}

// "decode(pack(x)) equals the emulated values exactly": the packed bytes, decoded here by tables, are the values that quantise() stores,
// and times the tensor scale the `decoded` of the line.
template <class To, class From> static void test_vector_block(Run& r, const json& l, const Case& c, const std::vector<float>& x) {
    Made got = make<To, From>(r, c, x);
    compare_bytes(r, got.codes, hex(l["codes"]), "codes");
    if (!l["scales"].is_null()) compare_bytes(r, got.scales, hex(l["scales"]), "scales");
    bool poisoned = false;
    if (!l["tensor_scale"].is_null()) {
        float want = array<float>(l["tensor_scale"])[0];
        r.verdict.note(same(got.S_dec, want), "S_dec is %.9g, not %.9g", got.S_dec, want);
        poisoned = slow::is_nan(want);
    }
    std::vector<float> decoded = l.contains("decoded") ? array<float>(l["decoded"]) : std::vector<float>();
    bool bytes = has_scale_bytes(c.cell), carried = is_carried(c.cell);
    const slow::Grid& g = !carried ? slow::elements(c.cell.format) : c.cell.carrier == Carrier::e4m3 ? slow::e4m3() : slow::e5m2();
    int64_t B = carried ? 16 : block_length(c.cell.format), inner = (c.inner() + B - 1) / B * B;
    bool nibbles = is_4bit(c.cell.format) && !carried, mx = is_mx(c.cell.format);
    for (int64_t i = 0; i < c.rows * c.cols; i++) {
        int64_t o = c.axis == Axis::row ? i / c.cols : i % c.cols, in = c.axis == Axis::row ? i % c.cols : i / c.cols, at = o * inner + in;
        int code = nibbles ? got.codes[at / 2] >> in % 2 * 4 & 15 : got.codes[at], byte = bytes ? got.scales[at / B] : 0;
        double scale = !bytes ? 1 : mx ? (byte == 255 ? NAN : std::ldexp(1., byte - 127)) : slow::e4m3()[byte];
        float value = (float)(std::copysign(g[code], code & g.sign ? -1. : 1.) * scale);
        if (poisoned) r.verdict.note(slow::is_nan(got.value[i] * got.S_dec), "element %ld is %g under a NaN", (long)i, got.value[i]);
        else r.verdict.note(same(got.value[i], as_stored<To>(value)), "element %ld is %.9g, packed %.9g", (long)i, got.value[i], value);
        if (decoded.empty()) continue;
        r.verdict.note(same(value * got.S_dec, decoded[i]), "element %ld is decoded as %.9g, not %.9g", (long)i, value * got.S_dec, decoded[i]);
    }
    if (!l.contains("scales_tiled")) return;
    Case tiled = c;
    tiled.order = ScaleOrder::tiled;
    compare_bytes(r, make<To, From>(r, tiled, x).scales, hex(l["scales_tiled"]), "scales_tiled");
}
static void test_vector_blocks(Run& r) {
    int halves = 0;
    for (const json& l : lines("blocks.jsonl")) {
        r.at("%s", l["name"].get_ref<const std::string&>().c_str());
        Case c = case_of(l, l["format"].get_ref<const std::string&>().c_str());
        std::vector<float> x = array<float>(l["input"]);
        r.verdict.note((int64_t)x.size() == c.rows * c.cols, "%zu elements", x.size());
        test_vector_block<float, float>(r, l, c, x), test_vector_block<bf16, float>(r, l, c, x);
        bool half = true;                                                     // bf16 holds the input: then so may the source
        for (float v : x) half = half && !(bits_of(v) & 0xffff);
        if (half) halves++, test_vector_block<float, bf16>(r, l, c, x), test_vector_block<bf16, bf16>(r, l, c, x);
    }
    r.at("blocks.jsonl");
    r.verdict.note(lines("blocks.jsonl").size() > 100 && halves > 10, "%zu lines, %d of bf16", lines("blocks.jsonl").size(), halves);
}

// Products whose every partial sum is exact, so that cuBLASLt, oneDNN and plain loops must all give these bits.
template <class To> static void test_vector_gemm(Run& r, const json& l) {
    int64_t m = l["m"], n = l["n"], k = l["k"];
    Mat side[2];
    std::vector<std::unique_ptr<Buffer<To>>> values;
    std::vector<std::unique_ptr<Buffer<float>>> scales;
    for (int i = 0; i < 2; i++) {
        const json& line = l[i ? "b" : "a"];
        Case c = case_of(line, l["format"].get_ref<const std::string&>().c_str());
        Made made = make<To, float>(r, c, array<float>(line["input"]));
        compare_bytes(r, made.codes, hex(line["codes"]), "codes"), compare_bytes(r, made.scales, hex(line["scales"]), "scales");
        values.emplace_back(new Buffer<To>(r, c.rows * c.cols, [&](int64_t j) { return made.value[j]; }));
        scales.emplace_back(new Buffer<float>(r, 1, [&](int64_t) { return made.S_dec; }));
        side[i] = mat(values[i]->p, c.cols);
        if (c.axis == Axis::column) side[i] = side[i].transposed();
        if (!line["tensor_scale"].is_null()) side[i].scale = scales[i]->p;
    }
    Buffer<float> out(r, m * n);
    matmul(r.ctx, "test", out.p, n, side[0], side[1].transposed(), m, n, k, 0);
    out.fetch();
    std::vector<float> want = array<float>(l["output"]);
    for (int64_t i = 0; i < m * n; i++) r.verdict.note(out.host[i] == want[i], "C[%ld] is %.9g, not %.9g", (long)i, out.host[i], want[i]);
}
static void test_vector_gemms(Run& r) {
    for (const json& l : lines("gemm.jsonl")) {
        r.at("%s", l["name"].get_ref<const std::string&>().c_str());
        if (operand_type(Format::nvfp4) == Type::bf16) test_vector_gemm<bf16>(r, l);
        test_vector_gemm<float>(r, l);
    }
    r.verdict.note(!lines("gemm.jsonl").empty(), "no lines");
}

int main(int argc, char** argv) {
    begin(argc, argv);
    if (!cuda_headers) printf("left out: comparison with cuda_fp4.h and cuda_fp8.h, which are not installed\n");
    test("every code", test_codes);
    test("rounding to nearest", test_nearest);
    test("stochastic rounding, every draw", test_stochastic);
    test("E8M0 scales", test_e8m0);
    test("vectors: conversions", test_vector_conversions);
    test("vectors: blocks", test_vector_blocks);
    test("vectors: GEMMs", test_vector_gemms);
    return done();
}
