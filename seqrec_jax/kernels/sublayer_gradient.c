// The gradient of a sublayer: first that of its cells, a row at a time, then those of its parameters, a piece at a time.
// All sums have one order, by any number of threads.
//
// Called by encoders/sublayer.py; arrays are named in sublayer.h.

#include "sublayer.h"

typedef struct {
  Tasks tasks;
  Form form;
  Mask mask;
  const float *x, *scale, *outer, *kernels[MOST_INNER];
  const float *out, *inner, *core, *between, *weights, *kept;  // the gradient of the result; what sublayer.c left
  const bool *visible;
  float *d_x, *d_scale, *d_bias, *d_outer, *d_outer_bias, *d_kernels[MOST_INNER], *d_biases[MOST_INNER];
  float *d_product, *d_inner, *d_core, *d_source;  // [N, D] of the outer product, [N, I], [N, C], [N, D]
  float *sums;                                     // [R, 3 D + I] of each row, of all gradients of vectors
  float *outer_T, *kernels_T;                      // [D, C], [I, D]
  float *scores;                                   // [R, cells + D / H, L]
  atomic_long rows_done;
} Job;

// `to` [n, D] += the gradient of what was normed, x; scale's and bias' gradients become sums [2, D].
static void norm_gradient(const Job *job, long n, const float *x, const float *from, float *to, float *sums) {
  long dim = job->form.dim;
  memset(sums, 0, sizeof(float) * 2 * dim);
  for (; n--; x += dim, from += dim, to += dim) {
    float mean = mean_of(dim, x), inverse = inverse_deviation(dim, x, mean, job->form.epsilon);
    Floats sum = {0}, product = {0};
    for (long d = 0; d < dim; d += LANES) {
      Floats z = (load(x + d) - mean) * inverse, g = load(from + d);
      store(sums + d, load(sums + d) + g * z);
      store(sums + dim + d, load(sums + dim + d) + g);
      g *= load(job->scale + d);
      sum += g, product += g * z;
    }
    float mean_g = sum_of(sum) / dim, mean_gz = sum_of(product) / dim;
    for (long d = 0; d < dim; d += LANES) {
      Floats z = (load(x + d) - mean) * inverse, g = load(from + d) * load(job->scale + d);
      store(to + d, load(to + d) + (g - mean_g - z * mean_gz) * inverse);
    }
  }
}

static void add_rows(long n, long width, const float *x, float *sums) {
  memset(sums, 0, sizeof(float) * width);
  for (; n--; x += width)
    for (long d = 0; d < width; d += LANES) store(sums + d, load(sums + d) + load(x + d));
}

static void attention_gradient(const Job *job, long row, long head, const float *inner, const float *d_core,
                               float *d_inner) {
  const Form *form = &job->form;
  long cells = form->cells, lanes = form->lanes, dim = form->dim, step = form->inner, width = dim / form->heads;
  const float *query = inner + head * width, *key = query + dim, *value = key + dim, *d = d_core + head * width;
  long place = (row * form->heads + head) * cells * lanes;
  const float *weights = job->weights + place, *kept = job->kept + place;
  float *scores = job->scores + row * (cells + width) * lanes, *columns = scores + cells * lanes;
  turn(cells, width, value, step, columns, lanes);
  memset(scores, 0, sizeof(float) * cells * lanes);
  add_product(cells, lanes, width, d, dim, 1, columns, lanes, scores, lanes);
  for (long q = 0; q < cells; q++) {
    const float *weight = weights + q * lanes, *part = kept + q * lanes;
    float *score = scores + q * lanes;
    Floats sum = {0};
    for (long k = 0; k < lanes; k += LANES) sum += load(part + k) * load(score + k);
    // Scores of who sees nothing are constants.
    bool sees = memchr(job->visible + (row * cells + q) * cells, true, cells);
    float mean = sum_of(sum), scale = sees ? 1 / sqrtf(width) : 0;
    for (long k = 0; k < lanes; k += LANES)
      store(score + k, (load(part + k) * load(score + k) - load(weight + k) * mean) * scale);
  }
  float *to = d_inner + head * width;
  add_product(cells, width, cells, scores, lanes, 1, key, step, to, step);
  add_product(cells, width, cells, scores, 1, lanes, query, step, to + dim, step);
  add_product(cells, width, cells, kept, 1, lanes, d, dim, to + 2 * dim, step);
}

