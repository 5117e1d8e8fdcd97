// The warpgroup instructions of ../../dev/wgmma.cuh as the PTX ISA defines them ("Asynchronous Warpgroup Level Matrix Instructions"), for
// the emulated device.
//
// A lane does its own elements of a product, from shared memory as the descriptors say, when it is issued or not before it is waited for: which
// of the two changes from group to group and launch to launch, so that memory overwritten too early, or read too early, shows as other
// bits. From issue to wait the sums hold NaN, so that reading them shows; writing them is in vain. What the device leaves undefined ends
// the program with a line that says what it was.
#pragma once
#include "ptx.h"

constexpr bool has_wgmma = true;

namespace emulated {
struct Products {                               // a lane's that are under way
    struct Sums { float* at; int count; float value[64]; };     // the lane's registers `at`, and what they will hold
    struct Product {
        float* sums;                            // Sums::at of those it adds to
        int columns, group;                     // N; the number of its group
        bool done, add, transposed;             // transposed: B's rows are what is contracted
        const uint32_t* a;                      // the lane's registers, null: A is in shared memory too
        uint32_t seen[4];                       // what they held
        float rows[2][16];                      // this lane's rows of A, where they come from registers
        uint64_t a_at, b_at;                    // descriptors
    };
    std::vector<Product> all;                   // in the order of issue
    std::vector<Sums> sums;
    std::vector<std::pair<const void*, size_t>> fenced;         // registers that wgmma_fence was called for since the last wait
    int groups;                                 // committed so far
    uint64_t block;                             // whose all this is
};
// What each warp of a warpgroup has issued, to be the same in all four.
struct Warpgroup {
    struct Step { const char* what; uint64_t a, b; };
    std::vector<Step> steps;
    size_t done[4];
    uint64_t block;
};
[[noreturn]] inline void wrong(const char* what) {
    fprintf(stderr, "emulated GPU: %s (block %u, lane %u)\n", what, blockIdx.x, block.now);
    abort();
}
inline Products& products() {
    static thread_local std::vector<Products> lanes(1024);
    Products& p = lanes[block.now];
    if (p.block != block.number) p.all.clear(), p.sums.clear(), p.fenced.clear(), p.groups = 0, p.block = block.number;
    return p;
}
// Called once a warp. A warp that is first somewhere says what is to come there; the others must agree, and all have come to as many
// by the time that the next block asks.
inline void in_step(const char* what, uint64_t a = 0, uint64_t b = 0) {
    static thread_local std::vector<Warpgroup> groups(8);
    if (blockDim.x % 128) wrong("a warpgroup that is not full");
    Warpgroup& g = groups[block.now / 128];
    size_t& done = g.done[block.now / 32 % 4];
    if (g.block != block.number) {
        for (size_t n : g.done)
            if (n != g.steps.size()) wrong("in the block before, not all four warps came to every wgmma instruction");
        g.steps.clear(), g.block = block.number;
        for (size_t& n : g.done) n = 0;
    }
    if (done == g.steps.size()) g.steps.push_back({what, a, b});
    Warpgroup::Step& s = g.steps[done++];
    if (s.what != what || s.a != a || s.b != b) wrong("warps of a warpgroup at different wgmma instructions, or with different descriptors");
}
// All lanes of the warp come here, and the same way.
EMULATED_INLINE void aligned(const char* what) {
    exchange(what, 0xffffffffu, char());
    if (lane() == 0) in_step(what);
}

// Element (i, k) of an operand: i of A's rows or B's columns, k along the contracted axis. "Shared Memory Matrix Layout": 16-byte chunks in
// atoms of 8 rows of 8, 4, 2 or 1 chunks (swizzles of 128, 64, 32 bytes, none), the rows along i ("K-major") or along k ("MN-major").
inline float operand(uint64_t descriptor, bool rows_along_k, int i, int k) {
    auto field = [=](int from) { return (uint32_t)(descriptor >> from & 0x3fff) << 4; };
    uint32_t start = field(0), leading = field(16), stride = field(32), base = descriptor >> 49 & 7, mode = descriptor >> 62;
    const uint32_t chunks = mode ? 16u >> mode : 1;             // modes 1, 2, 3: 128, 64, 32 bytes
    uint32_t row = rows_along_k ? k : i, column = rows_along_k ? i : k, chunk = column / 8, at;
    if (mode == 0 && rows_along_k) at = row % 8 * 16 + row / 8 * leading + chunk * stride;
    else if (mode == 0) at = row % 8 * 16 + row / 8 * stride + chunk * leading;
    else if (rows_along_k) at = row % 8 * chunks * 16 + row / 8 * stride + chunk % chunks * 16 + chunk / chunks * leading;
    else at = row % 8 * chunks * 16 + row / 8 * stride + chunk * 16;    // 16 columns, within a row of the atom
    at += start;
    at ^= (((at >> 7) - base) & (chunks - 1)) << 4;             // chunk c of the pattern's row r lies in place c ^ r
    if (at + 16 > emulated_shared_bytes) wrong("a wgmma operand beyond shared memory");
    return half_of(*(const uint16_t*)(dynamic_shared_memory + at + column % 8 * 2), 0);
}
inline Products::Sums* sums_at(Products& own, const float* at) {
    for (auto& s : own.sums)
        if (s.at == at) return &s;
    return nullptr;
}
// This lane's elements: rows g and g + 8 of its warp's 16, columns 8 n + 2 t and 8 n + 2 t + 1. Sums in double.
inline void multiply(Products& lane, Products::Product& p) {
    int warp = block.now / 32 % 4, g = block.now % 32 / 4, t = block.now % 4;
    float* sums = sums_at(lane, p.sums)->value;
    if (!p.a)
        for (int half = 0; half < 2; half++)
            for (int k = 0; k < 16; k++) p.rows[half][k] = operand(p.a_at, false, 16 * warp + 8 * half + g, k);
    for (int n = 0; n < p.columns / 8; n++)
        for (int e = 0; e < 2; e++) {
            float b[16];
            for (int k = 0; k < 16; k++) b[k] = operand(p.b_at, p.transposed, 8 * n + 2 * t + e, k);
            for (int half = 0; half < 2; half++) {
                float& to = sums[4 * n + 2 * half + e];
                double sum = p.add ? to : 0;
                for (int k = 0; k < 16; k++) sum += (double)p.rows[half][k] * b[k];
                to = (float)sum;
            }
        }
    p.done = true;
}
// Whether these registers, or the array that they are part of, were given to wgmma_fence since the last wait.
inline bool is_fenced(const Products& own, const void* registers) {
    for (auto& [from, bytes] : own.fenced)
        if ((size_t)((const char*)registers - (const char*)from) < bytes) return true;
    return false;
}
// One product for the whole warp; a: null, or this lane's fragment of A.
template <int N> EMULATED_INLINE void issue(float (&d)[N][4], const uint32_t* a, uint64_t a_at, uint64_t b_at, bool add, bool transposed) {
    struct Sent { uint64_t a_at, b_at; uint32_t a[4], add; } mine = {a_at, b_at, {}, add};
    if (a) memcpy(mine.a, a, sizeof mine.a);
    exchange("wgmma", 0xffffffffu, mine);
    Products& own = products();
    Products::Product p = {};
    p.columns = 8 * N, p.group = own.groups, p.add = add, p.transposed = transposed, p.a = a, p.a_at = a_at, p.b_at = b_at;
    memcpy(p.seen, mine.a, sizeof p.seen);
    Sent other = given<Sent>((lane() + 1) % 32);
    if (other.a_at != a_at || other.b_at != b_at || other.add != (uint32_t)add) wrong("lanes give one wgmma different descriptors");
    if (lane() == 0) in_step("wgmma", a_at, b_at);
    for (unsigned i = 0; i < blockDim.x / 32; i++)
        if (block.warps[i].unfenced) wrong("wgmma after cp.async of this block that no fence.proxy.async followed");
    for (int pair = 0; a && pair < 4; pair++) {                 // row g is in the registers of lanes 4 g ... 4 g + 3
        Sent of = given<Sent>(lane() / 4 * 4 + pair);
        for (int e = 0; e < 8; e++) p.rows[e / 2 % 2][2 * pair + e / 4 * 8 + e % 2] = half_of(of.a[e / 2], e % 2);
    }
    if (a && !is_fenced(own, a)) wrong("wgmma on a fragment of A that no wgmma.fence was called for");
    if (!sums_at(own, d[0])) {                                  // no product into these is under way: the registers are as lanes left them
        if (!is_fenced(own, d)) wrong("wgmma into sums that no wgmma.fence was called for");
        own.sums.push_back({d[0], 4 * N, {}});
        memcpy(own.sums.back().value, d[0], sizeof d);
        for (auto& row : d)
            for (float& v : row) v = NAN;
    }
    p.sums = d[0];
    own.all.push_back(p);
    if (block.late_products >> own.groups % 32 & 1) return;
    for (auto& earlier : own.all)                               // those into the same sums, up to this one
        if (!earlier.done && earlier.sums == p.sums) multiply(own, earlier);
}
// All groups but the last `pending` are done. Sums that no product is left for go where they belong.
inline void finish_products(int pending) {
    Products& own = products();
    std::vector<Products::Product> rest;
    for (auto& p : own.all) {
        if (p.group >= own.groups - pending) {
            rest.push_back(p);
            continue;
        }
        if (!p.done) multiply(own, p);
        if (p.a && memcmp(p.a, p.seen, sizeof p.seen)) wrong("a fragment of A was written before its wgmma was waited for");
    }
    std::vector<Products::Sums> left;
    for (auto& s : own.sums) {
        bool under_way = false;
        for (auto& p : rest) under_way |= p.sums == s.at;
        if (under_way) left.push_back(s);
        else memcpy(s.at, s.value, s.count * sizeof(float));
    }
    own.all = rest, own.sums = left, own.fenced.clear();
}
// No product into these registers is under way.
inline void idle(const void* registers, const char* what) {
    for (auto& s : products().sums)
        if (s.at == registers) wrong(what);
}
} // namespace emulated

inline uint32_t shared_address(const void* p) { return (uint32_t)((const char*)p - dynamic_shared_memory); }
inline void fence_async() { emulated::warp().unfenced &= ~(1u << emulated::lane()); }

template <class... R> EMULATED_INLINE void wgmma_fence(R&... registers) {
    emulated::aligned("wgmma.fence");
    (emulated::idle(registers, "wgmma.fence on registers of a product under way"), ...);
    (emulated::products().fenced.push_back({registers, sizeof registers}), ...);
}
EMULATED_INLINE void wgmma_commit() {
    emulated::aligned("wgmma.commit_group");
    emulated::products().groups++;
}
template <int pending, class... R> EMULATED_INLINE void wgmma_wait(R&... sums) {
    emulated::aligned("wgmma.wait_group");
    emulated::finish_products(pending);
    (emulated::idle(sums, "wgmma.wait_group leaves products under way into sums that are to be read"), ...);
}
EMULATED_INLINE void wgmma_shared(float (&d)[16][4], uint64_t a, uint64_t b, bool add) { emulated::issue(d, nullptr, a, b, add, false); }
template <int N> EMULATED_INLINE void wgmma_registers(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b) { emulated::issue(d, a, 0, b, true, true); }
