"""Stopped, killed and repeated runs: the same command with the same workdir ends bit for bit as if never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from seqrec_jax import checkpoint, report, run, systems, train, train_step
from seqrec_jax.config import load
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.errors import RunFailed, UserError
from seqrec_jax.main import main
from seqrec_jax.sharding import make_mesh
from seqrec_jax.workdir import locked, read_lines

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds", "targets_per_second", "train_seconds")
# Five steps an epoch; dispatches end at steps 3 4 5 6 8 9 10 12 15. The contrast and the sampled loss draw every step.
TINY = {
    "data.synthetic_users": 100, "data.synthetic_items": 300, "encoder.max_length": 16, "encoder.dim": 8,
    "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 24, "train.max_epochs": 3, "train.log_every": 4,
    "train.save_every": 3, "train.schedule": "constant", "loss.next_item": "sampled", "loss.negatives": 16,
    "report.baselines": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prepared data and compiled programs, one folder for the whole session."""
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Runs in this process share their traced programs (those that are killed or signalled have their own)."""
    made = {}

    def once(function):
        def memoised(*arguments):
            key = (function.__name__, *filter(None, map(program_key, arguments)))
            if key not in made:
                made[key] = function(*arguments)
            return made[key]

        return memoised

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plots", lambda *_: None)
        for module, name in (
            (systems, "build"),
            (run, "make_evaluator"),
            (run, "Analysis"),
            (train_step, "make_train_steps"),
        ):
            patch.setattr(module, name, once(getattr(module, name)))
        yield


def program_key(argument):
    """What of an argument a program depends on."""
    if isinstance(argument, SequenceDataset):
        return argument.hash
    if isinstance(argument, ConfigDict):
        groups = [argument[name].to_dict() for name in ("encoder", "loss", "contrastive", "augment", "eval")]
        return json.dumps([argument.system, argument.train.schedule, argument.train.warmup_steps, groups])
    if isinstance(argument, systems.System):
        return str(id(argument))
    return argument if isinstance(argument, str) else None


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    """The workdir of the run that all others have to equal."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert main(flags(cache, workdir)) == 0
    return workdir


def flags(cache, workdir, **changes):
    values = TINY | {"data.cache_dir": cache} | {key.replace("__", "."): value for key, value in changes.items()}
    settings = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={ROOT / 'configs' / 'cl4srec.py'}", f"--workdir={workdir}", *settings]


def config_of(cache, **changes):
    given = [word.removeprefix("--config.") for word in flags(cache, "", **changes) if word.startswith("--config.")]
    return load(str(ROOT / "configs" / "cl4srec.py"), [tuple(word.split("=", 1)) for word in given])


