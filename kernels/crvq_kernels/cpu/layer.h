/* A layer as one call sees it, and how its codes lie in memory (packing.py).
 *
 * A layer is y[n] = scale[n] * sum_v <codebook_of_v[code[n, v]], x_v> + bias[n] over V virtual groups. The products of
 * group v with all codewords are a table, table[v][c] = <codebook_of_v[c], x_v>, made once for all N rows; a row is then
 * a sum of V table entries. Tables of several tokens may lie side by side, so that an entry holds a number for each, and
 * one lookup serves all of them. A thread makes tables for itself, since those of another would have to come from its
 * cache. So threads divide the tokens, where there are many, else the groups, in parts that follow from the layer alone,
 * and only where they are more than parts also the rows: every number is computed by the same operations in the same
 * order whatever the number of threads.
 */
#pragma once
#include <stdatomic.h>
#include <stdint.h>

#include "call.h"

enum {
    TILE_GROUPS = 32,
    TILE_ROWS = 16,
    TILE = TILE_GROUPS * TILE_ROWS,
    ROW_MULTIPLE = 64, /* rows are padded to this many: one AVX-512 register of codes */
    TABLE = 256,       /* entries of a table, up to 8 bits */
    MAX_GROUP = 16,
    MAX_TOKENS = 16, /* side by side */
};

typedef struct {
    const crvq_call *call;
    const struct instruction_set *set;
    const struct table_kind *kind;
    int64_t groups, virtual_groups, blocks; /* G, V, blocks of TILE_GROUPS virtual groups */
    int64_t row_tiles, rows;                /* tiles of TILE_ROWS rows, rows with padding */
    int64_t padded_size;                    /* codewords per codebook in `codebooks` */
    const uint8_t *high;                    /* high plane of the codes, NULL up to 8 bits */
    int high_bits;
    int by_row; /* codebooks are [num_codebooks, padded_size, group], else [num_codebooks, group, padded_size] */
    float *codebooks;
    const float *x;     /* [tokens, in_features] of the pass */
    float *staged;      /* the same as fp32, where they are not */
    int64_t entries;    /* of a table */
    int table_groups;   /* whose tables are made at a time; divides TILE_GROUPS */
    int64_t table_size; /* bytes of their tables */
    uint8_t *tables;    /* [threads, table_size] */
    float *scratch;     /* [threads, TILE_GROUPS, TABLE], or NULL */
    float *sums;        /* [parts, padded_tokens / side, rows, side], side = kind->tokens */
    int64_t first_token, tokens, padded_tokens; /* of the pass; padded to what lies side by side */
    int threads, parts, slices;  /* slices: of the rows */
    atomic_int next_item;        /* part and slice to be taken up next */
    atomic_int finished;         /* threads for which there was none */
    atomic_int status;
} layer;

/* What a thread is at work on: some groups of one block, for the tokens that lie side by side in their tables. */
typedef struct {
    int64_t block;
    int first, count; /* groups of the block */
    int last;         /* whether this is the last block of the part */
    float x[TILE_GROUPS * MAX_GROUP * MAX_TOKENS]; /* [count * group, kind->tokens] */
    float not_finite[MAX_TOKENS];                  /* NaN where x of the token has NaN or infinite values, else 0 */
    float step;   /* integer tables: value of one unit */
    float offset; /* integer tables: what a row stands for when all its entries are 0 */
    uint8_t *tables;
    float *scratch;
} desk;

/* Fills in what follows from the call; tables, memory and threads are for the caller to find. */
void describe(layer *l, const crvq_call *call);

/* Chooses the tables for the next pass, which starts at `first_token`. Those of later passes take no more memory. */
void choose_tables(layer *l, int64_t first_token);

/* Codewords as fp32. Entries past codebook_size repeat the first, so that they move no minimum or maximum. */
void read_codebooks(layer *l);

static inline int groups_in(const layer *l, int64_t block) {
    int64_t left = l->virtual_groups - block * TILE_GROUPS;
    return left < TILE_GROUPS ? (int)left : TILE_GROUPS;
}

/* The codebook of a group on the desk. */
static inline const float *codebook_of(const layer *l, const desk *desk, int group) {
    int64_t v = desk->block * TILE_GROUPS + desk->first + group;
    int64_t number = v < l->groups ? 0 : 1 + (v - l->groups) / l->call->critical;
    return l->codebooks + number * l->padded_size * l->call->group;
}

/* The input channel at a position of the channel order; 0 and `status` set if there is no such channel. */
static inline int64_t channel(const crvq_call *call, int64_t position, atomic_int *status) {
    int64_t channel;
    switch (call->order_bytes) {
        case 1: channel = ((const uint8_t *)call->order)[position]; break;
        case 2: channel = ((const int16_t *)call->order)[position]; break;
        case 4: channel = ((const int32_t *)call->order)[position]; break;
        default: channel = ((const int64_t *)call->order)[position];
    }
    if ((uint64_t)channel < (uint64_t)call->in_features) return channel;
    atomic_store(status, BAD_ORDER);
    return 0;
}
