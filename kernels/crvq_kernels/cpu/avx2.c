/* AVX2: fp32 tables made with fused multiply-adds, half precision by instructions. */
#include "avx2.h"

#ifdef HAVE_X86
#include <cpuid.h>
#include <immintrin.h>

#define LANES 8
#include "code_search.h"
#include "dense_rows.h"
#include "float_tables.h"
#include "int8_rows.h"
#include "numbers.h"

#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2")))

int avx2_runs_here(void) {
    unsigned a, b, c, d; /* clang 14 cannot be asked for f16c */
    int f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && f16c;
}

TARGET void avx2_read_floats(float *out, const void *data, int type, int64_t start, int64_t count) {
    int64_t i = 0;
    if (type == FLOAT16) {
        const uint16_t *in = (const uint16_t *)data + start;
        for (; i + 8 <= count; i += 8) {
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
        }
    }
    for (; i < count; i++) out[i] = load(data, type, start + i);
}

TARGET void avx2_write_floats(void *data, int type, int64_t start, const float *in, int64_t count) {
    int64_t i = 0;
    if (type == FLOAT16) {
        uint16_t *out = (uint16_t *)data + start;
        for (; i + 8 <= count; i += 8) {
            __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128((__m128i *)(out + i), halves);
        }
    }
    for (; i < count; i++) store(data, type, start + i, in[i]);
}

TARGET void avx2_dequantize(layer *l, int64_t tile, int64_t tile_end) { dequantize_rows(l, tile, tile_end); }

TARGET static void make(const layer *l, desk *desk) { make_float_tables(l, desk); }

TARGET static void add(const layer *l, const desk *desk, int64_t tile, int64_t tile_end, float *sums) {
    add_float_tables(l, desk, tile, tile_end, sums);
}

TARGET int avx2_search(const crvq_search_call *c, int64_t row, int64_t row_end) { return search_rows(c, row, row_end); }

TARGET void avx2_int8_rows(const crvq_rows_call *c, int64_t row, int64_t row_end) {
    multiply_int8_rows(c, row, row_end);
}

const table_kind avx2_float_tables[] = {
    FLOAT_TABLES(1, 2, 32, make, add),
    FLOAT_TABLES(8, 8, 128, make, add),
    FLOAT_TABLES(16, 16, 256, make, add),
};

const instruction_set avx2_set = {
    .runs_here = avx2_runs_here,
    .read_floats = avx2_read_floats,
    .write_floats = avx2_write_floats,
    .dequantize = avx2_dequantize,
    .search = avx2_search,
    .int8_rows = avx2_int8_rows,
    .float_tables = avx2_float_tables,
};
#endif
