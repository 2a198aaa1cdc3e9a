// A CRVQ linear layer for 1 to 16 tokens: rows of int8 codebooks straight into int8 matrix instructions.
// "mma_gather" in kernels/README.md says why. Compiled at run time by nvrtc.py; no header is needed.
//
// Macros, all of them numbers:
//   WARPS         of a program; they share out the virtual groups
//   ROWS          output rows of a thread: 2, 4, 8 or 16; a program has 8 times as many
//   AHEAD         steps of 4 virtual groups whose codes a warp has on their way; a warp has every WARPS'th
//   DIGITS        int8 digits that an element of x is cut into: 2 or 3
//   COLUMN_TILES  8 columns each; a column is a digit of a token
//   BOOKS         codebooks, 1 to 4
//   ORDER_BYTES   of an entry of the channel order: 1, 2 or 4
//   BFLOAT16      1 if x and y are bfloat16, 0 if they are float16
//   FUSED         1 if every program cuts x itself, 0 if `split_x` has done it
//   PROGRAMS      that a processor has registers for, at least
//   DEPENDENT     1 if it may be launched while the kernel ahead still runs, from compute capability 9.0 on

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
__device__ __forceinline__ void wait_for_kernel_ahead() {
#if DEPENDENT
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if DEPENDENT
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

// Channels of the 8 elements of a base group, as they are stored.
struct Order {
    u32 words[ORDER_BYTES * 2];
};

__device__ __forceinline__ u32 channel_of(const Order &order, int j) {
    const int at = j * ORDER_BYTES;  // in bytes
    return ORDER_BYTES == 4 ? order.words[j] : order.words[at / 4] >> at % 4 * 8 & (ORDER_BYTES == 1 ? 0xffu : 0xffffu);
}

__device__ __forceinline__ void request_order(Order &order, const Arguments &a, int group) {
    if (group >= a.groups) return;
#if ORDER_BYTES == 1
    const uint2 all = ((const uint2 *)a.order)[group];
    order.words[0] = all.x, order.words[1] = all.y;
#else
#pragma unroll
    for (int i = 0; i < ORDER_BYTES / 2; i++) {
        const uint4 some = ((const uint4 *)a.order)[group * (ORDER_BYTES / 2) + i];
        order.words[i * 4] = some.x, order.words[i * 4 + 1] = some.y;
        order.words[i * 4 + 2] = some.z, order.words[i * 4 + 3] = some.w;
    }
#endif
}

// Cuts base group `group` of `x` into digits: DIGITS columns of `digits`, there and where extended codebooks repeat it.
__device__ __forceinline__ void split_group(const Arguments &a, const u16 *x, const Order &order, int group, int column,
                                            int columns, float range, uint2 *digits) {
    u32 halves[2][3];  // digit by digit 4 elements, the last digit first
    const float factor = LARGEST / range;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 bytes[4];  // an element each: its digits as bytes, with a sign of its own each
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int value = __float2int_rn(float_of_x(x[channel_of(order, half * 4 + j)]) * factor);
            bytes[j] = ((u32)value + 0x808080u) ^ 0x808080u;
        }
        const u32 low01 = __byte_perm(bytes[0], bytes[1], 0x5140), low23 = __byte_perm(bytes[2], bytes[3], 0x5140);
        const u32 top01 = __byte_perm(bytes[0], bytes[1], 0x0062), top23 = __byte_perm(bytes[2], bytes[3], 0x0062);
        halves[half][0] = __byte_perm(low01, low23, 0x5410);
        halves[half][1] = __byte_perm(low01, low23, 0x7632);
        halves[half][2] = __byte_perm(top01, top23, 0x5410);
    }
