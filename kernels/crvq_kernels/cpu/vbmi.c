/* AVX-512 VBMI: tables of 16-bit integers as two byte planes, 64 lookups in six byte shuffles, sums in 16 bits. Codes
 * of more than 8 bits have AVX2's tables, and codes are searched for with AVX2. */
#include "avx512.h"

#ifdef HAVE_X86
#include <limits.h>
#include <string.h>

#define TARGET TARGET_AVX512(",avx512vbmi")

enum { AHEAD_TILES = 24 }; /* codes on their way from memory while others are looked up: 12 KiB */

static int runs_here(void) { return avx512_runs_here() && __builtin_cpu_supports("avx512vbmi"); }

/* Tables of one block and one token: per group 256 low bytes, then 256 high bytes. */
TARGET static void make_byte_tables(const layer *l, desk *desk) {
    float minima[TILE_GROUPS];
    make_sums(l, desk, minima);
    int64_t size = l->padded_size;
    __m512 scale = _mm512_set1_ps(desk->step > 0 ? 1 / desk->step : 0.0f);

    uint8_t pick[64];
    /* Packing dwords to words interleaves 128-bit lanes: word 8 * lane + 4 * source + i came from dword
     * 16 * source + 4 * lane + i. */
    for (int i = 0; i < 64; i++) {
        int pair = i / 32, source = i % 32 / 16, lane = i % 16 / 4;
        pick[i] = (uint8_t)(64 * pair + 2 * (8 * lane + 4 * source + i % 4));
    }
    __m512i low_bytes = _mm512_loadu_si512(pick), high_bytes = _mm512_add_epi8(low_bytes, _mm512_set1_epi8(1));
    for (int g = 0; g < desk->count; g++) {
        const float *in = desk->scratch + g * TABLE;
        uint8_t *out = desk->tables + g * 2 * TABLE;
        __m512 minimum = _mm512_set1_ps(minima[g]);
        for (int64_t c = 0; c < size; c += 64) {
            __m512i units[4];
            for (int k = 0; k < 4; k++) {
                __m512 value = _mm512_sub_ps(_mm512_loadu_ps(in + c + 16 * k), minimum);
                units[k] = _mm512_cvtps_epu32(_mm512_mul_ps(value, scale));
            }
            __m512i first = _mm512_packus_epi32(units[0], units[1]), second = _mm512_packus_epi32(units[2], units[3]);
            _mm512_storeu_si512(out + c, _mm512_permutex2var_epi8(first, low_bytes, second));
            _mm512_storeu_si512(out + TABLE + c, _mm512_permutex2var_epi8(first, high_bytes, second));
        }
    }
}

/* 256-entry lookup of 64 bytes: the entries are in four registers, bit 7 of a code says which pair. */
#define LOOKUP(table, code, upper)                                                      \
    _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8((table)[0], code, (table)[1]), \
                           _mm512_permutex2var_epi8((table)[2], code, (table)[3]))

/* Adds one block to `parts` * 64 rows. Bytes are summed as 16-bit words: `all` holds even + 256 * odd, `odd` the odd
 * ones. Sums are kept in the order that the last steps leave, see `rows_of_sums`. */
