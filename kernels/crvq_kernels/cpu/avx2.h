/* What wider instruction sets of x86 take from AVX2. */
#pragma once
#include "instruction_set.h"

#ifdef HAVE_X86
int avx2_runs_here(void);
void avx2_read_floats(float *out, const void *data, int type, int64_t start, int64_t count);
void avx2_write_floats(void *data, int type, int64_t start, const float *in, int64_t count);
void avx2_dequantize(layer *l, int64_t tile, int64_t tile_end);
int avx2_search(const crvq_search_call *call, int64_t row, int64_t row_end);
void avx2_int8_rows(const crvq_rows_call *call, int64_t row, int64_t row_end);
extern const table_kind avx2_float_tables[];
#endif
