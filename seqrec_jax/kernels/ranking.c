// How many items score above each user's target, and how many the same, for a block of users against a few items at a
// time: scores stay in registers.
//
// Called by ranking.py. Arrays: U users in blocks of BLOCK, D entries, V items, histories in items_A[begin : end].
// A score is the sum of products in the order of the entries, wherever it is made, so equal items tie exactly.

#include "kernel.h"

enum { AT_ONCE = 8 };  // items of a history, whose sums do not wait for each other

typedef struct {
  Tasks tasks;
  const float *users, *items;            // [U, D], [V, D]
  const int32_t *targets;                // [U]
  const int32_t *items_A, *begin, *end;  // of histories; items_A may be NULL: nothing is hidden
  const bool *first_A;                   // where an item is met for the first time
  int32_t *greater, *tied, *missed;      // [parts, U] twice, [U]
  float *states;                         // [U / BLOCK, D, BLOCK]
  long blocks, dim, num_items, parts;    // items 1 .. num_items are looked at, in so many parts
} Job;

// scores[r] of items ids[r] for one user, of n.
static void scores_of(const Job *job, long user, int n, const int32_t *ids, float *scores) {
  const float *rows[AT_ONCE], *state = job->users + user * job->dim;
  float sums[AT_ONCE] = {0};
  EACH(r, AT_ONCE) rows[r] = job->items + ids[least(r, n - 1)] * job->dim;
  for (long k = 0; k < job->dim; k++)
    EACH(r, AT_ONCE) sums[r] += rows[r][k] * state[k];
  memcpy(scores, sums, sizeof(sums));
}

// Takes the history's items off the counts; the target is missed if it is one of them.
static void hide(const Job *job, long user, float target_score) {
  const int32_t target = job->targets[user];
  int32_t ids[AT_ONCE];
  float scores[AT_ONCE];
  int n = 0;
  for (long place = job->begin[user]; place <= job->end[user]; place++) {
    bool last = place == job->end[user];
    if (!last && job->items_A[place] == target) job->missed[user] = 1;
    if (!last && job->first_A[place] && job->items_A[place] != target) ids[n++] = job->items_A[place];
    if (n < AT_ONCE && !(last && n)) continue;
    scores_of(job, user, n, ids, scores);
    for (int r = 0; r < n; r++) {
      job->greater[user] -= !(scores[r] <= target_score);
      job->tied[user] -= scores[r] == target_score;
    }
    n = 0;
  }
}

// A block of users against the items begin .. end - 1: counts [BLOCK] of those above `targets` [BLOCK] and those that tie.
static void count(const Job *job, long block, long begin, long end, const float *targets, int32_t *greater,
                  int32_t *tied) {
  for (long part = 0; part < BLOCK; part += PART) {
    const float *states = job->states + block * job->dim * BLOCK + part;
    Whole above[VECTORS] = {0}, same[VECTORS] = {0};
    for (long item = begin; item < end; item += ROWS) {
      Floats sums[ROWS][VECTORS] = {0};
      const float *rows = job->items + item * job->dim;
      int n = least(end - item, ROWS);
      multiply(n, VECTORS, job->dim, rows, job->dim, 1, states, BLOCK, sums, rows + ROWS * job->dim, (float *)greater);
      EACH(r, ROWS) EACH(v, VECTORS) if (r < n) {
        Floats target = load(targets + part + v * LANES);
        above[v] -= ~(sums[r][v] <= target);
        same[v] -= sums[r][v] == target;
      }
    }
    memcpy(greater + part, above, sizeof(above));
    memcpy(tied + part, same, sizeof(same));
  }
}

static void run(Tasks *tasks, long task) {
  const Job *job = (const Job *)tasks;
  long block = task / job->parts, part = task % job->parts, first = block * BLOCK, users = job->blocks * BLOCK;
  long each = (job->num_items + job->parts - 1) / job->parts, begin = 1 + part * each;
  float targets[BLOCK], scores[AT_ONCE];
  for (long m = 0; m < BLOCK; m++) {
    scores_of(job, first + m, 1, job->targets + first + m, scores);
    targets[m] = scores[0];
  }
  int32_t *greater = job->greater + part * users + first, *tied = job->tied + part * users + first;
  count(job, block, begin, least(begin + each, job->num_items + 1), targets, greater, tied);
  if (part == 0)
    for (long m = 0; m < BLOCK; m++) {
      job->missed[first + m] = 0;
      if (job->items_A) hide(job, first + m, targets[m]);
    }
}

XLA_FFI_Error *ranking(XLA_FFI_CallFrame *frame) {
  if (is_asked(frame)) return NULL;
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer **)frame->args.args, **out = (XLA_FFI_Buffer **)frame->rets.rets;
  Job *job = calloc(1, sizeof(Job));
  if (!job) return no_memory(frame);
  job->users = in[0]->data, job->blocks = in[0]->dims[0] / BLOCK, job->dim = in[0]->dims[1];
  job->items = in[1]->data, job->targets = in[2]->data, job->num_items = *(int32_t *)in[3]->data;
  if (frame->args.size > 4)
    job->items_A = in[4]->data, job->begin = in[5]->data, job->end = in[6]->data, job->first_A = in[7]->data;
  job->greater = out[0]->data, job->tied = out[1]->data, job->missed = out[2]->data, job->states = out[3]->data;
  job->parts = out[0]->dims[0];
  for (long user = 0; user < in[0]->dims[0]; user++)
    for (long d = 0; d < job->dim; d++)
      job->states[(user / BLOCK * job->dim + d) * BLOCK + user % BLOCK] = job->users[user * job->dim + d];
  job->tasks.tasks = job->blocks * job->parts, job->tasks.run = run;
  run_all(frame, &job->tasks);
  return NULL;
}
