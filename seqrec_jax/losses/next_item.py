"""Next-item losses at the real target cells: full or sampled softmax, BCE and BPR. All are means over real targets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from seqrec_jax.data.batches import Batch
from seqrec_jax.losses.negatives import NegativeSource, draw_absent, draw_shared

P = PartitionSpec


def softmax_loss(
    hidden_NxD: jax.Array,
    positive_NxD: jax.Array,
    positive_bias_N: jax.Array,
    columns_CxD: jax.Array,
    column_ids_C: jax.Array,
    column_bias_C: jax.Array,
    targets_N: jax.Array,
    mesh: Mesh,
    chunk: int,
) -> jax.Array:
    """Mean over real targets of −log softmax of the positive among itself and the columns: exact, never all logits.

    `positive_NxD` holds the target's embedding; the column whose id is the target is left out, so that the positive
    counts once. `column_bias_C` is added to the logits (−inf removes a column). Targets of 0 are no targets. Walks over
    chunks of real targets; a chunk makes its loss and all its gradients at once, so nothing is kept or computed twice,
    and `chunk * C` is the largest array. Rows are split over "data", columns over "model".
    """
    total, count = _softmax_sum(
        mesh, chunk, hidden_NxD, positive_NxD, positive_bias_N, columns_CxD, column_ids_C, column_bias_C, targets_N
    )
    return total / jnp.maximum(count, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax_sum(mesh, chunk, *arrays):
    return _softmax_forward(mesh, chunk, *arrays)[0]


def _softmax_forward(mesh, chunk, *arrays):
    rows, columns = P("data"), P("model")
    walk = jax.shard_map(
        functools.partial(_walk, chunk=chunk),
        mesh=mesh,
        in_specs=(rows, rows, rows, columns, columns, columns, rows),
        out_specs=(P(), P(), rows, rows, columns),
        check_vma=False,
    )
    total, count, *gradients = walk(*arrays)
    return (total, count), gradients


def _softmax_backward(mesh, chunk, gradients, cotangents):
    d_hidden, d_positive, d_columns = (cotangents[0] * gradient for gradient in gradients)
    return d_hidden, d_positive, None, d_columns, None, None, None


_softmax_sum.defvjp(_softmax_forward, _softmax_backward)


def _walk(hidden_NxD, positive_NxD, positive_bias_N, columns_CxD, column_ids_C, column_bias_C, targets_N, *, chunk):
    """One device's rows and columns: (loss sum, target count, d hidden, d positive, d columns)."""
    rows = hidden_NxD.shape[0]
    chunk = min(chunk, rows)
    real_N = targets_N > 0
    count = real_N.sum()
    # Real rows first. Filled up to whole chunks, because dynamic_slice would clamp a last partial one.
    order = jnp.argsort(~real_N, stable=True)
    order = jnp.concatenate([order, jnp.full(-rows % chunk, rows, order.dtype)])

    def add_chunk(index, sums):
        total, d_hidden, d_positive, d_columns = sums
        place_M = jax.lax.dynamic_slice(order, (index * chunk,), (chunk,))
        real_M = index * chunk + jnp.arange(chunk) < count
        hidden_MxD, positive_MxD, bias_M, target_M = (
            x.at[place_M].get(mode="fill", fill_value=0) for x in (hidden_NxD, positive_NxD, positive_bias_N, targets_N)
        )
        score_M = (hidden_MxD * positive_MxD).sum(axis=1) + bias_M
        logits_MxC = hidden_MxD @ columns_CxD.T + column_bias_C
        logits_MxC = jnp.where(column_ids_C == target_M[:, None], -jnp.inf, logits_MxC)
        top_M = jax.lax.pmax(jnp.maximum(logits_MxC.max(axis=1), score_M), "model")
        exp_MxC = jnp.exp(logits_MxC - top_M[:, None])
        exp_score_M = jnp.exp(score_M - top_M)
        sum_M = jax.lax.psum(exp_MxC.sum(axis=1), "model") + exp_score_M
        total += jnp.where(real_M, jnp.log(sum_M) + top_M - score_M, 0).sum()

        share_M = jnp.where(real_M, 1 / sum_M, 0)
        push_M = jnp.where(real_M, exp_score_M / sum_M - 1, 0)  # p(target) − 1
        pull_MxD = jax.lax.psum((exp_MxC @ columns_CxD) * share_M[:, None], "model")
        d_hidden = d_hidden.at[place_M].set(pull_MxD + push_M[:, None] * positive_MxD, mode="drop")
        d_positive = d_positive.at[place_M].set(push_M[:, None] * hidden_MxD, mode="drop")
        return total, d_hidden, d_positive, d_columns + exp_MxC.T @ (hidden_MxD * share_M[:, None])

    zeros = (jnp.float32(0), jnp.zeros_like(hidden_NxD), jnp.zeros_like(hidden_NxD), jnp.zeros_like(columns_CxD))
    total, d_hidden, d_positive, d_columns = jax.lax.fori_loop(0, -(-count // chunk), add_chunk, zeros)
    return (
        jax.lax.psum(total, "data"),
        jax.lax.psum(count, "data"),
        d_hidden,
        d_positive,
        jax.lax.psum(d_columns, "data"),
    )


def full_softmax(hidden_NxD, targets_N, items_VxD, num_items: int, mesh: Mesh, chunk: int) -> jax.Array:
    """Softmax over all items 1..num_items (SASRec-CE; DuoRec, Eq. 10–11)."""
    ids_V = jnp.arange(items_VxD.shape[0])
    bias_V = jnp.where((ids_V >= 1) & (ids_V <= num_items), 0.0, -jnp.inf)
    no_bias_N = jnp.zeros(targets_N.shape[0])
    return softmax_loss(hidden_NxD, items_VxD[targets_N], no_bias_N, items_VxD, ids_V, bias_V, targets_N, mesh, chunk)


def sampled_softmax(
    hidden_NxD, targets_N, items_VxD, negatives_K, log_q_V: jax.Array, mesh: Mesh, chunk: int
) -> jax.Array:
    """Softmax over the target and K shared negatives (CL4SRec, Eq. 15).

    `log_q_V`: log probability of drawing each item, taken off its logit (all zeros for the uniform draw, where the
    correction cancels). A negative that is the target of a row does not count in that row.
    """
    fill = -negatives_K.shape[0] % mesh.shape["model"]
    ids_K = jnp.concatenate([negatives_K, jnp.zeros(fill, negatives_K.dtype)])
    bias_K = jnp.where(ids_K > 0, -log_q_V[ids_K], -jnp.inf)
    return softmax_loss(
        hidden_NxD, items_VxD[targets_N], -log_q_V[targets_N], items_VxD[ids_K], ids_K, bias_K, targets_N, mesh, chunk
    )


def binary_cross_entropy(hidden_NxD, targets_N, negatives_N, items_VxD) -> jax.Array:
    """−log σ(positive) − log(1 − σ(negative)), one negative a target (SASRec's and S3-Rec's finetuning loss)."""
    positive_N, negative_N = _pair_scores(hidden_NxD, targets_N, negatives_N, items_VxD)
    return _mean(jax.nn.softplus(-positive_N) + jax.nn.softplus(negative_N), targets_N)


def bayesian_personalised_ranking(hidden_NxD, targets_N, negatives_N, items_VxD) -> jax.Array:
    """−log σ(positive − negative) (Rendle et al., UAI 2009)."""
    positive_N, negative_N = _pair_scores(hidden_NxD, targets_N, negatives_N, items_VxD)
    return _mean(jax.nn.softplus(negative_N - positive_N), targets_N)


def _pair_scores(hidden_NxD, targets_N, negatives_N, items_VxD):
    return (hidden_NxD * items_VxD[targets_N]).sum(-1), (hidden_NxD * items_VxD[negatives_N]).sum(-1)


def _mean(loss_N, targets_N):
    real_N = targets_N > 0
    return jnp.where(real_N, loss_N, 0).sum() / jnp.maximum(real_N.sum(), 1)


def next_item_loss(
    key: jax.Array, hidden_RxLxD, batch: Batch, items_VxD, source: NegativeSource, config, num_items: int, mesh: Mesh
) -> jax.Array:
    """The loss that `config.next_item` names, as a mean over the batch's real targets."""
    hidden_NxD = hidden_RxLxD.reshape(-1, hidden_RxLxD.shape[-1])
    targets_N = batch.targets_RxL.reshape(-1)
    if config.next_item == "full":
        return full_softmax(hidden_NxD, targets_N, items_VxD, num_items, mesh, chunk_rows(items_VxD.shape[0]))
    if config.next_item == "sampled":
        negatives_K = draw_shared(key, config.negatives, source, num_items)
        chunk = chunk_rows(config.negatives)
        return sampled_softmax(hidden_NxD, targets_N, items_VxD, negatives_K, source.log_q_V, mesh, chunk)
    users_N = batch.users_U[jnp.maximum(batch.segments_RxL - 1, 0)].reshape(-1)
    negatives_N = draw_absent(key, jnp.maximum(users_N, 0), source.absent, num_items)
    loss = binary_cross_entropy if config.next_item == "bce" else bayesian_personalised_ranking
    return loss(hidden_NxD, jnp.where(negatives_N > 0, targets_N, 0), negatives_N, items_VxD)


def chunk_rows(columns: int) -> int:
    """Target rows walked at once: some million logits, which stay in cache on a CPU and fill a GPU."""
    return int(np.clip(2**21 // columns, 8, 512))
