"""CLUE (Cheng et al., ICDM 2021), the pretraining stage: two views of a user agree, and nobody is a negative.

It hands on the item table and the encoder with its [UR] token (configs/clue_finetune.py); projector and predictor stay
behind. The paper contradicts itself on the optimiser: Section IV-A says SGD, Section V-A says Adam for everything.
Adam is the default, `train.optimizer=sgd` the other reading.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from seqrec_jax import augment, cloze, encoders
from seqrec_jax.data.batches import Batch, histories_of, place, train_lengths
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.errors import UserError
from seqrec_jax.losses import bootstrap
from seqrec_jax.losses.next_item import full_softmax
from seqrec_jax.systems.sasrec import NO_DROPOUT
from seqrec_jax.systems.system import System


def build(config: ConfigDict, dataset: SequenceDataset, mesh: Mesh) -> System:
    """`clue.pretraining` clue, or masked_items: PeterRec's objective on the same encoder, [UR] included.

    Raises UserError where batch statistics would be those of one user.
    """
    encoder, clue, num_items = FrozenConfigDict(config.encoder), config.clue, len(dataset.item_ids)
    mask_item = num_items + 1
    contrasts = clue.pretraining == "clue"
    if contrasts and len(dataset.items_A) and (train_lengths(dataset) > 0).sum() < 2:
        raise UserError("CLUE compares users by the statistics of a batch, and the data has one training user")

    def init(key):
        params = encoders.init(key, encoder, num_items, causal=False)
        heads = {}
        if contrasts:
            heads = bootstrap.init_heads(jax.random.fold_in(key, 1), encoder.dim, clue.width, clue.bottleneck)
        return params | heads

    def states(params, batch, key=None, hparams=NO_DROPOUT):
        return encoders.user_states(params, batch, encoder, key, hparams)

    def contrast(params, state, batch, key, hparams, data):
        key_views, key_a, key_b = jax.random.split(key, 3)
        view_a, view_b = two_views(key_views, batch, data["items_A"], clue.view, hparams, mask_item, encoder.positions)
        users_2xUxD = jnp.stack([states(params, view_a, key_a, hparams), states(params, view_b, key_b, hparams)])
        valid_U = batch.users_U >= 0
        valid_U &= valid_U.sum() > 1  # a user alone in a last, short step has nobody to be normalised with
        z_2xUxD, projector = bootstrap.project(users_2xUxD, valid_U, params["projector"], state["projector"])
        p_2xUxD, predictor = bootstrap.predict(z_2xUxD, valid_U, params["predictor"], state["predictor"])
        value = bootstrap.symmetrised_loss(
            p_2xUxD if clue.predictor else z_2xUxD, z_2xUxD, valid_U, stop_gradient=clue.stop_gradient
        )
        metrics = {"above_minimum": value + 1, "spread": bootstrap.spread(z_2xUxD, valid_U)}
        return value, ({"projector": projector, "predictor": predictor}, metrics)

    def masked_items(params, state, batch, key, hparams, data):
        key_mask, key_encode = jax.random.split(key)
        hidden_RxL = cloze.drawn_cells(key_mask, batch, hparams["view_share"])
        targets_RxL = jnp.where(hidden_RxL, batch.items_RxL, 0)
        batch = batch.replace(items_RxL=jnp.where(hidden_RxL, mask_item, batch.items_RxL))
        batch = encoders.append_user_token(batch, encoder.positions)
        hidden_RxLxD = encoders.encode(params, batch, encoder, key_encode, hparams, causal=False)
        hidden_NxD = hidden_RxLxD.reshape(-1, encoder.dim)
        value = full_softmax(hidden_NxD, targets_RxL.reshape(-1), params["items"], num_items, mesh)
        return value, (state, {})

    return System(
        init=init,
        states=states,
        loss=contrast if contrasts else masked_items,
        data={"items_A": dataset.items_A},
        state=bootstrap.init_statistics(clue.width, clue.bottleneck) if contrasts else {},
        judged="end",  # users may well begin alike
    )


def two_views(
    key: jax.Array, batch: Batch, items_A: jax.Array, view: str, hparams: dict, mask_item: int, positions: str
) -> tuple[Batch, Batch]:
    """Section IV-B: the history twice as it is (`view` dropout: the masks inside the encoder tell them apart), or
    changed twice: the share hparams["view_share"] of it masked, dropped as one window (crop), or shuffled in a window
    (permute).
    """
    if view == "dropout":
        return batch, batch
    items_UxL, length_U = histories_of(items_A, batch)
    share = hparams["view_share"]

    def change(key, items_L, length):
        if view == "mask":
            return augment.mask(key, items_L, length, share, mask_item)
        return (augment.drop if view == "crop" else augment.reorder)(key, items_L, length, share)

    keys_2xU = jax.random.split(key, (2, len(length_U)))
    return tuple(place(*jax.vmap(change)(keys_U, items_UxL, length_U), batch, positions) for keys_U in keys_2xU)
