"""S3-Rec's objectives (Zhou et al., CIKM 2020, Section 4.3): each a bound on the mutual information of two views.

All are sums over what they are given, and come in two forms, f(x, y) = σ(xᵀ W y) in both:
  paper   −E[f(x, y) − log Σ exp f(x, ỹ)], Eq. 3, the sum over negatives ỹ alone, as Eq. 10 to 16 have it;
  code    what the published code minimises: for attributes the binary cross-entropy of every attribute with the logit
          xᵀ W y, for items and segments −log σ(f(x, y) − f(x, ỹ)), a sigmoid of sigmoids.
There W has a bias on the side of x.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.losses.softmax import chunk_rows, real_first

P = PartitionSpec


@struct.dataclass
class ItemAttributes:
    """The items' sets on the device, in CSR form; rows of zeros and ones are made where they are needed."""

    ids_N: jax.Array  # rows of the attribute table
    first_V2: jax.Array  # item v has ids_N[first_V2[v] : first_V2[v + 1]]
    most: int = struct.field(pytree_node=False)  # attributes of the item with the most


def item_attributes(dataset: SequenceDataset) -> ItemAttributes:
    """From `dataset`, which has attributes; padding has none."""
    offsets_V1 = dataset.attribute_offsets_V1
    first_V2 = jnp.asarray(np.concatenate([[0], offsets_V1]), jnp.int32)
    return ItemAttributes(jnp.asarray(dataset.attributes_N - 1, jnp.int32), first_V2, int(np.diff(offsets_V1).max()))


def multi_hot(items_M: jax.Array, attributes: ItemAttributes, count: int) -> jax.Array:
    """[M, count] bool: which attributes each item has."""
    begin_M, end_M = attributes.first_V2[items_M], attributes.first_V2[items_M + 1]
    place_MxP = begin_M[:, None] + jnp.arange(attributes.most)
    inside_MxP = place_MxP < end_M[:, None]
    ids_MxP = jnp.where(inside_MxP, attributes.ids_N[jnp.where(inside_MxP, place_MxP, 0)], count)
    return jnp.zeros((len(items_M), count), bool).at[jnp.arange(len(items_M))[:, None], ids_MxP].set(True, mode="drop")


def project(x_NxD: jax.Array, linear: dict) -> jax.Array:
    """xᵀ W, and in the code's form its bias."""
    return x_NxD @ linear["kernel"] + linear.get("bias", 0.0)


# Attributes -----------------------------------------------------------------------------------------------------------


def associated_attribute_prediction(
    x_NxD: jax.Array, items_N: jax.Array, linear: dict, table_AxD: jax.Array, attributes: ItemAttributes, form: str,
    mesh: Mesh,
) -> jax.Array:  # fmt: skip
    """AAP, Eq. 10 and 11: an item and its attributes. `x_NxD`: the item's embedding (paper), or the encoder's state at
    the item (code); items_N is 0 where nothing counts, and items without attributes do not count.
    """
    known_N = attributes.first_V2[items_N + 1] > attributes.first_V2[items_N]
    terms = _entropy if form == "code" else _information
    return _sum(terms, mesh, project(x_NxD, linear), table_AxD, jnp.where(known_N, items_N, 0), attributes)


def masked_attribute_prediction(x_NxD, items_N, linear, table_AxD, attributes, form, mesh) -> jax.Array:
    """MAP, Eq. 14 and 15: a masked item's context and its attributes. `x_NxD`: the states at masked places; otherwise
    as associated_attribute_prediction, with a map of its own.
    """
    return associated_attribute_prediction(x_NxD, items_N, linear, table_AxD, attributes, form, mesh)


def _entropy(x_MxD, table_AxD, own_MxA, real_M):
    logits_MxA = x_MxD @ table_AxD.T
    return jnp.where(real_M, (jax.nn.softplus(logits_MxA) - own_MxA * logits_MxA).sum(axis=1), 0).sum()


