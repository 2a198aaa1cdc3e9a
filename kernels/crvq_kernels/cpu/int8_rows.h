/* A product with rows of int8 numbers, for an instruction set to compile as its own: the file that includes this says
 * how many LANES of fp32 a register has, 16 or a divisor of it.
 *
 * Four numbers are read as one integer of 32 bits, and shifts take them apart: that is fast whatever the instruction
 * set. So a register has every fourth number, and rows.py has put the channels of x in that order. Eight sums at a time
 * hide how long one addition takes; each runs through its row alone, so an output has the same bits whatever is
 * computed beside it. */
#pragma once
#include "instruction_set.h"
#include "numbers.h"

enum {
    RUN = 64, /* channels that are reordered together: four times 16 */
    AT_ONCE = 8, /* of one row and one token each */
};

typedef float row_floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t row_ints __attribute__((vector_size(LANES * 4), aligned(1), may_alias));

/* Writes the outputs of `rows` rows for `tokens` tokens. */
INLINE void multiply_rows(const crvq_rows_call *c, int64_t row, const int rows, int64_t token, const int tokens) {
    int64_t channels = c->channels, runs_end = channels / RUN * RUN;
    const int8_t *numbers = c->numbers + row * channels;
    const float *x = c->x + token * channels;
    row_floats sums[AT_ONCE];
    for (int i = 0; i < rows * tokens; i++) sums[i] = (row_floats){0};
    for (int64_t start = 0; start < runs_end; start += RUN) {
        for (int part = 0; part < RUN / 4; part += LANES) {
            for (int r = 0; r < rows; r++) {
                row_ints four = *(const row_ints *)(numbers + r * channels + start + 4 * part);
                for (int k = 0; k < 4; k++) {
                    row_floats number = __builtin_convertvector(four << (24 - 8 * k) >> 24, row_floats);
                    for (int m = 0; m < tokens; m++) {
                        const float *at = x + m * channels + start + k * (RUN / 4) + part;
                        sums[r * tokens + m] += number * *(const row_floats *)at;
                    }
                }
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        float scale = load(c->scales, c->scale_type, row + r);
        for (int m = 0; m < tokens; m++) {
            float sum = 0;
            for (int k = 0; k < LANES; k++) sum += sums[r * tokens + m][k];
            for (int64_t i = runs_end; i < channels; i++) sum += numbers[r * channels + i] * x[m * channels + i];
            c->y[(token + m) * c->rows + row + r] = sum * scale;
        }
    }
}

/* All tokens from `token` on that there are `tokens` at a time of; returns the first that is left. */
INLINE int64_t multiply_tokens(const crvq_rows_call *c, int64_t row, int rows, int64_t token, const int tokens) {
    for (; token + tokens <= c->tokens; token += tokens) {
        if (rows == 1) multiply_rows(c, row, 1, token, tokens);
        for (int r = 0; r + AT_ONCE / tokens <= rows; r += AT_ONCE / tokens) {
            multiply_rows(c, row + r, AT_ONCE / tokens, token, tokens);
        }
    }
    return token;
}

INLINE void multiply_int8_rows(const crvq_rows_call *c, int64_t row, int64_t row_end) {
    for (int rows; row < row_end; row += rows) {
        rows = row + AT_ONCE <= row_end ? AT_ONCE : 1;
        int64_t token = multiply_tokens(c, row, rows, 0, 4);
        token = multiply_tokens(c, row, rows, token, 2);
        multiply_tokens(c, row, rows, token, 1);
    }
}
