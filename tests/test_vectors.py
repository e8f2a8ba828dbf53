"""Vectors to a file and back; histories of a file in the ids of a known catalogue; both against plain Python."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.base import get_config
from seqrec_jax.data import histories
from seqrec_jax.data.tables import read_pieces, read_table
from seqrec_jax.data.vectors import read_vectors, vector_writer
from seqrec_jax.errors import UserError

VECTORS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
IDS = ["a", "b 1", "ü", "007", "7"]


def test_what_is_written_is_read_in_any_order(tmp_path):
    path = tmp_path / "new" / "v.parquet"
    with vector_writer(path, "user_id", 3) as write:
        write(IDS[:2], VECTORS[:2])
        write(IDS[2:], VECTORS[2:])
        assert not path.exists()
    assert list(path.parent.iterdir()) == [path]
    assert np.array_equal(read_vectors(path, ["7", "a", "ü"]), VECTORS[[4, 0, 2]])
    frame = pl.read_parquet(path)
    assert frame["user_id"].to_list() == IDS and np.array_equal(frame["vector"].to_numpy(), VECTORS)
    assert read_vectors(path, IDS).dtype == np.float32


def test_a_file_that_was_not_finished_has_no_name(tmp_path):
    with pytest.raises(ZeroDivisionError), vector_writer(tmp_path / "v.parquet", "user_id", 3) as write:
        write(IDS, VECTORS)
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written.*--out"), vector_writer(tmp_path / "file" / "v", "u", 3):
        pass


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"user_id": ["a"], "x": [[1.0]]}, "the columns must be user_id and vector, not user_id, x"),
        ({"user_id": ["a", "b"], "vector": [1.0, 2.0]}, "holds Float64, not lists"),
        ({"user_id": ["a", "b"], "vector": [{"x": 1.0}, {"x": 2.0}]}, "not lists of numbers"),
        ({"user_id": ["a", "b"], "vector": [["1"], ["2"]]}, "not lists of numbers"),
        ({"user_id": ["a", "a", "b"], "vector": [[1.0], [2.0], [3.0]]}, "user_id a has more than one"),
        ({"user_id": ["a"], "vector": [[1.0]]}, "no vector for user_id b .1 are missing"),
        ({"user_id": ["a", "b"], "vector": [[1.0], None]}, "no vector for user_id b"),
        ({"user_id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}, r"different lengths: \[1, 2\]"),
        ({"user_id": ["a", "b"], "vector": [[1.0], [float("nan")]]}, "of user_id b is not finite"),
    ],
)
def test_bad_vectors_are_explained(tmp_path, columns, said):
    pl.DataFrame(columns).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(UserError, match=said):
        read_vectors(tmp_path / "v.parquet", ["a", "b"])


def test_other_writers_lists_and_numbers_are_read(tmp_path):
    pl.DataFrame({"user_id": [3, 1], "vector": [[1, 2], [3, 4]]}).write_parquet(tmp_path / "v.parquet")
    assert read_vectors(tmp_path / "v.parquet", ["1", "3"]).tolist() == [[3, 4], [1, 2]]
    with pytest.raises(UserError, match="none.parquet cannot be read"):
        read_vectors(tmp_path / "none.parquet", ["1"])


# Histories

CATALOGUE = ["x", "y", "z w", '"q"']
TABLE = st.lists(
    st.tuples(st.sampled_from("uvw"), st.sampled_from(["x", "y", "z w", '"q"', "?"]), st.integers(0, 3)),
    min_size=1,
    max_size=25,
)


def write(path, rows):
    frame = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    elif path.suffix == ".jsonl":
        frame.write_ndjson(path)
    else:
        frame.write_csv(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("histories")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl"])
@pytest.mark.parametrize(
    ("time", "repeats"), [("timestamp", "keep"), ("", "keep"), ("timestamp", "drop"), ("", "drop")]
)
def test_histories_are_those_of_plain_python(folder, monkeypatch, name, time, repeats):
    monkeypatch.setattr(histories, "PIECE", 4)
    data = get_config().data
    data.time_column, data.repeats = time, repeats

    @settings(max_examples=30, deadline=None)
    @given(TABLE)
    def check(rows):
        write(folder / name, rows)
        ordered = sorted(rows, key=lambda row: row[2]) if time else rows
        expected = {user: [item for u, item, _ in ordered if u == user and item != "?"] for user, _, _ in rows}
        if repeats == "drop":
            expected = {user: list(dict.fromkeys(items)) for user, items in expected.items()}
        if not any(expected.values()):
            with pytest.raises(UserError, match="knows none of its items"):
                histories.read_histories(folder / name, data, CATALOGUE)
            return
        found = histories.read_histories(folder / name, data, CATALOGUE)
        parts = np.split(found.items_A, found.offsets_U1[1:-1])
        assert {
            user: [CATALOGUE[item - 1] for item in part] for user, part in zip(found.user_ids, parts, strict=True)
        } == {u: h for u, h in expected.items() if h}
        assert found.user_ids.to_list() == [user for user, history in expected.items() if history]
        assert found.unknown_actions == sum(item == "?" for _, item, _ in rows)
        assert found.unknown_users == sum(not history for history in expected.values())

    check()


def test_lines_of_users_may_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(histories, "PIECE", 1)
    (tmp_path / "h.txt").write_text("u x ? y\nv ?\n\nu x\nw y\n")
    found = histories.read_histories(tmp_path / "h.txt", get_config().data, CATALOGUE)
    assert found.user_ids.to_list() == ["u", "w"] and found.items_A.tolist() == [1, 2, 1, 2]
    assert found.offsets_U1.tolist() == [0, 3, 4] and (found.unknown_actions, found.unknown_users) == (2, 1)


def test_bad_rows_of_histories(tmp_path):
    data = get_config().data
    (tmp_path / "h.csv").write_text("user_id,item_id,timestamp\nu,x,1\nu,y,soon\n")
    with pytest.raises(UserError, match="h.csv:3: timestamp is not a number"):
        histories.read_histories(tmp_path / "h.csv", data, CATALOGUE)
    data.on_bad_row = "drop"
    assert histories.read_histories(tmp_path / "h.csv", data, CATALOGUE).bad_rows == 1
    data.item_column = "user_id"
    with pytest.raises(UserError, match="name each column once"):
        histories.read_histories(tmp_path / "h.csv", data, CATALOGUE)
    (tmp_path / "h.xls").touch()
    with pytest.raises(UserError, match="does not tell its format"):
        histories.read_histories(tmp_path / "h.xls", data, CATALOGUE)


# The reader in pieces


@pytest.mark.parametrize("lines", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '\ufeffuser,item\na,"x,1"\nb,y\n\nc,"z ""q"""\nd\n,e\nf,a""b\n'),
        ("a.inter", "user:token\titem:token\na\tx\r\nb\ty\r\n\r\nc\tz\nd\n"),
        ("a.dat", "a::x\nb::y\n\n\nc::z\nd\n"),
        ("a.jsonl", '{"user": "a", "item": "x"}\n{"user": "b"}\n[1]\n{"user": 3, "item": "z"}\n'),
        ("a.txt", "a x y\n\nb\nc z\na x\n"),
    ],
)
def test_pieces_are_the_table(tmp_path, name, content, lines):
    path, form = tmp_path / name, {"a.csv": "csv", "a.inter": "recbole", "a.dat": "movielens", "a.jsonl": "jsonl",
                                   "a.txt": "lines"}[name]  # fmt: skip
    path.write_text(content, newline="")
    kinds, names = {"user": "id", "item": "id"}, ("user", "item") if form == "movielens" else ()
    whole = read_table(path, form, kinds, "drop", names)
    pieces = list(read_pieces(path, form, kinds, "drop", names, lines))
    assert pl.concat(piece.frame for piece in pieces).equals(whole.frame)
    assert sum(piece.rows_read for piece in pieces) == whole.rows_read
    first = {}
    for rejection in (rejection for piece in pieces for rejection in piece.rejections):
        count, line = first.get(rejection.reason, (0, rejection.line))
        first[rejection.reason] = count + rejection.count, line
    assert first == {rejection.reason: (rejection.count, rejection.line) for rejection in whole.rejections}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n \n", "no line besides blank ones"),
        ("a.csv", b"user,item\n", "only a header"),
        ("a.csv.gz", b"\x1f\x8b\x08\x00", "damaged or cut short"),
        ("none", None, "does not exist"),
    ],
)
def test_pieces_of_nothing_are_explained(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        list(read_pieces(tmp_path / name, "csv", {"user": "id"}, lines=2))
