/* Plain C, for any processor: fp32 tables. */
#define LANES 4
#include "code_search.h"
#include "dense_rows.h"
#include "float_tables.h"
#include "numbers.h"

static int runs_here(void) { return 1; }

static void read_floats(float *out, const void *data, int type, int64_t start, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = load(data, type, start + i);
}

static void write_floats(void *data, int type, int64_t start, const float *in, int64_t count) {
    for (int64_t i = 0; i < count; i++) store(data, type, start + i, in[i]);
}

static void dequantize(layer *l, int64_t tile, int64_t tile_end) { dequantize_rows(l, tile, tile_end); }

static void make(const layer *l, desk *desk) { make_float_tables(l, desk); }

static void add(const layer *l, const desk *desk, int64_t tile, int64_t tile_end, float *sums) {
    add_float_tables(l, desk, tile, tile_end, sums);
}

static int search(const crvq_search_call *c, int64_t row, int64_t row_end) { return search_rows(c, row, row_end); }

static const table_kind float_tables[] = {
    FLOAT_TABLES(1, 2, 32, make, add),
    FLOAT_TABLES(4, 4, 64, make, add),
    FLOAT_TABLES(8, 8, 128, make, add),
    FLOAT_TABLES(16, 16, 256, make, add),
};

const instruction_set scalar_set = {
    .runs_here = runs_here,
    .read_floats = read_floats,
    .write_floats = write_floats,
    .dequantize = dequantize,
    .search = search,
    .float_tables = float_tables,
};
