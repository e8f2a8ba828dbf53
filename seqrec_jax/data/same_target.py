"""Training examples by the item they predict: two prefixes with one target mean the same to DuoRec (Section 4.3.2)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from seqrec_jax.data.batches import train_lengths
from seqrec_jax.data.dataset import SequenceDataset


@struct.dataclass
class SameTarget:
    """An example is named by its target's action (place in items_A). O(actions) memory, training part alone."""

    action_T: jax.Array  # the training targets, ordered by item
    first_V1: jax.Array  # item v is the target of action_T[first_V1[v]] .. action_T[first_V1[v + 1] - 1]
    rank_A: jax.Array  # where an action stands in action_T; 0 for an action that is no training target
    length_A: jax.Array  # inputs before an action: the user's last max_length at most


def same_target_index(dataset: SequenceDataset, max_length: int) -> SameTarget:
    """Every training item but the first of each user is a target; made on the host."""
    items_A = dataset.items_A
    place_A = np.arange(len(items_A)) - np.repeat(dataset.offsets_U1[:-1], np.diff(dataset.offsets_U1))
    training_A = place_A < np.repeat(train_lengths(dataset), np.diff(dataset.offsets_U1))
    action_T = np.flatnonzero((place_A > 0) & training_A)
    action_T = action_T[np.argsort(items_A[action_T], kind="stable")]
    rank_A = np.zeros(len(items_A), np.int32)
    rank_A[action_T] = np.arange(len(action_T))
    count_V = np.bincount(items_A[action_T], minlength=len(dataset.item_ids) + 1)
    return SameTarget(
        action_T=jnp.asarray(action_T, jnp.int32),
        first_V1=jnp.asarray(np.concatenate([[0], np.cumsum(count_V)]), jnp.int32),
        rank_A=jnp.asarray(rank_A),
        length_A=jnp.asarray(np.minimum(place_A, max_length), jnp.int32),
    )


def draw_same_target(key: jax.Array, action_P: jax.Array, items_A: jax.Array, index: SameTarget) -> jax.Array:
    """For each example another one with the same target item, uniform among all others; itself where there is none."""
    first_P = index.first_V1[items_A[action_P]]
    others_P = index.first_V1[items_A[action_P] + 1] - first_P - 1
    rank_P = first_P + jax.random.randint(key, action_P.shape, 0, jnp.maximum(others_P, 1))
    rank_P += rank_P >= index.rank_A[action_P]
    return jnp.where(others_P > 0, index.action_T[rank_P], action_P)
