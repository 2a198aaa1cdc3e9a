/* What the instruction sets of AVX-512 share: tables of 16-bit integers for one token, before they are laid out. */
#pragma once
#include "avx2.h"

#ifdef HAVE_X86
#include <immintrin.h>

#define TARGET_AVX512(more) __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c" more)))

static inline int avx512_runs_here(void) {
    return avx2_runs_here() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

/* The tables of one block and one token to `desk->scratch`, fp32, the least entry of each to `minima`. What becomes an
 * integer is (table - minimum of the group) / step, the step shared by the block, so that outliers only coarsen their
 * own block. */
TARGET_AVX512("") INLINE void make_sums(const layer *l, desk *desk, float *minima) {
    int d = l->call->group, count = desk->count;
    int64_t size = l->padded_size;
    const float *x = desk->x;
    float offset = desk->not_finite[0], range = 0;
    for (int g = 0; g < count; g++) {
        const float *codebook = codebook_of(l, desk, g);
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
}

/* fp16 codebooks of groups of 8 to fp32 columns, 16 codewords at a time; others by read_codebooks. */
TARGET_AVX512("") INLINE void read_codebooks_avx512(layer *l) {
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
