"""Data of Beauty's size and shape, and batches ready made for the peers."""

from pathlib import Path

import jax
import numpy as np

from seqrec_jax.data.batches import Batch, Layout, batch_of, epoch_key, history_examples, make_layout, plan_epoch
from seqrec_jax.data.dataset import SequenceDataset


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


def write_lines(dataset: SequenceDataset, path: Path) -> None:
    """The histories as a file "user item item ...", which the project reads back."""
    histories = np.split(dataset.items_A, dataset.offsets_U1[1:-1])
    path.write_text("".join(f"{u} {' '.join(map(str, h))}\n" for u, h in enumerate(histories, 1)))


def ready_batches(dataset: SequenceDataset, layout: Layout, count: int) -> list[dict[str, np.ndarray]]:
    """The first `count` batches of a shuffled epoch, as the peers take them: arrays [R, L]."""
    plan, step = plan_epoch(layout, epoch_key(0, 0)), jax.jit(batch_of)
    return [_arrays(step(dataset.items_A, layout, plan, index % layout.steps)) for index in range(count)]


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