def start(cache, workdir, **changes):
    command = [sys.executable, "-m", "seqrec_jax.main", *flags(cache, workdir, **changes)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop_after(dispatches):
    """A stop event that is set when the loop asks for the dispatch after so many."""
    return SimpleNamespace(is_set=iter([False] * dispatches + [True] * 99).__next__)


def timeless(values):
    return {name: value for name, value in values.items() if name not in TIMES}


def lines_of(workdir):
    return [timeless(line) for line in read_lines(workdir / "metrics.jsonl")]


def newest(workdir):
    """(step, arrays by name, meta without times) of the newest checkpoint."""
    store = checkpoint.open_store(workdir, create=False)
    step = checkpoint.latest_step(store)
    restore = ocp.args.StandardRestore()
    saved = store.manager.restore(step, args=ocp.args.Composite(params=restore, rest=restore))
    leaves = jax.tree_util.tree_leaves_with_path({"params": saved["params"], "rest": saved["rest"]})
    named = {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}
    meta = timeless(checkpoint.read_meta(store, step))
    meta["config"].pop("data")  # the folders differ
    return step, named, meta


def assert_equal_runs(one, other):
    (step, arrays, meta), (other_step, other_arrays, other_meta) = newest(one), newest(other)
    assert step == other_step and meta == other_meta and arrays.keys() == other_arrays.keys()
    assert any(".mu" in name or "'mu'" in name for name in arrays)  # the optimiser is among them
    different = [name for name in arrays if arrays[name].tobytes() != other_arrays[name].tobytes()]
    assert not different
    assert lines_of(one) == lines_of(other)


def snapshot(workdir):
    """Bytes and time of change of every file but the lock."""
    files = [path for path in workdir.rglob("*") if path.is_file() and path.name != "lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# Stopped in good order


@pytest.mark.parametrize(
    ("dispatches", "step"),
    [(0, 0), (2, 4), (3, 5), (8, 12)],
    ids=["before the first step", "mid-epoch", "epoch boundary", "before the last steps"],
)
def test_stopped_run_resumes_bit_for_bit(uninterrupted, cache, tmp_path, dispatches, step):
    with pytest.raises(train.Stopped, match=f"stopped at step {step};"):
        run.train_and_evaluate(config_of(cache), tmp_path, stop_after(dispatches))
    assert newest(tmp_path)[0] == step
    assert main(flags(cache, tmp_path)) == 0
    assert_equal_runs(tmp_path, uninterrupted)


def test_metrics_lines_have_every_boundary_once(uninterrupted):
    steps = {kind: [line["step"] for line in lines_of(uninterrupted) if line["kind"] == kind] for kind in
             ("train", "valid")}  # fmt: skip
    assert steps == {"train": [3, 4, 5, 6, 8, 9, 10, 12, 15], "valid": [5, 10, 15]}


def test_patience_continues_where_it_was(cache, tmp_path):
    still = {"train__learning_rate": "1e-30", "train__patience": 2, "train__max_epochs": 9}
    with pytest.raises(train.Stopped, match="stopped at step 12"):
        run.train_and_evaluate(config_of(cache, **still), tmp_path, stop_after(8))
    assert newest(tmp_path)[2]["waiting"] == 1
    assert main(flags(cache, tmp_path, **still)) == 0
    step, _, meta = newest(tmp_path)
    assert (step, meta["best_step"], meta["waiting"]) == (15, 5, 2)


@pytest.mark.slow
def test_linear_schedule_and_warmup_continue(cache, tmp_path):
    falling = {"system": "sasrec", "train__schedule": "linear", "train__warmup_steps": 5, "train__max_epochs": 2}
    assert main(flags(cache, tmp_path / "whole", **falling)) == 0
    with pytest.raises(train.Stopped):
        run.train_and_evaluate(config_of(cache, **falling), tmp_path / "stopped", stop_after(5))
    assert main(flags(cache, tmp_path / "stopped", **falling)) == 0
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole")


def test_figures_at_every_validation_continue(cache, tmp_path):
    figures = {"report__analysis": True}
    assert main(flags(cache, tmp_path / "whole", **figures)) == 0
    with pytest.raises(train.Stopped):
        run.train_and_evaluate(config_of(cache, **figures), tmp_path / "stopped", stop_after(5))
    assert main(flags(cache, tmp_path / "stopped", **figures)) == 0
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole")
    last = lines_of(tmp_path / "whole")[-1]
    assert {"alignment", "uniformity", "item_cosine", "effective_rank"} <= last.keys() and last["kind"] == "valid"


@pytest.mark.slow
def test_checkpoints_of_named_epochs_stay_and_a_resumed_run_has_the_same(uninterrupted, cache, tmp_path):
    kept = {"train__keep_epochs": "1,2", "eval__every": 7, "train__save_every": 7}  # no epoch ends with a validation
    assert main(flags(cache, tmp_path / "whole", **kept)) == 0
    with pytest.raises(train.Stopped):
        run.train_and_evaluate(config_of(cache, **kept), tmp_path / "stopped", stop_after(4))
    assert main(flags(cache, tmp_path / "stopped", **kept)) == 0
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole")
    arrays = {}
    for name in ("whole", "stopped"):
        assert {5, 10} <= {int(path.name) for path in (tmp_path / name / "checkpoints").iterdir()}
        store, step, _ = checkpoint.find(tmp_path / name, "epoch2")
        params = checkpoint.restore_params(store, step, make_mesh(1, 1))
        arrays[name] = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    assert arrays["whole"] == arrays["stopped"]
    (_, last, _), (_, last_plain, _) = newest(tmp_path / "whole"), newest(uninterrupted)
    assert all(last[name].tobytes() == last_plain[name].tobytes() for name in last)  # keeping changes no step


def test_an_epoch_that_the_steps_do_not_reach_is_told(cache, tmp_path, caplog):
    assert main(flags(cache, tmp_path, train__keep_epochs="1,2", train__max_steps=7)) == 0
    assert "train.keep_epochs=2 is never reached: the run ends at step 7" in caplog.text


def test_more_epochs_continue_a_finished_run(uninterrupted, cache, tmp_path):
    assert main(flags(cache, tmp_path, train__max_epochs=2)) == 0
    assert main(flags(cache, tmp_path, train__max_epochs=3)) == 0
    assert_equal_runs(tmp_path, uninterrupted)


def test_earlier_end_is_validated_and_saved(cache, tmp_path):
    with pytest.raises(train.Stopped, match="step 4"):
        run.train_and_evaluate(config_of(cache), tmp_path, stop_after(2))
    assert main(flags(cache, tmp_path, train__max_steps=4)) == 0
    step, _, meta = newest(tmp_path)
    assert (step, meta["validated_step"], meta["best_step"]) == (4, 4, 4)
    assert [line["step"] for line in lines_of(tmp_path) if line["kind"] == "valid"] == [4]


def test_last_step_is_validated_although_it_is_a_save_step(cache, tmp_path):
    assert main(flags(cache, tmp_path, train__max_steps=6)) == 0
    step, _, meta = newest(tmp_path)
    assert (step, meta["validated_step"]) == (6, 6)


def test_max_seconds_counts_over_resumes_then_evaluates(cache, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(clock)))  # 10 s a dispatch
    bound = {"train__max_seconds": 35}
    with pytest.raises(train.Stopped):
        run.train_and_evaluate(config_of(cache, **bound), tmp_path, stop_after(2))
    assert main(flags(cache, tmp_path, **bound)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 6 and results["train_seconds"] == 40 and results["test"]["ndcg@10"] >= 0


# Signals


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_signal_saves_and_exits_75_and_the_run_resumes(cache, tmp_path, name):
    process = start(cache, tmp_path / "signalled", train__max_epochs=10_000)
    wait_for(lambda: len(read_lines(tmp_path / "signalled" / "metrics.jsonl")) >= 5, process)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command continues from there" in output, output
    step = newest(tmp_path / "signalled")[0]
    for folder in ("signalled", "whole"):
        assert main(flags(cache, tmp_path / folder, train__max_epochs=10_000, train__max_steps=step + 3)) == 0
    assert_equal_runs(tmp_path / "signalled", tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc tells which signals a process catches")
def test_a_signal_before_anything_has_begun_exits_75_too(cache, tmp_path):
    process = start(cache, tmp_path, train__max_epochs=10_000)
    status, terminate = Path(f"/proc/{process.pid}/status"), 1 << signal.SIGTERM - 1
    caught = lambda: int(next(line.split()[1] for line in status.read_text().splitlines() if "SigCgt" in line), 16)  # noqa: E731
    wait_for(lambda: caught() & terminate, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and not read_lines(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("kills", "epochs"), [(2, 8), pytest.param(20, 60, marks=pytest.mark.slow)], ids=["2 kills", "20 kills"]
)
def test_killed_run_resumes_bit_for_bit(cache, tmp_path, kills, epochs):
    """SIGKILL at random moments, most of them while it trains, validates or saves (every other step)."""
    changes = {"train__max_epochs": epochs, "train__save_every": 2, "train__log_every": 2, "train__patience": 0}
    assert main(flags(cache, tmp_path / "whole", **changes)) == 0
    seed, log = 2026, tmp_path / "killed" / "metrics.jsonl"
    moments, killed_at = random.Random(seed), []
    for number in range(kills):
        before = log.stat().st_ino if log.exists() else None
        process = start(cache, tmp_path / "killed", **changes)
        if number % 5 == 4:  # anywhere, mostly while it starts
            time.sleep(moments.uniform(0, 6))
        else:  # the log is made anew when training begins
            wait_for(lambda before=before: log.exists() and log.stat().st_ino != before, process)
            lines = len(read_lines(log)) + moments.randint(2, 6)
            wait_for(lambda lines=lines: len(read_lines(log)) >= lines, process)
            time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.communicate()
        killed_at.append(max((line["step"] for line in read_lines(log)), default=0))
    print(f"seed {seed}; steps at the kills: {killed_at}")
    assert 2 < max(killed_at) < 5 * epochs  # it got somewhere, and not to the end
    assert main(flags(cache, tmp_path / "killed", **changes)) == 0
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed" / "checkpoints").glob("*damaged*"))
    assert not list((tmp_path / "killed" / "checkpoints").glob("*tmp*"))


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the run ended or hung: {process.communicate()[0]}")
        time.sleep(0.01)


# One workdir, one run


def test_second_run_in_a_workdir_refuses(cache, tmp_path, capsys):
    with locked(tmp_path):
        assert main(flags(cache, tmp_path)) == 2
    said = capsys.readouterr().err
    assert f"is in use by another run (process {os.getpid()} on " in said
    assert not (tmp_path / "config.json").exists()


def test_workdir_that_is_a_file_is_refused(cache, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(flags(cache, tmp_path / "file")) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_finished_run_says_so_and_rewrites_nothing(uninterrupted, cache, capsys):
    before = snapshot(uninterrupted)
    assert main(flags(cache, uninterrupted)) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert snapshot(uninterrupted) == before


def test_torn_last_line_is_repaired(uninterrupted, cache, tmp_path):
    with pytest.raises(train.Stopped):
        run.train_and_evaluate(config_of(cache), tmp_path, stop_after(6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 10, "lo')
    assert main(flags(cache, tmp_path)) == 0
    assert_equal_runs(tmp_path, uninterrupted)


def test_lines_after_the_checkpoint_are_taken_back(uninterrupted, cache, tmp_path):
    """A kill between a line and its checkpoint: the step is done, and its line written, again."""
    with pytest.raises(train.Stopped):
        run.train_and_evaluate(config_of(cache), tmp_path, stop_after(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5, "loss": 0}\n{"kind": "valid", "step": 5}\n')
    assert main(flags(cache, tmp_path)) == 0
    assert_equal_runs(tmp_path, uninterrupted)


def test_changed_config_is_refused_with_the_difference(uninterrupted, cache, capsys):
    before = snapshot(uninterrupted)
    assert main(flags(cache, uninterrupted, encoder__dim=16, train__learning_rate=0.5)) == 2
    said = capsys.readouterr().err
    assert "encoder.dim: 8 there, 16 now" in said and "train.learning_rate: 0.003 there, 0.5 now" in said
    assert said.count(" there, ") == 2 and snapshot(uninterrupted) == before


@pytest.mark.parametrize("finished", [False, True])
def test_changed_data_is_refused_with_both_hashes(cache, tmp_path, capsys, finished):
    data = tmp_path / "data.txt"
    data.write_text("".join(f"{user} {user} {user % 7 + 1} {user % 5 + 2} 9 {user % 3 + 1}\n" for user in range(1, 41)))
    workdir, changes = tmp_path / "run", {"data__path": data, "system": "pop" if finished else "cl4srec"}
    if finished:
        assert main(flags(cache, workdir, **changes)) == 0
    else:
        with pytest.raises(train.Stopped):
            run.train_and_evaluate(config_of(cache, **changes), workdir, stop_after(0))
    old = newest(workdir)[2]["dataset_hash"]
    data.write_text(data.read_text() + "41 1 2 3\n")
    capsys.readouterr()
    assert main(flags(cache, workdir, **changes)) == 2
    said = capsys.readouterr().err
    reports = [json.loads(path.read_text()) for path in cache.glob("*/report.json")]
    new = next(report["hash"] for report in reports if report["users"] == 41)
    assert old in said and new in said and old != new


# Not finite


def test_not_finite_names_the_step_and_the_last_good_checkpoint(cache, tmp_path, capsys):
    huge = {"train__learning_rate": "1e30", "train__save_every": 1}
    assert main(flags(cache, tmp_path, **huge)) == 1
    said = capsys.readouterr().err
    assert "the loss or a gradient of step 1 is not finite. The last good checkpoint is step 1 in " in said
    assert str(tmp_path / "checkpoints") in said


def test_not_finite_without_a_checkpoint_says_so(cache, tmp_path):
    with pytest.raises(RunFailed, match="There is no checkpoint yet"):
        run.train_and_evaluate(config_of(cache, train__learning_rate="1e30"), tmp_path, stop_after(99))


def test_missing_init_from_starts_nothing(cache, tmp_path):
    with pytest.raises(UserError, match="nothing was started from scratch"):
        run.train_and_evaluate(config_of(cache, init_from=tmp_path / "none"), tmp_path / "run", stop_after(99))
    assert not (tmp_path / "run" / "checkpoints").exists()
