"""Cold start on another catalogue: the target items of users whose source histories are a data set; and such a set
made from MovieLens:

    python -m seqrec_jax.data.cold_start ml-1m.txt.gz movies.dat.gz FOLDER
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from ml_collections import ConfigDict

from seqrec_jax.config import ROOT
from seqrec_jax.config import load as load_config
from seqrec_jax.data import sources, tables
from seqrec_jax.data.attributes import MOVIES
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.prepare import build
from seqrec_jax.data.rows import form_of
from seqrec_jax.errors import UserError

TARGETS = 3  # of a user, at most, in the set made from MovieLens


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """Each user's target items in CSR form, aligned with the users of a data set of source histories."""

    targets_N: np.ndarray  # int32, dense ids 0..targets-1 in order of first appearance in the file
    offsets_U1: np.ndarray  # int64, user u has targets_N[offsets_U1[u] : offsets_U1[u + 1]], in file order, none twice
    target_ids: np.ndarray  # str: the file's own ids
    report: dict  # JSON-ready
    hash: str  # of the targets themselves

    @property
    def users_N(self) -> np.ndarray:
        """The users who have targets."""
        return np.flatnonzero(np.diff(self.offsets_U1))

    @property
    def owner_N(self) -> np.ndarray:
        """Whose target each is."""
        count_U = np.diff(self.offsets_U1)
        return np.repeat(np.arange(len(count_U), dtype=np.int32), count_U)


def read_targets(config: ConfigDict, dataset: SequenceDataset) -> ColdStart:
    """The interactions of the file `cold_start.targets`, joined with the users of `dataset` by their own ids.

    Raises UserError where there is no such file or column, no user in common, or a single target item.
    """
    cold = config.cold_start
    if not cold.targets:
        raise UserError("no targets: set --config.cold_start.targets=FILE, the items users met in the other catalogue")
    path = Path(cold.targets).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file (config.cold_start.targets={cold.targets})")
    form = form_of(path, "name it .csv, .tsv, .parquet, .jsonl, .inter (RecBole), .dat (MovieLens) or .txt")
    kind, user, item = ("index", "user", "item") if form == "lines" else ("id", cold.user_column, cold.item_column)
    if user == item:
        raise UserError(f"cold_start.user_column and cold_start.item_column are both {user}: name each column once")
    table = tables.read_table(path, form, {user: kind, item: kind}, config.data.on_bad_row)
    table = dataclasses.replace(table, frame=table.frame.rename({user: "user", item: "item"}))
    return join_targets(table, dataset, str(path))


def join_targets(table: tables.Table, dataset: SequenceDataset, source: str) -> ColdStart:
    """Columns `user` and `item` of `table` as targets of the users of `dataset`. Raises UserError."""
    users = pl.DataFrame({"user": dataset.user_ids.tolist()}, schema={"user": pl.String}).with_row_index("row")
    known = table.frame.join(users, on="user", maintain_order="left")
    if known.is_empty():
        there, here = table.frame["user"].head(3).to_list(), dataset.user_ids[:3].tolist()
        raise UserError(
            f"{source}: none of its users ({there} ...) is in the data ({here} ...): the ids must be the same"
        )
    once = known.unique(["user", "item"], keep="first", maintain_order=True)
    items = once["item"].unique(maintain_order=True)
    if len(items) < 2:
        raise UserError(f"{source}: {items[0]!r} is the only target item: nothing to rank")
    dense = once.join(pl.DataFrame({"item": items}).with_row_index("target"), on="item", maintain_order="left")
    dense = dense.sort("row", maintain_order=True)
    count_U = np.bincount(dense["row"].to_numpy(), minlength=len(users))
    targets_N = dense["target"].to_numpy().astype(np.int32)
    offsets_U1 = np.concatenate([[0], np.cumsum(count_U)]).astype(np.int64)
    report = {
        "source": source,
        "users": int((count_U > 0).sum()),
        "items": len(items),
        "targets": len(dense),
        "users_without_target": int((count_U == 0).sum()),
        "targets_without_user": len(table.frame) - len(known),
        "repeats": len(known) - len(once),
        "rejected": table.rejected(source),
    }
    digest = hashlib.sha256(json.dumps(items.to_list()).encode() + targets_N.tobytes() + offsets_U1.tobytes())
    target_ids = np.array(items.to_list(), np.str_)
    return ColdStart(targets_N, offsets_U1, target_ids, report, digest.hexdigest()[:16])


