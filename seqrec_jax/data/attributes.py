"""What is known of the items (categories, brands, tags, genres): from a file to a set for each item, in CSR form."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import polars as pl

from seqrec_jax.data import tables
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.files import read_bytes
from seqrec_jax.data.rows import LIST
from seqrec_jax.data.sources import ATTRIBUTES
from seqrec_jax.data.synthetic import synthetic_clusters
from seqrec_jax.errors import UserError

FORMATS = {
    ".json": "json",
    ".item": "recbole",
    ".dat": "movielens",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
MOVIES = ("item_id", "title", "genres")  # columns of MovieLens' movies.dat


def attributes_path(config_data) -> Path | None:
    """The file that data.attributes names; None: the embedded data's own. Raises UserError where there is none."""
    if config_data.attributes != "included":
        path = Path(config_data.attributes).expanduser()
    elif config_data.name in ATTRIBUTES and config_data.dir:
        path = Path(config_data.dir).expanduser() / ATTRIBUTES[config_data.name]
    elif config_data.name or config_data.path:
        raise UserError(
            f"data.attributes=included, but {config_data.path or config_data.name} is no named data set in a data.dir: "
            "set --config.data.attributes=FILE, or --config.data.dir=FOLDER"
        )
    else:
        return None
    if not path.is_file():
        raise UserError(f"{path}: no such file (config.data.attributes={config_data.attributes})")
    return path


def read_attributes(path: Path | None, config_data) -> tables.Table:
    """Columns `item` (str) and `attributes` (list of str), a row for each row of the file, and what was left out.

    None: the clusters of the embedded data. JSON: one object {item: [attribute, ...]}. RecBole .item: the token_seq
    columns; MovieLens .dat: the genres; CSV, TSV and Parquet: data.attribute_columns, lists or text split at
    data.attribute_separator. Of several columns, each attribute is named column=value. Raises UserError.
    """
    if path is None:
        cluster_V = synthetic_clusters(config_data.synthetic_items, config_data.synthetic_seed)
        frame = pl.DataFrame({"item": np.arange(1, len(cluster_V) + 1), "cluster": cluster_V}).cast(pl.String)
        return tables.Table(frame.select("item", attributes=pl.concat_list("cluster")), len(frame))
    form = FORMATS.get(Path(path.name.lower().removesuffix(".gz")).suffix)
    if form is None:
        raise UserError(f"the name of {path} does not tell its format; attributes are read from {', '.join(FORMATS)}")
    if form == "json":
        frame = _json(path)
        return tables.Table(_not_negative(frame, str(path)), len(frame))
    item, names, columns = config_data.item_column, (), config_data.attribute_columns
    if form == "movielens":
        item, names, columns = MOVIES[0], MOVIES, columns or MOVIES[2:]
    elif form == "recbole":
        columns = columns or _token_sequences(path)
    if not columns:
        raise UserError(f"{path}: which columns hold the attributes? Set --config.data.attribute_columns=NAME,...")
    kinds = {item: "id"} | dict.fromkeys(columns, "list")
    table = tables.read_table(path, form, kinds, config_data.on_bad_row, names)
    separator = " " if form == "recbole" else config_data.attribute_separator

    def entries(column):
        text = pl.col(column).fill_null("")
        listed = text.str.starts_with(LIST)
        found = pl.when(listed).then(text.str.split(LIST)).otherwise(text.str.split(separator))
        found = found.list.eval(pl.element().str.strip_chars())
        found = found.list.eval(pl.element().filter(pl.element() != ""))
        return found.list.eval(pl.lit(f"{column}=") + pl.element()) if len(columns) > 1 else found

    frame = table.frame.select(item=pl.col(item), attributes=pl.concat_list(*(entries(column) for column in columns)))
    return dataclasses.replace(table, frame=_not_negative(frame, str(path), columns if len(columns) > 1 else ()))


