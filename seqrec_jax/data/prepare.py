"""From the source to CSR histories: filters, order, dense ids, the report, and a cache of the result."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from seqrec_jax.data import attributes, sources, tables
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.files import read_bytes
from seqrec_jax.errors import UserError, unknown

_VERSION = 3  # of the prepared files: a change of their meaning or of a rule below makes old caches unused
_SETTINGS = (
    "user_column",
    "item_column",
    "time_column",
    "on_bad_row",
    "repeats",
    "min_user",
    "min_item",
)  # besides the format, all that decides what a source becomes
_ATTRIBUTE_SETTINGS = ("item_column", "attribute_columns", "attribute_separator", "on_bad_row")
_ARRAYS = {"items_A": "items.npy", "offsets_U1": "offsets.npy", "attributes_N": "attributes.npy",
           "attribute_offsets_V1": "attribute_offsets.npy"}  # fmt: skip
_NAMES = {"item_ids": "items.parquet", "user_ids": "users.parquet", "attribute_names": "attributes.parquet"}
_FILES = (*_ARRAYS.values(), *_NAMES.values(), "report.json")


def prepare(config_data, cache_dir: Path) -> SequenceDataset:
    """The data set that `config.data` describes, from `cache_dir` where it was prepared before.

    Users and items get dense ids in order of first appearance in the source, after filtering; histories are ordered by
    time, equal times (and sources without times) by their place in the source. Raises UserError.
    """
    for key, known in (("on_bad_row", ("error", "drop")), ("repeats", ("keep", "drop"))):
        if config_data[key] not in known:
            raise unknown(f"data.{key}", config_data[key], known)
    table = None
    if config_data.path or config_data.name:
        path, form = sources.resolve(config_data)
        source, digest = str(path), _folder_digest(path) if form == "tfds" else _digest(path)
    else:
        table, digest = _synthetic(config_data)
        source = form = "synthetic"
    settings = {key: config_data[key] for key in _SETTINGS}
    parts = [_VERSION, form, digest, settings]
    if config_data.attributes:  # data without them keep their hash
        extra = attributes.attributes_path(config_data)
        parts += [_digest(extra) if extra else "included", {key: config_data[key] for key in _ATTRIBUTE_SETTINGS}]
    key = json.dumps(parts, sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    dataset = load(cache_dir / name, source)
    if dataset is None:
        table = table or sources.read(config_data)
        dataset = build(table, config_data.repeats, config_data.min_user, config_data.min_item, source, form, name)
        if config_data.attributes:
            table = attributes.read_attributes(extra, config_data)
            dataset = attributes.with_attributes(dataset, table, str(extra))
        _store(dataset, cache_dir / name)
    return dataclasses.replace(dataset, train_fraction=config_data.train_fraction, hold_out=config_data.hold_out)


def build(
    table: tables.Table, repeats: str, min_user: int, min_item: int, source: str, form: str, name: str
) -> SequenceDataset:
    """Filters, orders and numbers the rows of `table`. Raises UserError where too little is left to learn from."""
    read = table.frame.with_row_index("row")
    if "time" in read.columns:
        read = read.sort("time", maintain_order=True)
    unique = read.unique(["user", "item"], keep="first", maintain_order=True)
    kept = unique if repeats == "drop" else read
    core, rounds = k_core(kept, min_user, min_item)
    if core.is_empty():
        raise UserError(
            f"{source}: none of its {table.rows_read} rows is left after data.on_bad_row ({read.height} left), "
            f"data.repeats ({kept.height} left) and data.min_user={min_user}, data.min_item={min_item}"
            + (": lower these" if min_user or min_item else "")
            + "".join(f"; {r.count} rows: {r.reason}, as in line {r.line}: {r.text}" for r in table.rejections)
        )
    if core.height >= 2**31:
        raise UserError(f"{source}: {core.height:,} actions; one data set holds at most 2^31 - 1")
    users, items = (core.sort("row")[column].unique(maintain_order=True) for column in ("user", "item"))
    if len(items) < 2:
        raise UserError(f"{source}: the catalogue has a single item, {items[0]!r}: nothing to rank")
    # The rank of an id's first row is its dense id. The sort by user keeps the order by time.
    dense = core.select(
        user=pl.col("row").min().over("user").rank("dense") - 1, item=pl.col("row").min().over("item").rank("dense")
    ).sort("user", maintain_order=True)
    lengths = np.bincount(dense["user"].to_numpy(), minlength=len(users))
    offsets_U1 = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items_A = dense["item"].to_numpy().astype(np.int32)
    report = {
        "source": source,
        "format": form,
        "rows_read": table.rows_read,
        "rejected": table.rejected(source),
        "blank_lines": table.blank_lines,
        "repeats": {"count": read.height - unique.height, "policy": repeats},
        "kcore": {
            "users_removed": kept["user"].n_unique() - len(users),
            "items_removed": kept["item"].n_unique() - len(items),
            "actions_removed": kept.height - core.height,
            "rounds": rounds,
        },
        **_statistics(items_A, offsets_U1, len(items)),
        "hash": name,
    }
    return SequenceDataset(items_A, offsets_U1, _text(items), _text(users), name, report)


def k_core(frame: pl.DataFrame, min_user: int, min_item: int) -> tuple[pl.DataFrame, int]:
    """The largest part of `frame` (columns user, item) where every user and item has that many rows; and the rounds."""
    rounds = 0
    while True:
        kept = frame.filter((pl.len().over("user") >= min_user) & (pl.len().over("item") >= min_item))
        if kept.height == frame.height:
            return kept, rounds
        frame, rounds = kept, rounds + 1


def print_report(report: dict) -> None:
    """The data report for people."""
    length, repeats, core = report["length"], report["repeats"], report["kcore"]
    test, rejected = report["test_in_history"], report["rejected"]
    removed = f"{core['users_removed']:,} users, {core['items_removed']:,} items, {core['actions_removed']:,} actions"
    rows = {
        "source": f"{report['source']} ({report['format']})",
        "rows read": f"{report['rows_read']:,}, and {report['blank_lines']:,} blank lines",
        "rejected": f"{sum(r['count'] for r in rejected.values()):,}",
        **{f"  {reason}": f"{r['count']:,}, first in {r['first']}" for reason, r in rejected.items()},
        "repeats": f"{repeats['count']:,} ({repeats['policy']})",
        "k-core": f"{removed} removed in {core['rounds']} rounds",
        "users": f"{report['users']:,}",
        "items": f"{report['items']:,}",
        "actions": f"{report['actions']:,} (density {report['density']:.3%})",
        "length": f"mean {length['mean']:.2f}, median {length['median']:g}, {length['min']} to {length['max']}",
        "longer than": ", ".join(f"{n}: {users:,} users" for n, users in report["users_longer_than"].items()),
        "test in history": f"{test['count']:,} users ({test['share']:.2%})",
        **({"dropped": f"{report['targets_dropped']:,} targets"} if "targets_dropped" in report else {}),
        **({"attributes": attributes.report_line(report["attributes"])} if "attributes" in report else {}),
        **({"trained on": f"{report['users_trained']:,} users"} if "users_trained" in report else {}),
        "too short": f"{report['users_too_short']:,} users with fewer than 3 items (not evaluated)",
        "hash": report["hash"],
    }
    for label, text in rows.items():
        print(f"{label:<16} {text}")


def load(folder: Path, source: str) -> SequenceDataset | None:
    """What `_store` wrote, or None where any of it is missing or damaged (such a folder is removed)."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest == {file: _digest(folder / file) for file in _FILES}:
            return SequenceDataset(
                **{field: np.load(folder / file, allow_pickle=False) for field, file in _ARRAYS.items()},
                **{field: _text(pl.read_parquet(folder / file)["id"]) for field, file in _NAMES.items()},
                hash=folder.name,
                # the same bytes may now lie elsewhere
                report=json.loads((folder / "report.json").read_text()) | {"source": source},
            )
    except (OSError, ValueError, UserError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _store(dataset: SequenceDataset, folder: Path) -> None:
    """Writes aside and moves into place, so that `folder` is complete whenever it exists."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-", ignore_cleanup_errors=True) as name:
            aside = Path(name) / "data"
            aside.mkdir()
            for field, file in _ARRAYS.items():
                np.save(aside / file, getattr(dataset, field), allow_pickle=False)
            for field, file in _NAMES.items():
                names = pl.Series("id", getattr(dataset, field).tolist(), pl.String)
                names.to_frame().write_parquet(aside / file)
            (aside / "report.json").write_text(json.dumps(dataset.report, indent=1))
            (aside / "manifest.json").write_text(json.dumps({file: _digest(aside / file) for file in _FILES}))
            try:
                os.replace(aside, folder)
            except OSError:
                if not folder.exists():  # else another process prepared the same
                    raise
    except OSError as error:
        raise UserError(
            f"prepared data cannot be written to {folder.parent}: {error}. Set --config.data.cache_dir=FOLDER"
        ) from None


def _digest(path: Path) -> str:
    """SHA-256 of a file's bytes, decompressed."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def _folder_digest(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else []
    return hashlib.sha256(json.dumps([(file.name, _digest(file)) for file in files]).encode()).hexdigest()


def _synthetic(config_data) -> tuple[tables.Table, str]:
    """The embedded data as a table, and the digest of its rows (the generator may change between versions)."""
    from seqrec_jax.data.synthetic import synthetic_table

    histories = synthetic_table(config_data.synthetic_users, config_data.synthetic_items, config_data.synthetic_seed)
    user = np.repeat(np.arange(1, len(histories) + 1), [len(history) for history in histories])
    item = np.concatenate(histories).astype(np.int64)
    frame = pl.DataFrame({"line": user, "user": user, "item": item})
    frame = frame.with_columns(pl.col("user", "item").cast(pl.String))
    return tables.Table(frame, frame.height), hashlib.sha256(user.tobytes() + item.tobytes()).hexdigest()


def _text(ids: pl.Series) -> np.ndarray:
    return np.array(ids.to_list(), dtype=np.str_)


def _statistics(items_A: np.ndarray, offsets_U1: np.ndarray, num_items: int) -> dict:
    lengths = np.diff(offsets_U1)
    test_A = np.repeat(items_A[offsets_U1[1:] - 1], lengths)  # the owner's last item, beside each of its actions
    seen = np.add.reduceat(items_A == test_A, offsets_U1[:-1], dtype=np.int64) > 1
    evaluated = lengths >= 3
    count = int((seen & evaluated).sum())
    return {
        "users": len(lengths),
        "items": num_items,
        "actions": len(items_A),
        "density": len(items_A) / (len(lengths) * num_items),
        "length": {
            "mean": float(lengths.mean()),
            "min": int(lengths.min()),
            "max": int(lengths.max()),
            "median": float(np.median(lengths)),
        },
        "users_longer_than": {str(n): int((lengths > n).sum()) for n in (50, 100, 200)},
        "test_in_history": {"count": count, "share": count / max(int(evaluated.sum()), 1)},
        "users_too_short": int((~evaluated).sum()),
    }
