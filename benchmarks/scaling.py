"""python -m benchmarks.scaling [--folder=.] [--smoke]: time and memory against the size of the catalogue

A train step of SASRec with full softmax (d 64, 256 users, random data), and the crossing point of the two forms of the
exact softmax: exponentials of all columns are kept, or they are made again, tile by tile. Prints a table, writes
scaling.json and scaling.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np

from benchmarks import data, machine, ours
from benchmarks.report import BUSY_SHARE
from configs import sasrec
from seqrec_jax.errors import UserError
from seqrec_jax.losses import softmax

ITEMS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
COLUMNS = (10_000, 30_000, 65_000, 100_000, 200_000)
ROWS = 1_600  # real targets of a step
FORMS = {"whole": sys.maxsize, "tiled": 0}  # from how many columns on the softmax keeps none of them
ROUNDS = 3


def main(argv: Sequence[str]) -> int:
    """Measures, prints, writes; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default=".", type=Path, help="where scaling.json and scaling.png go")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only to see that everything runs")
    arguments = parser.parse_args(argv)
    small = arguments.smoke
    try:
        result = measure(*(((200, 400), (2_500, 5_000), 64) if small else (ITEMS, COLUMNS, ROWS)), 32 if small else 256)
        arguments.folder.mkdir(parents=True, exist_ok=True)
        (arguments.folder / "scaling.json").write_text(json.dumps(result, indent=2) + "\n")
        plot(result, arguments.folder / "scaling.png")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    return 0


def measure(items: Sequence[int], columns: Sequence[int], rows: int, users: int) -> dict:
    """scaling.json: `train_step` and `softmax`, one object a size, and how much others used the machine."""
    others = [machine.others_share()]
    train_step, softmaxes = [], []
    for count in items:
        train_step.append({"items": count} | train_step_at(count, users))
        others.append(machine.others_share())
    for count in columns:
        softmaxes.append({"columns": count} | softmax_at(count, rows))
        others.append(machine.others_share())
    about = machine.describe() | {"others_share": others}
    return {"busy": max(others) > BUSY_SHARE, "machine": about, "train_step": train_step, "softmax": softmaxes}


def train_step_at(items: int, users: int) -> dict[str, float]:
    """Milliseconds and MiB of temporaries of a step of `users` histories over `items` items."""
    config = sasrec.get_config("own")
    config.train.batch_size = users
    step = ours.training(config.lock(), data.made_up(4 * users, items), 2)
    step.seconds()
    return {"ms": 1e3 * median(step.seconds() for _ in range(ROUNDS)), "temp_mib": step.temp_bytes / 2**20}


def softmax_at(columns: int, rows: int) -> dict[str, float]:
    """Milliseconds of loss and gradients in both forms, in turn."""
    targets_N = np.random.default_rng(0).integers(1, columns + 1, rows)
    work = {}
    for form, many in FORMS.items():
        with mock.patch.object(softmax, "MANY_COLUMNS", many):  # read while the first call compiles
            work[form] = ours.loss(targets_N, 64, columns, repeats=1)
            work[form]()
    seconds = {form: [] for form in work}
    for _ in range(ROUNDS):
        for form, measurement in work.items():
            seconds[form].append(measurement())
    return {f"{form}_ms": 1e3 * median(values) for form, values in seconds.items()}


def table(result: dict) -> str:
    """The sizes, one a line; on a quiet machine also from where on tiles are faster."""
    lines = [f"{'items':>12}{'step ms':>12}{'temp MiB':>12}"]
    lines += [f"{row['items']:>12,}{row['ms']:>12.1f}{row['temp_mib']:>12.1f}" for row in result["train_step"]]
    lines += ["", f"{'columns':>12}{'whole ms':>12}{'tiled ms':>12}"]
    lines += [f"{row['columns']:>12,}{row['whole_ms']:>12.1f}{row['tiled_ms']:>12.1f}" for row in result["softmax"]]
    tiled = [row["columns"] for row in result["softmax"] if row["tiled_ms"] < row["whole_ms"]]
    if result["busy"]:
        return "\n".join(
            [*lines, f"machine busy: others used {max(result['machine']['others_share']):.0%}; no verdict"]
        )
    found = f"tiles are faster at {', '.join(f'{count:,}' for count in tiled)}" if tiled else "tiles are never faster"
    return "\n".join([*lines, f"{found}; the loss takes them above {softmax.MANY_COLUMNS:,}"])


def plot(result: dict, path: Path) -> None:
    """Step time and memory against items, and the two forms against columns, all on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    curves = (("train_step", "items", ("ms",)), ("train_step", "items", ("temp_mib",)))
    for axes, (part, size, names) in zip(
        panels, (*curves, ("softmax", "columns", ("whole_ms", "tiled_ms"))), strict=True
    ):
        for name in names:
            axes.plot([row[size] for row in result[part]], [row[name] for row in result[part]], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel=size, title=part.replace("_", " "))
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
