"""Negative items: drawn on the device, from the training part alone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from ml_collections import ConfigDict

from seqrec_jax.data.batches import train_counts, train_lengths
from seqrec_jax.data.dataset import SequenceDataset

SMOOTHING = 1e-3  # actions added to every item: one met only at test keeps a finite logit


@struct.dataclass
class Absent:
    """Per user, the items NOT in the training history, in a form that is drawn from exactly and without rejection.

    A user's distinct items h_0 < h_1 < ... leave gaps: before h_i there are h_i − 1 − i absent items.
    """

    gaps_G: jax.Array  # h_i − 1 − i, user after user, non-decreasing within a user
    offsets_U1: jax.Array


def absent_items(items_A: np.ndarray, offsets_U1: np.ndarray, lengths_U: np.ndarray) -> Absent:
    """From the first `lengths_U` items of each user (the training part)."""
    user_A = np.repeat(np.arange(len(lengths_U)), np.diff(offsets_U1))
    inside_A = np.arange(len(items_A)) - offsets_U1[user_A] < lengths_U[user_A]
    pairs = np.unique(np.stack([user_A[inside_A], items_A[inside_A]], axis=1), axis=0)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pairs[:, 0], minlength=len(lengths_U)))])
    gaps_G = pairs[:, 1] - 1 - (np.arange(len(pairs)) - offsets[pairs[:, 0]])
    return Absent(jnp.asarray(gaps_G, jnp.int32), jnp.asarray(offsets, jnp.int32))


def draw_absent(key: jax.Array, users_N: jax.Array, absent: Absent, num_items: int) -> jax.Array:
    """One item per entry, uniform over those absent from the user's training history; 0 if there is none."""
    begin_N, end_N = absent.offsets_U1[users_N], absent.offsets_U1[users_N + 1]
    free_N = num_items - (end_N - begin_N)
    nth_N = jax.random.randint(key, users_N.shape, 0, jnp.maximum(free_N, 1))

    def halve(_, bounds):  # binary search for the number of history items before the nth absent one
        low_N, high_N = bounds
        middle_N = (low_N + high_N) // 2
        go_right = (low_N < high_N) & (absent.gaps_G[middle_N] <= nth_N)
        return jnp.where(go_right, middle_N + 1, low_N), jnp.where((low_N < high_N) & ~go_right, middle_N, high_N)

    halvings = int(absent.gaps_G.shape[0]).bit_length()
    low_N, _ = jax.lax.fori_loop(0, halvings, halve, (begin_N, end_N))
    return jnp.where(free_N > 0, nth_N + 1 + low_N - begin_N, 0)


@struct.dataclass
class NegativeSource:
    """What the configured loss draws negatives from; the parts it does not need are None."""

    absent: Absent | None
    bias_V: jax.Array | None  # added to the logit of a drawn item: −log(K q) makes it stand for 1 / (K q) items
    upto_V: jax.Array | None  # popularity draw: training actions of the items up to each, whole numbers


def draw_shared(key: jax.Array, count: int, source: "NegativeSource", num_items: int) -> jax.Array:
    """`count` items with repetition, uniform or by training popularity, shared by all positions of a step.

    By popularity: the item of a random action, or at times any item. Sums of shares would not do: float32 cannot tell
    ten million of them apart.
    """
    if source.upto_V is None:
        return jax.random.randint(key, (count,), 1, num_items + 1)
    key_which, key_any, key_action = jax.random.split(key, 3)
    actions = source.upto_V[num_items]
    any_K = jax.random.randint(key_any, (count,), 1, num_items + 1)
    action_K = jax.random.randint(key_action, (count,), 0, jnp.maximum(actions, 1))
    popular_K = jnp.searchsorted(source.upto_V, action_K, side="right")
    smoothing = SMOOTHING * num_items
    is_any_K = jax.random.uniform(key_which, (count,)) * (smoothing + actions) < smoothing
    return jnp.where(is_any_K, any_K, popular_K)


def negative_source(config: ConfigDict, dataset: SequenceDataset, rows: int) -> NegativeSource:
    """Makes NegativeSource for `config.loss`, from the training part alone. `rows`: of the item table."""
    if config.next_item in ("bce", "bpr"):
        return NegativeSource(absent_items(dataset.items_A, dataset.offsets_U1, train_lengths(dataset)), None, None)
    if config.next_item == "sampled":
        if config.negative_distribution == "uniform":
            return NegativeSource(None, jnp.zeros(rows), None)  # each counts once, as published
        items = len(dataset.item_ids)
        actions_V = np.pad(train_counts(dataset), (0, rows - items - 1))
        share_V = (actions_V + SMOOTHING) / (actions_V.sum() + SMOOTHING * items)
        bias_V, upto_V = -np.log(config.negatives * share_V), np.cumsum(actions_V)
        return NegativeSource(None, jnp.asarray(bias_V, jnp.float32), jnp.asarray(upto_V, jnp.int32))
    return NegativeSource(None, None, None)
