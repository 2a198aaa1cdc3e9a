/* What follows from a call: the sizes of its layer, and the codebooks as fp32. */
#include <string.h>

#include "instruction_set.h"
#include "numbers.h"

void describe(layer *l, const crvq_call *c) {
    memset(l, 0, sizeof *l);
    l->call = c;
    l->set = instruction_sets[c->instructions];
    l->kind = c->nbits <= 8 ? l->set->byte_codes : l->set->wide_codes;
    l->groups = c->in_features / c->group;
    l->virtual_groups = l->groups + (int64_t)(c->num_codebooks - 1) * c->critical;
    l->blocks = (l->virtual_groups + TILE_GROUPS - 1) / TILE_GROUPS;
    l->rows = (c->out_features + ROW_MULTIPLE - 1) / ROW_MULTIPLE * ROW_MULTIPLE;
    l->row_tiles = l->rows / TILE_ROWS;
    l->high_bits = c->nbits <= 8 ? 0 : c->nbits == 9 ? 1 : c->nbits == 10 ? 2 : 4;
    l->high = c->tiles + l->blocks * l->row_tiles * TILE;
    l->entries = c->nbits <= 8 ? TABLE : (int64_t)1 << c->nbits; /* any code is within */
    l->padded_size = (c->codebook_size + 15) / 16 * 16;
    l->table_size = TILE_GROUPS * l->entries * l->kind->entry_bytes;
    l->threads = 1;
}

void read_codebooks(layer *l) {
    const crvq_call *c = l->call;
    int d = c->group;
    for (int b = 0; b < c->num_codebooks; b++) {
        float *out = l->codebooks + (int64_t)b * l->padded_size * d;
        for (int64_t row = 0; row < l->padded_size; row++) {
            int64_t source = ((int64_t)b * c->codebook_size + (row < c->codebook_size ? row : 0)) * d;
            for (int i = 0; i < d; i++) {
                int64_t place = l->by_row ? row * d + i : i * l->padded_size + row;
                out[place] = load(c->codebooks, c->codebook_type, source + i);
            }
        }
    }
}
