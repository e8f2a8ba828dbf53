"""InfoNCE between two views of the same users."""

import jax
import jax.numpy as jnp


def info_nce(
    a_UxD: jax.Array,
    b_UxD: jax.Array,
    valid_U: jax.Array,
    temperature: jax.Array,
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
    """
    states_2UxD = jnp.concatenate([a_UxD, b_UxD])
    if similarity == "cosine":
        states_2UxD /= jnp.sqrt((states_2UxD**2).sum(axis=1, keepdims=True) + 1e-12)
    users, valid_2U = a_UxD.shape[0], jnp.concatenate([valid_U, valid_U])
    logits = states_2UxD @ states_2UxD.T / temperature
    left_out = jnp.eye(2 * users, dtype=bool)
    if targets_U is not None:
        same_UxU = (targets_U[:, None] == targets_U) & ~jnp.eye(users, dtype=bool)
        left_out |= jnp.tile(same_UxU, (2, 2))
    logits = jnp.where(valid_2U[None] & ~left_out, logits, -jnp.inf)
    positive_2U = jnp.concatenate([jnp.diagonal(logits, users), jnp.diagonal(logits, -users)])
    loss_2U = jax.nn.logsumexp(jnp.where(valid_2U[:, None], logits, 0), axis=1) - positive_2U
    anchors = valid_U.sum() if directions == "summed" else valid_2U.sum()
    return jnp.where(valid_2U, loss_2U, 0).sum() / jnp.maximum(anchors, 1)
