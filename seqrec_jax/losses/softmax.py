"""Exact softmax cross-entropy over a table of columns, without ever holding all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

P = PartitionSpec
SAFE = 40.0  # logits within ±SAFE may be shifted by that bound instead of their maximum: nothing underflows
MANY_COLUMNS = 2**17  # above this, one row of logits is large: tiles of columns with a running log-sum-exp
TILE_COLUMNS = {"cpu": 2**11, "gpu": 2**15, "tpu": 2**15}  # in cache on a CPU, few launches elsewhere


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
    chunk: int | None = None,
) -> jax.Array:
    """Mean over real targets (targets_N > 0) of −log softmax of the target's score.

    `positive_NxD` holds the targets' embeddings, `column_bias_C` is added to the columns' logits (−inf removes one).
    Without `column_ids_C` the columns are the whole table, targets among them; with it they are negatives: a column
    whose id is the row's target is left out, and the positive joins the sum. `others_N`: the log-sum-exp of further
    competitors of each row's own (−inf: none), which joins the sum as well.

    Walks over chunks of real targets, with a traced number of chunks, and makes loss and all gradients at once: nothing
    is computed twice and padding costs nothing; `chunk * C` is the largest array, or a tile of it where C is large.
    Rows are split over the mesh's "data", columns over its "model".
    """
    rows, columns = P("data"), P("model")
    arrays = (hidden_NxD, positive_NxD, columns_CxD, others_N, column_bias_C, targets_N, column_ids_C)
    specs = (rows, rows, columns, rows, columns, rows, columns)
    specs = tuple(None if array is None else spec for array, spec in zip(arrays, specs, strict=True))
    total, count = _sums(mesh, specs, chunk or chunk_rows(columns_CxD.shape[0]), *arrays)
    return total / jnp.maximum(count, 1)


def chunk_rows(columns: int) -> int:
    """Rows walked at once: few chunks whose logits stay in the last cache of a CPU, large ones on an accelerator."""
    backend = jax.default_backend()
    logits = 5 * 2**20 if backend == "cpu" else 2**27
    return int(np.clip(logits // min(columns, TILE_COLUMNS[backend] if columns > MANY_COLUMNS else columns), 8, 8192))


def real_first(real_N: jax.Array, chunk: int) -> jax.Array:
    """Places of the real rows, then of the others; then N (no row) up to whole chunks, because dynamic_slice would
    clamp a last partial one.
    """
    order = jnp.argsort(~real_N, stable=True)
    return jnp.concatenate([order, jnp.full(-len(real_N) % chunk, len(real_N), order.dtype)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(mesh, specs, chunk, *arrays):
    return _forward(mesh, specs, chunk, *arrays)[0]


def _forward(mesh, specs, chunk, *arrays):
    walk = jax.shard_map(
        functools.partial(_walk, chunk=chunk),
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


def _walk(hidden_NxD, positive_NxD, columns_CxD, others_N, column_bias_C, targets_N, column_ids_C, *, chunk):
    """One device's rows and columns: (loss sum, target count, d hidden, d positive, d columns, d others)."""
    rows = hidden_NxD.shape[0]
    chunk = -(-rows // -(-rows // chunk))  # chunks of one size
    real_N = targets_N > 0
    count = real_N.sum()
    order = real_first(real_N, chunk)
    longest = jax.lax.pmax(jnp.sqrt((columns_CxD**2).sum(axis=1).max()), "model")
    highest_bias = jax.lax.pmax(column_bias_C.max(), "model")
    exponentials = (_tiled if columns_CxD.shape[0] > MANY_COLUMNS else _whole)(columns_CxD)

    def add_chunk(index, sums):
        total, d_hidden, d_positive, d_columns, d_others = sums
        place_M = jax.lax.dynamic_slice(order, (index * chunk,), (chunk,))
        real_M = index * chunk + jnp.arange(chunk) < count
        take = lambda x_N: x_N.at[place_M].get(mode="fill", fill_value=0)  # noqa: E731
        hidden_MxD, positive_MxD, target_M = take(hidden_NxD), take(positive_NxD), take(targets_N)
        score_M = (hidden_MxD * positive_MxD).sum(axis=1)
        others_M = jnp.full_like(score_M, -jnp.inf) if others_N is None else take(others_N)
        least_M = jnp.maximum(score_M, others_M)

        def products(begin, width):
            return hidden_MxD @ jax.lax.dynamic_slice_in_dim(columns_CxD, begin, width).T

        def logits(products_MxT, begin):
            """Of the columns from `begin` on, from their products with the states."""
            part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=begin, slice_size=products_MxT.shape[1])
            found = products_MxT + part(column_bias_C)
            if column_ids_C is None:
                return found
            return jnp.where(part(column_ids_C) == target_M[:, None], -jnp.inf, found)

        bound_M = jnp.sqrt((hidden_MxD**2).sum(axis=1)) * longest + jnp.maximum(highest_bias, 0)
        bound_M = jnp.maximum(bound_M, least_M)
        top_M, sum_M, pull_MxD, push_columns = exponentials(products, logits, bound_M, least_M)
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
        return total, d_hidden, d_positive, push_columns(d_columns, (hidden_MxD * share_M[:, None]).T), d_others

    # d columns is summed as [D, C]: that product reads the exponentials along their rows, twice as fast on a CPU.
    zero = jax.tree.map(jnp.zeros_like, (hidden_NxD, hidden_NxD, columns_CxD.T, others_N))
    sums = jax.lax.fori_loop(0, -(-count // chunk), add_chunk, (jnp.float32(0), *zero))
    total, d_hidden, d_positive, d_columns_DxC, d_others = sums
    total, count, d_columns_DxC = _summed((total, count, d_columns_DxC), "data")
    return total, count, d_hidden, d_positive, d_columns_DxC.T, d_others


def _summed(tree, axis: str):
    """Over the devices of a mesh axis. The sum over one device would copy."""
    return tree if jax.lax.axis_size(axis) == 1 else jax.lax.psum(tree, axis)


def _whole(columns_CxD):
    """All columns at once. Returns a function that finds the shift [M] and, over all devices, the sum of
    e = exp(logits − shift) and of e @ columns; and how to add shares.T @ e to d columns [D, C].
    """
    columns = columns_CxD.shape[0]
    one_product = jax.default_backend() == "cpu"  # of columns and a last one of ones: the sums of e cost no pass
    if one_product:
        columns_CxD = jnp.concatenate([columns_CxD, jnp.ones((columns, 1))], axis=1)

    def exponentials(products, logits, bound_M, least_M):
        products_MxC = products(0, columns)

        def maximum():
            return jax.lax.pmax(jnp.maximum(logits(products_MxC, 0).max(axis=1), least_M), "model")

        # The bound saves a pass. e is made here and not in the branches: in the place of the products, with one pass.
        top_M = jax.lax.cond(bound_M.max() < SAFE, lambda: bound_M, maximum)
        exp_MxC = jnp.exp(logits(products_MxC, 0) - top_M[:, None])
        mixed = exp_MxC @ columns_CxD
        sum_M, pull_MxD = (mixed[:, -1], mixed[:, :-1]) if one_product else (exp_MxC.sum(axis=1), mixed)
        sum_M, pull_MxD = _summed((sum_M, pull_MxD), "model")
        return top_M, sum_M, pull_MxD, lambda d_columns_DxC, shares_DxM: d_columns_DxC + shares_DxM @ exp_MxC

    return exponentials


def _tiled(columns_CxD):
    """The same in tiles of columns with a running maximum; the gradient of the columns walks over them once more."""
    columns, width = columns_CxD.shape[0], TILE_COLUMNS[jax.default_backend()]
    tiles = -(-columns // width)

    def exponentials(products, logits, _, least_M):
        def tile(index):
            """(first column, its logits): the last tile overlaps the one before, whose columns it leaves out."""
            begin = jnp.minimum(index * width, columns - width)
            own_T = begin + jnp.arange(width) >= index * width
            return begin, jnp.where(own_T, logits(products(begin, width), begin), -jnp.inf)

        def add_tile(index, sums):
            top_M, sum_M, pull_MxD = sums
            begin, logits_MxT = tile(index)
            higher_M = jnp.maximum(top_M, logits_MxT.max(axis=1))
            exp_MxT = jnp.exp(logits_MxT - higher_M[:, None])
            added = exp_MxT @ jax.lax.dynamic_slice_in_dim(columns_CxD, begin, width)
            shrink_M = jnp.exp(top_M - higher_M)
            return higher_M, sum_M * shrink_M + exp_MxT.sum(axis=1), pull_MxD * shrink_M[:, None] + added

        start = (least_M, jnp.zeros_like(least_M), jnp.zeros((least_M.shape[0], columns_CxD.shape[1])))
        local_M, sum_M, pull_MxD = jax.lax.fori_loop(0, tiles, add_tile, start)
        top_M = jax.lax.pmax(local_M, "model")
        shrink_M = jnp.exp(local_M - top_M)
        sum_M, pull_MxD = _summed((sum_M * shrink_M, pull_MxD * shrink_M[:, None]), "model")

        def push_columns(d_columns_DxC, shares_DxM):
            def add(index, d_columns_DxC):
                begin, logits_MxT = tile(index)
                pushed = shares_DxM @ jnp.exp(logits_MxT - top_M[:, None])
                old = jax.lax.dynamic_slice_in_dim(d_columns_DxC, begin, width, axis=1)
                return jax.lax.dynamic_update_slice_in_dim(d_columns_DxC, old + pushed, begin, axis=1)

            return jax.lax.fori_loop(0, tiles, add, d_columns_DxC)

        return top_M, sum_M, pull_MxD, push_columns

    return exponentials
