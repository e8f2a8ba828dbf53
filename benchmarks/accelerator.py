"""python -m benchmarks.accelerator [--out=accelerator.json] [--smoke]: training on a GPU, beside torch.compile

SASRec's step (d 64, 2 layers, packed rows, dropout, Adam) on made-up data, from 256 to 16,384 users and from 12
thousand to 10 million items. PyTorch works on the same device in a child process: the same packed rows, on the device
already, real targets scored, compiled by torch.compile where the device is CUDA. Both multiply in TF32 there, or in
bfloat16. Nothing else may use the device. Prints a table: milliseconds, targets a second, and the shares of what the
device does in one large product (of the arithmetic that is useful) and in one large copy (of the bytes that parameters,
gradients and moments need, each read and written once).
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import data, flops, machine, ours
from configs import sasrec
from seqrec_jax.data.batches import make_layout, train_examples
from seqrec_jax.data.dataset import SequenceDataset

ROUNDS = 5
STEPS, STEPS_OF_MANY = 16, 4  # in one measurement; over a million items and more
BATCHES = 4  # of the peer, in turn
TOUCHES = 8  # of each parameter: itself, its gradient and its two moments, read and written
LARGE = 8192  # of the product that sets the limit


@dataclasses.dataclass(frozen=True)
class Case:
    """A step of training. `negatives` 0: softmax over all items, else over the target and so many shared ones."""

    users: int
    items: int
    negatives: int = 0
    dtype: str = "float32"

    @property
    def steps(self) -> int:
        return STEPS if self.items < 1_000_000 else STEPS_OF_MANY


CASES = (
    *(Case(users, 12_101) for users in (256, 1024, 4096, 16_384)),
    *(Case(users, 12_101, dtype="bfloat16") for users in (256, 16_384)),
    *(Case(256, items) for items in (100_000, 1_000_000, 10_000_000)),
    *(Case(4096, items, 8192) for items in (1_000_000, 10_000_000)),
)
SMOKE = (Case(32, 200), Case(32, 400, 16, "bfloat16"))


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, writes --out; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="accelerator.json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only to see that everything runs")
    arguments = parser.parse_args(argv)
    result = measure(SMOKE if arguments.smoke else CASES, 64 if arguments.smoke else LARGE)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    return 0


def measure(cases: Sequence[Case], large: int) -> dict:
    """accelerator.json: the device, its limits, and a row of figures a case."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=serve, args=(there,), daemon=True)
    child.start()
    there.close()
    datasets = {case: data.made_up(BATCHES * case.users, case.items) for case in cases}
    for case in cases:
        here.send((case, config_of(case).encoder.to_dict(), peer_batches(case, datasets[case])))
    here.send(None)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # XLA compiles several programs at once
        work = list(pool.map(lambda case: ours.training(config_of(case), datasets[case], case.steps), cases))
    compiled = here.recv()  # PyTorch is ready, too
    limits = {
        "float32_tflops": 2 * large**3 / product(large, jnp.float32) / 1e12,
        "bfloat16_tflops": 2 * large**3 / product(large, jnp.bfloat16) / 1e12,
        "copy_gbps": 2 * 4 * (4 * large) ** 2 / copy(4 * large) / 1e9,
    }
    rows = []
    for case, training in zip(cases, work, strict=True):
        training.seconds()
        seconds = median(training.seconds() for _ in range(ROUNDS))
        here.send(case)
        peer = here.recv()
        rows.append(row(case, datasets[case], seconds, peer, training.temp_bytes, limits))
        print(line(rows[-1]), file=sys.stderr)
    here.send(None)
    child.join(10)
    return {"machine": machine.describe(), "torch_compile": compiled, "limits": limits, "rows": rows}


def config_of(case: Case) -> ConfigDict:
    """configs/sasrec.py with the case's loss."""
    config = sasrec.get_config("own")
    config.train.batch_size, config.encoder.dtype = case.users, case.dtype
    if case.negatives:
        config.loss.update(next_item="sampled", negatives=case.negatives, negative_distribution="popularity")
    return config.lock()


def peer_batches(case: Case, dataset: SequenceDataset) -> list[dict[str, np.ndarray]]:
    """Packed rows with the flat `place` and `target` [M] of the real cells (filled up with targets of 0 to one M)."""
    width = config_of(case).encoder.max_length
    layout = make_layout(train_examples(dataset, "all", width), case.users, width)
    ready = data.ready_batches(dataset, layout, BATCHES)
    most = max((batch["targets"] > 0).sum() for batch in ready)
    for batch in ready:
        place_M = np.flatnonzero(batch["targets"])
        batch["place"] = np.pad(place_M, (0, most - len(place_M)))
        batch["target"] = np.pad(batch.pop("targets").reshape(-1)[place_M], (0, most - len(place_M)))
    return ready


