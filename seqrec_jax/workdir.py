"""The folder a run lives in: its lock, its config, its metrics lines."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax
import numpy as np
from ml_collections import ConfigDict

from seqrec_jax import config as configuration
from seqrec_jax.errors import UserError
from seqrec_jax.validate import flatten

SHARED_AFTER = 20  # seconds in which a network disk shows on one host what another has written
REFUSED = -1  # instead of a start's number
# Keys that a resumed run may change: they decide when it stops and where things lie, not what a step computes.
CHANGEABLE = (
    "train.max_epochs", "train.max_steps", "train.max_seconds", "train.patience", "train.save_every",
    "train.keep_epochs", "eval.batch_size", "report.baselines", "report.analysis", "data.dir", "data.path",
    "data.cache_dir", "mesh.data", "mesh.model", "mesh.distributed",
)  # fmt: skip
# What is read anew when a trained model is asked, except for what says who it was trained on.
ASKED = ("eval.", "data.", "cold_start.", "profile.")
TRAINED_ON = ("data.train_fraction", "data.hold_out", "profile.folds")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds `workdir` for this run; a second one refuses. The lock of a killed run is gone with it.

    Of several processes of one run, the first holds the lock and writes all files but the checkpoints' arrays.
    """
    with contextlib.ExitStack() as held:
        failure, start = None, secrets.randbelow(2**31)
        if jax.process_index() == 0:
            try:
                held.enter_context(_lock(workdir, start))
            except UserError as error:
                failure, start = error, REFUSED
        if jax.process_count() > 1:
            _check_shared(workdir, start)
        if failure:
            raise failure
        yield


def _lock(workdir: Path, start: int) -> IO:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("a+")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written to: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        with file:
            raise UserError(
                f"--workdir={workdir} is in use by another run ({file.read().strip()}): wait for it, or name another"
            ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, start {start}")
    file.flush()
    os.fsync(file.fileno())
    return file


def _check_shared(workdir: Path, start: int) -> None:
    """That all processes see the lock of the first, by the number of its start: they write checkpoints together."""
    from jax.experimental import multihost_utils

    first = int(multihost_utils.broadcast_one_to_all(np.int32(start)))
    if first == REFUSED:
        if jax.process_index() > 0:
            raise UserError(f"--workdir={workdir}: the first process cannot use it, and says why")
        return
    deadline = time.monotonic() + SHARED_AFTER
    while not (seen := _reads(workdir / "lock").endswith(f" {first}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not multihost_utils.process_allgather(np.bool_(seen)).all():
        raise UserError(f"--workdir={workdir} is not one folder for all processes: name one that all their hosts mount")


def _reads(path: Path) -> str:
    """The text of a file, or none if there is no such file yet."""
    try:
        return path.read_text()
    except OSError:
        return ""


def begun(workdir: Path) -> bool:
    """Whether a run in `workdir` has saved a checkpoint or results."""
    kept = ("checkpoints/[0-9]*", "folds/*/checkpoints/[0-9]*", "results.json")
    return any(any(workdir.glob(pattern)) for pattern in kept)


def settle_config(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json if it is new; refuses to resume a run under a config that would compute something else.

    A run that has no checkpoint yet, because something in its config was wrong, takes the corrected one.
    """
    path = workdir / "config.json"
    if path.is_file() and begun(workdir):
        old, new = flatten(configuration.from_json(path.read_text())), flatten(config)
        constant = config.train.schedule == config.contrastive.schedule == "constant"
        free = CHANGEABLE if constant else CHANGEABLE[2:]
        differs = [key for key in new if old[key] != new[key] and key not in free]
        changed = [f"  {key}: {old[key]} there, {new[key]} now" for key in differs]
        if changed:
            raise UserError(
                f"{path} was made with another config; take it back or name another --workdir:\n" + "\n".join(changed)
            )
        if old == new:
            return
    if jax.process_index() == 0:
        _write_aside(path, configuration.to_json(config))


def check_trained(config: ConfigDict, meta: dict, workdir: Path) -> None:
    """Refuses a config that says of the checkpoint with `meta` what is not so."""
    now, then = flatten(config), flatten(configuration.from_dict(meta["config"]))
    for key in now:
        asked = key in CHANGEABLE or key.startswith(ASKED) and key not in TRAINED_ON
        if not asked and now[key] != then[key]:
            told = f"{workdir} was trained with config.{key}={then[key]}, not {now[key]}"
            raise UserError(f"{told}: leave --config and --config.{key} out")


class Log:
    """metrics.jsonl (one object a line) and TensorBoard events; on one process of several."""

    def __init__(self, workdir: Path, step: int, validated_step: int):
        """Opens the log of a run that continues after `step`: later or torn lines are taken back."""
        last = {"train": step, "valid": validated_step}
        self.writes = jax.process_index() == 0
        if not self.writes:
            return
        self.path = workdir / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_lines(self.path) if line["step"] <= last[line["kind"]]]
        _write_aside(self.path, "".join(kept))
        self.file = self.path.open("a")
        self.events = _summary_writer()(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict) -> None:
        """One line {"kind", "step", ...values}."""
        if not self.writes:
            return
        self.file.write(json.dumps({"kind": kind, "step": step} | values) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.events.add_scalar(f"{kind}/{name.replace('@', '_')}", value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        if self.writes:
            self.file.close()
            self.events.close()


def _summary_writer():
    """tensorboardX's, kept from importing PyTorch where that is installed: two seconds, for tensors we do not have."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if absent:
            del sys.modules["torch"]
    return SummaryWriter


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; a last line torn by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def write_json(path: Path, value: dict) -> None:
    """Writes a whole JSON file or nothing, on the first process."""
    if jax.process_index() == 0:
        _write_aside(path, json.dumps(value, indent=2) + "\n")


def _write_aside(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
