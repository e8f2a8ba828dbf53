"""What is known of the users (gender, age, occupation): from a file to a class for each user of a data set."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
from ml_collections import ConfigDict

from seqrec_jax.data import splits, tables
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.rows import form_of
from seqrec_jax.data.sources import LABELS
from seqrec_jax.data.synthetic import synthetic_taste
from seqrec_jax.errors import UserError

USERS = ("user_id", "gender", "age", "occupation", "zip")  # columns of MovieLens' users.dat


@dataclasses.dataclass(frozen=True)
class Labels:
    """One label of the users of a data set."""

    name: str  # the column
    label_U: np.ndarray  # [users] int32, index into `classes`; -1 = this user has none
    classes: np.ndarray  # str, in rising order (of the numbers, where all are whole numbers)
    report: dict  # JSON-ready
    hash: str  # of the labels themselves

    @property
    def users_N(self) -> np.ndarray:
        """The users who have a label."""
        return np.flatnonzero(self.label_U >= 0)


def read_labels(config: ConfigDict, dataset: SequenceDataset) -> Labels:
    """The column `profile.label` of the file `profile.labels`, joined with the users of `dataset` by their own ids.

    Raises UserError where there is no such file or column, a user has two labels, or fewer than two classes remain.
    """
    path = labels_path(config)
    if path is None:
        data = config.data
        taste_U = synthetic_taste(data.synthetic_users, data.synthetic_items, data.synthetic_seed)
        frame = pl.DataFrame({"user": np.arange(1, len(taste_U) + 1), "label": taste_U}).cast(pl.String)
        table, source = tables.Table(frame.with_row_index("line", offset=1), len(frame)), "embedded"
        return join_labels(table, dataset, "taste", source)
    form = form_of(path, "name it .csv, .tsv, .parquet, .jsonl, .user (RecBole) or .dat (MovieLens)")
    user, names = config.profile.user_column, ()
    if form == "movielens":
        user, names = USERS[0], USERS
    label = config.profile.label
    if user == label:
        raise UserError(f"profile.label={label} is the column of the users' ids: name another column of {path}")
    table = tables.read_table(path, form, {user: "id", label: "text"}, config.data.on_bad_row, names)
    table = dataclasses.replace(table, frame=table.frame.rename({user: "user", label: "label"}))
    return join_labels(table, dataset, label, str(path))


def labels_path(config: ConfigDict) -> Path | None:
    """The file that profile.labels names; None: the embedded data's own. Raises UserError where there is none."""
    data, labels = config.data, config.profile.labels
    if not labels:
        raise UserError("no labels of users: set --config.profile.labels=FILE (included: those of the data set)")
    if labels != "included":
        path = Path(labels).expanduser()
    elif data.name in LABELS and data.dir:
        path = Path(data.dir).expanduser() / LABELS[data.name]
    elif data.name or data.path:
        raise UserError(
            f"profile.labels=included, but no labels come with {data.name or data.path}: set "
            f"--config.profile.labels=FILE (they come with {', '.join(LABELS)} and with the embedded data)"
        )
    else:
        return None
    if not path.is_file():
        raise UserError(f"{path}: no such file (config.profile.labels={labels})")
    return path


def join_labels(table: tables.Table, dataset: SequenceDataset, name: str, source: str) -> Labels:
    """Columns `line`, `user` and `label` of `table` as labels of the users of `dataset`. Raises UserError."""
    first = table.frame.unique("user", keep="first", maintain_order=True)
    both = table.frame.join(first, on="user", suffix="_first", maintain_order="left")
    other = both.filter(pl.col("label") != pl.col("label_first"))
    if len(other):
        line, user, label, line_first, label_first = other.row(0)
        raise UserError(
            f"{source}:{line}: user {user} has {name} {label}, but {label_first} in line {line_first}: keep one"
        )
    users = pl.DataFrame({"user": dataset.user_ids.tolist()}, schema={"user": pl.String})
    label_U = users.join(first, on="user", how="left", maintain_order="left")["label"]
    counts = label_U.drop_nulls().value_counts().rows()
    if not counts:
        there, here = first["user"].head(3).to_list(), dataset.user_ids[:3].tolist()
        raise UserError(
            f"{source}: none of its users ({there} ...) is in the data ({here} ...): the ids must be the same"
        )
    if len(counts) == 1:
        raise UserError(f"{source}: all {counts[0][1]} labelled users have {name} {counts[0][0]}: nothing to predict")
    counts = dict(sorted(counts, key=_by_number if all(label.isdecimal() for label, _ in counts) else None))
    number = {label: index for index, label in enumerate(counts)}
    labels = np.array([number.get(label, -1) for label in label_U], np.int32)
    report = {
        "source": source,
        "label": name,
        "classes": counts,
        "users_without_label": int((labels < 0).sum()),
        "labels_without_user": len(first) - sum(counts.values()),
        "repeats": len(table.frame) - len(first),
        "rejected": table.rejected(source),
    }
    digest = hashlib.sha256(labels.tobytes() + json.dumps(list(counts)).encode()).hexdigest()[:16]
    return Labels(name, labels, np.array(list(counts), np.str_), report, digest)


def report_line(known: dict) -> str:
    """The report for people."""
    counts = ", ".join(f"{name} {count:,}" for name, count in known["classes"].items())
    rejected = sum(reason["count"] for reason in known["rejected"].values())
    return (
        f"{known['label']} in {len(known['classes'])} classes ({counts}); {known['users_without_label']:,} users "
        f"without; left out: {known['labels_without_user']:,} unknown users, {known['repeats']:,} repeats, "
        f"{rejected:,} bad rows"
    )


def splits_of(labels: Labels, folds: int, seed: int) -> list[splits.Split]:
    """The labelled users in `folds` splits that test each of them once, or in one of 80 / 5 / 15 percent."""
    users_N = labels.users_N
    found = splits.split_folds(users_N, folds, seed) if folds > 1 else [splits.split_users(users_N, seed)]
    if any(len(np.unique(labels.label_U[split.train])) < 2 for split in found):
        raise UserError(f"the training users of a split all have the same {labels.name}: too few users, or too alike")
    return found


def _by_number(entry: tuple[str, int]) -> tuple[int, str]:
    return int(entry[0]), entry[0]
