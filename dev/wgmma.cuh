// wgmma.cuh: what a warpgroup of Hopper's does in one instruction (sm_90a alone): products of 64 rows, and the fences and waits around them.
//
// A warpgroup is four warps, the first's index a multiple of four; all 128 lanes come to an instruction with the same descriptors. It
// returns at once: a product reads shared memory and its lanes' registers, and writes the sums D, any time until it has been waited for:
//
//     wgmma_fence(d, a...)      registers are as the products are to find them; until the wait nobody may touch them
//     wgmma_...(d, ...)         any number of products: those into one d are done in order
//     wgmma_commit()            closes a group of them
//     wgmma_wait<n>(d...)       all groups but the last n are done; these d's may be read
//
// Warp w of a group has rows 16 w ... 16 w + 15 of D (64 x N) and A (64 x 16), in the fragments of ptx.cuh's m16n8k16: d[n] is C's of columns
// 8 n ... 8 n + 7, a is A's. B, and A where it is not in registers, lie in shared memory in panels of 64 columns, 128 bytes a row, the
// 128-byte swizzle of the PTX ISA ("Shared Memory Matrix Layout"):
//
//     16-byte chunk c of row r in bytes 128 r + 16 (c ^ r % 8) of a panel that begins at a multiple of 1024
//
//     rows            chunk 0 1 2 3 4 5 6 7       8 rows, the pattern's period, are 1024 bytes. The hardware exclusive-ors
//     0                     0 1 2 3 4 5 6 7       bits 4...6 of an address with bits 7...9, whatever the descriptor's start:
//     1                     1 0 3 2 5 4 7 6       so a start may be moved by 32 bytes (16 columns) within a row, or by
//     2                     2 3 0 1 6 7 4 5       whole periods.
//     ...
//
// Products read shared memory by way of another proxy than lanes and cp.async, which write it: between such a write and a barrier after
// which products read, the writer calls fence_async(). The way back needs no fence: a product's end is one.
#pragma once
#include "../ptx.cuh"

#ifdef METIS_EMULATED
#include <wgmma.h>
#elif defined(__CUDACC__)
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool has_wgmma = true;            // of the target that is being compiled: something to ask in device code
#else
constexpr bool has_wgmma = false;
#endif
__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Arithmetic on registers is nothing that a volatile asm keeps its place to, so that a compiler might move it across a fence or a wait:
// this says that the asm before or after it reads and writes them.
template <int N> __device__ void hold(float (&x)[N][4]) {
    #pragma unroll
    for (auto& row : x) asm volatile("" : "+f"(row[0]), "+f"(row[1]), "+f"(row[2]), "+f"(row[3]) :: "memory");
}
template <int N> __device__ void hold(uint32_t (&x)[N][4]) {
    #pragma unroll
    for (auto& row : x) asm volatile("" : "+r"(row[0]), "+r"(row[1]), "+r"(row[2]), "+r"(row[3]) :: "memory");
}
template <class... R> __device__ void wgmma_fence(R&... registers) {
    (hold(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending, class... R> __device__ void wgmma_wait(R&... sums) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(pending) : "memory");
    (hold(sums), ...);
}

// D (64 x 128) = A B^T, or D += A B^T where `add`: A 64 rows and B 128 rows of 16 columns, both in shared memory. (1, 1: signs; 0, 0: both
// operands have the contracted axis along their rows, "K-major".)
__device__ inline void wgmma_shared(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
                 ", %64, %65, p, 1, 1, 0, 0;}" :
                 "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
                 "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
                 "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
                 "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
                 "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
                 "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
                 "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
                 "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3]) :
                 "l"(a), "l"(b), "r"((int)add));
}

// D (64 x N) += A B: A in registers, B 16 rows of N columns in shared memory, the contracted axis across its rows ("MN-major": the last 1).
__device__ inline void wgmma_registers(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{.reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
                 ", {%32,%33,%34,%35}, %36, p, 1, 1, 1;}" :
                 "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
                 "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
                 "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
                 "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]) :
                 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ inline void wgmma_registers(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{.reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
                 ", {%64,%65,%66,%67}, %68, p, 1, 1, 1;}" :
                 "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
                 "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
                 "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
                 "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
                 "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
                 "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
                 "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
                 "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3]) :
                 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

#ifdef __CUDACC__
// The descriptor of an operand in panels from `start` on: 8 rows further is 1024 bytes further; `panels` bytes from a panel to the next,
// which only B of wgmma_registers asks for (an operand whose rows are contracted is 16 columns, within one panel).
//
//     bits 0...13: start / 16     16...29: panels / 16     32...45: 1024 / 16     49...51: 0, for panels begin at multiples of 1024
//     bits 62, 63: 1, for 128 bytes
__device__ inline uint64_t wgmma_operand(const void* start, uint32_t panels = 16) {
    return (shared_address(start) & 0x3ffff) >> 4 | (uint64_t)(panels >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
// Starts copying a tile of `rows` rows of D columns, `stride` apart in memory, into panels; rows from `valid` on are zeros. A lane's chunks
// are a multiple of 8 rows apart, so that all have the same swizzle.
template <int rows, int D, int lanes> __device__ void panel_load(bf16* panels, const bf16* from, int64_t stride, int valid) {
    constexpr int step = lanes / (D / 8);
    static_assert(step % 8 == 0 && rows % step == 0);
    int r = threadIdx.x / (D / 8), c = threadIdx.x % (D / 8);
    bf16* to = panels + c / 8 * (rows * 64) + r * 64 + (c % 8 ^ r % 8) * 8;
    from += r * stride + c * 8;
    #pragma unroll
    for (int n = 0; n < rows / step; n++, to += step * 64, from += step * stride) copy_async(to, from, r + n * step < valid);
}

template <class Int> __global__ void ask_for_wgmma(Int* answer) { *answer = has_wgmma; }
// Whether this program was compiled for sm_90a, which host code cannot ask the compiler. arena: room for an int.
inline bool compiled_for_wgmma(Ctx& ctx, Arena arena) {
    int answer, *there = arena.take<int>(1);
    start(ctx, ask_for_wgmma<int>, 1, 1, 0, there);
    to_host(ctx, &answer, there, sizeof answer);
    return answer;
}
#endif
