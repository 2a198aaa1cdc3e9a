/* The calls from Python: what they do in which thread and where in memory. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "instruction_set.h"
#include "pool.h"

enum { PASSES = 2 }; /* least passes of a thread that makes whole ones */

/* x of the groups on the desk, in the order of the channels, for the tokens side by side from `token` of the pass on. */
static void gather_x(layer *l, int64_t token, desk *desk) {
    const crvq_call *c = l->call;
    int side = l->kind->tokens, tokens = l->tokens - token < side ? (int)(l->tokens - token) : side;
    int64_t start = (desk->block * TILE_GROUPS + desk->first) * c->group, count = (int64_t)desk->count * c->group;
    const float *x = l->x + token * c->in_features;
    memset(desk->not_finite, 0, sizeof desk->not_finite);
    if (tokens < side) memset(desk->x, 0, count * side * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        int64_t position = start + i;
        if (position >= c->in_features) position = (position - c->in_features) % ((int64_t)c->critical * c->group);
        const float *from = x + channel(c, position, &l->status);
        for (int t = 0; t < tokens; t++) {
            float value = from[t * c->in_features];
            desk->x[i * side + t] = value;
            desk->not_finite[t] += value * 0.0f;
        }
    }
}

/* Sums one part of the groups for one slice of the rows. */
static void sum_part(layer *l, int part, int slice, desk *desk) {
    int64_t share = (l->row_tiles / 4 + l->slices - 1) / l->slices * 4;
    int64_t tile = slice * share < l->row_tiles ? slice * share : l->row_tiles;
    int64_t tile_end = tile + share < l->row_tiles ? tile + share : l->row_tiles;
    int64_t block_end = (part + 1) * l->blocks / l->parts;
    if (tile == tile_end) return;
    float *sums = l->sums + part * l->padded_tokens * l->rows;
    int side = l->kind->tokens;
    for (int64_t m = 0; m < l->tokens; m += side) {
        float *rows = sums + m * l->rows + tile * TILE_ROWS * side;
        memset(rows, 0, (tile_end - tile) * TILE_ROWS * side * sizeof(float));
    }
    for (desk->block = part * l->blocks / l->parts; desk->block < block_end; desk->block++) {
        desk->last = desk->block + 1 == block_end;
        for (int64_t m = 0; m < l->tokens; m += side) {
            int groups = groups_in(l, desk->block);
            for (desk->first = 0; desk->first < groups; desk->first += l->table_groups) {
                int left = groups - desk->first;
                desk->count = left < l->table_groups ? left : l->table_groups;
                gather_x(l, m, desk);
                l->kind->make(l, desk);
                l->kind->add(l, desk, tile, tile_end, sums + m * l->rows);
            }
        }
    }
}

/* Writes y of the tokens side by side from `token` of the pass on. */
static void write_rows(const layer *l, int64_t token, int64_t tile, int64_t tile_end) {
    const crvq_call *c = l->call;
    float scales[ROW_MULTIPLE], bias[ROW_MULTIPLE] = {0}, rows[ROW_MULTIPLE];
    int side = l->kind->tokens, tokens = l->tokens - token < side ? (int)(l->tokens - token) : side;
    for (int64_t n = tile * TILE_ROWS; n < tile_end * TILE_ROWS && n < c->out_features; n += ROW_MULTIPLE) {
        float *sums = l->sums + token * l->rows + n * side;
        int64_t count = c->out_features - n < ROW_MULTIPLE ? c->out_features - n : ROW_MULTIPLE;
        for (int64_t part = 1; part < l->parts; part++) {
            const float *others = sums + part * l->padded_tokens * l->rows;
            for (int64_t i = 0; i < ROW_MULTIPLE * side; i++) sums[i] += others[i];
        }
        if (l->kind->order_rows) l->kind->order_rows(sums);
        l->set->read_floats(scales, c->scales, c->scale_type, n, count);
        if (c->bias) l->set->read_floats(bias, c->bias, c->bias_type, n, count);
        for (int t = 0; t < tokens; t++) {
            for (int64_t i = 0; i < count; i++) rows[i] = sums[i * side + t] * scales[i] + bias[i];
            int64_t start = (l->first_token + token + t) * c->out_features + n;
            l->set->write_floats(c->y, c->x_type, start, rows, count);
        }
    }
}

/* The share of one thread in a pass. */
static void linear_thread(void *context, int thread) {
    layer *l = context;
    desk desk;
    desk.tables = l->tables + thread * l->table_size;
    desk.scratch = l->scratch + (int64_t)thread * TILE_GROUPS * TABLE;
    for (int item; (item = atomic_fetch_add(&l->next_item, 1)) < l->parts * l->slices;) {
        sum_part(l, item % l->parts, item / l->parts, &desk);
    }
    atomic_fetch_add(&l->finished, 1);
    for (int spins = 0; atomic_load_explicit(&l->finished, memory_order_acquire) < l->threads; spins++) relax(spins);

    int64_t share = (l->row_tiles / 4 + l->threads - 1) / l->threads * 4;
    int64_t tile = thread * share < l->row_tiles ? thread * share : l->row_tiles;
    int64_t tile_end = tile + share < l->row_tiles ? tile + share : l->row_tiles;
    for (int64_t m = 0; m < l->tokens; m += l->kind->tokens) write_rows(l, m, tile, tile_end);
}