#pragma unroll
    for (int book = 0; book < BOOKS; book++) {
        if (book > 0 && group >= a.critical_groups) break;
        const int place = book == 0 ? group : a.groups + (book - 1) * a.critical_groups + group;
        if (place >= a.virtual_groups) break;  // no group is critical
#pragma unroll
        for (int k = 0; k < DIGITS; k++)
            digits[((place >> 2) * columns + column + k) * 4 + (place & 3)] =
                make_uint2(halves[0][DIGITS - 1 - k], halves[1][DIGITS - 1 - k]);
    }
}

// Sets the digits of the groups that fill up the last step to 0; of all columns.
__device__ __forceinline__ void pad_digits(const Arguments &a, int columns, uint2 *digits) {
    const int steps = (a.virtual_groups + 3) / 4, padding = steps * 4 - a.virtual_groups;
    for (int i = threadIdx.x; i < padding * columns; i += THREADS)
        digits[((steps - 1) * columns + i / padding) * 4 + 3 - i % padding] = make_uint2(0, 0);
}

#if !FUSED
// Cuts x into digits: a program is a token (blockIdx.y) and THREADS virtual groups.
extern "C" __global__ void __launch_bounds__(THREADS) split_x(const Arguments a) {
    SHARED_MEMORY(shared);
    u32 *const tops = (u32 *)shared;
    const int lane = threadIdx.x & 31, token = blockIdx.y, group = blockIdx.x * THREADS + threadIdx.x;
    const u16 *const x = a.x + (size_t)token * a.in_features;
    Order order;
    request_order(order, a, group);
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
    if (group < a.groups) split_group(a, x, order, group, token * DIGITS, a.tokens * DIGITS, range, a.digits);
    if (blockIdx.x + blockIdx.y == 0) pad_digits(a, a.tokens * DIGITS, a.digits);
}
#endif

struct Codes {
    u32 words[AHEAD][WORDS];
};

// Codes of every WARPS'th step from `step` on, of the rows of this thread: 4 groups a step, one of them this thread's.
__device__ __forceinline__ void request_codes(Codes &codes, const Arguments &a, int block, int step, int steps) {
    const int lane = threadIdx.x & 31, row = block * PROGRAM_ROWS + (lane >> 2) * ROWS;
    const bool inside = row < a.row_tiles * 16;  // rows are padded to whole tiles, not to whole programs
    const size_t pitch = (size_t)a.row_tiles * 512;  // of 8 steps
    const u8 *const from = a.tiles + (size_t)(row >> 4) * 512 + (row & 15) + (lane & 3) * 16;
    const u8 *const first = from + (step >> 3) * pitch + (step & 7) * 64;
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) codes.words[u][i] = 0;
        const int at = step + u * WARPS;
        if (inside && at < steps)
            load_codes(codes.words[u],
                       WARPS % 8 == 0 ? first + u * (WARPS / 8) * pitch : from + (at >> 3) * pitch + (at & 7) * 64);
    }
}

struct Columns {
    uint2 pairs[AHEAD][COLUMN_TILES];
};

// The elements of x that this thread hands to the matrix instructions of these steps.
__device__ __forceinline__ void request_columns(Columns &x, const uint2 *digits, int columns, int step, int steps) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int u = 0; u < AHEAD; u++)
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; tile++) {
            const int column = tile * 8 + (lane >> 2);
            x.pairs[u][tile] = make_uint2(0, 0);
            if (column < columns && step + u * WARPS < steps) {
                const uint2 *const from = digits + ((step + u * WARPS) * columns + column) * 4 + (lane & 3);
                x.pairs[u][tile] = FUSED ? *from : __ldcg(from);
            }
        }
}

constexpr int ENTRIES = (BOOKS * 256 + THREADS - 1) / THREADS;  // of the table, for a thread

struct Entries {
    uint2 rows[ENTRIES];
};

__device__ __forceinline__ void request_entries(Entries &entries, const Arguments &a) {
#pragma unroll
    for (int i = 0; i < ENTRIES; i++) {
        const int entry = i * THREADS + threadIdx.x, book = entry >> 8, code = entry & 255;
        if (book < BOOKS && code < a.codebook_size) entries.rows[i] = a.codebooks[book * a.codebook_size + code];
    }
}

