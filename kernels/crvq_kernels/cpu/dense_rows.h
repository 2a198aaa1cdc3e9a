/* The dense weight in plain C, for an instruction set to compile as its own. */
#pragma once
#include "instruction_set.h"
#include "numbers.h"

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

/* The tiles of a layer, as values of their own: what is written cannot change them, as the compiler knows. */
typedef struct {
    const uint8_t *low, *high;
    int64_t row_tiles;
} codes;

INLINE int code_at(codes codes, int64_t group, int64_t row_tile, int row, const int bits) {
    int64_t tile = group / TILE_GROUPS * codes.row_tiles + row_tile;
    int64_t position = tile * TILE + group % TILE_GROUPS * TILE_ROWS + row;
    int code = codes.low[position];
    if (bits) code |= (codes.high[position * bits >> 3] >> (position * bits & 7) & ((1 << bits) - 1)) << 8;
    return code;
}

INLINE void dequantize_tile(layer *l, int64_t tile, int64_t block, const int d, const int bits) {
    const crvq_call c = *l->call;
    codes codes = {c.tiles, l->high, l->row_tiles};
    const float *codebooks = l->codebooks;
    int64_t groups = l->groups, padded_size = l->padded_size, end = (block + 1) * TILE_GROUPS;
    if (end > groups) end = groups;
    for (int r = 0; r < TILE_ROWS; r++) {
        int64_t row = tile * TILE_ROWS + r;
        if (row < c.row_start || row >= c.row_start + c.row_count) continue;
        float scale = load(c.scales, c.scale_type, row), *line = (float *)c.y + (row - c.row_start) * c.in_features;
        for (int64_t group = block * TILE_GROUPS; group < end; group++) {
            const four *codeword = (const four *)(codebooks + code_at(codes, group, tile, r, bits) * d);
            four sum[MAX_GROUP / 4];
            for (int i = 0; i < d / 4; i++) sum[i] = codeword[i];
            for (int b = 1; group < c.critical && b < c.num_codebooks; b++) {
                int code = code_at(codes, groups + (int64_t)(b - 1) * c.critical + group, tile, r, bits);
                codeword = (const four *)(codebooks + (b * padded_size + code) * d);
                for (int i = 0; i < d / 4; i++) sum[i] += codeword[i];
            }
            for (int i = 0; i < d / 4; i++) sum[i] *= scale;
            if (c.permuted) {
                for (int i = 0; i < d / 4; i++) ((four *)(line + group * d))[i] = sum[i];
            } else {
                for (int i = 0; i < d; i++) line[channel(&c, group * d + i, &l->status)] = sum[i / 4][i % 4];
            }
        }
    }
}

INLINE void dequantize_tiles(layer *l, int64_t tile, int64_t tile_end, const int d) {
    for (; tile < tile_end; tile++) {
        for (int64_t block = 0; block * TILE_GROUPS < l->groups; block++) {
            if (l->high_bits == 0) dequantize_tile(l, tile, block, d, 0);
            else dequantize_tile(l, tile, block, d, l->high_bits);
        }
    }
}

INLINE void dequantize_rows(layer *l, int64_t tile, int64_t tile_end) {
    switch (l->call->group) {
        case 4: dequantize_tiles(l, tile, tile_end, 4); break;
        case 8: dequantize_tiles(l, tile, tile_end, 8); break;
        default: dequantize_tiles(l, tile, tile_end, 16); break;
    }
}
