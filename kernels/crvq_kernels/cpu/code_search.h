/* The search for codes, for an instruction set to compile as its own: the file that includes this says how many LANES
 * of fp32 a register has. A row's codes are chosen by the same operations whatever rows are beside it. */
#pragma once
#include "instruction_set.h"

enum { ROWS_AT_ONCE = 4 }; /* rows that share what is read of the codebook */

typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));

/* Writes the best code of each of `rows` vectors of `wanted`, [rows, d]. */
INLINE void best_codes(int32_t *codes, const float *wanted, const float *columns, const float *energies,
                       int64_t padded_size, const int rows, const int d) {
    floats best[ROWS_AT_ONCE];
    ints index[ROWS_AT_ONCE];
    for (int r = 0; r < rows; r++) best[r] = (floats){0} - __FLT_MAX__, index[r] = (ints){0};
    for (int32_t code = 0; code < padded_size; code += LANES) {
        floats sums[ROWS_AT_ONCE];
        for (int r = 0; r < rows; r++) sums[r] = *(const floats *)(energies + code);
        for (int i = 0; i < d; i++) {
            floats column = *(const floats *)(columns + i * padded_size + code);
            for (int r = 0; r < rows; r++) sums[r] += wanted[r * d + i] * column;
        }
        for (int r = 0; r < rows; r++) {
            ints better = sums[r] > best[r];
            best[r] = (floats)(((ints)sums[r] & better) | ((ints)best[r] & ~better));
            index[r] = ((code + (ints){0}) & better) | (index[r] & ~better);
        }
    }
    for (int r = 0; r < rows; r++) {
        int lane = 0;
        for (int k = 1; k < LANES; k++) {
            if (best[r][k] > best[r][lane] || (best[r][k] == best[r][lane] && index[r][k] < index[r][lane])) lane = k;
        }
        codes[r] = index[r][lane] + (best[r][lane] > -__FLT_MAX__ ? lane : 0); /* nothing is best among NaN */
    }
}

/* Chooses the codes of `rows` rows, group after group and codebook after codebook. Returns OK, or BAD_CODE where one
 * was no codeword's. */
INLINE int search_some_rows(const crvq_search_call *c, int64_t row, const int rows, const int d) {
    int64_t columns = c->groups * d;
    float *wanted = c->wanted + row * columns;
    for (int64_t g = 0; g < c->groups; g++) {
        int64_t group = c->first_group + g;
        for (int b = 0; b < (group < c->critical ? c->num_codebooks : 1); b++) {
            int64_t *codes = c->codes + (b ? c->all_groups + (b - 1) * c->critical + group : group) * c->rows + row;
            const float *codebook = c->codebooks + b * c->codebook_size * d;
            const float *energies = c->energies + (g * c->num_codebooks + b) * c->padded_size;
            float here[ROWS_AT_ONCE * MAX_GROUP], step[ROWS_AT_ONCE * MAX_GROUP];
            int32_t best[ROWS_AT_ONCE];
            for (int r = 0; r < rows; r++) {
                if (c->metric && (uint64_t)codes[r] >= (uint64_t)c->codebook_size) return BAD_CODE;
                for (int i = 0; i < d; i++) here[r * d + i] = wanted[r * columns + g * d + i];
                for (int j = 0; c->metric && j < d; j++) {
                    float old = codebook[codes[r] * d + j];
                    const float *metric = c->metric + (g * d + j) * columns + g * d;
                    for (int i = 0; i < d; i++) here[r * d + i] += old * metric[i];
                }
            }
            best_codes(best, here, c->columns + b * d * c->padded_size, energies, c->padded_size, rows, d);
            for (int r = 0; r < rows; r++) {
                for (int i = 0; c->metric && i < d; i++) {
                    step[r * d + i] = codebook[best[r] * d + i] - codebook[codes[r] * d + i];
                    c->change[(row + r) * columns + g * d + i] += step[r * d + i];
                }
                codes[r] = best[r];
            }
            for (int j = 0; c->metric && j < d; j++) {
                const float *metric = c->metric + (g * d + j) * columns;
                for (int r = 0; r < rows; r++) {
                    for (int64_t i = g * d; i < columns; i++) wanted[r * columns + i] -= step[r * d + j] * metric[i];
                }
            }
        }
    }
    return OK;
}

INLINE int search_rows_of(const crvq_search_call *c, int64_t row, int64_t row_end, const int d) {
    int status = OK;
    for (; !status && row + ROWS_AT_ONCE <= row_end; row += ROWS_AT_ONCE) {
        status = search_some_rows(c, row, ROWS_AT_ONCE, d);
    }
    for (; !status && row < row_end; row++) status = search_some_rows(c, row, 1, d);
    return status;
}

INLINE int search_rows(const crvq_search_call *c, int64_t row, int64_t row_end) {
    switch (c->group) {
        case 4: return search_rows_of(c, row, row_end, 4);
        case 8: return search_rows_of(c, row, row_end, 8);
        default: return search_rows_of(c, row, row_end, 16);
    }
}