def row(case: Case, dataset: SequenceDataset, seconds: float, peer: float | str, temp_bytes: int, limits: dict) -> dict:
    """Figures of one case. `peer`: seconds, or why there are none."""
    config = config_of(case)
    length_E = train_examples(dataset, "all", config.encoder.max_length).length_E
    steps = -(-len(length_E) // case.users)
    useful = flops.step_flops(length_E, steps, config.encoder, case.negatives or case.items)
    targets, parameters = float(length_E.sum() / steps), case.items * config.encoder.dim  # the rest is small
    found = {
        "ours_ms": 1e3 * seconds,
        "torch_ms": None if isinstance(peer, str) else 1e3 * peer,
        "torch_failed": peer if isinstance(peer, str) else "",
        "targets_per_s": targets / seconds,
        "arithmetic_share": useful / seconds / 1e12 / limits[f"{case.dtype}_tflops"],
        "bandwidth_share": TOUCHES * 4 * parameters / seconds / 1e9 / limits["copy_gbps"],
        "temp_mib": temp_bytes / 2**20,
    }
    return dataclasses.asdict(case) | found


def product(size: int, dtype) -> float:
    """Seconds of a product [size, size] x [size, size] with the default precision."""
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    return _median(jax.jit(jnp.matmul), left, right)


def copy(size: int) -> float:
    """Seconds in which size² float32 are read and written."""
    return _median(jax.jit(lambda x: x + 1), jax.random.normal(jax.random.key(0), (size, size)))


def _median(work: Callable, *arguments) -> float:
    jax.block_until_ready(work(*arguments))
    return median(machine.timed(lambda: work(*arguments), 4) for _ in range(ROUNDS))


def table(result: dict) -> str:
    """One line a case."""
    limits = result["limits"]
    about = f"{result['machine']['device']}, jax {result['machine']['jax']}; " + (
        f"products {limits['float32_tflops']:.3g} TFLOP/s in float32, {limits['bfloat16_tflops']:.3g} in bfloat16, "
        f"copy {limits['copy_gbps']:,.0f} GB/s; PyTorch {'compiled' if result['torch_compile'] else 'not compiled'}"
    )
    head = (
        "users",
        "items",
        "negatives",
        "dtype",
        "ours ms",
        "torch ms",
        "ratio",
        "targets/s",
        "arith",
        "bytes",
        "MiB",
    )
    return "\n".join([about, "  ".join(f"{word:>10}" for word in head), *map(line, result["rows"])])


def line(found: dict) -> str:
    """A row of the table."""
    theirs, ms = found["torch_ms"], found["ours_ms"]
    cells = (
        *(f"{found['users']:,}", f"{found['items']:,}", f"{found['negatives'] or 'all'}", found["dtype"], f"{ms:.2f}"),
        *((f"{theirs:.2f}", f"{theirs / ms:.2f}") if theirs else (found["torch_failed"], "")),
        *(f"{found['targets_per_s']:,.0f}", f"{found['arithmetic_share']:.1%}", f"{found['bandwidth_share']:.1%}"),
        f"{found['temp_mib']:,.0f}",
    )
    return "  ".join(f"{cell:>10}" for cell in cells)


# The peer -------------------------------------------------------------------------------------------------------------


def serve(pipe) -> None:
    """The child process: takes (case, config.encoder, batches) until None, makes all ready, says whether they are
    compiled; then answers each case with the seconds of one step, or with why there is none, until None.
    """
    import torch

    from benchmarks import peers

    cuda = torch.cuda.is_available()
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 100  # one function, a program a case
    device, ready = torch.device("cuda" if cuda else "cpu"), {}

    def training(case: Case, encoder: dict, batches: list) -> Callable[[], float]:
        model = peers.Sasrec(encoder, case.items).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        there = [{name: x.to(device) for name, x in peers.tensors(batch).items()} for batch in batches]
        loss = torch.compile(peers.softmax_at, dynamic=False) if cuda else peers.softmax_at
        number = 0

        def step():
            nonlocal number
            number += 1
            with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
                value = loss(model, there[number % len(there)], case.negatives)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

        def seconds() -> float:
            began = time.perf_counter()
            for _ in range(case.steps):
                step()
            if cuda:
                torch.cuda.synchronize()
            return (time.perf_counter() - began) / case.steps

        step()
        return seconds

    def attempt(work: Callable):
        try:
            return work()
        except torch.OutOfMemoryError:
            return "no memory"
        finally:
            if cuda:
                torch.cuda.empty_cache()

    while (asked := pipe.recv()) is not None:
        ready[asked[0]] = attempt(lambda: training(*asked))  # noqa: B023 (called at once)
    pipe.send(cuda)
    while (case := pipe.recv()) is not None:
        work = ready[case]
        rounds = attempt(lambda: [work() for _ in range(ROUNDS + 1)][1:]) if callable(work) else work  # noqa: B023
        pipe.send(rounds if isinstance(rounds, str) else median(rounds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
