"""Data of Beauty's size and shape, and batches ready made for the peers."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from seqrec_jax.data.batches import (
    Batch,
    Layout,
    batch_of,
    epoch_key,
    history_examples,
    make_layout,
    plan_epoch,
    rows_of,
)
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.same_target import draw_same_target, same_target_index
from seqrec_jax.systems import hparams_of, s3rec

ATTRIBUTES, MOST = 637, 6  # of Beauty: how many there are, and an item has at most; here 3.5 on average (3.7)


def made_up(users: int, items: int, seed: int = 0) -> SequenceDataset:
    """Random histories of 5 items and more with the long tail of Beauty's, over items of Zipf popularity.

    At 22,363 users: mean length 8.9 (Beauty: 8.9), 99th percentile 41 (43), 3,347 of 131,810 training targets older
    than 50 items (3,382 of 131,413). Every item occurs if there are enough actions.
    """
    generator = np.random.default_rng(seed)
    lengths_U = 5 + np.floor(generator.lognormal(0.7, 1.25, users)).astype(np.int64)
    actions = lengths_U.sum()
    popularity_V = np.cumsum(1 / np.arange(1, items + 1) ** 0.8)
    drawn_A = np.searchsorted(popularity_V, generator.random(max(actions - items, 0)) * popularity_V[-1]) + 1
    items_A = generator.permutation(np.concatenate([np.arange(1, items + 1), drawn_A]))[:actions].astype(np.int32)
    offsets_U1 = np.concatenate([[0], np.cumsum(lengths_U)])
    names = [np.arange(1, count + 1).astype(np.str_) for count in (items, users)]
    return SequenceDataset(items_A, offsets_U1, *names, hash=f"made-up-{users}-{items}-{seed}", report={})


def with_attributes(dataset: SequenceDataset, count: int = ATTRIBUTES, seed: int = 0) -> SequenceDataset:
    """`dataset` with 1 to MOST of `count` attributes of Zipf popularity for each item."""
    generator = np.random.default_rng(seed)
    share_A = 1 / np.arange(1, count + 1)
    sizes_V = generator.integers(1, MOST + 1, len(dataset.item_ids))
    sets = [np.sort(generator.choice(count, size, replace=False, p=share_A / share_A.sum())) + 1 for size in sizes_V]
    return dataclasses.replace(
        dataset,
        attributes_N=np.concatenate(sets).astype(np.int32),
        attribute_offsets_V1=np.concatenate([[0], np.cumsum(sizes_V)]),
        attribute_names=np.arange(1, count + 1).astype(np.str_),
    )


def multi_hot(dataset: SequenceDataset) -> np.ndarray:
    """[items, attributes] bool: which attributes each item has."""
    found_VxA = np.zeros((len(dataset.item_ids), len(dataset.attribute_names)), bool)
    item_N = np.repeat(np.arange(len(found_VxA)), np.diff(dataset.attribute_offsets_V1))
    found_VxA[item_N, dataset.attributes_N - 1] = True
    return found_VxA


def write_lines(dataset: SequenceDataset, path: Path) -> None:
    """The histories as a file "user item item ...", which the project reads back."""
    histories = np.split(dataset.items_A, dataset.offsets_U1[1:-1])
    path.write_text("".join(f"{u} {' '.join(map(str, h))}\n" for u, h in enumerate(histories, 1)))


def ready_batches(dataset: SequenceDataset, layout: Layout, count: int) -> list[dict[str, np.ndarray]]:
    """The first `count` batches of a shuffled epoch, as the peers take them: arrays [R, L]."""
    plan, step = plan_epoch(layout, epoch_key(0, 0)), jax.jit(batch_of)
    return [_arrays(step(dataset.items_A, layout, plan, index % layout.steps)) for index in range(count)]


def same_target_batches(dataset: SequenceDataset, layout: Layout, count: int) -> list[dict[str, np.ndarray]]:
    """For the prefixes of `ready_batches`, one a row: in the same row another prefix with the same target."""
    plan, index = plan_epoch(layout, epoch_key(0, 0)), same_target_index(dataset, layout.width)

    @jax.jit
    def step(items_A, number):
        batch = batch_of(items_A, layout, plan, number % layout.steps)
        real_U, key = batch.length_U > 0, jax.random.key(number)
        action_U = draw_same_target(key, jnp.where(real_U, batch.start_U + batch.length_U, 0), items_A, index)
        length_U = jnp.where(real_U, index.length_A[action_U], 0)
        return rows_of(
            items_A, users_U=batch.users_U, start_U=action_U - length_U, length_U=length_U, row_U=batch.row_U,
            column_U=batch.column_U, rows=layout.rows, width=layout.width, last_target_only=True,
            positions=layout.positions,
        )  # fmt: skip

    return [_arrays(step(dataset.items_A, number)) for number in range(count)]


def cloze_batches(dataset: SequenceDataset, layout: Layout, count: int, config: ConfigDict) -> list[dict]:
    """Batches of S3-Rec's pretraining, drawn as its loss draws them with the batch's number as key: `items` [4, R, L]
    of the views, `known` (the items themselves), `masked` and `negatives` [R, L], `last` and `segmented` [U].
    """
    plan, mask_item, hparams = plan_epoch(layout, epoch_key(0, 0)), len(dataset.item_ids) + 1, hparams_of(config)
    data = s3rec.build(config, dataset, None).data

    @jax.jit
    def step(data, number):
        batch = batch_of(data["items_A"], layout, plan, number % layout.steps)
        key_views, _, key_negatives = jax.random.split(jax.random.key(number), 3)
        views, masked_N, segmented_U = s3rec.views_of(
            key_views, batch, data, hparams, s3rec.OBJECTIVES, config.s3rec, mask_item
        )
        negatives_N = s3rec.draw_negatives(key_negatives, batch, data["negatives"], 1)
        return batch, {
            "items": jnp.stack([*views.values()]),
            "known": batch.items_RxL,
            "masked": masked_N.reshape(batch.items_RxL.shape),
            "negatives": negatives_N.reshape(batch.items_RxL.shape),
            "last": batch.last_U,
            "segmented": segmented_U,
        }

    made = (step(data, number) for number in range(count))
    return [_arrays(batch) | jax.tree.map(np.asarray, drawn) for batch, drawn in made]


def evaluation_batches(dataset: SequenceDataset, batch_size: int, width: int) -> list[dict[str, np.ndarray]]:
    """Every evaluated user's test input, one a row, with `last` [U] (flat index of the last input), `target` [U] and
    the history to hide, as pairs `hidden_user`, `hidden_item` [H].
    """
    layout = make_layout(history_examples(dataset, 1, width), batch_size, width, packed=False)
    plan, step, found = plan_epoch(layout, None), jax.jit(batch_of), []
    for index in range(layout.steps):
        batch = jax.device_get(step(dataset.items_A, layout, plan, index))
        users_U = batch.users_U[batch.users_U >= 0]
        begin_U, end_U = dataset.offsets_U1[users_U], dataset.offsets_U1[users_U + 1] - 1
        found.append(
            _arrays(batch)
            | {
                "last": np.asarray(batch.last_U)[batch.users_U >= 0],
                "target": dataset.items_A[end_U],
                "hidden_user": np.repeat(np.arange(len(users_U)), end_U - begin_U),
                "hidden_item": np.concatenate([dataset.items_A[b:e] for b, e in zip(begin_U, end_U, strict=True)]),
            }
        )
    return found


def _arrays(batch: Batch) -> dict[str, np.ndarray]:
    names = ("items", "segments", "positions", "targets")
    return {name: np.asarray(getattr(batch, f"{name}_RxL")) for name in names}
