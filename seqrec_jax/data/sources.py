"""From `config.data` to a table of interactions: which file, which format, which columns."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from seqrec_jax.data.rows import FORMATS, form_of
from seqrec_jax.data.tables import Table, read_table
from seqrec_jax.errors import UserError, unknown

# Named data sets: file name in `data.dir`.
DATASETS = {
    "beauty": "Beauty.txt.gz",
    "sports": "Sports_and_Outdoors.txt.gz",
    "yelp": "Yelp.txt.gz",
    "lastfm": "LastFM.txt.gz",
    "ml1m": "ml-1m/ml-1m.txt.gz",
}
ATTRIBUTES = {  # of their items
    "beauty": "Beauty_item2attributes.json.gz",
    "sports": "Sports_and_Outdoors_item2attributes.json.gz",
    "yelp": "Yelp_item2attributes.json.gz",
    "lastfm": "LastFM_item2attributes.json.gz",
    "ml1m": "ml-1m/movies.dat.gz",
}
LABELS = {"ml1m": "ml-1m/users.dat.gz"}  # of their users


def resolve(config_data: ConfigDict) -> tuple[Path, str]:
    """The file (or TFDS folder) that `config.data` names, and its format. Raises UserError where it names none."""
    if config_data.path:
        path = Path(config_data.path).expanduser()
    elif config_data.name not in DATASETS:
        raise unknown("data.name", config_data.name, DATASETS)
    elif not config_data.dir:
        raise UserError(
            f"data set '{config_data.name}' needs the folder that holds {DATASETS[config_data.name]}: "
            "set --config.data.dir=FOLDER"
        )
    else:
        path = Path(config_data.dir).expanduser() / DATASETS[config_data.name]
    if config_data.format:
        if config_data.format not in FORMATS:
            raise unknown("data.format", config_data.format, FORMATS)
        return path, config_data.format
    return path, form_of(path, f"set --config.data.format={'|'.join(FORMATS)}")


def read(config_data: ConfigDict) -> Table:
    """Interactions of the source that `config.data` names: columns `line`, `user`, `item` (str) and maybe `time`.

    Raises UserError for a file that cannot be read and, under data.on_bad_row=error, for the first bad row.
    """
    path, form = resolve(config_data)
    if form == "lines":
        return read_table(path, form, {"user": "index", "item": "index"}, config_data.on_bad_row)
    roles = {"user": config_data.user_column, "item": config_data.item_column, "time": config_data.time_column}
    names = {column: role for role, column in roles.items() if column}
    if not roles["user"] or not roles["item"] or len(names) != sum(map(bool, roles.values())):
        raise UserError(f"name each column once in config.data.*_column, user and item always; it says {roles}")
    kinds = {column: "number" if role == "time" else "id" for column, role in names.items()}
    table = read_table(path, form, kinds, config_data.on_bad_row)
    return dataclasses.replace(table, frame=table.frame.rename(names))
