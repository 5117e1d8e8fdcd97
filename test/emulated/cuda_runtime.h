// A CUDA device of the mind: enough of the runtime and of PTX to run this project's kernels on a CPU, lane by lane.
//
//     make test-emulated        compiles the GPU side of the sources with a C++ compiler against this folder, and runs the tests on it
//
// It proves what needs no GPU to be known: indices, fragment layouts, swizzles, barriers, copies that were not waited for. It says
// nothing of speed. Every lane of a block is a fiber; lanes run one after another until each waits at a barrier or a warp-wide
// instruction, or has ended; then whoever is complete goes on. The order of the lanes, whether warps go in step or run ahead, and whether an
// asynchronous copy or product happens at once or as late as it may, change from launch to launch: a race shows as a run whose bits differ. A
// barrier that some lanes never reach ends the program with a line that says who waits where. Shared memory is this thread's and is never cleared.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>
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
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct uint4 { uint32_t x, y, z, w; };
struct uint2 { uint32_t x, y; };
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
using std::min;
using std::max;

// Leaves a stack for another: registers that a function must keep go onto it, its pointer to *from; `to` is a pointer left like this. Four
// times as fast as setjmp and longjmp, and a block that sums something is hundreds of switches. A jump, as returns are predicted by calls.
#ifndef __x86_64__
#error "the emulated device switches stacks in the assembly of x86-64"
#endif
asm(R"(
    .pushsection .text
    .weak emulated_switch
emulated_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    pop %rcx
    jmp *%rcx
    .popsection
)");
extern "C" void emulated_switch(void** from, void* to);

