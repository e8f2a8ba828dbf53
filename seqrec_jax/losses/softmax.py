"""Exact softmax cross-entropy over a table of columns, without ever holding all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from seqrec_jax import native

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
MOST_KEPT = 2**26  # exponentials, of a CPU's kernel
BLOCK, LANES = 64, 16  # of the CPU's kernel: rows of a block, and what divides the entries of a state
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

    The number of real targets is traced, others cost next to nothing, and loss and all gradients are made at once. A
    kernel takes the rows on a CPU (kernels/softmax.c) and on a GPU (losses/fused.py, which keeps no logits); elsewhere
    they go in chunks. `chunk * C` is the largest array, or a tile of it where C is large. Logits are made once, but
    again for the gradient of tiles, and where their maximum has to be sought.
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
    dim = arrays[0].shape[1]
    if has_kernel(dim):
        attend, multiple = _on_gpu, 1
    elif mesh.shape["model"] == 1 and jax.default_backend() == "cpu" and (kernel := native.kernel("softmax")):
        attend, multiple = functools.partial(_on_cpu, kernel), BLOCK
    else:
        rows = arrays[0].shape[0] // mesh.shape["data"]
        aligned = ALIGNMENT[jax.default_backend()]
        chunk = -(-rows // -(-rows // chunk))  # chunks of one size
        multiple = -(-chunk // aligned) * aligned if chunk > aligned else chunk
        attend = functools.partial(_in_chunks, multiple)
    rows = jax.shard_map(
        functools.partial(_rows, attend, multiple),
        mesh=mesh,
        in_specs=specs,
        out_specs=(P(), P(), P("data"), P("data"), P("model"), specs[3]),
        check_vma=False,
    )
    total, count, *gradients = rows(*arrays)
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


def _rows(attend, multiple, hidden_NxD, positive_NxD, columns_CxD, others_N, column_bias_C, targets_N, column_ids_C):
    """One device's rows and columns: (loss sum, target count, d hidden, d positive, d columns, d others).

    `attend` takes M rows, the real ones first, M of that `multiple`, and log-sum-exps that join those of the columns.
    It returns both together [M], the mean of the columns by their shares in that [M, D], and what the rows add to the
    columns' gradient [C, D] by theirs.
    """
    count = (targets_N > 0).sum()
    order_M = real_first(targets_N > 0, multiple)
    real_M = jnp.arange(len(order_M)) < count
    take = lambda x_N: x_N.at[order_M].get(mode="fill", fill_value=0)  # noqa: E731
    hidden_MxD, positive_MxD, target_M = take(hidden_NxD), take(positive_NxD), take(targets_N)
    score_M = (hidden_MxD * positive_MxD).sum(axis=1)
    joins_M = jnp.full_like(score_M, -jnp.inf) if column_ids_C is None else score_M
    if others_N is not None:
        joins_M = jnp.logaddexp(joins_M, jnp.where(real_M, take(others_N), -jnp.inf))
    ids = (None, None) if column_ids_C is None else (target_M, column_ids_C)
    all_M, pull_MxD, d_columns = attend(
        hidden_MxD, columns_CxD, column_bias_C, joins_M, jnp.maximum(score_M, joins_M), count, *ids
    )
    total = jnp.where(real_M, jnp.maximum(all_M - score_M, 0), 0).sum()  # a share is 1 at most, whatever the rounding

    push_Mx1 = -1.0 if column_ids_C is None else jnp.exp(score_M - all_M)[:, None] - 1  # p(target), if it joins, − 1
    back = lambda x_MxD, x_N: jnp.zeros_like(x_N).at[order_M].set(x_MxD, mode="drop")  # noqa: E731
    # A row that is not real has no place to go back to, or gets nothing.
    real = lambda x_M: jnp.where(real_M, x_M.T, 0).T  # noqa: E731
    d_hidden = back(real(pull_MxD + push_Mx1 * positive_MxD), hidden_NxD)
    d_positive = back(real(push_Mx1 * hidden_MxD), positive_NxD)
    d_others = None if others_N is None else back(real(jnp.exp(take(others_N) - all_M)), others_N)
    total, count, d_columns = _summed((total, count, d_columns), "data")
    return total, count, d_hidden, d_positive, d_columns, d_others


def _on_gpu(hidden_MxD, columns_CxD, column_bias_C, joins_M, _, count, target_M, column_ids_C):
    """States attend to columns, and columns to states."""
    from seqrec_jax.losses.fused import attend

    columns = len(columns_CxD)
    here_M, mean_MxD = attend(hidden_MxD, columns_CxD, column_bias_C, count, columns, target_M, column_ids_C)
    top_M = jax.lax.pmax(here_M, "model")
    all_M = top_M + jnp.log(jax.lax.psum(jnp.exp(here_M - top_M), "model"))
    all_M = jnp.logaddexp(all_M, joins_M)
    pull_MxD = _summed(jnp.exp(here_M - all_M)[:, None] * mean_MxD, "model")
    mass_C, mean_CxD = attend(columns_CxD, hidden_MxD, -all_M, columns, count, column_ids_C, target_M)
    return all_M, pull_MxD, jnp.exp(mass_C + column_bias_C)[:, None] * mean_CxD


def _on_cpu(kernel, hidden_MxD, columns_CxD, column_bias_C, joins_M, least_M, count, target_M, column_ids_C):
    """Blocks of rows and tiles of columns, in the kernel of that name."""
    rows, dim = hidden_MxD.shape
    columns, width = len(columns_CxD), -(-dim // LANES) * LANES
    shift_M, near_M = _shift(hidden_MxD, columns_CxD, column_bias_C, least_M)
    shift_M = jnp.where(near_M | (jnp.arange(rows) >= count), shift_M, jnp.inf)  # infinity: the kernel seeks a maximum
    kept = min(2 * native.cores(), rows // BLOCK)  # blocks
    if kept * columns * BLOCK > MOST_KEPT or columns > MANY_COLUMNS:
        kept = 0
    results = (rows,), (rows, width), (columns, width)
    scratch = (rows, width), (rows, width), (rows,), (rows,), (kept, columns, BLOCK)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*results, *scratch)]
    widen = lambda x: jnp.pad(x, ((0, 0), (0, width - dim)))  # noqa: E731
    floats = widen(hidden_MxD), widen(columns_CxD), column_bias_C, shift_M, joins_M
    whole = (count,) if column_ids_C is None else (count, target_M, column_ids_C)
    all_M, pull_MxD, d_columns, *_ = jax.ffi.ffi_call(kernel, shapes, vmap_method="sequential")(
        *(x.astype(jnp.float32) for x in floats), *(x.astype(jnp.int32) for x in whole)
    )
    return all_M, pull_MxD[:, :dim], d_columns[:, :dim]


def _in_chunks(chunk, hidden_MxD, columns_CxD, column_bias_C, joins_M, least_M, count, target_M, column_ids_C):
    """Chunks of rows, and tiles of columns where these are many."""
    columns = columns_CxD.shape[0]
    width = tile_columns(columns)
    tiles = -(-columns // width)
    shift_M, near_M = _shift(hidden_MxD, columns_CxD, column_bias_C, least_M)
    near_M |= jnp.arange(len(near_M)) >= count

    def add_chunk(index, sums):
        all_M, pull_MxD, d_columns = sums
        piece = lambda x_M: jax.lax.dynamic_slice_in_dim(x_M, index * chunk, chunk)  # noqa: E731
        place = lambda x_M, part: jax.lax.dynamic_update_slice_in_dim(x_M, part, index * chunk, 0)  # noqa: E731
        states_KxD, joins_K, least_K, ids_K = jax.tree.map(piece, (hidden_MxD, joins_M, least_M, target_M))
        shift_K, real_K = piece(shift_M), index * chunk + jnp.arange(chunk) < count

        def tile(number, top_K):
            """(first column, columns [T, D], logits − top [K, T]) of a tile of columns."""
            begin = jnp.minimum(number * width, columns - width)
            part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=begin, slice_size=width)
            columns_TxD, bias_T = part(columns_CxD), part(column_bias_C)
            if columns % width:  # the last tile overlaps the one before, whose columns it leaves out
                bias_T = jnp.where(begin + jnp.arange(width) >= number * width, bias_T, -jnp.inf)
            found_KxT = states_KxD @ columns_TxD.T + bias_T - top_K[:, None]
            if column_ids_C is not None:
                found_KxT = jnp.where(part(column_ids_C) == ids_K[:, None], -jnp.inf, found_KxT)
            return begin, columns_TxD, found_KxT

        def maximum():
            zero_K = jnp.zeros_like(least_K)
            highest = lambda number, top_K: jnp.maximum(top_K, tile(number, zero_K)[2].max(axis=1))  # noqa: E731
            return jax.lax.pmax(jax.lax.fori_loop(0, tiles, highest, least_K), "model")

        top_K = jax.lax.cond(piece(near_M).all(), lambda: shift_K, maximum)

        def mixed(number):
            _, columns_TxD, found_KxT = tile(number, top_K)
            exp_KxT = jnp.exp(found_KxT)
            return exp_KxT @ columns_TxD, exp_KxT.sum(axis=1), exp_KxT

        if tiles == 1:
            *parts, exp_KxC = mixed(0)
        else:
            add = lambda number, parts: jax.tree.map(jnp.add, parts, mixed(number)[:2])  # noqa: E731
            parts = jax.lax.fori_loop(1, tiles, add, mixed(0)[:2])
        pull_KxD, sum_K = _summed(parts, "model")
        sum_K += jnp.exp(joins_K - top_K)
        share_K = jnp.where(real_K, 1 / sum_K, 0)
        all_M = place(all_M, jnp.log(sum_K) + top_K)
        pull_MxD = place(pull_MxD, pull_KxD * share_K[:, None])
        shares_DxK = (states_KxD * share_K[:, None]).T
        if tiles == 1:
            return all_M, pull_MxD, d_columns + shares_DxK @ exp_KxC

        def push(number, d_columns):
            begin, _, found_KxT = tile(number, top_K)
            old_DxT = jax.lax.dynamic_slice_in_dim(d_columns, begin, width, axis=1)
            new_DxT = old_DxT + shares_DxK @ jnp.exp(found_KxT)
            return jax.lax.dynamic_update_slice_in_dim(d_columns, new_DxT, begin, axis=1)

        return all_M, pull_MxD, jax.lax.fori_loop(0, tiles, push, d_columns)

    # d columns is summed as [D, C]: that product reads the exponentials along their rows, twice as fast on a CPU.
    zeros = jnp.zeros_like(joins_M), jnp.zeros_like(hidden_MxD), jnp.zeros_like(columns_CxD.T)
    all_M, pull_MxD, d_columns_DxC = jax.lax.fori_loop(0, -(-count // chunk), add_chunk, zeros)
    return all_M, pull_MxD, d_columns_DxC.T


def _shift(hidden_MxD, columns_CxD, column_bias_C, least_M):
    """What to take off all logits of a row: a bound on them, less what exponentials have room for, which costs no pass
    over them; and whether it is near enough to `least_M`, which one of them reaches.
    """
    longest = jax.lax.pmax(jnp.sqrt((columns_CxD**2).sum(axis=1).max()), "model")
    highest_bias = jax.lax.pmax(column_bias_C.max(), "model")
    bound_M = jnp.sqrt((hidden_MxD**2).sum(axis=1)) * longest + jnp.maximum(highest_bias, 0)
    bound_M = jnp.maximum(bound_M, least_M)
    shift_M = bound_M - jnp.clip(bound_M - SAFE, 0, HEADROOM)
    return shift_M, (bound_M < SAFE) | (shift_M - least_M < NEAR) & (bound_M < LARGE)


def _summed(tree, axis: str):
    """Over the devices of a mesh axis. The sum over one device would copy."""
    return tree if jax.lax.axis_size(axis) == 1 else jax.lax.psum(tree, axis)
