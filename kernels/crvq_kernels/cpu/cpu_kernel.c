/* CRVQ linear layers on a CPU, straight from tiled codes (packing.py). Plain C, called through ctypes (binding.py).
 *
 * A layer is y[n] = scale[n] * sum_v <codebook_of_v[code[n, v]], x_v> + bias[n] over V virtual groups. For one token
 * the products of group v with all codewords are a table, table[v][c] = <codebook_of_v[c], x_v>, made once for all N
 * rows; a row is then a sum of V table entries. Three instruction sets, chosen at run time:
 *
 *   vbmi    tables of 16-bit integers as two byte planes, 64 lookups in six byte shuffles, sums in 16 bits
 *   avx2    fp32 tables made with fused multiply-adds; lookups one by one, which are no slower than gathers
 *   scalar  the same in plain C
 *
 * Codes of more than 8 bits have fp32 tables everywhere. A thread makes tables for itself, since those of another would
 * have to come from its cache. So threads divide the groups, in parts that follow from the layer alone, and only where
 * they are more than parts also the rows: every number is computed by the same operations in the same order whatever
 * the number of threads.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_X86 1
#endif

#define EXPORT __attribute__((visibility("default")))

enum { SCALAR = 0, AVX2 = 1, VBMI = 2 };
enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum { OK = 0, NO_MEMORY = 1, BAD_ORDER = 2 };

enum {
    TILE_GROUPS = 32,
    TILE_ROWS = 16,
    TILE = TILE_GROUPS * TILE_ROWS,
    ROW_MULTIPLE = 64, /* rows are padded to this many: one AVX-512 register of codes */
    TABLE = 256,       /* entries of a table, up to 8 bits */
    MAX_GROUP = 16,
    MAX_TOKENS = 8, /* tokens that share one pass over the codes */
    MAX_THREADS = 64,
    MAX_PARTS = 4, /* of the groups of a layer */
    PART_BLOCKS = 2, /* least blocks of a part */
    AHEAD_TILES = 24, /* codes on their way from memory while others are looked up: 12 KiB */
    NEAR_BYTES = 32 * 1024,   /* fp32 tables in use at a time; they should stay in the L1 cache */
};

