"""make bench, or python -m benchmarks.run [--data=FILE] [--out=bench.json] [--smoke]

Training, evaluation and start-up of SASRec (d 64, 2 layers, float32) on data of Beauty's size, DuoRec's step and
S3-Rec's pretraining (637 made-up attributes), beside plain PyTorch; CLUE's two views beside one causal pass.
In every round each figure is measured once, one after the other, so that a slow minute meets all of them. PyTorch
works in a child process with as many threads as there are usable cores and its own defaults otherwise; after each
measurement all wait until the threads of the last one sleep. Medians and minima over the rounds. Ratios are refused if
others use the machine, or if a figure's median is far above its minimum: such a ratio would flatter ours.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import data, flops, machine, ours, report
from configs import cl4srec, clue_pretrain, duorec, s3rec_pretrain, sasrec
from seqrec_jax.data.batches import make_layout, train_examples
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.prepare import prepare
from seqrec_jax.errors import RunFailed, UserError
from seqrec_jax.workdir import read_lines

ROOT = Path(__file__).resolve().parents[1]
PAUSE = 0.5  # seconds after each measurement
FIRST_STEPS = 8  # start-up ends with these


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the data and of the run."""

    users: int = 22_363
    items: int = 12_101
    batch: int = 256
    rounds: int = 7
    steps: int = 32  # of ours in one measurement: what a run dispatches at once (train.log_every)
    peer_steps: int = 4
    prefixes: int = 100  # of a published pretraining step
    starts: int = 3  # cold, each with a warm one after it


SMOKE = Sizes(users=300, items=200, batch=64, rounds=2, steps=2, peer_steps=2, prefixes=20, starts=1)


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, writes --out; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Speed beside plain PyTorch.")
    parser.add_argument("--data", default="", help='a file "user item item ..."; without it data of Beauty\'s size')
    parser.add_argument("--out", default="bench.json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only to see that everything runs")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(SMOKE if arguments.smoke else Sizes(), arguments.data, Path(folder))
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(report.table(result))
    return 0


