"""Vectors of users or items in a Parquet file: a column of their own ids, a column `vector` of so many floats each."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from seqrec_jax.errors import UserError


@contextlib.contextmanager
def vector_writer(path: Path, column: str, dim: int) -> Iterator[Callable[[Sequence[str], np.ndarray], None]]:
    """write(ids, vectors_NxD) appends a row group; the file takes its name when all is written."""
    import pyarrow as pa  # a tenth of a second, which no start of a training waits for
    import pyarrow.parquet as pq

    schema = pa.schema({column: pa.string(), "vector": pa.list_(pa.float32(), dim)})
    part = path.with_name(path.name + ".part")

    def write(ids: Sequence[str], vectors_NxD: np.ndarray) -> None:
        flat = pa.array(np.ascontiguousarray(vectors_NxD, np.float32).reshape(-1))
        writer.write_table(pa.table([pa.array(ids, pa.string()), pa.FixedSizeListArray.from_arrays(flat, dim)], schema))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(part, schema, use_dictionary=False) as writer:
            yield write
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}. Name another file with --out=FILE.parquet") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def read_vectors(path: Path, ids: Sequence[str], column: str = "user_id") -> np.ndarray:
    """[N, D] float32: the vectors of `ids`, in their order. Raises UserError where one has none, or two."""
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None
    if {column, "vector"} - set(frame.columns):
        raise UserError(f"{path}: the columns must be {column} and vector, not {', '.join(frame.columns)}")
    kind = frame.schema["vector"]
    if not isinstance(kind, pl.List | pl.Array) or not kind.inner.is_numeric():
        raise UserError(f"{path}: the column vector holds {kind}, not lists of numbers")
    frame = frame.select(pl.col(column).cast(pl.String), pl.col("vector").cast(pl.List(pl.Float32)))
    repeated = frame.filter(pl.col(column).is_duplicated())
    if len(repeated):
        raise UserError(f"{path}: {column} {repeated[column][0]} has more than one vector")
    wanted = pl.DataFrame({column: list(ids)}, {column: pl.String})
    joined = wanted.join(frame, on=column, how="left", maintain_order="left")
    missing = joined.filter(pl.col("vector").is_null())
    if len(missing):
        raise UserError(f"{path}: no vector for {column} {missing[column][0]} ({len(missing)} are missing)")
    dims = joined["vector"].list.len().unique().to_list()
    if len(dims) != 1 or not dims[0]:
        raise UserError(f"{path}: the vectors have different lengths: {sorted(dims)}")
    vectors_NxD = joined["vector"].cast(pl.Array(pl.Float32, dims[0])).to_numpy()
    if not np.isfinite(vectors_NxD).all():
        row = np.flatnonzero(~np.isfinite(vectors_NxD).all(axis=1))[0]
        raise UserError(f"{path}: the vector of {column} {joined[column][int(row)]} is not finite")
    return vectors_NxD
