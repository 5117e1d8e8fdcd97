// ladder_quantise.cu: the NVFP4 quantiser in six rungs. Up to the fourth, each takes away what the one below it was waiting for.
//
//     make GPU=1 print-dir                                     build/gpu-90a, say
//     make GPU=1 build/gpu-90a/ladder_quantise && build/gpu-90a/ladder_quantise            checks, then speeds; with --checks none
//     make build/emulated/ladder_quantise && build/emulated/ladder_quantise                checks alone, on a machine without a GPU
//
// The task: a bf16 matrix becomes two operands of FP4 GEMMs, its rows and its columns (the transposed copy), each in blocks of 16 along
// the axis that its GEMM contracts: 8 bytes of E2M1 codes a block, the first element in the lowest bits, and one E4M3 scale byte.
//
//     1 naive         a thread a block of 16, element by element                          scattered loads and stores
//     2 coalesced     neighbouring lanes on neighbouring elements, amax by shuffles       every byte of a transaction is used
//     3 vectorised    16-byte loads, 8-byte stores                                        fewer instructions for the same bytes
//     4 one pass      128 x 128 tiles in shared memory, both operands from one read       fewer bytes: 3.125 an element, not 5.125
//     5 + Hadamard    the same; columns are rotated in registers before they are rounded  the same bytes, more arithmetic
//     6 production    fp4.cuh: every format, rounding and block shape in one kernel       what generality costs, in one pass and in two
//
// Bytes an element: 2 to read bf16, 1/2 to write a code, 1/16 for the scale; so the yardstick is a copy's bandwidth, measured in the same
// run. What a rung falls short of it is badly used transactions (1, 2), or arithmetic that memory does not hide.
// Numbers come from fp4.cuh alone (nvfp4_scale, round_nearest, encode, the Hadamard's signs): what changes from rung to rung is who
// reads what when, so every rung must give the same bytes, and the program demands that they equal those of a plain loop, all of them.
// Production shares none of this file's code, so rung 6 holds the loop itself to account.
#include "../fp4.cuh"           // the numbers; scale_offset; tensor_scale, quantise: rung 6
#include "ladder.h"             // timed, median_seconds, check, done

// One operand: element (o, i), i along the contracted axis, is x[o * step_o + i * step_i]. Rows have steps cols and 1, columns 1 and cols.
// Beyond `inner` (a matrix whose rows are no multiple of 16) the last block of a column is filled up with zeros.
struct View {
    const bf16* x;
    int64_t outer, inner, step_o, step_i, blocks;       // blocks of 16 along inner, the last one perhaps filled up
    const float* S;                                     // S_enc, S_dec of tensor_scale()
    float inverse_top;
    uint8_t *codes, *scales;                            // outer x blocks x 8 bytes; a byte a block, in `order`
    ScaleOrder order;
    HD float at(int64_t o, int64_t i) const { return i < inner ? load(x + o * step_o + i * step_i) : 0.f; }
    HD uint8_t* codes_of(int64_t o, int64_t b) const { return codes + (o * blocks + b) * 8; }
    HD uint8_t& scale_of(int64_t o, int64_t b) const { return scales[scale_offset(o, b, blocks, order)]; }
};

// ---------------------------------------------------------------------------------------------------------------------------
// What all rungs share: a block's scale, an element's code, sixteen of either.

HD BlockScale block_scale(const View& m, float amax) { return nvfp4_scale(fminf(amax * (m.S[0] * m.inverse_top), 3.40282347e38f), m.S[1]); }
HD uint8_t scale_byte(BlockScale s) { return encode(s.value, e4m3); }
HD uint8_t code_of(float v, BlockScale s) { return encode(round_nearest(v * s.code, e2m1), e2m1); }

HD float amax16(const float* v) {
    float m = 0;
    #pragma unroll
    for (int j = 0; j < 16; j++) m = fmaxf(m, magnitude_or_infinity(v[j]));
    return m;
}
HD uint2 codes16(const float* v, BlockScale s) {
    uint32_t w[2] = {0, 0};
    #pragma unroll
    for (int j = 0; j < 16; j++) w[j / 8] |= (uint32_t)code_of(v[j], s) << 4 * (j % 8);
    return {w[0], w[1]};
}
HD float lower(uint32_t pair) { return float_of(pair << 16); }              // two bf16 in a register; bf16 is the upper half of a float
HD float upper(uint32_t pair) { return float_of(pair & 0xffff0000u); }
HD void unpack(float* v, const uint4 (&q)[2]) {
    uint32_t w[8];
    memcpy(w, q, 32);                                                       // a name for registers; nothing is copied
    #pragma unroll
    for (int j = 0; j < 8; j++) v[2 * j] = lower(w[j]), v[2 * j + 1] = upper(w[j]);
}

