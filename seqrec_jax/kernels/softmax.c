// The exact softmax and its gradients: three products and the exponentials between them, for a tile of columns and a
// block of rows at a time, which stay in a core's own cache. Exponentials alone are kept, or made again.
//
// Called by losses/softmax.py. Arrays: M rows in blocks of BLOCK, D entries (a multiple of LANES), C columns. Logits are
// in base 2 here.

#include "kernel.h"

enum { TILE = 48 };
static const float LN_2 = 0.693147181f;

typedef struct {
  Tasks tasks;
  const float *hidden, *table, *bias;      // [M, D], [C, D], [C]
  const float *shift, *joins;              // [M] to be taken off a row's logits; the log of what joins their sum
  const int32_t *targets, *ids;            // [M], [C] pairs of equal ones do not count; or NULL
  float *all, *pull, *d_table;             // [M], [M, D], [C, D] what softmax.py says of `attend`
  float *states, *shares, *tops, *sums;    // [B, D, BLOCK], hidden / sums [M, D], [M], [M]
  float *kept;                             // [slots, C, BLOCK] exponentials of as many blocks
  long dim, columns, count, blocks, slots; // slots = 0: exponentials are made again
  long chunk, tiles;                       // blocks that are at work together; of columns
  atomic_long done[];                      // tasks of each chunk: those of its blocks, those of the tiles
} Job;

// logits[r][v] - top of n columns and a part of a block's rows; -inf where ids are equal.
INLINE void logits_of(const Job *job, int n, long column, long block, long part, const float *tops, float *next_written,
                      Floats logits[ROWS][VECTORS]) {
  const float *columns = job->table + column * job->dim;
  EACH(r, ROWS) EACH(v, VECTORS) logits[r][v] = (Floats){0} + job->bias[column + least(r, n - 1)] * LOG2_E;
  multiply(n, VECTORS, job->dim, columns, job->dim, 1, job->states + block * job->dim * BLOCK + part, BLOCK, logits,
           columns + ROWS * job->dim, next_written);
  // Only now, so that the largest logit less itself is 0.
  EACH(r, ROWS) EACH(v, VECTORS) logits[r][v] -= load(tops + part + v * LANES);
  if (job->ids)
    EACH(r, ROWS) EACH(v, VECTORS) {
      Whole targets = *(const Whole *)(job->targets + block * BLOCK + part + v * LANES);
      Whole same = targets == job->ids[column + least(r, n - 1)];
      logits[r][v] = chosen(same, (Floats){0} - INFINITY, logits[r][v]);
    }
}

INLINE void exponentials_of(const Job *job, int n, long column, long block, long part, float *to, float *sums) {
  Floats logits[ROWS][VECTORS];
  logits_of(job, n, column, block, part, job->tops + block * BLOCK, to + ROWS * BLOCK, logits);
  EACH(v, VECTORS) {
    Floats sum = load(sums + part + v * LANES);
    EACH(r, ROWS) if (r < n) {
      Floats e = power_of_2(logits[r][v]);
      store(to + r * BLOCK + part + v * LANES, e);
      sum += e;
    }
    store(sums + part + v * LANES, sum);
  }
}

// to [n, BLOCK] = exp(logits - top) of n columns and a block's rows; their sums over the columns join `sums` [BLOCK].
static void exponentials(const Job *job, long column, long n, long block, float *to, float *sums) {
  for (long part = 0; part < BLOCK; part += PART)
    for (long r = 0; r < n; r += ROWS)
      exponentials_of(job, least(n - r, ROWS), column + r, block, part, to + r * BLOCK, sums);
}

// Where no shift was known (infinity), the largest logit of the row.
static void seek_tops(const Job *job, long block, float *tops) {
  float zeros[BLOCK] = {0};
  for (long part = 0; part < BLOCK; part += PART) {
    Floats most[VECTORS], logits[ROWS][VECTORS];
    EACH(v, VECTORS) most[v] = load(job->joins + block * BLOCK + part + v * LANES) * LOG2_E;
    for (long column = 0; column < job->columns; column += ROWS) {
      logits_of(job, least(job->columns - column, ROWS), column, block, part, zeros, zeros, logits);
      EACH(r, ROWS) EACH(v, VECTORS) most[v] = chosen(most[v] > logits[r][v], most[v], logits[r][v]);
    }
    EACH(v, VECTORS) {
      Floats known = load(tops + part + v * LANES);
      store(tops + part + v * LANES, chosen(known == INFINITY, most[v], known));
    }
  }
}

