// A CRVQ linear layer for 1 to 16 tokens: rows of int8 codebooks straight into int8 matrix instructions.
// "mma_gather" in kernels/README.md says why. Compiled at run time by nvrtc.py; no header is needed.
//
// Macros, all of them numbers:
//   WARPS         of a program; they share out the virtual groups
//   ROWS          output rows of a thread: 2, 4, 8 or 16; a program has 8 times as many
//   AHEAD         steps of 4 virtual groups whose codes a warp has on their way
//   DIGITS        int8 digits that an element of x is cut into: 2 or 3
//   COLUMN_TILES  8 columns each; a column is a digit of a token
//   BOOKS         codebooks, 1 to 4
//   ORDER_BYTES   of an entry of the channel order: 1, 2 or 4
//   BFLOAT16      1 if x and y are bfloat16, 0 if they are float16
//   FUSED         1 if every program cuts x itself, 0 if `split_x` has done it

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#ifndef EMULATED  // on a CPU, tests/kernels/gpu/emulator.h has these
#define SHARED_MEMORY(name) extern __shared__ __align__(16) u8 name[]

__device__ __forceinline__ void mma(int *sums, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void load_codes(u32 *words, const u8 *from) {
#if ROWS == 2
    u16 word;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(word) : "l"(from));
    words[0] = word;
#elif ROWS == 4
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(from));
#elif ROWS == 8
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
#else
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
#endif
}
__device__ __forceinline__ float float_of_half(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ u16 half_of_float(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ __forceinline__ u16 bfloat_of_float(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
// With programmatic dependent launch a program may start while the kernel ahead still runs; else these do nothing.
__device__ __forceinline__ void wait_for_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

enum Type { NONE, HALF, BFLOAT, FLOAT };

// As mma_gather.py has it.
struct Arguments {
    const u8 *tiles;         // see packing.py
    const uint2 *codebooks;  // [BOOKS, codebook_size], int8
    const void *order;       // [in_features]
    const void *scales;      // [out_features], scale_type
    const void *bias;        // [out_features], bias_type
    const u16 *x;            // [tokens, in_features]
    uint2 *digits;           // [steps, columns, 4] unless FUSED: 8 elements of a group, a byte each
    float *units;            // [tokens] unless FUSED: what the last digit of x times an entry of a codebook counts
    u16 *y;                  // [tokens, out_features]
    int tokens, out_features, in_features, row_tiles, codebook_size;
    int groups, critical_groups, virtual_groups;  // critical_groups is at least 1
    int scale_type, bias_type;
};

constexpr int THREADS = WARPS * 32;
constexpr int PROGRAM_ROWS = 8 * ROWS;
constexpr int SUMS_PITCH = PROGRAM_ROWS + 4;  // the lanes of a warp write to 32 different banks
constexpr int WORDS = ROWS < 4 ? 1 : ROWS / 4;
constexpr int TABLE_BYTES = BOOKS > 2 ? 131072 : 65536;
constexpr float LARGEST = DIGITS == 3 ? 8355584.f : 32512.f;  // 7f7f00, 7f00: rounded up, it still has these digits
constexpr float CODEBOOK_UNIT = 1 / 32.f;

__device__ __forceinline__ float float_at(const void *from, int type, int i) {
    if (type == FLOAT) return ((const float *)from)[i];
    const u16 bits = ((const u16 *)from)[i];
    return type == HALF ? float_of_half(bits) : __uint_as_float((u32)bits << 16);
}

__device__ __forceinline__ float float_of_x(u32 bits) {
    return BFLOAT16 ? __uint_as_float(bits << 16) : float_of_half((u16)bits);
}

__device__ __forceinline__ u32 largest_magnitude(u32 largest, uint4 x) {  // as bits, of 8 elements
    const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) largest = max(largest, max(words[i] & 0x7fffu, words[i] >> 16 & 0x7fffu));
    return largest;
}

// The largest magnitude of a token, never 0, for which 1 / x * LARGEST is finite; NaN stays NaN.
__device__ __forceinline__ float range_of(u32 largest) {
    const float range = float_of_x(largest);
    return range < 1e-30f ? 1e-30f : range;
}

// Cuts the 8 elements of virtual group `group`, gathered from `x`, into digits: DIGITS columns of `digits`.
__device__ __forceinline__ void split_group(const Arguments &a, const u16 *x, int group, int column, int columns,
                                            float range, uint2 *digits) {
    u32 words[DIGITS][2] = {};
    if (group < a.virtual_groups) {
        const int source = group < a.groups ? group : (group - a.groups) % a.critical_groups;
        u32 channels[8];
#if ORDER_BYTES == 1
        const uint2 order = ((const uint2 *)a.order)[source];
#pragma unroll
        for (int j = 0; j < 8; j++) channels[j] = (j < 4 ? order.x : order.y) >> j % 4 * 8 & 0xff;
#elif ORDER_BYTES == 2
        const uint4 order = ((const uint4 *)a.order)[source];
        const u32 pairs[4] = {order.x, order.y, order.z, order.w};
#pragma unroll
        for (int j = 0; j < 8; j++) channels[j] = pairs[j / 2] >> j % 2 * 16 & 0xffff;
#else
        const uint4 low = ((const uint4 *)a.order)[source * 2], high = ((const uint4 *)a.order)[source * 2 + 1];
        const u32 order[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int j = 0; j < 8; j++) channels[j] = order[j];
#endif
        const float factor = LARGEST / range;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int value = __float2int_rn(float_of_x(x[channels[j]]) * factor);
#pragma unroll
            for (int k = DIGITS - 1; k > 0; k--) {
                const int digit = (signed char)value;
                value = (value - digit) >> 8;
                words[k][j / 4] |= (digit & 0xffu) << j % 4 * 8;
            }
            words[0][j / 4] |= (value & 0xffu) << j % 4 * 8;
        }
    }
#pragma unroll
    for (int k = 0; k < DIGITS; k++)
        digits[((group >> 2) * columns + column + k) * 4 + (group & 3)] = make_uint2(words[k][0], words[k][1]);
}

#if !FUSED
// Cuts x into digits: a program is a token (blockIdx.y) and THREADS virtual groups.
extern "C" __global__ void __launch_bounds__(THREADS) split_x(const Arguments a) {
    SHARED_MEMORY(shared);
    u32 *const tops = (u32 *)shared;
    const int lane = threadIdx.x & 31, token = blockIdx.y, group = blockIdx.x * THREADS + threadIdx.x;
    const u16 *const x = a.x + (size_t)token * a.in_features;
    wait_for_kernel_ahead();
    let_next_kernel_start();
    u32 largest = 0;
    for (int i = threadIdx.x; i < a.in_features / 8; i += THREADS)
        largest = largest_magnitude(largest, __ldcg((const uint4 *)x + i));
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) tops[threadIdx.x >> 5] = largest;
    __syncthreads();
    const float range = range_of(__reduce_max_sync(0xffffffffu, lane < WARPS ? tops[lane] : 0u));
    if (group == 0) a.units[token] = range * (CODEBOOK_UNIT / LARGEST);
    if (group < (a.virtual_groups + 3) / 4 * 4)
        split_group(a, x, group, token * DIGITS, a.tokens * DIGITS, range, a.digits);
}
#endif

