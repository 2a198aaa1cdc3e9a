/* What an instruction set fills in, and the list of all of them. A new one is a file with its structs (as avx2.c), its
 * number here and a line in instruction_set.c; binding.py has the names. */
#pragma once
#include "layer.h"

/* The instruction sets by number: each is better than those before, but for what is chosen on request only. */
enum { SCALAR = 0, AVX2 = 1, AVX512BW = 2, VBMI = 3, NEON = 4, INSTRUCTION_SETS };

/* Whether sets of this architecture are compiled. */
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86 1
#elif defined(__aarch64__) && defined(__GNUC__)
#define HAVE_ARM64 1
#endif

/* What a function of an instruction set includes is compiled as part of it, with its instructions. */
#define INLINE static inline __attribute__((always_inline))

/* One kind of tables. */
typedef struct table_kind {
    int tokens;      /* that lie side by side in an entry */
    int pass;        /* tokens that share a pass over the codes, a multiple */
    int most_tokens; /* integer tables: of a call; for more, fp32 tables are faster */
    int entry_bytes;
    int near_bytes; /* tables in use at a time */
    int scratch;    /* whether `make` needs some */
    /* Codewords to `l->codebooks`: for one token a column for each dimension, for several a row for each codeword. */
    void (*read_codebooks)(layer *l);
    /* Tables of `desk->x` to `desk->tables`, for the groups on the desk. */
    void (*make)(const layer *l, desk *desk);
    /* Adds these groups to the rows of the tiles from `tile` to `tile_end`, a multiple of 4 tiles. */
    void (*add)(const layer *l, const desk *desk, int64_t tile, int64_t tile_end, float *sums);
    /* Puts the sums of ROW_MULTIPLE rows in the order of the rows; NULL where they are. */
    void (*order_rows)(float *sums);
} table_kind;

typedef struct instruction_set {
    /* Whether this processor has the instructions. */
    int (*runs_here)(void);
    int on_request; /* not by itself: its speed is not known to be better */
    /* Elements [start, start + count) of `data`, of any float type. */
    void (*read_floats)(float *out, const void *data, int type, int64_t start, int64_t count);
    void (*write_floats)(void *data, int type, int64_t start, const float *in, int64_t count);
    /* Rows of the dense weight that the tiles from `tile` to `tile_end` have. */
    void (*dequantize)(layer *l, int64_t tile, int64_t tile_end);
    /* Codes of the rows from `row` to `row_end`. Returns OK or BAD_CODE. */
    int (*search)(const crvq_search_call *call, int64_t row, int64_t row_end);
    /* Outputs of the rows from `row` to `row_end`. */
    void (*int8_rows)(const crvq_rows_call *call, int64_t row, int64_t row_end);
    const table_kind *integer_tables; /* for codes of at most 8 bits and one token at a time; NULL if there are none */
    const table_kind *float_tables;   /* for one token and, side by side, for more and more; the last has MAX_TOKENS */
} instruction_set;

extern const instruction_set scalar_set, avx2_set, avx512bw_set, vbmi_set, neon_set;

/* By number; NULL where the architecture has no such instructions. */
extern const instruction_set *const instruction_sets[INSTRUCTION_SETS];
