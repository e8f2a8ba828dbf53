"""One device and eight: the same losses, and checkpoints that move between them. Each in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "data.synthetic_users": 100, "data.synthetic_items": 300, "encoder.max_length": 16, "encoder.dim": 8,
    "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 24, "train.log_every": 1, "report.baselines": "",
    "train.schedule": "constant",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prepared data and compiled programs, one folder for the whole session."""
    return tmp_path_factory.getbasetemp() / "cache"


def losses(cache, workdir, devices, system, mesh=(), *, steps=5, **changes):
    """Trains to `steps` in a new process with forced CPU devices and returns the loss of every step so far."""
    process = start(cache, workdir, devices, system, mesh, steps=steps, **changes)
    assert process.returncode == 0, process.stdout + process.stderr
    assert json.loads((workdir / "results.json").read_text())["device"] == f"{devices} x cpu"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def start(cache, workdir, devices, system, mesh=(), *, steps=5, **changes):
    values = TINY | {"data.cache_dir": cache, "train.max_steps": steps}
    values |= {f"mesh.{name}": size for name, size in mesh}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    if system == "clue_pretrain":
        # What stands before a batch normalisation has gradients of rounding alone, and Adam takes whole steps of them.
        values |= {"train.optimizer": "sgd", "train.learning_rate": 0.01}
    command = [sys.executable, "-m", "seqrec_jax.main", f"--config={ROOT / 'configs' / system}.py",
               f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in values.items())]  # fmt: skip
    # A thread for each device: collectives would wait for one another on few cores.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "PJRT_NPROC": "16"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def single(cache, tmp_path_factory):
    """workdir_of(system): a run of 5 steps on one device and the losses of 7, each made once."""
    made = {}

    def workdir_of(system):
        if system not in made:
            folder = tmp_path_factory.mktemp("single")
            losses(cache, folder / "five", 1, system)
            shutil.copytree(folder / "five", folder / "seven")
            made[system] = folder / "five", losses(cache, folder / "seven", 1, system, steps=7)
        return made[system]

    return workdir_of


@pytest.mark.parametrize(
    ("system", "mesh"),
    [
        pytest.param("sasrec", (("data", 8),), marks=pytest.mark.slow),
        pytest.param("cl4srec", (("data", 8),), marks=pytest.mark.slow),
        pytest.param("sasrec", (("data", 4), ("model", 2)), marks=pytest.mark.slow),
        # Neither axis divides its users; the quick suite sees the first losses of this mesh after a checkpoint of one.
        pytest.param("cl4srec", (("data", 4), ("model", 2)), marks=pytest.mark.slow),
        pytest.param("duorec", (("data", 4), ("model", 2)), marks=pytest.mark.slow),
        pytest.param("s3rec_pretrain", (("data", 4), ("model", 2)), marks=pytest.mark.slow),
        pytest.param("clue_pretrain", (("data", 4), ("model", 2)), marks=pytest.mark.slow),
    ],
    ids=["sasrec 8", "cl4srec 8", "sasrec 4x2", "cl4srec 4x2", "duorec 4x2", "s3rec_pretrain 4x2", "clue_pretrain 4x2"],
)
def test_eight_devices_give_the_losses_of_one(cache, single, tmp_path, system, mesh):
    _, expected = single(system)
    near_0 = 1e-6 if system == "clue_pretrain" else 0  # a mean of cosines, whose rounding is that of 1
    assert losses(cache, tmp_path, 8, system, mesh) == pytest.approx(expected[:5], rel=1e-5, abs=near_0)


KERNEL = """
import functools, jax, jax.numpy as jnp, numpy as np
from seqrec_jax.losses import fused, softmax
from seqrec_jax.sharding import make_mesh
fused.pl.pallas_call = functools.partial(fused.pl.pallas_call, interpret=True)
generator = np.random.default_rng(0)
hidden, columns, positive = (generator.normal(size=(rows, 5)).astype("f") for rows in (40, 24, 40))
targets, ids = generator.integers(0, 9, 40), generator.integers(1, 9, 24)
bias, others = generator.normal(size=24).astype("f"), generator.normal(size=40).astype("f")
for options in ({}, {"column_ids_C": jnp.asarray(ids)}):
    found = []
    for on_gpu, *shape in ((1, 1, 1), (1, 2, 2), (1, 4, 1), (1, 1, 4), (0, 1, 1), (0, 4, 1), (0, 2, 2)):
        softmax.has_kernel = lambda dim, on_gpu=on_gpu: bool(on_gpu)
        mesh = make_mesh(*shape)
        loss = lambda h, p, c, o: softmax.softmax_loss(h, p, c, bias, targets, mesh, others_N=o, **options)
        found.append(jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(hidden, positive, columns, others))
    for one in found[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), one, found[0])
    print("same")
"""


def test_the_kernels_give_on_a_mesh_what_they_give_on_one_device():
    """That for a GPU, that for a CPU, and the chunks, which take over where its columns are split."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PJRT_NPROC": "16"}
    process = subprocess.run([sys.executable, "-c", KERNEL], cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.stdout == "same\nsame\n", process.stderr


def test_checkpoint_moves_from_one_device_to_eight_and_back(cache, single, tmp_path):
    five, expected = single("cl4srec")
    shutil.copytree(five, tmp_path / "run")
    mesh = (("data", 4), ("model", 2))
    assert losses(cache, tmp_path / "run", 8, "cl4srec", mesh, steps=6) == pytest.approx(expected[:6], rel=1e-5)
    assert losses(cache, tmp_path / "run", 1, "cl4srec", steps=7) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_transfer_from_one_device_to_eight_and_back(cache, single, tmp_path):
    (parent, _), mesh = single("sasrec"), (("data", 4), ("model", 2))
    runs = [("one", 1, (), parent), ("eight", 8, mesh, parent), ("one again", 1, (), tmp_path / "one"),
            ("from eight", 1, (), tmp_path / "eight")]  # fmt: skip
    one, eight, again, from_eight = (
        losses(cache, tmp_path / name, devices, "sasrec", shape, init_from=f"{start}@last")
        for name, devices, shape, start in runs
    )
    assert eight == pytest.approx(one, rel=1e-5) and from_eight == pytest.approx(again, rel=1e-5)
    assert one[0] < single("sasrec")[1][0]  # it goes on where the parent was


def test_batch_that_eight_devices_do_not_divide_is_refused(cache, tmp_path):
    process = start(cache, tmp_path, 8, "sasrec", train__batch_size=20)
    assert process.returncode == 2 and "train.batch_size=20 is not divisible by the 8 devices" in process.stderr
