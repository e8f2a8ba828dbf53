"""Cold-start targets against plain Python; the set made from MovieLens; bad input."""

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqrec_jax.config import load
from seqrec_jax.data import cold_start
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.prepare import prepare
from seqrec_jax.data.splits import split_users
from seqrec_jax.data.tables import Table
from seqrec_jax.errors import UserError

BASE = str(Path(__file__).resolve().parents[1] / "configs" / "base.py")


def read(folder, name, content, **changes):
    """Targets of the users 2, 1, 3, 4 from a file of that content."""
    path = folder / name
    if isinstance(content, pl.DataFrame):
        content.write_parquet(path)
    else:
        path.write_text(content)
    (folder / "source.txt").write_text("2 5 6\n1 7\n3 5 6\n4 8\n")
    values = {"data.path": folder / "source.txt", "cold_start.targets": path}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    config = load(BASE, [(key, str(value)) for key, value in values.items()])
    return cold_start.read_targets(config, prepare(config.data, folder / "cache"))


ROWS = [("1", "90"), ("9", "7"), ("4", "8"), ("1", "8"), ("2", "5"), ("1", "90")]


@pytest.mark.parametrize(
    ("name", "content", "changes"),
    [
        ("a.txt", "1 90\n9 7\n4 8\n1 8\n2 5\n1 90\n", {}),
        ("a.csv", "user_id,item_id\n" + "".join(f"{u},{i}\n" for u, i in ROWS), {}),
        ("a.parquet", pl.DataFrame(ROWS, ["who", "what"], orient="row"),
         {"cold_start__user_column": "who", "cold_start__item_column": "what"}),
        ("a.inter", "user_id:token\titem_id:token\n" + "".join(f"{u}\t{i}\n" for u, i in ROWS), {}),
    ],
)  # fmt: skip
def test_every_form_gives_the_same_targets(tmp_path, name, content, changes):
    found = read(tmp_path, name, content, **changes)
    assert found.target_ids.tolist() == ["90", "8", "5"]  # in order of first appearance, of users who are known
    assert found.offsets_U1.tolist() == [0, 1, 3, 3, 4] and found.targets_N.tolist() == [2, 0, 1, 1]
    assert found.report == {
        "source": str(tmp_path / name), "users": 3, "items": 3, "targets": 4, "users_without_target": 1,
        "targets_without_user": 1, "repeats": 1, "rejected": {},
    }  # fmt: skip
    assert cold_start.report_line(found.report) == (
        "4 of 3 items, of 3 users; 1 users without; left out: 1 of unknown users, 1 repeats, 0 bad rows"
    )
    assert found.owner_N.tolist() == [0, 1, 1, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcx"), st.sampled_from("pqr")), min_size=1, max_size=20))
def test_against_plain_python(rows):
    dataset = SequenceDataset(np.zeros(0), np.zeros(1), np.array(["i"]), np.array(["c", "a", "b"]), "", {})
    expected = {user: list(dict.fromkeys(item for u, item in rows if u == user)) for user in "cab"}
    table = Table(pl.DataFrame(rows, ["user", "item"], orient="row"), len(rows))
    if len({item for items in expected.values() for item in items}) < 2:
        with pytest.raises(UserError, match="none of its users|only target item"):
            cold_start.join_targets(table, dataset, "file")
        return
    found = cold_start.join_targets(table, dataset, "file")
    lists = np.split(found.target_ids[found.targets_N], found.offsets_U1[1:-1])
    assert {user: part.tolist() for user, part in zip("cab", lists, strict=True)} == expected
    assert found.users_N.tolist() == [row for row, user in enumerate("cab") if expected[user]]


@pytest.mark.parametrize(
    ("name", "content", "changes", "said"),
    [
        ("a.csv", "user_id,item_id\n7,5\n", {}, r"none of its users \(\['7'\] ...\) is in the data"),
        ("a.csv", "user_id,item_id\n1,5\n2,5\n", {}, "'5' is the only target item"),
        ("a.csv", "user_id,item\n1,5\n", {}, "column 'item_id' is not known"),
        ("a.csv", "user_id,item_id\n1,5\n1,\n", {}, "a.csv:3: empty item_id"),
        ("a.txt", "1 5 x\n", {}, "a.txt:1: item is not an integer from 1"),
        ("a.xls", "1 5\n", {}, "does not tell its format"),
        ("a.csv", "user_id,item_id\n", {"cold_start__targets": ""}, "--config.cold_start.targets=FILE"),
        ("a.csv", "user_id,item_id\n", {"cold_start__targets": "b.csv"}, "b.csv: no such file"),
        ("a.csv", "x\n", {"cold_start__user_column": "x", "cold_start__item_column": "x"}, "are both x"),
    ],
)
def test_bad_targets_are_explained(tmp_path, name, content, changes, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, name, content, **changes)


YEARS = {"a": 1980, "b": 1990, "c": 1990, "d": 1999, "e": 2000}  # the median year, 1990, is of the older half


def test_a_made_set():
    histories = {
        "nobody": ["a", "b"], "late": ["d", "a"], "one": ["c", "d", "b"], "many": ["a", "c", "d", "b", "e", "d", "e"],
    }  # fmt: skip
    source, target, report = cold_start.make_cold_start(histories, YEARS)
    assert source == {"one": ["c"], "many": ["a", "c"]}
    assert target == {"one": ["d"], "many": ["d", "e", "d"]}
    assert report == {
        "median_year": 1990, "older_items": 3, "newer_items": 2, "users": 2, "users_without_target": 1,
        "users_without_source": 1, "source_actions": 3, "targets": 4,
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("uvwx"), st.lists(st.sampled_from("abcde"), min_size=1, max_size=8), min_size=1))
def test_nothing_after_the_first_target_is_source(histories):
    source, target, report = cold_start.make_cold_start(histories, YEARS, targets=2)
    median = np.median([YEARS[item] for item in set().union(*histories.values())])
    for user, history in histories.items():
        newer = [item for item in history if YEARS[item] > median]
        if user not in source:
            assert user not in target and (not newer or history[0] == newer[0])
            continue
        assert history[: len(source[user]) + 1] == [*source[user], target[user][0]]
        assert target[user] == newer[:2] and all(YEARS[item] <= median for item in source[user])
    assert report["users"] + report["users_without_target"] + report["users_without_source"] == len(histories)


