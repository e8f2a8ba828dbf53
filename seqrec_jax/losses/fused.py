"""Attention whose scores are never in memory: a GPU kernel for the softmax over many columns (Pallas, Triton).

Products are of the precision JAX is set to: TF32, if nothing is said.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

NONE = -1e30  # a logit that never counts, though 0 times its exponential is a number
QUERIES, KEYS = 128, 64  # of a tile, where vectors have 64 entries; measured, as WARPS and STAGES are, on an H200
WARPS, STAGES = 4, 3
AT_ONCE = 264  # programs: two for each of 132 multiprocessors


def attend(
    queries_IxD: jax.Array,
    keys_JxD: jax.Array,
    bias_J: jax.Array,
    real_queries: jax.Array | int,
    real_keys: jax.Array | int,
    query_ids_I: jax.Array | None = None,
    key_ids_J: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(log-sum-exp [I] over the keys of query · key + bias, mean [I, D] of the keys by these weights).

    Pairs of equal ids do not count. The first `real_queries` and `real_keys` (traced) alone are looked at. A query for
    which no key counts has about NONE, and a mean that is a number.
    """
    dim = queries_IxD.shape[1]
    width = max(16, pl.next_power_of_2(dim))
    if width > dim:
        queries_IxD, keys_JxD = (jnp.pad(x, ((0, 0), (0, width - dim))) for x in (queries_IxD, keys_JxD))
    queries = len(queries_IxD)
    tile_I, tile_J = (max(16, min(most, 64 * most // width)) for most in (QUERIES, KEYS))
    blocks = pl.cdiv(queries, tile_I)
    splits = _splits(blocks, min(32, len(keys_JxD) // (4 * tile_J)))
    real = jnp.stack([jnp.asarray(real_queries, jnp.int32), jnp.asarray(real_keys, jnp.int32)])
    ids = () if key_ids_J is None else (query_ids_I, key_ids_J)
    lse_SxI, mean_SxIxD = pl.pallas_call(
        functools.partial(_kernel, tile_I=tile_I, tile_J=tile_J),
        grid=(blocks, splits),
        out_shape=(
            jax.ShapeDtypeStruct((splits, queries), jnp.float32),
            jax.ShapeDtypeStruct((splits, queries, width), jnp.float32),
        ),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
    )(queries_IxD, keys_JxD, jnp.maximum(bias_J, NONE), real, *ids)
    lse_I, mean_IxD = lse_SxI[0], mean_SxIxD[0]
    if splits > 1:
        lse_I = jax.nn.logsumexp(lse_SxI, axis=0)
        mean_IxD = (jnp.exp(lse_SxI - lse_I)[..., None] * mean_SxIxD).sum(axis=0)
    return lse_I, mean_IxD[:, :dim]


def _splits(blocks: int, most: int) -> int:
    """Parts of the keys: the fewest that keep nearly all multiprocessors at work until the end."""
    busy = lambda splits: blocks * splits / (AT_ONCE * pl.cdiv(blocks * splits, AT_ONCE))  # noqa: E731
    return next((splits for splits in range(1, most + 1) if busy(splits) >= 0.9), max(most, 1))


def _kernel(queries_ref, keys_ref, bias_ref, real_ref, *refs, tile_I: int, tile_J: int):
    """One tile of queries, one of `splits` parts of the keys (FlashAttention's forward pass, Dao et al., 2022)."""
    *ids_refs, lse_ref, mean_ref = refs
    splits, queries = lse_ref.shape
    block, split = pl.program_id(0), pl.program_id(1)
    at_I = pl.ds(block * tile_I, tile_I)
    inside_I = block * tile_I + jnp.arange(tile_I) < queries
    queries_IxD = triton.load(queries_ref.at[at_I], mask=inside_I[:, None], other=0.0)
    real_keys = real_ref[1]

    def add(number, sums):
        top_I, sum_I, mixed_IxD = sums
        at_J = pl.ds(number * tile_J, tile_J)
        inside_J = number * tile_J + jnp.arange(tile_J) < real_keys
        keys_JxD = triton.load(keys_ref.at[at_J], mask=inside_J[:, None], other=0.0)
        logits_IxJ = queries_IxD @ keys_JxD.T
        logits_IxJ += triton.load(bias_ref.at[at_J], mask=inside_J, other=NONE)[None]
        if ids_refs:
            query_ids_I = triton.load(ids_refs[0].at[at_I], mask=inside_I, other=-1)
            key_ids_J = triton.load(ids_refs[1].at[at_J], mask=inside_J, other=-2)
            logits_IxJ = jnp.where(query_ids_I[:, None] == key_ids_J[None], NONE, logits_IxJ)
        new_I = jnp.maximum(top_I, logits_IxJ.max(axis=1))
        exp_IxJ, keep_I = jnp.exp(logits_IxJ - new_I[:, None]), jnp.exp(top_I - new_I)
        mixed_IxD = mixed_IxD * keep_I[:, None] + exp_IxJ @ keys_JxD
        return new_I, sum_I * keep_I + exp_IxJ.sum(axis=1), mixed_IxD

    tiles = (real_keys + tile_J - 1) // tile_J
    each = (tiles + splits - 1) // splits
    begin = jnp.minimum(split * each, tiles)
    end = jnp.where(block * tile_I < real_ref[0], jnp.minimum(begin + each, tiles), begin)
    start = (jnp.full(tile_I, NONE), jnp.zeros(tile_I), jnp.zeros_like(queries_IxD))
    top_I, sum_I, mixed_IxD = jax.lax.fori_loop(begin, end, add, start)
    sum_I = jnp.where(sum_I == 0, 1, sum_I)  # no key was looked at
    triton.store(lse_ref.at[split, at_I], top_I + jnp.log(sum_I), mask=inside_I)
    triton.store(mean_ref.at[split, at_I], mixed_IxD / sum_I[:, None], mask=inside_I[:, None])
