"""A whole run: data → training → the best checkpoint's metrics → baselines → results.json, table and plots."""

import dataclasses
import json
import logging
import threading
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax import checkpoint, programs, report, systems
from seqrec_jax import config as configuration
from seqrec_jax.analysis import Analysis, arrays, user_projection
from seqrec_jax.data import batches
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.prepare import prepare, print_report
from seqrec_jax.data.tasks import Task, read_tasks
from seqrec_jax.errors import UserError
from seqrec_jax.evaluate import make_evaluator
from seqrec_jax.judge import make_task_evaluator
from seqrec_jax.protocol import TASKS, protocol_of
from seqrec_jax.sharding import make_mesh, shardings_of
from seqrec_jax.train import identity, train
from seqrec_jax.train_step import TrainState
from seqrec_jax.transfer import find_parent
from seqrec_jax.validate import PRETRAINING, mesh_shape
from seqrec_jax.workdir import begun, check_trained, locked, settle_config, write_json

log = logging.getLogger(__name__)


def train_and_evaluate(config: ConfigDict, workdir: Path, stop: threading.Event) -> dict:
    """Trains (or resumes) in `workdir`, evaluates the best checkpoint, runs the baselines; returns results.json."""
    with locked(workdir):
        if config.init_from and not begun(workdir):  # a run under way needs it no more
            find_parent(config.init_from)  # what is missing is told before any work, and leaves no config.json
        settle_config(workdir, config)
        mesh = make_mesh(*mesh_shape(config, jax.device_count()))
        if jax.process_count() > 1 and mesh.size < jax.device_count():
            raise UserError(f"several processes train on all their {jax.device_count()} devices: leave out mesh.data")
        dataset, tasks = _data(config, workdir)
        finished = _finished(config, workdir, dataset)
        if finished:
            print(f"{workdir}: this run is finished\n{report.table(finished)}")
            return finished
        examples = train_examples(config, dataset, tasks[0])
        users_E = examples.start_E if tasks[0] else examples.user_E  # a task numbers its examples, not their users
        trained = {"users_trained": len(np.unique(users_E)), "targets_dropped": examples.dropped_targets}
        data_report = dataset.report | trained
        write_json(workdir / "data_report.json", data_report)
        print_report(data_report)
        if tasks[0]:
            print(f"{config.task:<16} {tasks[0].line}")
        if len(tasks) > 1:
            results = _folds(config, workdir, dataset, mesh, stop, tasks)
        else:
            system = systems.build(config, dataset, mesh, tasks[0])
            results = _results(config, workdir, dataset, system, mesh, stop, tasks[0])
        for name in config.report.baselines:
            results["baselines"][name] = _baseline(config, workdir, name, dataset, mesh, stop)
        if jax.process_index() == 0:
            print(report.table(results))
            report.plots(workdir, results)
        write_json(workdir / "results.json", results)  # the last file: it says that the run is finished
        return results


def evaluate(config: ConfigDict, workdir: Path) -> dict:
    """Metrics of the best checkpoint of `workdir` under the protocol of `config`; the data file is read again."""
    if config.task == "profile" and config.profile.folds > 1:
        raise UserError(f"{workdir}: a profile in folds is judged once; see results.json, and folds/ for each of them")
    mesh = make_mesh(*mesh_shape(config, jax.device_count()))
    store, step, meta = checkpoint.find(workdir)
    check_trained(config, meta, workdir)
    if config.system == "clue":
        raise UserError(f"{workdir}: pretraining has no metrics; what it learned is in results.json (analysis)")
    dataset, tasks = _data(config, workdir)
    checkpoint.check_data(meta, dataset, workdir)
    system = systems.build(config, dataset, mesh, tasks[0])
    params = checkpoint.restore_params(store, step, mesh)
    metrics = _metrics(config, dataset, system, params, mesh, tasks[0])
    metric = protocol_of(configuration.from_dict(meta["config"])).metric  # it chose the checkpoint
    line = dataclasses.replace(protocol_of(config), metric=metric).line()
    results = _header(config, dataset) | {"metric": metric, "protocol_line": line}
    results |= metrics | {"best_step": step, "parent": meta.get("parent")}
    write_json(workdir / f"results_{results['protocol']}.json", results)
    print(report.table(results))
    return results


