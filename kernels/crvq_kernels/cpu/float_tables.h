/* fp32 tables, for an instruction set to compile as its own: the file that includes this says how many LANES of fp32 a
 * register has. An entry holds a number for each of the tokens that lie side by side in the tables, so that a code is
 * looked up and added once for all of them. A token's numbers are made by the same operations whatever tokens are
 * beside it, and for one token alone too. */
#pragma once
#include <string.h>

#include "instruction_set.h"

enum { SUMS = 8 }; /* registers of sums that are in the making at a time */

typedef float lanes __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* table[g][c] of one token. Codebooks are columns, so that a register has a number for each of several codewords. */
INLINE void make_for_one(const layer *l, desk *desk) {
    enum { REGISTERS = 16 / LANES }; /* of sums; padded_size is a multiple of 16 */
    int d = l->call->group;
    float *table = (float *)desk->tables, start = desk->not_finite[0];
    for (int g = 0; g < desk->count; g++, table += l->entries) {
        const float *column = codebook_of(l, desk, g), *x = desk->x + g * d;
        for (int64_t c = 0; c < l->padded_size; c += 16, column += 16) {
            lanes sums[REGISTERS];
            for (int s = 0; s < REGISTERS; s++) sums[s] = start + (lanes){0};
            for (int i = 0; i < d; i++) {
                const lanes *here = (const lanes *)(column + i * l->padded_size);
                for (int s = 0; s < REGISTERS; s++) sums[s] += here[s] * x[i];
            }
            for (int s = 0; s < REGISTERS; s++) ((lanes *)(table + c))[s] = sums[s];
        }
    }
}

/* table[g][c][token] of as many tokens as `registers` hold. Codebooks are rows. */
INLINE void make_for_many(const layer *l, desk *desk, const int registers) {
    int d = l->call->group;
    lanes *table = (lanes *)desk->tables;
    const lanes *start = (const lanes *)desk->not_finite, *x = (const lanes *)desk->x;
    for (int g = 0; g < desk->count; g++, table += l->entries * registers, x += d * registers) {
        const float *codeword = codebook_of(l, desk, g);
        for (int64_t k = 0; k < l->padded_size * registers; k += SUMS, codeword += SUMS / registers * d) {
            lanes sums[SUMS];
            for (int s = 0; s < SUMS; s++) sums[s] = start[s % registers];
            for (int i = 0; i < d; i++) {
                for (int s = 0; s < SUMS; s++) sums[s] += codeword[s / registers * d + i] * x[i * registers + s % registers];
            }
            for (int s = 0; s < SUMS; s++) table[k + s] = sums[s];
        }
    }
}

/* A kind of tables with `n` tokens side by side, of which as many are in use at a time as `near` KiB hold. */
#define FLOAT_TABLES(n, in_a_pass, near, make_them, add_them)                                   \
    {                                                                                           \
        .tokens = n, .pass = in_a_pass, .entry_bytes = n * sizeof(float), .near_bytes = (near) << 10, \
        .read_codebooks = read_codebooks, .make = make_them, .add = add_them,                   \
    }

INLINE void make_float_tables(const layer *l, desk *desk) {
    switch (l->kind->tokens) {
        case 1: make_for_one(l, desk); break;
#if LANES == 4
        case 4: make_for_many(l, desk, 1); break;
#endif
        case 8: make_for_many(l, desk, 8 / LANES); break;
        default: make_for_many(l, desk, 16 / LANES); break;
    }
}

/* Keeps the compiler from shifting anew for every byte: x86 takes the two lowest out of a register as they are. */
#define BY_PAIRS(word) __asm__("" : "+r"(word))

/* What the codes of a group have beyond eight bits, in a tile whose high plane starts there: `bits` for each row. */
INLINE uint64_t read_above(const uint8_t *high, int group, const int bits) {
    uint64_t above = 0;
    if (bits == 1) memcpy(&above, high + group * 2, 2);
    else if (bits == 2) memcpy(&above, high + group * 4, 4);
    else if (bits == 4) memcpy(&above, high + group * 8, 8);
    return above;
}

