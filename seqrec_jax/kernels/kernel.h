// What the kernels share: products whose sums stay in registers, and tasks that XLA's threads take one after another.

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#if defined(__AVX512F__)
enum { LANES = 16, VECTORS = 4 };
#elif defined(__AVX__)
enum { LANES = 8, VECTORS = 2 };
#elif defined(__aarch64__)
enum { LANES = 4, VECTORS = 4 };
#else
enum { LANES = 4, VECTORS = 2 };
#endif
enum { BLOCK = 64, ROWS = 6, PART = LANES * VECTORS };  // ROWS x VECTORS sums stay in registers

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Whole __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4)));
#define INLINE static inline __attribute__((always_inline))
// Written out, so that what the loop sums up is in registers.
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)

INLINE Floats load(const float *from) { return *(const Floats *)from; }
INLINE void store(float *to, Floats x) { *(Floats *)to = x; }
INLINE Floats chosen(Whole mask, Floats yes, Floats no) { return (Floats)((mask & (Whole)yes) | (~mask & (Whole)no)); }
INLINE long least(long a, long b) { return a < b ? a : b; }

// sums[r][v] += a[r, k] b[k, v] over k < depth; for rows from n on, those of row n - 1. Meanwhile ROWS * depth floats are
// fetched of what is read next, and of what is written next: where both lie in memory, caches see neither coming.
INLINE void multiply(int n, int vectors, long depth, const float *a, long a_row, long a_k, const float *b, long b_k,
                     Floats sums[ROWS][VECTORS], const float *next_read, float *next_written) {
  const float *row[ROWS];
  EACH(r, ROWS) row[r] = a + least(r, n - 1) * a_row;
  for (long k = 0; k < depth; k++) {
    __builtin_prefetch(next_read + k * ROWS);
    __builtin_prefetch(next_written + k * ROWS, 1);
    Floats x[VECTORS];
    EACH(v, vectors) x[v] = load(b + k * b_k + v * LANES);
    EACH(r, ROWS) EACH(v, vectors) sums[r][v] += row[r][k * a_k] * x[v];
  }
}

INLINE void add_part(int n, int vectors, long depth, const float *a, long a_row, long a_k, const float *b, long b_k,
                     float *c, long c_row) {
  Floats sums[ROWS][VECTORS];
  EACH(r, ROWS) EACH(v, vectors) sums[r][v] = load(c + least(r, n - 1) * c_row + v * LANES);
  multiply(n, vectors, depth, a, a_row, a_k, b, b_k, sums, a + ROWS * a_row, c + ROWS * c_row);
  EACH(r, ROWS) EACH(v, vectors) if (r < n) store(c + r * c_row + v * LANES, sums[r][v]);
}

// c [rows, width] += a [rows, depth] b [depth, width]; steps from one row to the next, and along a's rows. The width is
// a multiple of LANES.
static void add_product(long rows, long width, long depth, const float *a, long a_row, long a_k, const float *b,
                        long b_row, float *c, long c_row) {
  for (long w = 0; w < width; w += PART)
    for (long r = 0; r < rows; r += ROWS) {
      const float *a_r = a + r * a_row;
      float *c_r = c + r * c_row;
      if (w + PART > width)
        for (long v = w; v < width; v += LANES)
          add_part(least(rows - r, ROWS), 1, depth, a_r, a_row, a_k, b + v, b_row, c_r + v, c_row);
      else
        add_part(least(rows - r, ROWS), VECTORS, depth, a_r, a_row, a_k, b + w, b_row, c_r + w, c_row);
    }
}

static const float LOG2_E = 1.44269504f;

// 2^x, within 3e-7 of itself; 0 up to 2^-126; x < 128, and what is not a number stays so. Whole powers are added to the
// exponent of a polynomial.
INLINE Floats power_of_2(Floats x) {
  Floats shifted = x + 0x1.8p23f;
  Floats r = x - (shifted - 0x1.8p23f);
  Floats p = 1.32764713e-3f * r + 9.67554096e-3f;
  p = p * r + 5.55071309e-2f;
  p = p * r + 2.40221202e-1f;
  p = p * r + 6.93146944e-1f;
  p = p * r + 1.0f;
  return (Floats)(((Whole)p + ((Whole)shifted << 23)) & ~(x <= -126.0f));
}

// Tasks 0 .. tasks - 1, which threads begin in this order. The first member of what a kernel knows of its work.
typedef struct Tasks {
  long tasks;
  void (*run)(struct Tasks *, long task);
  atomic_long next, done, users;
} Tasks;

static void leave(Tasks *work) {
  if (atomic_fetch_sub(&work->users, 1) == 1) free(work);
}

static void take_tasks(void *work) {
  Tasks *tasks = work;
  for (long task; (task = atomic_fetch_add(&tasks->next, 1)) < tasks->tasks; atomic_fetch_add(&tasks->done, 1))
    tasks->run(tasks, task);
  leave(tasks);
}

static void wait_for(atomic_long *done, long all) {
  while (atomic_load(done) < all) sched_yield();
}

static bool refused(XLA_FFI_CallFrame *frame, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  if (error) frame->api->XLA_FFI_Error_Destroy(&args);
  return error;
}

// Returns when all is done, and frees `work`. Helpers that come late find no task and look at nothing else; where XLA
// has none, the caller does it all.
static void run_all(XLA_FFI_CallFrame *frame, Tasks *work) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args pool = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx,
                                             &threads};
  XLA_FFI_ThreadPool_Schedule_Args helper = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx,
                                             take_tasks, work};
  if (refused(frame, frame->api->XLA_FFI_ThreadPool_NumThreads(&pool))) threads = 1;
  atomic_store(&work->users, threads + 1);
  for (int64_t t = 1; t < threads; t++)
    if (refused(frame, frame->api->XLA_FFI_ThreadPool_Schedule(&helper))) leave(work);
  take_tasks(work);
  wait_for(&work->done, work->tasks);
  leave(work);
}

static long entries_of(const XLA_FFI_Buffer *buffer) {
  long entries = 1;
  for (long d = 0; d < buffer->rank; d++) entries *= buffer->dims[d];
  return entries;
}

// Whether XLA only asks which interface the kernel is written for.
static bool is_asked(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Metadata_Extension *asked = (void *)frame->extension_start;
  if (!asked || asked->extension_base.type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Api_Version *version = &asked->metadata->api_version;
  version->major_version = XLA_FFI_API_MAJOR;
  version->minor_version = XLA_FFI_API_MINOR;
  return true;
}

static XLA_FFI_Error *no_memory(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Error_Create_Args error = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, "no memory for a kernel's tasks",
                                     XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return frame->api->XLA_FFI_Error_Create(&error);
}
