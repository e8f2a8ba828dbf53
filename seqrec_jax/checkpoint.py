"""The only file that knows orbax, and imports it when it is needed: save, verify, restore, find, prune.

A checkpoint counts once its manifest (a checksum of every file) is written; until then it is invisible. The newest, the
one before it (a damaged newest has a predecessor), the best that each of the two knows and those of
train.keep_epochs are kept.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.errors import UserError, unknown
from seqrec_jax.sharding import shardings_of
from seqrec_jax.train_step import TrainState

FORMAT = 1  # of what is written here; a reader refuses others
MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Store:
    """The checkpoints of one workdir."""

    directory: Path
    writable: bool

    @functools.cached_property
    def manager(self):
        """orbax's CheckpointManager."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells much
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            create=self.writable, enable_async_checkpointing=False, read_only=not self.writable
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "rest": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)


def open_store(workdir: Path, *, create: bool) -> Store:
    """Opens `workdir`/checkpoints, removing what a killed save left behind when `create`."""
    directory = (workdir / "checkpoints").absolute()
    if create:
        if jax.process_index() == 0:
            _clear(directory)
        _wait_for_all("checkpoints cleared")
    elif (workdir / "folds").is_dir():
        raise UserError(f"{workdir}: this run is in folds; name one of them: --workdir={workdir / 'folds' / '0'}")
    elif not directory.is_dir():
        raise UserError(f"{workdir}: no checkpoints here; train first, or name another --workdir")
    return Store(directory, writable=create)


def save(store: Store, state: TrainState, meta: dict, keep: Collection[int] = ()) -> None:
    """Writes the state and `meta` (JSON-ready) as the checkpoint of state.step, then drops the ones not needed.

    `keep`: steps that are always needed. A checkpoint of the same step stays if it says the same, else is replaced
    (the step was validated since).
    """
    import orbax.checkpoint as ocp

    step = int(state.step)
    meta = json.loads(json.dumps({"format": FORMAT, "step": step} | meta))
    rest = {"optimizer": state.optimizer, "state": state.state}
    known = step in _whole(store)
    differs = known and read_meta(store, step) != meta
    _wait_for_all(f"compared {step}")
    if differs:
        _drop(store, step)
    if differs or not known:
        saved = store.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                rest=ocp.args.StandardSave(rest),
                meta=ocp.args.JsonSave(meta),
            ),
        )
        store.manager.wait_until_finished()
        if not saved:
            raise RuntimeError(f"{store.directory}: the checkpoint of step {step} was not written")
        if jax.process_index() == 0:
            _write_manifest(store.directory / str(step))
        _wait_for_all(f"manifest {step}")
    kept = _whole(store)
    needed = {_best_step(store, step) for step in kept[-2:]} | set(keep)
    for old in kept[:-2]:
        if old not in needed:
            _drop(store, old)


def restore_latest(store: Store, like: TrainState) -> tuple[TrainState, dict] | None:
    """The newest undamaged checkpoint, laid out as `like` (any device layout); None if the workdir has none.

    A damaged one is named, set aside as damaged-STEP, and the one before it is used; if all are damaged: an error.
    """
    for step in reversed(_whole(store)):
        try:
            return restore(store, step, like)
        except Damaged as damage:
            if jax.process_index() == 0:
                aside = next(path for path in _names_aside(store.directory, step) if not path.exists())
                os.replace(store.directory / str(step), aside)
                log.warning(
                    "checkpoint %d is damaged (%s): set aside as %s, trying the one before it", step, damage, aside
                )
            _wait_for_all(f"aside {step}")
            store.manager.reload()
    damaged = sorted(path.name for path in store.directory.glob("damaged-*"))
    if damaged:
        raise UserError(
            f"{store.directory}: every checkpoint is damaged ({', '.join(damaged)}). Restore one from a copy, or start "
            "again in another --workdir; nothing was deleted"
        )
    return None


def restore(store: Store, step: int, like: TrainState) -> tuple[TrainState, dict]:
    """The checkpoint of `step`, verified, with the structure and shardings of `like`."""
    import orbax.checkpoint as ocp

    _verify(store.directory / str(step))
    meta = read_meta(store, step)
    rest = {"optimizer": like.optimizer, "state": like.state}
    restored = store.manager.restore(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(like.params)), rest=ocp.args.StandardRestore(_abstract(rest))
        ),
    )
    state = TrainState(
        step=jax.device_put(np.int32(step), like.step.sharding),
        params=restored["params"],
        optimizer=restored["rest"]["optimizer"],
        state=restored["rest"]["state"],
    )
    return state, meta


def read_meta(store: Store, step: int) -> dict:
    """What was saved beside the arrays of `step`."""
    import orbax.checkpoint as ocp

    meta = store.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if meta["format"] != FORMAT:
        raise UserError(
            f"{store.directory}/{step} has checkpoint format {meta['format']}, this version reads {FORMAT}: "
            "use the version that wrote it"
        )
    return meta


def restore_params(store: Store, step: int, mesh: Mesh) -> dict:
    """The parameters of `step` alone, verified, in the shapes they were saved with."""
    import orbax.checkpoint as ocp

    _verify(store.directory / str(step))
    saved = store.manager.item_metadata(step)["params"]
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings_of(mesh, shapes),
    )
    return store.manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(like)))["params"]