static void run_row(const Job *job, long row) {
  const Form *form = &job->form;
  long first = row * form->cells, n = least(form->all - first, form->cells), dim = form->dim, width = form->core;
  const float *x = job->x + first * dim, *between = job->between + first * dim, *out = job->out + first * dim;
  const float *inner = job->inner + first * form->inner;
  float *d_product = job->d_product + first * dim, *d_inner = job->d_inner + first * form->inner;
  float *d_core = job->d_core + first * width, *d_source = job->d_source + first * dim, *d_x = job->d_x + first * dim;
  float *sums = job->sums + row * (3 * dim + form->inner);

  // d_x is what goes to x unnormed, d_source what goes to it by the norm, if that comes first.
  memset(d_x, 0, sizeof(float) * n * dim);
  memset(d_source, 0, sizeof(float) * n * dim);
  float *residual = form->norm == QUERY ? d_source : d_x;
  Mask mask = job->mask;
  if (form->norm == POST)
    norm_gradient(job, n, between, out, residual, sums);
  else
    memcpy(residual, out, sizeof(float) * n * dim);
  for (long i = 0; i < n * dim; i += LANES)
    store(d_product + i, dropped(mask, first * dim + i, load(residual + i)));
  add_rows(n, dim, d_product, sums + 2 * dim);
  memset(d_core, 0, sizeof(float) * n * width);
  add_product(n, width, dim, d_product, dim, 1, job->outer_T, width, d_core, width);
  if (form->activation == ATTENTION) {
    memset(d_inner, 0, sizeof(float) * n * form->inner);
    for (long head = 0; head < form->heads; head++) attention_gradient(job, row, head, inner, d_core, d_inner);
  } else {
    for (long i = 0; i < n * width; i += LANES) {
      Floats z = load(inner + i), slope = chosen(z <= 0, (Floats){0}, (Floats){0} + 1);
      if (form->activation == GELU) {
        Normal normal = normal_distribution(z);
        slope = normal.below + z * normal.density;
      }
      store(d_inner + i, load(d_core + i) * slope);
    }
  }
  add_rows(n, form->inner, d_inner, sums + 3 * dim);
  for (long m = 0; m < form->parts; m++) {
    float *to = form->norm == POST || (m && form->norm == QUERY) ? d_x : d_source;
    add_product(n, dim, width, d_inner + m * width, form->inner, 1, job->kernels_T + m * width * dim, dim, to, dim);
  }
  if (form->norm != POST) norm_gradient(job, n, x, d_source, d_x, sums);
}

// Rows and columns of a matrix' gradient, from `row` and `column` on: the sum over all cells of a's times b's.
static void matrix_gradient(const Job *job, const float *a, long a_step, long row, const float *b, long b_step,
                            long column, long rows, long width, float *to) {
  long n = least(rows - row, BLOCK), wide = least(width - column, BLOCK);
  for (long r = 0; r < n; r++) memset(to + (row + r) * width + column, 0, sizeof(float) * wide);
  for (long first = 0; first < job->form.all; first += BLOCK)
    add_product(n, wide, least(job->form.all - first, BLOCK), a + first * a_step + row, 1, a_step,
                b + first * b_step + column, b_step, to + row * width + column, width);
}

static long pieces_of(long rows, long width) { return (rows + BLOCK - 1) / BLOCK * ((width + BLOCK - 1) / BLOCK); }

