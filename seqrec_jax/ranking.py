"""Exact ranks over the whole catalogue in blocks of items, and the metrics that follow from them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from seqrec_jax import native

CUTOFFS = (1, 5, 10, 20)


@struct.dataclass
class Hidden:
    """Items each user must not be recommended: items_A[begin : end], those with first_A counting once."""

    items_A: jax.Array
    first_A: jax.Array  # True where the item occurs for the first time in its user's history
    begin_U: jax.Array
    end_U: jax.Array


def count_better(
    states_UxD: jax.Array,
    items_VxD: jax.Array,
    targets_U: jax.Array,
    num_items: int,
    hidden: Hidden | None,
    block: int,
    *,
    alone: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(greater_U, tied_U, missed_U): candidates that score above the target, that tie with it, and whether the target
    is itself hidden. Candidates are items 1..num_items without the target and the hidden ones.

    Items come in blocks of `block`, so the largest array is [U, block]; the target's score and those of the hidden
    items are read from the same products as the others, so ties are exact. NaN counts as above: it never helps.
    `alone`: on one device; if that is a CPU, kernels/ranking.c counts without an array of scores.
    """
    if alone and jax.default_backend() == "cpu" and (kernel := native.kernel("ranking")):
        return _on_cpu(kernel, states_UxD, items_VxD, targets_U, num_items, hidden)
    rows = items_VxD.shape[0]
    block = min(block, rows, MOST_ITEMS)
    blocks = -(-rows // block)
    users = jnp.arange(states_UxD.shape[0])

    def scores_of(index):
        """Block `index`: (its first row, scores [U, block], which columns are candidates of this block)."""
        begin = jnp.minimum(index * block, rows - block)  # the last block overlaps the one before
        part = jax.lax.dynamic_slice_in_dim(items_VxD, begin, block)
        ids = begin + jnp.arange(block)
        own = (ids >= index * block) & (ids >= 1) & (ids <= num_items)
        scores = jnp.matmul(states_UxD, part.T, precision=jax.lax.Precision.HIGHEST)
        return begin, scores, own

    def scores_at(begin, scores, own, item_UxH):
        """(the scores of given items, which of them are candidates of this block)."""
        column = item_UxH - begin
        inside = (column >= 0) & (column < block)
        column = jnp.clip(column, 0, block - 1)
        return scores[users[:, None], column], inside & own[column]

    def compare(scores, real):
        """[2, U]: how many scores are above the target's, and how many equal it."""
        above = jnp.where(scores <= score_U[:, None], 0.0, 1.0)
        both = jnp.where(real, jnp.where(scores == score_U[:, None], float(MOST_COUNTED), above), 0)
        # One pass for two counts; floats, because XLA's CPU backend sums integers several times slower. Parts are a
        # power of two: they divide whole item tables, and nothing is padded.
        parts = 1 << (-(-both.shape[1] // (MOST_COUNTED - 1)) - 1).bit_length()
        both = jnp.pad(both, ((0, 0), (0, -both.shape[1] % parts))).reshape(len(both), parts, -1)
        both_UxP = both.sum(axis=2).astype(jnp.int32)
        return jnp.stack([both_UxP % MOST_COUNTED, both_UxP // MOST_COUNTED]).sum(axis=2)

    def count(index, sums):
        begin, scores, own = scores_of(index)
        found = compare(scores, own)
        if hidden is not None:

            def without_hidden(piece, found):
                item, real = _hidden_piece(hidden, piece)
                theirs, inside = scores_at(begin, scores, own, item)
                return found - compare(theirs, inside & real & (item != targets_U[:, None]))

            found = jax.lax.fori_loop(0, _pieces(hidden), without_hidden, found)
        return sums + found

    def target_score(index, score_U):
        found, inside = scores_at(*scores_of(index), targets_U[:, None])
        return jnp.where(inside[:, 0], found[:, 0], score_U)

    zeros = jnp.zeros(states_UxD.shape[0], jnp.int32)
    if blocks == 1:  # one product serves both
        score_U = target_score(0, jnp.zeros(zeros.shape))
        greater_U, tied_U = count(0, 0)
    else:
        score_U = jax.lax.fori_loop(0, blocks, target_score, jnp.zeros(zeros.shape))
        greater_U, tied_U = jax.lax.fori_loop(0, blocks, count, jnp.stack([zeros, zeros]))
    tied_U = jnp.maximum(tied_U - 1, 0)  # the target ties with itself
    return greater_U, tied_U, zeros > 0 if hidden is None else _is_hidden(targets_U, hidden)


def _on_cpu(kernel, states_UxD, items_VxD, targets_U, num_items, hidden):
    """Whole blocks of users, each against P parts of the items, enough for all threads to help."""
    users, dim = states_UxD.shape
    fill = -users % USERS
    parts = min(-(-4 * native.cores() * USERS // (users + fill)), -(-num_items // PART_ITEMS))
    filled = lambda x: jnp.pad(x, ((0, fill), (0, 0))[: x.ndim])  # noqa: E731
    counts, missed, scratch = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((parts, users + fill), jnp.int32),
            ((users + fill,), jnp.int32),
            ((users + fill, dim), jnp.float32),
        )
    )
    floats, whole = (filled(states_UxD), items_VxD), [filled(targets_U), jnp.int32(num_items)]
    if hidden is not None:
        whole += [hidden.items_A, filled(hidden.begin_U), filled(hidden.end_U)]
    call = jax.ffi.ffi_call(kernel, [counts, counts, missed, scratch], vmap_method="sequential")
    greater_PxU, tied_PxU, missed_U, _ = call(
        *(x.astype(jnp.float32) for x in floats),
        *(x.astype(jnp.int32) for x in whole),
        *(() if hidden is None else (hidden.first_A,)),
    )
    greater_U, tied_U = greater_PxU.sum(axis=0)[:users], tied_PxU.sum(axis=0)[:users]
    return greater_U, jnp.maximum(tied_U - 1, 0), missed_U[:users] > 0  # the target ties with itself


USERS = 64  # of a block of kernels/ranking.c
PART_ITEMS = 1024  # of a block's items, at least, for another thread
MOST_ITEMS = 2**15  # of a block: their embeddings are copied
MOST_COUNTED = 2**12  # more than the scores of a part, so that float32 adds up two counts of them exactly

PIECE = 64  # history items looked at at once


def _pieces(hidden: Hidden) -> jax.Array:
    return -(-jnp.max(hidden.end_U - hidden.begin_U) // PIECE)


def _hidden_piece(hidden: Hidden, piece: jax.Array) -> tuple[jax.Array, jax.Array]:
    """PIECE items of every user's history: (items [U, PIECE], which are real and first occurrences)."""
    place = hidden.begin_U[:, None] + piece * PIECE + jnp.arange(PIECE)
    inside = place < hidden.end_U[:, None]
    place = jnp.where(inside, place, 0)
    return hidden.items_A[place], inside & hidden.first_A[place]


def _is_hidden(targets_U: jax.Array, hidden: Hidden) -> jax.Array:
    def look(piece, found):
        item, real = _hidden_piece(hidden, piece)
        return found | (real & (item == targets_U[:, None])).any(axis=1)

    return jax.lax.fori_loop(0, _pieces(hidden), look, jnp.zeros(targets_U.shape, bool))


def count_better_of(states_UxD: jax.Array, items_VxD: jax.Array, targets_U: jax.Array, negatives_UxK: jax.Array):
    """count_better where the candidates are the target and K given negatives."""
    candidates = jnp.concatenate([targets_U[:, None], negatives_UxK], axis=1)
    scores = jnp.einsum("ud,ukd->uk", states_UxD, items_VxD[candidates], precision=jax.lax.Precision.HIGHEST)
    greater_U = (~(scores[:, 1:] <= scores[:, :1])).sum(axis=1)
    tied_U = (scores[:, 1:] == scores[:, :1]).sum(axis=1)
    return greater_U, tied_U, jnp.zeros(targets_U.shape, bool)


def metrics(greater_U: np.ndarray, tied_U: np.ndarray, missed_U: np.ndarray) -> dict[str, float]:
    """hr@k, ndcg@k, mrr@k at CUTOFFS and mrr, in float64: each the mean over a random order of the ties.

    With g candidates above and e tied, the rank is uniform on g + 1 .. g + e + 1. A missed target scores 0.
    """
    order = np.lexsort((missed_U, tied_U, greater_U))  # so that sums do not depend on how users were batched
    greater_U, tied_U, missed_U = greater_U[order].astype(np.int64), tied_U[order].astype(np.int64), missed_U[order]
    last = int((greater_U + tied_U).max(initial=0)) + 1
    ranks = np.arange(1, max(last, max(CUTOFFS)) + 1)
    gains = {"ndcg": np.cumsum(1 / np.log2(ranks + 1)), "mrr": np.cumsum(1 / ranks), "hr": ranks.astype(np.float64)}

    def mean_over_ties(name, cutoff):
        total = np.concatenate([[0.0], gains[name]])  # sum of gains of ranks 1..i
        high, low = np.minimum(greater_U + tied_U + 1, cutoff), np.minimum(greater_U, cutoff)
        return float(np.mean(np.where(missed_U, 0.0, (total[high] - total[low]) / (tied_U + 1))))

    result = {f"{name}@{k}": mean_over_ties(name, k) for name in ("hr", "ndcg", "mrr") for k in CUTOFFS}
    return result | {"mrr": mean_over_ties("mrr", len(ranks))}
