"""A file's rows as text, each with its line, whole or piece by piece: what is alike in all formats begins here."""

import dataclasses
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from seqrec_jax.data import tfds_interactions
from seqrec_jax.data.files import read_bytes, read_lines
from seqrec_jax.errors import UserError, unknown


@dataclasses.dataclass(frozen=True)
class Format:
    """How the rows of a file are told apart; a file name that ends in one of `suffixes` (or suffix.gz) selects it."""

    suffixes: tuple[str, ...]
    separator: str = ""  # "" = not a delimited text file
    names: tuple[str, ...] = ()  # columns of a file without header; () = the first line names them
    quotes: bool = False  # fields may stand in double quotes
    typed: bool = False  # the header says name:type
    encoding: str = "utf-8-sig"  # UTF-8, a byte order mark is skipped


FORMATS = {
    "lines": Format((".txt",)),
    "csv": Format((".csv",), ",", quotes=True),
    "tsv": Format((".tsv",), "\t", quotes=True),
    "parquet": Format((".parquet",)),
    "jsonl": Format((".jsonl", ".json")),
    "recbole": Format((".inter", ".item", ".user"), "\t", typed=True),
    "movielens": Format((".dat",), "::", ("user_id", "item_id", "rating", "timestamp"), encoding="latin-1"),
    "tfds": Format(()),
}

LIST = "\x1f"  # stands before each entry of a list column
_NOT_UTF8 = "\x00\ufffd"  # stands for undecodable bytes until their row is rejected


def form_of(path: Path, remedy: str) -> str:
    """The key of FORMATS that the name of `path` tells. Raises UserError, with `remedy`, where it tells none."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    for name, form in FORMATS.items():
        if suffix in form.suffixes:
            return name
    if not path.exists():
        raise UserError(f"{path} does not exist")
    raise UserError(f"the name of {path} does not tell its format: {remedy}")


def raw_pieces(
    path: Path, form: str, columns: Mapping[str, str], names: tuple[str, ...], lines: int | None
) -> Iterator[tuple[pl.DataFrame, int]]:
    """([line, raw, reason, *columns] as text, blank lines) of each piece."""
    if form == "tfds":
        yield _cells(tfds_interactions.read(path), path, columns), 0
        return
    if form == "parquet":
        yield from ((frame, 0) for frame in _parquet(path, columns, lines))
        return
    blank_lines, found = 0, False
    for piece in _text_lines(path, FORMATS[form].encoding, lines):
        blank = piece["raw"].str.strip_chars(" ") == ""
        blank_lines += int(blank.sum())
        piece = piece.filter(~blank)
        if piece.is_empty():
            continue
        if form == "lines":
            frame = _histories(piece, *columns)
        elif form == "jsonl":
            frame = _json_objects(piece, columns)
            if not found:
                _demand(columns, _keys(frame, columns), path)
        else:
            piece = _split(piece, FORMATS[form])
            if not names:
                names, piece = _header(piece, path, FORMATS[form]), piece.slice(1)
            frame = _delimited(piece, path, names, columns)
        yield frame, blank_lines
        blank_lines, found = 0, True
    if not found:
        raise UserError(f"{path} is empty: it holds no line besides blank ones")


def _text_lines(path: Path, encoding: str, lines: int | None) -> Iterator[pl.DataFrame]:
    """[line, raw, reason]: the file's lines; `reason` is set where the bytes are not text."""
    begin = 1
    for data in read_lines(path, lines) if lines else [read_bytes(path)]:
        text = data.decode(encoding, "surrogateescape")
        text = re.sub("[\udc80-\udcff]+", _NOT_UTF8, text)
        raw = text.removesuffix("\n").split("\n")
        yield (
            pl.DataFrame({"raw": raw})
            .with_row_index("line", offset=begin)
            .with_columns(
                pl.col("raw").str.strip_suffix("\r"),
                reason=pl.when(pl.col("raw").str.contains(_NOT_UTF8, literal=True))
                .then(pl.lit("bytes that are not UTF-8"))
                .when(pl.col("raw").str.contains("\x00", literal=True))
                .then(pl.lit("a NUL byte")),
            )
        )
        begin, encoding = begin + len(raw), encoding.removesuffix("-sig")


def _split(lines: pl.DataFrame, form: Format) -> pl.DataFrame:
    """Column `fields`. Lines are split one by one, so a row's line number is exact by construction."""
    sep, raw = form.separator, pl.col("raw")
    if not (form.quotes and lines["raw"].str.contains('"', literal=True).any()):
        return lines.with_columns(fields=raw.str.split(sep))
    raw = pl.lit(sep) + raw  # every field with the separator before it: quoted, or plain, or empty
    lines = lines.with_columns(fields=raw.str.extract_all(f'{sep}(?:"(?:[^"]|"")*"|[^"{sep}][^{sep}]*|)'))
    unpaired = pl.col("fields").list.join("") != raw
    lines = lines.with_columns(_reason("quotes that do not pair up within the line", unpaired))
    field = pl.element().str.slice(1)
    inner = field.str.strip_prefix('"').str.strip_suffix('"').str.replace_all('""', '"', literal=True)
    value = pl.when(field.str.starts_with('"')).then(inner).otherwise(field)
    return lines.with_columns(pl.col("fields").list.eval(value))


