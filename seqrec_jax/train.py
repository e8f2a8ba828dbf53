"""The training loop: dispatch, log, validate, checkpoint, stop, resume."""

import contextlib
import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from seqrec_jax import checkpoint
from seqrec_jax.analysis import Analysis
from seqrec_jax.data.batches import Layout
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.errors import RunFailed
from seqrec_jax.evaluate import Evaluator
from seqrec_jax.programs import Kept
from seqrec_jax.protocol import protocol_of
from seqrec_jax.systems import System
from seqrec_jax.train_step import NO_STEP, Start, TrainState, compile_program
from seqrec_jax.transfer import transfer
from seqrec_jax.workdir import Log

log = logging.getLogger(__name__)


WATCHED = {"mean_cosine": "mean cosine of user states {:.4f}", "same_top10": "the same top 10 for {:.0%} of users"}
JUDGED_FROM = 3  # epochs; before, a model may well say the same of everybody


class Stopped(Exception):
    """The run was asked to stop, has saved, and continues with the same command."""


@dataclasses.dataclass
class Progress:
    """What the loop remembers besides the train state; saved with every checkpoint."""

    best_step: int = 0
    best_value: float | None = None  # of the protocol's metric on validation
    best_metrics: dict = dataclasses.field(default_factory=dict)
    waiting: int = 0  # validations since the best
    train_seconds: float = 0.0
    validated_step: int = -1
    best_watch: dict = dataclasses.field(default_factory=dict)  # what the collapse watch saw in the best
    collapsed: dict | None = None  # what it saw when it gave alarm, and the step; None again once a model recovers


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets; a second signal ends the process at once (no checkpoint is harmed)."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number, frame):
        asked.set()
        log.warning("%s: stopping after the steps under way", signal.Signals(number).name)
        for name in before:
            signal.signal(name, signal.SIG_DFL)

    before = {name: signal.signal(name, on_signal) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def train(
    config: ConfigDict,
    workdir: Path,
    dataset: SequenceDataset,
    system: System,
    layout: Layout,
    validate: Evaluator,
    analysis: Analysis | None,
    mesh: Mesh,
    stop: threading.Event,
    kept: Kept | None = None,
) -> tuple[TrainState, Progress, dict]:
    """Trains until a bound or patience ends it; resumes from `workdir`. Returns (last state, progress, provenance).

    The collapse watch looks at every validation and judges from the end of the third epoch on; an alarm lasts until a
    later model is none. When training ends without one, it judges the best checkpoint, wherever that was. Raises
    Stopped when `stop` is set (after saving) and RunFailed on a loss or gradient that is not finite.
    """
    total = total_steps(config, layout)
    store = checkpoint.open_store(workdir, create=True)
    start = Start(system, config, mesh)
    initial = start.compiling(kept)  # while this is compiled, the program of the steps is traced
    program = compile_program(system, config, mesh, layout, total, start, kept)
    state, progress, parent = _begin(config, dataset, initial.result()(start.seed), store, mesh)
    step = saved = int(state.step)
    program.wait()
    eval_every = config.eval.every or layout.steps
    save_every = config.train.save_every or eval_every
    keep = {epoch * layout.steps for epoch in config.train.keep_epochs}
    if keep and max(keep) > total:
        log.warning("train.keep_epochs=%d is never reached: the run ends at step %d", max(keep) // layout.steps, total)
    lines = Log(workdir, step, progress.validated_step)
    bar = tqdm(total=total, initial=step, unit="step", desc=config.name, disable=jax.process_index() > 0)
    unread, read_at = None, 0.0  # the last dispatch, (sums, first step, last step); when the one before was read
    stops = False

    def save():
        nonlocal saved
        meta = dataclasses.asdict(progress) | {"parent": parent, "steps_per_epoch": layout.steps}
        checkpoint.save(store, state, identity(config, dataset) | meta, keep)
        saved = step

    def read(dispatch):
        nonlocal read_at, stops
        sums, now = jax.device_get(dispatch[0]), time.perf_counter()
        if sums["bad_step"] != NO_STEP:
            raise RunFailed(_not_finite(int(sums["bad_step"]), store))
        seconds = now - read_at
        if jax.process_count() > 1:
            stops, seconds = _agreed(stop.is_set(), seconds)
        progress.train_seconds += seconds
        _log_steps(lines, bar, sums, *dispatch[1:], layout.steps, seconds)
        read_at = now

    with contextlib.closing(lines), bar:
        while True:
            if jax.process_count() == 1:  # several learn it where they read, all at the same step
                stops = stop.is_set()
            saves = step % save_every == 0 or step in keep
            rests = stops or saves or step >= total or step % eval_every == 0
            if unread and (rests or _exhausted(config, progress)):
                read(unread)
                unread = None
            done = step >= total or _exhausted(config, progress)
            if step != progress.validated_step and (done or (step and step % eval_every == 0)):
                _validate(config, validate, analysis, system, state, progress, step / layout.steps, lines, bar)
                save()
                done = done or _exhausted(config, progress)
            if done:
                break
            if stops:
                save()
                raise Stopped(f"stopped at step {step}; the same command continues from there")
            if saves and step != saved:
                save()
            bounds = (config.train.log_every, layout.steps, eval_every, save_every)
            until = min(total, *((step // every + 1) * every for every in bounds))
            read_at = read_at if unread else time.perf_counter()
            state, sums = program.run(state, step, until)
            if unread:  # while the next steps are computed (of several processes, after them: what they agree on waits)
                read(unread)
            unread, step = (sums, step, until), until
    if analysis and system.judged != "never" and progress.collapsed is None:
        _judge(analysis, progress, progress.best_step, progress.best_watch)
    return state, progress, parent


def total_steps(config: ConfigDict, layout: Layout) -> int:
    """The bound on steps: max_epochs, and max_steps if it is set."""
    epochs = config.train.max_epochs * layout.steps
    return min(epochs, config.train.max_steps) if config.train.max_steps else epochs


def _begin(config, dataset, state, store, mesh) -> tuple[TrainState, Progress, dict]:
    """Workdir checkpoint > init_from > scratch, which is `state`."""
    restored = checkpoint.restore_latest(store, state)
    if restored:
        state, meta = restored
        checkpoint.check_data(meta, dataset, store.directory)
        checkpoint.check_best(store, meta)
        names = {field.name for field in dataclasses.fields(Progress)}
        progress = Progress(**{name: meta[name] for name in names & meta.keys()})  # an older one knows less
        log.info("resuming at step %d", int(state.step))
        return state, progress, meta["parent"]
    if config.init_from:
        params, parent = transfer(state.params, dataset.item_ids, config, mesh, dataset.attribute_names)
        return state.replace(params=params), Progress(), parent
    return state, Progress(), {}


def identity(config: ConfigDict, dataset: SequenceDataset) -> dict:
    """What a checkpoint needs to be used alone."""
    return {
        "config": config.to_dict(),
        "protocol": dataclasses.asdict(protocol_of(config)),
        "items": dataset.item_ids.tolist(),
        "attributes": dataset.attribute_names.tolist(),
        "dataset_hash": dataset.hash,
    }


def _agreed(stops: bool, seconds: float) -> tuple[bool, float]:
    """The same on all processes, so that they take the same steps: whether any is to stop, the seconds of the first."""
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.float32([stops, seconds]))
    return bool(found[:, 0].any()), float(found[0, 1])


def _exhausted(config, progress) -> bool:
    train = config.train
    out_of_patience = train.patience and progress.waiting >= train.patience
    return bool(out_of_patience or (train.max_seconds and progress.train_seconds >= train.max_seconds))


def _validate(config, validate, analysis, system, state, progress, epoch, lines, bar) -> None:
    step = int(state.step)
    metrics, seen = validate(system, state.params), analysis.watch(system, state.params) if analysis else {}
    metric = validate.protocol.metric
    value = metrics.get(metric, step)  # without a metric, a later one is a better one
    progress.validated_step = step
    if progress.best_value is None or value > progress.best_value:
        progress.best_step, progress.best_value, progress.best_metrics, progress.waiting = step, value, metrics, 0
        progress.best_watch = seen
    else:
        progress.waiting += 1
    if analysis and system.judged == "always" and epoch >= JUDGED_FROM:
        _judge(analysis, progress, step, seen)
    if analysis and (config.report.analysis or not metric):
        seen = seen | analysis.figures(system, state.params)
    lines.write("valid", step, metrics | seen | {"train_seconds": progress.train_seconds})
    judged = f" valid {metric} {value:.4f} (best {progress.best_value:.4f})" if metric else ""
    bar.set_description(config.name + judged)


def _judge(analysis, progress, step, seen) -> None:
    found, before = analysis.collapse(step, seen), progress.collapsed
    progress.collapsed = found and (before or found)
    if found and not before:
        told = ", ".join(WATCHED[name].format(value) for name, value in seen.items())
        log.warning(
            "COLLAPSED: at step %d the model says the same of everybody: %s. Try more epochs, another "
            "config.train.learning_rate or config.contrastive.weight", step, told,
        )  # fmt: skip
    elif before and not found:
        log.warning("recovered: at step %d the model tells users apart again", step)


def _log_steps(lines, bar, sums, step, until, steps_per_epoch, seconds) -> None:
    count = until - step
    losses = {name: float(sums[name]) / count for name in sums if name not in ("targets", "bad_step")}
    speed = int(sums["targets"]) / seconds
    lines.write(
        "train", until, losses | {"epoch": until / steps_per_epoch, "targets": int(sums["targets"]),
                                  "seconds": seconds, "targets_per_second": speed}
    )  # fmt: skip
    bar.update(count)
    bar.set_postfix_str(f"loss {losses['loss']:.4f}, {speed:,.0f} targets/s")


def _not_finite(step: int, store: checkpoint.Store) -> str:
    good = checkpoint.latest_step(store)
    last = f"The last good checkpoint is step {good}" if good is not None else "There is no checkpoint yet"
    return (
        f"the loss or a gradient of step {step} is not finite. {last} in {store.directory}; a lower "
        "config.train.learning_rate or config.train.clip_norm=1.0 may help"
    )
