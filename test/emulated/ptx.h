// The PTX instructions of ../../ptx.cuh as the PTX ISA defines them, for the emulated device.
#pragma once
#include "cuda_runtime.h"

inline char* shared_memory() { return dynamic_shared_memory; }
inline uint32_t pair_of(float low, float high) {
    bf16 a, b;
    store(&a, low), store(&b, high);
    return a.bits | (uint32_t)b.bits << 16;
}
inline float half_of(uint32_t pair, int which) { return float_of(which ? pair & 0xffff0000u : pair << 16); }

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: lane 4 g + t holds of A rows g and g + 8, columns 2 t, 2 t + 1 and those + 8;
// of B rows (k) 2 t, 2 t + 1 and those + 8 of column g; of C and D rows g and g + 8, columns 2 t and 2 t + 1. Sums in double.
EMULATED_INLINE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Sent { uint32_t a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulated::exchange("mma", 0xffffffffu, mine);
    int lane = (int)emulated::lane(), g = lane / 4, t = lane % 4;
    float x[2][16], y[2][16];                   // rows g and g + 8 of A, columns 2 t and 2 t + 1 of B
    for (int pair = 0; pair < 4; pair++) {
        Sent rows = emulated::given<Sent>(g * 4 + pair);
        for (int e = 0; e < 8; e++) x[e / 2 % 2][2 * pair + e / 4 * 8 + e % 2] = half_of(rows.a[e / 2], e % 2);
        for (int column = 0; column < 2; column++) {
            Sent columns = emulated::given<Sent>((2 * t + column) * 4 + pair);
            for (int e = 0; e < 4; e++) y[column][2 * pair + e / 2 * 8 + e % 2] = half_of(columns.b[e / 2], e % 2);
        }
    }
    double sum[4] = {c[0], c[1], c[2], c[3]};
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) sum[i] += (double)x[i / 2][k] * y[i % 2][k];
    for (int i = 0; i < 4; i++) c[i] = (float)sum[i];
}

// ldmatrix.sync.aligned.m8n8.x4(.trans).shared.b16: lanes 8 j ... 8 j + 7 give the rows of matrix j; lane 4 g + t gets of each its row g,
// columns 2 t and 2 t + 1 (of its transpose with .trans).
template <bool transposed> EMULATED_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    if ((uintptr_t)row % 16) fprintf(stderr, "emulated GPU: ldmatrix at an address that is no multiple of 16\n"), abort();
    emulated::exchange("ldmatrix", 0xffffffffu, row);
    int lane = (int)emulated::lane(), g = lane / 4, t = lane % 4;
    for (int j = 0; j < 4; j++) {
        uint16_t low, high;
        auto element = [&](int y, int x) { return ((const uint16_t*)emulated::given<const void*>(8 * j + y))[x]; };
        low = transposed ? element(2 * t, g) : element(g, 2 * t), high = transposed ? element(2 * t + 1, g) : element(g, 2 * t + 1);
        r[j] = low | (uint32_t)high << 16;
    }
}

// cp.async: 16 bytes, zeros where not valid; done at once, or, in every other launch, when it is waited for.
inline void copy_async(void* to, const void* from, bool valid) {
    if (((uintptr_t)to | (valid ? (uintptr_t)from : 0)) % 16) fprintf(stderr, "emulated GPU: cp.async at an address that is no multiple of 16\n"), abort();
    static const char zeros[16] = {};
    const void* source = valid ? from : zeros;
    emulated::Warp& w = emulated::warp();
    if (emulated::block.late) w.copies[emulated::lane()].push_back({to, source, 16, w.groups[emulated::lane()]});
    else memcpy(to, source, 16);
}
inline void copy_commit() { emulated::warp().groups[emulated::lane()]++; }
template <int pending> void copy_wait() {
    std::vector<emulated::Warp::Copy>& copies = emulated::warp().copies[emulated::lane()];
    int group = emulated::warp().groups[emulated::lane()] - pending;
    size_t rest = 0;
    for (auto& c : copies)
        if (c.group < group) memcpy(c.to, c.from, c.bytes);
        else copies[rest++] = c;
    copies.resize(rest);
    emulated::warp().unfenced |= 1u << emulated::lane();
}
inline float exp2_fast(float x) { return exp2f(x); }
