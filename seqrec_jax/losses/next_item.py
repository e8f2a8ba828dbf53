"""Next-item losses at the real target cells: full or sampled softmax, BCE and BPR. All are means over real targets."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from seqrec_jax.data.batches import Batch
from seqrec_jax.losses.negatives import NegativeSource, draw_absent, draw_shared
from seqrec_jax.losses.softmax import softmax_loss


def full_softmax(
    hidden_NxD: jax.Array, targets_N: jax.Array, items_VxD: jax.Array, num_items: int, mesh: Mesh
) -> jax.Array:
    """Softmax over all items 1..num_items (DuoRec, Eq. 10–11)."""
    ids_V = jnp.arange(items_VxD.shape[0])
    bias_V = jnp.where((ids_V >= 1) & (ids_V <= num_items), 0.0, -jnp.inf)
    return softmax_loss(hidden_NxD, items_VxD[targets_N], items_VxD, bias_V, targets_N, mesh)


def sampled_softmax(
    hidden_NxD: jax.Array,
    targets_N: jax.Array,
    items_VxD: jax.Array,
    negatives_K: jax.Array,
    bias_V: jax.Array,
    mesh: Mesh,
    others_N: jax.Array | None = None,
) -> jax.Array:
    """Softmax over the target and K shared negatives (CL4SRec, Eq. 15).

    `bias_V` is added to the logits of drawn items. A negative that is the target of a row does not count in that row.
    `others_N`: log-sum-exp of further negatives of each row's own.
    """
    fill = -negatives_K.shape[0] % mesh.shape["model"]
    ids_K = jnp.concatenate([negatives_K, jnp.zeros(fill, negatives_K.dtype)])
    bias_K = jnp.where(ids_K > 0, bias_V[ids_K], -jnp.inf)
    return softmax_loss(
        hidden_NxD,
        items_VxD[targets_N],
        items_VxD[ids_K],
        bias_K,
        targets_N,
        mesh,
        column_ids_C=ids_K,
        others_N=others_N,
    )


def history_mass(hidden_RxLxD: jax.Array, batch: Batch, items_VxD: jax.Array) -> jax.Array:
    """[N] log-sum-exp of the scores of each history's own items so far, each once and the target not; −inf: none."""
    items_RxL, segments_RxL = batch.items_RxL, batch.segments_RxL
    scores_RxLxL = jnp.einsum("rld,rkd->rlk", hidden_RxLxD, items_VxD[items_RxL])
    together_RxLxL = segments_RxL[:, :, None] == segments_RxL[:, None]
    earlier_LxL = jnp.tril(jnp.ones((items_RxL.shape[1],) * 2, bool), -1)
    met_RxLxL = (items_RxL[:, :, None] == items_RxL[:, None]) & together_RxLxL & earlier_LxL
    counts_RxLxL = together_RxLxL & (earlier_LxL | jnp.eye(len(earlier_LxL), dtype=bool))
    counts_RxLxL &= ~met_RxLxL.any(axis=2)[:, None] & (items_RxL[:, None] != batch.targets_RxL[:, :, None])
    any_RxLx1 = counts_RxLxL.any(axis=2, keepdims=True)
    mass_RxL = jax.nn.logsumexp(jnp.where(counts_RxLxL | ~any_RxLx1, scores_RxLxL, -jnp.inf), axis=2)
    return jnp.where(any_RxLx1[..., 0], mass_RxL, -jnp.inf).reshape(-1)


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
        return full_softmax(hidden_NxD, targets_N, items_VxD, num_items, mesh)
    if config.next_item == "sampled":
        negatives_K = draw_shared(key, config.negatives, source, num_items)
        others_N = history_mass(hidden_RxLxD, batch, items_VxD) if config.history_negatives else None
        return sampled_softmax(hidden_NxD, targets_N, items_VxD, negatives_K, source.bias_V, mesh, others_N)
    users_N = batch.users_U[jnp.maximum(batch.segments_RxL - 1, 0)].reshape(-1)
    negatives_N = draw_absent(key, jnp.maximum(users_N, 0), source.absent, num_items)
    loss = binary_cross_entropy if config.next_item == "bce" else bayesian_personalised_ranking
    return loss(hidden_NxD, jnp.where(negatives_N > 0, targets_N, 0), negatives_N, items_VxD)
