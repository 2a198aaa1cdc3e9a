/* What follows from a call: the sizes of its layer, and the codebooks as fp32. */
#include <string.h>

#include "instruction_set.h"

enum {
    SOME_ROWS = 16,  /* read at a time; padded_size is a multiple */
    MAX_PARTS = 4,   /* of the groups of a layer */
    PART_BLOCKS = 2, /* least blocks of a part */
};

void describe(layer *l, const crvq_call *c) {
    memset(l, 0, sizeof *l);
    l->call = c;
    l->set = instruction_sets[c->instructions];
    l->groups = c->in_features / c->group;
    l->virtual_groups = l->groups + (int64_t)(c->num_codebooks - 1) * c->critical;
    l->blocks = (l->virtual_groups + TILE_GROUPS - 1) / TILE_GROUPS;
    l->rows = (c->out_features + ROW_MULTIPLE - 1) / ROW_MULTIPLE * ROW_MULTIPLE;
    l->row_tiles = l->rows / TILE_ROWS;
    l->high_bits = c->nbits <= 8 ? 0 : c->nbits == 9 ? 1 : c->nbits == 10 ? 2 : 4;
    l->high = c->tiles + l->blocks * l->row_tiles * TILE;
    l->entries = c->nbits <= 8 ? TABLE : (int64_t)1 << c->nbits; /* any code is within */
    l->padded_size = (c->codebook_size + 15) / 16 * 16;
    l->parts = l->blocks / PART_BLOCKS < MAX_PARTS ? (int)(l->blocks / PART_BLOCKS) : MAX_PARTS;
    if (l->parts < 1) l->parts = 1;
    l->threads = 1;
}

void choose_tables(layer *l, int64_t first_token) {
    const crvq_call *c = l->call;
    int64_t left = c->tokens - first_token;
    const table_kind *kind = l->set->integer_tables;
    if (!kind || c->nbits > 8 || c->tokens > kind->most_tokens) {
        /* What is left over of many tokens lies side by side too: their codebooks have been read as rows. */
        kind = l->set->float_tables;
        if (c->tokens > kind->pass) kind++;
        while (kind->pass < left && kind->tokens < MAX_TOKENS) kind++;
    }
    l->kind = kind;
    l->by_row = kind->tokens > 1;
    l->table_groups = TILE_GROUPS;
    while (l->table_groups > 1 && l->table_groups * l->entries * kind->entry_bytes > kind->near_bytes) {
        l->table_groups /= 2;
    }
    l->table_size = l->table_groups * l->entries * kind->entry_bytes;
    l->first_token = first_token;
    l->tokens = left < kind->pass ? left : kind->pass;
    l->padded_tokens = (l->tokens + kind->tokens - 1) / kind->tokens * kind->tokens;
}

void read_codebooks(layer *l) {
    const crvq_call *c = l->call;
    int d = c->group;
    for (int b = 0; b < c->num_codebooks; b++) {
        float *out = l->codebooks + (int64_t)b * l->padded_size * d;
        for (int64_t row = 0; row < l->padded_size; row += SOME_ROWS) {
            float rows[SOME_ROWS * MAX_GROUP], *here = l->by_row ? out + row * d : rows;
            int64_t left = row < c->codebook_size ? c->codebook_size - row : 0;
            int64_t count = left < SOME_ROWS ? left : SOME_ROWS;
            l->set->read_floats(here, c->codebooks, c->codebook_type, (b * c->codebook_size + row) * d, count * d);
            for (int64_t k = count; k < SOME_ROWS; k++) {
                l->set->read_floats(here + k * d, c->codebooks, c->codebook_type, b * c->codebook_size * d, d);
            }
            for (int i = 0; !l->by_row && i < d; i++) {
                for (int k = 0; k < SOME_ROWS; k++) out[i * l->padded_size + row + k] = rows[k * d + i];
            }
        }
    }
}
