/* What an instruction set fills in, and the list of all of them. A new one is a file with its structs (as avx2.c), its
 * number here and a line in instruction_set.c; binding.py has the names. */
#pragma once
#include "layer.h"

/* The instruction sets by number: each is better than the one before. */
enum { SCALAR = 0, AVX2 = 1, VBMI = 2, INSTRUCTION_SETS };

/* Whether sets of this architecture are compiled. */
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86 1
#endif

/* What a function of an instruction set includes is compiled as part of it, with its instructions. */
#define INLINE static inline __attribute__((always_inline))

/* One way to make tables and to add their entries up. */
typedef struct table_kind {
    int entry_bytes;
    /* Codewords to `l->codebooks`, a column for each dimension. */
    void (*read_codebooks)(layer *l);
    /* Tables of `desk->x` to `desk->tables`, for the groups of a block. */
    void (*make)(const layer *l, int64_t block, desk *desk);
    /* Adds one block to the rows of the tiles from `tile` to `tile_end`, a multiple of 4 tiles; `last` of its part. */
    void (*add)(const layer *l, int64_t block, int last, int64_t tile, int64_t tile_end, const desk *desk,
                float *sums);
    /* Puts the sums of ROW_MULTIPLE rows in the order of the rows; NULL where they are. */
    void (*order_rows)(float *sums);
} table_kind;

typedef struct instruction_set {
    /* Whether this processor has the instructions. */
    int (*runs_here)(void);
    /* Elements [start, start + count) of `data`, of any float type. */
    void (*read_floats)(float *out, const void *data, int type, int64_t start, int64_t count);
    void (*write_floats)(void *data, int type, int64_t start, const float *in, int64_t count);
    /* Rows of the dense weight that the tiles from `tile` to `tile_end` have. */
    void (*dequantize)(layer *l, int64_t tile, int64_t tile_end);
    /* Codes of the rows from `row` to `row_end`. Returns OK or BAD_CODE. */
    int (*search)(const crvq_search_call *call, int64_t row, int64_t row_end);
    /* Outputs of the rows from `row` to `row_end`. */
    void (*int8_rows)(const crvq_rows_call *call, int64_t row, int64_t row_end);
    const table_kind *byte_codes; /* tables for codes of at most 8 bits */
    const table_kind *wide_codes; /* for longer ones */
} instruction_set;

extern const instruction_set scalar_set, avx2_set, vbmi_set;

/* By number; NULL where the architecture has no such instructions. */
extern const instruction_set *const instruction_sets[INSTRUCTION_SETS];
