/* Runs the CPU kernel from several threads at once, for a sanitizer to watch. test_sanitizers.py builds and runs it.
 * Prints "done" if every result was the same for every number of threads. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "layer.h"
#include "numbers.h"

enum { ROWS = 320, CHANNELS = 1024, GROUP = 8, CRITICAL = 3, BOOKS = 4, CODEWORDS = 256, TOKENS = 5, CALLERS = 3 };

static void *caller(void *argument) {
    crvq_call call = *(crvq_call *)argument;
    size_t size = TOKENS * ROWS * sizeof(float);
    float *first = malloc(size), *other = malloc(size), *weight = malloc(ROWS * CHANNELS * sizeof(float));
    intptr_t different = 0;
    for (int repetition = 0; repetition < 12; repetition++) {
        call.y = repetition ? other : first;
        call.threads = 1 + repetition % 4;
        different |= crvq_linear(&call);
        if (repetition) different |= memcmp(first, other, size) != 0;
    }
    call.y = weight;
    call.row_count = ROWS;
    for (call.permuted = 0; call.permuted < 2; call.permuted++) different |= crvq_dequantize(&call);
    free(first), free(other), free(weight);
    return (void *)different;
}

/* The codes of rows that end in the middle of what a thread does at once. */
static intptr_t search(int instructions) {
    enum { ROWS = 61, FIRST = 1, GROUPS = 3, ALL = 5, CRITICAL = 2, BOOKS = 3, SIZE = 20, PADDED = 32 };
    enum { COLUMNS = GROUPS * GROUP };
    int virtual_groups = ALL + (BOOKS - 1) * CRITICAL;
    float *wanted = malloc(ROWS * COLUMNS * sizeof(float)), *change = malloc(ROWS * COLUMNS * sizeof(float));
    float *codebooks = malloc(BOOKS * SIZE * GROUP * sizeof(float));
    float *columns = calloc(BOOKS * GROUP * PADDED, sizeof(float));
    float *energies = malloc(GROUPS * BOOKS * PADDED * sizeof(float));
    float *metric = malloc(COLUMNS * COLUMNS * sizeof(float));
    int64_t *first = malloc(virtual_groups * ROWS * 8), *codes = malloc(virtual_groups * ROWS * 8);
    crvq_search_call call = {
        .wanted = wanted, .change = change, .codebooks = codebooks, .columns = columns, .energies = energies,
        .metric = metric, .rows = ROWS, .groups = GROUPS, .codebook_size = SIZE, .padded_size = PADDED,
        .first_group = FIRST, .all_groups = ALL, .critical = CRITICAL, .group = GROUP, .num_codebooks = BOOKS,
        .instructions = instructions,
    };
    for (int i = 0; i < BOOKS * SIZE * GROUP; i++) codebooks[i] = (i * 7919 % 2001 - 1000) / 500.0f;
    for (int i = 0; i < BOOKS * SIZE * GROUP; i++) {
        columns[(i / (SIZE * GROUP) * GROUP + i % GROUP) * PADDED + i / GROUP % SIZE] = codebooks[i];
    }
    for (int i = 0; i < COLUMNS * COLUMNS; i++) metric[i] = i / COLUMNS == i % COLUMNS;
    for (int i = 0; i < GROUPS * BOOKS * PADDED; i++) energies[i] = i % PADDED < SIZE ? -i % 5 : -__builtin_inff();
    intptr_t different = 0;
    for (call.threads = 1; call.threads < 5; call.threads++) {
        call.codes = call.threads == 1 ? first : codes;
        for (int i = 0; i < virtual_groups * ROWS; i++) call.codes[i] = i % SIZE;
        for (int i = 0; i < ROWS * COLUMNS; i++) wanted[i] = i * 104729 % 2001 / 300.0f, change[i] = 0;
        different |= crvq_search(&call);
        if (call.threads > 1) different |= memcmp(first, codes, virtual_groups * ROWS * 8) != 0;
    }
    codes[(FIRST + 1) * ROWS + 17] = SIZE;
    different |= crvq_search(&call) != BAD_CODE;
    call.metric = NULL; /* codes are only written then */
    different |= crvq_search(&call);
    free(wanted), free(change), free(codebooks), free(columns), free(energies), free(metric), free(first), free(codes);
    return different;
}

