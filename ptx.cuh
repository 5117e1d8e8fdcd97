// ptx.cuh: the instructions that CUDA C++ has no word for: matrix products of a warp, loads of their fragments, asynchronous copies.
//
// Fragments of m16n8k16, lane 4 g + t (PTX ISA, "Matrix fragments for mma.m16n8k16"), a pair being two bf16 in one register:
//
//     A (16 x 16)   a[0]: row g, columns 2t, 2t+1    a[1]: row g+8    a[2]: row g, columns 2t+8, +9    a[3]: row g+8, columns 2t+8, +9
//     B (16 x 8)    b0: rows 2t, 2t+1 of column g    b1: rows 2t+8, 2t+9
//     C (16 x 8)    c[0], c[1]: row g, columns 2t, 2t+1                c[2], c[3]: row g+8
//
// so that C of one product, rounded to pairs, is A of the next. test/emulated has the same functions for a CPU, from the same text.
#pragma once
#include "device.cuh"

#ifdef METIS_EMULATED
#include <ptx.h>
#elif defined(__CUDACC__)
// The dynamic shared memory that the launch asked for.
__device__ inline char* shared_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}
// Two floats as a pair of bf16, rounded to nearest even, the first in the lower half.
__device__ inline uint32_t pair_of(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
// c += A B, bf16 operands, float sums.
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four 8 x 8 matrices of bf16 in shared memory, lane 8 j + i giving the address of row i of matrix j; r[j] is this lane's pair of matrix j:
// row g, columns 2t and 2t+1, or, transposed, rows 2t and 2t+1 of column g. Lane 13 = 8 + 5 gives row 5 of matrix 1, and receives, its g being
// 3 and its t 1, columns 2 and 3 of row 3 of every matrix.
template <bool transposed> __device__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    if (transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
    }
}
// 16 bytes from global to shared memory, zeros if not valid, done when copy_wait says so: the groups that copy_commit closed, but for
// the last `pending`, have arrived for this lane; a barrier makes them everybody's.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory"); }
// 2^x to 2 units in the last place; 0 below the normal range.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