def _data(config, workdir) -> tuple[SequenceDataset, list[Task | None]]:
    """The data set and its tasks, one None where the run predicts the data's own items; one hash covers both."""
    dataset = prepare(config.data, configuration.cache_dir(config, workdir))
    if config.task not in TASKS:
        return dataset, [None]
    tasks = read_tasks(config, dataset)
    report_ = dataset.report | {config.task: tasks[0].report}
    return dataclasses.replace(dataset, hash=f"{dataset.hash}-{tasks[0].hash}", report=report_), tasks


def train_examples(config: ConfigDict, dataset: SequenceDataset, task: Task | None = None) -> batches.Examples:
    """The examples of `task`, else of `train.targets`; a system that pretrains reads the whole training part."""
    if task:
        return task.parts["train"]
    whole = config.system in PRETRAINING
    return batches.train_examples(dataset, config.train.targets, config.encoder.max_length, whole=whole)


def train_layout(config: ConfigDict, dataset: SequenceDataset, mesh: Mesh, task: Task | None = None) -> batches.Layout:
    """The training examples in rows; says how full they are."""
    examples = train_examples(config, dataset, task)
    if not len(examples.user_E):
        raise UserError("no user has two training items, so there is nothing to predict; see data_report.json")
    last_target_only = config.train.targets == "prefix"
    layout = batches.layout_of(examples, config.train.batch_size, config, mesh, last_target_only=last_target_only)
    cells = layout.steps * layout.rows * layout.width
    log.info(
        "%s: %d steps of %d rows of %d cells, %.0f%% full",
        "several histories a row" if layout.packed else "one history a row",
        layout.steps, layout.rows, layout.width, 100 * examples.length_E.sum() / cells,
    )  # fmt: skip
    return layout


def _finished(config, workdir, dataset) -> dict | None:
    """results.json if the same command has written it."""
    path = workdir / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    if results.get("config_hash") != configuration.config_hash(config):
        return None
    checkpoint.check_data({"dataset_hash": results["dataset"]["hash"]}, dataset, workdir)
    return results


def _results(config, workdir, dataset, system, mesh, stop, task=None) -> dict:
    results = _header(config, dataset)
    if system.loss is None:
        state = TrainState(np.int32(0), system.init(jax.random.key(config.seed)), {}, {})
        state = jax.device_put(state, shardings_of(mesh, state))
        store = checkpoint.open_store(workdir, create=True)
        checkpoint.save(store, state, identity(config, dataset) | {"best_step": 0})
        metrics = _metrics(config, dataset, system, state.params, mesh, None)
        return results | metrics | {"steps": 0, "train_seconds": 0.0}
    layout = train_layout(config, dataset, mesh, task)
    validate = _evaluator(config, dataset, "valid", mesh, task)
    analysis = None if task else Analysis(dataset, config, mesh)
    kept = programs.kept(system, config, mesh, dataset.hash)
    state, progress, parent = train(config, workdir, dataset, system, layout, validate, analysis, mesh, stop, kept)
    store = checkpoint.open_store(workdir, create=False)
    params = checkpoint.restore_params(store, progress.best_step, mesh)
    test = _evaluator(config, dataset, "test", mesh, task)
    results |= {
        "test": test(system, params),
        "valid": progress.best_metrics,
        "steps": int(state.step),
        "best_step": progress.best_step,
        "train_seconds": progress.train_seconds,
        "parent": parent,
    }
    if config.task == "profile":
        results["confusion"] = test.confusion(system, params).tolist()
    if task:
        return results | {"classes": task.names.tolist()}
    found = arrays(params, dataset, mesh)
    if config.system == "clue":
        found["users_Nx2"] = user_projection(system, params, analysis)
    if jax.process_index() == 0:
        np.savez(workdir / "analysis.npz", **found)
    figures = analysis.figures(system, params) | progress.best_watch
    return results | {"analysis": figures, "collapsed": progress.collapsed}