def with_attributes(dataset: SequenceDataset, table: tables.Table, source: str) -> SequenceDataset:
    """`dataset` with the sets of `table` and an entry in its report. Names are numbered in their sorted order.

    Raises UserError where no item of `table` is in the catalogue, or none has an attribute.
    """
    read = table.frame
    catalogue = pl.DataFrame({"item": dataset.item_ids.tolist()}).with_row_index("row")
    known = read.join(catalogue, on="item")
    if known.is_empty():
        there, here = read["item"].head(3).to_list(), dataset.item_ids[:3].tolist()
        raise UserError(
            f"{source}: none of its items ({there} ...) is in the data ({here} ...): the ids must be the same"
        )
    pairs = known.explode("attributes").drop_nulls("attributes")
    if pairs.is_empty():
        raise UserError(f"{source}: no item of the data has an attribute in it")
    sets = pairs.select("row", "attributes").unique()
    names, code_N = np.unique(np.array(sets["attributes"].to_list(), np.str_), return_inverse=True)
    row_N = sets["row"].to_numpy()
    count_V = np.bincount(row_N, minlength=len(catalogue))
    report = {
        "attributes": len(names),
        "mean": len(sets) / len(catalogue),
        "most": int(count_V.max()),
        "items_without": int((count_V == 0).sum()),
        "unknown_items": read["item"].n_unique() - known["item"].n_unique(),
        "repeats": len(pairs) - len(sets),
        "rejected": table.rejected(source),
    }
    return dataclasses.replace(
        dataset,
        attributes_N=(code_N[np.lexsort((code_N, row_N))] + 1).astype(np.int32),
        attribute_offsets_V1=np.concatenate([[0], np.cumsum(count_V)]).astype(np.int64),
        attribute_names=names,
        report=dataset.report | {"attributes": report},
    )


def report_line(known: dict) -> str:
    """The report's entry for people."""
    return (
        f"{known['attributes']:,}, {known['mean']:.2f} an item (at most {known['most']}), {known['items_without']:,} "
        f"items without; left out: {known['unknown_items']:,} unknown items, {known['repeats']:,} repeats, "
        f"{sum(found['count'] for found in known['rejected'].values()):,} bad rows"
    )


def _not_negative(frame: pl.DataFrame, source: str, columns: tuple[str, ...] = ()) -> pl.DataFrame:
    """`frame`, where no attribute is a negative number behind its column's name, if it has one; else a UserError."""
    prefix = f"({'|'.join(map(re.escape, columns))})=" if columns else ""
    named = frame.explode("attributes").filter(pl.col("attributes").str.contains(f"^{prefix}-[0-9]"))
    if len(named):
        item, attribute = named.row(0)
        raise UserError(f"{source}: item {item} has the attribute {attribute}, a negative number")
    return frame


def _json(path: Path) -> pl.DataFrame:
    try:
        found = json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f'{path} holds no items: one JSON object {{"item": [attribute, ...], ...}} was expected')
    for item, attributes in found.items():
        if not item.strip() or re.fullmatch("-[0-9]+", item.strip()):
            raise UserError(f"{path}: {item!r} is no item: it is {'negative' if item.strip() else 'empty'}")
        if not isinstance(attributes, list) or not all(type(a) in (int, str) and a != "" for a in attributes):
            raise UserError(f"{path}: item {item}: expected a list of whole numbers or names, found {attributes!r:.80}")
    lists = [[str(attribute) for attribute in attributes] for attributes in found.values()]
    return pl.DataFrame(
        {"item": list(found), "attributes": lists}, schema={"item": pl.String, "attributes": pl.List(pl.String)}
    )


def _token_sequences(path: Path) -> tuple[str, ...]:
    """The names of a RecBole file's token_seq columns."""
    header = read_bytes(path).split(b"\n", 1)[0].decode("utf-8-sig", "replace").strip()
    return tuple(name for name, _, kind in (part.partition(":") for part in header.split("\t")) if kind == "token_seq")
