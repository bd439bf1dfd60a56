/* Linked into every CPU library: its parallel loops run on the OpenMP pool that torch uses, so that torch's thread count
 * holds, and its larger local buffers need no TVM runtime. Hidden, so that a TVM in the same process does not find the
 * pointers and set them back to its own. */
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>

#define HIDDEN __attribute__((visibility("hidden")))

typedef struct {
  void* sync_handle;
  int32_t num_task;
} ParallelGroup;

typedef int (*ParallelBody)(int task, ParallelGroup* group, void* data);

static int launch(ParallelBody body, void* data, int num_task) {
  int threads = num_task > 0 ? num_task : omp_get_max_threads();
  int failed = 0;
  if (threads == 1 || omp_in_parallel()) {
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