def movielens(folder):
    (folder / "ratings.dat").write_text("1::10::5::3\n1::20::4::9\n1::30::3::5\n2::30::3::5\n2::10::1::6\n")
    (folder / "movies.dat").write_text(
        "10::Old (1950)::War\n20::New, The (2000)::War|Drama\n30::Mid (1950) (1990)::War\n"
    )
    return [str(folder / "ratings.dat"), str(folder / "movies.dat"), str(folder / "made")]


def test_the_command_writes_both_files(tmp_path, capsys):
    arguments = movielens(tmp_path)
    assert cold_start.main(arguments) == 0
    assert (tmp_path / "made" / "source.txt").read_text() == "1 10 30\n"
    assert (tmp_path / "made" / "targets.txt").read_text() == "1 20\n"
    assert re.search(r"median_year +1990\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder, arguments: arguments[:2], "INTERACTIONS MOVIES FOLDER"),
        (lambda folder, arguments: [str(folder / "none.dat"), *arguments[1:]], "none.dat does not exist\n"),
        (lambda folder, arguments: [arguments[0], str(folder / "none.dat"), arguments[2]], "none.dat does not exist\n"),
        (lambda folder, arguments: [arguments[0], str(folder / "short.dat"), arguments[2]], "short.dat: no movie 20"),
        (lambda folder, arguments: [arguments[0], str(folder / "odd.dat"), arguments[2]], "odd.dat:2: the title 'New'"),
    ],
)
def test_the_command_explains_what_is_missing(tmp_path, capsys, change, said):
    arguments = movielens(tmp_path)
    (tmp_path / "short.dat").write_text("10::Old (1950)::War\n30::Mid (1990)::War\n")
    (tmp_path / "odd.dat").write_text("10::Old (1950)::War\n20::New::War\n30::Mid (1990)::War\n")
    assert cold_start.main(change(tmp_path, arguments)) == 2
    assert said in capsys.readouterr().err


def test_movielens(tmp_path, shared_data, capsys):
    folder = shared_data / "ml-1m"
    assert cold_start.main([str(folder / "ml-1m.txt.gz"), str(folder / "movies.dat.gz"), str(tmp_path)]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert said == {
        "median_year": "1994", "older_items": "2,038", "newer_items": "1,668", "users": "4,355",
        "users_without_target": "15", "users_without_source": "1,670", "source_actions": "18,241", "targets": "12,930",
    }  # fmt: skip
    values = {"data.path": tmp_path / "source.txt", "cold_start.targets": tmp_path / "targets.txt"}
    config = load(BASE, [(key, str(value)) for key, value in values.items()])
    found = cold_start.read_targets(config, prepare(config.data, tmp_path / "cache"))
    assert (found.report["users"], found.report["targets"], found.report["users_without_target"]) == (4355, 12930, 0)
    split = split_users(found.users_N, 0)
    assert (len(split.train), len(split.valid), len(split.test)) == (3484, 218, 653)
    assert sum(np.isin(found.owner_N, part).sum() for part in (split.train, split.valid, split.test)) == 12930
