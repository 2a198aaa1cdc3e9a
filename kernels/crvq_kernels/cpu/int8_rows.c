/* The product with rows of int8 numbers, shared out over threads: rows do not depend on each other. */
#include "instruction_set.h"
#include "pool.h"

enum { LEAST_NUMBERS = 1 << 17 /* of a thread */, ROWS = 8 /* that are computed together */ };

typedef struct {
    const crvq_rows_call *call;
    int threads;
} job;

static void rows_thread(void *context, int thread) {
    const job *j = context;
    const crvq_rows_call *c = j->call;
    int64_t share = ((c->rows + ROWS - 1) / ROWS + j->threads - 1) / j->threads * ROWS;
    int64_t row = thread * share, end = row + share < c->rows ? row + share : c->rows;
    if (row < end) instruction_sets[c->instructions]->int8_rows(c, row, end);
}

int crvq_int8_rows(const crvq_rows_call *call) {
    int64_t most = call->rows * call->channels * call->tokens / LEAST_NUMBERS + 1;
    job job = {.call = call, .threads = take_workers(call->threads < most ? call->threads : (int)most)};
    run_on_workers(rows_thread, &job, job.threads);
    release_workers(job.threads);
    return OK;
}