/* Takes the next code out of `low`, which has a byte of each, and `above`, which has `bits` of each. */
INLINE uint64_t next_code(uint64_t *low, uint64_t *above, const int bits) {
    uint64_t code = *low & 255;
    if (bits) code |= (*above & ((1 << bits) - 1)) << 8;
    *low >>= 8, *above >>= bits;
    return code;
}

/* Adds the groups on the desk to SUMS rows of a tile, from `row` on; `bits`: of a code, beyond eight. */
INLINE void add_for_one(const layer *l, const desk *desk, int64_t tile, int row, float *out, const int bits) {
    int64_t position = (desk->block * l->row_tiles + tile) * TILE + desk->first * TILE_ROWS;
    const uint8_t *codes = l->call->tiles + position + row, *high = l->high + position * bits / 8;
    const float *table = (const float *)desk->tables;
    float sums[SUMS];
    for (int s = 0; s < SUMS; s++) sums[s] = out[s];
    for (int g = 0; g < desk->count; g++, table += l->entries) {
        uint64_t low = 0, above = read_above(high, g, bits) >> row * bits;
        memcpy(&low, codes + g * TILE_ROWS, SUMS);
        for (int s = 0; s < SUMS; s++) {
            if (s % 2 == 0) BY_PAIRS(low);
            sums[s] += table[next_code(&low, &above, bits)];
        }
    }
    for (int s = 0; s < SUMS; s++) out[s] = sums[s];
}

/* The same for as many rows as have SUMS registers of sums, tokens side by side. */
INLINE void add_for_many(const layer *l, const desk *desk, int64_t tile, int row, float *out, const int registers,
                         const int bits) {
    int64_t position = (desk->block * l->row_tiles + tile) * TILE + desk->first * TILE_ROWS;
    const uint8_t *codes = l->call->tiles + position + row, *high = l->high + position * bits / 8;
    const lanes *table = (const lanes *)desk->tables;
    lanes sums[SUMS], *own = (lanes *)out;
    for (int s = 0; s < SUMS; s++) sums[s] = own[s];
    for (int g = 0; g < desk->count; g++, table += l->entries * registers) {
        uint64_t low = 0, above = read_above(high, g, bits) >> row * bits;
        memcpy(&low, codes + g * TILE_ROWS, SUMS / registers);
        for (int r = 0; r < SUMS / registers; r++) {
            const lanes *entry = table + next_code(&low, &above, bits) * registers;
            for (int k = 0; k < registers; k++) sums[r * registers + k] += entry[k];
        }
    }
    for (int s = 0; s < SUMS; s++) own[s] = sums[s];
}

INLINE void add_for(const layer *l, const desk *desk, int64_t tile, int64_t tile_end, float *sums, const int tokens,
                    const int bits) {
    const int rows = tokens == 1 ? SUMS : SUMS * LANES / tokens;
    for (; tile < tile_end; tile++) {
        for (int row = 0; row < TILE_ROWS; row += rows) {
            float *out = sums + (tile * TILE_ROWS + row) * tokens;
            if (tokens == 1) add_for_one(l, desk, tile, row, out, bits);
            else add_for_many(l, desk, tile, row, out, tokens / LANES, bits);
        }
    }
}

INLINE void add_with(const layer *l, const desk *desk, int64_t tile, int64_t tile_end, float *sums, const int tokens) {
    if (l->high_bits == 0) add_for(l, desk, tile, tile_end, sums, tokens, 0);
    else add_for(l, desk, tile, tile_end, sums, tokens, l->high_bits);
}

INLINE void add_float_tables(const layer *l, const desk *desk, int64_t tile, int64_t tile_end, float *sums) {
    switch (l->kind->tokens) {
        case 1: add_with(l, desk, tile, tile_end, sums, 1); break;
#if LANES == 4
        case 4: add_with(l, desk, tile, tile_end, sums, 4); break;
#endif
        case 8: add_with(l, desk, tile, tile_end, sums, 8); break;
        default: add_with(l, desk, tile, tile_end, sums, 16); break;
    }
}
