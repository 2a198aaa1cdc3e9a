/* Runs every instruction set that the processor has, for a sanitizer or an emulator to watch: layers of several forms,
 * against the sums in fp64, and with several threads and callers at once. test_sanitizers.py and test_emulation.py build
 * and run it. Prints "done" if every result was right, and the same for every number of threads.
 *
 *     check [NUMBER OF FORMS] */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "layer.h"
#include "numbers.h"

enum { ROWS = 200, PADDED = 256, CHANNELS = 384, BOOKS = 3, CRITICAL = 3, MOST = 70, CALLERS = 3, GROUP = 8 };

static const int FORMS[][2] = {{4, 8}, {8, 8}, {16, 8}, {8, 9}, {4, 10}, {16, 12}}; /* group, bits of a code */
static const int TOKENS[] = {1, 2, 3, 7, 19, MOST};

typedef struct {
    crvq_call call;
    const double *expected; /* [MOST, ROWS] */
    int failed;
} job;

/* Calls with all numbers of tokens, of any type, and of threads. */
static void *caller(void *argument) {
    job *job = argument;
    size_t size = MOST * ROWS * sizeof(float);
    float *first = malloc(size), *other = malloc(size);
    uint16_t *halves = malloc(MOST * CHANNELS * 2);
    const float *x = job->call.x;
    for (int n = 0; n < (int)(sizeof TOKENS / sizeof *TOKENS); n++) {
        for (int type = FLOAT32; type <= (TOKENS[n] == 3 ? BFLOAT16 : FLOAT32); type++) {
            if (TOKENS[n] == MOST && job->call.nbits > 8) continue; /* one pass is all there is to it */
            crvq_call call = job->call;
            call.tokens = TOKENS[n], call.x_type = type;
            if (type) call.x = halves;
            for (int i = 0; type && i < TOKENS[n] * CHANNELS; i++) store(halves, type, i, x[i]);
            for (call.threads = 1; call.threads < 4; call.threads++) {
                call.y = call.threads > 1 ? other : first;
                job->failed |= crvq_linear(&call);
                if (call.threads > 1) {
                    job->failed |= memcmp(first, other, TOKENS[n] * ROWS * (type ? 2 : 4)) != 0;
                }
            }
            double error = 0, all = 0;
            for (int i = 0; i < TOKENS[n] * ROWS; i++) {
                double difference = load(first, type, i) - job->expected[i];
                error += difference * difference, all += job->expected[i] * job->expected[i];
            }
            if (!(sqrt(error / all) < (type == BFLOAT16 ? 1e-2 : type == FLOAT16 ? 1e-3 : 2e-4))) job->failed = 1;
        }
    }
    free(first), free(other), free(halves);
    return NULL;
}

/* The dense weight, as the kernel makes it and as it is. */
static int check_dequantized(const crvq_call *c, const double *weight) {
    float *rows = malloc(ROWS * CHANNELS * sizeof(float));
    crvq_call call = *c;
    int failed = 0;
    call.y = rows, call.row_count = ROWS;
    for (call.permuted = 0; call.permuted < 2; call.permuted++) {
        failed |= crvq_dequantize(&call);
        for (int i = 0; i < ROWS * CHANNELS; i++) {
            int k = ((const int16_t *)c->order)[i % CHANNELS];
            double found = call.permuted ? rows[i] : rows[i / CHANNELS * CHANNELS + k];
            failed |= !(fabs(found - weight[i / CHANNELS * CHANNELS + k]) < 1e-5);
        }
    }
    free(rows);
    return failed;
}

