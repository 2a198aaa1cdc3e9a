/* The search for codes, shared out over threads: rows do not depend on each other. */
#include "instruction_set.h"
#include "pool.h"

enum { LEAST_ROWS = 16 }; /* of a thread */

typedef struct {
    const crvq_search_call *call;
    int threads;
    atomic_int status;
} job;

static void search_thread(void *context, int thread) {
    job *j = context;
    int64_t share = (j->call->rows + j->threads - 1) / j->threads, row = thread * share, end = row + share;
    if (end > j->call->rows) end = j->call->rows;
    int status = row < end ? instruction_sets[j->call->instructions]->search(j->call, row, end) : OK;
    if (status) atomic_store(&j->status, status);
}

int crvq_search(const crvq_search_call *call) {
    int64_t most = call->rows / LEAST_ROWS + 1;
    job job = {.call = call, .threads = take_workers(call->threads < most ? call->threads : (int)most)};
    run_on_workers(search_thread, &job, job.threads);
    release_workers(job.threads);
    return atomic_load(&job.status);
}
