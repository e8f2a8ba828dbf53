// What a sublayer and its gradient share: what it consists of, its norm and its dropout.
//
// x → (norm) → inner products → core → outer product → dropout → + residual → (norm), for the cells of one row at a
// time, which stay in a core's own cache. The core is attention among these cells, or an activation.
//
// Arrays: N cells in R rows of `cells`, D entries, I of all inner products, C of the core (D in attention, else I), H
// heads; L is `cells` filled up to a multiple of 16, and all widths are such multiples.

#include "kernel.h"

enum { POST, PRE, QUERY };       // where the norm is; query: of the residual and of what queries are made from
enum { ATTENTION, GELU, RELU };  // cores
enum { MOST_INNER = 3 };         // queries, keys, values

typedef struct {
  long cells, rows, all, dim, inner, core, lanes, heads;  // all: N
  long parts;                                             // inner products, I / parts wide
  int norm, activation;
  float epsilon;
} Form;

typedef struct {
  float threshold, scale;  // of a hash's upper bits, of what is kept
  uint32_t first, last;    // words of the key
} Mask;

static const void *attribute(XLA_FFI_CallFrame *frame, int place) {
  return ((const XLA_FFI_Scalar *)frame->attrs.attrs[place])->value;
}

// Attributes come in the order of their names.
static Form form_of(XLA_FFI_CallFrame *frame, const XLA_FFI_Buffer *x, const XLA_FFI_Buffer *inner) {
  Form form = {.all = x->dims[0], .dim = x->dims[1], .inner = inner->dims[1]};
  form.activation = *(const int32_t *)attribute(frame, 0);
  form.cells = *(const int32_t *)attribute(frame, 1);
  form.epsilon = *(const float *)attribute(frame, 2);
  form.heads = *(const int32_t *)attribute(frame, 3);
  form.norm = *(const int32_t *)attribute(frame, 4);
  form.rows = (form.all + form.cells - 1) / form.cells;
  form.lanes = (form.cells + 15) / 16 * 16;
  form.parts = form.activation == ATTENTION ? 3 : 1;
  form.core = form.inner / form.parts;
  return form;
}

static Mask mask_of(XLA_FFI_Buffer **numbers) {
  float rate = *(float *)numbers[0]->data;
  return (Mask){rate * 0x1p24f, 1 / (1 - rate), *(uint32_t *)numbers[1]->data, *(uint32_t *)numbers[2]->data};
}

INLINE Bits mixed(Bits x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

// What dropout leaves of x, the entries from `place` on of its array; the rest times 1 / (1 - rate). As in sublayer.py.
INLINE Floats dropped(Mask mask, long place, Floats x) {
  if (mask.threshold <= 0) return x;
  Bits count;
  EACH(v, LANES) count[v] = v;
  Bits bits = mixed(mixed(count + ((uint32_t)place + mask.first)) ^ mask.last) >> 8;
  Whole kept = __builtin_convertvector((Whole)bits, Floats) >= mask.threshold;
  return (Floats)((Whole)(x * mask.scale) & kept);
}

// `to` [width, lanes] = `from` [rows, width] turned, of rows `step` apart, and zeros behind.
static void turn(long rows, long width, const float *from, long step, float *to, long lanes) {
  for (long r = 0; r < lanes; r += LANES)
    for (long w = 0; w < width; w++)
      for (long v = r; v < r + LANES; v++) to[w * lanes + v] = v < rows ? from[v * step + w] : 0;
}

INLINE float sum_of(Floats x) {
  float sum = 0;
  EACH(v, LANES) sum += x[v];
  return sum;
}

INLINE float mean_of(long dim, const float *x) {
  Floats sum = {0};
  for (long d = 0; d < dim; d += LANES) sum += load(x + d);
  return sum_of(sum) / dim;
}

INLINE float inverse_deviation(long dim, const float *x, float mean, float epsilon) {
  Floats sum = {0};
  for (long d = 0; d < dim; d += LANES) sum += (load(x + d) - mean) * (load(x + d) - mean);
  return 1 / sqrtf(sum_of(sum) / dim + epsilon);
}

typedef struct {
  Floats below, density;
} Normal;

// The normal distribution function, within 2e-7 (Abramowitz and Stegun, 7.1.26), and its density.
INLINE Normal normal_distribution(Floats z) {
  Floats size = (Floats)((Whole)z & 0x7FFFFFFF), t = 1 / (1 + 0.3275911f * 0.707106781f * size);
  Floats e = power_of_2(z * z * (-0.5f * LOG2_E));
  Floats p = 1.061405429f * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Floats tail = 0.5f * p * t * e;
  return (Normal){chosen(z < 0, tail, 1 - tail), 0.398942280f * e};
}