def find(workdir: Path, name: str = "best") -> tuple[Store, int, dict]:
    """(store, step, meta) of a checkpoint: best (as the newest undamaged one records it), last, STEP or epochN."""
    store = open_store(workdir, create=False)
    last, meta = _newest_undamaged(store)
    whole, per_epoch = _whole(store), meta.get("steps_per_epoch")
    named = {"best": meta["best_step"], "last": last} | {str(step): step for step in whole}
    named |= {f"epoch{step // per_epoch}": step for step in whole if per_epoch and step and step % per_epoch == 0}
    if meta.get("best_value", 0) is None:  # stopped before a validation
        del named["best"]
    named = {known: step for known, step in named.items() if step in whole}
    if name not in named:
        raise unknown(f"{workdir}: the checkpoint", name, named)
    _verify(store.directory / str(named[name]))
    return store, named[name], read_meta(store, named[name])


def _newest_undamaged(store: Store) -> tuple[int, dict]:
    damages = []
    for step in reversed(_whole(store)):
        try:
            _verify(store.directory / str(step))
        except Damaged as damage:
            log.warning("checkpoint %d is damaged (%s)", step, damage)
            damages.append(str(damage))
            continue
        return step, read_meta(store, step)
    found = f" ({'; '.join(damages)})" if damages else ""
    raise UserError(f"{store.directory}: no whole checkpoint{found}; train first, or name another --workdir")


def manifest_hash(store: Store, step: int) -> str:
    """SHA-256 of the checksums of a checkpoint's files: says which one it was."""
    return _digest(store.directory / str(step) / MANIFEST)


def check_best(store: Store, meta: dict) -> None:
    """Refuses to train on where the best checkpoint so far is damaged: the run could not end with it."""
    if meta["best_value"] is None:
        return
    try:
        _verify(store.directory / str(meta["best_step"]))
    except Damaged as damage:
        raise UserError(
            f"the best checkpoint so far is damaged: {damage}. Restore it from a copy, or start again in another "
            "--workdir"
        ) from damage


def latest_step(store: Store) -> int | None:
    """The newest whole checkpoint."""
    return max(_steps(store.directory, whole=True), default=None)


def check_data(meta: dict, dataset: SequenceDataset, where: Path) -> None:
    """Refuses a data set other than the one the checkpoint was trained on."""
    if meta["dataset_hash"] != dataset.hash:
        raise UserError(
            f"{where}: trained on data {meta['dataset_hash']}, but the data now is {dataset.hash}: give back the same "
            "file and data settings, or name another --workdir"
        )


def _clear(directory: Path) -> None:
    """Removes what a killed save left: one folder without a manifest at most, or its manifests are lost."""
    directory.mkdir(parents=True, exist_ok=True)
    cut_off = _steps(directory, whole=False)
    if len(cut_off) > 1:
        raise UserError(
            f"{directory}: the checkpoints {cut_off} have lost their {MANIFEST}. Restore them from a copy, or start "
            "again in another --workdir; nothing was deleted"
        )
    for step in cut_off:
        log.warning("removing checkpoint %d: its save was cut off before it was complete", step)
        shutil.rmtree(directory / str(step))
    for path in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path)


def _wait_for_all(what: str) -> None:
    """Of several processes none goes on before all are here: they read the same files, and the first changes them."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


class Damaged(UserError):
    """A file of a checkpoint is missing or differs from the manifest."""


def _whole(store: Store) -> list[int]:
    """Steps of the whole checkpoints in rising order, as the first process sees them."""
    return _of_first(_steps(store.directory, whole=True))


def _of_first(numbers: list[int]) -> list[int]:
    """What the first process has: a network disk may show the others later what it has written."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental.multihost_utils import broadcast_one_to_all

    count = int(broadcast_one_to_all(np.int32(len(numbers))))
    return broadcast_one_to_all(np.resize(np.int32(numbers), count)).tolist() if count else []


def _steps(directory: Path, *, whole: bool) -> list[int]:
    """Steps with (whole) or without a manifest, in rising order by number."""
    found = [path for path in directory.iterdir() if path.name.isdigit()]
    return sorted(int(path.name) for path in found if (path / MANIFEST).is_file() == whole)


def _best_step(store: Store, step: int) -> int | None:
    try:
        return read_meta(store, step)["best_step"]
    except (OSError, ValueError, KeyError):  # damaged, which is said when it is needed
        return None


def _drop(store: Store, step: int) -> None:
    """Deletes a checkpoint; whatever a kill leaves of it is invisible."""
    if jax.process_index() == 0:
        (store.directory / str(step) / MANIFEST).unlink()
    store.manager.delete(step)


def _names_aside(directory: Path, step: int) -> Iterator[Path]:
    """damaged-STEP, and others for a step that is damaged again."""
    yield directory / f"damaged-{step}"
    yield from (directory / f"damaged-{step}-{again}" for again in itertools.count(2))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): _digest(path) for path in files}
    temporary = folder / (MANIFEST + ".tmp")
    with temporary.open("w") as file:
        json.dump(entries, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)


def _verify(folder: Path) -> None:
    """Raises Damaged where a file does not have its checksum; of several processes the first looks."""
    damage = _damage(folder) if jax.process_index() == 0 else ""
    if _of_first([bool(damage)])[0]:
        raise Damaged(damage or f"{folder}: see what the first process says")


def _damage(folder: Path) -> str:
    try:
        entries = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{folder / MANIFEST}: {error}"
    for name, digest in entries.items():
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if _digest(folder / name) != digest:
            return f"{folder / name} differs from its checksum"
    return ""


def _abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
