"""Transfer: a run begins with the parameters of another one's checkpoint, at step 0 and with a fresh optimiser."""

import logging
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax import checkpoint
from seqrec_jax import config as configuration
from seqrec_jax.errors import UserError
from seqrec_jax.protocol import TASKS
from seqrec_jax.validate import PRETRAINING

# Settings of an encoder that the shapes of its parameters do not show, but that change what it makes of them.
UNSEEN = ("heads", "activation", "norm", "scale_embedding", "positions", "filter", "filter_width")
NONE = np.zeros(0, np.str_)
log = logging.getLogger(__name__)


def transfer(
    params: dict, item_ids: np.ndarray, config: ConfigDict, mesh: Mesh, attribute_names: np.ndarray = NONE
) -> tuple[dict, dict]:
    """`params` with the values of the checkpoint config.init_from, and what to remember of it (JSON-ready).

    The groups of parameters ("items", "encoder" and what a system adds) are matched by name. A group that the
    checkpoint alone has is left out, one that it lacks stays fresh; the others must agree in every name and shape.
    Rows of the item table are matched by the items' own ids (`item_ids`), those of padding and mask token by what they
    mean, rows of the attribute table by their names; new ones stay fresh. Raises UserError for a checkpoint that is
    missing or damaged, that does not fit, that was trained on what is tested, or that has no item in common with this
    data.
    """
    store, step, meta = find_parent(config.init_from)
    old = checkpoint.restore_params(store, step, mesh)
    shared = (params.keys() & old.keys()) - {"head"}  # a task's own
    if config.encoder.user_token and not meta["config"]["encoder"].get("user_token"):
        raise UserError(
            f"{config.init_from}: its encoder has no [UR] token, which system={config.system} reads a user from "
            "(config.init_from): name a run of configs/clue_pretrain.py"
        )
    if "items" not in old:
        raise UserError(f"{config.init_from}: it learned from users' vectors and has no encoder (config.init_from)")
    ranks = config.system not in PRETRAINING and config.task not in TASKS
    if ranks and not held_out(meta):
        raise UserError(
            f"{config.init_from}: it, or the run it began from, was trained with data.hold_out=False or for a task "
            "that reads whole histories, and so on the items that this run is tested on (config.init_from): pretrain "
            "anew with --config.data.hold_out=true"
        )
    _check_encoder(meta["config"]["encoder"], config)
    _check_shapes({name: params[name] for name in shared}, {name: old[name] for name in shared}, config.init_from)
    new_rows, old_rows = matching_rows(item_ids.tolist(), meta["items"])
    kept = len(new_rows) - 2
    if not kept:
        raise UserError(f"{config.init_from}: no item of this data set is in that checkpoint (config.init_from)")
    moved = {"items": _move(params["items"], old["items"], new_rows, old_rows)}
    if "attributes" in shared:
        rows = _same(attribute_names.tolist(), meta.get("attributes", []))
        if not rows.size:
            raise UserError(
                f"{config.init_from}: no attribute of this data is in that checkpoint (config.init_from): give the "
                "file that it was trained with, --config.data.attributes=FILE"
            )
        moved["attributes"] = _move(params["attributes"], old["attributes"], *rows)
    report = {
        "from": config.init_from,
        "system": meta["config"]["system"],
        "step": step,
        "config_hash": configuration.config_hash(ConfigDict(meta["config"])),
        "data_hash": meta["dataset_hash"],
        "manifest": checkpoint.manifest_hash(store, step),
        "held_out": held_out(meta),
        "items_kept": kept,
        "items_new": len(item_ids) - kept,
        "items_dropped": len(meta["items"]) - kept,
        "left_out": sorted(old.keys() - shared),
        "fresh": sorted(params.keys() - shared),
    }
    counts = ", ".join(f"{report[f'items_{what}']:,} {what}" for what in ("kept", "new", "dropped"))
    groups = [f"{what.replace('_', ' ')}: {', '.join(report[what])}" for what in ("left_out", "fresh") if report[what]]
    log.info("parameters from %s, step %d: %s", report["from"], report["step"], "; ".join([f"items {counts}", *groups]))
    return params | {name: old[name] for name in shared} | moved, report