namespace emulated {

// What every switch touches is packed by warps: a block and the tops of its stacks should fit the first cache.
struct Warp {
    unsigned lanes = 0;                         // a bit for each: a last warp may not be full
    unsigned ready = 0, at_warp = 0, at_block = 0;      // which may go on, wait for others of the warp, wait for the block; else ended
    unsigned fresh = 0;                         // which have not begun
    unsigned turn = 0;                          // which of two buffers lane j gave last: they take turns, for a lane may run ahead by one
    unsigned given = 0;                         // the same when lane j was let go
    unsigned mask[32];                          // the lanes that take part in what lane j waits at
    const char* where[32];                      // and what that is
    void* stack[32];                            // where it was left
    alignas(16) char few[2][32][8], many[2][32][64];    // what lane j gives to the others: up to 8 bytes, or more
    // A lane's state that few kernels need, and its stack.
    struct Copy { void* to; const void* from; size_t bytes; int group; };
    std::vector<Copy> copies[32];               // asynchronous ones that have not happened yet
    int groups[32];
    unsigned unfenced;                          // lanes that waited for copies and called no fence_async() since
    std::unique_ptr<char[]> memory[32];
};

// What this thread runs. Nothing here is to be constructed: then reading it costs no call.
struct Block {
    Warp* warps;
    unsigned *sequence, *next, *end;            // in which lanes get their turn, span by span (run_block); who may come next, up to where
    unsigned now;                               // the lane that runs
    void* scheduler;                            // where its stack was left
    void (*run)(const void*);
    const void* arguments;
    bool late;                                  // asynchronous copies happen when they are waited for, not before
    unsigned late_products;                     // a bit for each group of a warpgroup's products, in turn: the same of them
    uint64_t number;                            // of the blocks that this thread has run
};
inline thread_local Block block;
constexpr size_t stack_bytes = 256 << 10;

// For all that waits: a return after other lanes ran is mispredicted, which costs more than the switch.
#define EMULATED_INLINE inline __attribute__((always_inline))

EMULATED_INLINE unsigned lane() { return block.now % 32; }
EMULATED_INLINE Warp& warp() { return block.warps[block.now / 32]; }

// The next lane that may go on has its turn; false: there is none. The stack is still that of the one before.
EMULATED_INLINE bool next_lane() {
    while (block.next < block.end) {
        unsigned i = *block.next++, bit = 1u << i % 32;
        Warp& w = block.warps[i / 32];
        if (!(w.ready & bit)) continue;
        return w.ready &= ~bit, block.now = threadIdx.x = i, true;
    }
    return false;
}
// Leaves the lane until it has its turn again.
EMULATED_INLINE void yield() {
    void** from = &warp().stack[lane()];
    emulated_switch(from, next_lane() ? warp().stack[lane()] : block.scheduler);
}
// Where every stack begins. A lane that ends leaves its own to the next if that has not begun: most kernels wait nowhere.
inline void enter() {
    for (;;) {
        warp().fresh &= ~(1u << lane());
        block.run(block.arguments);
        void** from = &warp().stack[lane()];
        bool more = next_lane();
        if (more && warp().fresh >> lane() & 1) *from = warp().stack[lane()];
        else emulated_switch(from, more ? warp().stack[lane()] : block.scheduler);
    }
}
// Lanes outlive launches: each waits in enter() for the next.
inline void make_lanes(unsigned count, unsigned span, unsigned order) {
    static thread_local std::vector<Warp> warps;
    static thread_local std::vector<unsigned> sequence;
    if (warps.size() < (count + 31) / 32) warps.resize((count + 31) / 32);
    block.warps = warps.data();
    for (unsigned i = 0; i < count; i++) {
        std::unique_ptr<char[]>& memory = warps[i / 32].memory[i % 32];
        if (memory) continue;
        memory.reset(new char[stack_bytes]);
        // Stacks that all began at the same offset in a page would share a few sets of the cache.
        void** top = (void**)(((uintptr_t)memory.get() + stack_bytes - i % 32 * 576) & ~(uintptr_t)63);
        memset((void*)(top - 8), 0, 8 * sizeof *top);           // six registers, where to begin, and where enter() never returns to
        top[-2] = (void*)enter, warps[i / 32].stack[i % 32] = top - 8;
    }
    sequence.clear();
    for (unsigned first = 0; first < count; first += span) {
        unsigned all = min(span, count - first);
        for (unsigned n = 0; n < all; n++)
            sequence.push_back(first + (order % 3 == 0 ? n : order % 3 == 1 ? all - 1 - n : all % 37 ? (n * 37 + order) % all : n));
    }
    block.sequence = sequence.data();
}

[[noreturn]] inline void stuck(unsigned count) {
    fprintf(stderr, "emulated GPU: block %u of %u waits for ever:", blockIdx.x, gridDim.x);
    const char* before = nullptr;
    for (unsigned i = 0; i < count; i++) {
        const Warp& w = block.warps[i / 32];
        const char* where = (w.at_warp | w.at_block) >> i % 32 & 1 ? w.where[i % 32] : nullptr;
        if (where && where != before) fprintf(stderr, " from lane %u on at %s (mask %08x);", i, where, w.mask[i % 32]);
        before = where;
    }
    fprintf(stderr, "\n");
    abort();
}

// Every lane of [first, last) that may goes on until it waits or ends.
inline void advance(unsigned first, unsigned last) {
    block.next = block.sequence + first, block.end = block.sequence + last;
    if (next_lane()) emulated_switch(&block.scheduler, warp().stack[lane()]);
}
// Lets go whoever has met all the lanes of its mask at the same instruction; whether anybody has. Nobody is ready then, so that whoever was
// let go before has read what it was given.
inline bool meet(Warp& w) {
    bool moved = false;
    for (unsigned rest = w.at_warp; rest; ) {
        unsigned i = (unsigned)__builtin_ctz(rest), mask = w.mask[i] & w.lanes;
        bool all = mask >> i & 1 && (w.at_warp & mask) == mask;
        for (unsigned left = mask; all && left; left &= left - 1) {
            int j = __builtin_ctz(left);
            all = w.mask[j] == w.mask[i] && w.where[j] == w.where[i];
        }
        rest &= all ? ~mask : rest - 1;
        if (all) w.at_warp &= ~mask, w.ready |= mask, w.given = (w.given & ~mask) | (w.turn & mask), moved = true;
    }
    return moved;
}
// One block to its end: its warps go on together, or each (a span of 32 lanes) as far as the next barrier before another begins; on a
// device they are anywhere between. `backwards`: the last one first.
inline void run_block(unsigned count, unsigned span, bool backwards) {
    unsigned spans = (count + span - 1) / span, warps = (count + 31) / 32;
    block.number++;
    for (unsigned i = 0; i < warps; i++) {
        Warp& w = block.warps[i];
        w.lanes = w.ready = w.fresh = count - 32 * i < 32 ? (1u << (count - 32 * i)) - 1 : ~0u, w.at_warp = w.at_block = w.unfenced = 0;
        for (int j = 0; j < 32 && block.late; j++) w.groups[j] = 0, w.copies[j].clear();
    }
    for (;;) {
        for (unsigned n = 0; n < spans; n++) {
            unsigned first = span * (backwards ? spans - 1 - n : n), last = min(first + span, count);
            for (bool moved = true; moved; ) {
                advance(first, last);
                moved = false;
                for (unsigned i = first / 32; i < (last + 31) / 32; i++) moved |= meet(block.warps[i]);
            }
        }
        unsigned left = 0, at_warp = 0;
        for (unsigned i = 0; i < warps; i++) left |= block.warps[i].at_block, at_warp |= block.warps[i].at_warp;
        if (at_warp) stuck(count);
        if (!left) return;
        for (unsigned i = 0; i < warps; i++) block.warps[i].ready = block.warps[i].at_block, block.warps[i].at_block = 0;
    }
}

EMULATED_INLINE void wait_for_block() {
    Warp& w = warp();
    w.where[lane()] = "__syncthreads", w.mask[lane()] = 0, w.at_block |= 1u << lane();
    yield();
}
template <class T> char* buffer(Warp& w, unsigned turn, unsigned j) {
    static_assert(sizeof(T) <= sizeof w.many[0][0]);
    return sizeof(T) <= sizeof w.few[0][0] ? w.few[turn & 1][j] : w.many[turn & 1][j];
}
// Gives v to the lanes of `mask` and waits for theirs; given<T>(j) is what lane j of this warp gave.
template <class T> EMULATED_INLINE void exchange(const char* where, unsigned mask, const T& v) {
    Warp& w = warp();
    unsigned i = lane();
    w.turn ^= 1u << i;
    memcpy(buffer<T>(w, w.turn >> i, i), &v, sizeof v);
    w.where[i] = where, w.mask[i] = mask, w.at_warp |= 1u << i;
    yield();
}
template <class T> EMULATED_INLINE T given(unsigned j) {
    Warp& w = warp();
    T v;
    memcpy(&v, buffer<T>(w, w.given >> j, j), sizeof v);
    return v;
}

inline std::atomic<unsigned> launches{0};

template <class... P> void launch(void (*kernel)(P...), dim3 grid, dim3 size, std::tuple<P...> arguments) {
    unsigned order = launches++ * 0x9E3779B1u >> 12;             // no period that a test's own could fall in step with
    struct Call { void (*kernel)(P...); std::tuple<P...>* arguments; } call = {kernel, &arguments};
    unsigned span = order / 3 % 2 ? 32 : size.x;
    int64_t blocks = (int64_t)grid.x * grid.y * grid.z;
    #pragma omp parallel num_threads((int)min<int64_t>(blocks, omp_get_num_procs()))
    {
        make_lanes(size.x, span, order);
        blockDim = size, gridDim = grid, block.late = order / 12 % 2, block.late_products = order * 0x9E3779B1u, block.arguments = &call;
        block.run = [](const void* p) {
            const Call& c = *(const Call*)p;
            std::apply(c.kernel, *c.arguments);
        };
        #pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < blocks; b++) {
            blockIdx = dim3((unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y));
            run_block(size.x, span, order / 6 % 2);
        }
    }
}
} // namespace emulated

