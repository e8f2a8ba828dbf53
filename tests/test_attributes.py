"""Attributes of items: every file form against plain Python sets, the cache, the report, bad input."""

import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqrec_jax.config import load
from seqrec_jax.data import attributes, sources, tables
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.prepare import prepare, print_report
from seqrec_jax.data.synthetic import synthetic_table
from seqrec_jax.errors import UserError
from seqrec_jax.validate import validate

BASE = str(Path(__file__).resolve().parents[1] / "configs" / "base.py")


def settings_of(folder, **changes):
    """config.data for a file of the items a, b, c, d, with other `changes`."""
    (folder / "data.csv").write_text("user_id,item_id,timestamp\nu,a,1\nu,b,2\nu,c,3\nv,c,1\nv,d,2\n")
    values = {"path": folder / "data.csv"} | changes
    return load(BASE, [(f"data.{key}", str(value)) for key, value in values.items()]).data


def sets_of(dataset):
    """{item: set of attribute names} from the CSR form, which is checked on the way."""
    offsets = dataset.attribute_offsets_V1
    assert len(offsets) == len(dataset.item_ids) + 1 and offsets[0] == 0 and offsets[-1] == len(dataset.attributes_N)
    found = {}
    for item, begin, end in zip(dataset.item_ids.tolist(), offsets, offsets[1:], strict=False):
        ids = dataset.attributes_N[begin:end]
        assert (np.diff(ids) > 0).all() and (ids >= 1).all()
        found[item] = {str(dataset.attribute_names[i - 1]) for i in ids}
    assert set().union(*found.values()) == set(dataset.attribute_names.tolist())
    return found


def made(folder, name, content, **changes):
    path = folder / name
    if isinstance(content, pl.DataFrame):
        content.write_parquet(path)
    else:
        path.write_bytes(content.encode("latin-1"))
    return prepare(settings_of(folder, attributes=path, **changes), folder / "cache")


EXPECTED = {"a": {"x", "y"}, "b": set(), "c": {"y", "z w"}, "d": {"x"}}
LISTS = {"item_id": ["a", "b", "c", "d", "e"], "tags": [["x", "y"], [], ["y", "z w", "y"], ["x"], ["q"]]}


@pytest.mark.parametrize(
    ("name", "content", "changes"),
    [
        ("a.json", json.dumps({"d": ["x"], "a": ["x", "y"], "c": ["y", "z w", "y"], "b": [], "e": ["q"]}), {}),
        ("a.csv", "item_id,tags\na,x|y\nb,\nc,y| z w |y\nd,x\ne,q\n", {"attribute_columns": "tags"}),
        ("a.tsv", "item_id\ttags\na\tx;y\nb\t\nc\ty;z w;y\nd\tx\ne\tq\n",
         {"attribute_columns": "tags", "attribute_separator": ";"}),
        ("a.parquet", pl.DataFrame(LISTS), {"attribute_columns": "tags"}),
        ("movies.dat", "a::A Title (1995)::x|y\nb::B::\nc::C::y|z w|y\nd::D::x\ne::E::q\n", {}),
    ],
    ids=["json", "csv", "tsv", "parquet lists", "movielens"],
)  # fmt: skip
def test_every_form_gives_the_same_sets(tmp_path, capsys, name, content, changes):
    dataset = made(tmp_path, name, content, **changes)
    assert sets_of(dataset) == EXPECTED
    assert dataset.report["attributes"] == {
        "attributes": 3, "mean": 5 / 4, "most": 2, "items_without": 1, "unknown_items": 1, "repeats": 1,
        "rejected": {},
    }  # fmt: skip
    print_report(dataset.report)
    line = "3, 1.25 an item (at most 2), 1 items without; left out: 1 unknown items, 1 repeats, 0 bad rows"
    assert line in capsys.readouterr().out


