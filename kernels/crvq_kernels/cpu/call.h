/* What Python hands over, and the functions it calls (binding.py). */
#pragma once
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum { OK = 0, NO_MEMORY = 1, BAD_ORDER = 2, BAD_CODE = 3 };

/* One call. binding.py packs the same fields in the same order: first what changes from call to call. */
typedef struct {
    const void *x; /* [tokens, in_features] */
    void *y;       /* [tokens, out_features]; dequantize: fp32 [row_count, in_features] */
    int64_t tokens, row_start, row_count;
    int32_t x_type;       /* FLOAT32, FLOAT16 or BFLOAT16; y as x */
    int32_t instructions; /* number of the instruction set, see instruction_set.h */
    int32_t threads;
    int32_t permuted; /* dequantize: columns in channel order, else original order */

    const uint8_t *tiles;
    const void *codebooks; /* [num_codebooks, codebook_size, group] */
    const void *scales;    /* [out_features] */
    const void *order;     /* [in_features] */
    const void *bias;      /* [out_features] or NULL */
    int64_t out_features, in_features;
    int32_t group, num_codebooks, codebook_size, nbits, critical; /* critical: groups with extended codes */
    int32_t order_bytes;                                          /* size of an element of order */
    int32_t codebook_type, scale_type, bias_type;
    int32_t reserved;
} crvq_call;

/* y = x @ weight.T + bias. Returns OK, NO_MEMORY or BAD_ORDER. */
EXPORT int crvq_linear(const crvq_call *call);

/* Writes rows [row_start, row_start + row_count) of the weight, fp32. Returns OK, NO_MEMORY or BAD_ORDER. */
EXPORT int crvq_dequantize(const crvq_call *call);

/* One search for codes (code_search.py has the same fields in the same order), for groups that lie beside each other.
 *
 * What the row n wants of a group is the vector w; the best codeword c has the largest w . c + energy[c], the first of
 * several. Without `metric`, w is what `wanted` holds there. With it the codes are changed one after the other, as one
 * step of Gauss-Seidel: w also has what the code of before was, and what a new code takes away from `wanted` is seen by
 * all groups after it. */
typedef struct {
    float *wanted;          /* [rows, groups * group], with a metric kept up to date */
    float *change;          /* [rows, groups * group]: what the codewords have changed by is added; with a metric */
    int64_t *codes;         /* [virtual groups, rows] */
    const float *codebooks; /* [num_codebooks, codebook_size, group] */
    const float *columns;   /* [num_codebooks, group, padded_size]: the same, a column for each dimension */
    const float *energies;  /* [groups, num_codebooks, padded_size], -infinity past codebook_size */
    const float *metric;    /* [groups * group, groups * group] or NULL */
    int64_t rows, groups, codebook_size, padded_size;
    int64_t first_group; /* number of the first of these groups in the layer */
    int64_t all_groups;  /* of the layer: the codes of extended codebooks come after as many rows of `codes` */
    int64_t critical;    /* groups of the layer that have extended codes */
    int32_t group, num_codebooks;
    int32_t instructions; /* number of the instruction set, see instruction_set.h */
    int32_t threads;
} crvq_search_call;

/* Writes the codes. Returns OK or BAD_CODE. */
EXPORT int crvq_search(const crvq_search_call *call);

/* One product with rows of int8 numbers (rows.py packs the same fields in the same order). */
typedef struct {
    const float *x;        /* [tokens, channels] */
    float *y;              /* [tokens, rows] */
    const int8_t *numbers; /* [rows, channels] */
    const void *scales;    /* [rows], one per row of the weight */
    int64_t tokens, rows, channels;
    int32_t scale_type;   /* FLOAT32, FLOAT16 or BFLOAT16 */
    int32_t instructions; /* number of the instruction set, see instruction_set.h */
    int32_t threads;
    int32_t reserved;
} crvq_rows_call;

/* y = scales * (x @ numbers.T). Returns OK. */
EXPORT int crvq_int8_rows(const crvq_rows_call *call);

/* The number of the instruction set to be used on this processor, and whether it has one of that number. */
EXPORT int crvq_instructions(void);
EXPORT int crvq_has_instructions(int number);

/* Size of all arguments, so that binding.py can refuse a library that was built from other sources. */
EXPORT int crvq_call_size(void);