/* One pass over the codes, for the tokens from `first_token` on. */
static void linear_pass(layer *l, int64_t first_token) {
    const crvq_call *c = l->call;
    choose_tables(l, first_token);
    atomic_store(&l->next_item, 0);
    atomic_store(&l->finished, 0);
    int64_t start = first_token * c->in_features;
    if (c->x_type == FLOAT32) l->x = (const float *)c->x + start;
    else l->set->read_floats(l->staged, c->x, c->x_type, start, l->tokens * c->in_features), l->x = l->staged;
    run_on_workers(linear_thread, l, l->threads);
}

/* Threads that make whole passes, each with a layer of its own. */
typedef struct {
    layer *layers;
    int64_t pass, passes;
    atomic_llong next;
} prompt;

static void prompt_thread(void *context, int thread) {
    prompt *p = context;
    for (int64_t i; (i = atomic_fetch_add(&p->next, 1)) < p->passes;) linear_pass(&p->layers[thread], i * p->pass);
}

enum { LINE = 64 }; /* bytes of a cache line, to which arrays are aligned */

/* Memory that a calling thread keeps until it ends: fresh pages would cost more than a small layer. */
typedef struct {
    size_t size;
} workspace_header;

static pthread_key_t workspace_key;

static void make_workspace_key(void) { pthread_key_create(&workspace_key, free); }

static uint8_t *workspace(size_t size) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_workspace_key);
    workspace_header *held = pthread_getspecific(workspace_key);
    if (!held || held->size < size) {
        free(held);
        held = malloc(sizeof *held + LINE + size);
        if (pthread_setspecific(workspace_key, held) || !held) return NULL;
        held->size = size;
    }
    uintptr_t start = (uintptr_t)(held + 1);
    return (uint8_t *)(start + (LINE - start % LINE) % LINE);
}

static void *take(uint8_t **next, int64_t bytes) {
    void *here = *next;
    if (here) *next += (bytes + LINE - 1) / LINE * LINE;
    return here;
}

/* Lays out the arrays of `l`, but for its codebooks, from `memory` on; with NULL only measures. Returns their bytes. */
static int64_t lay_out(layer *l, uint8_t *memory) {
    const crvq_call *c = l->call;
    /* Measuring goes along a made-up address, which is never used. */
    uint8_t *start = memory ? memory : (uint8_t *)LINE, *next = start;
    l->staged = c->x_type == FLOAT32 ? NULL : take(&next, l->tokens * c->in_features * sizeof(float));
    l->sums = take(&next, l->parts * l->padded_tokens * l->rows * sizeof(float));
    l->tables = take(&next, l->threads * l->table_size);
    l->scratch = take(&next, l->kind->scratch * (int64_t)l->threads * TILE_GROUPS * TABLE * sizeof(float));
    return next - start;
}

int crvq_linear(const crvq_call *c) {
    layer layers[MAX_THREADS], *l = layers;
    describe(l, c);
    choose_tables(l, 0);
    prompt p = {.layers = layers, .pass = l->tokens, .passes = (c->tokens + l->tokens - 1) / l->tokens};
    int64_t work = l->virtual_groups * l->rows * l->tokens >> 17; /* fewer codes are no work for a second thread */
    int threads = take_workers(c->threads <= work ? c->threads : (int)work + 1);
    int apart = p.passes >= PASSES * threads; /* else they share a pass */
    for (int i = 0; i < (apart ? threads : 1); i++) {
        if (i) describe(&layers[i], c), choose_tables(&layers[i], 0);
        layers[i].threads = apart ? 1 : threads;
        layers[i].slices = (layers[i].threads + l->parts - 1) / l->parts;
    }
    int64_t codebooks = c->num_codebooks * l->padded_size * c->group * sizeof(float), own = lay_out(l, NULL);
    uint8_t *memory = workspace(codebooks + (apart ? threads : 1) * own);
    if (memory) {
        for (int i = 0; i < (apart ? threads : 1); i++) {
            layers[i].codebooks = (float *)memory;
            lay_out(&layers[i], memory + codebooks + i * own);
        }
        l->kind->read_codebooks(l);
        if (apart) run_on_workers(prompt_thread, &p, threads);
        else for (int64_t i = 0; i < p.passes; i++) linear_pass(l, i * p.pass);
    }
    int status = memory ? OK : NO_MEMORY;
    for (int i = 0; memory && i < (apart ? threads : 1); i++) status |= atomic_load(&layers[i].status);
    release_workers(threads);
    return status;
}

static void dequantize_thread(void *context, int thread) {
    layer *l = context;
    const crvq_call *c = l->call;
    int64_t first = c->row_start / TILE_ROWS, end = (c->row_start + c->row_count - 1) / TILE_ROWS + 1;
    int64_t share = (end - first + l->threads - 1) / l->threads;
    int64_t tile = first + thread * share, tile_end = tile + share < end ? tile + share : end;
    l->set->dequantize(l, tile, tile_end);
}

int crvq_dequantize(const crvq_call *c) {
    layer l;
    describe(&l, c);
    l.by_row = 1;
    l.padded_size = l.entries;
    l.threads = take_workers(c->threads);
    l.codebooks = (float *)workspace(c->num_codebooks * l.padded_size * c->group * sizeof(float));
    if (l.codebooks) {
        read_codebooks(&l);
        run_on_workers(dequantize_thread, &l, l.threads);
    }
    release_workers(l.threads);
    return l.codebooks ? atomic_load(&l.status) : NO_MEMORY;
}

int crvq_call_size(void) { return (int)(sizeof(crvq_call) + sizeof(crvq_search_call) + sizeof(crvq_rows_call)); }
