/* Linked into every CPU library: its parallel loops run on the OpenMP pool that torch uses, so that torch's thread count
 * holds, and its larger local buffers need no TVM runtime. Hidden, so that a TVM in the same process does not find the
 * pointers and set them back to its own. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#define HIDDEN __attribute__((visibility("hidden")))

typedef struct {
  void* sync_handle;
  int32_t num_task;
} ParallelGroup;

typedef int (*ParallelBody)(int task, ParallelGroup* group, void* data);

/* GCC's OpenMP keeps the threads of a loop for the next one, and a forked child, which has inherited the list of them but
 * not the threads, waits for them for ever: in torch's loops as in ours. So whoever forks gives his threads back first, and
 * parent and child start new ones when they next need some. */
enum { PAUSE_SOFT = 1 };
static int (*pause_openmp)(int kind); /* omp_pause_resource_all, which the OpenMP of GCC has since version 9 */

static int is_child, ends_orderly;

static void give_threads_back(void) {
  if (pause_openmp) pause_openmp(PAUSE_SOFT);
}

static void in_child(void) { is_child = 1; }

__attribute__((constructor)) static void watch_forks(void) {
  Dl_info openmp; /* looked up, since torch's may be older than the one that this is linked with */
  void* library = dladdr((void*)omp_get_max_threads, &openmp) ? dlopen(openmp.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : 0;
  if (library) {
    pause_openmp = (int (*)(int))dlsym(library, "omp_pause_resource_all");
    dlclose(library); /* it stays: it is ours */
  }
  pthread_atfork(give_threads_back, 0, in_child);
}

/* How many threads a loop may have. A child whose parent could not give its threads back has one. Any other has to give back
 * its own before it exits: torch has another pool, whose threads, which are not in the child, it then waits for. It finds
 * them gone, unless new threads have got their places in memory. */
static int allowed_threads(int wanted) {
  int threads = wanted > 0 ? wanted : omp_get_max_threads();
  if (threads == 1 || omp_in_parallel() || (is_child && !pause_openmp)) return 1;
  if (is_child && !__atomic_exchange_n(&ends_orderly, 1, __ATOMIC_RELAXED)) atexit(give_threads_back);
  return threads;
}

static int launch(ParallelBody body, void* data, int num_task) {
  int threads = allowed_threads(num_task);
  int failed = 0;
  if (threads == 1) {
    ParallelGroup group = {0, 1};
    return body(0, &group, data);
  }
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    /* fewer threads may come than were asked for */
    ParallelGroup group = {0, omp_get_num_threads()};
    failed |= body(omp_get_thread_num(), &group, data);
  }
  return failed;
}

static void* allocate(int device_type, int device_id, uint64_t size, int code_hint, int bits_hint) {
  void* memory = 0;
  (void)device_type, (void)device_id, (void)code_hint, (void)bits_hint;
  return posix_memalign(&memory, 64, size ? size : 64) ? 0 : memory;
}

static int release(int device_type, int device_id, void* memory) {
  (void)device_type, (void)device_id;
  free(memory);
  return 0;
}

HIDDEN void* __TVMBackendParallelLaunch = (void*)launch;
HIDDEN void* __TVMBackendAllocWorkspace = (void*)allocate;
HIDDEN void* __TVMBackendFreeWorkspace = (void*)release;