def _folds(config, workdir, dataset, mesh, stop, tasks) -> dict:
    """One run a task, each in a workdir of its own inside this one; means over them, and standard deviations."""
    system, runs = systems.build(config, dataset, mesh, tasks[0]), []  # the tasks differ in their examples alone
    for number, task in enumerate(tasks):
        folder = workdir / "folds" / str(number)
        results = _inner(config, folder, dataset, lambda: system, mesh, stop, task)
        log.info("fold %d of %d: %s", number + 1, len(tasks), results["test"])
        runs.append(results)
    columns = {part: {name: [run[part][name] for run in runs] for name in runs[0][part]} for part in ("test", "valid")}
    return _header(config, dataset) | {
        **{part: {name: float(np.mean(values)) for name, values in found.items()} for part, found in columns.items()},
        "std": {name: float(np.std(values, ddof=1)) for name, values in columns["test"].items()},
        "folds": [run["test"] for run in runs],
        "confusion": np.sum([run["confusion"] for run in runs], axis=0).tolist(),
        "best_step": [run["best_step"] for run in runs],
        **{key: sum(run[key] for run in runs) for key in ("steps", "train_seconds")},
        **{key: runs[0][key] for key in ("classes", "parent")},
    }


def _inner(config, folder, dataset, build, mesh, stop, task=None) -> dict:
    """The results of a run in a workdir of its own inside another; one that is finished is not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    settle_config(folder, config)
    results = _finished(config, folder, dataset)
    if not results:
        results = _results(config, folder, dataset, build(), mesh, stop, task)
        write_json(folder / "results.json", results)
    return results


def _evaluator(config, dataset, split, mesh, task):
    if task:
        return make_task_evaluator(task, split, dataset, config, mesh)
    return make_evaluator(dataset, config, split, mesh)


def _header(config, dataset) -> dict:
    report_ = dataset.report
    return {
        "system": config.system + (" gru" if config.encoder.kind == "gru" and config.system != "pop" else ""),
        "task": f"profile {report_['profile']['label']}" if config.task == "profile" else config.task,
        "protocol": protocol_of(config).name,
        "protocol_line": protocol_of(config).line(),
        "metric": protocol_of(config).metric,
        "negatives": config.eval.negatives or f"{config.eval.num_negatives} drawn, seed {config.eval.negatives_seed}",
        "dataset": {
            "name": Path(config.data.path).name if config.data.path else config.data.name or "synthetic",
            "hash": dataset.hash,
            **{key: report_[key] for key in ("users", "items", "actions")},
        },
        "loss": "pretraining" if config.system in PRETRAINING else config.loss.next_item,
        "targets": config.train.targets,
        "train_fraction": config.data.train_fraction,
        "seed": config.seed,
        "config_hash": configuration.config_hash(config),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "baselines": {},
    }


def _metrics(config, dataset, system, params, mesh, task) -> dict:
    return {split: _evaluator(config, dataset, split, mesh, task)(system, params) for split in ("test", "valid")}


def _baseline(config, workdir, name, dataset, mesh, stop) -> dict:
    """The same loss, data, budget and seed with another system, in a workdir of its own inside this one."""
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.system, other.name, other.init_from, other.report.baselines = name, name, "", ()
    build = lambda: systems.build(other, dataset, mesh)  # noqa: E731
    results = _inner(other, workdir / "baselines" / name, dataset, build, mesh, stop)
    return {key: results[key] for key in ("test", "valid", "steps", "train_seconds")}