def test_bad_rows_that_are_dropped_are_counted(tmp_path):
    content = "item_id,tags\na,x\nb,y,z\n,x\n-3,x\nc,y\n"
    dataset = made(tmp_path, "a.csv", content, attribute_columns="tags", on_bad_row="drop")
    assert sets_of(dataset) == {"a": {"x"}, "b": set(), "c": {"y"}, "d": set()}
    rejected = dataset.report["attributes"]["rejected"]
    assert {reason: (found["count"], found["first"].split(":")[1]) for reason, found in rejected.items()} == {
        "wrong number of fields (expected 2)": (1, "3"), "empty item_id": (1, "4"),
        "item_id is a negative number": (1, "5"),
    }  # fmt: skip
    assert attributes.report_line(dataset.report["attributes"]).endswith("3 bad rows")


def test_recbole_reads_token_sequences_and_names_their_column(tmp_path):
    content = "item_id:token\tname:token\tkind:token_seq\tbrand:token_seq\na\tA x\tx y\tx\nc\tC\ty\t\n"
    assert sets_of(made(tmp_path, "a.item", content)) == {
        "a": {"kind=x", "kind=y", "brand=x"}, "b": set(), "c": {"kind=y"}, "d": set(),
    }  # fmt: skip
    one = made(tmp_path, "a.item", content, attribute_columns="kind")
    assert sets_of(one) == {"a": {"x", "y"}, "b": set(), "c": {"y"}, "d": set()}


words = st.text("pqr1", min_size=1, max_size=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.lists(words, max_size=4)), max_size=8))
def test_against_plain_python(rows):
    """An item in several rows has the union of them."""
    dataset = SequenceDataset(np.zeros(0), np.zeros(1), np.array(["c", "a", "b"]), np.array(["u"]), "", {})
    expected = {item: {a for i, found in rows for a in found if i == item} for item in ("c", "a", "b")}
    frame = pl.DataFrame(
        {"item": [item for item, _ in rows], "attributes": [found for _, found in rows]},
        schema={"item": pl.String, "attributes": pl.List(pl.String)},
    )
    if not any(expected.values()):
        with pytest.raises(UserError):
            attributes.with_attributes(dataset, tables.Table(frame, len(frame)), "file")
        return
    assert sets_of(attributes.with_attributes(dataset, tables.Table(frame, len(frame)), "file")) == expected


def test_the_cache_holds_them_and_the_hash_knows_them(tmp_path, monkeypatch):
    first = made(tmp_path, "a.json", '{"a": [1, 2], "c": [2]}')
    plain = prepare(settings_of(tmp_path), tmp_path / "cache")
    assert not len(plain.attribute_names) and "attributes" not in plain.report
    assert made(tmp_path, "a.json", '{"a": [1, 2], "c": [3]}').hash != first.hash != plain.hash
    monkeypatch.setattr(sources, "read", None)  # not read again
    monkeypatch.setattr(attributes, "read_attributes", None)
    again = made(tmp_path, "a.json", '{"a": [1, 2], "c": [2]}')
    assert sets_of(again) == sets_of(first) and again.report == first.report and again.hash == first.hash
    packed = tmp_path / "b.json.gz"
    packed.write_bytes(gzip.compress(b'{"a": [1, 2], "c": [2]}'))
    assert prepare(settings_of(tmp_path, attributes=packed), tmp_path / "cache").hash == first.hash


def test_the_embedded_data_has_its_clusters(tmp_path):
    values = {"synthetic_users": 50, "synthetic_items": 60, "attributes": "included"}
    data = load(BASE, [(f"data.{key}", str(value)) for key, value in values.items()]).data
    dataset = prepare(data, tmp_path)
    assert len(dataset.attribute_names) == 25 and all(len(found) == 1 for found in sets_of(dataset).values())
    plain = prepare(load(BASE, [("data.synthetic_users", "50"), ("data.synthetic_items", "60")]).data, tmp_path)
    assert np.array_equal(dataset.items_A, plain.items_A)
    cluster = {item: found for item, (found,) in ((i, tuple(s)) for i, s in sets_of(dataset).items())}
    same = [
        cluster[str(a)] == cluster[str(b)] for h in synthetic_table(50, 60, 0) for a, b in zip(h, h[1:], strict=False)
    ]
    assert np.mean(same) > 0.15  # of 25 clusters: neighbours in a history share theirs


