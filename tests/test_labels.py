"""Labels of users: every file form against plain Python, the report, bad input."""

import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from seqrec_jax.config import load
from seqrec_jax.data import labels
from seqrec_jax.data.prepare import prepare
from seqrec_jax.errors import UserError

BASE = str(Path(__file__).resolve().parents[1] / "configs" / "base.py")


def read(folder, name, content, **changes):
    """Labels of the users u2, u1, u3, u4 from a file of that content."""
    path = folder / name
    if isinstance(content, pl.DataFrame):
        content.write_parquet(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))
    users = "".join(f"{user},{item}\n" for user in ("u2", "u1", "u3", "u4") for item in "abc")
    (folder / "data.csv").write_text("user_id,item_id\n" + users)
    values = {"data.path": folder / "data.csv", "data.time_column": "", "profile.labels": path}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    config = load(BASE, [(key, str(value)) for key, value in values.items()])
    return labels.read_labels(config, prepare(config.data, folder / "cache"))


ROWS = {"u1": "10", "u2": "9", "u4": "10", "who": "25"}
LINES = "".join(f"{user},{age}\n" for user, age in ROWS.items())


@pytest.mark.parametrize(
    ("name", "content", "changes"),
    [
        ("a.csv", "user_id,age\n" + LINES, {}),
        ("a.tsv", "me\tage\n" + LINES.replace(",", "\t"), {"profile__user_column": "me"}),
        ("a.jsonl", "".join(f'{{"user_id": "{u}", "age": {a}}}\n' for u, a in ROWS.items()), {}),
        ("a.parquet", pl.DataFrame({"user_id": list(ROWS), "age": [int(age) for age in ROWS.values()]}), {}),
        ("a.user", "user_id:token\tage:token\n" + LINES.replace(",", "\t"), {}),
        ("users.dat", "".join(f"{u}::M::{a}::3::0123\n" for u, a in ROWS.items()), {}),
        ("users.dat.gz", gzip.compress("".join(f"{u}::M::{a}::3::0\n" for u, a in ROWS.items()).encode()), {}),
    ],
    ids=["csv", "tsv", "jsonl", "parquet", "recbole", "movielens", "movielens.gz"],
)  # fmt: skip
def test_every_form_gives_the_same_labels(tmp_path, name, content, changes):
    found = read(tmp_path, name, content, profile__label="age", **changes)
    assert found.classes.tolist() == ["9", "10"]  # by number
    assert found.label_U.tolist() == [0, 1, -1, 1] and found.label_U.dtype == np.int32
    assert found.users_N.tolist() == [0, 1, 3]
    assert found.report == {
        "source": str(tmp_path / name), "label": "age", "classes": {"9": 1, "10": 2}, "users_without_label": 1,
        "labels_without_user": 1, "repeats": 0, "rejected": {},
    }  # fmt: skip
    assert labels.report_line(found.report) == (
        "age in 2 classes (9 1, 10 2); 1 users without; left out: 1 unknown users, 0 repeats, 0 bad rows"
    )


def test_names_that_are_no_numbers_are_sorted_as_text(tmp_path):
    found = read(tmp_path, "a.csv", "user_id,gender\nu1,10\nu2,9\nu3,x\nu1,10\n")
    assert found.classes.tolist() == ["10", "9", "x"] and found.report["repeats"] == 1
    again = read(tmp_path, "a.csv", "user_id,gender\nu3,x\nu1,10\nu2,9\n")
    assert again.hash == found.hash != read(tmp_path, "a.csv", "user_id,gender\nu3,9\nu1,10\nu2,x\n").hash


def test_bad_rows_are_counted_where_that_is_asked_for(tmp_path):
    content = "user_id,gender\nu1,F\nu2,\nu3,M\n"
    with pytest.raises(UserError, match="a.csv:3: empty gender"):
        read(tmp_path, "a.csv", content)
    found = read(tmp_path, "a.csv", content, data__on_bad_row="drop")
    assert found.label_U.tolist() == [-1, 0, 1, -1] and found.report["rejected"]["empty gender"]["count"] == 1


@pytest.mark.parametrize(
    ("name", "content", "changes", "said"),
    [
        ("a.csv", "user_id,gender\nu1,F\nu2,M\nu1,M\n", {}, "a.csv:4: user u1 has gender M, but F in line 2"),
        ("a.csv", "user_id,gender\nu1,F\nu2,F\nx,M\n", {}, "all 2 labelled users have gender F"),
        ("a.csv", "user_id,gender\nx,F\ny,M\n", {}, r"none of its users \(\['x', 'y'\] ...\) is in the data"),
        ("a.csv", "user_id,gendr\nu1,F\n", {}, "column 'gender' is not known. Did you mean 'gendr'"),
        ("a.csv", "user_id,gender\nu1,F,3\n", {}, "a.csv:2: wrong number of fields"),
        ("a.csv", "user_id,gender\n", {}, "no rows"),
        ("a.csv", "", {}, "is empty"),
        ("a.xls", "x", {}, "a.xls does not tell its format.*.user"),
        ("a.csv", "user_id,gender\nu1,F\n", {"profile__labels": ""}, "--config.profile.labels=FILE"),
        ("a.csv", "user_id,gender\nu1,F\n", {"profile__labels": "b.csv"}, "b.csv: no such file"),
        ("a.csv", "user_id,gender\nu1,F\n", {"profile__labels": "included"}, "no labels come with .*data.csv"),
        ("a.csv", "user_id,gender\nu1,F\n", {"profile__label": "user_id"}, "the column of the users' ids"),
    ],
)
def test_bad_labels_are_explained(tmp_path, name, content, changes, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, name, content, **changes)


def test_folds_are_of_the_labelled_users_and_can_be_learned(tmp_path):
    label_U = np.array([-1, *([0, 1] * 10)], np.int32)
    known = labels.Labels("taste", label_U, np.array(["a", "b"]), {}, "")
    folds = labels.splits_of(known, 5, 0)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(1, 21))
    (single,) = labels.splits_of(known, 1, 0)
    assert (len(single.train), len(single.valid), len(single.test)) == (16, 1, 3)
    lonely = labels.Labels("taste", np.array([0] * 9 + [1], np.int32), known.classes, {}, "")
    with pytest.raises(UserError, match="all have the same taste"):
        labels.splits_of(lonely, 5, 0)


def test_the_embedded_data_has_labels(tmp_path):
    values = {"data.synthetic_users": 60, "data.synthetic_items": 100, "profile.labels": "included"}
    config = load(BASE, [(key, str(value)) for key, value in values.items()])
    found = labels.read_labels(config, prepare(config.data, tmp_path))
    assert found.name == "taste" and (found.label_U >= 0).all() and 2 <= len(found.classes) <= 5


def test_movielens(tmp_path, shared_data):
    values = {"data.name": "ml1m", "data.dir": shared_data, "profile.labels": "included"}
    config = load(BASE, [(key, str(value)) for key, value in values.items()])
    dataset, counts = prepare(config.data, tmp_path), {}
    for label in ("gender", "age", "occupation"):
        config.profile.label = label
        found = labels.read_labels(config, dataset)
        assert found.report["users_without_label"] == found.report["labels_without_user"] == 0
        assert list(found.report["classes"]) == found.classes.tolist()
        counts[found.name] = found.report["classes"]
    assert counts["gender"] == {"F": 1709, "M": 4331} and len(counts["occupation"]) == 21
    assert counts["age"] == {"1": 222, "18": 1103, "25": 2096, "35": 1193, "45": 550, "50": 496, "56": 380}
