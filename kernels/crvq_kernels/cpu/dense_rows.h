/* The dense weight in plain C, for an instruction set to compile as its own. */
#pragma once
#include "instruction_set.h"
#include "numbers.h"

static inline int code_at(const layer *l, int64_t block, int64_t row_tile, int group, int row) {
    int64_t position = (block * l->row_tiles + row_tile) * TILE + group * TILE_ROWS + row;
    int code = l->call->tiles[position];
    if (l->high_bits) {
        int64_t bit = position * l->high_bits;
        code |= (l->high[bit >> 3] >> (bit & 7) & ((1 << l->high_bits) - 1)) << 8;
    }
    return code;
}

INLINE void dequantize_tile(layer *l, int64_t tile, int64_t block, int d) {
    const crvq_call *c = l->call;
    float *out = c->y;
    for (int r = 0; r < TILE_ROWS; r++) {
        int64_t row = tile * TILE_ROWS + r;
        if (row < c->row_start || row >= c->row_start + c->row_count) continue;
        float scale = load(c->scales, c->scale_type, row), *line = out + (row - c->row_start) * c->in_features;
        for (int64_t g = 0; g < TILE_GROUPS && block * TILE_GROUPS + g < l->groups; g++) {
            int64_t group = block * TILE_GROUPS + g;
            const float *codeword = l->codebooks + (int64_t)code_at(l, block, tile, (int)g, r) * d;
            float sum[MAX_GROUP];
            for (int i = 0; i < d; i++) sum[i] = codeword[i];
            for (int b = 1; group < c->critical && b < c->num_codebooks; b++) {
                int64_t v = l->groups + (int64_t)(b - 1) * c->critical + group;
                int code = code_at(l, v / TILE_GROUPS, tile, (int)(v % TILE_GROUPS), r);
                codeword = l->codebooks + (b * l->padded_size + code) * d;
                for (int i = 0; i < d; i++) sum[i] += codeword[i];
            }
            if (c->permuted) {
                for (int i = 0; i < d; i++) line[group * d + i] = sum[i] * scale;
            } else {
                for (int i = 0; i < d; i++) line[channel(c, group * d + i, &l->status)] = sum[i] * scale;
            }
        }
    }
}

INLINE void dequantize_rows(layer *l, int64_t tile, int64_t tile_end) {
    for (; tile < tile_end; tile++) {
        for (int64_t block = 0; block * TILE_GROUPS < l->groups; block++) {
            switch (l->call->group) {
                case 4: dequantize_tile(l, tile, block, 4); break;
                case 8: dequantize_tile(l, tile, block, 8); break;
                default: dequantize_tile(l, tile, block, 16); break;
            }
        }
    }
}

