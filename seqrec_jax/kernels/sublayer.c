// One sublayer of a Transformer's block.
//
// Called by encoders/sublayer.py, which says what is computed; arrays are named in sublayer.h.

#include "sublayer.h"

typedef struct {
  Tasks tasks;
  Form form;
  Mask mask, of_weights;
  const float *x, *scale, *bias, *outer, *outer_bias, *kernels[MOST_INNER], *biases[MOST_INNER];
  const bool *visible;                  // [R, cells, cells]
  float *out, *inner, *core, *between;  // [N, D], [N, I], [N, C], [N, D] what the norm reads, if it comes last, or gives
  float *weights, *kept, *columns;      // [R, H, cells, L] twice: attention's, before and after dropout; [R, D / H, L]
} Job;

static void norm(const Job *job, long n, const float *x, float *to) {
  for (long dim = job->form.dim; n--; x += dim, to += dim) {
    float mean = mean_of(dim, x), inverse = inverse_deviation(dim, x, mean, job->form.epsilon);
    for (long d = 0; d < dim; d += LANES)
      store(to + d, (load(x + d) - mean) * (inverse * load(job->scale + d)) + load(job->bias + d));
  }
}

// `to` [n, width] = bias + a b, of rows `step` apart.
static void affine(long n, long width, long depth, const float *a, const float *b, const float *bias, float *to,
                   long step) {
  for (long r = 0; r < n; r++) memcpy(to + r * step, bias, sizeof(float) * width);
  add_product(n, width, depth, a, depth, 1, b, width, to, step);
}

// A softmax over the cells that are seen, and dropout; `row` is that of its array.
static void weigh(const Job *job, long row, const bool *visible, float scale, float *weights, float *kept) {
  long cells = job->form.cells, lanes = job->form.lanes;
  Mask mask = job->of_weights;
  Floats most = (Floats){0} - INFINITY, sum = {0};
  Whole lane;
  EACH(v, LANES) lane[v] = v;
  for (long k = 0; k < lanes; k += LANES) {
    typedef int8_t Seen __attribute__((vector_size(LANES)));
    Seen seen = {0};
    if (k < cells) memcpy(&seen, visible + k, least(cells - k, LANES));
    Floats x = chosen(__builtin_convertvector(seen, Whole) > 0, load(weights + k) * scale, (Floats){0} - 1e30f);
    x = chosen(lane < (int)(cells - k), x, (Floats){0} - INFINITY);
    store(weights + k, x);
    most = chosen(x > most, x, most);
  }
  float top = most[0];
  EACH(v, LANES) top = most[v] > top ? most[v] : top;
  for (long k = 0; k < lanes; k += LANES) {
    Floats e = power_of_2((load(weights + k) - top) * LOG2_E);
    store(weights + k, e);
    sum += e;
  }
  float share = 1 / sum_of(sum);
  for (long k = 0; k < lanes; k += LANES) {
    Floats weight = load(weights + k) * share;
    store(weights + k, weight);
    store(kept + k, dropped(mask, row * cells + k, weight));
  }
}

static void attend(const Job *job, long row, long head, const float *inner, float *core) {
  const Form *form = &job->form;
  long cells = form->cells, lanes = form->lanes, dim = form->dim, width = dim / form->heads;
  const float *query = inner + head * width, *key = query + dim, *value = key + dim;
  long place = (row * form->heads + head) * cells;
  float *weights = job->weights + place * lanes, *kept = job->kept + place * lanes;
  float *columns = job->columns + row * width * lanes;
  turn(cells, width, key, form->inner, columns, lanes);
  memset(weights, 0, sizeof(float) * cells * lanes);
  add_product(cells, lanes, width, query, form->inner, 1, columns, lanes, weights, lanes);
  for (long q = 0; q < cells; q++)
    weigh(job, place + q, job->visible + (row * cells + q) * cells, 1 / sqrtf(width), weights + q * lanes,
          kept + q * lanes);
  add_product(cells, width, cells, kept, lanes, 1, value, form->inner, core + head * width, dim);
}

static void run(Tasks *tasks, long row) {
  const Job *job = (const Job *)tasks;
  const Form *form = &job->form;
  long first = row * form->cells, n = least(form->all - first, form->cells), dim = form->dim, width = form->core;
  const float *x = job->x + first * dim, *source = x;
  float *inner = job->inner + first * form->inner, *core = job->core + first * width;
  float *between = job->between + first * dim, *out = job->out + first * dim;
  if (form->norm != POST) norm(job, n, x, between), source = between;
  for (long m = 0; m < form->parts; m++)
    affine(n, width, dim, m && form->norm == QUERY ? x : source, job->kernels[m], job->biases[m], inner + m * width,
           form->inner);
  if (form->activation == ATTENTION) {
    memset(core, 0, sizeof(float) * n * dim);
    for (long head = 0; head < form->heads; head++) attend(job, row, head, inner, core);
  } else {
    for (long i = 0; i < n * width; i += LANES) {
      Floats z = load(inner + i);
      store(core + i, form->activation == GELU ? z * normal_distribution(z).below : chosen(z < 0, (Floats){0}, z));
    }
  }
  float *sum = form->norm == POST ? between : out;
  const float *residual = form->norm == QUERY ? source : x;
  Mask mask = job->mask;
  affine(n, dim, width, core, job->outer, job->outer_bias, sum, dim);
  for (long i = 0; i < n * dim; i += LANES)
    store(sum + i, load(residual + i) + dropped(mask, first * dim + i, load(sum + i)));
  if (form->norm == POST) norm(job, n, between, out);
}

XLA_FFI_Error *sublayer(XLA_FFI_CallFrame *frame) {
  if (is_asked(frame)) return NULL;
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer **)frame->args.args, **out = (XLA_FFI_Buffer **)frame->rets.rets;
  Job *job = calloc(1, sizeof(Job));
  if (!job) return no_memory(frame);
  job->form = form_of(frame, in[0], out[1]);
  job->x = in[0]->data, job->scale = in[1]->data, job->bias = in[2]->data;
  job->outer = in[3]->data, job->outer_bias = in[4]->data, job->mask = mask_of(in + 5);
  job->out = out[0]->data, job->inner = out[1]->data, job->core = out[2]->data, job->between = out[3]->data;
  in += 8;
  for (long m = 0; m < job->form.parts; m++)
    job->kernels[m] = (*in++)->data, job->biases[m] = (*in++)->data;
  if (job->form.activation == ATTENTION) {
    job->visible = in[0]->data, job->of_weights = mask_of(in + 1);
    job->weights = out[4]->data, job->kept = out[5]->data, job->columns = out[6]->data;
  }
  job->tasks.tasks = job->form.rows, job->tasks.run = run;
  run_all(frame, &job->tasks);
  return NULL;
}
