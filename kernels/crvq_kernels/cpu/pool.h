/* The threads that the library keeps: one caller at a time has them. */
#pragma once
#include <sched.h>

enum { MAX_THREADS = 64 };

typedef void (*job_function)(void *context, int thread);

/* Takes the workers for the caller, and starts more where they are too few. Returns how many threads a job may have: 1
 * if another caller has the workers or none can be started, else at most `threads`, until `release_workers`. */
int take_workers(int threads);

/* Runs job(context, thread) for thread 0 (here) to threads - 1, as many as were taken. */
void run_on_workers(job_function job, void *context, int threads);

/* Gives back what `take_workers` returned `threads` for. */
void release_workers(int threads);

/* Waits a moment. */
static inline void relax(int spins) {
    if (spins > 4096) {
        sched_yield();
        return;
    }
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}