// The rows of a block against all columns.
static void add_up_columns(const Job *job, long block, float *kept) {
  long dim = job->dim, first = block * BLOCK;
  const float *hidden = job->hidden + first * dim;
  float *states = job->states + first * dim, *shares = job->shares + first * dim, *pull = job->pull + first * dim;
  float *tops = job->tops + first, *sums = job->sums + first, tile[TILE * BLOCK];
  bool seek = false;
  for (long m = 0; m < BLOCK; m++) {
    tops[m] = job->shift[first + m] * LOG2_E;
    seek |= tops[m] == INFINITY;
    for (long d = 0; d < dim; d++) states[d * BLOCK + m] = hidden[m * dim + d] * LOG2_E;
  }
  if (seek) seek_tops(job, block, tops);
  for (long m = 0; m < BLOCK; m += LANES)
    store(sums + m, power_of_2(load(job->joins + first + m) * LOG2_E - load(tops + m)));
  memset(pull, 0, sizeof(float) * BLOCK * dim);
  for (long column = 0; column < job->columns; column += TILE) {
    long n = least(job->columns - column, TILE);
    float *e = kept ? kept + column * BLOCK : tile;
    exponentials(job, column, n, block, e, sums);
    add_product(BLOCK, dim, n, e, 1, BLOCK, job->table + column * dim, dim, pull, dim);
  }
  for (long m = 0; m < BLOCK; m++) {
    float share = 1 / sums[m], counts = first + m < job->count ? share : 0;
    job->all[first + m] = tops[m] * LN_2 + logf(sums[m]);
    for (long d = 0; d < dim; d++) pull[m * dim + d] *= share;
    for (long d = 0; d < dim; d++) shares[m * dim + d] = counts * hidden[m * dim + d];
  }
}

// A tile of columns against the rows of the blocks first .. last - 1.
static void add_up_rows(const Job *job, long first, long last, long column) {
  long dim = job->dim, n = least(job->columns - column, TILE);
  float *d_table = job->d_table + column * dim, tile[TILE * BLOCK], sums[BLOCK] = {0};
  if (first == 0) memset(d_table, 0, sizeof(float) * n * dim);
  for (long block = first; block < last; block++) {
    const float *e = job->kept + ((block - first) * job->columns + column) * BLOCK;
    if (job->slots == 0) {
      exponentials(job, column, n, block, tile, sums);
      e = tile;
    }
    add_product(n, dim, BLOCK, e, BLOCK, 1, job->shares + block * BLOCK * dim, dim, d_table, dim);
  }
}

// Of a chunk of blocks first the blocks, then the tiles of columns. Who waits, waits for tasks that are at work; so a
// single thread gets through, too.
static void run(Tasks *tasks, long task) {
  Job *job = (Job *)tasks;
  long number = task / (job->chunk + job->tiles), place = task % (job->chunk + job->tiles);
  long first = number * job->chunk, last = least(first + job->chunk, job->blocks);
  atomic_long *blocks_done = job->done + 2 * number, *tiles_done = blocks_done + 1;
  if (place < job->chunk) {
    if (number) wait_for(tiles_done - 2, job->tiles);  // which need what was kept of the chunk before
    float *kept = job->slots ? job->kept + place * job->columns * BLOCK : NULL;
    if (first + place < last) add_up_columns(job, first + place, kept);
    atomic_fetch_add(blocks_done, 1);
  } else {
    wait_for(blocks_done, job->chunk);
    add_up_rows(job, first, last, (place - job->chunk) * TILE);
    atomic_fetch_add(tiles_done, 1);
  }
}

XLA_FFI_Error *softmax(XLA_FFI_CallFrame *frame) {
  if (is_asked(frame)) return NULL;
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer **)frame->args.args, **out = (XLA_FFI_Buffer **)frame->rets.rets;
  long rows = in[0]->dims[0], count = *(int32_t *)in[5]->data, blocks = (count + BLOCK - 1) / BLOCK;
  long slots = out[7]->dims[0], chunk = slots ? slots : blocks + !blocks, chunks = (blocks + chunk - 1) / chunk;
  chunks += !chunks;  // without a row the gradient is 0
  Job *job = calloc(1, sizeof(Job) + 2 * chunks * sizeof(atomic_long));
  if (!job) return no_memory(frame);
  job->dim = in[0]->dims[1], job->columns = in[1]->dims[0], job->count = count, job->blocks = blocks;
  job->slots = slots, job->chunk = chunk, job->tiles = (job->columns + TILE - 1) / TILE;
  job->hidden = in[0]->data, job->table = in[1]->data, job->bias = in[2]->data;
  job->shift = in[3]->data, job->joins = in[4]->data;
  if (frame->args.size > 6) job->targets = in[6]->data, job->ids = in[7]->data;
  job->all = out[0]->data, job->pull = out[1]->data, job->d_table = out[2]->data;
  job->states = out[3]->data, job->shares = out[4]->data, job->tops = out[5]->data, job->sums = out[6]->data;
  job->kept = out[7]->data;
  long rest = rows - blocks * BLOCK;  // no row of these blocks is real: zeros, not what was in memory
  memset(job->all + rows - rest, 0, sizeof(float) * rest);
  memset(job->pull + (rows - rest) * job->dim, 0, sizeof(float) * rest * job->dim);
  job->tasks.tasks = chunks * (chunk + job->tiles), job->tasks.run = run;
  run_all(frame, &job->tasks);
  return NULL;
}