/* Whether two threads multiply as one does. */
static intptr_t multiply(int instructions) {
    enum { MANY = 4099, WIDTH = 100 };
    float *x = malloc(TOKENS * WIDTH * 4), *y = malloc(TOKENS * MANY * 4), *first = malloc(TOKENS * MANY * 4);
    float *scales = malloc(MANY * 4);
    int8_t *numbers = malloc(MANY * WIDTH);
    for (int i = 0; i < TOKENS * WIDTH; i++) x[i] = i * 7919 % 2001 / 300.0f;
    for (int i = 0; i < MANY; i++) scales[i] = 1 + i % 7 / 8.0f;
    for (int i = 0; i < MANY * WIDTH; i++) numbers[i] = (int8_t)(i % 4001 * 104729 % 255 - 127);
    crvq_rows_call call = {
        .x = x, .y = first, .numbers = numbers, .scales = scales, .tokens = TOKENS, .rows = MANY, .channels = WIDTH,
        .instructions = instructions, .threads = 1,
    };
    intptr_t different = crvq_int8_rows(&call);
    call.y = y, call.threads = 2;
    different |= crvq_int8_rows(&call) || memcmp(first, y, TOKENS * MANY * 4) != 0;
    free(x), free(y), free(first), free(scales), free(numbers);
    return different;
}

int main(void) {
    int blocks = (CHANNELS / GROUP + (BOOKS - 1) * CRITICAL + TILE_GROUPS - 1) / TILE_GROUPS;
    size_t codes = (size_t)blocks * TILE_GROUPS * ROWS;
    uint8_t *tiles = malloc(codes);
    uint16_t *codebooks = malloc(BOOKS * CODEWORDS * GROUP * 2), *scales = malloc(ROWS * 2);
    int16_t *order = malloc(CHANNELS * 2);
    float *x = malloc(TOKENS * CHANNELS * sizeof(float));
    for (size_t i = 0; i < codes; i++) tiles[i] = (uint8_t)rand();
    for (int i = 0; i < BOOKS * CODEWORDS * GROUP; i++) codebooks[i] = float_to_half((rand() % 2001 - 1000) / 500.0f);
    for (int i = 0; i < ROWS; i++) scales[i] = float_to_half(1 + i % 7 / 8.0f);
    for (int i = 0; i < CHANNELS; i++) order[i] = (int16_t)(i * 7 % CHANNELS);
    for (int i = 0; i < TOKENS * CHANNELS; i++) x[i] = (rand() % 2001 - 1000) / 300.0f;
    intptr_t different = 0;
    for (int instructions = 0; instructions <= crvq_instructions(); instructions++) {
        crvq_call call = {
            .x = x, .tokens = TOKENS, .instructions = instructions, .threads = 2, .tiles = tiles,
            .codebooks = codebooks, .scales = scales, .order = order, .out_features = ROWS, .in_features = CHANNELS,
            .group = GROUP, .num_codebooks = BOOKS, .codebook_size = CODEWORDS, .nbits = 8, .critical = CRITICAL,
            .order_bytes = 2, .codebook_type = FLOAT16, .scale_type = FLOAT16,
        };
        pthread_t threads[CALLERS];
        for (int i = 0; i < CALLERS; i++) pthread_create(&threads[i], NULL, caller, &call);
        for (int i = 0; i < CALLERS; i++) {
            void *result;
            pthread_join(threads[i], &result);
            different |= (intptr_t)result;
        }
        different |= search(instructions);
        different |= multiply(instructions);
    }
    free(tiles), free(codebooks), free(scales), free(order), free(x);
    puts(different ? "different results" : "done");
    return different != 0;
}