TARGET INLINE void add_byte_tables(const layer *l, const desk *desk, int64_t tile, float *sums, int parts,
                                   const uint8_t *ahead) {
    const uint8_t *codes = l->call->tiles + (desk->block * l->row_tiles + tile) * TILE;
    int count = desk->count;
    __m512i all_low[2], odd_low[2], all_high[2], odd_high[2];
    for (int p = 0; p < parts; p++) {
        all_low[p] = odd_low[p] = all_high[p] = odd_high[p] = _mm512_setzero_si512();
    }
    for (int g = 0; g < count; g += 4) {
        __m512i lanes[2][4];
        for (int p = 0; p < parts; p++) {
            /* Four tiles of [4 groups][16 rows] become four groups of [64 rows]. */
            const uint8_t *source = codes + p * 4 * TILE + g * TILE_ROWS;
            for (int k = 0; k < 4; k++) _mm_prefetch((const char *)(ahead + (source - codes) + k * TILE), _MM_HINT_T0);
            __m512i a = _mm512_loadu_si512(source), b = _mm512_loadu_si512(source + TILE);
            __m512i c = _mm512_loadu_si512(source + 2 * TILE), e = _mm512_loadu_si512(source + 3 * TILE);
            __m512i ab_low = _mm512_shuffle_i32x4(a, b, 0x44), ab_high = _mm512_shuffle_i32x4(a, b, 0xee);
            __m512i ce_low = _mm512_shuffle_i32x4(c, e, 0x44), ce_high = _mm512_shuffle_i32x4(c, e, 0xee);
            lanes[p][0] = _mm512_shuffle_i32x4(ab_low, ce_low, 0x88);
            lanes[p][1] = _mm512_shuffle_i32x4(ab_low, ce_low, 0xdd);
            lanes[p][2] = _mm512_shuffle_i32x4(ab_high, ce_high, 0x88);
            lanes[p][3] = _mm512_shuffle_i32x4(ab_high, ce_high, 0xdd);
        }
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            if (g + k >= count) break;
            const uint8_t *table = desk->tables + (g + k) * 2 * TABLE;
            __m512i low[4], high[4];
            for (int q = 0; q < 4; q++) {
                low[q] = _mm512_loadu_si512(table + 64 * q);
                high[q] = _mm512_loadu_si512(table + TABLE + 64 * q);
            }
            for (int p = 0; p < parts; p++) {
                __m512i code = lanes[p][k];
                __mmask64 upper = _mm512_movepi8_mask(code);
                __m512i bytes = LOOKUP(low, code, upper);
                all_low[p] = _mm512_add_epi16(all_low[p], bytes);
                odd_low[p] = _mm512_add_epi16(odd_low[p], _mm512_srli_epi16(bytes, 8));
                bytes = LOOKUP(high, code, upper);
                all_high[p] = _mm512_add_epi16(all_high[p], bytes);
                odd_high[p] = _mm512_add_epi16(odd_high[p], _mm512_srli_epi16(bytes, 8));
            }
        }
    }
    __m512 step = _mm512_set1_ps(desk->step), offset = _mm512_set1_ps(desk->offset);
    __m512i weights = _mm512_set1_epi32(256 << 16 | 1); /* low + 256 * high, as pairs of words */
    for (int p = 0; p < parts; p++) {
        float *out = sums + tile * TILE_ROWS + p * 64;
        __m512i even_low = _mm512_sub_epi16(all_low[p], _mm512_slli_epi16(odd_low[p], 8));
        __m512i even_high = _mm512_sub_epi16(all_high[p], _mm512_slli_epi16(odd_high[p], 8));
        __m512i pairs[4] = {
            _mm512_unpacklo_epi16(even_low, even_high),
            _mm512_unpackhi_epi16(even_low, even_high),
            _mm512_unpacklo_epi16(odd_low[p], odd_high[p]),
            _mm512_unpackhi_epi16(odd_low[p], odd_high[p]),
        };
        for (int q = 0; q < 4; q++) {
            __m512 units = _mm512_cvtepi32_ps(_mm512_madd_epi16(pairs[q], weights));
            __m512 sum = _mm512_add_ps(_mm512_loadu_ps(out + 16 * q), _mm512_fmadd_ps(step, units, offset));
            _mm512_storeu_ps(out + 16 * q, sum);
        }
    }
}

/* Adds one block to the rows of the tiles from `start` on. */
TARGET static void add_byte_tables_to_rows(const layer *l, const desk *desk, int64_t start, int64_t end, float *sums) {
    for (int64_t tile = start; tile < end; tile += 8) {
        /* The next codes are asked for well before their turn, at the end those of the next block. */
        int64_t next = tile + AHEAD_TILES, next_block = desk->block;
        if (next >= end && !desk->last) next = start + (next - end) % (end - start), next_block++;
        const uint8_t *ahead = l->call->tiles + (next_block * l->row_tiles + next) * TILE;
        if (tile + 8 <= end) add_byte_tables(l, desk, tile, sums, 2, ahead);
        else add_byte_tables(l, desk, tile, sums, 1, ahead);
    }
}

/* Puts the sums of 64 rows in the order of the rows. */
TARGET static void rows_of_sums(float *sums) {
    float rows[64];
    for (int q = 0; q < 4; q++) {
        for (int i = 0; i < 16; i++) rows[16 * (i / 4) + 8 * (q % 2) + 2 * (i % 4) + q / 2] = sums[16 * q + i];
    }
    memcpy(sums, rows, sizeof rows);
}

TARGET static void read_columns(layer *l) { read_codebooks_avx512(l); }

static const table_kind byte_tables = {
    .tokens = 1,
    .pass = 8,
    .most_tokens = INT_MAX,
    .entry_bytes = sizeof(uint16_t),
    .near_bytes = TILE_GROUPS * TABLE * sizeof(uint16_t),
    .scratch = 1,
    .read_codebooks = read_columns,
    .make = make_byte_tables,
    .add = add_byte_tables_to_rows,
    .order_rows = rows_of_sums,
};

const instruction_set vbmi_set = {
    .runs_here = runs_here,
    .read_floats = avx2_read_floats,
    .write_floats = avx2_write_floats,
    .dequantize = avx2_dequantize,
    .search = avx2_search,
    .int8_rows = avx2_int8_rows,
    .integer_tables = &byte_tables,
    .float_tables = avx2_float_tables,
};
#endif
