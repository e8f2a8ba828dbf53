"""Single prefixes of histories, drawn from a step's targets and packed into rows on the device."""

import jax
import jax.numpy as jnp

from seqrec_jax.data.batches import Batch, rows_of


def draw_targets(key: jax.Array, batch: Batch, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`count` targets of the batch in random order, uniform without replacement: (cell_P, action_P, real_P).

    cell: flat index into [R * L]; action: the target's place in items_A. Where the batch has fewer targets than
    `count`, the last entries are not real; P is never more than R * L.
    """
    real_N = batch.targets_RxL.reshape(-1) > 0
    cell_P = jnp.lexsort((jax.random.bits(key, real_N.shape), ~real_N))[:count]
    owner_P = jnp.maximum(batch.segments_RxL.reshape(-1)[cell_P] - 1, 0)
    place_P = cell_P % batch.items_RxL.shape[1] - batch.column_U[owner_P]
    return cell_P, jnp.where(real_N[cell_P], batch.start_U[owner_P] + place_P + 1, 0), real_N[cell_P]


def next_fit(length_Q: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """(row_Q, column_Q): each prefix behind the one before it, or in a new row of `width` where that is too full.

    `after_Q1[q]` is the first prefix that a row begun by q cannot hold. The rows begin at 0, after[0], after[after[0]]
    and so on: the reach of that walk doubles with every round.
    """
    count = length_Q.shape[0]
    end_Q = jnp.cumsum(length_Q)
    begin_Q = end_Q - length_Q
    after_Q1 = jnp.append(jnp.searchsorted(end_Q, begin_Q + width, side="right"), count)

    def reach_twice_as_far(_, walk):
        opens_Q1, after_Q1 = walk
        return opens_Q1.at[after_Q1].max(opens_Q1), after_Q1[after_Q1]

    first_Q1 = jnp.arange(count + 1) == 0
    opens_Q1, _ = jax.lax.fori_loop(0, count.bit_length(), reach_twice_as_far, (first_Q1, after_Q1))
    opens_Q = opens_Q1[:count]
    return jnp.cumsum(opens_Q) - 1, begin_Q - jax.lax.cummax(jnp.where(opens_Q, begin_Q, 0))


def prefix_batch(
    items_A: jax.Array, action_Q: jax.Array, length_Q: jax.Array, *, rows: int, width: int, positions: str
) -> Batch:
    """The `length_Q` items before each action, packed; the action itself is the target of the last one.

    Prefixes for which `rows` are too few get length 0 and users_U = -1; they are the last ones.
    """
    row_Q, column_Q = next_fit(length_Q, width)
    fits_Q = (row_Q < rows) & (length_Q > 0)
    return rows_of(
        items_A,
        users_U=jnp.where(fits_Q, jnp.arange(length_Q.shape[0]), -1),  # each prefix stands for a user of its own
        start_U=action_Q - length_Q,
        length_U=jnp.where(fits_Q, length_Q, 0),
        row_U=jnp.where(fits_Q, row_Q, 0),
        column_U=jnp.where(fits_Q, column_Q, 0),
        rows=rows,
        width=width,
        last_target_only=True,
        positions=positions,
    )
