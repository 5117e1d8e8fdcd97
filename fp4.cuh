// fp4.cuh: the numbers. Small floats (E2M1, E4M3, E5M2, and E8M0 for scales), blocks that share a scale, rounding, Hadamard, packing.
//
// A cell (Cell) says how a matrix becomes the operand of a GEMM. quantise() obeys it in two passes over the matrix:
//
//     tensor_scale()   amax of the whole matrix -> S_enc, S_dec                    (only formats with a tensor scale; of row amaxes, if noted)
//     row_scales()     amax of each row -> its scale                               (FP8 with block = row)
//     quantise()       tile by tile: load, Hadamard, amax of every block -> block scale, round every element, store
//
// Both operands that one matrix becomes, along its rows and down its columns, can be made in one such pass: quantise() takes a list of jobs.
//
// NVFP4 in numbers: a tensor whose amax is 12, and in it a block of 16 elements whose amax is 1.7.
//
//     S_enc = 448 x 6 / 12 = 224, S_dec = 1/224      S_enc takes elements into the grids' range; S_dec takes the GEMM's result back
//     1.7 x S_enc / 6 = 63.47, as E4M3 64            the block's scale byte: its largest element shall land on the code 6
//     224 / 64 = 3.5                                 what elements of this block are multiplied by before they are rounded to E2M1:
//     1.7 -> 5.95 -> 6,  0.4 -> 1.4 -> 1.5           the codes
//     6 x 64 = 384,  1.5 x 64 = 96                   what is stored; times S_dec they are 1.714 and 0.429
//
// What it stores is *code times block scale*, exactly, in bf16: E2M1 has 2 significant bits and an E4M3 scale 4, so that their product
// has 6 at most, and bf16 holds 8. A bf16 GEMM of such operands with float accumulation, its result multiplied by both S_dec, multiplies
// the very numbers that an FP4 tensor core multiplies; only the order of the float additions differs. (In bf16's normal range: a product
// below 2^-126 may lose bits.) Where asked it also packs the operand as a tensor core wants it: codes, two a byte along the contracted
// axis, and scale bytes.
//
// One function serves both axes. A *unit* is 16 elements along the contracted axis: 16 neighbours of a row, or 16 rows of a column; a
// block is one unit (16), two (32), or all units of a square. The matrix is cut into *tiles* of 256 units, 4096 elements, which lie in
// shared memory (on a CPU: in the nearest cache) while all of the above happens to them, so that memory is read once and written once.
//
// Rules and sources: NVFP4 as TransformerEngine computes it (core_nvfp4.cuh; arXiv 2509.25149 appendix B) but for two points: a block
// whose scale rounds to zero writes zeros, not saturated codes under a zero scale (the decoded values agree); and a NaN or infinity
// is not ignored but makes the scale NaN, so that the training loop's guard sees it. MX: OCP Microscaling 1.0, arXiv 2506.08027.
// Four-over-six: arXiv 2512.02010. The byte-for-byte statement of all this, and files to test against: test/vectors/README.md.
//
// Tests: make build/cpu/test_fp4 build/cpu/test_quantise, then run them; the kernel step by step from a naive one: dev/ladder_quantise.cu.
#pragma once
#include "device.cuh"   // for_rows, for_tiles, philox

// ---------------------------------------------------------------------------------------------------------------------------
// Small floats: one sign bit, then exponent and mantissa; below min_normal the steps stay those of min_normal.

struct Minifloat {
    int drop;                   // mantissa bits that a float has more: 23 - m
    float min_normal, max;
    uint8_t nan, sign;          // the code of NaN; the sign's bit
};
constexpr Minifloat e2m1 = {22, 1, 6, 0x7, 0x8};                                    // 0 .5 1 1.5 2 3 4 6; NaN becomes 6
constexpr Minifloat e4m3 = {20, 0.015625f, 448, 0x7f, 0x80};                        // OCP's fn variant: no infinity
constexpr Minifloat e5m2 = {21, 6.103515625e-5f, 57344, 0x7f, 0x80};

HD float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
// Of two magnitudes, compared as integers: a NaN is the largest.
HD float smaller(float a, float b) { return float_of(bits_of(a) < bits_of(b) ? bits_of(a) : bits_of(b)); }
HD float larger(float a, float b) { return float_of(bits_of(a) > bits_of(b) ? bits_of(a) : bits_of(b)); }
HD float with_sign(float q, float x) { return float_of(bits_of(q) | (bits_of(x) & 0x80000000u)); }

// x as the nearest value of f, ties to the even mantissa, saturating. (a + c) - c rounds a to multiples of c's last place; c is the
// power of two whose last place is f's step at a. E2M1 at 2.7: steps of 1, c = 2 x 2^22 = 2^23, 8388610.7 is rounded to 8388611: 3.
HD float round_nearest(float x, Minifloat f) {
    float a = smaller(magnitude(x), f.max);
    float c = float_of((bits_of(larger(a, f.min_normal)) & infinity_bits) + ((uint32_t)f.drop << 23));
    return with_sign((a + c) - c, x);
}

// x as one of its two neighbours in f, the upper one with the probability of where x lies between them: exact to 2^-17 of the gap,
// from r, 16 random bits. What f holds exactly never moves. Unbiased up to max; beyond, it saturates. The random bits are added to
// the mantissa's lower bits and these cut off; subnormals of f are lifted by min_normal so that their step is the float's, too.
// E2M1 at 2.7, between 2 and 3: of 65536 values of r, 0.7 x 65536 carry into the bits that stay and give 3.
HD float round_stochastic(float x, uint32_t r, Minifloat f) {
    float a = smaller(magnitude(x), f.max);
    float lift = a < f.min_normal ? f.min_normal : 0.f;
    uint32_t u = bits_of(a + lift) + (r << (f.drop - 16)) + (1u << (f.drop - 17));
    return with_sign(float_of(u & (0xffffffffu << f.drop)) - lift, x);
}

// The code of q, a value of f.
HD uint8_t encode(float q, Minifloat f) {
    float a = magnitude(q), lift = a < f.min_normal ? f.min_normal : 0.f;
    uint32_t normal = lift == 0.f ? 1u << (23 - f.drop) : 0;
    uint32_t code = ((bits_of(a + lift) - bits_of(f.min_normal)) >> f.drop) + normal;
    return (uint8_t)(code | (bits_of(q) >> 31 ? f.sign : 0));
}
// The code of any float as CUDA's conversions with saturation give it.
HD uint8_t convert_to(float x, Minifloat f) { return (bits_of(x) & 0x7fffffffu) > infinity_bits ? f.nan : encode(round_nearest(x, f), f); }

HD float decode(uint8_t code, Minifloat f) {
    uint32_t a = code & (f.sign - 1u), normal = 1u << (23 - f.drop), base = bits_of(f.min_normal);
    float v = a < normal ? float_of((a << f.drop) + base) - f.min_normal : float_of(((a - normal) << f.drop) + base);
    if (v > f.max) v = f.drop == e5m2.drop && a == 0x7c ? float_of(infinity_bits) : float_of(quiet_nan_bits);
    return code & f.sign ? -v : v;
}

