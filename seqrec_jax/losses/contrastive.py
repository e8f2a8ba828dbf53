"""InfoNCE between two views of the same users."""

import jax
import jax.numpy as jnp


def info_nce(
    a_UxD: jax.Array, b_UxD: jax.Array, valid_U: jax.Array, temperature: jax.Array, similarity: str = "dot"
) -> jax.Array:
    """CL4SRec, Eq. 2, over the N valid users of the global batch.

    Each of the 2N states is an anchor once: −log of its softmax share of the other view of the same user, among that
    and the 2(N − 1) states of other users; the mean over the 2N anchors. `similarity`: dot or cosine, divided by
    `temperature` (1 in the paper).
    """
    states_2UxD = jnp.concatenate([a_UxD, b_UxD])
    if similarity == "cosine":
        states_2UxD /= jnp.sqrt((states_2UxD**2).sum(axis=1, keepdims=True) + 1e-12)
    users, valid_2U = a_UxD.shape[0], jnp.concatenate([valid_U, valid_U])
    logits = states_2UxD @ states_2UxD.T / temperature
    itself = jnp.eye(2 * users, dtype=bool)
    logits = jnp.where(valid_2U[None] & ~itself, logits, -jnp.inf)
    positive_2U = jnp.concatenate([jnp.diagonal(logits, users), jnp.diagonal(logits, -users)])
    loss_2U = jax.nn.logsumexp(jnp.where(valid_2U[:, None], logits, 0), axis=1) - positive_2U
    return jnp.where(valid_2U, loss_2U, 0).sum() / jnp.maximum(valid_2U.sum(), 1)
