"""DuoRec (Qiu et al., WSDM 2022): next-item prediction plus contrast between prefixes that mean the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from seqrec_jax import encoders
from seqrec_jax.augment import augment_all, draw_operators
from seqrec_jax.data import batches, prefixes
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.same_target import SameTarget, draw_same_target, same_target_index
from seqrec_jax.errors import UserError
from seqrec_jax.losses.contrastive import info_nce
from seqrec_jax.losses.next_item import next_item_loss
from seqrec_jax.sharding import split_rows
from seqrec_jax.systems import sasrec
from seqrec_jax.systems.system import System

# What each prefix is encoded as, beside the next-item pass: itself or an example with the same target.
VIEWS = {
    "unsupervised": ("itself",),
    "supervised": ("same_target",),
    "both_added": ("itself", "same_target"),
    "duorec": ("itself", "same_target"),
    "cl4srec": ("itself", "itself"),  # augmented
}

SIMULATED = 200  # steps whose views are packed once, to know how many rows they need


def build(config: ConfigDict, dataset: SequenceDataset, mesh: Mesh) -> System:
    """SASRec with the contrastive regularisation of Section 4.3, or a variant of Section 5.3 (`contrastive.mode`).

    Raises UserError where the mode needs examples with the same target and there are none.
    """
    encoder, num_items, mode = FrozenConfigDict(config.encoder), len(dataset.item_ids), config.contrastive.mode
    index = same_target_index(dataset, encoder.max_length)
    system = sasrec.build(config, dataset, mesh)
    if not index.action_T.size:  # nothing to train on: a vocabulary alone, to recommend
        return system
    if "same_target" in VIEWS[mode] and jnp.diff(index.first_V1).max() < 2:
        raise UserError(
            f"contrastive.mode={mode} needs two training examples with the same target item, and the data has none; "
            "allowed: contrastive.mode=unsupervised, cl4srec"
        )
    rows = view_rows(config, dataset, index, mesh)

    def loss(params, state, batch, key, hparams, data):
        key_next, key_negatives, key_draw, key_views, key_augment, key_encode = jax.random.split(key, 6)
        items_A = data["items_A"]

        def encode(batch, key, **which):
            return encoders.encode(params, batch, encoder, key, hparams, **which)

        hidden_RxLxD = encode(batch, key_next)
        next_item = next_item_loss(  # Eq. 10, 11
            key_negatives, hidden_RxLxD, batch, params["items"], data["negatives"], config.loss, num_items, mesh
        )
        cell_P, action_P, real_P = prefixes.draw_targets(key_draw, batch, config.contrastive.pairs)
        action_PxV, length_PxV = views_of(key_views, action_P, real_P, items_A, data["same_target"], mode)
        view = prefixes.prefix_batch(
            items_A, action_PxV.reshape(-1), length_PxV.reshape(-1),
            rows=rows, width=encoder.max_length, positions=encoder.positions,
        )  # fmt: skip
        valid_P = (view.length_U.reshape(action_PxV.shape) > 0).all(axis=1)
        if mode == "cl4srec":
            view = augmented(key_augment, view, items_A, config, hparams, num_items + 1)
        view = split_rows(mesh, view)
        views_QxD = encode(view, key_encode, last_only=True)
        views_VxPxD = views_QxD.reshape(*action_PxV.shape, -1).swapaxes(0, 1)  # Eq. 12, 13
        anchor_PxD = hidden_RxLxD.reshape(-1, encoder.dim)[cell_P]
        contrast = regularisation(
            views_VxPxD, anchor_PxD, valid_P, items_A[action_P], hparams, config.contrastive, mesh
        )
        total = next_item + hparams["contrast_weight"] * contrast  # Eq. 15
        return total, (state, {"next_item": next_item, "contrast": contrast, "pairs": valid_P.sum()})

    return dataclasses.replace(system, loss=loss, data=system.data | {"same_target": index})


def views_of(
    key: jax.Array, action_P: jax.Array, real_P: jax.Array, items_A: jax.Array, index: SameTarget, mode: str
) -> tuple[jax.Array, jax.Array]:
    """(action_PxV, length_PxV): the examples that stand for each drawn one in `mode`; length 0 where none was drawn."""
    of = {"itself": action_P, "same_target": draw_same_target(key, action_P, items_A, index)}
    action_PxV = jnp.stack([of[name] for name in VIEWS[mode]], axis=1)
    return action_PxV, jnp.where(real_P[:, None], index.length_A[action_PxV], 0)


def augmented(key, view, items_A, config, hparams, mask_item):
    """CL4SRec's two views of each prefix: neighbours in `view`, each through an operator drawn for it."""
    key_operators, key_views = jax.random.split(key)
    items_QxL, length_Q = batches.histories_of(items_A, view)
    operators = draw_operators(key_operators, len(length_Q) // 2, config.augment.operators, config.augment.choice)
    operator_Q = jnp.stack(operators, axis=1).reshape(-1)
    changed = augment_all(key_views, items_QxL, length_Q, operator_Q, hparams, mask_item)
    return batches.place(*changed, view, config.encoder.positions)


def regularisation(views_VxPxD, anchor_PxD, valid_P, targets_P, hparams, contrastive, mesh):
    """Eq. 14 between the two views, or between the next-item state and each view."""
    two_views = contrastive.mode in ("duorec", "cl4srec")
    positives = [tuple(views_VxPxD)] if two_views else [(anchor_PxD, view_PxD) for view_PxD in views_VxPxD]
    return sum(
        info_nce(
            *positive, valid_P, hparams["temperature"], mesh, contrastive.similarity,
            targets_U=targets_P if contrastive.same_target_negatives == "removed" else None,
            directions=contrastive.directions,
        )
        for positive in positives
    )  # fmt: skip


def view_rows(config: ConfigDict, dataset: SequenceDataset, index: SameTarget, mesh: Mesh) -> int:
    """Rows that the views of a step share: four standard deviations above the mean of some steps, tried once.

    Never more than one a view, which is always enough; filled up to what mesh.data divides. In the rare step that needs
    more, the last pairs, in an order drawn at random, leave the contrast: the metric `pairs` counts those that stay.
    """
    train, width, mode = config.train, config.encoder.max_length, config.contrastive.mode
    pairs, examples = config.contrastive.pairs, batches.train_examples(dataset, train.targets, width)
    last_target_only = train.targets == "prefix"
    layout = batches.layout_of(examples, train.batch_size, config, mesh, last_target_only=last_target_only)

    def needed(layout, items_A, index):
        plan = batches.plan_epoch(layout, jax.random.key(0))

        def of_step(step):
            key_draw, key_views = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
            batch = batches.batch_of(items_A, layout, plan, step % layout.steps)
            _, action_P, real_P = prefixes.draw_targets(key_draw, batch, pairs)
            _, length_PxV = views_of(key_views, action_P, real_P, items_A, index, mode)
            return prefixes.next_fit(length_PxV.reshape(-1), width)[0].max() + 1

        return jax.lax.map(of_step, jnp.arange(SIMULATED))

    rows_S = np.asarray(jax.jit(needed)(layout, dataset.items_A, index))
    rows = min(int(np.ceil(rows_S.mean() + 4 * rows_S.std())), pairs * len(VIEWS[mode]))
    return -(-rows // mesh.shape["data"]) * mesh.shape["data"]
