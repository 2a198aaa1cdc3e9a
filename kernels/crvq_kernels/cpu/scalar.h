/* What other instruction sets take from plain C. */
#pragma once
#include "instruction_set.h"

void scalar_read_floats(float *out, const void *data, int type, int64_t start, int64_t count);
void scalar_write_floats(void *data, int type, int64_t start, const float *in, int64_t count);
void scalar_dequantize(layer *l, int64_t tile, int64_t tile_end);
int scalar_search(const crvq_search_call *call, int64_t row, int64_t row_end);
void scalar_int8_rows(const crvq_rows_call *call, int64_t row, int64_t row_end);
extern const table_kind scalar_float_tables[];
