// slow_quantiser.h: the rules of test/vectors/README.md once more, for tests: slow, and sharing nothing with fp4.cuh but the names
// of its cells. Neighbours are looked up in a table of a format's values; Philox, the Hadamard's signs and its order are written anew.
//
// Arithmetic is float, one operation at a time in the order of the README, where that is the rule; double where values are exact.
#pragma once
#include "../fp4.cuh"       // Cell, Axis, RandomKey; nothing that computes
#include "device_test.h"    // as_bf16

namespace slow {

// ---------------------------------------------------------------------------------------------------------------------------
// Elements: code i means v[i], then the same with the sign's bit.

struct Grid {
    std::vector<double> v;
    double min_normal;
    int sign, nan;
    double max() const { return v.back(); }
    double operator[](int code) const { return code & sign ? -v[code & (sign - 1)] : v[code]; }
};
inline Grid grid(int mantissa, int bias, int codes, int sign) {
    Grid g = {{}, std::ldexp(1.0, 1 - bias), sign, sign - 1};
    for (int c = 0; c < codes; c++) {
        int e = c >> mantissa, m = c & ((1 << mantissa) - 1);
        g.v.push_back(e ? std::ldexp((1 << mantissa) + m, e - bias - mantissa) : std::ldexp(m, 1 - bias - mantissa));
    }
    return g;
}
inline const Grid& e2m1() { static const Grid g = grid(1, 1, 8, 8); return g; }
inline const Grid& e4m3() { static const Grid g = grid(3, 7, 127, 128); return g; }           // code 127 is NaN
inline const Grid& e5m2() { static const Grid g = grid(2, 15, 124, 128); return g; }          // from 124 infinity and NaN
inline const Grid& elements(Format f) {
    return f == Format::nvfp4 || f == Format::mxfp4 || f == Format::e2m1 ? e2m1() : f == Format::fp8_e5m2 ? e5m2() : e4m3();
}

inline bool is_nan(float x) { return (bits_of(x) & 0x7fffffff) > 0x7f800000; }
inline int signed_code(int code, float x, const Grid& g) { return bits_of(x) >> 31 ? code | g.sign : code; }
inline int below(double a, const Grid& g) { return (int)(std::upper_bound(g.v.begin(), g.v.end(), a) - g.v.begin()) - 1; }

inline int nearest(float x, const Grid& g) {
    if (is_nan(x)) return g.nan;
    double a = std::min(std::fabs((double)x), g.max());
    int low = below(a, g), high = std::min(low + 1, (int)g.v.size() - 1);
    double middle = (g.v[low] + g.v[high]) / 2;
    return signed_code(a > middle || (a == middle && low % 2) ? high : low, x, g);
}
// How many of 65536 draws take |x| up from `low`, its lower neighbour.
inline int chances(float x, const Grid& g, int* low) {
    float a = (float)std::min(std::fabs((double)x), g.max()), m = (float)g.min_normal;
    if (a < m) a = (a + m) - m;
    *low = below(a, g);
    if (*low == (int)g.v.size() - 1) return 0;
    return (int)std::floor((a - g.v[*low]) / (g.v[*low + 1] - g.v[*low]) * 65536 + 0.5);
}
inline int stochastic(float x, uint32_t r, const Grid& g) {
    int low, up = chances(x, g, &low);
    return signed_code(low + ((int)r >= 65536 - up), x, g);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Random bits

struct Block4 { uint32_t w[4]; };
inline Block4 philox(Block4 c, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        uint64_t a = 0xD2511F53ull * c.w[0], b = 0xCD9E8D57ull * c.w[2];
        c = {{(uint32_t)(b >> 32) ^ c.w[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c.w[3] ^ k1, (uint32_t)a}};
    }
    return c;
}
inline Block4 draw(const RandomKey& k, uint32_t purpose, uint32_t operand, uint64_t index) {
    Block4 counter = {{(uint32_t)index, k.step, purpose | operand << 8 | k.layer << 16, (uint32_t)(index >> 32) | k.micro << 16}};
    return philox(counter, (uint32_t)k.seed, (uint32_t)(k.seed >> 32));
}
// The 16 bits of element (row, col) of a matrix of `cols` columns.
inline uint32_t random16(const RandomKey& k, int64_t row, int64_t col, int64_t cols) {
    int64_t group = row * ((cols + 127) / 128) + col / 128, part = col % 128 / 16;
    return draw(k, 5, k.operand, (uint64_t)(group * 16 + col % 16)).w[part / 2] >> (part % 2 ? 16 : 0) & 0xffff;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Hadamard of n values `apart` from each other, in place.

inline float sign_of(Signs kind, const RandomKey& k, uint32_t gemm, int i) {
    static const char fixed[] = "+++-+------+-+--";
    if (kind == Signs::plus) return 1;
    if (kind == Signs::fixed) return fixed[i % 16] == '+' ? 1.f : -1.f;
    return draw(k, 6, gemm, 0).w[i / 32] >> i % 32 & 1 ? -1.f : 1.f;
}
inline void hadamard(float* v, int64_t apart, int n, const float* sign) {
    std::vector<float> x(n);
    for (int i = 0; i < n; i++) x[i] = v[i * apart] * sign[i];
    for (int h = 1; h < n; h *= 2)
        for (int i = 0; i < n; i++)
            if (!(i & h)) {
                float a = x[i], b = x[i + h];
                x[i] = a + b, x[i + h] = a - b;
            }
    for (int i = 0; i < n; i++) v[i * apart] = x[i] * (float)(1 / std::sqrt((double)n));
}

// ---------------------------------------------------------------------------------------------------------------------------
// A matrix quantised. Of every element: its code, its block's scale byte (both -1: unspecified, under a NaN), code times scale.

struct Matrix {
    int64_t rows, cols;
    Cell cell;
    Axis axis;
    std::vector<float> x;                 // after the Hadamard
    std::vector<int> code, byte;
    std::vector<double> scale, value;     // its block's scale as a number; code times that, without the tensor's scale
    std::vector<bool> lost = {};          // whose product of code and scale the FP8 carrier does not hold
    float S_enc = 1, S_dec = 1;
    int top = 8;                          // the exponent of the largest block scale, where that is a power of two
    float decoded(int64_t i) const { return (float)value[i] * S_dec; }
};

inline float clamped(float v) { return v < 3.40282347e38f ? v : 3.40282347e38f; }

// Sixteen (short: then zeros) floats added as the README says.
inline float tree_sum(std::vector<float> e) {
    e.resize(16, 0.f);
    for (int d = 8; d > 0; d /= 2)
        for (int i = 0; i < d; i++) e[i] += e[i + d];
    return e[0];
}

struct Candidate { int byte = -1; std::vector<int> code = {}; float error = 0; double scale = 1; };

// The smallest power of two that is not below base, of the 18 binades that end at 2^top.
inline double po2(float base, int top) {
    double s = std::ldexp(1., top - 17);
    while (s < base && s < std::ldexp(1., top)) s *= 2;
    return base == 0 ? 0 : s;
}

// One block, `at` the indices of its elements, row after row of `width`. `draws`: their random bits, or null.
inline Candidate nvfp4_block(const Matrix& m, const std::vector<int64_t>& at, int64_t width, float base, const uint32_t* draws) {
    Candidate c;
    bool power = m.cell.scale == Scale::po2;
    c.byte = power ? -1 : nearest(base, e4m3());
    float s = power ? (float)po2(base, m.top) : (float)e4m3()[c.byte], enc = s == 0 ? 0 : clamped(1.f / (s * m.S_dec));
    std::vector<std::vector<float>> columns(width);
    for (size_t i = 0; i < at.size(); i++) {
        float x = m.x[at[i]], scaled = x * enc;
        c.scale = s;
        c.code.push_back(draws ? stochastic(scaled, draws[i], e2m1()) : nearest(scaled, e2m1()));
        float e = (float)e2m1()[c.code[i]] * s * m.S_dec - x;
        columns[i % width].push_back(e * e);
    }
    std::vector<float> sums;
    if (width == (int64_t)at.size()) {                                        // one row, or one element
        for (auto& column : columns) sums.push_back(column[0]);
    } else
        for (auto& column : columns) sums.push_back(tree_sum(column));
    c.error = sums.size() == 1 ? sums[0] : tree_sum(sums);
    return c;
}

inline int e8m0(float amax, double max, bool ceil) {
    if (!(amax <= 3.40282347e38f)) return 255;
    if (!ceil) return std::max(amax < 0x1p-126f ? 0 : 127 + std::ilogb(amax) - std::ilogb(max), 0);
    float g = amax * (float)(1 / max);
    int f = g < 0x1p-126f ? 0 : 126 + std::ilogb(g);
    while (f < 254 && (double)g > std::ldexp(1.0, f - 127)) f++;
    return f;
}

inline Matrix quantise(std::vector<float> x, int64_t rows, int64_t cols, Cell cell, Axis axis, RandomKey key, uint32_t gemm) {
    Matrix m = {rows, cols, cell, axis, std::move(x), {}, {}, {}, {}};
    int64_t n = rows * cols;
    m.code.assign(n, -1), m.byte.assign(n, -1), m.scale.assign(n, 1), m.value.assign(n, NAN);
    if (!is_quantised(cell.format)) {
        for (int64_t i = 0; i < n; i++) m.value[i] = cell.format == Format::bf16 ? as_bf16(m.x[i]) : m.x[i];
        return m;
    }
    bool down = axis == Axis::column, random = cell.rounding == Rounding::stochastic;
    const Grid& g = elements(cell.format);
    if (cell.hadamard) {
        std::vector<float> sign(cell.hadamard);
        for (int i = 0; i < cell.hadamard; i++) sign[i] = sign_of(cell.signs, key, gemm, i);
        for (int64_t o = 0; o < (down ? cols : rows); o++)
            for (int64_t i = 0; i < (down ? rows : cols); i += cell.hadamard)
                hadamard(&m.x[down ? i * cols + o : o * cols + i], down ? cols : 1, cell.hadamard, sign.data());
    }
    auto amax_of = [&](const std::vector<int64_t>& at) {
        float a = 0;
        for (int64_t i : at) a = !(std::fabs(m.x[i]) <= a) && !is_nan(a) ? std::fabs(m.x[i]) : a;                     // a NaN stays
        return a;
    };
    std::vector<int64_t> all(n);
    for (int64_t i = 0; i < n; i++) all[i] = i;
    bool mx = cell.format == Format::mxfp4 || cell.format == Format::mxfp8, nv = cell.format == Format::nvfp4, real = cell.format == Format::e2m1;
    bool room = nv && (cell.scale == Scale::headroom || (cell.scale == Scale::four_six && random));
    float cap = nv ? (cell.scale == Scale::four_six ? 256.f : 448.f) : 1.f, top = nv ? (room ? (float)(96. / 17) : 6.f) : (float)g.max();
    bool carried = cell.carrier != Carrier::own, by_row = !mx && !nv && !real && cell.block == Block::row;
    const Grid& carrier = cell.carrier == Carrier::e4m3 ? e4m3() : e5m2();
    if (carried) m.top = (int)std::floor(std::log2(carrier.max() / 6));
    if (nv && cell.scale == Scale::po2) cap = std::ldexp(1.f, m.top);
    if (carried && mx) {
        float amax = amax_of(all);
        int byte = e8m0(amax, 6, cell.scale == Scale::ceil);
        m.S_dec = byte == 255 ? NAN : amax == 0 ? 1 : std::ldexp(1.f, std::max(byte - 127 - m.top, -126)), m.S_enc = 1 / m.S_dec;
        if (byte == 255) return m;
    } else if (!mx && !real && !by_row) {
        float amax = amax_of(all);
        bool finite = amax <= 3.40282347e38f;
        m.S_enc = amax == 0 ? 1.f : clamped((cap * top) / amax), m.S_dec = finite ? 1.f / m.S_enc : NAN;
        if (!finite) return m;
    }
    auto draws_of = [&](const std::vector<int64_t>& at) {
        std::vector<uint32_t> d;
        if (random)
            for (int64_t i : at) d.push_back(random16(key, i / cols, i % cols, cols));
        return d;
    };
    if (by_row) {                                                                      // FP8 by rows of the operand
        for (int64_t o = 0; o < (down ? cols : rows); o++) {
            std::vector<int64_t> at;
            for (int64_t i = 0; i < (down ? rows : cols); i++) at.push_back(down ? i * cols + o : o * cols + i);
            int byte = std::max(e8m0(amax_of(at), g.max(), true), 1);
            std::vector<uint32_t> d = draws_of(at);
            for (size_t i = 0; i < at.size() && byte != 255; i++) {
                float v = (float)std::ldexp((double)m.x[at[i]], 127 - byte);
                m.code[at[i]] = random ? stochastic(v, d[i], g) : nearest(v, g), m.scale[at[i]] = std::ldexp(1., byte - 127), m.value[at[i]] = g[m.code[at[i]]] * m.scale[at[i]];
            }
        }
        return m;
    }
    if (!mx && !nv && !real) {                                                         // FP8 by tensor
        std::vector<uint32_t> d = draws_of(all);
        for (int64_t i = 0; i < n; i++) {
            float v = m.x[i] * m.S_enc;
            m.code[i] = random ? stochastic(v, d[i], g) : nearest(v, g), m.value[i] = g[m.code[i]];
        }
        return m;
    }
    int64_t B = mx ? 32 : 16, height = cell.block == Block::square || down ? B : 1, width = cell.block == Block::square || !down ? B : 1;
    std::vector<int64_t> at;
    for (int64_t r0 = 0; r0 < rows; r0 += height)
        for (int64_t c0 = 0; c0 < cols; c0 += width) {
            int64_t w = std::min(width, cols - c0);
            at.clear();
            for (int64_t r = r0; r < std::min(r0 + height, rows); r++)
                for (int64_t c = c0; c < c0 + w; c++) at.push_back(r * cols + c);
            std::vector<uint32_t> d = draws_of(at);
            float amax = amax_of(at), s = real ? amax / 6.f + 1e-9f : 1.f;     // e2m1: the scale as it comes out, in float
            Candidate best;
            if (real) {
                if (!(amax <= 3.40282347e38f)) continue;
                for (size_t i = 0; i < at.size(); i++) {
                    float v = m.x[at[i]] * (1.f / s);
                    best.code.push_back(random ? stochastic(v, d[i], g) : nearest(v, g));
                }
            } else if (nv) {
                float base = amax * (m.S_enc * (1.f / top));
                best = nvfp4_block(m, at, w, clamped(base), random ? d.data() : nullptr);
                if (cell.scale == Scale::four_six) {
                    Candidate four = nvfp4_block(m, at, w, 1.5f * base, random ? d.data() : nullptr);
                    if (four.error < best.error) best = four;
                }
            } else {
                best.byte = e8m0(amax, g.max(), cell.scale == Scale::ceil);
                for (size_t i = 0; i < at.size() && best.byte != 255; i++) {
                    float v = std::ldexp(m.x[at[i]], 127 - best.byte);
                    best.code.push_back(random ? stochastic(v, d[i], g) : nearest(v, g));
                }
            }
            for (size_t i = 0; i < at.size(); i++) {
                m.byte[at[i]] = nv && cell.scale == Scale::po2 ? nearest((float)best.scale, e4m3()) : best.byte;
                if (mx && best.byte == 255) continue;
                m.code[at[i]] = best.code[i], m.scale[at[i]] = real ? s : nv ? best.scale : std::ldexp(1., best.byte - 127) / m.S_dec;
                m.value[at[i]] = g[best.code[i]] * m.scale[at[i]];
                if (real) m.value[at[i]] = (float)m.value[at[i]];
            }
        }
    for (int64_t i = 0; carried && i < n; i++) {                                       // products under 2^-126 are far below any FP8 number
        double product = m.value[i];
        m.code[i] = nearest((float)product, carrier), m.value[i] = carrier[m.code[i]];
        m.lost.push_back(m.value[i] != product);
    }
    return m;
}

}  // namespace slow