struct Codes {
    u32 words[AHEAD][WORDS];
};

// Codes of AHEAD steps from `step` on, of the rows of this thread: 4 groups a step, one of them this thread's.
__device__ __forceinline__ void request_codes(Codes &codes, const Arguments &a, int block, int step, int steps) {
    const int lane = threadIdx.x & 31, row = block * PROGRAM_ROWS + (lane >> 2) * ROWS;
    const bool inside = row < a.row_tiles * 16;  // rows are padded to whole tiles, not to whole programs
    const u8 *const from = a.tiles + (size_t)(row >> 4) * 512 + (row & 15) + (lane & 3) * 16;
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) codes.words[u][i] = 0;
        if (inside && step + u < steps)
            load_codes(codes.words[u], from + (size_t)((step + u) >> 3) * a.row_tiles * 512 + ((step + u) & 7) * 64);
    }
}

struct Columns {
    uint2 pairs[AHEAD][COLUMN_TILES];
};

// The elements of x that this thread hands to the matrix instructions of AHEAD steps.
__device__ __forceinline__ void request_columns(Columns &x, const uint2 *digits, int columns, int step, int steps) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int u = 0; u < AHEAD; u++)
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; tile++) {
            const int column = tile * 8 + (lane >> 2);
            x.pairs[u][tile] = make_uint2(0, 0);
            if (column < columns && step + u < steps) {
                const uint2 *const from = digits + ((step + u) * columns + column) * 4 + (lane & 3);
                x.pairs[u][tile] = FUSED ? *from : __ldcg(from);
            }
        }
}