/* One call. binding.py packs the same fields in the same order: first what changes from call to call. */
typedef struct {
    const void *x; /* [tokens, in_features] */
    void *y;       /* [tokens, out_features]; dequantize: fp32 [row_count, in_features] */
    int64_t tokens, row_start, row_count;
    int32_t x_type; /* FLOAT32, FLOAT16 or BFLOAT16; y as x */
    int32_t instructions, threads;
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

/* ---- numbers ------------------------------------------------------------------------------------------------- */

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    /* The exponent is re-based by a multiplication, which normalises subnormal numbers too. */
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

static uint16_t float_to_half(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00; /* rounds to 65536 or more */
    if (magnitude < 0x38800000) {                       /* subnormal: adding 0.5 rounds at the right bit */
        return sign | (uint16_t)(to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000);
    }
    return sign | (uint16_t)((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

static uint16_t float_to_bfloat(float value) {
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline float load(const void *data, int type, int64_t index) {
    if (type == FLOAT32) return ((const float *)data)[index];
    uint16_t bits = ((const uint16_t *)data)[index];
    return type == FLOAT16 ? half_to_float(bits) : from_bits((uint32_t)bits << 16);
}

static inline void store(void *data, int type, int64_t index, float value) {
    if (type == FLOAT32) {
        ((float *)data)[index] = value;
    } else {
        ((uint16_t *)data)[index] = type == FLOAT16 ? float_to_half(value) : float_to_bfloat(value);
    }
}

static void read_floats(float *out, const void *data, int type, int64_t start, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = load(data, type, start + i);
}

static void write_floats(void *data, int type, int64_t start, const float *in, int64_t count) {
    for (int64_t i = 0; i < count; i++) store(data, type, start + i, in[i]);
}

#ifdef HAVE_X86
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,fma,f16c")))

TARGET_AVX2 static void read_floats_avx2(float *out, const void *data, int type, int64_t start, int64_t count) {
    int64_t i = 0;
    if (type == FLOAT16) {
        const uint16_t *in = (const uint16_t *)data + start;
        for (; i + 8 <= count; i += 8) {
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
        }
    }
    for (; i < count; i++) out[i] = load(data, type, start + i);
}

TARGET_AVX2 static void write_floats_avx2(void *data, int type, int64_t start, const float *in, int64_t count) {
    int64_t i = 0;
    if (type == FLOAT16) {
        uint16_t *out = (uint16_t *)data + start;
        for (; i + 8 <= count; i += 8) {
            _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
        }
    }
    for (; i < count; i++) store(data, type, start + i, in[i]);
}
#else
#define read_floats_avx2 read_floats
#define write_floats_avx2 write_floats
#endif

/* The input channel at a position of the channel order; 0 and `status` set if there is no such channel. */
static inline int64_t channel(const crvq_call *call, int64_t position, atomic_int *status) {
    int64_t channel;
    switch (call->order_bytes) {
        case 1: channel = ((const uint8_t *)call->order)[position]; break;
        case 2: channel = ((const int16_t *)call->order)[position]; break;
        case 4: channel = ((const int32_t *)call->order)[position]; break;
        default: channel = ((const int64_t *)call->order)[position];
    }
    if ((uint64_t)channel < (uint64_t)call->in_features) return channel;
    atomic_store(status, BAD_ORDER);
    return 0;
}

/* ---- the layer ----------------------------------------------------------------------------------------------- */

typedef struct {
    const crvq_call *call;
    int64_t groups, virtual_groups, blocks; /* G, V, blocks of TILE_GROUPS virtual groups */
    int64_t row_tiles, rows;                /* tiles of TILE_ROWS rows, rows with padding */
    int64_t padded_size;                    /* codewords per codebook in `codebooks` */
    const uint8_t *high;                    /* high plane of the codes, NULL up to 8 bits */
    int high_bits;
    int by_row;       /* codebooks are [num_codebooks, padded_size, group], else [num_codebooks, group, padded_size] */
    int bytes;        /* tables are 16-bit ones */
    float *codebooks;
    const float *x;     /* [tokens, in_features] of the pass */
    int64_t entries;    /* of a table */
    int64_t table_size; /* bytes of the tables of one block and token */
    uint8_t *tables;    /* [threads, table_size] */
    float *scratch;     /* [threads, TILE_GROUPS, TABLE] */
    float *sums;        /* [parts, tokens, rows] */
    int64_t first_token, tokens; /* of the pass */
    int threads, parts, slices;  /* slices: of the rows */
    atomic_int next_item;        /* part and slice to be taken up next */
    atomic_int finished;         /* threads for which there was none */
    atomic_int status;
} layer;

/* What a thread looks up codes in: the tables of one block and one token. */
typedef struct {
    float x[TILE_GROUPS * MAX_GROUP];
    float not_finite; /* NaN where x has NaN or infinite values, else 0 */
    float step;       /* 16-bit tables: value of one unit */
    float offset;     /* 16-bit tables: what a row stands for when all its entries are 0 */
    uint8_t *tables;
    float *scratch;
} desk;

static int codebook_of(const layer *l, int64_t v) {
    return v < l->groups ? 0 : 1 + (int)((v - l->groups) / l->call->critical);
}

static inline int code_at(const layer *l, int64_t block, int64_t row_tile, int group, int row) {
    int64_t position = (block * l->row_tiles + row_tile) * TILE + group * TILE_ROWS + row;
    int code = l->call->tiles[position];
    if (l->high_bits) {
        int64_t bit = position * l->high_bits;
        code |= (l->high[bit >> 3] >> (bit & 7) & ((1 << l->high_bits) - 1)) << 8;
    }
    return code;
}

static int groups_in(const layer *l, int64_t block) {
    int64_t left = l->virtual_groups - block * TILE_GROUPS;
    return left < TILE_GROUPS ? (int)left : TILE_GROUPS;
}

/* Codewords as fp32. Entries past codebook_size repeat the first, so that they move no minimum or maximum. */
static void read_codebooks(layer *l) {
    const crvq_call *c = l->call;
    int d = c->group;
    for (int b = 0; b < c->num_codebooks; b++) {
        float *out = l->codebooks + (int64_t)b * l->padded_size * d;
        for (int64_t row = 0; row < l->padded_size; row++) {
            int64_t source = ((int64_t)b * c->codebook_size + (row < c->codebook_size ? row : 0)) * d;
            for (int i = 0; i < d; i++) {
                out[l->by_row ? row * d + i : i * l->padded_size + row] = load(c->codebooks, c->codebook_type, source + i);
            }
        }
    }
}

/* x of one block of virtual groups, 0 in the padding. */
static void gather_x(layer *l, int64_t token, int64_t block, desk *k) {
    const crvq_call *c = l->call;
    int64_t start = block * TILE_GROUPS * c->group, count = (int64_t)groups_in(l, block) * c->group;
    const float *x = l->x + token * c->in_features;
    k->not_finite = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t position = start + i;
        if (position >= c->in_features) position = (position - c->in_features) % ((int64_t)c->critical * c->group);
        k->x[i] = x[channel(c, position, &l->status)];
        k->not_finite += k->x[i] * 0.0f;
    }
}

/* ---- fp32 tables: scalar and AVX2 ------------------------------------------------------------------------------ */

#define INLINE static inline __attribute__((always_inline))

/* table[g][c] for the groups of one block and one token. */
INLINE void make_float_tables(const layer *l, int64_t block, desk *desk) {
    enum { AT_ONCE = 16 }; /* entries whose sums stay in registers; padded_size is a multiple */
    int d = l->call->group;
    const float *x = desk->x;
    float *tables = (float *)desk->tables, start = desk->not_finite;
    for (int g = 0, count = groups_in(l, block); g < count; g++, x += d, tables += l->entries) {
        const float *codebook = l->codebooks + (int64_t)codebook_of(l, block * TILE_GROUPS + g) * l->padded_size * d;
        for (int64_t c = 0; c < l->padded_size; c += AT_ONCE) {
            float sums[AT_ONCE];
            for (int k = 0; k < AT_ONCE; k++) sums[k] = start;
            for (int i = 0; i < d; i++) {
                for (int k = 0; k < AT_ONCE; k++) sums[k] += codebook[i * l->padded_size + c + k] * x[i];
            }
            for (int k = 0; k < AT_ONCE; k++) tables[c + k] = sums[k];
        }
    }
}

/* Adds `count` groups of a block, from `group` on, to the rows of one tile. */
INLINE void add_float_tables_of(const layer *l, float *sums, int64_t block, int64_t tile, int group, int count,
                                const float *tables, int high_bits) {
    int64_t position = (block * l->row_tiles + tile) * TILE + group * TILE_ROWS;
    const uint8_t *codes = l->call->tiles + position, *high = l->high + position * high_bits / 8;
    float near[TILE_ROWS];
    memcpy(near, sums, sizeof near);
    for (int g = 0; g < count; g++, codes += TILE_ROWS, high += 2 * high_bits, tables += l->entries) {
        uint64_t bits = 0;
        memcpy(&bits, high, 2 * high_bits);
        for (int r = 0; r < TILE_ROWS; r++) {
            near[r] += tables[codes[r] | (bits >> r * high_bits & ((1 << high_bits) - 1)) << 8];
        }
    }
    memcpy(sums, near, sizeof near);
}

static void add_float_tables(const layer *l, int64_t block, int64_t tile_start, int64_t tile_end, const desk *desk,
                             float *sums) {
    const float *tables = (const float *)desk->tables;
    int near = (int)(NEAR_BYTES / (l->entries * sizeof(float))), total = groups_in(l, block);
    for (int group = 0; group < total; group += near, tables += near * l->entries) {
        int count = total - group < near ? total - group : near;
        for (int64_t tile = tile_start; tile < tile_end; tile++) {
            float *rows = sums + tile * TILE_ROWS;
            switch (l->high_bits) {
                case 0: add_float_tables_of(l, rows, block, tile, group, count, tables, 0); break;
                case 1: add_float_tables_of(l, rows, block, tile, group, count, tables, 1); break;
                case 2: add_float_tables_of(l, rows, block, tile, group, count, tables, 2); break;
                default: add_float_tables_of(l, rows, block, tile, group, count, tables, 4); break;
            }
        }
    }
}

static void make_float_tables_scalar(const layer *l, int64_t block, desk *desk) { make_float_tables(l, block, desk); }

#ifdef HAVE_X86
TARGET_AVX2 static void make_float_tables_avx2(const layer *l, int64_t block, desk *desk) {
    make_float_tables(l, block, desk);
}

/* ---- 16-bit tables: AVX-512 VBMI ------------------------------------------------------------------------------- */

/* Tables of one block and one token: per group 256 low bytes, then 256 high bytes, of
 * (table - minimum of the group) / step, the step shared by the block. Outliers so only coarsen their own block. */
TARGET_VBMI static void make_byte_tables(const layer *l, int64_t block, desk *desk) {
    int d = l->call->group, count = groups_in(l, block);
    int64_t size = l->padded_size;
    const float *x = desk->x;
    float minima[TILE_GROUPS], offset = desk->not_finite, range = 0;
    for (int g = 0; g < count; g++) {
        const float *codebook = l->codebooks + (int64_t)codebook_of(l, block * TILE_GROUPS + g) * size * d;
        float *out = desk->scratch + g * TABLE;
        __m512 least = _mm512_set1_ps(__FLT_MAX__), most = _mm512_set1_ps(-__FLT_MAX__);
        for (int64_t c = 0; c < size; c += 128) {
            __m512 sums[8];
            int vectors = size - c < 128 ? (int)(size - c) / 16 : 8;
            if (vectors == 8) {
                __m512 factor = _mm512_set1_ps(x[g * d]);
                for (int k = 0; k < 8; k++) sums[k] = _mm512_mul_ps(factor, _mm512_loadu_ps(codebook + c + 16 * k));
                for (int i = 1; i < d; i++) {
                    factor = _mm512_set1_ps(x[g * d + i]);
                    const float *row = codebook + i * size + c;
                    for (int k = 0; k < 8; k++) {
                        sums[k] = _mm512_fmadd_ps(factor, _mm512_loadu_ps(row + 16 * k), sums[k]);
                    }
                }
                for (int k = 0; k < 8; k++) {
                    _mm512_storeu_ps(out + c + 16 * k, sums[k]);
                    least = _mm512_min_ps(least, sums[k]);
                    most = _mm512_max_ps(most, sums[k]);
                }
            } else {
                for (int k = 0; k < vectors; k++) {
                    __m512 sum = _mm512_setzero_ps();
                    for (int i = 0; i < d; i++) {
                        __m512 row = _mm512_loadu_ps(codebook + i * size + c + 16 * k);
                        sum = _mm512_fmadd_ps(_mm512_set1_ps(x[g * d + i]), row, sum);
                    }
                    _mm512_storeu_ps(out + c + 16 * k, sum);
                    least = _mm512_min_ps(least, sum);
                    most = _mm512_max_ps(most, sum);
                }
            }
        }
        minima[g] = _mm512_reduce_min_ps(least);
        offset += minima[g];
        float width = _mm512_reduce_max_ps(most) - minima[g];
        range = width > range ? width : range;
    }
    desk->offset = offset;
    desk->step = range / 65535.0f;
    __m512 scale = _mm512_set1_ps(range > 0 ? 65535.0f / range : 0.0f);

    uint8_t pick[64];
    /* Packing dwords to words interleaves 128-bit lanes: word 8 * lane + 4 * source + i came from dword
     * 16 * source + 4 * lane + i. */
    for (int i = 0; i < 64; i++) {
        int pair = i / 32, source = i % 32 / 16, lane = i % 16 / 4;
        pick[i] = (uint8_t)(64 * pair + 2 * (8 * lane + 4 * source + i % 4));
    }
    __m512i low_bytes = _mm512_loadu_si512(pick), high_bytes = _mm512_add_epi8(low_bytes, _mm512_set1_epi8(1));
    for (int g = 0; g < count; g++) {
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
TARGET_VBMI INLINE void add_byte_tables(const layer *l, int64_t block, int64_t tile, const desk *desk, float *sums,
                                        int parts, const uint8_t *ahead) {
    const uint8_t *codes = l->call->tiles + (block * l->row_tiles + tile) * TILE;
    int count = groups_in(l, block);
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

/* Adds one block, not the last one of its part unless `last`, to the rows of the tiles from `start` on. */
TARGET_VBMI static void add_byte_tables_to_rows(const layer *l, int64_t block, int last, int64_t start, int64_t end,
                                                const desk *desk, float *sums) {
    for (int64_t tile = start; tile < end; tile += 8) {
        /* The next codes are asked for well before their turn, at the end those of the next block. */
        int64_t next = tile + AHEAD_TILES, next_block = block;
        if (next >= end && !last) next = start + (next - end) % (end - start), next_block++;
        const uint8_t *ahead = l->call->tiles + (next_block * l->row_tiles + next) * TILE;
        if (tile + 8 <= end) add_byte_tables(l, block, tile, desk, sums, 2, ahead);
        else add_byte_tables(l, block, tile, desk, sums, 1, ahead);
    }
}

/* Puts the sums of 64 rows in the order of the rows. */
TARGET_VBMI static void rows_of_sums(float *sums) {
    float rows[64];
    for (int q = 0; q < 4; q++) {
        for (int i = 0; i < 16; i++) rows[16 * (i / 4) + 8 * (q % 2) + 2 * (i % 4) + q / 2] = sums[16 * q + i];
    }
    memcpy(sums, rows, sizeof rows);
}

/* fp16 codebooks of groups of 8 to fp32 columns, 16 codewords at a time; others by read_codebooks. */
TARGET_VBMI static void read_codebooks_vbmi(layer *l) {
    const crvq_call *c = l->call;
    if (c->codebook_type != FLOAT16 || c->group != 8 || c->codebook_size % 16) {
        read_codebooks(l);
        return;
    }
    uint16_t pick[2][32], pair[2][32];
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 32; i++) {
            pick[half][i] = (uint16_t)(8 * (i % 8) + 4 * half + i / 8);               /* 8 codewords of 4 dimensions */
            pair[half][i] = (uint16_t)(i % 8 + 8 * (2 * half + i / 16) + i % 16 / 8 * 32); /* 16 of 2 dimensions */
        }
    }
    __m512i picks[2] = {_mm512_loadu_si512(pick[0]), _mm512_loadu_si512(pick[1])};
    __m512i pairs[2] = {_mm512_loadu_si512(pair[0]), _mm512_loadu_si512(pair[1])};
    const uint16_t *in = c->codebooks;
    for (int b = 0; b < c->num_codebooks; b++) {
        float *out = l->codebooks + (int64_t)b * l->padded_size * 8;
        for (int64_t row = 0; row < c->codebook_size; row += 16, in += 128) {
            __m512i words[4];
            for (int k = 0; k < 4; k++) words[k] = _mm512_loadu_si512(in + 32 * k);
            for (int half = 0; half < 2; half++) {
                __m512i first = _mm512_permutex2var_epi16(words[0], picks[half], words[1]);
                __m512i second = _mm512_permutex2var_epi16(words[2], picks[half], words[3]);
                for (int k = 0; k < 2; k++) {
                    __m512i two = _mm512_permutex2var_epi16(first, pairs[k], second);
                    float *column = out + (4 * half + 2 * k) * l->padded_size + row;
                    _mm512_storeu_ps(column, _mm512_cvtph_ps(_mm512_castsi512_si256(two)));
                    _mm512_storeu_ps(column + l->padded_size, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(two, 1)));
                }
            }
        }
        for (int64_t row = c->codebook_size; row < l->padded_size; row++) {
            for (int i = 0; i < 8; i++) out[i * l->padded_size + row] = out[i * l->padded_size];
        }
    }
}
#endif

/* ---- threads --------------------------------------------------------------------------------------------------- */

typedef void (*job_function)(void *context, int thread);

static struct {
    pthread_mutex_t busy; /* held by the caller whose job the workers do */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int workers;
    atomic_uint generation; /* of the job */
    atomic_int left;        /* workers that have not finished it */
    atomic_int sleeping;
    job_function job;
    void *context;
    int threads;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void relax(int spins) {
    if (spins > 4096) {
        sched_yield();
        return;
    }
#ifdef HAVE_X86
    _mm_pause();
#endif
}

enum { SPINS_BEFORE_SLEEP = 2000 };

static void *worker(void *argument) {
    int number = (int)((uintptr_t)argument % MAX_THREADS);
    unsigned seen = (unsigned)((uintptr_t)argument / MAX_THREADS); /* the last job before this worker was */
    for (;;) {
        unsigned now;
        for (int spins = 0; (now = atomic_load_explicit(&pool.generation, memory_order_acquire)) == seen; spins++) {
            if (spins < SPINS_BEFORE_SLEEP) {
                relax(spins);
                continue;
            }
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleeping, 1);
            while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.sleeping, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        seen = now;
        if (number < pool.threads) pool.job(pool.context, number);
        atomic_fetch_sub_explicit(&pool.left, 1, memory_order_release);
    }
    return NULL;
}

/* The child of a fork has no workers; what was locked stays locked for ever. */
static void after_fork(void) {
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = 0;
    atomic_store(&pool.generation, 0);
    atomic_store(&pool.left, 0);
    atomic_store(&pool.sleeping, 0);
}

static void register_fork_handler(void) { pthread_atfork(NULL, NULL, after_fork); }

/* Starts workers until there are `threads - 1`, or as many as the system allows; returns how many threads there are. */
static int start_workers(int threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork_handler);
    while (pool.workers < threads - 1) {
        pthread_attr_t attributes;
        pthread_t thread;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        uintptr_t argument = (uintptr_t)atomic_load(&pool.generation) * MAX_THREADS + pool.workers + 1;
        int failed = pthread_create(&thread, &attributes, worker, (void *)argument);
        pthread_attr_destroy(&attributes);
        if (failed) break;
        pool.workers++;
    }
    return pool.workers + 1 < threads ? pool.workers + 1 : threads;
}

/* Runs job(context, thread) for thread 0 (here) to threads - 1. The caller holds pool.busy. */
static void run_on_workers(job_function job, void *context, int threads) {
    pool.job = job;
    pool.context = context;
    pool.threads = threads;
    atomic_store(&pool.left, pool.workers);
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    job(context, 0);
    for (int spins = 0; atomic_load_explicit(&pool.left, memory_order_acquire); spins++) relax(spins);
}

/* ---- one call -------------------------------------------------------------------------------------------------- */

static void make_tables(layer *l, int64_t token, int64_t block, desk *desk) {
    gather_x(l, token, block, desk);
#ifdef HAVE_X86
    if (l->bytes) {
        make_byte_tables(l, block, desk);
        return;
    }
    if (l->call->instructions != SCALAR) {
        make_float_tables_avx2(l, block, desk);
        return;
    }
#endif
    make_float_tables_scalar(l, block, desk);
}

/* Sums one part of the groups for one slice of the rows. */
static void sum_part(layer *l, int part, int slice, desk *desk) {
    int64_t share = (l->row_tiles / 4 + l->slices - 1) / l->slices * 4;
    int64_t tile = slice * share < l->row_tiles ? slice * share : l->row_tiles;
    int64_t tile_end = tile + share < l->row_tiles ? tile + share : l->row_tiles;
    int64_t block_end = (part + 1) * l->blocks / l->parts;
    if (tile == tile_end) return;
    float *sums = l->sums + part * l->tokens * l->rows;
    for (int64_t m = 0; m < l->tokens; m++) {
        memset(sums + m * l->rows + tile * TILE_ROWS, 0, (tile_end - tile) * TILE_ROWS * sizeof(float));
    }
    for (int64_t block = part * l->blocks / l->parts; block < block_end; block++) {
        for (int64_t m = 0; m < l->tokens; m++) {
            make_tables(l, m, block, desk);
#ifdef HAVE_X86
            if (l->bytes) {
                add_byte_tables_to_rows(l, block, block + 1 == block_end, tile, tile_end, desk, sums + m * l->rows);
                continue;
            }
#endif
            add_float_tables(l, block, tile, tile_end, desk, sums + m * l->rows);
        }
    }
}

static void write_rows(const layer *l, int64_t token, int64_t tile, int64_t tile_end) {
    const crvq_call *c = l->call;
    int vectors = c->instructions != SCALAR;
    float scales[ROW_MULTIPLE], bias[ROW_MULTIPLE] = {0};
    for (int64_t n = tile * TILE_ROWS; n < tile_end * TILE_ROWS && n < c->out_features; n += ROW_MULTIPLE) {
        float *sums = l->sums + token * l->rows + n;
        int64_t count = c->out_features - n < ROW_MULTIPLE ? c->out_features - n : ROW_MULTIPLE;
        for (int64_t part = 1; part < l->parts; part++) {
            for (int64_t i = 0; i < ROW_MULTIPLE; i++) sums[i] += sums[part * l->tokens * l->rows + i];
        }
#ifdef HAVE_X86
        if (l->bytes) rows_of_sums(sums);
#endif
        (vectors ? read_floats_avx2 : read_floats)(scales, c->scales, c->scale_type, n, count);
        if (c->bias) (vectors ? read_floats_avx2 : read_floats)(bias, c->bias, c->bias_type, n, count);
        for (int64_t i = 0; i < count; i++) sums[i] = sums[i] * scales[i] + bias[i];
        int64_t start = (l->first_token + token) * c->out_features + n;
        (vectors ? write_floats_avx2 : write_floats)(c->y, c->x_type, start, sums, count);
    }
}

/* The share of one thread in a pass over at most MAX_TOKENS tokens. */
static void linear_thread(void *context, int thread) {
    layer *l = context;
    desk desk = {
        .tables = l->tables + thread * l->table_size,
        .scratch = l->scratch + (int64_t)thread * TILE_GROUPS * TABLE,
    };
    for (int item; (item = atomic_fetch_add(&l->next_item, 1)) < l->parts * l->slices;) {
        sum_part(l, item % l->parts, item / l->parts, &desk);
    }
    atomic_fetch_add(&l->finished, 1);
    for (int spins = 0; atomic_load_explicit(&l->finished, memory_order_acquire) < l->threads; spins++) relax(spins);

    int64_t share = (l->row_tiles / 4 + l->threads - 1) / l->threads * 4;
    int64_t tile = thread * share < l->row_tiles ? thread * share : l->row_tiles;
    int64_t tile_end = tile + share < l->row_tiles ? tile + share : l->row_tiles;
    for (int64_t m = 0; m < l->tokens; m++) write_rows(l, m, tile, tile_end);
}

/* Memory that a calling thread keeps until it ends: fresh pages would cost more than a small layer. */
typedef struct {
    size_t size;
    uint8_t padding[64 - sizeof(size_t)];
} workspace_header;

static pthread_key_t workspace_key;

static void make_workspace_key(void) { pthread_key_create(&workspace_key, free); }

static uint8_t *workspace(size_t size) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_workspace_key);
    workspace_header *held = pthread_getspecific(workspace_key);
    if (!held || held->size < size) {
        free(held);
        void *memory = NULL;
        if (posix_memalign(&memory, sizeof *held, sizeof *held + size)) memory = NULL;
        held = memory;
        if (pthread_setspecific(workspace_key, held) || !held) return NULL;
        held->size = size;
    }
    return (uint8_t *)(held + 1);
}

static void *take(uint8_t **next, int64_t bytes) {
    void *here = *next;
    if (here) *next += (bytes + 63) / 64 * 64;
    return here;
}

static void describe(layer *l, const crvq_call *c) {
    memset(l, 0, sizeof *l);
    l->call = c;
    l->groups = c->in_features / c->group;
    l->virtual_groups = l->groups + (int64_t)(c->num_codebooks - 1) * c->critical;
    l->blocks = (l->virtual_groups + TILE_GROUPS - 1) / TILE_GROUPS;
    l->rows = (c->out_features + ROW_MULTIPLE - 1) / ROW_MULTIPLE * ROW_MULTIPLE;
    l->row_tiles = l->rows / TILE_ROWS;
    l->high_bits = c->nbits <= 8 ? 0 : c->nbits == 9 ? 1 : c->nbits == 10 ? 2 : 4;
    l->high = c->tiles + l->blocks * l->row_tiles * TILE;
    l->bytes = c->nbits <= 8 && c->instructions == VBMI;
    l->entries = c->nbits <= 8 ? TABLE : (int64_t)1 << c->nbits; /* any code is within */
    l->padded_size = (c->codebook_size + 15) / 16 * 16;
    l->table_size = TILE_GROUPS * l->entries * (l->bytes ? 2 : 4);
    l->threads = 1;
}

/* Lays out the arrays of `l` from `next` on; with NULL only measures. Returns the bytes needed. */
static int64_t lay_out(layer *l, uint8_t *memory, int64_t tokens) {
    const crvq_call *c = l->call;
    /* Measuring goes along a made-up address, which is never used. */
    uint8_t *start = memory ? memory : (uint8_t *)64, *next = start;
    l->codebooks = take(&next, c->num_codebooks * l->padded_size * c->group * sizeof(float));
    l->x = take(&next, tokens * c->in_features * sizeof(float));
    l->sums = take(&next, l->parts * tokens * l->rows * sizeof(float));
    l->tables = take(&next, l->threads * l->table_size);
    l->scratch = take(&next, (int64_t)l->threads * TILE_GROUPS * TABLE * sizeof(float));
    return next - start;
}

/* y = x @ weight.T + bias. Returns OK, NO_MEMORY or BAD_ORDER. */
EXPORT int crvq_linear(const crvq_call *c) {
    layer l;
    describe(&l, c);
    int64_t pass = c->tokens < MAX_TOKENS ? c->tokens : MAX_TOKENS;
    int64_t work = l.virtual_groups * l.rows * pass >> 17; /* below 2**17 codes a second thread costs more than it does */
    int threads = c->threads < MAX_THREADS ? c->threads : MAX_THREADS;
    if (threads > work + 1) threads = (int)work + 1;
    int owner = threads > 1 && pthread_mutex_trylock(&pool.busy) == 0;
    l.threads = owner ? start_workers(threads) : 1;
    l.parts = l.blocks / PART_BLOCKS < MAX_PARTS ? (int)(l.blocks / PART_BLOCKS) : MAX_PARTS;
    if (l.parts < 1) l.parts = 1;
    l.slices = (l.threads + l.parts - 1) / l.parts;

    uint8_t *memory = workspace(lay_out(&l, NULL, pass));
    if (memory) {
        lay_out(&l, memory, pass);
        float *x = (float *)l.x;
#ifdef HAVE_X86
        if (l.bytes) read_codebooks_vbmi(&l);
        else
#endif
            read_codebooks(&l);
        for (l.first_token = 0; l.first_token < c->tokens; l.first_token += pass) {
            l.tokens = c->tokens - l.first_token < pass ? c->tokens - l.first_token : pass;
            atomic_store(&l.next_item, 0);
            atomic_store(&l.finished, 0);
            int64_t start = l.first_token * c->in_features;
            if (c->x_type == FLOAT32) {
                l.x = (const float *)c->x + start;
            } else {
                (c->instructions ? read_floats_avx2 : read_floats)(x, c->x, c->x_type, start, l.tokens * c->in_features);
            }
            if (l.threads > 1) run_on_workers(linear_thread, &l, l.threads);
            else linear_thread(&l, 0);
        }
    }
    if (owner) pthread_mutex_unlock(&pool.busy);
    return memory ? atomic_load(&l.status) : NO_MEMORY;
}

/* ---- dense weights --------------------------------------------------------------------------------------------- */

INLINE void dequantize_tile(layer *l, int64_t tile, int64_t block, int d) {
    const crvq_call *c = l->call;
    float *out = c->y;
    for (int r = 0; r < TILE_ROWS; r++) {
        int64_t row = tile * TILE_ROWS + r;
        if (row < c->row_start || row >= c->row_start + c->row_count) continue;
        float scale = load(c->scales, c->scale_type, row), *line = out + (row - c->row_start) * c->in_features;
        for (int64_t g = 0; g < TILE_GROUPS && block * TILE_GROUPS + g < l->groups; g++) {
            int64_t group = block * TILE_GROUPS + g;
            const float *codeword = l->codebooks + (int64_t)code_at(l, block, tile, (int)g, r) * d;
            float sum[MAX_GROUP];
            for (int i = 0; i < d; i++) sum[i] = codeword[i];
            for (int b = 1; group < c->critical && b < c->num_codebooks; b++) {
                int64_t v = l->groups + (int64_t)(b - 1) * c->critical + group;
                int code = code_at(l, v / TILE_GROUPS, tile, (int)(v % TILE_GROUPS), r);
                codeword = l->codebooks + (b * l->padded_size + code) * d;
                for (int i = 0; i < d; i++) sum[i] += codeword[i];
            }
            if (c->permuted) {
                for (int i = 0; i < d; i++) line[group * d + i] = sum[i] * scale;
            } else {
                for (int i = 0; i < d; i++) line[channel(c, group * d + i, &l->status)] = sum[i] * scale;
            }
        }
    }
}

INLINE void dequantize_rows(layer *l, int64_t tile, int64_t tile_end) {
    for (; tile < tile_end; tile++) {
        for (int64_t block = 0; block * TILE_GROUPS < l->groups; block++) {
            switch (l->call->group) {
                case 4: dequantize_tile(l, tile, block, 4); break;
                case 8: dequantize_tile(l, tile, block, 8); break;
                default: dequantize_tile(l, tile, block, 16); break;
            }
        }
    }
}

static void dequantize_scalar(layer *l, int64_t tile, int64_t tile_end) { dequantize_rows(l, tile, tile_end); }

#ifdef HAVE_X86
TARGET_AVX2 static void dequantize_avx2(layer *l, int64_t tile, int64_t tile_end) {
    dequantize_rows(l, tile, tile_end);
}
#endif

static void dequantize_thread(void *context, int thread) {
    layer *l = context;
    int64_t first = l->call->row_start / TILE_ROWS, end = (l->call->row_start + l->call->row_count - 1) / TILE_ROWS + 1;
    int64_t share = (end - first + l->threads - 1) / l->threads;
    int64_t tile = first + thread * share, tile_end = tile + share < end ? tile + share : end;
#ifdef HAVE_X86
    if (l->call->instructions != SCALAR) {
        dequantize_avx2(l, tile, tile_end);
        return;
    }
#endif
    dequantize_scalar(l, tile, tile_end);
}

/* Writes rows [row_start, row_start + row_count) of the weight, fp32. Returns OK, NO_MEMORY or BAD_ORDER. */
EXPORT int crvq_dequantize(const crvq_call *c) {
    layer l;
    describe(&l, c);
    l.by_row = 1;
    l.padded_size = l.entries;
    int owner = c->threads > 1 && pthread_mutex_trylock(&pool.busy) == 0;
    l.threads = owner ? start_workers(c->threads < MAX_THREADS ? c->threads : MAX_THREADS) : 1;
    l.codebooks = (float *)workspace(c->num_codebooks * l.padded_size * c->group * sizeof(float));
    if (l.codebooks) {
        read_codebooks(&l);
        if (l.threads > 1) run_on_workers(dequantize_thread, &l, l.threads);
        else dequantize_thread(&l, 0);
    }
    if (owner) pthread_mutex_unlock(&pool.busy);
    return l.codebooks ? atomic_load(&l.status) : NO_MEMORY;
}

/* The best instruction set of this processor. */
EXPORT int crvq_instructions(void) {
#ifdef HAVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        return wide && __builtin_cpu_supports("avx512vbmi") ? VBMI : AVX2;
    }
#endif
    return SCALAR;
}

/* Size of the argument, so that binding.py can refuse a library that was built from other sources. */
EXPORT int crvq_call_size(void) { return (int)sizeof(crvq_call); }
