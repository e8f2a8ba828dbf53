"""InfoNCE between two views of the same users."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from seqrec_jax.losses.softmax import softmax_loss
from seqrec_jax.sharding import replicated


def info_nce(
    a_UxD: jax.Array,
    b_UxD: jax.Array,
    valid_U: jax.Array,
    temperature: jax.Array,
    mesh: Mesh,
    similarity: str = "dot",
    *,
    targets_U: jax.Array | None = None,
    directions: str = "averaged",
) -> jax.Array:
    """CL4SRec, Eq. 2, and DuoRec, Eq. 14, over the N valid users of the global batch.

    Each of the 2N states is an anchor once: −log of its softmax share of the other view of the same user, among that
    and the 2(N − 1) states of other users; the mean over the 2N anchors, or (`directions` summed, Eq. 14) the sum of
    the two views' means. `similarity`: dot or cosine, divided by `temperature` (1 in both papers). With `targets_U`,
    states of other users with the anchor's target are no negatives (DuoRec, Section 4.3.3).

    This is the softmax loss with the states as columns, a user's (or a target's) own ones left out; so its largest
    array is a chunk of the 2N x 2N similarities.
    """
    # Whole on every device, and so their gradients: on a mesh with two axes that does not divide the users, XLA (JAX
    # 0.10 to 0.12) would scatter a wrong gradient into the first row.
    a_UxD, b_UxD = replicated(mesh, (a_UxD, b_UxD))
    states_2UxD, others_2UxD = jnp.concatenate([a_UxD, b_UxD]), jnp.concatenate([b_UxD, a_UxD])
    if similarity == "cosine":
        states_2UxD, others_2UxD = unit(states_2UxD), unit(others_2UxD)
    ids_U = jnp.arange(1, len(valid_U) + 1) if targets_U is None else targets_U
    ids_2U = jnp.tile(jnp.where(valid_U, ids_U, 0), 2)
    fill = -len(ids_2U) % math.lcm(mesh.shape["data"], mesh.shape["model"])
    filled = lambda x: jnp.pad(x, ((0, fill), (0, 0))[: x.ndim])  # noqa: E731
    ids_N, states_NxD = filled(ids_2U), filled(states_2UxD)
    bias_N = jnp.where(ids_N > 0, 0.0, -jnp.inf)
    mean = softmax_loss(
        states_NxD / temperature, filled(others_2UxD), states_NxD, bias_N, ids_N, mesh, column_ids_C=ids_N
    )
    return 2 * mean if directions == "summed" else mean


def unit(x_NxD: jax.Array) -> jax.Array:
    """Rows of length 1; a row of zeros stays, with finite gradients."""
    return x_NxD / jnp.sqrt((x_NxD**2).sum(axis=-1, keepdims=True) + 1e-12)
