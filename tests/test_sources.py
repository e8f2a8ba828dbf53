"""Every table form reads the same rows, and every fault is reported with its exact line."""

import gzip
import json
import subprocess
import sys

import polars as pl
import pytest

from configs.base import get_config
from seqrec_jax.data import sources, tfds_interactions
from seqrec_jax.errors import UserError

ROWS = [("B01", "007", 30), ("B01", "7", 10), ("B02", "7", 20)]
COLUMNS = {"user_id": "id", "item_id": "id", "timestamp": "number"}


def config(path, **settings):
    data = get_config().data
    data.path = str(path)
    data.update(settings)
    return data


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(table):
    return table.frame.select("user", "item", "time").rows()


def join(separator, header, table=ROWS):
    return "".join(separator.join(map(str, row)) + "\n" for row in ([header] if header else []) + table)


HEADER = ("user_id", "item_id", "timestamp")
TEXTS = {
    "a.csv": join(",", HEADER),
    "a.tsv": join("\t", HEADER),
    "a.inter": join("\t", ("user_id:token", "item_id:token", "timestamp:float")),
    "a.dat": join("::", None, [(user, item, 5, time) for user, item, time in ROWS]),
    "a.jsonl": "".join(json.dumps(dict(zip(HEADER, row, strict=True))) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_text_formats_by_file_name(tmp_path, name, compress):
    content = TEXTS[name].encode()
    path = write(tmp_path, name + ".gz" * compress, gzip.compress(content) if compress else content)
    table = sources.read(config(path))
    assert rows(table) == ROWS
    assert table.rows_read == 3 and not table.rejections and not table.blank_lines
    assert table.frame["line"].to_list() == ([1, 2, 3] if name in ("a.dat", "a.jsonl") else [2, 3, 4])
    assert table.frame["time"].dtype == pl.Int64


def test_parquet_with_typed_columns(tmp_path):
    frame = pl.DataFrame({"user_id": [5, 6], "item_id": ["a", "b"], "timestamp": [2, 1], "x": [[1], [2]]})
    frame = frame.with_columns(pl.col("timestamp").cast(pl.Datetime("ms")))
    frame.write_parquet(tmp_path / "a.parquet")
    table = sources.read(config(tmp_path / "a.parquet"))
    assert rows(table) == [("5", "a", 2), ("6", "b", 1)]
    assert table.frame["line"].to_list() == [1, 2]


def test_parquet_faults(tmp_path):
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        sources.read(config(write(tmp_path, "a.parquet", "no parquet")))
    frame = pl.DataFrame({"user_id": ["u", None], "item_id": [1.5, 2.0], "timestamp": [2, 1]})
    frame.write_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet:1: item_id is a fractional number: 'u, 1.5, 2'"):
        sources.read(config(tmp_path / "b.parquet"))


def test_lines_of_one_user_are_joined_in_file_order(tmp_path):
    table = sources.read(config(write(tmp_path, "a.txt", "2 30 20\n1\t10  5 \r\n\n2 20\n")))
    assert table.frame.rows() == [(1, "2", "30"), (1, "2", "20"), (2, "1", "10"), (2, "1", "5"), (4, "2", "20")]
    assert table.blank_lines == 1


@pytest.mark.parametrize(
    "content, line, reason",
    [
        ("1 2\n1 x\n", 2, "item is not an integer from 1: '1 x'"),
        ("1 2\n\n1 3 0\n", 3, "item is not an integer from 1: '1 0'"),
        ("1 2\n1 -3\n", 2, "item is not an integer from 1"),
        ("1 2\n1 3.0\n", 2, "item is not an integer from 1"),
        ("1 2\n1 nan\n", 2, "item is not an integer from 1"),
        ("0 2\n", 1, "user is not an integer from 1"),
        ("1 2\n2\n", 2, "empty item: '2'"),
        (f"1 2\n2 {2**63 - 1}\n2 {2**63}\n", 3, r"item is beyond 2\^63 - 1"),
        (b"1 2\n1 \xff3\n", 2, "bytes that are not UTF-8"),
        (b"1 2\n1 3\x00\n", 2, "a NUL byte"),
    ],
)
def test_lines_faults(tmp_path, content, line, reason):
    with pytest.raises(UserError, match=rf"a\.txt:{line}: {reason}.*--config\.data\.on_bad_row=drop"):
        sources.read(config(write(tmp_path, "a.txt", content)))


BAD_ROWS = [
    ("u,i", "wrong number of fields (expected 3)"),
    ("u,i,1,2", "wrong number of fields (expected 3)"),
    (",i,1", "empty user_id"),
    ("u,  ,1", "empty item_id"),
    ("u,-5,1", "item_id is a negative number"),
    ("u,5.0,1", "item_id is a fractional number"),
    ("u,1.5e3,1", "item_id is a fractional number"),
    ("u,1e+05,1", "item_id is a fractional number"),
    ("NaN,5,1", "user_id is not finite"),
    ("-inf,5,1", "user_id is not finite"),
    (f"u,{2**63},1", "item_id is beyond 2^63 - 1"),
    (f"{'9' * 25},5,1", "user_id is beyond 2^63 - 1"),
    (f"u,{'x' * 1001},1", "item_id is longer than 1000 characters"),
    ("u,i,", "empty timestamp"),
    ("u,i,yesterday", "timestamp is not a number"),
    ("u,i,nan", "timestamp is not finite"),
    ("u,i,inf", "timestamp is not finite"),
    ("u,i\0,1", "a NUL byte"),
    ("u,\udcff,1", "bytes that are not UTF-8"),
    ('u,"i,1', "quotes that do not pair up within the line"),
    ('u,"i"j,1', "quotes that do not pair up within the line"),
]


@pytest.mark.parametrize("quoted", [False, True])
@pytest.mark.parametrize("bad, reason", BAD_ROWS)
def test_bad_row_is_named_or_dropped_and_counted(tmp_path, bad, reason, quoted):
    good = 'u,"a, ""b""",1' if quoted else "u,a,1"
    text = f"user_id,item_id,timestamp\n{good}\n\n{bad}\nu,c,1\n{bad}\n"
    path = write(tmp_path, "a.csv", text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        sources.read(config(path))
    assert str(error.value).startswith(f"{path}:4: {reason}: ")
    assert "--config.data.on_bad_row=drop" in str(error.value) and len(str(error.value)) < 400
    table = sources.read(config(path, on_bad_row="drop"))
    assert rows(table) == [("u", 'a, "b"' if quoted else "a", 1), ("u", "c", 1)]
    assert table.frame["line"].to_list() == [2, 5]
    assert table.rows_read == 4 and table.blank_lines == 1
    (rejection,) = table.rejections
    assert (rejection.reason, rejection.count, rejection.line) == (reason, 2, 4)


def test_first_bad_row_of_all_reasons_is_reported(tmp_path):
    path = write(tmp_path, "a.csv", "user_id,item_id,timestamp\nu,-1,1\nu\n")
    with pytest.raises(UserError, match=r"a\.csv:2: item_id is a negative number: 'u,-1,1'"):
        sources.read(config(path))
    reasons = {r.reason: (r.count, r.line) for r in sources.read(config(path, on_bad_row="drop")).rejections}
    assert reasons == {"item_id is a negative number": (1, 2), "wrong number of fields (expected 3)": (1, 3)}


def test_bad_json_rows(tmp_path):
    good, null = (json.dumps({"user_id": user, "item_id": "i", "timestamp": 1.5}) for user in (1, None))
    path = write(tmp_path, "a.jsonl", "\n".join([good, "not json", null, "[1]"]))
    with pytest.raises(UserError, match=r"a\.jsonl:2: not a JSON object: 'not json'"):
        sources.read(config(path))
    table = sources.read(config(path, on_bad_row="drop"))
    assert rows(table) == [("1", "i", 1.5)]
    found = [(r.reason, r.count, r.line) for r in table.rejections]
    assert found == [("not a JSON object", 2, 2), ("empty user_id", 1, 3)]


def test_harmless_differences(tmp_path):
    text = "\ufeffuser_id,item_id,timestamp\r\n\r\nu, i ,1\r\n \r\nu,12e4,2.5"  # BOM, CRLF, blanks, no final newline
    table = sources.read(config(write(tmp_path, "a.csv", text)))
    assert rows(table) == [("u", "i", 1.0), ("u", "12e4", 2.5)]
    assert table.blank_lines == 2 and table.frame["line"].to_list() == [3, 5]
    assert table.frame["time"].dtype == pl.Float64


def test_long_lines_and_large_ids(tmp_path):
    text = f"user_id,item_id,timestamp,note\n{2**63 - 1},{2**40},1,{'x' * 10_000_000}\n"
    table = sources.read(config(write(tmp_path, "a.csv", text)))
    assert rows(table) == [(str(2**63 - 1), str(2**40), 1)]


def test_quoted_header_and_no_times(tmp_path):
    text = '"the user","it""em"\n"u",a\n"u","b\tc"\n'
    path = write(tmp_path, "a.csv", text)
    table = sources.read(config(path, user_column="the user", item_column='it"em', time_column=""))
    assert table.frame.rows() == [(2, "u", "a"), (3, "u", "b\tc")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "\n\n \n", "is empty"),
        ("a.csv", "user_id,item_id,timestamp\n", "no rows, only a header"),
        ("a.csv", "userid,item_id,timestamp\nu,i,1\n", "'user_id' is not known. Did you mean 'userid'.*timestamp"),
        ("a.csv", "user_id,item_id\nu,i\n", "Known: user_id, item_id. Correct the --config key"),
        ("a.csv", "user_id;item_id;timestamp\nu;i;1\n", "a.csv:1: one column, 'user_id;.*: replace ';'"),
        ("a.csv", "user_id,user_id,item_id,timestamp\nu,u,i,1\n", "the name of column 'user_id' is taken"),
        ("a.csv", b"\n\xff,item_id,timestamp\nu,i,1\n", r"a\.csv:2: bytes that are not UTF-8 in the header"),
        ("a.csv", "user_id,item_id,timestamp\nu,i,1\n".encode("utf-16"), r"a\.csv:1: bytes that are not UTF-8"),
        ("a.jsonl", '{"user": 1, "item_id": 1, "timestamp": 1}\n', "'user_id' is not known. Did you mean 'user'"),
        ("a.jsonl", '{\n"user_id": 1\n}\n', r"a\.jsonl:1: not a JSON object"),
        (
            "a.jsonl",
            '{"user_id": 1, "item_id": ["a"], "timestamp": 1}\n',
            "a.jsonl:1: item_id is a list, an object or a truth value",
        ),
        ("a.jsonl", '{"user_id": 1, "item_id":true, "timestamp": 1}\n', "a.jsonl:1: item_id is a list, an object or a"),
        ("a.csv", f"user_id,item_id,timestamp\nu,i,{2**60}\nu,j,0.5\n", "'timestamp' mixes fractions with whole"),
        ("a.csv.gz", gzip.compress(b"user_id,item_id,timestamp\nu,i,1\n", mtime=0)[:-9], "damaged or cut short"),
        ("a.csv.gz", gzip.compress(b"a" * 100, mtime=0)[:12] + b"\xff" * 30, "damaged or cut short"),
        ("a.xyz", "1 2\n", "--config.data.format=lines|csv"),
    ],
)
def test_file_faults(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        sources.read(config(write(tmp_path, name, content)))


def test_missing_file_folder_and_settings(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv does not exist.*--config\.data\.path"):
        sources.read(config(tmp_path / "none.csv"))
    with pytest.raises(UserError, match=r"none\.xyz does not exist"):
        sources.read(config(tmp_path / "none.xyz"))
    with pytest.raises(UserError, match="is a folder, not a file"):
        sources.read(config(tmp_path, format="csv"))
    with pytest.raises(UserError, match="data.format 'parket' is not known. Did you mean 'parquet'"):
        sources.read(config(tmp_path / "a.csv", format="parket"))
    with pytest.raises(UserError, match=r"--config\.data\.dir=FOLDER"):
        sources.read(config("", name="beauty"))
    with pytest.raises(UserError, match="data.name 'beuty' is not known. Did you mean 'beauty'"):
        sources.read(config("", name="beuty"))
    with pytest.raises(UserError, match="name each column once"):
        sources.read(config(tmp_path / "a.csv", item_column="user_id"))


def test_other_tables(tmp_path):
    path = write(tmp_path, "movies.dat", "1::Les Mis\xe9rables::Drama|War\n2:: ::Comedy\n".encode("latin-1"))
    columns = {"id": "index", "title": "text"}
    with pytest.raises(UserError, match=r"movies\.dat:2: empty title"):
        sources.read_table(path, "movielens", columns, names=("id", "title", "genres"))
    table = sources.read_table(path, "movielens", columns, "drop", names=("id", "title", "genres"))
    assert table.frame.rows() == [(1, "1", "Les Mis\xe9rables")]


def test_control_characters_are_escaped_in_messages(tmp_path):
    path = write(tmp_path, "a.csv", "user_id,item_id,timestamp\n\x1b[31mred,i\n")
    with pytest.raises(UserError) as error:
        sources.read(config(path))
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("times", [None, pl.Int64, pl.Float64])
def test_tfds_round_trip(tmp_path, times):
    count = 300
    users, items = [f"\xfc{i % 7}" for i in range(count)], [str(i) for i in range(count, 0, -1)]
    frame = pl.DataFrame({"user": users, "item": items})
    if times:
        frame = frame.with_columns(time=pl.int_range(pl.len()).cast(times))
    folder = tfds_interactions.prepare(frame, tmp_path)
    table = sources.read(config(folder, format="tfds", time_column="timestamp" if times else ""))
    assert table.rows_read == count
    assert table.frame.drop("line").equals(frame.with_columns(pl.col("time").cast(times)) if times else frame)
    with pytest.raises(UserError, match="exists: remove it"):
        tfds_interactions.prepare(frame, tmp_path)


@pytest.mark.parametrize("promised", [3, 7])
def test_tfds_counts_what_it_reads(tmp_path, promised):
    folder = tfds_interactions.prepare(pl.DataFrame({"user": ["u"] * 5, "item": list("abcde")}), tmp_path)
    settings = config(folder, format="tfds", time_column="")
    (records,) = folder.glob("*.array_record-*")
    intact = records.read_bytes()
    records.write_bytes(intact[:150] + b"damage" + intact[156:])
    with pytest.raises(UserError, match="is damaged"):
        sources.read(settings)
    records.write_bytes(intact)
    info = folder / "dataset_info.json"
    metadata = json.loads(info.read_text())
    metadata["splits"][0]["shardLengths"] = [str(promised)]
    info.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=f"holds 5 interactions, its metadata promise {promised}"):
        sources.read(settings)
    info.write_text("{")
    with pytest.raises(UserError, match="no folder made by TFDS"):
        sources.read(settings)
    with pytest.raises(UserError, match="no folder made by TFDS"):
        sources.read(config(tmp_path / "none", format="tfds"))


def test_tfds_never_loads_tensorflow(tmp_path):
    program = (
        "import sys, pathlib, polars as pl\n"
        "from seqrec_jax.data import sources, tfds_interactions as t\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "folder = t.prepare(pl.DataFrame({'user': ['u', 'u'], 'item': ['a', 'b']}), pathlib.Path(sys.argv[1]))\n"
        "assert len(t.read(folder)) == 2 and 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
