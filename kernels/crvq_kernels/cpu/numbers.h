/* Numbers of the three float types: each is read to fp32 and written from it. */
#pragma once
#include <stdint.h>
#include <string.h>

#include "call.h"

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    /* The exponent is re-based by a multiplication, which normalises subnormal numbers too. */
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

static inline uint16_t float_to_half(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00; /* rounds to 65536 or more */
    if (magnitude < 0x38800000) {                       /* subnormal: adding 0.5 rounds at the right bit */
        return sign | (uint16_t)(to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000);
    }
    return sign | (uint16_t)((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

static inline uint16_t float_to_bfloat(float value) {
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

