/* AVX-512 without VBMI: tables of 16-bit integers, 32 lookups in four word shuffles, sums in 32 bits. Everything else
 * is AVX2's. Its speed has not been measured. */
#include "avx512.h"

#ifdef HAVE_X86
#include <string.h>

#define TARGET TARGET_AVX512("")

/* Tables of one block and one token: per group 256 words. */
TARGET static void make_word_tables(const layer *l, desk *desk) {
    float minima[TILE_GROUPS];
    make_sums(l, desk, minima);
    __m512 scale = _mm512_set1_ps(desk->step > 0 ? 1 / desk->step : 0.0f);
    for (int g = 0; g < desk->count; g++) {
        const float *in = desk->scratch + g * TABLE;
        uint16_t *out = (uint16_t *)desk->tables + g * TABLE;
        __m512 minimum = _mm512_set1_ps(minima[g]);
        for (int64_t c = 0; c < l->padded_size; c += 16) {
            __m512 value = _mm512_sub_ps(_mm512_loadu_ps(in + c), minimum);
            __m512i units = _mm512_cvtps_epu32(_mm512_mul_ps(value, scale));
            _mm256_storeu_si256((__m256i *)(out + c), _mm512_cvtusepi32_epi16(units));
        }
    }
}

/* Adds one block to 64 rows. Words are summed in pairs: `all` holds even + 65536 * odd, `odd` the odd ones. Sums are kept
 * in that order, even ones first, see `rows_of_sums`. */
TARGET static void add_word_tables(const layer *l, const desk *desk, int64_t tile, float *sums) {
    const uint8_t *codes = l->call->tiles + (desk->block * l->row_tiles + tile) * TILE;
    const __m512i bit6 = _mm512_set1_epi16(64), bit7 = _mm512_set1_epi16(128);
    __m512i all[2], odd[2];
    for (int p = 0; p < 2; p++) all[p] = odd[p] = _mm512_setzero_si512();
    for (int g = 0; g < desk->count; g++) {
        const uint16_t *words = (const uint16_t *)desk->tables + g * TABLE;
        __m512i table[8];
        for (int q = 0; q < 8; q++) table[q] = _mm512_loadu_si512(words + 32 * q);
        for (int p = 0; p < 2; p++) {
            const uint8_t *here = codes + p * 2 * TILE + g * TILE_ROWS;
            __m256i bytes = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)here));
            bytes = _mm256_inserti128_si256(bytes, _mm_loadu_si128((const __m128i *)(here + TILE)), 1);
            __m512i code = _mm512_cvtepu8_epi16(bytes);
            __mmask32 second = _mm512_test_epi16_mask(code, bit6), upper = _mm512_test_epi16_mask(code, bit7);
            __m512i quarter[4]; /* what each 64 entries have for the code's lowest bits */
            for (int q = 0; q < 4; q++) quarter[q] = _mm512_permutex2var_epi16(table[2 * q], code, table[2 * q + 1]);
            __m512i low = _mm512_mask_blend_epi16(second, quarter[0], quarter[1]);
            __m512i high = _mm512_mask_blend_epi16(second, quarter[2], quarter[3]);
            __m512i entries = _mm512_mask_blend_epi16(upper, low, high);
            all[p] = _mm512_add_epi32(all[p], entries);
            odd[p] = _mm512_add_epi32(odd[p], _mm512_srli_epi32(entries, 16));
        }
    }
    __m512 step = _mm512_set1_ps(desk->step), offset = _mm512_set1_ps(desk->offset);
    for (int p = 0; p < 2; p++) {
        float *out = sums + tile * TILE_ROWS + p * 32;
        __m512i units[2] = {_mm512_sub_epi32(all[p], _mm512_slli_epi32(odd[p], 16)), odd[p]};
        for (int q = 0; q < 2; q++) {
            __m512 sum = _mm512_fmadd_ps(step, _mm512_cvtepi32_ps(units[q]), offset);
            _mm512_storeu_ps(out + 16 * q, _mm512_add_ps(_mm512_loadu_ps(out + 16 * q), sum));
        }
    }
}

TARGET static void add_to_rows(const layer *l, const desk *desk, int64_t tile, int64_t tile_end, float *sums) {
    for (; tile < tile_end; tile += 4) add_word_tables(l, desk, tile, sums);
}

/* Puts the sums of 64 rows in the order of the rows. */
static void rows_of_sums(float *sums) {
    float rows[64];
    for (int i = 0; i < 64; i++) rows[i] = sums[i / 32 * 32 + i % 2 * 16 + i % 32 / 2];
    memcpy(sums, rows, sizeof rows);
}

TARGET static void read_columns(layer *l) { read_codebooks_avx512(l); }

static const table_kind word_tables = {
    .tokens = 1,
    .pass = 1,
    .most_tokens = 1,
    .entry_bytes = sizeof(uint16_t),
    .near_bytes = TILE_GROUPS * TABLE * sizeof(uint16_t),
    .scratch = 1,
    .read_codebooks = read_columns,
    .make = make_word_tables,
    .add = add_to_rows,
    .order_rows = rows_of_sums,
};

const instruction_set avx512bw_set = {
    .runs_here = avx512_runs_here,
    .on_request = 1,
    .read_floats = avx2_read_floats,
    .write_floats = avx2_write_floats,
    .dequantize = avx2_dequantize,
    .search = avx2_search,
    .int8_rows = avx2_int8_rows,
    .integer_tables = &word_tables,
    .float_tables = avx2_float_tables,
};
#endif
