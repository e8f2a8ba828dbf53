"""The launch scripts, without a cloud: what they would run."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script(name, *arguments):
    return subprocess.run([ROOT / "launch" / name, *arguments], capture_output=True, text=True, cwd="/", timeout=30)


def commands(name, *arguments):
    """The commands of a dry run, split as a shell would split them."""
    result = script(name, "--dry-run", *arguments)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


TPU = ("--name=run1", "--zone=us-west4-a", "--type=v5litepod-16")


def test_local_makes_the_environment_and_passes_every_flag_on(monkeypatch):
    monkeypatch.setenv("VENV", "some where/venv")
    flags = ["--config=configs/sasrec.py:beauty,paper", "--workdir=runs/a b"]
    install, train = commands("local.sh", *flags)
    assert install == ["make", "-s", "VENV=some where/venv", "some where/venv/.installed"]
    assert train == ["some where/venv/bin/python", "-m", "seqrec_jax.main", *flags]


def test_local_installs_the_accelerator_wheels():
    _, wheels, train = commands("local.sh", "--accelerator=cuda13")
    assert wheels[-3:] == ["-r", "requirements.txt", "jax[cuda13]"]
    assert train[-1] == "--config=configs/cl4srec.py"


def test_tpu_vm_creates_copies_installs_runs_on_all_workers_and_fetches():
    flags = ["--config=configs/sasrec.py:beauty,paper", "--config.name=it's"]
    lines = commands("tpu_vm.sh", *TPU, "--data=/a b/DATA", "--", *flags)
    *remote, mkdir, fetch = lines
    assert all(line[:5] == ["gcloud", "compute", "tpus", "tpu-vm", line[4]] for line in remote)
    assert all(line[-1] == "--zone=us-west4-a" for line in [*remote, fetch])
    assert [line[4] for line in remote] == ["create", "ssh", "scp", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert all("--worker=all" in line for line in remote[1:])

    create, _, code, data, *_, install, train = remote
    assert create[5:-1] == ["run1", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
    assert code[7:-1] == ["requirements.txt", "configs", "seqrec_jax", "run1:seqrec_jax/"]
    assert data[7:-1] == ["/a b/DATA", "run1:seqrec_jax/data_sets"]
    assert "jax[tpu]" in shlex.split(install[7].removeprefix("--command="))
    assert shlex.split(train[7].removeprefix("--command=")) == [
        "cd", "seqrec_jax", "&&", ".venv/bin/python", "-m", "seqrec_jax.main", *flags,
        "--workdir=run", "--config.mesh.distributed=true", "--config.data.dir=data_sets",
    ]  # fmt: skip
    assert mkdir == ["mkdir", "-p", "runs/run1"]
    assert fetch[5:-1] == ["--recurse", "--worker=0", "run1:seqrec_jax/run", "runs/run1/"]


def test_tpu_vm_runs_only_the_named_steps():
    train, _, fetch = commands("tpu_vm.sh", *TPU, "--steps=run,fetch", "--workdir=/mnt/nfs/run")
    assert "--workdir=/mnt/nfs/run" in train[7] and "--config=configs/cl4srec.py" in train[7]
    assert fetch[7] == "run1:/mnt/nfs/run"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(TPU[:2], "--type"), ((*TPU, "--nmae=x"), "--nmae=x"), ((*TPU, "--steps=runn"), "runn"), ((*TPU, "copy"), "copy")],
)
def test_tpu_vm_refuses_what_it_does_not_know(arguments, said):
    result = script("tpu_vm.sh", "--dry-run", *arguments)
    assert result.returncode == 2 and said in result.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shell_scripts_are_clean():
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