// Fills the table: each row of a codebook 16 times side by side, so that half a warp reads 16 rows from 32 banks.
__device__ __forceinline__ void fill_table(u8 *table, const Arguments &a) {
#pragma unroll
    for (int book = 0; book < BOOKS; book++)
        for (int code = threadIdx.x; code < a.codebook_size; code += THREADS) {
            const uint2 row = a.codebooks[book * a.codebook_size + code];
            uint4 *const to = (uint4 *)(table + (book >> 1) * 65536 + code * 256 + (book & 1) * 128);
#pragma unroll
            for (int i = 0; i < 8; i++) to[(i + threadIdx.x) & 7] = make_uint4(row.x, row.y, row.x, row.y);
        }
}

// A program is PROGRAM_ROWS output rows of all tokens; with fewer programs than that takes, each does several.
extern "C" __global__ void __launch_bounds__(THREADS) mma_gather(const Arguments a) {
    // The table; [tokens, WARPS] and [tokens] words; if FUSED the digits of x; then x itself, later sums of the warps.
    SHARED_MEMORY(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quarter = lane & 3;
    const int columns = a.tokens * DIGITS, steps = (a.virtual_groups + 3) / 4;
    const int blocks = (a.out_features + PROGRAM_ROWS - 1) / PROGRAM_ROWS, first_step = warp * AHEAD;
    u32 *const tops = (u32 *)(shared + TABLE_BYTES);
    float *const units = (float *)(tops + a.tokens * WARPS);
    u8 *const rest = shared + TABLE_BYTES + (a.tokens * (WARPS + 1) * 4 + 15) / 16 * 16;

    Codes codes;  // of weights, so these need not wait
    request_codes(codes, a, blockIdx.x, first_step, steps);
    fill_table(shared, a);
    wait_for_kernel_ahead();
#if FUSED
    uint2 *const digits = (uint2 *)rest;
    u8 *const after_digits = rest + steps * columns * 32;
    u16 *const x = (u16 *)after_digits;
    for (int token = 0; token < a.tokens; token++) {
        u32 largest = 0;
        for (int i = threadIdx.x; i < a.in_features / 8; i += THREADS) {
            const uint4 some = __ldcg((const uint4 *)(a.x + (size_t)token * a.in_features) + i);
            ((uint4 *)(x + token * a.in_features))[i] = some;
            largest = largest_magnitude(largest, some);
        }
        largest = __reduce_max_sync(0xffffffffu, largest);
        if (lane == 0) tops[token * WARPS + warp] = largest;
    }
    __syncthreads();
    for (int token = 0; token < a.tokens; token++) {
        const u32 top = lane < WARPS ? tops[token * WARPS + lane] : 0u;
        const float range = range_of(__reduce_max_sync(0xffffffffu, top));
        if (threadIdx.x == 0) units[token] = range * (CODEBOOK_UNIT / LARGEST);
        for (int group = threadIdx.x; group < steps * 4; group += THREADS)
            split_group(a, x + token * a.in_features, group, token * DIGITS, columns, range, digits);
    }
    int *const sums = (int *)after_digits;
#else
    const uint2 *const digits = a.digits;
    if (threadIdx.x < a.tokens) units[threadIdx.x] = __ldcg(a.units + threadIdx.x);
    int *const sums = (int *)rest;
#endif
    __syncthreads();
    Columns x_columns;
    if (!FUSED) request_columns(x_columns, digits, columns, first_step, steps);

    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        const int next_block = block + gridDim.x;
        int acc[ROWS / 2][COLUMN_TILES][4] = {};
        for (int step = first_step; step < steps;) {
            const Codes now = codes;
            const int here = step;
            step += WARPS * AHEAD;
            Columns x;
            if (FUSED) request_columns(x, digits, columns, here, steps);
            else x = x_columns;
            if (step < steps) {
                request_codes(codes, a, block, step, steps);
                if (!FUSED) request_columns(x_columns, digits, columns, step, steps);
            } else if (next_block < blocks) {
                request_codes(codes, a, next_block, first_step, steps);
                if (!FUSED) request_columns(x_columns, digits, columns, first_step, steps);
            }
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                if (here + u >= steps) break;
                const int group = (here + u) * 4 + quarter;
                int book = BOOKS > 1 && group >= a.groups;
                if (BOOKS > 2) book += (group >= a.groups + a.critical_groups);
                if (BOOKS > 3) book += (group >= a.groups + 2 * a.critical_groups);
                // Where this thread's copy of row 0 lies in the table; a code goes into byte 1.
                const u32 copy = (book >> 1) * 65536 + (book & 1) * 128 + (lane & 15) * 8;
#pragma unroll
                for (int i = 0; i < ROWS; i += 2) {
                    const u32 word = now.words[u][i / 4], selector = 0x7604 | (i & 3) << 4;
                    const uint2 even = *(const uint2 *)(shared + __byte_perm(word, copy, selector));
                    const uint2 odd = *(const uint2 *)(shared + __byte_perm(word, copy, selector + 0x10));
#pragma unroll
                    for (int tile = 0; tile < COLUMN_TILES; tile++)
                        mma(acc[i / 2][tile], even.x, odd.x, even.y, odd.y, x.pairs[u][tile].x, x.pairs[u][tile].y);
                }
            }
        }
        if (next_block >= blocks) let_next_kernel_start();

        // Row r * ROWS + i of the program is in place i * 8 + r.
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int tile = 0; tile < COLUMN_TILES; tile++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int column = tile * 8 + quarter * 2 + j;
                    if (column < columns)
                        sums[(warp * columns + column) * SUMS_PITCH + i * 8 + (lane >> 2)] =
                            acc[i / 2][tile][(i & 1) * 2 + j];
                }
        __syncthreads();
        for (int i = threadIdx.x; i < a.tokens * PROGRAM_ROWS; i += THREADS) {
            const int token = i / PROGRAM_ROWS, row = i % PROGRAM_ROWS, n = block * PROGRAM_ROWS + row;
            const int *const from = sums + token * DIGITS * SUMS_PITCH + row % ROWS * 8 + row / ROWS;
            if (n >= a.out_features) continue;
            float y = 0;
#pragma unroll
            for (int k = 0; k < DIGITS; k++) {
                int sum = 0;  // exact, so in any order
#pragma unroll
                for (int w = 0; w < WARPS; w++) sum += from[(w * columns + k) * SUMS_PITCH];
                y = y * 256 + (float)sum;
            }
            y = y * units[token] * float_at(a.scales, a.scale_type, n);
            if (a.bias_type != NONE) y += float_at(a.bias, a.bias_type, n);
            a.y[(size_t)token * a.out_features + n] = BFLOAT16 ? bfloat_of_float(y) : half_of_float(y);
        }
        __syncthreads();
    }
}
