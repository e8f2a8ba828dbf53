"""CL4SRec (Xie et al., SIGIR 2021): next-item prediction plus contrast between two augmented views of each user."""

import dataclasses

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from seqrec_jax import encoders
from seqrec_jax.augment import augment_all, draw_operators
from seqrec_jax.data.batches import Batch, histories_of, place
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.losses.contrastive import info_nce
from seqrec_jax.losses.next_item import next_item_loss
from seqrec_jax.systems import sasrec
from seqrec_jax.systems.system import System


def build(config: ConfigDict, dataset: SequenceDataset, mesh: Mesh) -> System:
    """SASRec (Section 3.4) with the multi-task loss of Section 3.5."""
    encoder, num_items = FrozenConfigDict(config.encoder), len(dataset.item_ids)
    mask_item = num_items + 1

    def loss(params, state, batch, key, hparams, data):
        key_next, key_negatives, key_views, key_a, key_b = jax.random.split(key, 5)

        def encode(batch, key, **which):
            return encoders.encode(params, batch, encoder, key, hparams, **which)

        next_item = next_item_loss(  # Eq. 15
            key_negatives, encode(batch, key_next), batch, params["items"], data["negatives"],
            config.loss, num_items, mesh,
        )  # fmt: skip
        view_a, view_b = two_views(key_views, batch, data["items_A"], config, hparams, mask_item)  # Section 3.3
        users_a_UxD = encode(view_a, key_a, last_only=True)  # Section 3.2.2
        users_b_UxD = encode(view_b, key_b, last_only=True)
        contrast = info_nce(  # Eq. 2
            users_a_UxD, users_b_UxD, batch.users_U >= 0, hparams["temperature"], mesh, config.contrastive.similarity
        )
        total = next_item + hparams["contrast_weight"] * contrast  # Eq. 14
        return total, (state, {"next_item": next_item, "contrast": contrast})

    return dataclasses.replace(sasrec.build(config, dataset, mesh), loss=loss)


def two_views(key: jax.Array, batch: Batch, items_A: jax.Array, config: ConfigDict, hparams: dict, mask_item: int):
    """Each history twice, each time through an operator drawn for it: two batches."""
    key_operators, key_a, key_b = jax.random.split(key, 3)
    items_UxL, length_U = histories_of(items_A, batch)
    operators = draw_operators(key_operators, len(length_U), config.augment.operators, config.augment.choice)
    return tuple(
        place(*augment_all(key_view, items_UxL, length_U, operator_U, hparams, mask_item), batch,
              config.encoder.positions)
        for key_view, operator_U in zip((key_a, key_b), operators, strict=True)
    )  # fmt: skip
