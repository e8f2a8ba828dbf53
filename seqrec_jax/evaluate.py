"""A model's metrics under a protocol: exact for any batch size and device count."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax import native, ranking
from seqrec_jax.data.batches import Batch, Layout, batch_of, history_examples, layout_of, plan_epoch
from seqrec_jax.data.dataset import SequenceDataset, first_occurrences
from seqrec_jax.data.files import read_bytes
from seqrec_jax.errors import UserError
from seqrec_jax.protocol import UNJUDGED, Protocol, protocol_of, ranks_items
from seqrec_jax.sharding import compiler_options, replicate, replicated, split_rows
from seqrec_jax.systems import System

HELD_OUT = {"test": 1, "valid": 2}  # how many items from the end
BLOCK_SCORES = 2**22  # scores held at once


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """One split of one data set under one protocol, ready on the device."""

    protocol: Protocol
    layout: Layout
    arrays: dict  # device arrays: items_A, first_A, offsets_U1, target_U and, when sampled, negatives_UxK
    num_items: int
    users: int  # evaluated
    mesh: Mesh
    held_out: int

    def __call__(self, system: System, params: dict) -> dict[str, float]:
        """Metrics over all evaluated users, each counted once."""
        counts_TxU = jax.device_get(_counts()(self, system.states, params, self.arrays, self.layout))
        users_U, greater_U, tied_U, missed_U = (count_TxU.reshape(-1) for count_TxU in counts_TxU)
        real_U = users_U >= 0
        assert real_U.sum() == self.users and len(np.unique(users_U[real_U])) == self.users
        return ranking.metrics(greater_U[real_U], tied_U[real_U], missed_U[real_U])

    def counts(self, states, params, arrays, layout):
        """Of all batches in one dispatch, [T, U] each: user (−1: none), items above the target, ties, unseen."""
        plan = plan_epoch(layout, None)
        batch_counts = functools.partial(self._batch_counts, states, params, arrays, layout, plan)
        return replicated(self.mesh, jax.lax.map(batch_counts, jnp.arange(layout.steps)))

    def _batch_counts(self, states, params, arrays, layout, plan, index):
        batch: Batch = split_rows(self.mesh, batch_of(arrays["items_A"], layout, plan, index))
        user_U = jnp.maximum(batch.users_U, 0)
        target_U = arrays["target_U"][user_U]
        states_UxD = states(params, batch)
        if self.protocol.candidates == "sampled":
            counts = ranking.count_better_of(states_UxD, params["items"], target_U, arrays["negatives_UxK"][user_U])
            return batch.users_U, *counts
        begin_U = arrays["offsets_U1"][user_U]
        end_U = arrays["offsets_U1"][user_U + 1] - self.held_out
        hidden = None
        if self.protocol.hide_history == "yes":
            end_U = jnp.where(batch.users_U >= 0, end_U, begin_U)
            hidden = ranking.Hidden(arrays["items_A"], arrays["first_A"], begin_U, end_U)
        block = max(BLOCK_SCORES // len(target_U), 1024)
        alone = self.mesh.size == 1
        counts = ranking.count_better(states_UxD, params["items"], target_U, self.num_items, hidden, block, alone=alone)
        return batch.users_U, *counts


@functools.cache
def _counts():
    return jax.jit(Evaluator.counts, static_argnums=(0, 1), compiler_options=compiler_options())


class Unjudged:
    """Stands where nothing is judged: no metrics."""

    protocol = UNJUDGED

    def __call__(self, system: System, params: dict) -> dict[str, float]:
        return {}


def make_evaluator(dataset: SequenceDataset, config: ConfigDict, split: str, mesh: Mesh) -> Evaluator | Unjudged:
    """The evaluator of `split` (valid or test) under the config's protocol."""
    native.ask(mesh)
    protocol, held_out = protocol_of(config), HELD_OUT[split]
    examples = history_examples(dataset, held_out, config.encoder.max_length)
    if not len(examples.user_E):  # nor looked at by the analysis, which takes such users, too
        raise UserError("no user has 3 items or more, so nothing can be evaluated; see data_report.json")
    if not ranks_items(config):
        return Unjudged()
    target_U = np.zeros(len(dataset.user_ids), np.int32)
    target_U[examples.user_E] = dataset.items_A[dataset.offsets_U1[examples.user_E + 1] - held_out]
    arrays = {
        "items_A": dataset.items_A,
        "first_A": first_occurrences(dataset.items_A, dataset.offsets_U1),
        "offsets_U1": dataset.offsets_U1.astype(np.int32),
        "target_U": target_U,
    }
    if protocol.candidates == "sampled":
        arrays["negatives_UxK"] = negatives_of(dataset, config, examples.user_E)
    return Evaluator(
        protocol=protocol,
        layout=replicate(mesh, layout_of(examples, config.eval.batch_size, config, mesh)),
        arrays=replicate(mesh, arrays),
        num_items=len(dataset.item_ids),
        users=len(examples.user_E),
        mesh=mesh,
        held_out=held_out,
    )


