"""Exact softmax cross-entropy over a table of columns, without ever holding all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

P = PartitionSpec
SAFE = 40.0  # scores within ±SAFE may be shifted by that bound: exp(−2 SAFE) is a float32 with all its digits
# Above, the shift is lower than the bound by HEADROOM: the sum of exp(HEADROOM) over 10^12 columns is a float32. What
# is in the sum must be so NEAR that 10^7 columns that float32 takes for zero, below exp(−87), are a 50,000th of it.
HEADROOM = NEAR = 60.0
LARGE = 1000.0  # where what matrix units round is more than the headroom
# Above this, one row of logits is large: tiles of columns, whose exponentials are made again for their gradient.
MANY_COLUMNS = 2**17
TILE_COLUMNS = {"cpu": 2**11, "gpu": 2**15, "tpu": 2**15}  # in cache on a CPU, few launches elsewhere
CHUNK_LOGITS = {"cpu": 5 * 2**20, "gpu": 2**28, "tpu": 2**27}  # in the last cache of a CPU, few chunks elsewhere
ALIGNMENT = {"cpu": 1, "gpu": 128, "tpu": 128}  # of a chunk's rows, as matrix units want them


def softmax_loss(
    hidden_NxD: jax.Array,
    positive_NxD: jax.Array,
    columns_CxD: jax.Array,
    column_bias_C: jax.Array,
    targets_N: jax.Array,
    mesh: Mesh,
    *,
    column_ids_C: jax.Array | None = None,
    others_N: jax.Array | None = None,
) -> jax.Array:
    """Mean over real targets (targets_N > 0) of −log softmax of the target's score.

    `positive_NxD` holds the targets' embeddings, `column_bias_C` is added to the columns' logits (−inf removes one).
    Without `column_ids_C` the columns are the whole table, targets among them; with it they are negatives: a column
    whose id is the row's target is left out, and the positive joins the sum. `others_N`: the log-sum-exp of further
    competitors of each row's own (−inf: none), which joins the sum as well.

    Walks over chunks of real targets, with a traced number of chunks, and makes loss and all gradients at once: padding
    costs nothing; `chunk * C` is the largest array, or a tile of it where C is large. Logits are made once, but again
    for the gradient of tiles, and where their maximum has to be sought. On a GPU a kernel (losses/fused.py) takes all
    rows at once and keeps no logits.
    Rows are split over the mesh's "data", columns over its "model".
    """
    rows, columns = P("data"), P("model")
    arrays = (hidden_NxD, positive_NxD, columns_CxD, others_N, column_bias_C, targets_N, column_ids_C)
    specs = (rows, rows, columns, rows, columns, rows, columns)
    specs = tuple(None if array is None else spec for array, spec in zip(arrays, specs, strict=True))
    total, count = _sums(mesh, specs, chunk_rows(columns_CxD.shape[0] // mesh.shape["model"]), *arrays)
    return total / jnp.maximum(count, 1)


def tile_columns(columns: int) -> int:
    """Columns whose logits are made at once: all, unless they are many."""
    return columns if columns <= MANY_COLUMNS else TILE_COLUMNS[jax.default_backend()]


def chunk_rows(columns: int) -> int:
    """Rows walked at once: few chunks whose logits stay in the last cache of a CPU, large ones on an accelerator."""
    return int(np.clip(CHUNK_LOGITS[jax.default_backend()] // tile_columns(columns), 8, 8192))


def real_first(real_N: jax.Array, chunk: int) -> jax.Array:
    """Places of the real rows, then N (no row) up to whole chunks: dynamic_slice would clamp a last partial one."""
    rows = len(real_N)
    return jnp.pad(jnp.sort(jnp.where(real_N, jnp.arange(rows), rows)), (0, -rows % chunk), constant_values=rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(mesh, specs, chunk, *arrays):
    return _forward(mesh, specs, chunk, *arrays)[0]


def _forward(mesh, specs, chunk, *arrays):
    walk = jax.shard_map(
        _attend if has_kernel(arrays[0].shape[1]) else functools.partial(_walk, chunk=chunk),
        mesh=mesh,
        in_specs=specs,
        out_specs=(P(), P(), P("data"), P("data"), P("model"), specs[3]),
        check_vma=False,
    )
    total, count, *gradients = walk(*arrays)
    return (total, count), gradients


def _backward(mesh, specs, chunk, gradients, cotangents):
    return *(g if g is None else cotangents[0] * g for g in gradients), None, None, None


_sums.defvjp(_forward, _backward)


def has_kernel(dim: int) -> bool:
    """Whether losses/fused.py is written for this GPU (NVIDIA's, since Ampere) and for states of `dim` entries."""
    if jax.default_backend() != "gpu" or dim > 512:  # wider tiles do not fit in its shared memory
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return capability.replace(".", "").isdigit() and float(capability) >= 8


def _attend(hidden_NxD, positive_NxD, columns_CxD, others_N, column_bias_C, targets_N, column_ids_C):
    """_walk in one step by a kernel: states attend to columns, and columns to states."""
    from seqrec_jax.losses.fused import attend

    count, columns = (targets_N > 0).sum(), len(columns_CxD)
    order_M = jnp.argsort(targets_N <= 0, stable=True)
    take = lambda x_N: x_N[order_M]  # noqa: E731
    hidden_MxD, positive_MxD, target_M = take(hidden_NxD), take(positive_NxD), take(targets_N)
    real_M, score_M = target_M > 0, (hidden_MxD * positive_MxD).sum(axis=1)
    ids = (None, None) if column_ids_C is None else (target_M, column_ids_C)
    here_M, mean_MxD = attend(hidden_MxD, columns_CxD, column_bias_C, count, columns, *ids)
    top_M = jax.lax.pmax(here_M, "model")
    all_M = top_M + jnp.log(jax.lax.psum(jnp.exp(here_M - top_M), "model"))
    if column_ids_C is not None:
        all_M = jnp.logaddexp(all_M, score_M)
    if others_N is not None:
        all_M = jnp.logaddexp(all_M, take(others_N))
    total = jnp.where(real_M, jnp.maximum(all_M - score_M, 0), 0).sum()  # a share is 1 at most, whatever the rounding

    pull_MxD = _summed(jnp.exp(here_M - all_M)[:, None] * mean_MxD, "model")
    joins_M = jnp.zeros_like(score_M) if column_ids_C is None else jnp.exp(score_M - all_M)
    push_Mx1 = (joins_M - 1)[:, None]  # p(target), if it joins, − 1
    back = lambda x_M: jnp.zeros_like(x_M).at[order_M].set(jnp.where(real_M, x_M.T, 0).T)  # noqa: E731
    d_hidden, d_positive = back(pull_MxD + push_Mx1 * positive_MxD), back(push_Mx1 * hidden_MxD)
    d_others = None if others_N is None else back(jnp.exp(take(others_N) - all_M))
    mass_C, mean_CxD = attend(columns_CxD, hidden_MxD, -all_M, columns, count, *ids[::-1])
    d_columns = jnp.exp(mass_C + column_bias_C)[:, None] * mean_CxD
    total, count, d_columns = _summed((total, count, d_columns), "data")
    return total, count, d_hidden, d_positive, d_columns, d_others


def _walk(hidden_NxD, positive_NxD, columns_CxD, others_N, column_bias_C, targets_N, column_ids_C, *, chunk):
    """One device's rows and columns: (loss sum, target count, d hidden, d positive, d columns, d others)."""
    rows = hidden_NxD.shape[0]
    columns, aligned = columns_CxD.shape[0], ALIGNMENT[jax.default_backend()]
    chunk = -(-rows // -(-rows // chunk))  # chunks of one size
    chunk = -(-chunk // aligned) * aligned if chunk > aligned else chunk
    real_N = targets_N > 0
    count = real_N.sum()
    order = real_first(real_N, chunk)
    longest = jax.lax.pmax(jnp.sqrt((columns_CxD**2).sum(axis=1).max()), "model")
    highest_bias = jax.lax.pmax(column_bias_C.max(), "model")
    width = tile_columns(columns)
    tiles = -(-columns // width)

    def add_chunk(index, sums):
        total, d_hidden, d_positive, d_columns, d_others = sums
        place_M = jax.lax.dynamic_slice(order, (index * chunk,), (chunk,))
        real_M = index * chunk + jnp.arange(chunk) < count
        take = lambda x_N: x_N.at[place_M].get(mode="fill", fill_value=0)  # noqa: E731
        hidden_MxD, positive_MxD, target_M = take(hidden_NxD), take(positive_NxD), take(targets_N)
        score_M = (hidden_MxD * positive_MxD).sum(axis=1)
        others_M = jnp.full_like(score_M, -jnp.inf) if others_N is None else take(others_N)
        least_M = jnp.maximum(score_M, others_M)

        def tile(number, top_M):
            """(first column, columns [T, D], logits − top [M, T]) of a tile of columns."""
            begin = jnp.minimum(number * width, columns - width)
            part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=begin, slice_size=width)
            columns_TxD, bias_T = part(columns_CxD), part(column_bias_C)
            if columns % width:  # the last tile overlaps the one before, whose columns it leaves out
                bias_T = jnp.where(begin + jnp.arange(width) >= number * width, bias_T, -jnp.inf)
            found_MxT = hidden_MxD @ columns_TxD.T + bias_T - top_M[:, None]
            if column_ids_C is not None:
                found_MxT = jnp.where(part(column_ids_C) == target_M[:, None], -jnp.inf, found_MxT)
            return begin, columns_TxD, found_MxT

        def maximum():
            zero_M = jnp.zeros_like(least_M)
            highest = lambda number, top_M: jnp.maximum(top_M, tile(number, zero_M)[2].max(axis=1))  # noqa: E731
            return jax.lax.pmax(jax.lax.fori_loop(0, tiles, highest, least_M), "model")

        # A bound on the logits, less what exponentials have room for, is a shift that costs no pass over them.
        bound_M = jnp.sqrt((hidden_MxD**2).sum(axis=1)) * longest + jnp.maximum(highest_bias, 0)
        bound_M = jnp.maximum(bound_M, least_M)
        shift_M = bound_M - jnp.clip(bound_M - SAFE, 0, HEADROOM)
        near_M = (shift_M - least_M < NEAR) & (bound_M < LARGE)
        top_M = jax.lax.cond(((bound_M < SAFE) | near_M | ~real_M).all(), lambda: shift_M, maximum)

        def mixed(number):
            _, columns_TxD, found_MxT = tile(number, top_M)
            exp_MxT = jnp.exp(found_MxT)
            return exp_MxT @ columns_TxD, exp_MxT.sum(axis=1), exp_MxT

        if tiles == 1:
            *parts, exp_MxC = mixed(0)
        else:
            add = lambda number, parts: jax.tree.map(jnp.add, parts, mixed(number)[:2])  # noqa: E731
            parts = jax.lax.fori_loop(1, tiles, add, mixed(0)[:2])
        pull_MxD, sum_M = _summed(parts, "model")
        joins_M = 0.0 if column_ids_C is None else jnp.exp(score_M - top_M)
        besides_M = 0.0 if others_N is None else jnp.exp(others_M - top_M)
        sum_M += joins_M + besides_M
        loss_M = jnp.maximum(jnp.log(sum_M) + top_M - score_M, 0)  # a share is 1 at most, whatever the rounding
        total += jnp.where(real_M, loss_M, 0).sum()

        share_M = jnp.where(real_M, 1 / sum_M, 0)
        push_M = joins_M * share_M - real_M  # p(target), if it joins, − 1
        d_hidden_MxD = pull_MxD * share_M[:, None] + push_M[:, None] * positive_MxD
        d_hidden = d_hidden.at[place_M].set(d_hidden_MxD, mode="drop")
        d_positive = d_positive.at[place_M].set(push_M[:, None] * hidden_MxD, mode="drop")
        d_others = None if others_N is None else d_others.at[place_M].set(besides_M * share_M, mode="drop")
        shares_DxM = (hidden_MxD * share_M[:, None]).T
        if tiles == 1:
            return total, d_hidden, d_positive, d_columns + shares_DxM @ exp_MxC, d_others

        def push(number, d_columns):
            begin, _, found_MxT = tile(number, top_M)
            old_DxT = jax.lax.dynamic_slice_in_dim(d_columns, begin, width, axis=1)
            new_DxT = old_DxT + shares_DxM @ jnp.exp(found_MxT)
            return jax.lax.dynamic_update_slice_in_dim(d_columns, new_DxT, begin, axis=1)

        return total, d_hidden, d_positive, jax.lax.fori_loop(0, tiles, push, d_columns), d_others

    # d columns is summed as [D, C]: that product reads the exponentials along their rows, twice as fast on a CPU.
    zero = jax.tree.map(jnp.zeros_like, (hidden_NxD, hidden_NxD, columns_CxD.T, others_N))
    sums = jax.lax.fori_loop(0, -(-count // chunk), add_chunk, (jnp.float32(0), *zero))
    total, d_hidden, d_positive, d_columns_DxC, d_others = sums
    total, count, d_columns_DxC = _summed((total, count, d_columns_DxC), "data")
    return total, count, d_hidden, d_positive, d_columns_DxC.T, d_others


def _summed(tree, axis: str):
    """Over the devices of a mesh axis. The sum over one device would copy."""
    return tree if jax.lax.axis_size(axis) == 1 else jax.lax.psum(tree, axis)
