"""What the downstream stage predicts from whole histories (CLUE, Section V-A): a label of their user (profile), or an
item of another catalogue that the user met (cold_start). A user with g targets is g examples.
"""

import dataclasses
import hashlib

import numpy as np
from ml_collections import ConfigDict

from seqrec_jax.data import cold_start, labels
from seqrec_jax.data.batches import Examples, history_examples
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.splits import Split, split_users, trained_on
from seqrec_jax.data.vectors import read_vectors


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples, numbered, each with one class to predict."""

    parts: dict[str, Examples]  # train, valid, test; their user_E is the number of the example
    class_E: np.ndarray  # [examples] int32, 1..classes, by that number
    names: np.ndarray  # str, of the classes
    hash: str  # of users and classes
    report: dict  # JSON-ready
    line: str  # the report for people
    vectors_ExD: np.ndarray | None = None  # float32, of each example's user, where a file gives them (profile.vectors)


def read_tasks(config: ConfigDict, dataset: SequenceDataset) -> list[Task]:
    """The task that `config.task` names, once for each of its splits: several where profile.folds asks for them.

    `data.train_fraction` is the share of a split's training users that is trained on. Raises UserError.
    """
    if config.task == "profile":
        found = labels.read_labels(config, dataset)
        splits = labels.splits_of(found, config.profile.folds, config.split_seed)
        user_E, class_E, names, line = found.users_N, found.label_U[found.users_N], found.classes, labels.report_line
        vectors = read_vectors(config.profile.vectors, dataset.user_ids[user_E]) if config.profile.vectors else None
    else:
        found = cold_start.read_targets(config, dataset)
        splits = [split_users(found.users_N, config.split_seed)]
        user_E, class_E = found.owner_N, found.targets_N
        names, line, vectors = found.target_ids, cold_start.report_line, None
    digest = found.hash if vectors is None else f"{found.hash}-{hashlib.sha256(vectors).hexdigest()[:16]}"
    shared = {"class_E": class_E + 1, "names": names, "hash": digest, "vectors_ExD": vectors}
    shared |= {"report": found.report, "line": line(found.report)}
    return [Task(parts_of(split, user_E, dataset, config.encoder.max_length), **shared) for split in splits]


def parts_of(split: Split, user_E: np.ndarray, dataset: SequenceDataset, max_length: int) -> dict[str, Examples]:
    """The examples of each part of `split`; `user_E` is the user of every example."""
    whole = history_examples(dataset, 0, max_length)  # every user, in order
    users = {"train": trained_on(split.train, dataset), "valid": split.valid, "test": split.test}
    parts = {}
    for name, users_N in users.items():
        number_E = np.flatnonzero(np.isin(user_E, users_N)).astype(np.int32)
        parts[name] = Examples(whole.start_E[user_E[number_E]], whole.length_E[user_E[number_E]], number_E)
    return parts
