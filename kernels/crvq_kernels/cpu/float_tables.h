/* fp32 tables: made in plain C by each instruction set as its own, for the compiler makes vectors of the loop over
 * entries; looked up by all alike. */
#pragma once
#include "instruction_set.h"

/* Adds one block to the rows of the tiles from `tile` to `tile_end`, see table_kind. */
void add_float_tables(const layer *l, int64_t block, int last, int64_t tile, int64_t tile_end, const desk *desk,
                      float *sums);

/* table[g][c] for the groups of one block and one token. */
INLINE void make_float_tables(const layer *l, int64_t block, desk *desk) {
    enum { AT_ONCE = 16 }; /* entries whose sums stay in registers; padded_size is a multiple */
    int d = l->call->group;
    const float *x = desk->x;
    float *tables = (float *)desk->tables, start = desk->not_finite;
    for (int g = 0, count = groups_in(l, block); g < count; g++, x += d, tables += l->entries) {
        const float *codebook = l->codebooks + (int64_t)codebook_of(l, block * TILE_GROUPS + g) * l->padded_size * d;
        for (int64_t c = 0; c < l->padded_size; c += AT_ONCE) {
            float sums[AT_ONCE];
            for (int k = 0; k < AT_ONCE; k++) sums[k] = start;
            for (int i = 0; i < d; i++) {
                for (int k = 0; k < AT_ONCE; k++) sums[k] += codebook[i * l->padded_size + c + k] * x[i];
            }
            for (int k = 0; k < AT_ONCE; k++) tables[c + k] = sums[k];
        }
    }
}
