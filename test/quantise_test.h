// quantise_test.h: what test_fp4.cu and test_quantise.cu share: one matrix through quantise(), and its comparison, bit for bit, with the
// slow quantiser's.
#pragma once
#include "../metis.cuh"     // vec, square, rn, sr; cell_text, operand_type
#include "slow_quantiser.h"

constexpr float flt_max = 3.40282347e38f;
static const float infinity = float_of(0x7f800000), not_a_number = float_of(0x7fc00000);

// Equal bits, or both NaN.
inline bool same(float a, float b) { return bits_of(a) == bits_of(b) || (slow::is_nan(a) && slow::is_nan(b)); }

struct Case {
    Cell cell;
    Axis axis;
    int64_t rows, cols;
    RandomKey key = {1, 2, 3, 4, 5, Purpose::rounding};
    uint32_t gemm = 0;
    ScaleOrder order = ScaleOrder::plain;
    int64_t outer() const { return axis == Axis::row ? rows : cols; }
    int64_t inner() const { return axis == Axis::row ? cols : rows; }
};
struct Made {
    std::vector<float> value;                 // code times block scale
    std::vector<uint8_t> codes, scales;
    float S_enc = 1, S_dec = 1;
};

template <class To, class From> Made make(Run& r, const Case& c, const std::vector<float>& x, bool packed = true) {
    packed = packed && c.cell.format != Format::e2m1;      // whose scales are no bytes
    int64_t n = c.rows * c.cols;
    Buffer<From> from(r, n, [&](int64_t i) { return x[i]; });
    for (int64_t i = 0; i < n; i++) r.verdict.note(same((float)from[i], x[i]), "the test's own input %ld", (long)i);
    Buffer<To> to(r, n);
    Buffer<float> scale(r, 2), partial(r, quantise_partials(c.cell, c.rows, c.cols));
    Buffer<uint8_t> codes(r, packed ? (int64_t)packed_bytes(c.cell, c.outer(), c.inner()) : 0);
    Buffer<uint8_t> scales(r, packed && has_scale_bytes(c.cell) ? (int64_t)packed_scale_bytes(c.cell, c.outer(), c.inner(), c.order) : 0);
    if (c.order == ScaleOrder::tiled) std::fill(scales.host.begin(), scales.host.end(), 0), scales.send();                 // the padding is the caller's
    RandomKey sign_key = c.key;
    sign_key.operand = c.gemm, sign_key.purpose = Purpose::signs;
    QuantCall call = {c.cell, c.axis, c.rows, c.cols, c.key, sign_key, scale.p, partial.p};
    Packed into;
    if (packed) into.codes = codes.p, into.scales = scales.p, into.order = c.order;
    bool tensor = has_tensor_scale(c.cell);
    if (tensor) tensor_scale(r.ctx, call, (const From*)from.p);
    if (has_row_scales(c.cell)) row_scales(r.ctx, call, (const From*)from.p);
    quantise(r.ctx, call, to.p, (const From*)from.p, into);
    Made m;
    for (double v : to.fetch().values()) m.value.push_back((float)v);
    if (packed) {                                          // packing changes nothing
        Buffer<To> alone(r, n);
        quantise(r.ctx, call, alone.p, (const From*)from.p);
        alone.fetch();
        for (int64_t i = 0; i < n; i++) r.verdict.note(same((float)alone[i], m.value[i]), "element %ld is %g without packing", (long)i, alone[i]);
    }
    m.codes = codes.fetch().host, m.scales = scales.fetch().host;
    if (tensor) scale.fetch(), m.S_enc = scale.host[0], m.S_dec = scale.host[1];
    return m;
}