def measure(sizes: Sizes, path: str, folder: Path) -> dict:
    """Everything of bench.json. Raises UserError without PyTorch or on an accelerator, where it has no peer here."""
    try:
        import torch
    except ImportError as error:
        raise UserError("PyTorch is not installed: pip install -r benchmarks/requirements.txt") from error
    if jax.default_backend() != "cpu":
        raise UserError("the peers run on the CPU, so ours must too: set JAX_PLATFORMS=cpu")
    sources = {"sasrec": sasrec, "cl4srec": cl4srec, "duorec": duorec, "s3rec": s3rec_pretrain, "clue": clue_pretrain}
    configs = {name: config_of(source, sizes, path or folder / "made_up.txt") for name, source in sources.items()}
    plain = configs["sasrec"]
    if not path:
        data.write_lines(data.made_up(sizes.users, sizes.items), Path(plain.data.path))
    dataset = data.with_attributes(prepare(plain.data, folder / "prepared"))
    facts = {"torch": torch.__version__, "data": f"{path or 'made up'}: {len(dataset.user_ids):,} users, "
             f"{len(dataset.item_ids):,} items, {len(dataset.items_A):,} actions"}  # fmt: skip
    about = machine.describe() | facts
    others = [machine.others_share()]
    seconds = startups(plain.data.path, folder, sizes.starts)
    batches = peer_batches(plain, configs["s3rec"], dataset, sizes.prefixes)
    with peer(plain, dataset, batches, sizes.peer_steps) as ask:
        work, temp_bytes = units(configs, dataset, batches, sizes.steps, ask)
        for measurement in work.values():  # compilation and first touches are not counted
            measurement()
        for number in range(sizes.rounds):
            others.append(machine.others_share())
            for name, measurement in work.items():
                seconds.setdefault(name, []).append(measurement())
                time.sleep(PAUSE)
            print(f"round {number + 1} of {sizes.rounds}, others used {others[-1]:.0%}", file=sys.stderr)
        others.append(machine.others_share())

    examples, items = train_examples(dataset, "all", plain.encoder.max_length), len(dataset.item_ids)
    steps = -(-len(examples.user_E) // sizes.batch)
    counts = per_unit(configs["s3rec"], dataset, sizes)
    for name, (source, count) in counts.items():
        seconds[name] = [value / count for value in seconds[source]]
    facts = {
        "targets": counts["prefix.ours_target_us"][1],
        "users": int((np.diff(dataset.offsets_U1) >= 3).sum()),
        "step_flops": flops.step_flops(examples.length_E, steps, plain.encoder, items),
        "loss_flops": flops.loss_flops(int((batches["packed"][0]["targets"] > 0).sum()), plain.encoder.dim, items),
        "step_temp_mib": temp_bytes / 2**20,
    }
    return report.summary(seconds, facts, others, about)


def config_of(source, sizes: Sizes, path: Path | str) -> ConfigDict:
    """The recipe for real data of a file of configs/."""
    config = source.get_config("own")
    config.data.path, config.train.batch_size, config.report.baselines = str(Path(path).absolute()), sizes.batch, ()
    config.s3rec.cut = False  # `per_unit` counts the masked items of whole histories
    return config.lock()


def peer_batches(
    config: ConfigDict, pretraining: ConfigDict, dataset: SequenceDataset, prefixes: int, count: int = 8
) -> dict[str, list]:
    """The batches of each way to train, and those of evaluation."""
    width, size = config.encoder.max_length, config.train.batch_size

    def layout(targets, size=size, whole=False, **how):
        return make_layout(train_examples(dataset, targets, width, whole=whole), size, width, **how)

    layouts = {
        "padded": layout("all", packed=False),
        "packed": layout("all"),
        "prefix": layout("prefix", packed=False, last_target_only=True),
    }
    ready = {name: data.ready_batches(dataset, rows, count) for name, rows in layouts.items()}
    return ready | {
        "same_target": data.same_target_batches(dataset, layouts["prefix"], count),
        "cloze": data.cloze_batches(dataset, layout("prefix", prefixes, whole=True, packed=False), count, pretraining),
        "evaluate": data.evaluation_batches(dataset, config.eval.batch_size, width),
    }


def per_unit(pretraining: ConfigDict, dataset: SequenceDataset, sizes: Sizes) -> dict[str, tuple[str, float]]:
    """{figure: (the step it is of, how many units that step has)}: what unlike steps have in common.

    Of next-item training: a target (of DuoRec's, 256 a step are contrasted: all of theirs, a share of ours). Of
    pretraining: a sequence with its masks and segment (theirs is a prefix, ours a whole history), a masked item, and an
    epoch, which reads a history once a prefix there and once here.
    """
    width, probability, found = pretraining.encoder.max_length, pretraining.s3rec.mask, {}
    length_E = train_examples(dataset, "all", width).length_E
    targets = length_E.sum() / -(-len(length_E) // sizes.batch)
    for section, step in (("prefix", "train_step"), ("duorec", "duorec")):
        found[f"{section}.ours_target_us"] = (f"{step}.ours_ms", targets)
        found[f"{section}.torch_target_us"] = (f"{section}.torch_ms", sizes.batch)
    for side, kind, size in (("ours", "all", sizes.batch), ("torch", "prefix", sizes.prefixes)):
        length_E = train_examples(dataset, kind, width, whole=True).length_E
        steps = -(-len(length_E) // size)
        masked = (1 + probability * (length_E - 1)).sum()  # the last item always, the others by chance
        counts = {"sequence_us": len(length_E) / steps, "masked_item_us": masked / steps, "epoch_s": 1 / steps}
        found |= {f"s3rec.{side}_{unit}": (f"s3rec.{side}_ms", count) for unit, count in counts.items()}
    return found


def units(configs, dataset, batches, steps, ask) -> tuple[dict[str, Callable[[], float]], int]:
    """({figure: a function that measures it once}, bytes of temporaries of the plain step), in the table's order."""
    plain, contrastive = configs["sasrec"], configs["cl4srec"]
    train = ours.training(plain, dataset, steps)
    targets = batches["packed"][0]["targets"]
    two_views, causal_pass = ours.user_views(configs["clue"], dataset)
    work = {
        "gemm.ours_ms": machine.gemm(),
        "train_step.ours_ms": train.seconds,
        "train_step.torch_packed_ms": lambda: ask("packed"),
        "train_step.torch_real_ms": lambda: ask("real"),
        "train_step.torch_all_ms": lambda: ask("all"),
        "prefix.torch_ms": lambda: ask("prefix"),
        "loss.ours_ms": ours.loss(targets[targets > 0], plain.encoder.dim, len(dataset.item_ids)),
        "loss.torch_ms": lambda: ask("loss"),
        "contrastive_step.ours_ms": ours.training(contrastive, dataset, steps).seconds,
        "augmentation.two_views_ms": ours.two_views(contrastive, dataset),
        "duorec.ours_ms": ours.training(configs["duorec"], dataset, steps).seconds,
        "duorec.torch_ms": lambda: ask("duorec"),
        "s3rec.ours_ms": ours.training(configs["s3rec"], dataset, steps).seconds,
        "s3rec.torch_ms": lambda: ask("s3rec"),
        "clue.causal_pass_ms": causal_pass,
        "clue.two_views_ms": two_views,
        "evaluate.ours_ms": ours.evaluation(plain, dataset),
        "evaluate.torch_ms": lambda: ask("evaluate"),
    }
    return work, train.temp_bytes


@contextlib.contextmanager
def peer(config, dataset, batches, steps) -> Iterator[Callable[[str], float]]:
    """ask(name) → seconds, answered by a child process that sleeps between questions."""
    from benchmarks import peers

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    settings = (config.encoder.to_dict(), data.multi_hot(dataset), batches, steps, machine.usable_cores())
    child = context.Process(target=peers.serve, args=(there, *settings), daemon=True)
    child.start()
    there.close()  # so that a child that fails ends the wait for its answer

    def ask(name: str) -> float:
        here.send(name)
        try:
            return here.recv()
        except EOFError:
            raise RunFailed("the PyTorch process ended; its error is above") from None

    try:
        yield ask
        here.send(None)
    finally:
        here.close()
        child.join(10)


# Start-up -------------------------------------------------------------------------------------------------------------


def startups(path: str, folder: Path, count: int) -> dict[str, list[float]]:
    """Process start to the end of the first steps: cold, with neither prepared data nor compiled programs, and warm."""
    seconds = {"startup.cold_s": [], "startup.warm_s": []}
    for number in range(count):
        for kind in ("cold", "warm"):
            workdir = folder / f"{kind}_{number}"
            seconds[f"startup.{kind}_s"].append(startup(path, workdir, folder / f"cache_{number}"))
    return seconds


def startup(path: str, workdir: Path, cache: Path) -> float:
    """Seconds until a run has logged FIRST_STEPS; it is stopped then."""
    command = [
        *(sys.executable, "-m", "seqrec_jax.main", "--config=configs/sasrec.py", f"--workdir={workdir}"),
        *(f"--config.data.path={path}", f"--config.data.cache_dir={cache}"),
        *("--config.report.baselines=", f"--config.train.log_every={FIRST_STEPS}"),
    ]
    with (workdir.with_suffix(".log")).open("w+") as log:
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process:
            while not any(line["step"] >= FIRST_STEPS for line in read_lines(workdir / "metrics.jsonl")):
                if process.poll() is not None:
                    log.seek(0)
                    raise RunFailed(f"{' '.join(command)} ended too soon:\n{log.read()}")
                time.sleep(0.005)
            seconds = time.perf_counter() - began
            process.send_signal(signal.SIGTERM)
    return seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
