"""From rows to histories: filters, order, ids, the report and the cache."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.base import get_config
from seqrec_jax.data import prepare as preparation
from seqrec_jax.data import sources, tfds_interactions
from seqrec_jax.data.prepare import k_core, prepare, print_report
from seqrec_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT / ".." / "shared" / "data"


def config(path="", **changes):
    data = get_config().data
    data.path = str(path)
    data.update(changes)
    return data


def csv(folder, rows, name="a.csv"):
    path = folder / name
    path.write_text("user_id,item_id,timestamp\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def histories(dataset):
    return {
        str(user): [str(dataset.item_ids[i - 1]) for i in dataset.items_A[start:end]]
        for user, start, end in zip(dataset.user_ids, dataset.offsets_U1, dataset.offsets_U1[1:], strict=False)
    }


def test_ids_follow_the_file_and_histories_the_time(tmp_path):
    rows = [("v", "c", 9), ("u", "b", 5), ("v", "a", 1), ("u", "c", 5), ("u", "a", 5), ("v", "b", 2)]
    dataset = prepare(config(csv(tmp_path, rows)), tmp_path / "cache")
    assert dataset.user_ids.tolist() == ["v", "u"] and dataset.item_ids.tolist() == ["c", "b", "a"]
    assert dataset.items_A.tolist() == [3, 2, 1, 2, 1, 3] and dataset.offsets_U1.tolist() == [0, 3, 6]
    assert dataset.items_A.dtype == np.int32 and dataset.offsets_U1.dtype == np.int64
    assert dataset.item_ids.dtype.kind == dataset.user_ids.dtype.kind == "U"
    untimed = prepare(config(csv(tmp_path, rows), time_column=""), tmp_path / "cache")
    assert histories(untimed) == {"v": ["c", "a", "b"], "u": ["b", "c", "a"]}
    assert untimed.hash != dataset.hash


def test_ids_are_dense_after_filtering(tmp_path):
    rows = [("x", "rare", 0), ("u", "b", 1), ("u", "a", 2), ("v", "a", 3), ("v", "b", 4)]
    dataset = prepare(config(csv(tmp_path, rows), min_user=2, min_item=2), tmp_path / "cache")
    assert dataset.user_ids.tolist() == ["u", "v"] and dataset.item_ids.tolist() == ["b", "a"]
    assert dataset.report["kcore"] == {"users_removed": 1, "items_removed": 1, "actions_removed": 1, "rounds": 1}


def test_repeats(tmp_path):
    path = csv(tmp_path, [("u", "a", 9), ("u", "b", 5), ("u", "a", 1), ("u", "b", 5)])
    keep = prepare(config(path), tmp_path / "cache")
    drop = prepare(config(path, repeats="drop"), tmp_path / "cache")
    assert histories(keep) == {"u": ["a", "b", "b", "a"]} and histories(drop) == {"u": ["a", "b"]}
    assert keep.report["repeats"] == {"count": 2, "policy": "keep"}
    assert drop.report["repeats"] == {"count": 2, "policy": "drop"}


def test_equal_times_keep_file_order(tmp_path):
    rows = [(f"u{i % 3}", f"i{i}", 7) for i in random.Random(0).sample(range(3000), 3000)]
    dataset = prepare(config(csv(tmp_path, rows)), tmp_path / "cache")
    for user, items in histories(dataset).items():
        assert items == [item for owner, item, _ in rows if owner == user]


def test_report(tmp_path, capsys):
    rows = [("u", "a", 1), ("u", "b", 2), ("u", "a", 3), ("v", "a", 1), ("v", "a", 2), ("w", "c", 1), ("w", "", 1)]
    path = csv(tmp_path, rows)
    path.write_text(path.read_text() + "\n")
    dataset = prepare(config(path, on_bad_row="drop"), tmp_path / "cache")
    assert dataset.report == {
        "source": str(path), "format": "csv", "rows_read": 7,
        "rejected": {"empty item_id": {"count": 1, "first": f"{path}:8: 'w,,1'"}}, "blank_lines": 1,
        "repeats": {"count": 2, "policy": "keep"},
        "kcore": {"users_removed": 0, "items_removed": 0, "actions_removed": 0, "rounds": 0},
        "users": 3, "items": 3, "actions": 6, "density": 6 / 9,
        "length": {"mean": 2.0, "min": 1, "max": 3, "median": 2.0},
        "users_longer_than": {"50": 0, "100": 0, "200": 0},
        "test_in_history": {"count": 1, "share": 1.0}, "users_too_short": 2, "hash": dataset.hash,
    }  # fmt: skip
    print_report(dataset.report)
    printed = capsys.readouterr().out
    assert f"empty item_id  1, first in {path}:8: 'w,,1'" in printed and dataset.hash in printed


def test_nothing_to_learn_from(tmp_path):
    path = csv(tmp_path, [("u", "a", 1), ("u", "b", 2)])
    with pytest.raises(UserError, match="none of its 2 rows is left.*data.min_user=9"):
        prepare(config(path, min_user=9), tmp_path / "cache")
    with pytest.raises(UserError, match="a single item, 'a'"):
        prepare(config(csv(tmp_path, [("u", "a", 1), ("v", "a", 2)])), tmp_path / "cache")
    said = "none of its 1 rows is left.*data.min_item=0; 1 rows: empty item_id, as in line 2: 'u,,1'$"
    with pytest.raises(UserError, match=said):
        prepare(config(csv(tmp_path, [("u", "", 1)]), on_bad_row="drop"), tmp_path / "cache")


def test_settings_and_places_that_do_not_exist(tmp_path):
    path = csv(tmp_path, [("u", "a", 1), ("u", "b", 2)])
    with pytest.raises(UserError, match="data.on_bad_row 'dropp' is not known. Did you mean 'drop'"):
        prepare(config(path, on_bad_row="dropp"), tmp_path)
    with pytest.raises(UserError, match="data.repeats 'Keep' is not known. Did you mean 'keep'"):
        prepare(config(path, repeats="Keep"), tmp_path)
    with pytest.raises(UserError, match=r"cannot be written.*--config\.data\.cache_dir=FOLDER"):
        prepare(config(path), path / "below a file")
    with pytest.raises(UserError, match="does not exist"):
        prepare(config(tmp_path / "none.csv"), tmp_path)
    with pytest.raises(UserError, match="is a folder"):
        prepare(config(tmp_path, format="csv"), tmp_path)


def test_hash_is_of_content_and_settings(tmp_path):
    rows = [("u", "a", 1), ("u", "b", 2)]
    path = csv(tmp_path, rows)
    dataset = prepare(config(path), tmp_path / "cache")
    moved = tmp_path / "elsewhere" / "b.csv"
    moved.parent.mkdir()
    shutil.copy(path, moved)
    copy = prepare(config(moved), tmp_path / "cache")
    assert copy.hash == dataset.hash and len(copy.hash) == 16 and copy.report["source"] == str(moved)
    assert prepare(config(moved), tmp_path / "other cache").hash == dataset.hash
    assert prepare(config(path, min_user=1), tmp_path / "cache").hash != dataset.hash
    assert prepare(config(csv(tmp_path, [*rows, ("u", "c", 3)])), tmp_path / "cache").hash != dataset.hash


def same(one, other):
    arrays = ("items_A", "offsets_U1", "item_ids", "user_ids")
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    return equal and (one.hash, one.report) == (other.hash, other.report)


def test_cache_is_used(tmp_path, monkeypatch):
    data = config(csv(tmp_path, [("u", "a", 1), ("u", "\u00fc", 2)]))
    first = prepare(data, tmp_path / "cache")
    monkeypatch.setattr(sources, "read", None)
    second = prepare(data, tmp_path / "cache")
    assert same(first, second)
    assert [second.items_A.dtype, second.offsets_U1.dtype] == [np.int32, np.int64]
    assert os.listdir(tmp_path / "cache") == [first.hash]


def test_a_fraction_of_the_users_is_the_same_data(tmp_path):
    path = csv(tmp_path, [("u", "a", 1), ("u", "b", 2)])
    whole = prepare(config(path), tmp_path / "cache")
    for _ in range(2):
        part = prepare(config(path, train_fraction=0.5), tmp_path / "cache")
        assert (part.hash, part.train_fraction, whole.train_fraction) == (whole.hash, 0.5, 1.0)


@pytest.mark.parametrize("file", [*preparation._FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "changed"])
def test_damaged_cache_is_rebuilt(tmp_path, file, damage):
    data = config(csv(tmp_path, [("u", "a", 1), ("u", "b", 2)]))
    first = prepare(data, tmp_path / "cache")
    path = tmp_path / "cache" / first.hash / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": content[:-3], "changed": content[:-9] + b"#" + content[-8:]}[damage])
    assert preparation.load(path.parent, "a.csv") is None
    assert same(first, prepare(data, tmp_path / "cache"))
    assert path.read_bytes() == content


def test_killed_writer_leaves_nothing_that_is_used(tmp_path):
    data = config(csv(tmp_path, [("u", "a", 1), ("u", "b", 2)]))
    program = (
        "import sys, time, polars as pl\n"
        "from configs.base import get_config\n"
        "from seqrec_jax.data.prepare import prepare\n"
        "from pathlib import Path\n"
        "pl.DataFrame.write_parquet = lambda *_: time.sleep(60)\n"
        "data = get_config().data\n"
        "data.path = sys.argv[1]\n"
        "prepare(data, Path(sys.argv[2]))\n"
    )
    cache = tmp_path / "cache"
    writer = subprocess.Popen([sys.executable, "-c", program, data.path, str(cache)], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not list(cache.glob("*/*/offsets.npy")) and time.monotonic() < deadline:
        time.sleep(0.02)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (left,) = cache.iterdir()
    dataset = prepare(data, cache)
    assert histories(dataset) == {"u": ["a", "b"]} and left.name != dataset.hash
    shutil.rmtree(cache / dataset.hash)
    shutil.copytree(left / "data", cache / dataset.hash)  # half-written in the very place
    assert same(dataset, prepare(data, cache))


def test_another_process_prepares_the_same(tmp_path, monkeypatch):
    data = config(csv(tmp_path, [("u", "a", 1), ("u", "b", 2)]))
    first = prepare(data, tmp_path / "cache")
    monkeypatch.setattr(preparation, "load", lambda *_: None)  # it finished after this one looked
    assert same(first, prepare(data, tmp_path / "cache"))


def test_tfds_source(tmp_path):
    frame = pl.DataFrame({"user": ["u", "u", "v"], "item": ["a", "b", "a"], "time": [2, 1, 0]})
    folder = tfds_interactions.prepare(frame, tmp_path / "tfds")
    dataset = prepare(config(folder, format="tfds"), tmp_path / "cache")
    assert histories(dataset) == {"u": ["b", "a"], "v": ["a"]}
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert prepare(config(moved, format="tfds"), tmp_path / "cache").hash == dataset.hash


def test_synthetic_source(tmp_path, monkeypatch):
    module = type(sys)("seqrec_jax.data.synthetic")
    module.synthetic_table = lambda users, items, seed: [np.array([3, 1]), np.array([2, 3, 3])]
    monkeypatch.setitem(sys.modules, "seqrec_jax.data.synthetic", module)
    dataset = prepare(config(), tmp_path)
    assert histories(dataset) == {"1": ["3", "1"], "2": ["2", "3", "3"]}
    assert dataset.report["source"] == dataset.report["format"] == "synthetic"
    module.synthetic_table = lambda users, items, seed: [np.array([3, 1]), np.array([2, 3, 1])]
    assert prepare(config(), tmp_path).hash != dataset.hash


pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(pairs, st.integers(0, 4), st.integers(0, 4))
def test_k_core_against_one_removal_at_a_time(rows, min_user, min_item):
    left = list(enumerate(rows))
    while True:
        users, items = [user for _, (user, _) in left], [item for _, (_, item) in left]
        doomed = (
            [user for user in users if users.count(user) < min_user],
            [item for item in items if items.count(item) < min_item],
        )
        if not any(doomed):
            break
        side = 0 if doomed[0] else 1
        left = [row for row in left if row[1][side] != doomed[side][0]]
    frame = pl.DataFrame(rows, schema=["user", "item"], orient="row").with_row_index("row")
    core, _ = k_core(frame, min_user, min_item)
    assert core["row"].to_list() == [row for row, _ in left]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=50))
def test_build_against_plain_python(rows):
    frame = pl.DataFrame(rows, schema=["user", "item", "time"], orient="row")
    if frame["item"].n_unique() < 2:
        return
    frame = frame.with_columns(pl.col("user", "item").cast(pl.String)).with_row_index("line", offset=1)
    dataset = preparation.build(sources.Table(frame, len(rows)), "keep", 0, 0, "here", "csv", "hash")
    expected = {}
    for user, _, _ in rows:
        expected.setdefault(str(user), [])
    for user, item, _ in sorted(rows, key=lambda row: row[2]):
        expected[str(user)].append(str(item))
    assert list(histories(dataset).items()) == list(expected.items())
    assert dataset.item_ids.tolist() == list(dict.fromkeys(str(item) for _, item, _ in rows))
    repeated = [len(h) >= 3 and h[-1] in h[:-1] for h in expected.values()]
    assert dataset.report["test_in_history"]["count"] == sum(repeated)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets (../shared/data) are not here")
@pytest.mark.parametrize(
    "name, core, users, items, actions, repeats, longer, test_in_history",
    [
        ("beauty", 0, 22_363, 12_101, 198_502, 0, 153, 0),
        ("sports", 0, 35_598, 18_357, 296_337, 0, 89, 0),
        ("yelp", 0, 30_431, 20_033, 316_354, 11_830, 354, 2_027),
        ("lastfm", 0, 1_090, 3_646, 52_551, 0, 272, 0),
        ("ml1m", 5, 6_040, 3_416, 999_611, 0, 4_244, 0),
    ],
)
def test_real_data(tmp_path, name, core, users, items, actions, repeats, longer, test_in_history):
    data = config(name=name, dir=str(SHARED), min_user=core, min_item=core)
    dataset = prepare(data, tmp_path)
    report = dataset.report
    assert (report["users"], report["items"], report["actions"]) == (users, items, actions)
    assert (report["repeats"]["count"], report["users_longer_than"]["50"]) == (repeats, longer)
    assert report["test_in_history"]["count"] == test_in_history and not report["rejected"]
    assert round(report["test_in_history"]["share"], 4) == (0.0666 if name == "yelp" else 0)
    assert len(dataset.items_A) == dataset.offsets_U1[-1] == actions
    assert np.array_equal(np.unique(dataset.items_A), np.arange(1, items + 1))
    json.dumps(report)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets (../shared/data) are not here")
def test_real_pairs(tmp_path):
    report = prepare(config(SHARED / "beauty_bert4rec.txt.gz"), tmp_path).report
    assert (report["users"], report["items"], report["actions"]) == (40_226, 54_542, 353_962)
    assert (report["length"]["min"], report["length"]["max"]) == (5, 293)