// The packed codes and plain scales of a slow::Matrix, with masks of the bits that are specified.
struct Bytes { std::vector<uint8_t> byte, mask; };
inline void pack(const slow::Matrix& m, Bytes& codes, Bytes& scales) {
    bool down = m.axis == Axis::column, carried = m.cell.carrier != Carrier::own, nibbles = is_4bit(m.cell.format) && !carried;
    int64_t outer = down ? m.cols : m.rows, length = down ? m.rows : m.cols, B = carried ? 16 : block_length(m.cell.format), inner = (length + B - 1) / B * B;
    codes.byte.assign(outer * inner / (nibbles ? 2 : 1), 0), codes.mask = codes.byte;
    scales.byte.assign(has_blocks(m.cell.format) && !carried ? outer * inner / B : 0, 0), scales.mask = scales.byte;
    for (int64_t o = 0; o < outer; o++)
        for (int64_t i = 0; i < inner; i++) {
            int64_t at = down ? i * m.cols + o : o * m.cols + i, to = o * inner + i, byte = nibbles ? to / 2 : to;
            int64_t last = down ? (length - 1) * m.cols + o : o * m.cols + length - 1;
            int code = i < length ? m.code[at] : m.code[last] < 0 ? -1 : 0, shift = nibbles ? i % 2 * 4 : 0;
            if (code >= 0) codes.byte[byte] |= code << shift, codes.mask[byte] |= (nibbles ? 0xf : 0xff) << shift;
            if (i % B == 0 && !scales.byte.empty() && m.byte[at] >= 0) scales.byte[to / B] = (uint8_t)m.byte[at], scales.mask[to / B] = 0xff;
        }
}
inline void compare_bytes(Run& r, const std::vector<uint8_t>& got, const Bytes& want, const char* what) {
    r.verdict.note(got.size() == want.byte.size(), "%zu bytes of %s, not %zu", got.size(), what, want.byte.size());
    for (size_t i = 0; i < std::min(got.size(), want.byte.size()); i++)
        r.verdict.note((got[i] & want.mask[i]) == (want.byte[i] & want.mask[i]), "%s[%zu] is 0x%02x, not 0x%02x", what, i, got[i], want.byte[i]);
}

// Code times block scale as To holds it: bf16 loses the bits of a product below its normal range, and nothing else.
template <class To> float as_stored(float v) { return sizeof(To) == 2 && std::fabs(v) < 0x1p-126f ? float_of(bits_of(v) & 0xffff0000u) : v; }

// Packed bytes, tensor scale and stored values of one call against the slow quantiser.
template <class To> void compare(Run& r, const Made& got, const slow::Matrix& want) {
    if (has_tensor_scale(want.cell)) {
        r.verdict.note(same(got.S_dec, want.S_dec), "S_dec is %.9g, not %.9g", got.S_dec, want.S_dec);
        if (is_finite(want.S_dec)) r.verdict.note(same(got.S_enc, want.S_enc), "S_enc is %.9g, not %.9g", got.S_enc, want.S_enc);
    }
    if (!got.codes.empty()) {
        Bytes codes, scales;
        pack(want, codes, scales);
        compare_bytes(r, got.codes, codes, "codes"), compare_bytes(r, got.scales, scales, "scales");
    }
    for (size_t i = 0; i < got.value.size(); i++) {
        float v = as_stored<To>((float)want.value[i]);
        if (slow::is_nan(want.S_dec)) r.verdict.note(slow::is_nan(got.value[i] * got.S_dec), "element %zu is %g under a NaN", i, got.value[i]);
        else r.verdict.note(same(got.value[i], v), "element %zu, %.9g, becomes %.9g, not %.9g", i, want.x[i], got.value[i], v);
    }
}

// The Hadamard alone, tile by tile.
struct transform_matrix;
inline void transform(Ctx& ctx, float* to, const float* from, const Case& c) {
    TileShape t = tile_shape(c.cell, c.axis, c.rows, c.cols);
    Cell cell = c.cell;
    RandomKey key = c.key;
    key.operand = c.gemm, key.purpose = Purpose::signs;
    for_tiles<transform_matrix, QuantStage>(ctx, {}, t.count, KERNEL(Group<256> g, int64_t i, QuantStage& s) {
        int64_t r0 = i / t.across * t.R, c0 = i % t.across * t.C;
        load_tile(g, t, s.v, from, r0, c0);
        hadamard_signs(g, s.sign, cell.signs, philox(key, 0));
        hadamard(g, t, s.v, cell.hadamard, s.sign);
        for (int k = g.lane(); k < tile_size; k += g.lanes) {
            int64_t r = r0 + (k >> t.shift), col = c0 + (k & (t.C - 1));
            if (r < t.rows && col < t.cols) to[r * t.cols + col] = s.v[k];
        }
    });
}