// Signs, butterflies, 1/4: the operations and their order are those of hadamard() in fp4.cuh, but on sixteen registers.
HD void rotate16(float* v, const float* sign) {
    #pragma unroll
    for (int j = 0; j < 16; j++) v[j] *= sign[j];
    #pragma unroll
    for (int h = 1; h < 16; h *= 2) {
        #pragma unroll
        for (int j = 0; j < 16; j++)
            if (!(j & h)) {
                float a = v[j], b = v[j + h];
                v[j] = a + b, v[j + h] = a - b;
            }
    }
    #pragma unroll
    for (int j = 0; j < 16; j++) v[j] *= 0.25f;
}

// ---------------------------------------------------------------------------------------------------------------------------
// One block from its elements to its bytes, one by one; and the reference, which is a loop over all blocks on the host.

HD void plain_block(const View& m, int64_t o, int64_t b, const float* sign = nullptr) {
    float v[16];
    for (int j = 0; j < 16; j++) v[j] = m.at(o, 16 * b + j);
    if (sign) rotate16(v, sign);
    BlockScale s = block_scale(m, amax16(v));
    m.scale_of(o, b) = scale_byte(s);
    for (int j = 0; j < 16; j += 2) m.codes_of(o, b)[j / 2] = (uint8_t)(code_of(v[j], s) | code_of(v[j + 1], s) << 4);
}
struct Serial {                                         // a group of one lane, for hadamard_signs
    HD void sync() const {}
    template <class F> HD void each(int n, F f) const { for (int i = 0; i < n; i++) f(i); }
};
static void reference(const View& m, bool rotated) {
    float sign[128];
    hadamard_signs(Serial(), sign, Signs::fixed, Words{});
    for (int64_t o = 0; o < m.outer; o++)
        for (int64_t b = 0; b < m.blocks; b++) plain_block(m, o, b, rotated ? sign : nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Rung 1, naive. A thread in place of the reference's iteration; one kernel serves both operands.
// Limit: scattered access. Along rows, lanes are 32 bytes apart: a load instruction of 2 bytes a lane fetches 32 sectors of 32 bytes for
// 64 bytes, and hopes that the cache still has them for the next fifteen loads. Down columns it is worse: lanes are 16 rows apart, and of
// every sector fetched only 2 bytes are this warp's. Codes are stored byte by byte.
// Bytes an element if caches were perfect: 2 x (2 + 1/2 + 1/16) = 5.125.
__global__ void naive(View m) {
    unsigned k = blockIdx.x * blockDim.x + threadIdx.x;             // 32 bits: a division of 64 is a routine, many times as long
    unsigned o = k / (unsigned)m.blocks, b = k % (unsigned)m.blocks;
    if (o < m.outer) plain_block(m, o, b);
}

// Rung 2, coalesced. Neighbouring lanes take neighbouring elements, so that a warp's load is one run of 64 bytes.
// Rows: a thread an element; the sixteen lanes of a block find its amax by four shuffles, and a lane gets its neighbour's code by a fifth.
// Columns: rung 1 with other lanes: a thread's neighbour takes the next *column*, not the next block, and each of its 16 loads is a run.
// Limit: instructions. Sixteen lanes compute the same scale and its division; a load carries 2 bytes a lane. And columns still store
// single bytes, each lane to a row of its own of the transposed copy. Bytes an element: 5.125 and what scattered stores waste.
__global__ void coalesced_rows(View m) {
    unsigned k = blockIdx.x * blockDim.x + threadIdx.x;             // rows lie one after another: element k of the matrix, whatever its row
    if (k >= m.outer * m.inner) return;                             // by whole blocks of 16 lanes: cols is a multiple of 16
    Group<16> block;
    float v = load(m.x + k);
    BlockScale s = block_scale(m, block.reduce(magnitude_or_infinity(v), [](float a, float b) { return a > b ? a : b; }));
    unsigned code = code_of(v, s), next = __shfl_xor_sync(block.mask(), code, 1);
    if (k % 2 == 0) m.codes[k / 2] = (uint8_t)(code | next << 4);
    if (k % 16 == 0) m.scales[k / 16] = scale_byte(s);
}
__global__ void coalesced_columns(View m) {
    unsigned k = blockIdx.x * blockDim.x + threadIdx.x, o = k % (unsigned)m.outer, b = k / (unsigned)m.outer;       // o runs fastest
    if (b < m.blocks) plain_block(m, o, b);
}

// Rung 3, vectorised. A thread a block again, but now as the memory system likes it: its 32 bytes in two loads of 16, its 8 bytes of codes
// in one store. The block's amax stays in registers: no shuffles, one scale and one division a block in place of sixteen, and more bytes
// in flight for every instruction. Columns: a thread takes two neighbouring ones, 4 bytes a load, 128 a warp.
// Limit: bytes. Both kernels read all of the matrix, and the columns' 8-byte stores go to 32 places a warp, a quarter of a sector each,
// which only the L2 cache can put together. Bytes an element: 5.125.
__global__ void vectorised_rows(View m) {
    unsigned k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= m.outer * m.blocks) return;
    uint4 q[2] = {((const uint4*)m.x)[2 * k], ((const uint4*)m.x)[2 * k + 1]};
    float v[16];
    unpack(v, q);
    BlockScale s = block_scale(m, amax16(v));
    ((uint2*)m.codes)[k] = codes16(v, s);
    m.scales[k] = scale_byte(s);
}
__global__ void vectorised_columns(View m) {
    unsigned pairs = (unsigned)m.outer / 2, k = blockIdx.x * blockDim.x + threadIdx.x, o = k % pairs * 2, b = k / pairs;
    if (b >= m.blocks) return;
    uint32_t w[16];
    #pragma unroll
    for (int j = 0; j < 16; j++) w[j] = 16 * b + j < m.inner ? *(const uint32_t*)(m.x + (int64_t)(16 * b + j) * m.step_i + o) : 0;
    #pragma unroll
    for (int odd = 0; odd < 2; odd++) {
        float v[16];
        #pragma unroll
        for (int j = 0; j < 16; j++) v[j] = odd ? upper(w[j]) : lower(w[j]);
        BlockScale s = block_scale(m, amax16(v));
        *(uint2*)m.codes_of(o + odd, b) = codes16(v, s);
        m.scale_of(o + odd, b) = scale_byte(s);
    }
}

// Rungs 4 and 5, one pass. A block of 256 threads loads 128 x 128 elements, quantises the rows straight from the registers they arrived in,
// leaves them in shared memory, and reads them from there once more, down the columns: the second read of the matrix is gone. The columns'
// codes go through shared memory too and leave as runs of 64 bytes. Scales are in the order that tensor cores read, tiles of 128 x 4:
// the tile is as large as it is so that it holds two whole ones of either operand, which leave in 16-byte stores, padding and all.
// Limit: with 43 KB a block, how many loads are in flight, and the arithmetic: two roundings an element. Bytes an element: 2 + 2 x 0.5625 = 3.125.
// Rung 5 rotates every 16 elements of a column before they are rounded: 64 additions and 32 products a block of 16, and no byte more,
// for the sixteen elements are in one thread's registers already. (Its S_enc comes from the rotated matrix.)
template <bool rotated> __global__ void __launch_bounds__(256) one_pass(View m, View t) {
    __shared__ __align__(16) uint32_t tile[128][64];                // two neighbours of a row in a word: lanes on pairs of columns hit 32 banks
    __shared__ __align__(16) uint2 codes[128][9];                   // of a column; 9, not 8: else all lanes of a warp would store to one bank
    __shared__ __align__(16) uint8_t scales[2][1024];               // rows' and columns': two tiles of 512 bytes each
    __shared__ float sign[128];
    unsigned across = (unsigned)(m.inner + 127) / 128, i = threadIdx.x;
    int64_t r0 = blockIdx.x / across * 128, c0 = blockIdx.x % across * 128;
    if (rotated) hadamard_signs(Group<256>(), sign, Signs::fixed, Words{});

    // Rows: 8 threads side by side on a row's 256 bytes. What lies outside is zero: its scale byte is zero, as padding must be.
    for (int n = 0; n < 4; n++) {
        int r = i / 8 + 32 * n, b = i % 8;
        bool inside = r0 + r < m.outer && c0 + 16 * b < m.inner;
        uint4 q[2] = {};
        if (inside) {
            const uint4* from = (const uint4*)(m.x + (r0 + r) * m.step_o + c0 + 16 * b);
            q[0] = from[0], q[1] = from[1];
        }
        uint4* to = (uint4*)&tile[r][8 * b];
        to[0] = q[0], to[1] = q[1];
        float v[16];
        unpack(v, q);
        BlockScale s = block_scale(m, amax16(v));
        scales[0][scale_offset(r, b, 8, ScaleOrder::tiled)] = scale_byte(s);
        if (inside) *(uint2*)m.codes_of(r0 + r, c0 / 16 + b) = codes16(v, s);
    }
    __syncthreads();

    // Columns: a thread takes a pair of them and 16 rows.
    for (int n = 0; n < 2; n++) {
        int pair = i % 64, b = i / 64 + 4 * n;
        uint32_t w[16];
        #pragma unroll
        for (int j = 0; j < 16; j++) w[j] = tile[16 * b + j][pair];
        #pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            float v[16];
            #pragma unroll
            for (int j = 0; j < 16; j++) v[j] = odd ? upper(w[j]) : lower(w[j]);
            if (rotated) rotate16(v, sign);
            BlockScale s = block_scale(t, amax16(v));
            codes[2 * pair + odd][b] = codes16(v, s);
            scales[1][scale_offset(2 * pair + odd, b, 8, ScaleOrder::tiled)] = scale_byte(s);
        }
    }
    __syncthreads();

    // Out: 8 threads side by side on the 64 bytes of a column; then a warp for every tile of scales.
    for (int n = 0; n < 4; n++) {
        int c = i / 8 + 32 * n, b = i % 8;
        if (c0 + c < t.outer && r0 / 16 + b < t.blocks) *(uint2*)t.codes_of(c0 + c, r0 / 16 + b) = codes[c][b];
    }
    auto send = [&](const View& to, const uint8_t* from, int64_t o, int64_t b) {
        b += 4 * (i / 32 % 2);
        if (b < to.blocks) ((uint4*)&to.scale_of(o, b))[i % 32] = ((const uint4*)from)[i % 64];
    };
    if (i < 64) send(m, scales[0], r0, c0 / 16);
    else if (i < 128) send(t, scales[1], c0, r0 / 16);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Rung 6, production, is quantise() with a job for each operand: rung 4's traffic, 4096 elements at a time in float, one body for all
// formats, stochastic rounding, four over six, squares and the Metis residual, on GPU and CPU alike. In two calls it is rung 3's traffic.
// Its amax passes, which the rungs are spared (they get S from one), read 2 bytes an element each.

struct Problem {
    View row, column;
    QuantCall q_row, q_column;
};
static int64_t blocks_for(int64_t threads) { return (threads + 255) / 256; }
static void production(Ctx& ctx, const Problem& p) {
    const QuantJobs<bf16, 2> jobs = {{{p.q_row, nullptr, {p.row.codes, p.row.scales, p.row.order}}, {p.q_column, nullptr, {p.column.codes, p.column.scales, p.column.order}}}};
    quantise(ctx, jobs, p.row.x);
}
static void production_twice(Ctx& ctx, const Problem& p) {
    quantise(ctx, p.q_row, (bf16*)nullptr, p.row.x, {p.row.codes, p.row.scales, p.row.order});
    quantise(ctx, p.q_column, (bf16*)nullptr, p.row.x, {p.column.codes, p.column.scales, p.column.order});
}
static void production_scales(Ctx& ctx, const Problem& p) {
    tensor_scale(ctx, p.q_row, p.row.x);
    tensor_scale(ctx, p.q_column, p.row.x);
}
static int64_t tiles(const View& m) { return (m.outer + 127) / 128 * ((m.inner + 127) / 128); }

struct Rung {
    const char* name;
    bool rotated;
    ScaleOrder order;
    double bytes;                                                   // an element, the least it must move
    void (*run)(Ctx&, const Problem&);
};
static const Rung rungs[] = {
    {"1 naive", false, ScaleOrder::plain, 5.125, [](Ctx& ctx, const Problem& p) {
        for (const View& m : {p.row, p.column}) start(ctx, naive, blocks_for(m.outer * m.blocks), 256, 0, m);
    }},
    {"2 coalesced", false, ScaleOrder::plain, 5.125, [](Ctx& ctx, const Problem& p) {
        start(ctx, coalesced_rows, blocks_for(p.row.outer * p.row.inner), 256, 0, p.row);
        start(ctx, coalesced_columns, blocks_for(p.column.outer * p.column.blocks), 256, 0, p.column);
    }},
    {"3 vectorised", false, ScaleOrder::plain, 5.125, [](Ctx& ctx, const Problem& p) {
        start(ctx, vectorised_rows, blocks_for(p.row.outer * p.row.blocks), 256, 0, p.row);
        start(ctx, vectorised_columns, blocks_for(p.column.outer / 2 * p.column.blocks), 256, 0, p.column);
    }},
    {"4 one pass", false, ScaleOrder::tiled, 3.125, [](Ctx& ctx, const Problem& p) { start(ctx, one_pass<false>, tiles(p.row), 256, 0, p.row, p.column); }},
    {"5 + Hadamard", true, ScaleOrder::tiled, 3.125, [](Ctx& ctx, const Problem& p) { start(ctx, one_pass<true>, tiles(p.row), 256, 0, p.row, p.column); }},
    {"6 production", false, ScaleOrder::tiled, 3.125, production},
    {"6 in two passes", false, ScaleOrder::tiled, 5.125, production_twice},
    {"6 + Hadamard", true, ScaleOrder::tiled, 3.125, production},
    {"6 + Hadamard + amax", true, ScaleOrder::tiled, 7.125, [](Ctx& ctx, const Problem& p) { production_scales(ctx, p), production(ctx, p); }},
};

// ---------------------------------------------------------------------------------------------------------------------------
// Checks and speeds

// Normal numbers, every 16 x 16 on a scale of its own from 2^-7 to 1 and every eleventh zero; the outlier, where there is one, is so large
// that small blocks' scales round to zero.
static std::vector<bf16> random_matrix(int64_t rows, int64_t cols, float outlier) {
    std::vector<bf16> x(rows * cols);
    #pragma omp parallel for
    for (int64_t i = 0; i < rows * cols; i++) {
        int64_t square = i / cols / 16 * (cols / 16) + i % cols / 16;
        store(&x[i], square % 11 == 10 ? 0.f : std::ldexp(normal({7, 0, 0, 0, 0, Purpose::test}, (uint64_t)i), -(int)(square % 8)));
    }
    if (outlier) store(&x[rows * cols / 2], outlier);
    return x;
}

// The four outputs one after another, each with room behind it that nobody may touch. Returns the bytes of all.
static size_t place_outputs(Problem& p, void* base) {
    Arena a = {(char*)base};
    for (View* m : {&p.row, &p.column}) {
        m->codes = a.take<uint8_t>(packed_bytes({Format::nvfp4}, m->outer, m->inner) + 64);
        m->scales = a.take<uint8_t>(packed_scale_bytes({Format::nvfp4}, m->outer, m->inner, m->order) + 64);
    }
    return a.used;
}
// A problem of this matrix, already on the device, with all that it needs from the arena; its scales are computed.
static Problem make_problem(Ctx& ctx, Arena& arena, const bf16* x, int64_t rows, int64_t cols, const Rung& rung, uint8_t** out) {
    Problem p = {};
    Cell cell = {Format::nvfp4}, turned = cell;
    turned.hadamard = rung.rotated ? 16 : 0;
    p.q_row = {cell, Axis::row, rows, cols, {}, {}, arena.take<float>(2), arena.take<float>(quantise_partials(cell, rows, cols))};
    p.q_column = {turned, Axis::column, rows, cols, {}, {}, arena.take<float>(2), arena.take<float>(quantise_partials(turned, rows, cols))};
    float top = scale_rule(cell).inverse_top;
    p.row = {x, rows, cols, cols, 1, cols / 16, p.q_row.scale, top, nullptr, nullptr, rung.order};
    p.column = {x, cols, rows, 1, cols, (rows + 15) / 16, p.q_column.scale, top, nullptr, nullptr, rung.order};
    *out = arena.take<uint8_t>(place_outputs(p, nullptr));
    place_outputs(p, *out);
    production_scales(ctx, p);
    return p;
}

// All bytes of a rung's outputs against the reference's, exactly. Before, they are filled with nonsense, so that what a rung forgets, or
// touches beyond its outputs, is seen; but production leaves the padding of tiled scales to its caller, who fills with zeros.
static void compare(Ctx& ctx, Arena arena, const Rung& rung, int64_t rows, int64_t cols, float outlier) {
    std::vector<bf16> host = random_matrix(rows, cols, outlier);
    bf16* x = arena.take<bf16>(rows * cols);
    to_device(ctx, x, host.data(), rows * cols * sizeof(bf16));
    uint8_t* out;
    Problem p = make_problem(ctx, arena, x, rows, cols, rung, &out), q = p;
    uint8_t nonsense = rung.name[0] == '6' ? 0 : 0xa5;
    std::vector<uint8_t> want(place_outputs(p, out), nonsense), got;
    place_outputs(q, want.data());
    for (View* m : {&q.row, &q.column}) {
        float S[2];
        to_host(ctx, S, m->S, sizeof S);
        m->x = host.data(), m->S = S;
        memset(m->scales, 0, packed_scale_bytes({Format::nvfp4}, m->outer, m->inner, m->order));
        reference(*m, rung.rotated && m == &q.column);
    }
    size_t differ = 0, first = 0;
    for (int turn = 0; turn < 3; turn++) {                          // the emulated device has three orders of lanes, and takes them in turn
        got.assign(want.size(), nonsense);
        to_device(ctx, out, got.data(), got.size());
        rung.run(ctx, p);
        CUDA(cudaGetLastError());
        to_host(ctx, got.data(), out, got.size());
        for (size_t k = got.size(); k-- > 0;)
            if (got[k] != want[k]) differ++, first = k;
    }
    char name[100];
    snprintf(name, sizeof name, "%s, %lld x %lld%s: the reference's bytes", rung.name, (long long)rows, (long long)cols, outlier ? " with an outlier" : "");
    check(!differ, name, "%zu bytes of three times %zu differ, the first at %zu (rows' scales start at %zu, columns' codes at %zu, scales at %zu)", differ, want.size(),
          first, p.row.scales - out, p.column.codes - out, p.column.scales - out);
}

static void speeds(Ctx& ctx, Arena arena, int64_t rows, int64_t cols) {
    bf16 *x = arena.take<bf16>(rows * cols), *copy = arena.take<bf16>(rows * cols);
    double n = (double)rows * cols, bytes = n * sizeof(bf16);
    to_device(ctx, x, random_matrix(rows, cols, 0).data(), (size_t)bytes);
    double best = 2 * bytes / median_seconds(ctx, [&] { CUDA(cudaMemcpyAsync(copy, x, (size_t)bytes, cudaMemcpyDeviceToDevice, ctx.stream)); });
    printf("%lld x %lld; a copy moves %.0f GB/s\n%-20s %9s %9s %9s %9s\n", (long long)rows, (long long)cols, best * 1e-9, "rung", "ms", "bytes/el", "GB/s", "% of copy");
    for (const Rung& rung : rungs) {
        uint8_t* out;
        Arena own = arena;                                          // every rung starts where the matrix ends
        Problem p = make_problem(ctx, own, x, rows, cols, rung, &out);
        double t = median_seconds(ctx, [&] { rung.run(ctx, p); }), rate = rung.bytes * n / t;
        printf("%-20s %9.3f %9.3f %9.0f %9.1f\n", rung.name, 1e3 * t, rung.bytes, rate * 1e-9, 100 * rate / best);
    }
}

int main(int argc, char** argv) {
    calm_openmp(argv);
    Ctx ctx;
    Arena arena = {(char*)device_alloc((size_t)1 << (timed ? 30 : 23), "the ladder")};
    // One block; one row; a whole tile; tiles that are half full; rows that end within a tile and within a block; narrow and wide ones.
    const int64_t shapes[][2] = {{16, 16}, {1, 32}, {128, 128}, {256, 192}, {200, 272}, {129, 80}, {37, 400}};
    for (const Rung& rung : rungs) {
        for (auto& s : shapes) compare(ctx, arena, rung, s[0], s[1], 0);
        compare(ctx, arena, rung, 144, 160, 1e6f);
    }
    if (timed && !test_failures && argc == 1) speeds(ctx, arena, 16384, 8192);   // 268 MB: more than any cache
    return done();
}
