"""Two processes, started as mpirun starts them, train one model: as one process with two devices does."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from seqrec_jax import checkpoint
from seqrec_jax.main import STOPPED
from seqrec_jax.sharding import make_mesh
from seqrec_jax.workdir import locked, read_lines

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
# Five steps an epoch. The data set is prepared before, so that it takes the two processes no time.
TINY = {
    "data.synthetic_users": 100, "data.synthetic_items": 300, "encoder.max_length": 16, "encoder.dim": 8,
    "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 24, "train.max_epochs": 8, "train.log_every": 2,
    "train.save_every": 3, "train.schedule": "constant",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_process(cache, tmp_path_factory):
    """The workdir of a run of one process with two devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    subprocess.run(command(cache, workdir), cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, check=True, timeout=300)
    return workdir


@pytest.fixture(scope="module")
def two_processes(cache, one_process, tmp_path_factory):
    """The workdir of a run of two processes that nothing stops."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    assert ended(start(cache, workdir)) == [0, 0]
    return workdir


def command(cache, workdir, **changes):
    values = TINY | {"data.cache_dir": cache} | {key.replace("__", "."): value for key, value in changes.items()}
    settings = [f"--config.{key}={value}" for key, value in values.items()]
    return [sys.executable, "-m", "seqrec_jax.main", "--config=configs/sasrec.py", f"--workdir={workdir}", *settings]


def start(cache, workdir, other=None, **changes):
    """Both processes; what they print goes to 0.log and 1.log beside the workdir."""
    job = {"OMPI_MCA_orte_hnp_uri": f"{random.randrange(4096) * 4096}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}
    started = []
    for rank, folder in (("0", workdir), ("1", other or workdir)):
        whole = command(cache, folder, mesh__distributed="true", **changes)
        env = os.environ | job | {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        with (workdir.parent / f"{rank}.log").open("w") as log:
            started.append(subprocess.Popen(whole, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    return started


def ended(processes):
    """Their exit codes."""
    try:
        return [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()


def last_params(workdir):
    store = checkpoint.open_store(workdir, create=False)
    return checkpoint.restore_params(store, checkpoint.latest_step(store), make_mesh(1, 1))


def assert_same(one, other):
    """The last parameters, bit for bit, and a log with every step once."""
    import jax

    jax.tree.map(np.testing.assert_array_equal, last_params(one), last_params(other))
    steps = [[line["step"] for line in read_lines(workdir / "metrics.jsonl")] for workdir in (one, other)]
    assert steps[0] == steps[1]


def test_two_processes_give_the_results_of_two_devices(one_process, two_processes):
    one, two = (json.loads((workdir / "results.json").read_text()) for workdir in (one_process, two_processes))
    assert two["steps"] == one["steps"] == 40
    for found, expected in ((two, one), (two["baselines"]["pop"], one["baselines"]["pop"])):
        assert found["test"] == pytest.approx(expected["test"], abs=1e-6)
    assert {path.name for path in two_processes.iterdir()} == {path.name for path in one_process.iterdir()}


@pytest.mark.parametrize("stopped", [(0,), (1,)])
def test_both_stop_at_one_step_when_either_is_asked_to_and_go_on_as_if_never_stopped(
    cache, two_processes, tmp_path, stopped
):
    workdir = tmp_path / "run"
    processes = start(cache, workdir)
    deadline = time.monotonic() + 200
    while not read_lines(workdir / "metrics.jsonl"):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for rank in stopped:
        processes[rank].send_signal(signal.SIGTERM)
    assert ended(processes) == [STOPPED, STOPPED]
    assert 0 < checkpoint.latest_step(checkpoint.open_store(workdir, create=False)) < 40
    assert ended(start(cache, workdir)) == [0, 0]
    assert_same(two_processes, workdir)


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_ends_and_the_same_commands_go_on(cache, two_processes, tmp_path, killed):
    workdir = tmp_path / "run"
    processes = start(cache, workdir)
    deadline = time.monotonic() + 200
    while not any(line["step"] >= 4 for line in read_lines(workdir / "metrics.jsonl")):  # a checkpoint is written
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[killed].kill()
    codes = ended(processes)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] not in (0, STOPPED)
    assert ended(start(cache, workdir)) == [0, 0]
    assert "resuming at step" in (tmp_path / "0.log").read_text()
    assert_same(two_processes, workdir)


def test_a_damaged_checkpoint_is_set_aside_once(cache, two_processes, tmp_path):
    workdir = tmp_path / "run"
    assert ended(start(cache, workdir, train__max_epochs=2)) == [0, 0]
    damaged = workdir / "checkpoints" / "10"
    biggest = max((path for path in damaged.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:-1])
    assert ended(start(cache, workdir)) == [0, 0]
    assert [path.name for path in (workdir / "checkpoints").glob("damaged-*")] == ["damaged-10"]
    assert_same(two_processes, workdir)


def test_several_processes_that_nothing_started_are_explained(cache, tmp_path):
    alone = command(cache, tmp_path / "run", mesh__distributed="true")
    found = subprocess.run(alone, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert found.returncode == 2 and "config.mesh.distributed=true finds no other processes" in found.stderr
    assert "Traceback" not in found.stderr and not (tmp_path / "run").exists()


def test_a_mesh_that_leaves_a_process_without_a_device_is_refused(cache, tmp_path):
    assert ended(start(cache, tmp_path / "run", mesh__data=1)) == [2, 2]
    assert "several processes train on all their 2 devices" in (tmp_path / "1.log").read_text()


def test_workdirs_that_are_not_one_folder_are_refused(cache, tmp_path):
    assert ended(start(cache, tmp_path / "run", tmp_path / "elsewhere")) == [2, 2]
    for log in ("0.log", "1.log"):
        assert "is not one folder for all processes" in (tmp_path / log).read_text()
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_workdir_in_use_is_refused_by_both(cache, tmp_path):
    with locked(tmp_path / "run"):
        assert ended(start(cache, tmp_path / "run")) == [2, 2]
    assert "is in use by another run" in (tmp_path / "0.log").read_text()
    assert "the first process cannot use it" in (tmp_path / "1.log").read_text()
