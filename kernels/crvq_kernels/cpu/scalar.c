/* Plain C, for any processor: fp32 tables. The compiler makes vectors of it, of SSE or NEON. */
#include "scalar.h"

#define LANES 4
#include "code_search.h"
#include "dense_rows.h"
#include "float_tables.h"
#include "int8_rows.h"
#include "numbers.h"

static int runs_here(void) { return 1; }

void scalar_read_floats(float *out, const void *data, int type, int64_t start, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = load(data, type, start + i);
}

void scalar_write_floats(void *data, int type, int64_t start, const float *in, int64_t count) {
    for (int64_t i = 0; i < count; i++) store(data, type, start + i, in[i]);
}

void scalar_dequantize(layer *l, int64_t tile, int64_t tile_end) { dequantize_rows(l, tile, tile_end); }

static void make(const layer *l, desk *desk) { make_float_tables(l, desk); }

static void add(const layer *l, const desk *desk, int64_t tile, int64_t tile_end, float *sums) {
    add_float_tables(l, desk, tile, tile_end, sums);
}

int scalar_search(const crvq_search_call *c, int64_t row, int64_t row_end) { return search_rows(c, row, row_end); }

void scalar_int8_rows(const crvq_rows_call *c, int64_t row, int64_t row_end) { multiply_int8_rows(c, row, row_end); }

const table_kind scalar_float_tables[] = {
    FLOAT_TABLES(1, 2, 32, make, add),
    FLOAT_TABLES(4, 4, 64, make, add),
    FLOAT_TABLES(8, 8, 128, make, add),
    FLOAT_TABLES(16, 16, 256, make, add),
};

const instruction_set scalar_set = {
    .runs_here = runs_here,
    .read_floats = scalar_read_floats,
    .write_floats = scalar_write_floats,
    .dequantize = scalar_dequantize,
    .search = scalar_search,
    .int8_rows = scalar_int8_rows,
    .float_tables = scalar_float_tables,
};