def held_out(meta: dict) -> bool:
    """Whether the last two items of users, which next items are tested on, were kept from a run's parameters."""
    config, parent = meta["config"], meta.get("parent") or {}
    read_all = not config["data"].get("hold_out", True) or (
        config.get("task") in TASKS and not config["freeze_encoder"]
    )
    return parent.get("held_out", True) and not read_all


def matching_rows(item_ids: list[str], old_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(new_rows, old_rows) of the item tables that mean the same: padding, the items both have, the mask token."""
    new_rows, old_rows = _same(item_ids, old_ids)
    padding, mask = (0, 0), (len(item_ids) + 1, len(old_ids) + 1)
    new_rows, old_rows = np.column_stack([padding, (new_rows + 1, old_rows + 1), mask]).astype(np.int32)
    return new_rows, old_rows


def _same(names: list[str], old_names: list[str]) -> np.ndarray:
    """[2, common]: where each name that both lists hold stands in the one and in the other."""
    place_of = {name: place for place, name in enumerate(old_names)}
    pairs = [(place, place_of[name]) for place, name in enumerate(names) if name in place_of]
    return np.array(pairs, np.int32).reshape(-1, 2).T


def _move(here: jax.Array, there: jax.Array, new_rows: np.ndarray, old_rows: np.ndarray) -> jax.Array:
    """`here` with rows of `there`, spread over the devices as before."""
    move = jax.jit(lambda here, there, new, old: here.at[new].set(there[old]), out_shardings=here.sharding)
    return move(here, there, new_rows, old_rows)


def find_parent(init_from: str) -> tuple[checkpoint.Store, int, dict]:
    """(store, step, meta) of RUN, RUN@NAME or RUN/checkpoints/STEP; a folder that is called so comes first.

    RUN alone: its best checkpoint, of a pretraining run the last, because its validation is not what it is for.
    """
    path, name = Path(init_from).expanduser(), ""
    if not path.is_dir() and "@" in init_from:
        folder, _, name = init_from.rpartition("@")
        path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"{path}: no such workdir or checkpoint (config.init_from); nothing was started from scratch. Set "
            "--config.init_from=RUN, the workdir of the run to start from"
        )
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, name = path.parent.parent, path.name
    last = checkpoint.find(path, name or "last")
    pretrained = last[2]["config"]["system"] in PRETRAINING
    return last if name or pretrained else checkpoint.find(path, "best")


def _check_encoder(old: dict, config: ConfigDict) -> None:
    """Raises UserError where the encoders differ in what shapes do not show."""
    for key in UNSEEN:
        if old.get(key, config.encoder[key]) != config.encoder[key]:  # an older one has no filter: names will tell
            raise UserError(
                f"{config.init_from}: its parameters were trained for encoder.{key}={old[key]} (config.init_from); "
                f"set --config.encoder.{key}={old[key]}, not {config.encoder[key]}"
            )


def _check_shapes(params: dict, old: dict, init_from: str) -> None:
    """Raises UserError with a table of the names and shapes that differ; the numbers of items and attributes may."""
    here, there = _shapes(params), _shapes(old)
    differs = [name for name in here | there if here.get(name) != there.get(name)]
    if differs:
        rows = [("parameter", "here", "there")]
        rows += [(name, here.get(name, "missing"), there.get(name, "missing")) for name in differs]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        raise UserError(
            f"{init_from}: its parameters do not fit (config.init_from); give this run the config.encoder of that one:"
            f"\n{table}"
        )


def _shapes(params: dict) -> dict[str, str]:
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = ("any", *leaf.shape[1:]) if name in ("items", "attributes") else leaf.shape
        shapes[name] = f"({', '.join(map(str, shape))})"
    return shapes
