"""SASRec (Kang and McAuley, ICDM 2018): a causal Transformer trained on the next item at every position."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from seqrec_jax import encoders
from seqrec_jax.augment import augment_all, draw_operators
from seqrec_jax.data.batches import histories_of, place
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.losses.negatives import negative_source
from seqrec_jax.losses.next_item import next_item_loss
from seqrec_jax.systems.system import System


def build(config: ConfigDict, dataset: SequenceDataset, mesh: Mesh) -> System:
    """`config.system` sasrec; sasrec_aug trains on augmented histories instead (CL4SRec's ablation, Table 3)."""
    encoder, num_items = FrozenConfigDict(config.encoder), len(dataset.item_ids)
    augmented = config.system == "sasrec_aug"

    def loss(params, state, batch, key, hparams, data):
        key_encode, key_loss, key_view = jax.random.split(key, 3)
        if augmented:
            batch = augmented_batch(key_view, batch, data["items_A"], config, hparams, num_items + 1)
        hidden_RxLxD = encoders.encode(params, batch, encoder, key_encode, hparams)
        value = next_item_loss(
            key_loss, hidden_RxLxD, batch, params["items"], data["negatives"], config.loss, num_items, mesh
        )
        return value, (state, {"next_item": value})

    def states(params, batch, key=None, hparams=NO_DROPOUT):
        return encoders.encode(params, batch, encoder, key, hparams, last_only=True)

    return System(
        init=lambda key: encoders.init(key, encoder, num_items),
        states=states,
        loss=loss,
        data={
            "items_A": dataset.items_A,
            "negatives": negative_source(config.loss, dataset, encoders.table_rows(num_items)),
        },
    )


NO_DROPOUT = {"embedding_dropout": 0.0, "hidden_dropout": 0.0}


def augmented_batch(key, batch, items_A, config, hparams, mask_item):
    """Training on augmented data: one random view of each training sequence, cut into inputs and next-item targets.

    The view is of the inputs and the last target together; a masked item is never a target.
    """
    key_operator, key_view = jax.random.split(key)
    items_UxL1, length_U = histories_of(items_A, batch, with_target=True)
    operator_U, _ = draw_operators(key_operator, len(length_U), config.augment.operators, config.augment.choice)
    view_UxL1, length_U = augment_all(key_view, items_UxL1, length_U, operator_U, hparams, mask_item)
    inputs_U, positions = jnp.maximum(length_U - 1, 0), config.encoder.positions
    view = place(view_UxL1[:, :-1], inputs_U, batch, positions)
    next_RxL = place(view_UxL1[:, 1:], inputs_U, batch, positions).items_RxL
    if config.train.targets == "prefix":  # the earlier targets are other examples' own
        is_last_N = jnp.zeros(next_RxL.size, bool).at[view.last_U].max(inputs_U > 0)
        next_RxL = jnp.where(is_last_N.reshape(next_RxL.shape), next_RxL, 0)
    return view.replace(targets_RxL=jnp.where(next_RxL == mask_item, 0, next_RxL))
