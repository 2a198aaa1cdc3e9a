/* Stands in for the compiler's header: what there is of AVX-512 is done by SIMDe, with AVX2. */
#pragma once
#include <string.h>
#include_next <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#undef _mm512_madd_epi16 /* takes the arguments of another one in SIMDe 0.7 */
#define _mm512_madd_epi16 simde_mm512_madd_epi16

/* What SIMDe 0.7 does not have. */
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
static inline __m512 _mm512_cvtepi32_ps(__m512i value) {
    float out[16];
    int32_t in[16];
    memcpy(in, &value, sizeof in);
    for (int i = 0; i < 16; i++) out[i] = (float)in[i];
    return simde_mm512_loadu_ps(out);
}

#undef _mm512_cvtps_epu32
#define _mm512_cvtps_epu32 emulated_cvtps_epu32
static inline __m512i _mm512_cvtps_epu32(__m512 value) {
    float in[16];
    uint32_t out[16];
    memcpy(in, &value, sizeof in);
    for (int i = 0; i < 16; i++) {
        float rounded = __builtin_rintf(in[i]);
        out[i] = rounded >= 0 && rounded < 0x1p32f ? (uint32_t)rounded : 0xffffffff;
    }
    return simde_mm512_loadu_si512(out);
}

#undef _mm512_cvtusepi32_epi16
#define _mm512_cvtusepi32_epi16 emulated_cvtusepi32_epi16
static inline __m256i _mm512_cvtusepi32_epi16(__m512i value) {
    uint32_t in[16];
    uint16_t out[16];
    memcpy(in, &value, sizeof in);
    for (int i = 0; i < 16; i++) out[i] = in[i] < 65535 ? (uint16_t)in[i] : 65535;
    return simde_mm256_loadu_si256((void *)out);
}

#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16 emulated_cvtepu8_epi16
static inline __m512i _mm512_cvtepu8_epi16(__m256i value) {
    uint8_t in[32];
    uint16_t out[32];
    memcpy(in, &value, sizeof in);
    for (int i = 0; i < 32; i++) out[i] = in[i];
    return simde_mm512_loadu_si512(out);
}

#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
static inline __m512 _mm512_cvtph_ps(__m256i value) {
    uint16_t in[16];
    float out[16];
    memcpy(in, &value, sizeof in);
    for (int i = 0; i < 16; i++) out[i] = _cvtsh_ss(in[i]);
    return simde_mm512_loadu_ps(out);
}

#define REDUCE(name, better)                                                                \
    static inline float emulated_##name(__m512 value) {                                     \
        float in[16], best;                                                                 \
        memcpy(in, &value, sizeof in);                                                      \
        best = in[0];                                                                       \
        for (int i = 1; i < 16; i++) best = in[i] better best ? in[i] : best;               \
        return best;                                                                        \
    }
REDUCE(reduce_min_ps, <)
REDUCE(reduce_max_ps, >)
#undef _mm512_reduce_min_ps
#undef _mm512_reduce_max_ps
#define _mm512_reduce_min_ps emulated_reduce_min_ps
#define _mm512_reduce_max_ps emulated_reduce_max_ps