@pytest.mark.parametrize(
    ("name", "content", "changes", "said"),
    [
        ("a.json", "{", {}, "a.json is no JSON"),
        ("a.json", "[1]", {}, "holds no items"),
        ("a.json", "{}", {}, "holds no items"),
        ("a.json", '{"a": 3}', {}, "item a: expected a list"),
        ("a.json", '{"a": [1.5]}', {}, "item a: expected a list"),
        ("a.json", '{"a": [1], "c": [true]}', {}, "item c: expected a list"),
        ("a.json", '{"a": [3, -2]}', {}, "item a has the attribute -2, a negative number"),
        ("a.json", '{"a": [3], "-4": [1]}', {}, "'-4' is no item: it is negative"),
        ("a.json", '{"a": [3], " ": [1]}', {}, "' ' is no item: it is empty"),
        ("a.csv", "item_id,x,y\na,1,2\nq,1,-2\n", {"attribute_columns": "x,y"}, "item q has the attribute y=-2"),
        ("a.json", '{"A": [1]}', {}, r"none of its items \(\['A'\] ...\) is in the data"),
        ("a.json", '{"a": []}', {}, "no item of the data has an attribute"),
        ("a.json", "", {}, "is empty"),
        ("a.txt", "a 1", {}, "does not tell its format.*.json, .item"),
        ("a.csv", "item_id,tags\na,x\n", {}, "--config.data.attribute_columns=NAME"),
        (
            "a.csv",
            "item_id,tags\na,x\n",
            {"attribute_columns": "tag"},
            "column 'tag' is not known. Did you mean 'tags'",
        ),
        ("a.csv", "item_id,tags\na,x,y\n", {"attribute_columns": "tags"}, r"a.csv:2: wrong number of fields"),
        ("a.item", "item_id:token\tname:token\na\tx\n", {}, "--config.data.attribute_columns=NAME"),
    ],
)
def test_bad_files_are_explained(tmp_path, name, content, changes, said):
    with pytest.raises(UserError, match=said):
        made(tmp_path, name, content, **changes)


def test_places_that_do_not_exist(tmp_path):
    with pytest.raises(UserError, match="none.json: no such file .config.data.attributes="):
        prepare(settings_of(tmp_path, attributes=tmp_path / "none.json"), tmp_path / "cache")
    with pytest.raises(UserError, match="is no named data set in a data.dir: set --config.data.attributes=FILE"):
        prepare(settings_of(tmp_path, attributes="included"), tmp_path / "cache")
    with pytest.raises(UserError, match="is no named data set in a data.dir"):  # its file is data.path's
        prepare(settings_of(tmp_path, attributes="included", name="beauty"), tmp_path / "cache")
    with pytest.raises(UserError, match="attribute_separator is empty"):
        validate(load(BASE, [("data.attribute_separator", "")]), 1)


@pytest.mark.parametrize(
    ("name", "count", "mean", "most", "without"),
    [("beauty", 637, 3.72, 6, 0), ("sports", 2277, 5.80, 16, 0), ("yelp", 1001, 4.84, 20, 1),
     ("lastfm", 388, 12.45, 110, 0), ("ml1m", 18, None, 6, 0)],
)  # fmt: skip
def test_real_data(tmp_path, shared_data, name, count, mean, most, without):
    values = {"name": name, "dir": shared_data, "attributes": "included", "cache_dir": tmp_path}
    dataset = prepare(load(BASE, [(f"data.{key}", str(value)) for key, value in values.items()]).data, tmp_path)
    report = dataset.report["attributes"]
    assert (report["attributes"], report["most"], report["items_without"]) == (count, most, without)
    assert mean is None or report["mean"] == pytest.approx(mean, abs=0.005)
