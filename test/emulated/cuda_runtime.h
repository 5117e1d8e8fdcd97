// A CUDA device of the mind: enough of the runtime and of PTX to run this project's kernels on a CPU, lane by lane.
//
//     make test-emulated        compiles the GPU side of the sources with a C++ compiler against this folder, and runs the tests on it
//
// It proves what needs no GPU to be known: indices, fragment layouts, swizzles, barriers, copies that were not waited for. It says
// nothing of speed. Every lane of a block is a fiber; lanes run one after another until each waits at a barrier or a warp-wide
// instruction, or has ended; then whoever is complete goes on. The order of the lanes, whether warps go in step or run ahead, and whether an
// asynchronous copy happens at once or as late as it may, change from launch to launch: a race shows as a run whose bits differ. A barrier that
// some lanes never reach ends the program with a line that says who waits where. Shared memory is this thread's and is never cleared.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <csetjmp>
#include <memory>
#include <tuple>
#include <vector>
#include <ucontext.h>
#include <omp.h>

#define __host__
#define __device__
#define __global__
#define __shared__ thread_local
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct uint4 { uint32_t x, y, z, w; };
struct uint2 { uint32_t x, y; };
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
using std::min;
using std::max;

namespace emulated {

struct Lane {
    unsigned index = 0;
    enum State { ready, at_block, at_warp, ended } state = ended;
    const char* where = "";                     // what it waits at
    unsigned mask = 0;                          // the lanes that take part
    int turn = 0;                               // counts warp-wide instructions: two buffers take turns, for a lane may run ahead by one
    unsigned turns = 0;                         // which buffer lane j of the warp gave when this lane was let go, bit j
    alignas(16) char sent[2][64];               // what it gives to the others
    struct Copy { void* to; const void* from; size_t bytes; int group; };
    std::vector<Copy> copies;                   // asynchronous ones that have not happened yet
    int groups = 0;
    jmp_buf at;
    std::unique_ptr<char[]> stack;
};

struct Block {
    std::vector<Lane> lanes;
    Lane* now = nullptr;
    jmp_buf scheduler;
    void (*run)(const void*) = nullptr;
    const void* arguments = nullptr;
    bool late = false;                          // asynchronous copies happen when they are waited for, not before
};
inline thread_local Block block;
constexpr size_t stack_bytes = 256 << 10;

// Leaves the lane until the scheduler returns to it.
inline void yield() {
    if (_setjmp(block.now->at) == 0) _longjmp(block.scheduler, 1);
}
inline void enter() {                           // where every lane's stack begins
    if (_setjmp(block.now->at) == 0) _longjmp(block.scheduler, 1);
    for (;;) {
        block.run(block.arguments);
        block.now->state = Lane::ended;
        yield();
    }
}
inline void make_lanes(unsigned count) {
    while (block.lanes.size() < count) {
        block.lanes.emplace_back();
        Lane& lane = block.lanes.back();
        lane.stack.reset(new char[stack_bytes]);
    }
    for (unsigned i = 0; i < count; i++) {
        Lane& lane = block.lanes[i];
        lane.index = i;
        block.now = &lane;
        ucontext_t start, here;
        getcontext(&start);
        start.uc_stack.ss_sp = lane.stack.get(), start.uc_stack.ss_size = stack_bytes, start.uc_link = nullptr;
        makecontext(&start, enter, 0);
        if (_setjmp(block.scheduler) == 0) swapcontext(&here, &start);
    }
}

[[noreturn]] inline void stuck(unsigned count) {
    fprintf(stderr, "emulated GPU: block %u of %u waits for ever:", blockIdx.x, gridDim.x);
    for (unsigned i = 0; i < count; i++)
        if (block.lanes[i].state != Lane::ended && (i == 0 || block.lanes[i].where != block.lanes[i - 1].where))
            fprintf(stderr, " from lane %u on at %s (mask %08x);", i, block.lanes[i].where, block.lanes[i].mask);
    fprintf(stderr, "\n");
    abort();
}

// Every lane of [first, last) that may goes on until it waits or ends; `order` says who comes first.
inline void advance(unsigned first, unsigned last, unsigned order) {
    unsigned count = last - first;
    for (unsigned n = 0; n < count; n++) {
        unsigned i = first + (order % 3 == 0 ? n : order % 3 == 1 ? count - 1 - n : count % 37 ? (n * 37 + order) % count : n);
        Lane& lane = block.lanes[i];
        if (lane.state != Lane::ready) continue;
        block.now = &lane, threadIdx = dim3(i, 0, 0);
        if (_setjmp(block.scheduler) == 0) _longjmp(lane.at, 1);
    }
}
// Lets go whoever has met all the lanes of its mask at the same instruction; whether anybody has.
inline bool meet(unsigned first, unsigned last) {
    bool moved = false;
    for (unsigned i = first; i < last; i++) {
        Lane& lane = block.lanes[i];
        if (lane.state != Lane::at_warp) continue;
        bool all = true;
        unsigned turns = 0, warp = i / 32 * 32, mask = lane.mask;
        auto each = [&](auto f) {
            for (unsigned j = 0; j < 32 && warp + j < last; j++)                // a last warp may not be full
                if (mask >> j & 1) f(block.lanes[warp + j], j);
        };
        each([&](const Lane& other, unsigned j) {
            turns |= (other.turn & 1u) << j;
            all = all && other.state == Lane::at_warp && other.mask == mask && other.where == lane.where;
        });
        if (!all) continue;
        each([&](Lane& other, unsigned) { other.state = Lane::ready, other.turns = turns; });
        moved = true;
    }
    return moved;
}
// One block to its end. `order` also says whether its warps go on together, or each as far as the next barrier before another begins: on
// a device they are anywhere between.
inline void run_block(unsigned count, unsigned order) {
    for (unsigned i = 0; i < count; i++) block.lanes[i].state = Lane::ready, block.lanes[i].groups = 0, block.lanes[i].copies.clear();
    unsigned span = order / 3 % 2 ? 32 : count, spans = (count + span - 1) / span;
    for (;;) {
        for (unsigned n = 0; n < spans; n++) {
            unsigned first = span * (order / 6 % 2 ? spans - 1 - n : n), last = min(first + span, count);
            do advance(first, last, order); while (meet(first, last));
        }
        unsigned left = 0, waiting = 0;
        for (unsigned i = 0; i < count; i++) left += block.lanes[i].state != Lane::ended, waiting += block.lanes[i].state == Lane::at_block;
        if (left == 0) return;
        if (waiting != left) stuck(count);
        for (unsigned i = 0; i < count; i++)
            if (block.lanes[i].state == Lane::at_block) block.lanes[i].state = Lane::ready;
    }
}

inline void wait_for_block() {
    block.now->where = "__syncthreads", block.now->state = Lane::at_block, block.now->mask = 0;
    yield();
}
// Gives `size` bytes to the lanes of `mask` and waits for theirs; given(j) is what lane j of this warp gave.
inline void exchange(const char* where, unsigned mask, const void* from, size_t size) {
    Lane& lane = *block.now;
    lane.turn++;
    if (size) memcpy(lane.sent[lane.turn & 1], from, size);
    lane.where = where, lane.mask = mask, lane.state = Lane::at_warp;
    yield();
}
template <class T> T given(unsigned j) {
    const Lane& lane = *block.now;
    T v;
    memcpy(&v, block.lanes[lane.index / 32 * 32 + j].sent[lane.turns >> j & 1], sizeof v);
    return v;
}

inline std::atomic<unsigned> launches{0};

template <class... P> void launch(void (*kernel)(P...), dim3 grid, dim3 size, std::tuple<P...> arguments) {
    unsigned order = launches++ * 0x9E3779B1u >> 12;             // no period that a test's own could fall in step with
    struct Call { void (*kernel)(P...); std::tuple<P...>* arguments; } call = {kernel, &arguments};
    #pragma omp parallel num_threads(omp_get_num_procs())
    {
        make_lanes(size.x);
        blockDim = size, gridDim = grid, block.late = order / 12 % 2, block.arguments = &call;
        block.run = [](const void* p) {
            const Call& c = *(const Call*)p;
            std::apply(c.kernel, *c.arguments);
        };
        #pragma omp for schedule(dynamic)
        for (unsigned b = 0; b < grid.x * grid.y * grid.z; b++) {
            blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
            run_block(size.x, order);
        }
    }
}
} // namespace emulated

