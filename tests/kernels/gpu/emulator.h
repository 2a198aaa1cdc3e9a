// Runs the CUDA kernels of crvq_kernels on a CPU: a program after the other, its threads as fibers.
//
// It shows wrong index arithmetic, a barrier that not all threads reach, writes past the shared memory that was asked
// for, codes read past their end, and addresses that vectors may not be read from. It does not show races, nor what a
// GPU's compiler makes of it.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#define EMULATED
#define __device__ static
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) unsigned char *const name = emulator::shared
#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define gridDim emulator::grid
#define __syncthreads emulator::meet_program
#define max(a, b) ((a) > (b) ? (a) : (b))

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulator {
struct Index { unsigned x, y; };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int program_barriers, warp_barriers;
    bool done;
    uint32_t given[6];  // to the other lanes of the warp
};
constexpr int STACK_BYTES = 65536, GUARD_BYTES = 4096;
static Index thread_index, block_index, grid;
static unsigned char *shared;
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static unsigned current;
static const char *problem;
static const unsigned char *codes, *codes_end;  // what a kernel may read of them

// Waits until the fibers from `first` up to `last` have passed as many barriers of a kind as this one.
static inline void meet(int Fiber::*barriers, size_t first, size_t last) {
    const unsigned me = current;
    const int mine = ++(fibers[me].*barriers);
    for (size_t i = first; i < last;) {
        if (fibers[i].*barriers >= mine) i++;
        else if (fibers[i].done) { problem = "a thread ends before a barrier that others wait at"; return; }
        else swapcontext(&fibers[me].context, &scheduler);
    }
}
static inline void meet_program() { meet(&Fiber::program_barriers, 0, fibers.size()); }
static inline void meet_warp() { meet(&Fiber::warp_barriers, current / 32 * 32, current / 32 * 32 + 32); }

template <class T>
static inline const T *vector_at(const void *from, size_t bytes) {
    if ((uintptr_t)from % bytes) problem = "a vector is read from an address that is no multiple of its size";
    return (const T *)from;
}

static void (*kernel)(const void *);
static const void *arguments;
static void run_thread() {
    kernel(arguments);
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}

// Returns what is wrong, or null.
static inline const char *run(void (*of)(const void *), const void *with, Index programs, int threads, int bytes) {
    std::vector<uint4> memory((bytes + GUARD_BYTES) / 16 + 1);
    kernel = of, arguments = with, grid = programs, problem = nullptr, shared = (unsigned char *)memory.data();
    fibers = std::vector<Fiber>(threads);
    for (Fiber &fiber : fibers) fiber.stack.reset(new char[STACK_BYTES]);
    for (unsigned program = 0; program < grid.x * grid.y && !problem; program++) {
        block_index = {program % grid.x, program / grid.x};
        memset(shared, 0xa5, bytes + GUARD_BYTES);
        for (Fiber &fiber : fibers) {
            fiber.program_barriers = fiber.warp_barriers = fiber.done = 0;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = STACK_BYTES;
            makecontext(&fiber.context, run_thread, 0);
        }
        for (int running = threads; running && !problem;) {
            running = 0;
            for (current = 0; current < fibers.size(); current++) {
                if (fibers[current].done) continue;
                thread_index = {current, 0};
                swapcontext(&scheduler, &fibers[current].context);
                running += !fibers[current].done;
            }
        }
        for (int i = bytes; i < bytes + GUARD_BYTES; i++)
            if (shared[i] != 0xa5) problem = "shared memory is written past its end";
    }
    fibers.clear();
    return problem;
}
}  // namespace emulator

static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) result |= (uint32_t)(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
static inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline int __float2int_rn(float value) {
    return std::isnan(value) ? 0 : value >= 2147483648.f ? INT32_MAX : value < -2147483648.f ? INT32_MIN : (int)lrintf(value);
}
template <class T>
static inline T __ldcg(const T *from) { return *emulator::vector_at<T>(from, sizeof(T)); }
static inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
    emulator::fibers[emulator::current].given[0] = value;
    emulator::meet_warp();
    const unsigned first = emulator::current / 32 * 32;
    for (int i = 0; i < 32; i++) value = max(value, emulator::fibers[first + i].given[0]);
    emulator::meet_warp();
    return value;
}
// mma.m16n8k32 of int8, as the PTX manual lays its operands out over the lanes.
static inline void mma(int *sums, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const unsigned me = emulator::current, first = me / 32 * 32;
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(emulator::fibers[me].given, mine, sizeof mine);
    emulator::meet_warp();
    for (int i = 0; i < 4; i++) {
        const int row = (int)(me % 32 / 4) + i / 2 * 8, column = me % 4 * 2 + i % 2;
        for (int k = 0; k < 32; k++) {
            const int lane = k % 16 / 4, part = k / 16, shift = k % 4 * 8;
            const uint32_t a = emulator::fibers[first + row % 8 * 4 + lane].given[row / 8 + 2 * part];
            const uint32_t b = emulator::fibers[first + column * 4 + lane].given[4 + part];
            sums[i] += (int8_t)(a >> shift) * (int8_t)(b >> shift);
        }
    }
    emulator::meet_warp();
}
static inline void load_codes(uint32_t *words, const unsigned char *from) {
    if (from < emulator::codes || from + ROWS > emulator::codes_end) emulator::problem = "codes are read past their end";
    else memcpy(words, emulator::vector_at<unsigned char>(from, ROWS), ROWS);
}
static inline float float_of_half(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return value;
}
static inline uint16_t half_of_float(float value) {
    const _Float16 half = value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static inline uint16_t bfloat_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline void wait_for_kernel_ahead() {}
static inline void let_next_kernel_start() {}

#include KERNELS

extern "C" const char *emulate_mma_gather(int x, int y, int threads, int bytes, const void *arguments) {
    const Arguments &a = *(const Arguments *)arguments;
    emulator::codes = a.tiles;
    emulator::codes_end = a.tiles + (size_t)(a.virtual_groups + 31) / 32 * a.row_tiles * 512;
    auto kernel = [](const void *a) { mma_gather(*(const Arguments *)a); };
    return emulator::run(kernel, arguments, {(unsigned)x, (unsigned)y}, threads, bytes);
}
#if !FUSED
extern "C" const char *emulate_split_x(int x, int y, int threads, int bytes, const void *arguments) {
    auto kernel = [](const void *a) { split_x(*(const Arguments *)a); };
    return emulator::run(kernel, arguments, {(unsigned)x, (unsigned)y}, threads, bytes);
}
#endif
