"""Histories of a file in the ids of a known catalogue: for a model that is trained already."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from ml_collections import ConfigDict

from seqrec_jax.data import tables
from seqrec_jax.data.dataset import first_occurrences
from seqrec_jax.data.rows import form_of
from seqrec_jax.errors import UserError

PIECE = 2**14  # lines of the file held at once


@dataclasses.dataclass(frozen=True)
class Histories:
    """Users in order of first appearance; their known items, oldest first; and what was left out."""

    user_ids: pl.Series
    items_A: np.ndarray  # int32, dense ids from 1, users one after the other
    offsets_U1: np.ndarray  # int64
    unknown_actions: int = 0  # with items that the catalogue lacks
    unknown_users: int = 0  # users of such actions alone
    bad_rows: int = 0


def read_histories(path: Path, data: ConfigDict, item_ids: Sequence[str]) -> Histories:
    """The histories of a file in any format of the reader, ordered by time where it has times.

    The file is read piece by piece. What stays are the users' ids and 4 bytes an action; with times, or where a user's
    rows do not stand together, some 30 while they are sorted. Raises UserError where no item is known.
    """
    form = form_of(path, "name it .csv, .tsv, .parquet, .jsonl, .inter (RecBole), .dat (MovieLens) or .txt")
    user, item, time = data.user_column, data.item_column, data.time_column
    if form == "lines":
        user, item, time = "user", "item", ""
    kinds = {user: "id", item: "id"} | ({time: "number"} if time else {})
    if len(kinds) != 2 + bool(time):
        raise UserError(f"name each column once in config.data.*_column: user {user}, item {item}, time {time}")
    catalogue = pl.DataFrame({"item": list(item_ids)}).with_columns(dense=pl.int_range(1, pl.len() + 1, dtype=pl.Int32))
    users, counts, items, times, unknown, bad = [], [], [], [], 0, 0
    for table in tables.read_pieces(path, form, kinds, data.on_bad_row, lines=PIECE):
        bad += sum(rejection.count for rejection in table.rejections)
        frame = table.frame.rename({user: "user", item: "item"} | ({time: "time"} if time else {}))
        frame = frame.join(catalogue, on="item", how="left", maintain_order="left")
        runs = frame["user"].rle()  # neighbouring rows of one user
        end_R = np.cumsum(runs.struct["len"].to_numpy(), dtype=np.int64)
        known = frame.filter(pl.col("dense").is_not_null())
        known_A1 = np.concatenate([[0], np.cumsum(frame["dense"].is_not_null().to_numpy())])
        users.append(runs.struct["value"])
        counts.append(np.diff(known_A1[end_R], prepend=0))
        items.append(known["dense"].to_numpy())
        times.append(known.select("time") if time else None)
        unknown += len(frame) - len(known)
    items_A, count_R = np.concatenate(items), np.concatenate(counts)
    if not len(items_A):
        raise UserError(f"{path}: this model knows none of its items ({unknown:,} actions)")
    runs = pl.DataFrame({"user": pl.concat(users)})
    numbered = runs.unique("user", keep="first", maintain_order=True).with_row_index("number")
    if time or len(numbered) < len(runs):  # else every user's rows stand together, in order
        number_R = runs.join(numbered, on="user", maintain_order="left")["number"].to_numpy()
        number_A = np.repeat(number_R.astype(np.int32), count_R)
        time_A = [pl.concat(times, how="vertical_relaxed")["time"].to_numpy()] if time else []
        items_A = items_A[np.lexsort([*time_A, number_A])]
        count_R = np.bincount(number_A, minlength=len(numbered))
    if data.repeats == "drop":
        first_A = first_occurrences(items_A, np.concatenate([[0], np.cumsum(count_R)]))
        user_A = np.repeat(np.arange(len(count_R)), count_R)
        items_A, count_R = items_A[first_A], np.bincount(user_A[first_A], minlength=len(count_R))
    kept_U = count_R > 0
    return Histories(
        user_ids=numbered["user"].filter(pl.Series(kept_U)),
        items_A=items_A,
        offsets_U1=np.concatenate([[0], np.cumsum(count_R[kept_U])]),
        unknown_actions=unknown,
        unknown_users=int((~kept_U).sum()),
        bad_rows=bad,
    )