// E8M0: byte f means 2^(f - 127), 0xff NaN. Of the scale for a block of this amax: `floor` takes amax's exponent less the largest
// element's (elements reach 2^(emax+1) and saturate), `ceil` the smallest power of two under which nothing saturates.
HD uint32_t e8m0_floor(float amax, Minifloat f) {
    uint32_t field = bits_of(amax) >> 23, emax = (bits_of(f.max) >> 23) - 127, low = field > emax ? field - emax : 0;
    return field == 255 ? 255 : low;
}
HD uint32_t e8m0_ceil(float amax, Minifloat f) {
    uint32_t u = bits_of(amax * (1.f / f.max)), up = (u + 0x7fffff) >> 23;      // any mantissa carries into the exponent
    up = u <= 0x400000 ? 0 : up;                                                // up to 2^-127, the smallest scale
    up = up < 254 ? up : 254;
    return bits_of(amax) >= infinity_bits ? 255 : up;
}
// Both ends need care: 2^-127 (byte 0) and 1 / 2^127 (of byte 254) are subnormal floats, whose bits are 0x00400000.
HD float decode_e8m0(uint32_t f) {
    uint32_t u = f == 0 ? 0x00400000u : f << 23;
    return float_of(f == 255 ? quiet_nan_bits : u);
}
HD float inverse_e8m0(uint32_t f) {
    uint32_t u = f == 254 ? 0x00400000u : (254 - f) << 23;
    return float_of(f == 255 ? quiet_nan_bits : u);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Cells

enum class Format { f32, bf16, fp8, fp8_e5m2, mxfp8, nvfp4, mxfp4, e2m1 };   // e2m1: blocks of 16 whose scales stay floats
enum class Block { vector, square, row };             // 1 x 16 (MX: 1 x 32) along the contracted axis; 16 x 16 (32 x 32); FP8 alone: all of a row
enum class Rounding { nearest, stochastic };          // stochastic: unbiased, at the price of a larger error; of use where errors add up
enum class Scale { te, headroom, four_six, po2, floor, ceil };                // te: TransformerEngine's; the others below
enum class Signs { fixed, random, plus };             // before a Hadamard, lest elements that are all alike pile up in its first output
enum class Factors { nearest, stochastic, exact };    // a split operand's thin factors: rounded to the operand's format, or bf16
enum class Along { contracted, other };               // blocks along the axis that the GEMM contracts, as tensor cores need them, or not
enum class Draws { own, before };                     // random bits of its own, or those of the matrix's operand before: then the same values
enum class Residual { quantised, exact };             // what the residual is taken against: the low-rank part as rounded, or unrounded
enum class Carrier { own, e4m3, e5m2 };               // codes and scale bytes; or their products, as FP8 numbers under one scale a tensor

// How one operand is prepared. Formats without blocks ignore `block` and `scale`; f32 and bf16 ignore all else. A new field also belongs
// into operator== below (or linear_backward() may take one cell's operand for another's), and into recipes.cuh.
struct Cell {
    Format format;
    Block block = Block::vector;
    Rounding rounding = Rounding::nearest;
    Scale scale = Scale::te;        // NVFP4: te, headroom (blocks scaled by 17/16, so that nothing saturates), four_six, po2; MX: floor, ceil
    int hadamard = 0;               // 0, 16, 32, 64 or 128 along the contracted axis, on both operands of a GEMM, which cancels
    Signs signs = Signs::fixed;     // of the Hadamard: TransformerEngine's 16, drawn for every call, or none
    bool split = false;             // into a low-rank part and a residual, each quantised on its own (metis.cuh)
    Factors factors = Factors::nearest;
    Residual residual = Residual::quantised;
    Along along = Along::contracted;
    Draws draws = Draws::own;
    Carrier carrier = Carrier::own; // of a 4-bit format whose block scales are powers of two
};
inline bool operator==(Cell a, Cell b) {
    return a.format == b.format && a.block == b.block && a.rounding == b.rounding && a.scale == b.scale && a.hadamard == b.hadamard &&
           a.signs == b.signs && a.split == b.split && a.factors == b.factors && a.residual == b.residual && a.along == b.along && a.draws == b.draws &&
           a.carrier == b.carrier;
}

HD bool is_quantised(Format f) { return f > Format::bf16; }
HD bool has_blocks(Format f) { return f >= Format::mxfp8; }
HD bool is_float_stored(Format f) { return f == Format::f32 || f == Format::e2m1; }      // no bf16 holds its values
HD bool is_mx(Format f) { return f == Format::mxfp4 || f == Format::mxfp8; }
HD bool is_4bit(Format f) { return f >= Format::nvfp4; }
HD int block_length(Format f) { return is_mx(f) ? 32 : 16; }
inline Minifloat element_of(Format f) { return is_4bit(f) ? e2m1 : f == Format::fp8_e5m2 ? e5m2 : e4m3; }

// A GPU without FP4 units has FP8 ones, and an E2M1 code times a power of two is an FP8 number: exactly, over 15 binades of scales in E4M3
// and 29 in E5M2. So 4-bit operands with power-of-two block scales (MXFP4; NVFP4 under po2) go through FP8 units, their largest scale where
// FP8 ends and one float a tensor for the rest. Blocks further below lose bits, on all machines alike; the tally counts them (lost).
HD bool is_carried(Cell c) { return c.carrier != Carrier::own; }
inline Minifloat stored_as(Cell c) { return c.carrier == Carrier::e4m3 ? e4m3 : c.carrier == Carrier::e5m2 ? e5m2 : element_of(c.format); }
HD bool has_scale_bytes(Cell c) { return has_blocks(c.format) && !is_carried(c); }
HD bool is_fp8(Format f) { return f == Format::fp8 || f == Format::fp8_e5m2; }
HD bool has_row_scales(Cell c) { return is_fp8(c.format) && c.block == Block::row; }
HD bool has_tensor_scale(Cell c) { return (is_fp8(c.format) && c.block != Block::row) || c.format == Format::nvfp4 || is_carried(c); }
// The exponent of the largest power-of-two block scale that c's storage has room for: 6 times it is the largest value.
inline int top_exponent(Cell c) { return c.carrier == Carrier::e4m3 ? 6 : c.carrier == Carrier::e5m2 ? 13 : 8; }

// The axis of the source that the GEMM contracts: along its rows, or down its columns.
enum class Axis { row, column };

// Scales of one call, computed on the host from the cell. S_enc takes the tensor's amax to `full`: in NVFP4 the largest block
// scale times `top`, the code on which the largest element of a block lands; in FP8 the largest code.
struct ScaleRule { float full, top, inverse_top; };
inline ScaleRule scale_rule(Cell c) {
    if (c.scale == Scale::po2) return {std::ldexp(6.f, top_exponent(c)), 6.f, 1.f / 6};
    if (c.format != Format::nvfp4) return {element_of(c.format).max, 0, 0};
    bool room = c.scale == Scale::headroom || (c.scale == Scale::four_six && c.rounding == Rounding::stochastic);
    float top = room ? 96.f / 17.f : 6.f, cap = c.scale == Scale::four_six ? 256.f : 448.f;
    return {cap * top, top, 1.f / top};
}

// ---------------------------------------------------------------------------------------------------------------------------
// Tiles: 4096 elements in float near the lanes
//
// Element (r, c) of a tile of R x C lies at v[r C + c], whichever axis is contracted. What differs is which 16 elements are a unit:
//
//     contracted along rows                             contracted down columns (here C = 32 and R = 128)
//     unit u = v[16 u] ... v[16 u + 15]                 unit u = rows 16 (u / C) ... + 15 of column u % C
//
//         0000000000000000111111111111111122...             0 1 2 3 ... 31          row 0
//         (R = 16, C = 256: 16 units a row)                 0 1 2 3 ... 31          row 1 ... 15
//                                                          32 33 34  ... 63         row 16 ...
//
// In the second picture neighbouring lanes work on neighbouring columns, that is on neighbours in memory, each down its own unit: both
// axes are read and written along rows of memory, and no element is ever moved to another place of the tile.

constexpr int tile_size = 4096, tile_units = 256;
struct QuantStage {                                                 // 31 KB of shared memory
    float v[tile_size];                                             // elements; after rounding their codes, or code times scale
    union {                                                         // not at once: the low-rank part is gone before anything is rounded
        uint16_t random[tile_size];                                 // 16 bits an element, for stochastic rounding
        float low[tile_size / 2];                                   // 16 columns of a low-rank part's A, for the tile's rows
    };
    float amax[tile_units], enc[tile_units], dec[tile_units];       // per unit: amax; element -> code; code -> stored value
    float enc4[tile_units], dec4[tile_units], err6[tile_units], err4[tile_units];       // the same and its error, the largest element on 4 or on 6
    float group[16];                                                // of square blocks: what 16 units have in common
    float sign[128];                                                // of the Hadamard
};

// How a matrix is cut into tiles of R x C elements, C = 2^shift: `across` side by side, `count` in all; those at the edges are partly empty.
// Column blocks need all rows of a Hadamard or a block at once: tile_height().
struct TileShape {
    bool along_row;                         // which of the two pictures above
    int R, shift, C;
    int64_t rows, cols, across, count;
};
// Square blocks are the same along both axes: theirs is always the second picture, whose rows of units are rows of squares.
inline bool lies_along_row(Cell c, Axis axis) { return axis == Axis::row && !(has_blocks(c.format) && c.block == Block::square); }
inline int tile_height(Cell c, Axis axis) {
    int block = has_blocks(c.format) ? block_length(c.format) : 16;
    return lies_along_row(c, axis) ? 16 : std::max(block, c.hadamard);
}
inline TileShape tile_shape(Cell c, Axis axis, int64_t rows, int64_t cols, int height = 0) {      // at least `height` rows a tile
    TileShape s;
    s.along_row = lies_along_row(c, axis);
    height = std::max(height, tile_height(c, axis));
    s.C = 256, s.shift = 8;
    while (s.C > 32 && (tile_size / s.C < height || s.C / 2 >= cols)) s.C /= 2, s.shift--;      // narrow matrices: more rows a tile
    s.R = tile_size / s.C;
    s.rows = rows, s.cols = cols;
    s.across = (cols + s.C - 1) / s.C;
    s.count = s.across * ((rows + s.R - 1) / s.R);
    return s;
}

// Extent of the tile at (r0, c0) that is inside the matrix.
HD int height_at(const TileShape& t, int64_t r0) { return (int)(t.rows - r0 < t.R ? t.rows - r0 : t.R); }
HD int width_at(const TileShape& t, int64_t c0) { return (int)(t.cols - c0 < t.C ? t.cols - c0 : t.C); }

// f(k, unit) for every element k of the tile; ahead(k, n) on the way, for every run of n elements from k on.
template <class G, class F, class A = Nothing> HD void elements(G g, const TileShape& t, F f, A ahead = {}) {
    if (t.along_row) g.grid16(tile_units, [&](int i, int j) { f(16 * i + j, i); }, [&](int i) { ahead(16 * i, 16); });
    else if constexpr (G::lanes > 1)                                                // a row may have fewer elements than the group lanes
        g.tile(t.R, t.C, t.shift, [&](int r, int c) { f((r << t.shift) + c, (r / 16 << t.shift) + c); });
    else
        for (int r = 0; r < t.R; r++) {
            ahead(r << t.shift, t.C);
            int row = r << t.shift, units = r / 16 << t.shift;
            g.each(t.C, [&](int c) { f(row + c, units + c); });
        }
}
// to[unit] = the 16 values of the unit under op, in a fixed order; any_order: op does not care, as a maximum.
template <bool any_order = false, class G, class V, class Op> HD void units(G g, const TileShape& t, float* to, V value, Op op) {
    if (t.along_row) g.template fold16<any_order>(tile_units, [&](int i, int j) { return value(16 * i + j, i); }, op, to);
    else if constexpr (G::lanes > 1) g.tile(t.R / 16, t.C, t.shift, [&](int b, int c) {
        int first = (b * 16 << t.shift) + c, u = (b << t.shift) + c, C = t.C;
        to[u] = tree16([&](int j) { return value(first + j * C, u); }, op);
    });
    else
        for (int b = 0; b < t.R / 16; b++) {
            int first = b * 16 << t.shift, u = b << t.shift, C = t.C;
            g.fold_rows16(C, [&](int j, int c) { return value(first + j * C + c, u + c); }, op, to + u);
        }
}
// Gives every unit of a block what op makes of all the block's units. wide: blocks of 32, which are two units side by side along the
// contracted axis. square: blocks of 16 x 16 (32 x 32), which are 16 units side by side across it (and, wide, two such rows of units):
// `group`, 16 floats of scratch, has one value for each run of 16 units.
template <class G, class Op> HD void combine(G g, const TileShape& t, float* x, float* group, bool square, bool wide, Op op) {
    if (wide) {
        int apart = t.along_row ? 1 : t.C;
        g.sync();
        g.each(tile_units / 2, [&](int i) {
            int a = t.along_row ? 2 * i : (i >> t.shift) * 2 * t.C + (i & (t.C - 1));
            x[a] = x[a + apart] = op(x[a], x[a + apart]);
        });
    }
    if (square) {
        g.sync();
        g.fold16(16, [&](int i, int j) { return x[16 * i + j]; }, op, group);
        g.sync();
        if (wide) g.each(8, [&](int i) { group[2 * i] = group[2 * i + 1] = op(group[2 * i], group[2 * i + 1]); });
        g.sync();
        g.grid16(16, [&](int i, int j) { x[16 * i + j] = group[i]; });
    }
    g.sync();
}

// v = the tile whose first element is (r0, c0) of `from`, as floats.
template <class G, class T> HD void load_tile(G g, const TileShape& t, float* v, const T* from, int64_t r0, int64_t c0) {
    int height = height_at(t, r0), width = width_at(t, c0);
    if (height < t.R || width < t.C) g.each(tile_size, [&](int k) { v[k] = 0; });       // zeros beyond the edge change no amax and no sum
    g.sync();
    int64_t ld = t.cols;
    const T* corner = from + r0 * ld + c0;
    g.tile(height, width, t.shift, [&](int r, int c) { v[(r << t.shift) + c] = (float)load(corner + r * ld + c); });
    g.sync();
}

// ahead(k, n) asks for n elements from k on of the tile after this one, to the right or below: tiles are no long runs that a CPU would
// foresee, and its arithmetic takes as long as memory does.
template <class G, class T> struct NextTile {
    const T* corner;
    int64_t ld;
    int shift;
    bool wanted;
    HD NextTile(G, const TileShape& t, const T* from, int64_t r0, int64_t c0, bool want = true)
        : corner(from + (c0 + t.C < t.cols ? r0 * t.cols + c0 + t.C : (r0 + t.R) * t.cols)), ld(t.cols), shift(t.shift), wanted(want) {}
    HD void operator()(int k, int n) const {
        if (wanted) G::fetch(corner + (k >> shift) * ld + (k & ((1 << shift) - 1)), n);
    }
};

// In place: every n elements along the axis times their signs, then times the n x n Sylvester-Hadamard matrix H over sqrt(n). H spreads an
// outlier over n elements, and as H H^T / n = 1, the GEMM of two operands that both went through it is unchanged: (P H)(Q H)^T / n = P Q^T.
// H of size 2h is [[H, H], [H, -H]]: log2(n) rounds of sums and differences of elements h apart, n log2(n) additions instead of n^2.
template <class G, class A = Nothing> HD void hadamard(G g, const TileShape& t, float* v, int n, const float* sign, A ahead = {}) {
    elements(g, t, [&](int k, int) { v[k] *= sign[(t.along_row ? k : k >> t.shift) & (n - 1)]; });
    for (int h = 1; h < n; h *= 2) {
        g.sync();
        int apart = t.along_row ? h : h << t.shift;                                 // a power of two: element k meets k + apart
        if (apart >= 16)
            g.grid16(tile_size / 32, [&](int i, int j) {
                int k = ((16 * i & ~(apart - 1)) << 1) + (16 * i & (apart - 1)) + j;
                float a = v[k], b = v[k + apart];
                v[k] = a + b, v[k + apart] = a - b;
            });
        else
            g.each(tile_size / 2, [&](int i) {
                int k = ((i & ~(apart - 1)) << 1) + (i & (apart - 1));
                float a = v[k], b = v[k + apart];
                v[k] = a + b, v[k + apart] = a - b;
            });
    }
    float root = n == 16 ? 0.25f : n == 32 ? 0.17677669f : n == 64 ? 0.125f : 0.088388346f;
    g.sync();
    elements(g, t, [&](int k, int) { v[k] *= root; }, ahead);
    g.sync();
}

// v -= A B on the tile: A (rows x k), B (k x cols), k a multiple of 16; 16 columns of A beside the tile and 16 rows of B at a time.
// 2 k FLOPs an element, in float: this is where Metis' residual comes into being, on its way through the quantiser, never stored.
template <class G> HD void subtract(G g, const TileShape& t, QuantStage& s, const acc_t* a, const acc_t* b, int k, int64_t r0, int64_t c0) {
    int width = width_at(t, c0);
    int64_t ld = t.cols;
    for (int k0 = 0; k0 < k; k0 += 16) {
        g.grid16(t.R, [&](int r, int j) { s.low[16 * r + j] = r0 + r < t.rows ? (float)-a[(r0 + r) * k + k0 + j] : 0.f; });
        g.sync();
        const acc_t* below = b + k0 * ld + c0;
        for (int r = 0; r < t.R; r += 8) {                                          // eight rows share what is read of B
            float* v = s.v + (r << t.shift);
            const float* row = s.low + 16 * r;
            int C = t.C;
            g.each(width, [=](int c) {
                float x[8];
                #pragma GCC unroll 8
                for (int i = 0; i < 8; i++) x[i] = v[i * C + c];
                #pragma GCC unroll 16
                for (int j = 0; j < 16; j++) {
                    float y = (float)below[j * ld + c];
                    #pragma GCC unroll 8
                    for (int i = 0; i < 8; i++) x[i] = fmaf(row[16 * i + j], y, x[i]);
                }
                #pragma GCC unroll 8
                for (int i = 0; i < 8; i++) v[i * C + c] = x[i];
            });
        }
        g.sync();
    }
}

// TransformerEngine's signs (nvfp4_tensor.py, get_wgrad_sign_vector), repeated; or the bits of one draw; or none.
template <class G> HD void hadamard_signs(G g, float* sign, Signs kind, Words random) {
    const uint32_t fixed = 0xd7e8;                                                  // bit i set: element i is negated
    g.each(128, [&](int i) {
        uint32_t bit = kind == Signs::plus ? 0 : kind == Signs::fixed ? fixed >> (i & 15) : random.w[i / 32] >> (i & 31);
        sign[i] = bit & 1 ? -1.f : 1.f;
    });
    g.sync();
}

// 16 bits for every element, named by its place in the matrix, so that neither tiles nor threads can change them: 128 neighbours of a
// row share 16 draws of Philox (4 words of 32 bits: 8 numbers of 16), of which column c takes number c / 16 % 8 of draw c % 16.
template <class G> HD void draw_tile(G g, const TileShape& t, uint16_t* random, RandomKey key, int64_t r0, int64_t c0) {
    int64_t groups = (t.cols + 127) / 128;
    int parts = t.C < 128 ? t.C / 16 : 8, per_row = t.C < 128 ? 1 : t.C / 128, first = (int)(c0 % 128) / 16;
    auto block = [&](int i) { return (uint64_t)((r0 + i / per_row) * groups + c0 / 128 + i % per_row) * 16; };
    if (parts == 8) g.draw16(t.R * per_row, key, block, [&](int i, int lane, Words w) {
        for (int p = 0; p < 8; p++) random[128 * i + 16 * p + lane] = (uint16_t)(w.w[p / 2] >> 16 * (p % 2));
    });
    else g.draw16(t.R, key, block, [&](int i, int lane, Words w) {
        for (int p = 0; p < parts; p++) random[(i << t.shift) + 16 * p + lane] = (uint16_t)(w.w[(first + p) / 2] >> 16 * ((first + p) % 2));
    });
    g.sync();
}

// ---------------------------------------------------------------------------------------------------------------------------
// Quantising

struct quantise_amax; struct quantise_scale; struct quantise_tiles; struct quantise_tally;

// What one call works on: a matrix (rows x cols), contiguous, whose operand is (outer x inner): rows x cols, or of axis column cols x rows.
// scale (2 floats: S_enc, S_dec) and partial (quantise_partials() floats) are scratch that the call fills.
// `key` names the draws of stochastic rounding, `sign_key` those of random signs: the two operands of a GEMM share it.
struct QuantCall {
    Cell cell;
    Axis axis;
    int64_t rows, cols;
    RandomKey key, sign_key;
    float *scale, *partial;
    float* tally = nullptr;         // where to add the sums of Tally over one tile in 64; null: nowhere
    int64_t ld = 0;                 // the row length of what quantise() writes; 0: cols
    const acc_t *low_a = nullptr, *low_b = nullptr;     // a low-rank part (rows x k)(k x cols) that is taken away first, tile by tile
    int k = 0;
    const float* row_amax = nullptr;                    // max |x| of every row of the source, where whoever wrote it took note; else null
    float* row_scale = nullptr;                         // where row_scales() leaves them (outer); null: in `partial`
    bool scaled = false;                                // S_enc and S_dec are there already, from another operand of the same matrix
};
// Sums over sampled elements x (less the low-rank part) and their quantised values y: (y - x)^2, the operand's squares, elements that became
// zero, elements beyond the largest code; how many were looked at; and whose product of code and scale the carrier does not hold.
struct Tally {
    float error, energy, zero, saturated, count, lost;
    enum { at_error, at_energy, at_zero, at_saturated, at_count, at_lost };            // where each lies
};
constexpr int tally_every = 64, tally_sums = sizeof(Tally) / sizeof(float);

// A tensor core's operand: codes of (outer x inner) with the contracted axis inner, padded to whole blocks; one scale byte a block.
// Square blocks repeat their scale for each of their outer rows. FP8, and what it carries: a byte an element, no scale bytes.
enum class ScaleOrder { plain, tiled };         // row-major; or in tiles of 128 x 4, as cuBLASLt and tcgen05 read them
struct Packed {
    uint8_t *codes = nullptr, *scales = nullptr;
    ScaleOrder order = ScaleOrder::plain;
};
// In the tiled order, a tile is 128 rows by 4 blocks, 512 bytes: 16 bytes for each of 32 rows, 4 for row r and those 32, 64 and 96 below it.
// (cuBLAS, "1D Block Scaling Factors Layout".) Rows beyond the last, up to 128, and blocks, up to 4, are there and must be no NaN.
HD int packed_block(Cell c) { return has_scale_bytes(c) ? block_length(c.format) : 16; }
HD bool is_nibbles(Cell c) { return is_4bit(c.format) && !is_carried(c); }
HD int64_t packed_inner(Cell c, int64_t inner) { return (inner + packed_block(c) - 1) / packed_block(c) * packed_block(c); }
inline size_t packed_bytes(Cell c, int64_t outer, int64_t inner) { return (size_t)(outer * packed_inner(c, inner) / (is_nibbles(c) ? 2 : 1)); }
HD int64_t scale_offset(int64_t r, int64_t b, int64_t blocks, ScaleOrder order) {
    if (order == ScaleOrder::plain) return r * blocks + b;
    return (r / 128 * ((blocks + 3) / 4) + b / 4) * 512 + r % 32 * 16 + r % 128 / 32 * 4 + b % 4;
}
inline size_t packed_scale_bytes(Cell c, int64_t outer, int64_t inner, ScaleOrder order) {
    int64_t blocks = packed_inner(c, inner) / block_length(c.format);
    return (size_t)(order == ScaleOrder::plain ? outer * blocks : (outer + 127) / 128 * ((blocks + 3) / 4) * 512);
}

constexpr int64_t amax_chunk = 16384, amax_rows = 256;
// Floats of scratch: partial amaxes; or a tally for each sampled tile; then scales of rows, and partial amaxes of columns.
inline int64_t tile_partials(Cell c, int64_t rows, int64_t cols) {
    int64_t tiles = 0;
    for (int height = 16; height <= 128; height *= 2)                              // beside another operand tiles may be higher than its own
        for (Axis axis : {Axis::row, Axis::column}) tiles = std::max(tiles, tile_shape(c, axis, rows, cols, height).count);
    return std::max((rows * cols + amax_chunk - 1) / amax_chunk, tiles + tally_sums * (tiles / tally_every + 1));
}
inline int64_t quantise_partials(Cell c, int64_t rows, int64_t cols) {
    return tile_partials(c, rows, cols) + (has_row_scales(c) ? std::max(rows, cols) + (rows + amax_rows - 1) / amax_rows * cols : 0);
}

// |x| for a maximum that a NaN must win: infinity stands for both.
HD float magnitude_or_infinity(float x) {
    uint32_t u = bits_of(x) & 0x7fffffffu;
    return float_of(u < infinity_bits ? u : infinity_bits);
}

// to (null: nowhere) = the amax of a row that the group has just written, from the cache: a pass over memory less for tensor_scale().
template <class G, class T> HD void note_amax(G g, float* to, const T* row, int n) {
    if (!to) return;
    g.sync();
    acc_t m = g.max(n, [](acc_t v) { return (acc_t)magnitude_or_infinity((float)v); }, row);
    if (g.lane() == 0) *to = (float)m;
}

// scale[0] = S_enc, scale[1] = S_dec from the amax of the whole matrix: of what is quantised, that is without a low-rank part and after the
// Hadamard, where there are such; then every tile is worked out here once and in quantise() again, and never stored.
// Else the row amaxes that the matrix's producer noted save the pass over memory. Two launches: partial maxima, then one block for all.
template <class From> void tensor_scale(Ctx& ctx, const QuantCall& q, const From* from) {
    int64_t n = q.rows * q.cols, parts;
    const float* partial = q.partial;
    float* own = q.partial;
    if (q.cell.hadamard || q.k) {
        TileShape t = tile_shape(q.cell, q.axis, q.rows, q.cols);
        Cell cell = q.cell;
        RandomKey sign_key = q.sign_key;
        const acc_t *low_a = q.low_a, *low_b = q.low_b;
        int k = q.k;
        parts = t.count;
        for_tiles<quantise_amax, QuantStage>(ctx, {n * sizeof(From) * 1., 2. * n * k}, t.count, KERNEL(Group<256> g, int64_t i, QuantStage& s) {
            int64_t r0 = i / t.across * t.R, c0 = i % t.across * t.C;
            NextTile<Group<256>, From> ahead(g, t, from, r0, c0);
            load_tile(g, t, s.v, from, r0, c0);
            if (k) subtract(g, t, s, low_a, low_b, k, r0, c0);
            if (cell.hadamard) {
                hadamard_signs(g, s.sign, cell.signs, philox(now(sign_key), 0));
                hadamard(g, t, s.v, cell.hadamard, s.sign, ahead);
            }
            acc_t m = g.max(tile_size, [](acc_t v) { return (acc_t)magnitude_or_infinity((float)v); }, (const float*)s.v);
            if (g.lane() == 0) own[i] = (float)m;
        });
    } else if (q.row_amax) parts = q.rows, partial = q.row_amax;
    else {
        parts = (n + amax_chunk - 1) / amax_chunk;
        for_rows<quantise_amax, 256>(ctx, {n * sizeof(From) * 1., 0}, parts, KERNEL(Group<256> g, int64_t r) {
            acc_t m = g.max(piece(n, r, amax_chunk), [](acc_t v) { return (acc_t)magnitude_or_infinity((float)v); }, from + r * amax_chunk);
            if (g.lane() == 0) own[r] = (float)m;
        });
    }
    float* scale = q.scale;
    float full = scale_rule(q.cell).full;
    bool mx = is_mx(q.cell.format), ceil = q.cell.scale == Scale::ceil;
    int top = top_exponent(q.cell);
    for_rows<quantise_scale, 256>(ctx, {parts * sizeof(float) * 1., 0}, 1, KERNEL(Group<256> g, int64_t) {
        float amax = (float)g.max((int)parts, [](acc_t v) { return v; }, (const float*)partial);
        float enc = full / amax;
        enc = enc < float_max ? enc : float_max;
        if (mx) {                                                       // of a carried MX: the power of two that lifts the largest scale to the top
            int e = (int)(ceil ? e8m0_ceil(amax, e2m1) : e8m0_floor(amax, e2m1)) - 127 - top;
            enc = float_of((uint32_t)(127 - (e < -126 ? -126 : e)) << 23);
        }
        if (amax == 0) enc = 1;
        if (g.lane() == 0) scale[0] = enc, scale[1] = is_finite(amax) ? 1.f / enc : float_of(quiet_nan_bits);
    });
}

// FP8 rows: the smallest normal power of two under which nothing of the row saturates. FP8 has exponents of its own, so a finer scale would
// resolve no better; and bf16 holds code times scale.
HD float row_scale(float amax, Minifloat f) {
    uint32_t e = e8m0_ceil(amax, f);
    return decode_e8m0(e ? e : 1);
}
inline float* row_scales_of(const QuantCall& q) { return q.row_scale ? q.row_scale : q.partial + tile_partials(q.cell, q.rows, q.cols); }

// Scales of the rows of the operand (outer): of the source's rows, or of its columns, whose amaxes come in chunks of 256 rows and then
// together, so that all lanes read along rows of memory.
template <class From> void row_scales(Ctx& ctx, const QuantCall& q, const From* from) {
    float* to = row_scales_of(q);
    int64_t rows = q.rows, cols = q.cols;
    Minifloat f = element_of(q.cell.format);
    Cost cost = {(double)rows * cols * sizeof(From), 0};
    if (q.axis == Axis::row) {
        const float* noted = q.row_amax;
        for_rows<quantise_amax, 256>(ctx, noted ? Cost{} : cost, rows, KERNEL(Group<256> g, int64_t r) {
            acc_t m = noted ? (acc_t)noted[r] : g.max((int)cols, [](acc_t v) { return (acc_t)magnitude_or_infinity((float)v); }, from + r * cols);
            if (g.lane() == 0) to[r] = row_scale((float)m, f);
        });
        return;
    }
    const int64_t strip = 512, strips = (cols + strip - 1) / strip, chunks = (rows + amax_rows - 1) / amax_rows;
    float* partial = q.partial + tile_partials(q.cell, rows, cols) + std::max(rows, cols);
    for_rows<quantise_amax, 256>(ctx, cost, chunks * strips, KERNEL(Group<256> g, int64_t i) {
        int64_t first = i / strips * amax_rows, last = first + amax_rows < rows ? first + amax_rows : rows, c0 = i % strips * strip;
        int width = piece(cols, i % strips, strip);
        float* most = partial + i / strips * cols + c0;
        const From* corner = from + c0;
        if constexpr (decltype(g)::lanes > 1) g.each(width, [=](int c) {               // a lane its column
            float m = 0;
            for (int64_t r = first; r < last; r++) m = larger(m, magnitude_or_infinity((float)load(corner + r * cols + c)));
            most[c] = m;
        });
        else {                                                                         // row by row, or no vector would do
            g.each(width, [=](int c) { most[c] = 0; });
            for (int64_t r = first; r < last; r++)
                g.each(width, [=](int c) { most[c] = larger(most[c], magnitude_or_infinity((float)load(corner + r * cols + c))); });
        }
    });
    for_rows<quantise_scale, 256>(ctx, {}, strips, KERNEL(Group<256> g, int64_t i) {
        int64_t c0 = i * strip;
        g.each(piece(cols, i, strip), [=](int c) {
            float m = 0;
            for (int64_t k = 0; k < chunks; k++) m = larger(m, partial[k * cols + c0 + c]);
            to[c0 + c] = row_scale(m, f);
        });
    });
}

// The scale of a block of this amax: `code` multiplies elements into the grid, `value` (the scale byte's value) multiplies codes.
// base: amax / 6 in units of S_dec (amax / `top`, where the largest element is to land elsewhere), not above float's range.
struct BlockScale { float code, value; };
HD BlockScale nvfp4_scale(float base, float S_dec) {
    float s = round_nearest(base, e4m3), enc = 1.f / (s * S_dec);
    enc = enc < float_max ? enc : float_max;
    return {s == 0 ? 0.f : enc, s};
}
// po2: the smallest power of two under which nothing saturates, of the 18 binades down from `most` that E4M3 has.
HD BlockScale po2_scale(float base, float S_dec, float most) {
    float s = float_of((bits_of(base) + 0x7fffff) & infinity_bits), least = most * 0x1p-17f;
    s = s < least ? least : s;
    s = s < most ? s : most;
    float enc = 1.f / (s * S_dec);
    enc = enc < float_max ? enc : float_max;
    return {base == 0 ? 0.f : enc, base == 0 ? 0.f : s};
}
HD BlockScale mx_scale(float amax, Minifloat f, bool ceil) {
    uint32_t e = ceil ? e8m0_ceil(amax, f) : e8m0_floor(amax, f);
    return {inverse_e8m0(e), decode_e8m0(e)};
}

// The published Metis code's scale (Metis/quant.py): amax / 6 + 1e-9 in float.
HD BlockScale float_scale(float amax) {
    float s = amax / 6.f + 1e-9f;
    return {1.f / s, is_finite(amax) ? s : float_of(quiet_nan_bits)};
}

// Stores a value that has at most 8 significant bits: the upper half of the float is all of it.
HD void store_exact(bf16* p, float v) { p->bits = (uint16_t)(bits_of(v) >> 16); }
template <class T> HD void store_exact(T* p, float v) { *p = v; }

// One of the operands that a launch makes: where its values (rows x cols, call.ld apart; null: nowhere) and its packed form go. Below, what
// quantise() works out of the call's cell.
template <class To> struct QuantJob {
    QuantCall call;
    To* to = nullptr;
    Packed packed = {};
    TileShape tiles = {};
    Minifloat element = {}, holder = {};        // what elements are rounded to; what code times scale is stored as (the carrier's, if there is one)
    ScaleRule rule = {};
    float most = 0;                             // the largest power-of-two block scale
    const float* row_scale = nullptr;
    HD bool stochastic() const { return call.cell.rounding == Rounding::stochastic; }
    HD bool square() const { return has_blocks(call.cell.format) && call.cell.block == Block::square; }
    HD bool wide() const { return block_length(call.cell.format) == 32; }
    HD bool down() const { return call.axis == Axis::column; }
    HD float S_enc() const { return has_tensor_scale(call.cell) ? call.scale[0] : 1.f; }
    HD float S_dec() const { return has_tensor_scale(call.cell) ? call.scale[1] : 1.f; }
    // Codes wait in the stage to be packed, and become values only then.
    HD bool keeps_codes() const { return packed.codes && !is_carried(call.cell); }
};

template <class To, int n> struct QuantJobs { QuantJob<To> job[n]; };            // a struct, which a kernel can be given

// Whether one pass over a matrix can make both operands: a tile as high as both want must be as wide as a Hadamard along its rows.
inline bool in_one_pass(Cell a, Axis axis_a, Cell b, Axis axis_b) {
    int width = tile_size / std::max({tile_height(a, axis_a), tile_height(b, axis_b), 16});
    auto fits = [=](Cell c, Axis axis) { return !lies_along_row(c, axis) || c.hadamard <= width; };
    return fits(a, axis_a) && fits(b, axis_b);
}

// The steps of quantise_tile(), in their order. Each is given the stage as the one before left it; (r0, c0) is the tile's first element.

// 1. s.enc and s.dec of every unit: what its elements are multiplied by before they are rounded, and its codes after.
template <class G, class To> HD void scale_units(G g, const QuantJob<To>& job, QuantStage& s, int64_t r0, int64_t c0) {
    const Cell cell = job.call.cell;
    const TileShape t = job.tiles;
    const Minifloat f = job.element;
    const bool blocks = has_blocks(cell.format), down = job.down();
    const float S_enc = job.S_enc(), S_dec = job.S_dec(), *row_scale = job.row_scale;
    if (blocks) {
        auto greater = [](float a, float b) { return a > b ? a : b; };
        units<true>(g, t, s.amax, [&](int k, int) { return magnitude_or_infinity(s.v[k]); }, greater);
        combine(g, t, s.amax, s.group, job.square(), job.wide(), greater);
    }
    if (row_scale) g.each(tile_units, [&](int u) {
        int64_t o = down ? c0 + (u & (t.C - 1)) : r0 + (16 * u >> t.shift);            // which row of the operand
        float v = o < (down ? t.cols : t.rows) ? row_scale[o] : 1.f;
        s.enc[u] = 1.f / v, s.dec[u] = v;
    });
    else if (!blocks) g.each(tile_units, [&](int u) { s.enc[u] = S_enc, s.dec[u] = 1.f; });
    else if (is_mx(cell.format)) {
        const bool ceil = cell.scale == Scale::ceil;
        g.each(tile_units, [&](int u) {
            BlockScale b = mx_scale(s.amax[u], f, ceil);
            s.enc[u] = b.code, s.dec[u] = b.value * S_enc;                     // S_enc is 1 unless carried
        });
    } else if (cell.format == Format::e2m1) g.each(tile_units, [&](int u) {
        BlockScale b = float_scale(s.amax[u]);
        s.enc[u] = b.code, s.dec[u] = b.value;
    });
    else {
        const bool po2 = cell.scale == Scale::po2;
        const float per_amax = S_enc * job.rule.inverse_top, most = job.most;
        g.each(tile_units, [&](int u) {
            float base = s.amax[u] * per_amax;
            base = base < float_max ? base : float_max;
            BlockScale b = po2 ? po2_scale(base, S_dec, most) : nvfp4_scale(base, S_dec);
            s.enc[u] = b.code, s.dec[u] = b.value;
        });
    }
    g.sync();
}

// A code before its rounding, rounded: to nearest, or with element k's random bits.
template <bool stochastic> HD float round_code(const QuantStage& s, float code, int k, Minifloat f) {
    return stochastic ? round_stochastic(code, s.random[k], f) : round_nearest(code, f);
}

// 2. Four over six (arXiv 2512.02010): E2M1 has nothing between 4 and 6, so a block whose large elements lie near 5/6 of its amax errs much.
// The same block is tried with its largest element on 4, the scale 3/2 as large; whichever has the smaller squared error stays.
template <class G, class To> HD void choose_four(G g, const QuantJob<To>& job, QuantStage& s) {
    const TileShape t = job.tiles;
    const Minifloat f = job.element;
    const float S_dec = job.S_dec(), per_amax = job.S_enc() * job.rule.inverse_top;
    g.each(tile_units, [&](int u) {
        float base = s.amax[u] * per_amax;
        BlockScale b = nvfp4_scale(1.5f * (base < float_max ? base : float_max), S_dec);
        s.enc4[u] = b.code, s.dec4[u] = b.value;
    });
    g.sync();
    auto sum = [](float a, float b) { return a + b; };
    auto errors = [&](auto round, const float* enc, const float* dec, float* to) {
        units(g, t, to, [&](int k, int u) {
            float d = round(s.v[k] * enc[u], k) * dec[u] * S_dec - s.v[k];
            return d * d;
        }, sum);
    };
    auto nearest = [&](float v, int k) { return round_code<false>(s, v, k, f); };
    auto random = [&](float v, int k) { return round_code<true>(s, v, k, f); };
    if (job.stochastic()) errors(random, s.enc, s.dec, s.err6), errors(random, s.enc4, s.dec4, s.err4);
    else errors(nearest, s.enc, s.dec, s.err6), errors(nearest, s.enc4, s.dec4, s.err4);
    combine(g, t, s.err6, s.group, job.square(), false, sum);
    combine(g, t, s.err4, s.group, job.square(), false, sum);
    g.each(tile_units, [&](int u) {
        bool four = s.err4[u] < s.err6[u];
        s.enc[u] = four ? s.enc4[u] : s.enc[u], s.dec[u] = four ? s.dec4[u] : s.dec[u];
    });
    g.sync();
}

// 3. The tile's terms of a Tally. energy: the sum of its squares before a low-rank part was taken away.
template <class G, class To> HD void tally_tile(G g, const QuantJob<To>& job, QuantStage& s, float* tally, float energy, int64_t r0, int64_t c0) {
    const TileShape t = job.tiles;
    const Minifloat f = job.element, holder = job.holder;
    const bool carried = is_carried(job.call.cell), stochastic = job.stochastic();
    const float S_dec = job.S_dec();
    for (int term = 0; term < tally_sums; term++) {
        units(g, t, s.err4, [&](int k, int u) {
            float x = s.v[k], code = x * s.enc[u];
            float exact = (stochastic ? round_code<true>(s, code, k, f) : round_code<false>(s, code, k, f)) * s.dec[u];
            float held = carried ? round_nearest(exact, holder) : exact, y = held * S_dec;
            bool inside = r0 + (k >> t.shift) < t.rows && c0 + (k & (t.C - 1)) < t.cols;
            return term == Tally::at_error ? (y - x) * (y - x)
                 : term == Tally::at_zero ? (y == 0 && x != 0 ? 1.f : 0.f)
                 : term == Tally::at_saturated ? (magnitude(code) > f.max ? 1.f : 0.f)
                 : term == Tally::at_count ? (inside ? 1.f : 0.f)
                 : term == Tally::at_lost ? (held != exact ? 1.f : 0.f) : 0.f;
        }, [](float a, float b) { return a + b; });
        g.sync();
        float total = (float)g.sum(tile_units, [](acc_t v) { return v; }, (const float*)s.err4);
        if (g.lane() == 0) tally[term] = term == Tally::at_energy ? energy : total;
        g.sync();
    }
}

// 4. Elements become what is stored, code times scale; or, if they are still to be packed, codes. Loops of their own for nearest and
// stochastic, so that each is straight, for a CPU's vectors; on the way the next tile is fetched.
template <class G, class To, class From> HD void round_tile(G g, const QuantJob<To>& job, QuantStage& s, NextTile<G, From> ahead) {
    const TileShape t = job.tiles;
    const Minifloat f = job.element, holder = job.holder;
    const bool codes = job.keeps_codes(), stochastic = job.stochastic();
    if (codes && stochastic) elements(g, t, [&](int k, int u) { s.v[k] = round_code<true>(s, s.v[k] * s.enc[u], k, f); });
    else if (codes) elements(g, t, [&](int k, int u) { s.v[k] = round_code<false>(s, s.v[k] * s.enc[u], k, f); });
    else if (stochastic) elements(g, t, [&](int k, int u) { s.v[k] = round_code<true>(s, s.v[k] * s.enc[u], k, f) * s.dec[u]; }, ahead);
    else elements(g, t, [&](int k, int u) { s.v[k] = round_code<false>(s, s.v[k] * s.enc[u], k, f) * s.dec[u]; }, ahead);
    g.sync();
    if (is_carried(job.call.cell)) {                                // an FP8 number, or, of a scale too far below the largest, the nearest one
        elements(g, t, [&](int k, int) { s.v[k] = round_nearest(s.v[k], holder); });
        g.sync();
    }
}

// 5. The packed form: codes of (outer x inner), the contracted axis inner, and a scale byte a block.
template <class G, class To> HD void pack_tile(G g, const QuantJob<To>& job, const QuantStage& s, int64_t r0, int64_t c0) {
    const QuantCall& call = job.call;
    const TileShape t = job.tiles;
    const Packed packed = job.packed;
    const Minifloat holder = job.holder;
    const bool down = job.down(), nibbles = is_nibbles(call.cell), mx = is_mx(call.cell.format);
    const int64_t outer = down ? call.cols : call.rows, inner = packed_inner(call.cell, down ? call.rows : call.cols);
    const int64_t outer0 = down ? c0 : r0, inner0 = down ? r0 : c0;
    const int extent = down && !t.along_row ? t.R : t.C;                               // of the tile, along the inner axis
    const int step = nibbles ? 2 : 1;                                                  // codes in a byte
    const int64_t ld = inner / step;
    g.each(tile_size / step, [&](int j) {
        int i = j * step % extent, o = j * step / extent;
        if (outer0 + o >= outer || inner0 + i >= inner) return;
        int k = down ? (i << t.shift) + o : (o << t.shift) + i, next = k + (down ? t.C : 1);
        uint8_t code = encode(s.v[k], holder);
        if (nibbles) code = (uint8_t)(code | encode(s.v[next], holder) << 4);
        packed.codes[(outer0 + o) * ld + (inner0 + i) / step] = code;
    });
    if (!has_scale_bytes(call.cell)) return;
    const int length = job.wide() ? 32 : 16;
    const int64_t per_row = inner / packed_block(call.cell);
    g.each(tile_size / length, [&](int j) {
        int i = j * length % extent, o = j * length / extent;
        if (outer0 + o >= outer || inner0 + i >= inner) return;
        int r = down ? i : o, c = down ? o : i;
        float d = s.dec[t.along_row ? ((r << t.shift) + c) / 16 : (r / 16 << t.shift) + c];
        uint8_t byte = mx ? (uint8_t)(is_finite(d) ? bits_of(d) >> 23 : 255) : encode(d, e4m3);
        packed.scales[scale_offset(outer0 + o, (inner0 + i) / length, per_row, packed.order)] = byte;
    });
}

// Tile i of one operand. `last`: no other operand is made of this tile, and the next one may be fetched.
template <class G, class To, class From> HD void quantise_tile(G g, const QuantJob<To>& job, int64_t i, QuantStage& s, const From* from, bool last) {
    const QuantCall& call = job.call;
    const TileShape t = job.tiles;
    const Cell cell = call.cell;
    const int64_t r0 = i / t.across * t.R, c0 = i % t.across * t.C, ld = call.ld ? call.ld : call.cols;
    const int height = height_at(t, r0), width = width_at(t, c0);
    float* tally = call.tally && i % tally_every == 0 ? call.partial + t.count + tally_sums * (i / tally_every) : nullptr;
    To* corner = job.to + r0 * ld + c0;

    load_tile(g, t, s.v, from, r0, c0);
    float energy = tally ? (float)g.sum(tile_size, [](acc_t v) { return v * v; }, (const float*)s.v) : 0.f;
    if (call.k) subtract(g, t, s, call.low_a, call.low_b, call.k, r0, c0);
    if (cell.hadamard) {
        hadamard_signs(g, s.sign, cell.signs, philox(now(call.sign_key), 0));
        hadamard(g, t, s.v, cell.hadamard, s.sign);
    }
    if (job.stochastic()) draw_tile(g, t, s.random, now(call.key), r0, c0);
    if (job.to)
        for (int r = 0; r < height; r++) g.fetch(corner + r * ld, width);              // where results go, while scales are worked out

    scale_units(g, job, s, r0, c0);
    if (cell.format == Format::nvfp4 && cell.scale == Scale::four_six) choose_four(g, job, s);
    if (tally) tally_tile(g, job, s, tally, energy, r0, c0);
    round_tile(g, job, s, NextTile<G, From>(g, t, from, r0, c0, last));
    if (job.packed.codes) pack_tile(g, job, s, r0, c0);
    if (!job.to) return;
    if (job.keeps_codes()) {
        g.sync();
        elements(g, t, [&](int k, int u) { s.v[k] *= s.dec[u]; });
        g.sync();
    }
    g.tile(height, width, t.shift, [&](int r, int c) { store_exact(corner + r * ld + c, s.v[(r << t.shift) + c]); });
}

// Every job's operand of one matrix (rows x cols, contiguous), which is read once: a tile stays near the lanes while each job takes its turn
// with it. What a job makes: code times block scale of every element; and, where asked, the packed form. Call tensor_scale() or row_scales()
// first for formats that have them; jobs' `partial` and `scale` are their own.
// Bytes: the source once (of jobs after the first a tile comes from the cache), each operand written once; FLOPs: of a low-rank part.
template <class To, int n, class From> void quantise(Ctx& ctx, QuantJobs<To, n> jobs, const From* from) {
    Cost cost = {(double)jobs.job[0].call.rows * jobs.job[0].call.cols * sizeof(From), 0};
    int height = 0;
    for (const QuantJob<To>& j : jobs.job) height = std::max(height, tile_height(j.call.cell, j.call.axis));
    for (QuantJob<To>& j : jobs.job) {
        Cell cell = j.call.cell;
        j.tiles = tile_shape(cell, j.call.axis, j.call.rows, j.call.cols, height);
        j.element = element_of(cell.format), j.holder = stored_as(cell), j.rule = scale_rule(cell), j.most = std::ldexp(1.f, top_exponent(cell));
        j.row_scale = has_row_scales(cell) ? row_scales_of(j.call) : nullptr;
        cost.bytes += (double)j.call.rows * j.call.cols * ((j.to ? sizeof(To) : 0) + (j.packed.codes ? 1 : 0));
        cost.flops += 2. * j.call.rows * j.call.cols * j.call.k;
    }
    const int64_t tiles = jobs.job[0].tiles.count;
    for_tiles<quantise_tiles, QuantStage>(ctx, cost, tiles, KERNEL(Group<256> g, int64_t i, QuantStage& s) {
        for (int k = 0; k < n; k++) {
            if (k) g.sync();
            quantise_tile(g, jobs.job[k], i, s, from, k == n - 1);
        }
    });
    for (const QuantJob<To>& j : jobs.job) {
        if (!j.call.tally) continue;
        float* totals = j.call.tally;
        const float* parts = j.call.partial + tiles;
        int64_t sampled = (tiles + tally_every - 1) / tally_every;
        for_rows<quantise_tally, 8>(ctx, {}, tally_sums, KERNEL(Group<8> g, int64_t what) {
            float total = 0;
            for (int64_t k = 0; k < sampled; k++) total += parts[tally_sums * k + what];
            if (g.lane() == 0) totals[what] += total;
        });
    }
}
// One operand.
template <class To, class From> void quantise(Ctx& ctx, const QuantCall& q, To* to, const From* from, Packed packed = {}) {
    quantise(ctx, QuantJobs<To, 1>{{{q, to, packed}}}, from);
}
