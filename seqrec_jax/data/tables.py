"""The one reader of everything tabular: strings, checked row by row, each with its line in the source."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from seqrec_jax.data.rows import FORMATS, raw_pieces, shown
from seqrec_jax.errors import UserError

_MAX_ID = 1000  # characters; vocabularies are fixed-width arrays, one endless id would fill the memory
_FRACTION = r"^[+-]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|^[+-]?[0-9]+[eE][+-][0-9]+$"


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Rows left out for one reason, with the first of them."""

    reason: str
    count: int
    line: int
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Checked rows in file order, and what was left out."""

    frame: pl.DataFrame  # `line` (1-based, header counted; row number in files without lines) and the columns asked for
    rows_read: int  # rows kept and rejected; blank lines and the header are none
    blank_lines: int = 0
    rejections: tuple[Rejection, ...] = ()

    def rejected(self, source: str) -> dict:
        """{reason: {count, first}}, for a report."""
        return {r.reason: {"count": r.count, "first": f"{source}:{r.line}: {r.text}"} for r in self.rejections}


def read_table(
    path: Path, form: str, columns: Mapping[str, str], on_bad_row: str = "error", names: Sequence[str] = ()
) -> Table:
    """Columns of one file, checked.

    Args:
      form: a key of FORMATS.
      columns: the columns wanted and what each holds: `id` (opaque text, but no negative, fractional, infinite or
        64-bit overflowing number), `index` (integer from 1), `number` (finite; becomes Int64 or Float64), `text`,
        `list` (text that may be empty; a Parquet column of lists becomes text with LIST before each entry).
        Blanks around a value do not count. Format `lines` wants two columns, which it calls by these names.
      on_bad_row: error (UserError for the first bad row) | drop (counted in `rejections`).
      names: all columns of a file without header, instead of the format's own.

    Raises UserError, also for a missing, empty or damaged file and for missing columns.
    """
    (table,) = read_pieces(path, form, columns, on_bad_row, names)
    return table


def read_pieces(
    path: Path,
    form: str,
    columns: Mapping[str, str],
    on_bad_row: str = "error",
    names: Sequence[str] = (),
    lines: int | None = None,
) -> Iterator[Table]:
    """What `read_table` gives, from so many lines of the file at a time (None: all), for files beyond the memory."""
    found = False
    for frame, blank_lines in raw_pieces(path, form, columns, tuple(names) or FORMATS[form].names, lines):
        if frame.is_empty():
            continue
        found = True
        frame = frame.with_columns(pl.col(*columns).str.strip_chars())
        faults = (fault for column, kind in columns.items() for fault in _faults(column, kind))
        frame = frame.with_columns(reason=pl.coalesce("reason", *faults))
        rejections = _reject(frame.filter(pl.col("reason").is_not_null()), path, on_bad_row)
        good = frame.filter(pl.col("reason").is_null()).select("line", *columns)
        numbers = [_number(good[column], path) for column, kind in columns.items() if kind == "number"]
        yield Table(good.with_columns(numbers), frame.height, blank_lines, rejections)
    if not found:
        raise UserError(f"{path} holds no rows, only a header")


def _faults(column: str, kind: str) -> list[pl.Expr]:
    """What can be wrong with a value of this kind, the most basic fault first; each gives the reason or null."""
    value = pl.col(column)
    faults = {f"empty {column}": value.is_null() | (value == "")} if kind != "list" else {}
    if kind == "number":
        number = value.cast(pl.Float64, strict=False)
        faults |= {f"{column} is not a number": number.is_null(), f"{column} is not finite": ~number.is_finite()}
    if kind == "index":
        faults[f"{column} is not an integer from 1"] = ~value.str.contains("^[1-9][0-9]*$")
    if kind == "id":
        faults |= {
            f"{column} is a negative number": value.str.contains("^-[0-9]+$"),
            f"{column} is a fractional number": value.str.contains(_FRACTION),
            f"{column} is not finite": value.str.contains("(?i)^[+-]?(nan|inf|infinity)$"),
            f"{column} is longer than {_MAX_ID} characters": value.str.len_chars() > _MAX_ID,
        }
    if kind in ("id", "index"):
        overflow = value.str.contains("^[0-9]+$") & value.cast(pl.Int64, strict=False).is_null()
        faults[f"{column} is beyond 2^63 - 1"] = overflow
    return [pl.when(bad).then(pl.lit(reason)) for reason, bad in faults.items()]


def _reject(bad: pl.DataFrame, path: Path, on_bad_row: str) -> tuple[Rejection, ...]:
    if on_bad_row == "error" and len(bad):
        first = bad.row(0, named=True)
        dates = " (a date has to be one, too, but in Parquet)" if first["reason"].endswith("is not a number") else ""
        raise UserError(
            f"{path}:{first['line']}: {first['reason']}: {shown(first['raw'])}{dates}. Correct the row, or leave bad "
            "rows out, counted and reported, with --config.data.on_bad_row=drop"
        )
    groups = bad.group_by("reason", maintain_order=True).agg(pl.len(), pl.first("line"), pl.first("raw"))
    return tuple(Rejection(reason, count, line, shown(raw)) for reason, count, line, raw in groups.iter_rows())


def _number(values: pl.Series, path: Path) -> pl.Series:
    whole = values.cast(pl.Int64, strict=False)
    if whole.null_count() and (whole.abs() > 2**53).any():
        raise UserError(
            f"{path}: column '{values.name}' mixes fractions with whole numbers beyond 2^53, which would lose their "
            "last digits: write all of them as whole numbers"
        )
    return values.cast(pl.Float64) if whole.null_count() else whole