def _header(lines: pl.DataFrame, path: Path, form: Format) -> tuple[str, ...]:
    """The columns that the first line names."""
    first = lines.row(0, named=True)
    if first["reason"]:
        raise UserError(
            f"{path}:{first['line']}: {first['reason']} in the header: {shown(first['raw'])}. Save the file as UTF-8 "
            "text"
        )
    mark = next((mark for mark in ";\t|, " if mark in first["raw"]), None)
    if len(first["fields"]) == 1 and mark:
        raise UserError(
            f"{path}:{first['line']}: one column, {shown(first['raw'])}: replace {mark!r} between the fields by ',' in "
            "a .csv file, by a tab in others"
        )
    names = (name.strip() for name in first["fields"])
    return tuple(name.partition(":")[0] if form.typed else name for name in names)


def _delimited(lines: pl.DataFrame, path: Path, names: tuple[str, ...], columns: Mapping[str, str]) -> pl.DataFrame:
    """The fields of each line as columns."""
    _demand(columns, names, path)
    wrong = pl.col("fields").list.len() != len(names)
    lines = lines.with_columns(_reason(f"wrong number of fields (expected {len(names)})", wrong))
    values = {name: pl.col("fields").list.get(names.index(name), null_on_oob=True) for name in columns}
    return lines.select("line", "raw", "reason", **values)


def _histories(lines: pl.DataFrame, user: str, item: str) -> pl.DataFrame:
    """Lines `user item item ...`: one row per item. A line without items is one row with an empty item."""
    tokens = lines.select("line", "reason", tokens=pl.col("raw").str.extract_all(r"\S+"))
    rows = tokens.select(
        "line", "reason", pl.col("tokens").list.first().alias(user), pl.col("tokens").list.slice(1).alias(item)
    ).explode(item, empty_as_null=True)
    return rows.with_columns(raw=pl.concat_str(user, item, separator=" ", ignore_nulls=True))


def _json_objects(lines: pl.DataFrame, columns: Mapping[str, str]) -> pl.DataFrame:
    """One JSON object per line; null and a missing key are an empty value."""
    raw = pl.col("raw")
    values = {column: raw.str.json_path_match(f"$[{json.dumps(column)}]") for column in columns}
    no_object = ~raw.str.starts_with("{") | raw.str.json_path_match("$").is_null()
    lines = lines.with_columns(_reason("not a JSON object", no_object), **values)
    for column, kind in columns.items():
        if kind != "list":
            # A text may look like one: what stands in the line behind the column's name tells.
            unquoted = raw.str.contains(rf"{re.escape(json.dumps(column))}\s*:\s*([\[{{]|true|false)")
            no_value = unquoted & pl.col(column).str.contains(r"^([\[{]|true$|false$)")
            lines = lines.with_columns(_reason(f"{column} is a list, an object or a truth value", no_value))
    return lines


def _keys(objects: pl.DataFrame, columns: Mapping[str, str]) -> list[str]:
    """Those of the first object, and `columns` that any has; all of `columns` where there is no object."""
    first = objects.filter(pl.col("reason").is_null())["raw"].head(1)
    present = [column for column in columns if objects[column].null_count() < objects.height]
    return list(dict.fromkeys([*json.loads(first[0]), *present])) if len(first) else list(columns)


def _parquet(path: Path, columns: Mapping[str, str], lines: int | None) -> Iterator[pl.DataFrame]:
    try:
        if not lines:
            yield _cells(pl.read_parquet(io.BytesIO(read_bytes(path))), path, columns)
            return
        scan, begin = pl.scan_parquet(path), 0
        while len(frame := scan.slice(begin, lines).collect()):
            yield _cells(frame, path, columns, begin)
            begin += lines
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None


def _cells(frame: pl.DataFrame, path: Path, columns: Mapping[str, str], begin: int = 0) -> pl.DataFrame:
    """A typed frame as strings; times become their integer counts. `line` is the row number."""
    _demand(columns, frame.columns, path)
    lists = [name for name, kind in columns.items() if kind == "list" and frame.schema[name].is_nested()]
    text = {name: LIST + pl.col(name).cast(pl.List(pl.String)).list.join(LIST) for name in lists}
    frame = frame.with_columns(**text)
    frame = frame.select(*columns).with_columns(pl.selectors.temporal().cast(pl.Int64)).cast(pl.String)
    raw = pl.concat_str(pl.all().fill_null(""), separator=", ")
    return frame.with_columns(raw=raw, reason=pl.lit(None, pl.String)).with_row_index("line", offset=begin + 1)


def _demand(columns: Mapping[str, str], names: Sequence[str], path: Path) -> None:
    for column, kind in columns.items():
        if column not in names:
            hint = "Correct the --config key that names it"
            if kind == "number":
                hint += " (data.time_column= where rows without times are in order)"
            raise UserError(f"{unknown(f'{path}: column', column, names)}. {hint}")
        if list(names).count(column) > 1 or column in ("line", "raw", "reason"):
            raise UserError(f"{path}: the name of column '{column}' is taken: rename it")


def _reason(text: str, bad: pl.Expr) -> pl.Expr:
    """Column `reason` with `text` where `bad`, unless an earlier reason stands there."""
    return pl.coalesce("reason", pl.when(bad).then(pl.lit(text)))


def shown(raw: str) -> str:
    """Text from a file made safe and short for a message."""
    raw = raw.replace(_NOT_UTF8, "\ufffd")
    return repr(raw if len(raw) <= 80 else raw[:77] + "...")