static void run_piece(const Job *job, long piece) {
  const Form *form = &job->form;
  long dim = form->dim, width = form->core, pieces = pieces_of(width, dim), across = (dim + BLOCK - 1) / BLOCK;
  if (piece < pieces) {
    matrix_gradient(job, job->core, width, piece / across * BLOCK, job->d_product, dim, piece % across * BLOCK, width,
                    dim, job->d_outer);
    return;
  }
  piece -= pieces, across = (width + BLOCK - 1) / BLOCK;
  long m = piece / pieces;
  piece %= pieces;
  if (m < form->parts) {
    const float *source = form->norm == POST || (m && form->norm == QUERY) ? job->x : job->between;
    matrix_gradient(job, source, dim, piece / across * BLOCK, job->d_inner + m * width, form->inner,
                    piece % across * BLOCK, dim, width, job->d_kernels[m]);
    return;
  }
  float *vectors[3 + MOST_INNER] = {job->d_scale, job->d_bias, job->d_outer_bias};
  memcpy(vectors + 3, job->d_biases, sizeof(job->d_biases));
  const float *sums = job->sums;
  for (long v = 0; v < 3 + form->parts; v++) {
    long length = v < 3 ? dim : width;
    memset(vectors[v], 0, sizeof(float) * length);
    for (long row = 0; row < form->rows; row++)
      for (long d = 0; d < length; d += LANES)
        store(vectors[v] + d, load(vectors[v] + d) + load(sums + row * (3 * dim + form->inner) + d));
    sums += length;
  }
}

static void run(Tasks *tasks, long task) {
  Job *job = (Job *)tasks;
  if (task < job->form.rows) {
    run_row(job, task);
    atomic_fetch_add(&job->rows_done, 1);
  } else {
    wait_for(&job->rows_done, job->form.rows);
    run_piece(job, task - job->form.rows);
  }
}

XLA_FFI_Error *sublayer_gradient(XLA_FFI_CallFrame *frame) {
  if (is_asked(frame)) return NULL;
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer **)frame->args.args, **out = (XLA_FFI_Buffer **)frame->rets.rets;
  Job *job = calloc(1, sizeof(Job));
  if (!job) return no_memory(frame);
  const Form *form = &job->form;
  job->form = form_of(frame, in[0], in[8]);
  job->out = in[0]->data, job->x = in[1]->data, job->scale = in[2]->data, job->outer = in[3]->data;
  job->mask = mask_of(in + 4), job->between = in[7]->data, job->inner = in[8]->data, job->core = in[9]->data;
  in += 10;
  for (long m = 0; m < form->parts; m++) job->kernels[m] = (*in++)->data;
  if (form->activation == ATTENTION) job->visible = in[0]->data, job->weights = in[1]->data, job->kept = in[2]->data;
  job->d_x = out[0]->data, job->d_scale = out[1]->data, job->d_bias = out[2]->data;
  job->d_outer = out[3]->data, job->d_outer_bias = out[4]->data;
  out += 5;
  for (long m = 0; m < form->parts; m++) job->d_kernels[m] = (*out++)->data, job->d_biases[m] = (*out++)->data;
  job->d_product = out[0]->data, job->d_inner = out[1]->data, job->d_core = out[2]->data;
  job->d_source = out[3]->data, job->sums = out[4]->data, job->outer_T = out[5]->data, job->kernels_T = out[6]->data;
  if (form->activation == ATTENTION) job->scores = out[7]->data;
  turn(form->core, form->dim, job->outer, form->dim, job->outer_T, form->core);
  for (long m = 0; m < form->parts; m++)
    turn(form->dim, form->core, job->kernels[m], form->core, job->kernels_T + m * form->core * form->dim, form->dim);
  job->tasks.tasks = form->rows + (1 + form->parts) * pieces_of(form->core, form->dim) + 1, job->tasks.run = run;
  run_all(frame, &job->tasks);
  return NULL;
}
