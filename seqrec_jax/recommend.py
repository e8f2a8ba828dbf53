"""Top-k items for histories never seen, from a checkpoint alone."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax import checkpoint, systems
from seqrec_jax import config as configuration
from seqrec_jax.data.batches import rows_of
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.errors import UserError
from seqrec_jax.protocol import ranks_items
from seqrec_jax.sharding import make_mesh

GROUP = 64  # histories scored at once


@dataclasses.dataclass(frozen=True)
class Recommendations:
    """For each history: items in the users' own ids, best first, and their scores; and the ids nobody knew."""

    items: list[list[str]]
    scores: list[list[float]]
    unknown: list[list[str]]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """What a checkpoint holds, ready to be asked."""

    system: systems.System
    params: dict
    item_ids: np.ndarray
    config: ConfigDict  # of the run
    meta: dict  # of the checkpoint


@dataclasses.dataclass(frozen=True, eq=False)
class Recommender:
    """Ranks items by a trained model."""

    model: Model

    def recommend(
        self, histories: Sequence[Sequence[str]], k: int = 10, *, hide_history: bool = True
    ) -> Recommendations:
        """The k best items for each history (the items' own ids, oldest first), equal scores by lower id.

        Unknown ids are left out and reported. The ranking is that of the evaluation. Raises UserError if a history
        has no known item, or fewer than k items remain.
        """
        if isinstance(k, bool) or not hasattr(k, "__index__"):
            raise UserError(f"k={k!r} is no whole number")
        if isinstance(histories, str) or any(isinstance(history, str) for history in histories):
            raise UserError('histories are lists of item ids, as in [["12", "7"]], not text')
        item_ids = self.model.item_ids
        dense = {item: row for row, item in enumerate(item_ids.tolist(), 1)}
        known = [[dense[str(item)] for item in history if str(item) in dense] for history in histories]
        for number, (history, items) in enumerate(zip(histories, known, strict=True), 1):
            if not items:
                raise UserError(f"history {number} ({', '.join(map(str, history))}) has no item this model knows")
            left = len(item_ids) - (len(set(items)) if hide_history else 0)
            if not left:
                raise UserError(f"history {number} covers the whole catalogue: there is nothing left to recommend")
            if not 1 <= k <= left:
                raise UserError(f"k={k} is out of range for history {number}; allowed: 1 to {left}")
        result = Recommendations([], [], [])
        for begin in range(0, len(known), GROUP):
            group = known[begin : begin + GROUP]
            scores_UxV = np.array(self._scores(self.model.params, *self._flat(group)))[: len(group)]
            for items, scores_V in zip(group, scores_UxV, strict=True):
                scores_V[0] = scores_V[len(item_ids) + 1 :] = -np.inf
                if hide_history:
                    scores_V[items] = -np.inf
                best = np.argsort(-scores_V, kind="stable")[:k]
                result.items.append(item_ids[best - 1].tolist())
                result.scores.append(scores_V[best].tolist())
        unknown = ([str(item) for item in history if str(item) not in dense] for history in histories)
        result.unknown.extend(unknown)
        return result

    def _flat(self, group: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The last max_length items of GROUP histories one after the other, each in max_length places; lengths."""
        width = self.model.config.encoder.max_length
        items, lengths = np.zeros((GROUP, width), np.int32), np.zeros(GROUP, np.int32)
        for row, history in enumerate(group):
            recent = history[-width:]
            items[row, : len(recent)], lengths[row] = recent, len(recent)
        return items.reshape(-1), lengths

    @functools.partial(jax.jit, static_argnums=0)  # compiled once for a Recommender
    def _scores(self, params, items_A, length_U):
        rows, encoder = jnp.arange(GROUP), self.model.config.encoder
        batch = rows_of(
            items_A,
            users_U=rows,
            start_U=rows * encoder.max_length,
            length_U=length_U,
            row_U=rows,
            column_U=jnp.zeros(GROUP, jnp.int32),
            rows=GROUP,
            width=encoder.max_length + encoder.user_token,
            last_target_only=False,
            positions=encoder.positions,
        )
        states_UxD = self.model.system.states(params, batch)
        return jnp.matmul(states_UxD, params["items"].T, precision=jax.lax.Precision.HIGHEST)


def load_model(workdir: Path, mesh: Mesh, name: str = "best") -> Model:
    """A checkpoint of `workdir` (best, last, ...) on `mesh`, with no data file."""
    store, step, meta = checkpoint.find(workdir, name)
    config = configuration.from_dict(meta["config"])
    with config.unlocked():
        config.loss.next_item = "full"  # nothing is trained here, so no negatives are prepared
    nothing, item_ids = np.zeros(0, np.int32), np.array(meta["items"])
    vocabulary = SequenceDataset(nothing, np.zeros(1, np.int64), item_ids, np.array([], str), meta["dataset_hash"], {})
    system = systems.build(config, vocabulary, mesh)
    return Model(system, checkpoint.restore_params(store, step, mesh), item_ids, config, meta)


def load(workdir: str | Path) -> Recommender:
    """The best model of `workdir`, from its checkpoint alone (no data file)."""
    workdir = Path(workdir).expanduser()
    model = load_model(workdir, make_mesh(1, 1))
    if not ranks_items(model.config):
        raise UserError(
            f"{workdir}: its users do not rank items (system={model.config.system}); start a finetuning from it"
        )
    return Recommender(model)