def report_line(known: dict) -> str:
    """The report for people."""
    rejected = sum(reason["count"] for reason in known["rejected"].values())
    return (
        f"{known['targets']:,} of {known['items']:,} items, of {known['users']:,} users; "
        f"{known['users_without_target']:,} users without; left out: "
        f"{known['targets_without_user']:,} of unknown users, {known['repeats']:,} repeats, {rejected:,} bad rows"
    )


# A real set -----------------------------------------------------------------------------------------------------------


def make_cold_start(
    histories: Mapping[str, Sequence[str]], years: Mapping[str, int], targets: int = TARGETS
) -> tuple[dict[str, list[str]], dict[str, list[str]], dict]:
    """A cold-start set from one catalogue: ({user: source items}, {user: target items}, report).

    The items of `histories` (oldest first) are cut at the median of their release years: the older half, the median
    year included, is the source catalogue, the rest the target catalogue. A user's targets are the first `targets`
    items of the newer half; the source is what the user met of the older half before the first of them. Nothing met
    later is used. Users without a target, or without a source item, are left out and counted. Nothing is drawn.
    """
    catalogue = {item for history in histories.values() for item in history}
    median = float(np.median([years[item] for item in catalogue]))
    newer = {item for item in catalogue if years[item] > median}
    source, target, without = {}, {}, {"target": 0, "source": 0}
    for user, history in histories.items():
        wanted = [place for place, item in enumerate(history) if item in newer][:targets]
        if not wanted:
            without["target"] += 1
        elif wanted[0] == 0:
            without["source"] += 1
        else:
            source[user], target[user] = list(history[: wanted[0]]), [history[place] for place in wanted]
    report = {
        "median_year": median,
        "older_items": len(catalogue) - len(newer),
        "newer_items": len(newer),
        "users": len(source),
        "users_without_target": without["target"],
        "users_without_source": without["source"],
        "source_actions": sum(map(len, source.values())),
        "targets": sum(map(len, target.values())),
    }
    return source, target, report


def read_years(path: Path) -> dict[str, int]:
    """{item: release year} of MovieLens' movies.dat, whose titles end with it: `Toy Story (1995)`. Raises UserError."""
    frame = tables.read_table(path, "movielens", {MOVIES[0]: "id", MOVIES[1]: "text"}, names=MOVIES).frame
    frame = frame.with_columns(year=pl.col(MOVIES[1]).str.extract(r"\(([0-9]{4})\)$").cast(pl.Int64))
    unknown = frame.filter(pl.col("year").is_null())
    if len(unknown):
        line, _, title, _ = unknown.row(0)
        raise UserError(f"{path}:{line}: the title {title!r} does not end with a year, as in 'Toy Story (1995)'")
    return dict(frame.select(MOVIES[0], "year").rows())


def read_histories(path: Path) -> dict[str, list[str]]:
    """{user: items, oldest first} of MovieLens' interactions, in any form that data.path may have."""
    data = load_config(str(ROOT / "configs" / "base.py"), [("data.path", str(path))]).data
    dataset = build(sources.read(data), data.repeats, data.min_user, data.min_item, str(path), "", "")
    items_A = dataset.item_ids[dataset.items_A - 1]
    parts = np.split(items_A, dataset.offsets_U1[1:-1])
    return {str(user): part.tolist() for user, part in zip(dataset.user_ids, parts, strict=True)}


def main(arguments: Sequence[str]) -> int:
    """Writes FOLDER/source.txt and FOLDER/targets.txt (`user item item ...`) and prints the report."""
    try:
        if len(arguments) != 3:
            raise UserError("three arguments, please: python -m seqrec_jax.data.cold_start INTERACTIONS MOVIES FOLDER")
        interactions, movies, folder = (Path(argument).expanduser() for argument in arguments)
        for path in (interactions, movies):
            if not path.is_file():
                raise UserError(f"{path} does not exist")
        histories, years = read_histories(interactions), read_years(movies)
        unknown = sorted({item for history in histories.values() for item in history} - years.keys())
        if unknown:
            raise UserError(f"{movies}: no movie {unknown[0]}, which {interactions} names ({len(unknown)} are missing)")
        source, target, report = make_cold_start(histories, years)
        folder.mkdir(parents=True, exist_ok=True)
        for name, lists in (("source.txt", source), ("targets.txt", target)):
            lines = (f"{user} {' '.join(items)}\n" for user, items in lists.items())
            (folder / name).write_text("".join(lines))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in report.items():
        print(f"{name:<24} {value:g}" if name == "median_year" else f"{name:<24} {value:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