def _information(x_MxD, table_AxD, own_MxA, real_M):
    """The mean over the item's attributes; negatives are all that it does not have. One that has all counts not."""
    f_MxA, own_M = jax.nn.sigmoid(x_MxD @ table_AxD.T), own_MxA.sum(axis=1)
    counts_M = real_M & (own_M > 0) & (own_M < own_MxA.shape[1])
    others_M = jnp.where(counts_M, jnp.where(own_MxA, 0, jnp.exp(f_MxA)).sum(axis=1), 1)
    mean_M = jnp.where(own_MxA, f_MxA, 0).sum(axis=1) / jnp.maximum(own_M, 1)
    return jnp.where(counts_M, jnp.log(others_M) - mean_M, 0).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(terms, mesh, x_NxD, table_AxD, items_N, attributes):
    """The sum of `terms` over items_N > 0, in chunks of these, loss and gradients at once: the largest array is a
    chunk of N x A, and places that do not count cost nothing. N is split over the mesh's "data".
    """
    return _forward(terms, mesh, x_NxD, table_AxD, items_N, attributes)[0]


def _forward(terms, mesh, *arrays):
    rows = P("data")
    walk = jax.shard_map(
        functools.partial(_walk, terms), mesh=mesh,
        in_specs=(rows, P(), rows, P()), out_specs=(P(), rows, P()), check_vma=False,
    )  # fmt: skip
    total, *gradients = walk(*arrays)
    return total, gradients


def _backward(terms, mesh, gradients, cotangent):
    d_x, d_table = (cotangent * gradient for gradient in gradients)
    return d_x, d_table, None, None


_sum.defvjp(_forward, _backward)


def _walk(terms, x_NxD, table_AxD, items_N, attributes):
    """One device's places: (sum, d x, d table)."""
    rows, count = len(items_N), (items_N > 0).sum()
    chunk = min(chunk_rows(len(table_AxD)), rows)
    order = real_first(items_N > 0, chunk)

    def add_chunk(index, sums):
        total, d_x, d_table = sums
        place_M = jax.lax.dynamic_slice(order, (index * chunk,), (chunk,))
        take = lambda x_N: x_N.at[place_M].get(mode="fill", fill_value=0)  # noqa: E731
        item_M = take(items_N)
        own_MxA = multi_hot(item_M, attributes, len(table_AxD))
        found, (d_x_MxD, d_table_AxD) = jax.value_and_grad(terms, (0, 1))(take(x_NxD), table_AxD, own_MxA, item_M > 0)
        return total + found, d_x.at[place_M].set(d_x_MxD, mode="drop"), d_table + d_table_AxD

    zeros = (jnp.float32(0), jnp.zeros_like(x_NxD), jnp.zeros_like(table_AxD))
    total, d_x, d_table = jax.lax.fori_loop(0, -(-count // chunk), add_chunk, zeros)
    total, d_table = jax.lax.psum((total, d_table), "data")
    return total, d_x, d_table


# Items and segments ---------------------------------------------------------------------------------------------------


def masked_item_prediction(
    x_NxD: jax.Array, items_N: jax.Array, negatives_NxK: jax.Array, linear: dict, items_VxD: jax.Array, form: str
) -> jax.Array:
    """MIP, Eq. 12 and 13: a masked item's context (the state at its place) and the item, against K items drawn for it
    (the code has one). items_N is 0 where nothing counts; nor does a place with a negative of 0.
    """
    x_NxD = project(x_NxD, linear)
    positive_N = (x_NxD * items_VxD[items_N]).sum(axis=1)
    negative_NxK = jnp.einsum("nd,nkd->nk", x_NxD, items_VxD[negatives_NxK])
    return _pairs(positive_N, negative_NxK, (items_N > 0) & (negatives_NxK > 0).all(axis=1), form)


def segment_prediction(
    context_UxD: jax.Array, segment_UxD: jax.Array, corrupted_UxD: jax.Array, real_U: jax.Array, linear: dict, form: str
) -> jax.Array:
    """SP, Eq. 16 and 17: a segment's context and the segment, against one corrupted segment; states of last places."""
    context_UxD = project(context_UxD, linear)
    positive_U, negative_U = ((context_UxD * other_UxD).sum(axis=1) for other_UxD in (segment_UxD, corrupted_UxD))
    return _pairs(positive_U, negative_U[:, None], real_U, form)


def _pairs(positive_N, negative_NxK, real_N, form):
    f_N, f_NxK = jax.nn.sigmoid(positive_N), jax.nn.sigmoid(negative_NxK)
    if form == "code":
        loss_N = jax.nn.softplus(f_NxK - f_N[:, None]).mean(axis=1)
    else:
        loss_N = jax.nn.logsumexp(f_NxK, axis=1) - f_N
    return jnp.where(real_N, loss_N, 0).sum()
