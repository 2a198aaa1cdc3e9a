/* Lookups in fp32 tables, one by one, which are no slower than gathers. */
#include "float_tables.h"

#include <string.h>

enum { NEAR_BYTES = 32 * 1024 }; /* tables in use at a time; they should stay in the L1 cache */

/* Adds `count` groups of a block, from `group` on, to the rows of one tile. */
INLINE void add_float_tables_of(const layer *l, float *sums, int64_t block, int64_t tile, int group, int count,
                                const float *tables, int high_bits) {
    int64_t position = (block * l->row_tiles + tile) * TILE + group * TILE_ROWS;
    const uint8_t *codes = l->call->tiles + position, *high = l->high + position * high_bits / 8;
    float near[TILE_ROWS];
    memcpy(near, sums, sizeof near);
    for (int g = 0; g < count; g++, codes += TILE_ROWS, high += 2 * high_bits, tables += l->entries) {
        uint64_t bits = 0;
        memcpy(&bits, high, 2 * high_bits);
        for (int r = 0; r < TILE_ROWS; r++) {
            near[r] += tables[codes[r] | (bits >> r * high_bits & ((1 << high_bits) - 1)) << 8];
        }
    }
    memcpy(sums, near, sizeof near);
}

void add_float_tables(const layer *l, int64_t block, int last, int64_t tile_start, int64_t tile_end, const desk *desk,
                      float *sums) {
    (void)last;
    const float *tables = (const float *)desk->tables;
    int near = (int)(NEAR_BYTES / (l->entries * sizeof(float))), total = groups_in(l, block);
    for (int group = 0; group < total; group += near, tables += near * l->entries) {
        int count = total - group < near ? total - group : near;
        for (int64_t tile = tile_start; tile < tile_end; tile++) {
            float *rows = sums + tile * TILE_ROWS;
            switch (l->high_bits) {
                case 0: add_float_tables_of(l, rows, block, tile, group, count, tables, 0); break;
                case 1: add_float_tables_of(l, rows, block, tile, group, count, tables, 1); break;
                case 2: add_float_tables_of(l, rows, block, tile, group, count, tables, 2); break;
                default: add_float_tables_of(l, rows, block, tile, group, count, tables, 4); break;
            }
        }
    }
}