inline void __syncthreads() { emulated::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::exchange("__syncwarp", mask, nullptr, 0); }
template <class T> T __shfl_xor_sync(unsigned mask, T v, int d) {
    emulated::exchange("__shfl_xor_sync", mask, &v, sizeof v);
    return emulated::given<T>((emulated::block.now->index ^ (unsigned)d) % 32);
}
template <class T> T __shfl_sync(unsigned mask, T v, int from) {
    emulated::exchange("__shfl_sync", mask, &v, sizeof v);
    return emulated::given<T>((unsigned)from % 32);
}
inline void __stwb(uint4* p, uint4 v) { *p = v; }

// ---------------------------------------------------------------------------------------------------------------------------
// The runtime's calls: memory is the host's, a stream does everything at once.

typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaDeviceProp { char name[64]; int major, minor, multiProcessorCount; };
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; cudaLaunchAttribute* attrs; unsigned numAttrs; };
constexpr size_t emulated_shared_bytes = 227 << 10;
inline thread_local __align__(1024) char dynamic_shared_memory[emulated_shared_bytes];

inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamCreate(cudaStream_t* s) { return *s = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** p, size_t n) { return *p = aligned_alloc(256, (n + 255) / 256 * 256), *p ? cudaSuccess : cudaErrorMemoryAllocation; }
inline cudaError_t cudaFree(void* p) { return free(p), cudaSuccess; }
inline cudaError_t cudaMemset(void* p, int v, size_t n) { return memset(p, v, n), cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { return memset(p, v, n), cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) { return memcpy(to, from, n), cudaSuccess; }
inline cudaError_t cudaMemGetInfo(size_t* left, size_t* all) { return *left = *all = (size_t)8 << 30, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
// EMULATED_SM=100: its compute capability, which says what the emulated cuBLASLt offers.
inline int emulated_sm() {
    const char* sm = getenv("EMULATED_SM");
    return sm ? atoi(sm) : 90;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) { return *p = {"an emulated GPU", emulated_sm() / 10, emulated_sm() % 10, 2}, cudaSuccess; }
template <class K> cudaError_t cudaFuncSetAttribute(K, cudaFuncAttribute, int) { return cudaSuccess; }
template <class... P, class... A> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... arguments) {
    if (c->dynamicSmemBytes > emulated_shared_bytes || c->blockDim.x > 1024) return fprintf(stderr, "emulated GPU: a block that no GPU takes\n"), 1;
    emulated::launch<P...>(kernel, c->gridDim, c->blockDim, std::tuple<P...>(arguments...));
    return cudaSuccess;
}