// Fills the table: each row of a codebook 16 times side by side, so that half a warp reads 16 rows from 32 banks.
__device__ __forceinline__ void fill_table(u8 *table, const Arguments &a, const Entries &entries) {
#pragma unroll
    for (int i = 0; i < ENTRIES; i++) {
        const int entry = i * THREADS + threadIdx.x, book = entry >> 8, code = entry & 255;
        if (book >= BOOKS || code >= a.codebook_size) continue;
        const uint2 row = entries.rows[i];
        uint4 *const to = (uint4 *)(table + (book >> 1) * 65536 + code * 256 + (book & 1) * 128);
#pragma unroll
        for (int j = 0; j < 8; j++) to[(j + threadIdx.x) & 7] = make_uint4(row.x, row.y, row.x, row.y);
    }
}

// A program is PROGRAM_ROWS output rows of all tokens; with fewer programs than that takes, each does several.
extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) mma_gather(const Arguments a) {
    // The table; [tokens, WARPS] and [tokens] words; if FUSED the digits of x; then x itself, later sums of the warps.
    SHARED_MEMORY(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quarter = lane & 3;
    const int columns = a.tokens * DIGITS, steps = (a.virtual_groups + 3) / 4;
    const int blocks = (a.out_features + PROGRAM_ROWS - 1) / PROGRAM_ROWS, first_step = warp;
    u32 *const tops = (u32 *)(shared + TABLE_BYTES);
    float *const units = (float *)(tops + a.tokens * WARPS);
    u8 *const rest = shared + TABLE_BYTES + (a.tokens * (WARPS + 1) * 4 + 15) / 16 * 16;

    // What the first steps read is requested before anything is waited for, weights before the kernel ahead has ended.
    Codes codes;
    request_codes(codes, a, blockIdx.x, first_step, steps);
    Entries entries;
    request_entries(entries, a);
#if FUSED
    Order order;
    request_order(order, a, threadIdx.x);
    uint4 first_x = make_uint4(0, 0, 0, 0);
    const bool has_x = threadIdx.x < a.in_features / 8;
    if (!DEPENDENT && has_x) first_x = __ldcg((const uint4 *)a.x + threadIdx.x);
#endif
    fill_table(shared, a, entries);
    wait_for_kernel_ahead();
    let_next_kernel_start();  // it waits itself before it reads or writes what is not a weight
#if FUSED
    if (DEPENDENT && has_x) first_x = __ldcg((const uint4 *)a.x + threadIdx.x);
    uint2 *const digits = (uint2 *)rest;
    u8 *const after_digits = rest + steps * columns * 32;
    u16 *const x = (u16 *)after_digits;
    for (int token = 0; token < a.tokens; token++) {
        u32 largest = 0;
        for (int i = threadIdx.x; i < a.in_features / 8; i += THREADS) {
            const uint4 *const from = (const uint4 *)(a.x + (size_t)token * a.in_features);
            const uint4 some = token == 0 && i == threadIdx.x ? first_x : __ldcg(from + i);
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
        for (int group = threadIdx.x; group < a.groups; group += THREADS) {
            const Order here = order;
            const int next = group + THREADS < a.groups ? group + THREADS : threadIdx.x;
            if (next != group) request_order(order, a, next);
            split_group(a, x + token * a.in_features, here, group, token * DIGITS, columns, range, digits);
        }
    }
    pad_digits(a, columns, digits);
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
            const bool more = step < steps;
            if (more || next_block < blocks) {
                const int next_step = more ? step : first_step;
                request_codes(codes, a, more ? block : next_block, next_step, steps);
                if (!FUSED) request_columns(x_columns, digits, columns, next_step, steps);
            }
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int at = here + u * WARPS;
                if (at >= steps) break;
                const int group = at * 4 + quarter;
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
