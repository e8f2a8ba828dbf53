// Adam (Kingma and Ba, ICLR 2015) for all arrays of a model in one pass: parameters and both moments.
//
// Called by optimizer.py, which says what the numbers are.

#include "kernel.h"

enum { SHARE = 1 << 14, NUMBERS = 4 };  // entries of a task; what stands before the arrays
static const float EPSILON = 1e-8f;

typedef struct {
  Tasks tasks;
  XLA_FFI_Buffer **old, **new, **gradients;  // parameters, first and second moments of `arrays` arrays each
  long arrays;
  float rate, beta1, beta2, bias1, bias2;  // biases of the moments, which begin as zeros: 1 - beta^steps
  atomic_bool *finite;
} Job;

static long shares_of(const XLA_FFI_Buffer *buffer) { return (entries_of(buffer) + SHARE - 1) / SHARE; }

static void run(Tasks *tasks, long task) {
  const Job *job = (const Job *)tasks;
  long array = 0;
  for (long shares; task >= (shares = shares_of(job->gradients[array])); array++) task -= shares;
  const float *from[3], *gradient = job->gradients[array]->data;
  float *to[3], nothing = 0, rate = job->rate, beta1 = job->beta1, beta2 = job->beta2;
  for (int k = 0; k < 3; k++) {
    from[k] = job->old[k * job->arrays + array]->data;
    to[k] = job->new[k * job->arrays + array]->data;
  }
  long end = least(entries_of(job->gradients[array]), (task + 1) * SHARE);
  for (long i = task * SHARE; i < end; i++) {
    float g = gradient[i];
    float first = to[1][i] = beta1 * from[1][i] + (1 - beta1) * g;
    float second = to[2][i] = beta2 * from[2][i] + (1 - beta2) * (g * g);
    to[0][i] = from[0][i] - rate * (first / job->bias1 / (sqrtf(second / job->bias2) + EPSILON));
    nothing += g - g;  // it is, if all are finite
  }
  if (nothing != 0) atomic_store(job->finite, false);
}

XLA_FFI_Error *adam(XLA_FFI_CallFrame *frame) {
  if (is_asked(frame)) return NULL;
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer **)frame->args.args, **out = (XLA_FFI_Buffer **)frame->rets.rets;
  Job *job = calloc(1, sizeof(Job));
  if (!job) return no_memory(frame);
  job->rate = *(float *)in[0]->data, job->beta1 = *(float *)in[1]->data, job->beta2 = *(float *)in[2]->data;
  float steps = *(int32_t *)in[3]->data;
  job->bias1 = 1 - powf(job->beta1, steps), job->bias2 = 1 - powf(job->beta2, steps);
  job->arrays = (frame->args.size - NUMBERS) / 4;
  job->old = in + NUMBERS, job->gradients = job->old + 3 * job->arrays, job->new = out;
  job->finite = out[3 * job->arrays]->data;
  atomic_store(job->finite, true);
  for (long array = 0; array < job->arrays; array++) job->tasks.tasks += shares_of(job->gradients[array]);
  job->tasks.run = run;
  run_all(frame, &job->tasks);
  return NULL;
}
