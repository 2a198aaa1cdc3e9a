/* NEON: for one token, tables of 16-bit integers as two byte planes, 16 lookups in four byte shuffles each. Everything
 * else is plain C, of which the compiler makes NEON too. Its speed has not been measured. */
#include "scalar.h"

#ifdef HAVE_ARM64
#include <arm_neon.h>

static int runs_here(void) { return 1; }

/* Tables of one block: per group 256 low bytes, then 256 high bytes, of (table - minimum of the group) / step, the step
 * shared by the block. Outliers so only coarsen their own block. */
static void make_byte_tables(const layer *l, desk *desk) {
    int d = l->call->group;
    float minima[TILE_GROUPS], offset = desk->not_finite[0], range = 0;
    for (int g = 0; g < desk->count; g++) {
        const float *column = codebook_of(l, desk, g), *x = desk->x + g * d;
        float *out = desk->scratch + g * TABLE;
        float32x4_t least = vdupq_n_f32(__FLT_MAX__), most = vdupq_n_f32(-__FLT_MAX__);
        for (int64_t c = 0; c < l->padded_size; c += 16) {
            float32x4_t sums[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
            for (int i = 0; i < d; i++) {
                const float *here = column + i * l->padded_size + c;
                for (int k = 0; k < 4; k++) sums[k] = vfmaq_n_f32(sums[k], vld1q_f32(here + 4 * k), x[i]);
            }
            for (int k = 0; k < 4; k++) {
                vst1q_f32(out + c + 4 * k, sums[k]);
                least = vminq_f32(least, sums[k]);
                most = vmaxq_f32(most, sums[k]);
            }
        }
        minima[g] = vminvq_f32(least);
        offset += minima[g];
        float width = vmaxvq_f32(most) - minima[g];
        range = width > range ? width : range;
    }
    desk->offset = offset;
    desk->step = range / 65535.0f;
    float scale = desk->step > 0 ? 1 / desk->step : 0.0f;
    for (int g = 0; g < desk->count; g++) {
        const float *in = desk->scratch + g * TABLE;
        uint8_t *out = desk->tables + g * 2 * TABLE;
        float32x4_t minimum = vdupq_n_f32(minima[g]);
        for (int64_t c = 0; c < l->padded_size; c += 8) {
            uint16x4_t units[2];
            for (int k = 0; k < 2; k++) {
                float32x4_t value = vmulq_n_f32(vsubq_f32(vld1q_f32(in + c + 4 * k), minimum), scale);
                units[k] = vqmovn_u32(vcvtnq_u32_f32(value));
            }
            uint16x8_t words = vcombine_u16(units[0], units[1]);
            vst1_u8(out + c, vmovn_u16(words));
            vst1_u8(out + TABLE + c, vshrn_n_u16(words, 8));
        }
    }
}

/* Adds a plane's entries for the codes of a group in two tiles to the sums of its bytes. Codes that are not of the 64
 * entries at hand leave what the others have found. */
INLINE void add_plane(uint16x8_t *sums, const uint8_t *plane, const uint8_t *codes) {
    uint8x16x4_t table[4];
    for (int q = 0; q < 4; q++) table[q] = vld1q_u8_x4(plane + 64 * q);
    for (int p = 0; p < 2; p++) {
        uint8x16_t code = vld1q_u8(codes + p * TILE), bytes = vqtbl4q_u8(table[0], code);
        for (int q = 1; q < 4; q++) bytes = vqtbx4q_u8(bytes, table[q], vsubq_u8(code, vdupq_n_u8(64 * q)));
        sums[2 * p] = vaddw_u8(sums[2 * p], vget_low_u8(bytes));
        sums[2 * p + 1] = vaddw_high_u8(sums[2 * p + 1], bytes);
    }
}

static void add_byte_tables(const layer *l, const desk *desk, int64_t tile, int64_t tile_end, float *sums) {
    float32x4_t step = vdupq_n_f32(desk->step), offset = vdupq_n_f32(desk->offset);
    for (; tile < tile_end; tile += 2) {
        const uint8_t *codes = l->call->tiles + (desk->block * l->row_tiles + tile) * TILE;
        uint16x8_t low[4], high[4];
        for (int k = 0; k < 4; k++) low[k] = high[k] = vdupq_n_u16(0);
        for (int g = 0; g < desk->count; g++) {
            const uint8_t *table = desk->tables + g * 2 * TABLE;
            add_plane(low, table, codes + g * TILE_ROWS);
            add_plane(high, table + TABLE, codes + g * TILE_ROWS);
        }
        for (int k = 0; k < 4; k++) {
            float *out = sums + tile * TILE_ROWS + 8 * k;
            uint32x4_t first = vaddw_u16(vshll_n_u16(vget_low_u16(high[k]), 8), vget_low_u16(low[k]));
            uint32x4_t second = vaddw_high_u16(vshll_high_n_u16(high[k], 8), low[k]);
            vst1q_f32(out, vaddq_f32(vld1q_f32(out), vfmaq_f32(offset, step, vcvtq_f32_u32(first))));
            vst1q_f32(out + 4, vaddq_f32(vld1q_f32(out + 4), vfmaq_f32(offset, step, vcvtq_f32_u32(second))));
        }
    }
}

static const table_kind byte_tables = {
    .tokens = 1,
    .pass = 1,
    .most_tokens = 1,
    .entry_bytes = sizeof(uint16_t),
    .near_bytes = TILE_GROUPS * TABLE * sizeof(uint16_t),
    .scratch = 1,
    .read_codebooks = read_codebooks,
    .make = make_byte_tables,
    .add = add_byte_tables,
};

const instruction_set neon_set = {
    .runs_here = runs_here,
    .on_request = 1,
    .read_floats = scalar_read_floats,
    .write_floats = scalar_write_floats,
    .dequantize = scalar_dequantize,
    .search = scalar_search,
    .int8_rows = scalar_int8_rows,
    .integer_tables = &byte_tables,
    .float_tables = scalar_float_tables,
};
#endif
