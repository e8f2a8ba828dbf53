"""S3-Rec's views of histories (Zhou et al., CIKM 2020, Section 4.3): cells and segments of packed rows, masked.

A view has the batch's own cells, so it is an array of items [R, L] beside the batch, which stays as it is.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from seqrec_jax.data.batches import Batch, position_ids, train_lengths
from seqrec_jax.data.dataset import SequenceDataset


def drawn_cells(key: jax.Array, batch: Batch, probability: jax.Array) -> jax.Array:
    """[R, L] bool: real cells, each with `probability` (a traced scalar)."""
    return (jax.random.uniform(key, batch.items_RxL.shape) < probability) & (batch.segments_RxL > 0)


def masked_cells(key: jax.Array, batch: Batch, probability: jax.Array) -> jax.Array:
    """[R, L] bool: real cells, each with `probability` (a traced scalar), and the last one of every history."""
    drawn_RxL = drawn_cells(key, batch, probability)
    last_N = jnp.zeros(drawn_RxL.size, bool).at[batch.last_U].max(batch.length_U > 0)
    return drawn_RxL | last_N.reshape(drawn_RxL.shape)


def cut(key: jax.Array, batch: Batch, positions: str) -> Batch:
    """Each history up to an item drawn anew: uniform over its items. The cells behind are empty."""
    length_U = jax.random.randint(key, batch.length_U.shape, 1, jnp.maximum(batch.length_U, 1) + 1)
    length_U = jnp.minimum(length_U, batch.length_U)
    owner_RxL, width = jnp.maximum(batch.segments_RxL - 1, 0), batch.items_RxL.shape[1]
    offset_RxL = jnp.arange(width) - batch.column_U[owner_RxL]
    kept_RxL = (batch.segments_RxL > 0) & (offset_RxL < length_U[owner_RxL])
    keep = lambda x_RxL: jnp.where(kept_RxL, x_RxL, 0)  # noqa: E731
    return batch.replace(
        items_RxL=keep(batch.items_RxL),
        segments_RxL=keep(batch.segments_RxL),
        positions_RxL=keep(position_ids(offset_RxL, length_U[owner_RxL], width, positions)),
        targets_RxL=keep(batch.targets_RxL),
        length_U=length_U,
    )


def draw_segments(key: jax.Array, length_U: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(begin_U, span_U): a span uniform in 1..floor(n / 2), then a start uniform over the n - span + 1 places.

    0 and 0 for histories of fewer than 2 items.
    """
    key_span, key_begin = jax.random.split(key)
    span_U = jax.random.randint(key_span, length_U.shape, 1, jnp.maximum(length_U // 2, 1) + 1)
    span_U = jnp.where(length_U >= 2, span_U, 0)
    return jax.random.randint(key_begin, length_U.shape, 0, jnp.where(span_U > 0, length_U - span_U, 0) + 1), span_U


def segment_views(
    batch: Batch, items_A: jax.Array, begin_U: jax.Array, span_U: jax.Array, source_U: jax.Array, mask_item: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Items [R, L] of the context (the segment masked), of the segment (all else masked), and of the corrupted segment:
    the items from items_A[source_U] on at the same place.
    """
    owner_RxL = jnp.maximum(batch.segments_RxL - 1, 0)
    place_RxL = jnp.arange(batch.items_RxL.shape[1]) - batch.column_U[owner_RxL] - begin_U[owner_RxL]
    inside_RxL = (place_RxL >= 0) & (place_RxL < span_U[owner_RxL])
    others_RxL = items_A[jnp.where(inside_RxL, source_U[owner_RxL] + place_RxL, 0)]
    real_RxL = batch.segments_RxL > 0
    return tuple(
        jnp.where(real_RxL, view_RxL, 0)
        for view_RxL in (
            jnp.where(inside_RxL, mask_item, batch.items_RxL),
            jnp.where(inside_RxL, batch.items_RxL, mask_item),
            jnp.where(inside_RxL, others_RxL, mask_item),
        )
    )


@struct.dataclass
class SegmentPool:
    """The users' training parts, the longest first, to draw windows of a given length from."""

    start_P: jax.Array  # where each begins in items_A
    length_P: jax.Array  # falling
    place_U: jax.Array  # where a user stands in this order
    count_S: jax.Array  # how many have at least S items


def segment_pool(dataset: SequenceDataset, max_length: int) -> SegmentPool:
    """Made on the host; windows are at most max_length // 2 long."""
    length_U = train_lengths(dataset)
    order_P = np.argsort(-length_U, kind="stable")
    place_U = np.empty(len(order_P), np.int32)
    place_U[order_P] = np.arange(len(order_P))
    count_S = np.searchsorted(-length_U[order_P], -np.arange(max_length // 2 + 1), side="right")
    starts_U = dataset.offsets_U1[:-1]
    arrays = (starts_U[order_P], length_U[order_P], place_U, count_S)
    return SegmentPool(*(jnp.asarray(array, jnp.int32) for array in arrays))


def draw_windows(
    key: jax.Array, users_U: jax.Array, span_U: jax.Array, pool: SegmentPool
) -> tuple[jax.Array, jax.Array]:
    """(source_U, found_U): where in items_A a window of span_U items begins that lies in another user's training part.

    The other user is uniform among all whose training part is long enough, the window uniform in it.
    """
    key_user, key_start = jax.random.split(key)
    own_U, count_U = pool.place_U[jnp.maximum(users_U, 0)], pool.count_S[span_U]
    others_U = count_U - (own_U < count_U)
    found_U = (users_U >= 0) & (span_U > 0) & (others_U > 0)
    drawn_U = jax.random.randint(key_user, users_U.shape, 0, jnp.maximum(others_U, 1))
    drawn_U = jnp.where(found_U, drawn_U + (drawn_U >= own_U), 0)
    starts_U = jnp.where(found_U, pool.length_P[drawn_U] - span_U, 0) + 1
    return pool.start_P[drawn_U] + jax.random.randint(key_start, users_U.shape, 0, starts_U), found_U


def draw_published_windows(key: jax.Array, span_U: jax.Array, actions: int) -> tuple[jax.Array, jax.Array]:
    """The published code's draw: from all whole histories joined end to end, validation and test items included."""
    starts_U = jnp.maximum(actions - span_U + 1, 1)
    return jax.random.randint(key, span_U.shape, 0, starts_U), span_U > 0


def ask_next(batch: Batch, mask_item: int, positions: str) -> Batch:
    """Each history in a row of its own with the mask behind it: the place of the next item. The oldest item leaves
    where there is no room for both.
    """
    width = batch.items_RxL.shape[1]
    places_L, users_U = jnp.arange(width), jnp.arange(batch.length_U.shape[0])
    kept_U = jnp.minimum(batch.length_U, width - 1)
    length_U = jnp.where(batch.length_U > 0, kept_U + 1, 0)
    first_U = batch.row_U * width + batch.column_U + batch.length_U - kept_U
    history_UxL = places_L < kept_U[:, None]
    items_UxL = batch.items_RxL.reshape(-1)[jnp.where(history_UxL, first_U[:, None] + places_L, 0)]
    real_UxL = places_L < length_U[:, None]
    return batch.replace(
        items_RxL=jnp.where(real_UxL, jnp.where(history_UxL, items_UxL, mask_item), 0),
        segments_RxL=jnp.where(real_UxL, users_U[:, None] + 1, 0),
        positions_RxL=jnp.where(real_UxL, position_ids(places_L, length_U[:, None], width, positions), 0),
        targets_RxL=jnp.zeros_like(items_UxL),
        length_U=length_U,
        row_U=users_U,
        column_U=jnp.zeros_like(users_U),
    )
