"""The downstream stage (CLUE, Sections IV-C, V-A): a pretrained user encoder, finetuned or frozen, on one task.

From scratch it is the paper's CLUEZero; what was pretrained changes nothing here.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from seqrec_jax import encoders
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.tasks import Task
from seqrec_jax.encoders.transformer import initializer
from seqrec_jax.losses.next_item import full_softmax
from seqrec_jax.systems.sasrec import NO_DROPOUT
from seqrec_jax.systems.system import System


def build(config: ConfigDict, dataset: SequenceDataset, mesh: Mesh, task: Task | None = None) -> System:
    """Softmax cross-entropy on the [UR] states: over `task`'s classes by a linear head, params["head"]; without a task
    over the items, tied, at the end of every prefix (config.task=next_item).

    config.freeze_encoder: the head alone is trained, on states without dropout (a linear probe); task.vectors_ExD:
    on these vectors, and there is no encoder.
    """
    encoder, num_items = FrozenConfigDict(config.encoder), len(dataset.item_ids)
    given = bool(config.profile.vectors)
    frozen = config.freeze_encoder or given

    def init(key):
        if given:
            params = {"vectors": jnp.asarray(task.vectors_ExD)}
        else:
            params = encoders.init(key, encoder, num_items, causal=False)
        if not task:
            return params
        rows, dim = encoders.table_rows(len(task.names)), params["vectors"].shape[1] if given else encoder.dim
        weights_CxD = initializer(encoder)(jax.random.fold_in(key, 1), (rows, dim))
        return params | {"head": jnp.pad(weights_CxD, ((0, 0), (0, 1)))}  # the bias is the last column

    def states(params, batch, key=None, hparams=NO_DROPOUT):
        if given:
            return params["vectors"][jnp.maximum(batch.users_U, 0)]
        return encoders.user_states(params, batch, encoder, key, hparams)

    def loss(params, state, batch, key, hparams, data):
        users_UxD = jax.lax.stop_gradient(states(params, batch)) if frozen else states(params, batch, key, hparams)
        fill = -len(users_UxD) % mesh.shape["data"]  # devices take equal shares of the users
        users_UxD, real_U = jnp.pad(users_UxD, ((0, fill), (0, 0))), jnp.pad(batch.length_U > 0, (0, fill))
        if task:
            class_U = jnp.pad(data["class_E"][jnp.maximum(batch.users_U, 0)], (0, fill))
            value = full_softmax(
                with_bias(users_UxD), jnp.where(real_U, class_U, 0), params["head"], len(task.names), mesh
            )
            return value, (state, {})
        target_U = jnp.pad(batch.targets_RxL.reshape(-1)[batch.last_U], (0, fill))
        value = full_softmax(users_UxD, jnp.where(real_U, target_U, 0), params["items"], num_items, mesh)
        return value, (state, {"next_item": value})

    data = {"items_A": dataset.items_A} | ({"class_E": task.class_E} if task else {})
    return System(init=init, states=states, loss=loss, data=data)


def with_bias(users_UxD: jax.Array) -> jax.Array:
    """[U, D + 1]: with a last column of ones, which the head's last column weighs."""
    return jnp.pad(users_UxD, ((0, 0), (0, 1)), constant_values=1.0)
