/* The calls from Python: what they do in which thread and where in memory. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "instruction_set.h"
#include "pool.h"

enum {
    MAX_TOKENS = 8,  /* tokens that share one pass over the codes */
    MAX_PARTS = 4,   /* of the groups of a layer */
    PART_BLOCKS = 2, /* least blocks of a part */
};

/* x of one block of virtual groups, in the order of the channels. */
static void gather_x(layer *l, int64_t token, int64_t block, desk *desk) {
    const crvq_call *c = l->call;
    int64_t start = block * TILE_GROUPS * c->group, count = (int64_t)groups_in(l, block) * c->group;
    const float *x = l->x + token * c->in_features;
    desk->not_finite = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t position = start + i;
        if (position >= c->in_features) position = (position - c->in_features) % ((int64_t)c->critical * c->group);
        desk->x[i] = x[channel(c, position, &l->status)];
        desk->not_finite += desk->x[i] * 0.0f;
    }
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
            gather_x(l, m, block, desk);
            l->kind->make(l, block, desk);
            l->kind->add(l, block, block + 1 == block_end, tile, tile_end, desk, sums + m * l->rows);
        }
    }
}

static void write_rows(const layer *l, int64_t token, int64_t tile, int64_t tile_end) {
    const crvq_call *c = l->call;
    float scales[ROW_MULTIPLE], bias[ROW_MULTIPLE] = {0};
    for (int64_t n = tile * TILE_ROWS; n < tile_end * TILE_ROWS && n < c->out_features; n += ROW_MULTIPLE) {
        float *sums = l->sums + token * l->rows + n;
        int64_t count = c->out_features - n < ROW_MULTIPLE ? c->out_features - n : ROW_MULTIPLE;
        for (int64_t part = 1; part < l->parts; part++) {
            for (int64_t i = 0; i < ROW_MULTIPLE; i++) sums[i] += sums[part * l->tokens * l->rows + i];
        }
        if (l->kind->order_rows) l->kind->order_rows(sums);
        l->set->read_floats(scales, c->scales, c->scale_type, n, count);
        if (c->bias) l->set->read_floats(bias, c->bias, c->bias_type, n, count);
        for (int64_t i = 0; i < count; i++) sums[i] = sums[i] * scales[i] + bias[i];
        int64_t start = (l->first_token + token) * c->out_features + n;
        l->set->write_floats(c->y, c->x_type, start, sums, count);
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

/* Lays out the arrays of `l` from `memory` on; with NULL only measures. Returns the bytes needed. */
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

int crvq_linear(const crvq_call *c) {
    layer l;
    describe(&l, c);
    int64_t pass = c->tokens < MAX_TOKENS ? c->tokens : MAX_TOKENS;
    int64_t work = l.virtual_groups * l.rows * pass >> 17; /* fewer codes are no work for a second thread */
    l.threads = take_workers(c->threads <= work ? c->threads : (int)work + 1);
    l.parts = l.blocks / PART_BLOCKS < MAX_PARTS ? (int)(l.blocks / PART_BLOCKS) : MAX_PARTS;
    if (l.parts < 1) l.parts = 1;
    l.slices = (l.threads + l.parts - 1) / l.parts;

    uint8_t *memory = workspace(lay_out(&l, NULL, pass));
    if (memory) {
        lay_out(&l, memory, pass);
        float *x = (float *)l.x;
        l.kind->read_codebooks(&l);
        for (l.first_token = 0; l.first_token < c->tokens; l.first_token += pass) {
            l.tokens = c->tokens - l.first_token < pass ? c->tokens - l.first_token : pass;
            atomic_store(&l.next_item, 0);
            atomic_store(&l.finished, 0);
            int64_t start = l.first_token * c->in_features;
            if (c->x_type == FLOAT32) {
                l.x = (const float *)c->x + start;
            } else {
                l.set->read_floats(x, c->x, c->x_type, start, l.tokens * c->in_features);
            }
            run_on_workers(linear_thread, &l, l.threads);
        }
    }
    release_workers(l.threads);
    return memory ? atomic_load(&l.status) : NO_MEMORY;
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
