"""Metrics of a downstream task: accuracy and F1 of a profile, the exact rank of the target of a cold start."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax import ranking
from seqrec_jax.data.batches import Layout, batch_of, layout_of, plan_epoch
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.tasks import Task
from seqrec_jax.evaluate import BLOCK_SCORES
from seqrec_jax.protocol import Protocol, protocol_of
from seqrec_jax.sharding import replicate, replicated, split_rows
from seqrec_jax.systems import System
from seqrec_jax.systems.downstream import with_bias


@dataclasses.dataclass(frozen=True, eq=False)
class TaskEvaluator:
    """One part of a task's examples, ready on the device."""

    protocol: Protocol
    layout: Layout
    items_A: jax.Array
    class_E: jax.Array
    classes: int
    ranks: bool  # the target is one of many, found or not by its rank; else the best class is right or wrong
    mesh: Mesh

    def __call__(self, system: System, params: dict) -> dict[str, float]:
        """Metrics over all examples, each counted once."""
        class_E, *found_E = self._run(system, params)
        if self.ranks:
            return ranking.metrics(*found_E, np.zeros(len(class_E), bool))
        return profile_metrics(confusion(class_E, found_E[0], self.classes))

    def confusion(self, system: System, params: dict) -> np.ndarray:
        """[C, C] examples of each class (row) that were taken for each class (column)."""
        return confusion(*self._run(system, params), self.classes)

    def _run(self, system, params) -> list[np.ndarray]:
        """Of every example: its class, then (greater, tied) or the best class."""
        plan = plan_epoch(self.layout, None)
        static = system.states, self.classes, self.ranks, self.mesh
        arrays = params, self.items_A, self.class_E, self.layout, plan
        parts = [_step(*static, *arrays, step) for step in range(self.layout.steps)]
        real_E, *columns_E = (np.concatenate(column) for column in zip(*jax.device_get(parts), strict=True))
        return [column_E[real_E] for column_E in columns_E]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # one program for all folds of equal shape
def _step(states, classes, ranks, mesh, params, items_A, class_E, layout, plan, step):
    batch = split_rows(mesh, batch_of(items_A, layout, plan, step))
    users_UxD, class_U = with_bias(states(params, batch)), class_E[jnp.maximum(batch.users_U, 0)]
    if ranks:
        block = max(BLOCK_SCORES // len(class_U), 1024)
        alone = mesh.size == 1
        found = ranking.count_better(users_UxD, params["head"], class_U, classes, None, block, alone=alone)[:2]
    else:
        scores_UxC = jnp.matmul(users_UxD, params["head"].T, precision=jax.lax.Precision.HIGHEST)
        found = (1 + scores_UxC[:, 1 : classes + 1].argmax(axis=1),)
    return replicated(mesh, (batch.users_U >= 0, class_U, *found))


def make_task_evaluator(
    task: Task, part: str, dataset: SequenceDataset, config: ConfigDict, mesh: Mesh
) -> TaskEvaluator:
    """The evaluator of `part` (valid or test)."""
    layout = layout_of(task.parts[part], config.eval.batch_size, config, mesh)
    arrays = replicate(mesh, (layout, dataset.items_A, task.class_E))
    return TaskEvaluator(protocol_of(config), *arrays, len(task.names), config.task == "cold_start", mesh)


def confusion(class_E: np.ndarray, best_E: np.ndarray, classes: int) -> np.ndarray:
    """[C, C] counts by true class (row) and best class (column), both 1..C."""
    counts_CxC = np.zeros((classes, classes), np.int64)
    np.add.at(counts_CxC, (class_E - 1, best_E - 1), 1)
    return counts_CxC


def profile_metrics(counts_CxC: np.ndarray) -> dict[str, float]:
    """accuracy; majority, that of always the most frequent class; macro_f1 over the classes that occur in either."""
    hits_C, true_C, best_C = np.diag(counts_CxC), counts_CxC.sum(axis=1), counts_CxC.sum(axis=0)
    occurs_C = true_C + best_C > 0
    f1_C = 2 * hits_C[occurs_C] / (true_C + best_C)[occurs_C]
    total = counts_CxC.sum()
    return {
        "accuracy": float(hits_C.sum() / total),
        "majority": float(true_C.max() / total),
        "macro_f1": float(f1_C.mean()),
    }
