"""A whole run: data → training → the best checkpoint's metrics → baselines → results.json, table and plots."""

import json
import logging
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax import checkpoint, report, systems
from seqrec_jax import config as configuration
from seqrec_jax.analysis import arrays, make_analysis, user_projection
from seqrec_jax.data import batches
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.prepare import prepare, print_report
from seqrec_jax.errors import UserError
from seqrec_jax.evaluate import make_evaluator
from seqrec_jax.protocol import protocol_of
from seqrec_jax.sharding import make_mesh
from seqrec_jax.train import identity, train
from seqrec_jax.train_step import TrainState
from seqrec_jax.validate import PRETRAINING, mesh_shape
from seqrec_jax.workdir import locked, settle_config, write_json

log = logging.getLogger(__name__)


def train_and_evaluate(config: ConfigDict, workdir: Path, stop: threading.Event) -> dict:
    """Trains (or resumes) in `workdir`, evaluates the best checkpoint, runs the baselines; returns results.json."""
    with locked(workdir):
        settle_config(workdir, config)
        mesh = make_mesh(*mesh_shape(config, jax.device_count()))
        dataset = prepare(config.data, cache_dir(config, workdir))
        finished = _finished(config, workdir, dataset)
        if finished:
            print(f"{workdir}: this run is finished\n{report.table(finished)}")
            return finished
        examples = train_examples(config, dataset)
        trained = {"users_trained": len(np.unique(examples.user_E)), "targets_dropped": examples.dropped_targets}
        data_report = dataset.report | trained
        write_json(workdir / "data_report.json", data_report)
        print_report(data_report)
        results = _results(config, workdir, dataset, mesh, stop)
        for name in config.report.baselines:
            results["baselines"][name] = _baseline(config, workdir, name, dataset, mesh, stop)
        if jax.process_index() == 0:
            print(report.table(results))
            report.plots(workdir, results)
        write_json(workdir / "results.json", results)  # the last file: it says that the run is finished
        return results


def evaluate(config: ConfigDict, workdir: Path) -> dict:
    """Metrics of the best checkpoint of `workdir` under the protocol of `config`; the data file is read again."""
    mesh = make_mesh(*mesh_shape(config, jax.device_count()))
    store, step, meta = checkpoint.find(workdir)
    trained = configuration.from_json(json.dumps(meta["config"]))
    if (config.system, config.encoder.to_dict()) != (trained.system, trained.encoder.to_dict()):
        raise UserError(f"{workdir} was trained with another system or encoder than the config has: leave --config out")
    dataset = prepare(config.data, cache_dir(config, workdir))
    checkpoint.check_data(meta, dataset, workdir)
    system = systems.build(config, dataset, mesh)
    params = checkpoint.restore_params(store, step, mesh)
    results = _header(config, dataset) | _metrics(config, dataset, system, params, mesh) | {"best_step": step}
    write_json(workdir / f"results_{config.eval.protocol}.json", results)
    print(report.table(results))
    return results


def train_examples(config: ConfigDict, dataset: SequenceDataset) -> batches.Examples:
    """The examples of `train.targets`; a system that pretrains reads the whole training part."""
    whole = config.system in PRETRAINING
    return batches.train_examples(dataset, config.train.targets, config.encoder.max_length, whole=whole)


def train_layout(config: ConfigDict, dataset: SequenceDataset, mesh: Mesh) -> tuple[batches.Layout, int]:
    """The training examples of `train.targets` in rows, and how many targets were dropped."""
    train, encoder = config.train, config.encoder
    examples = train_examples(config, dataset)
    if not len(examples.user_E):
        raise UserError("no user has two training items, so there is nothing to predict; see data_report.json")
    layout = batches.make_layout(
        examples,
        train.batch_size,
        encoder.max_length,
        positions=encoder.positions,
        packed=train.packed,
        last_target_only=train.targets == "prefix",
        row_multiple=mesh.shape["data"],
        room=encoder.user_token,
    )
    cells = layout.steps * layout.rows * layout.width
    log.info(
        "%s: %d steps of %d rows of %d cells, %.0f%% full",
        "several histories a row" if layout.packed else "one history a row",
        layout.steps, layout.rows, layout.width, 100 * examples.length_E.sum() / cells,
    )  # fmt: skip
    return layout, examples.dropped_targets


def cache_dir(config: ConfigDict, workdir: Path) -> Path:
    """Where prepared data and compiled programs are kept."""
    return Path(config.data.cache_dir).expanduser() if config.data.cache_dir else workdir.parent / ".cache"


def _finished(config, workdir, dataset) -> dict | None:
    """results.json if the same command has written it."""
    path = workdir / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    if results.get("config_hash") != configuration.config_hash(config):
        return None
    checkpoint.check_data({"dataset_hash": results["dataset"]["hash"]}, dataset, workdir)
    return results


def _results(config, workdir, dataset, mesh, stop) -> dict:
    system = systems.build(config, dataset, mesh)
    results = _header(config, dataset)
    if system.loss is None:
        params = system.init(jax.random.key(config.seed))
        state = TrainState(jnp.int32(0), params, {}, {})
        store = checkpoint.open_store(workdir, create=True)
        checkpoint.save(store, state, identity(config, dataset) | {"best_step": 0})
        return results | _metrics(config, dataset, system, params, mesh) | {"steps": 0, "train_seconds": 0.0}
    layout, _ = train_layout(config, dataset, mesh)
    validate = make_evaluator(dataset, config, "valid", mesh)
    analysis = make_analysis(dataset, config, mesh)
    state, progress, parent = train(config, workdir, dataset, system, layout, validate, analysis, mesh, stop)
    store = checkpoint.open_store(workdir, create=False)
    params = checkpoint.restore_params(store, progress.best_step, mesh)
    test = make_evaluator(dataset, config, "test", mesh)(system, params)
    found = arrays(params, dataset, mesh)
    if config.system == "clue":
        found["users_Nx2"] = user_projection(system, params, analysis)
    if jax.process_index() == 0:
        np.savez(workdir / "analysis.npz", **found)
    return results | {
        "test": test,
        "valid": progress.best_metrics,
        "steps": int(state.step),
        "best_step": progress.best_step,
        "train_seconds": progress.train_seconds,
        "parent": parent,
        "analysis": analysis.figures(system, params) | progress.best_watch,
        "collapsed": progress.collapsed,
    }


def _header(config, dataset) -> dict:
    report_ = dataset.report
    return {
        "system": config.system + (" gru" if config.encoder.kind == "gru" and config.system != "pop" else ""),
        "protocol": config.eval.protocol,
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


def _metrics(config, dataset, system, params, mesh) -> dict:
    return {split: make_evaluator(dataset, config, split, mesh)(system, params) for split in ("test", "valid")}


def _baseline(config, workdir, name, dataset, mesh, stop) -> dict:
    """The same loss, data, budget and seed with another system, in a workdir of its own inside this one."""
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.system, other.name, other.init_from, other.report.baselines = name, name, "", ()
    folder = workdir / "baselines" / name
    folder.mkdir(parents=True, exist_ok=True)
    settle_config(folder, other)
    results = _results(other, folder, dataset, mesh, stop)
    write_json(folder / "results.json", results)
    return {key: results[key] for key in ("test", "valid", "steps", "train_seconds")}
