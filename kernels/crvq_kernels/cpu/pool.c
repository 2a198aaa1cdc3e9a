/* Worker threads, which spin for some microseconds when there is nothing to do, and then sleep. */
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

static struct {
    pthread_mutex_t busy; /* held by the caller whose job the workers do */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int workers;
    atomic_uint generation; /* of the job */
    atomic_int left;        /* workers that have not finished it */
    atomic_int sleeping;
    job_function job;
    void *context;
    int threads;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

enum { SPINS_BEFORE_SLEEP = 2000 };

static void *worker(void *argument) {
    int number = (int)((uintptr_t)argument % MAX_THREADS);
    unsigned seen = (unsigned)((uintptr_t)argument / MAX_THREADS); /* the last job before this worker was */
    for (;;) {
        unsigned now;
        for (int spins = 0; (now = atomic_load_explicit(&pool.generation, memory_order_acquire)) == seen; spins++) {
            if (spins < SPINS_BEFORE_SLEEP) {
                relax(spins);
                continue;
            }
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleeping, 1);
            while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.sleeping, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        seen = now;
        if (number < pool.threads) pool.job(pool.context, number);
        atomic_fetch_sub_explicit(&pool.left, 1, memory_order_release);
    }
    return NULL;
}

/* The child of a fork has no workers; what was locked stays locked for ever. */
__attribute__((unused)) /* where processes do not fork */ static void after_fork(void) {
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = 0;
    atomic_store(&pool.generation, 0);
    atomic_store(&pool.left, 0);
    atomic_store(&pool.sleeping, 0);
}

static void register_fork_handler(void) { pthread_atfork(NULL, NULL, after_fork); }

/* Starts workers until there are `threads - 1`, or as the system allows. Returns how many threads there are. */
static int start_workers(int threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork_handler);
    while (pool.workers < threads - 1) {
        pthread_attr_t attributes;
        pthread_t thread;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        uintptr_t argument = (uintptr_t)atomic_load(&pool.generation) * MAX_THREADS + pool.workers + 1;
        int failed = pthread_create(&thread, &attributes, worker, (void *)argument);
        pthread_attr_destroy(&attributes);
        if (failed) break;
        pool.workers++;
    }
    return pool.workers + 1 < threads ? pool.workers + 1 : threads;
}

int take_workers(int threads) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads < 2 || pthread_mutex_trylock(&pool.busy)) return 1;
    int available = start_workers(threads);
    if (available == 1) pthread_mutex_unlock(&pool.busy);
    return available;
}

void release_workers(int threads) {
    if (threads > 1) pthread_mutex_unlock(&pool.busy);
}

void run_on_workers(job_function job, void *context, int threads) {
    if (threads == 1) {
        job(context, 0);
        return;
    }
    pool.job = job;
    pool.context = context;
    pool.threads = threads;
    atomic_store(&pool.left, pool.workers);
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    job(context, 0);
    for (int spins = 0; atomic_load_explicit(&pool.left, memory_order_acquire); spins++) relax(spins);
}