def negatives_of(dataset: SequenceDataset, config: ConfigDict, users_E: np.ndarray) -> np.ndarray:
    """[users, K] int32: from `eval.negatives`, or drawn uniformly, without repeats and not in the whole history.

    The same list serves validation and test, as published. Drawn with `eval.negatives_seed`, user by user.
    """
    evaluation, num_items = config.eval, len(dataset.item_ids)
    if evaluation.negatives:
        return _read_negatives(dataset, Path(evaluation.negatives).expanduser(), evaluation.num_negatives, users_E)
    generator = np.random.default_rng(evaluation.negatives_seed)
    negatives_UxK = np.zeros((len(dataset.user_ids), evaluation.num_negatives), np.int32)
    for user in users_E:
        history = dataset.items_A[dataset.offsets_U1[user] : dataset.offsets_U1[user + 1]]
        wanted = evaluation.num_negatives
        if num_items - len(np.unique(history)) < wanted:
            raise UserError(
                f"user {dataset.user_ids[user]} leaves fewer than {wanted} items to draw negatives from; "
                "lower config.eval.num_negatives (with --config.eval.protocol=custom --config.eval.candidates=sampled "
                "--config.eval.hide_history=no --config.eval.metric=ndcg@10 where the protocol says how many)"
            )
        drawn = np.empty(0, np.int64)
        while len(drawn) < wanted:
            more = np.concatenate([drawn, generator.integers(1, num_items + 1, 2 * wanted)])
            _, first = np.unique(more, return_index=True)
            drawn = more[np.sort(first)]
            drawn = drawn[~np.isin(drawn, history)]
        negatives_UxK[user] = drawn[:wanted]
    return negatives_UxK


def _read_negatives(dataset: SequenceDataset, path: Path, count: int, users_E: np.ndarray) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: no such file (config.eval.negatives)")
    dense = {item: index + 1 for index, item in enumerate(dataset.item_ids.tolist())}
    rows = {}
    for number, line in enumerate(read_bytes(path).decode(errors="replace").splitlines(), 1):
        user, *items = line.split() or [None]
        unknown = [item for item in items if item not in dense]
        if unknown:
            raise UserError(f"{path}:{number}: negative item {unknown[0]} is not in the data")
        if user is not None and user in rows:
            raise UserError(f"{path}:{number}: user {user} has negatives already, in a line before")
        rows[user] = [dense[item] for item in items]
    missing = [user for user in dataset.user_ids[users_E] if user not in rows]
    if missing:
        raise UserError(f"{path}: no negatives for user {missing[0]} ({len(missing)} users are missing)")
    negatives_UxK = np.zeros((len(dataset.user_ids), count), np.int32)
    for user in users_E:
        negatives = rows[dataset.user_ids[user]]
        if len(negatives) != count or len(set(negatives)) != count:
            raise UserError(
                f"{path}: user {dataset.user_ids[user]} has {len(set(negatives))} distinct negatives of "
                f"{len(negatives)}; config.eval.num_negatives={count}"
            )
        negatives_UxK[user] = negatives
        history = dataset.items_A[dataset.offsets_U1[user] : dataset.offsets_U1[user + 1]]
        if np.isin(history, negatives_UxK[user]).any():
            raise UserError(f"{path}: a negative of user {dataset.user_ids[user]} is in that user's own history")
    return negatives_UxK