/* A layer of random codes with `group` channels a code and codes of `bits` bits, by every instruction set. */
static int check_form(int group, int bits) {
    int groups = CHANNELS / group, size = 1 << bits, high_bits = bits == 12 ? 4 : bits - 8;
    int blocks = (groups + (BOOKS - 1) * CRITICAL + TILE_GROUPS - 1) / TILE_GROUPS;
    size_t codes = (size_t)blocks * TILE_GROUPS * PADDED;
    uint8_t *tiles = malloc(codes * (8 + high_bits) / 8);
    uint16_t *codebooks = malloc(BOOKS * size * group * 2), *scales = malloc(ROWS * 2);
    int16_t *order = malloc(CHANNELS * 2);
    float *x = malloc(MOST * CHANNELS * sizeof(float));
    double *weight = calloc(ROWS * CHANNELS, sizeof(double)), *expected = calloc(MOST * ROWS, sizeof(double));
    for (size_t i = 0; i < codes * (8 + high_bits) / 8; i++) tiles[i] = (uint8_t)(rand() >> 8);
    for (int i = 0; i < BOOKS * size * group; i++) codebooks[i] = float_to_half((rand() % 2001 - 1000) / 500.0f);
    for (int i = 0; i < ROWS; i++) scales[i] = float_to_half(1 + i % 7 / 8.0f);
    for (int i = 0; i < CHANNELS; i++) order[i] = (int16_t)(i * 5 % CHANNELS);
    for (int i = 0; i < MOST * CHANNELS; i++) x[i] = (rand() % 2001 - 1000) / 300.0f;
    for (int n = 0; n < ROWS; n++) {
        for (int v = 0; v < groups + (BOOKS - 1) * CRITICAL; v++) {
            int book = v < groups ? 0 : 1 + (v - groups) / CRITICAL, base = v < groups ? v : (v - groups) % CRITICAL;
            size_t place = ((size_t)(v / TILE_GROUPS * (PADDED / TILE_ROWS) + n / TILE_ROWS) * TILE_GROUPS +
                            v % TILE_GROUPS) * TILE_ROWS + n % TILE_ROWS;
            int above = high_bits ? tiles[codes + place * high_bits / 8] >> place * high_bits % 8 : 0;
            int code = tiles[place] | (above & ((1 << high_bits) - 1)) << 8;
            for (int i = 0; i < group; i++) {
                weight[n * CHANNELS + order[base * group + i]] +=
                    half_to_float(codebooks[(book * size + code) * group + i]) * half_to_float(scales[n]);
            }
        }
        for (int i = 0; i < MOST * CHANNELS; i++) {
            expected[i / CHANNELS * ROWS + n] += x[i] * weight[n * CHANNELS + i % CHANNELS];
        }
    }
    int failed = 0;
    for (int instructions = 0; instructions < 8; instructions++) {
        if (!crvq_has_instructions(instructions)) continue;
        job jobs[CALLERS];
        pthread_t threads[CALLERS];
        int callers = group == FORMS[0][0] && bits == FORMS[0][1] ? CALLERS : 1;
        for (int i = 0; i < callers; i++) {
            jobs[i] = (job){.expected = expected, .call = {
                .x = x, .instructions = instructions, .tiles = tiles, .codebooks = codebooks, .scales = scales,
                .order = order, .out_features = ROWS, .in_features = CHANNELS, .group = group, .num_codebooks = BOOKS,
                .codebook_size = size, .nbits = bits, .critical = CRITICAL, .order_bytes = 2,
                .codebook_type = FLOAT16, .scale_type = FLOAT16, .threads = 2,
            }};
            pthread_create(&threads[i], NULL, caller, &jobs[i]);
        }
        for (int i = 0; i < callers; i++) pthread_join(threads[i], NULL);
        int here = check_dequantized(&jobs[0].call, weight);
        for (int i = 0; i < callers; i++) here |= jobs[i].failed;
        if (here) printf("wrong: instructions %d, group %d, bits %d\n", instructions, group, bits);
        failed |= here;
    }
    free(tiles), free(codebooks), free(scales), free(order), free(x), free(weight), free(expected);
    return failed;
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
    float *x = malloc(7 * WIDTH * 4), *y = malloc(7 * MANY * 4), *first = malloc(7 * MANY * 4);
    float *scales = malloc(MANY * 4);
    int8_t *numbers = malloc(MANY * WIDTH);
    for (int i = 0; i < 7 * WIDTH; i++) x[i] = i * 7919 % 2001 / 300.0f;
    for (int i = 0; i < MANY; i++) scales[i] = 1 + i % 7 / 8.0f;
    for (int i = 0; i < MANY * WIDTH; i++) numbers[i] = (int8_t)(i % 4001 * 104729 % 255 - 127);
    crvq_rows_call call = {
        .x = x, .y = first, .numbers = numbers, .scales = scales, .tokens = 7, .rows = MANY, .channels = WIDTH,
        .instructions = instructions, .threads = 1,
    };
    intptr_t different = crvq_int8_rows(&call);
    call.y = y, call.threads = 2;
    different |= crvq_int8_rows(&call) || memcmp(first, y, 7 * MANY * 4) != 0;
    free(x), free(y), free(first), free(scales), free(numbers);
    return different;
}

int main(int count, char **arguments) {
    int failed = 0, forms = count > 1 ? atoi(arguments[1]) : (int)(sizeof FORMS / sizeof *FORMS);
    for (int i = 0; i < forms; i++) failed |= check_form(FORMS[i][0], FORMS[i][1]);
    for (int instructions = 0; instructions < 8; instructions++) {
        if (crvq_has_instructions(instructions)) failed |= search(instructions) || multiply(instructions);
    }
    puts(failed ? "wrong results" : "done");
    return failed;
}