EMULATED_INLINE void __syncthreads() { emulated::wait_for_block(); }
EMULATED_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { emulated::exchange("__syncwarp", mask, char()); }
template <class T> EMULATED_INLINE T __shfl_xor_sync(unsigned mask, T v, int d) {
    emulated::exchange("__shfl_xor_sync", mask, v);
    return emulated::given<T>(emulated::lane() ^ (unsigned)d % 32);
}
template <class T> EMULATED_INLINE T __shfl_sync(unsigned mask, T v, int from) {
    emulated::exchange("__shfl_sync", mask, v);
    return emulated::given<T>((unsigned)from % 32);
}
inline void __stwb(uint4* p, uint4 v) { *p = v; }

// ---------------------------------------------------------------------------------------------------------------------------
// The runtime's calls: memory is the host's, a stream does everything at once, or, while it is captured, notes what it is to do.

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

typedef std::vector<std::function<void()>>*cudaGraph_t, *cudaGraphExec_t;
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
inline cudaGraph_t emulated_capture = nullptr;
constexpr cudaError_t emulated_in_capture = 900;                // cudaErrorStreamCaptureUnsupported: what waits, copies from the host or allocates
template <class F> cudaError_t emulated_do(F f) {
    if (emulated_capture) emulated_capture->push_back(f);
    else f();
    return cudaSuccess;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    if (emulated_capture) return emulated_in_capture;
    return emulated_capture = new std::vector<std::function<void()>>, cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* g) { return *g = emulated_capture, emulated_capture = nullptr, *g ? cudaSuccess : 1; }
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) { return *e = new std::vector<std::function<void()>>(*g), cudaSuccess; }
inline cudaError_t cudaGraphDestroy(cudaGraph_t g) { return delete g, cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t) {
    if (emulated_capture) return emulated_in_capture;           // (a device makes a child of it)
    for (auto& node : *e) node();
    return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamCreate(cudaStream_t* s) { return *s = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return emulated_capture ? emulated_in_capture : cudaSuccess; }
inline cudaError_t cudaMalloc(void** p, size_t n) {
    if (emulated_capture) return emulated_in_capture;
    return *p = aligned_alloc(256, (n + 255) / 256 * 256), *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* p) { return free(p), cudaSuccess; }
inline cudaError_t cudaMemset(void* p, int v, size_t n) { return memset(p, v, n), cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { return emulated_do([=] { memset(p, v, n); }); }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t) {
    if (emulated_capture && kind != cudaMemcpyDeviceToDevice) return emulated_in_capture;
    return emulated_do([=] { memcpy(to, from, n); });
}
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
    return emulated_do([kernel, grid = c->gridDim, block = c->blockDim, all = std::tuple<P...>(arguments...)] { emulated::launch<P...>(kernel, grid, block, all); });
}
