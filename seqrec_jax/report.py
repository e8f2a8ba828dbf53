"""Tables and plots of a finished run."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from seqrec_jax.validate import PRETRAINING
from seqrec_jax.workdir import read_lines

COLUMNS = ("hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr@10", "mrr")
FIGURES = {  # of results["analysis"]: what they are called
    "alignment": "alignment",
    "target_alignment": "same-target alignment",
    "uniformity": "uniformity",
    "mean_cosine": "user cosine",
    "user_rank": "user rank",
    "item_cosine": "item cosine",
    "effective_rank": "item rank",
}


def table(results: dict) -> str:
    """The test (and validation) metrics with the baselines beside them, under the protocol line."""
    data, name = results["dataset"], name_of(results)
    rows = [(f"{name} (test)", results["test"])]
    if "std" in results:
        rows.append((f"  deviation of {len(results['folds'])} folds", results["std"]))
    rows.append((f"{name} (valid)", results["valid"]))
    rows += [(f"{name} (test)", baseline["test"]) for name, baseline in results["baselines"].items()]
    rows = [(name, metrics) for name, metrics in rows if metrics]  # pretraining has none
    columns = columns_of(results["test"])
    width = max((len(name) for name, _ in rows), default=0)
    cell = max((len(column) for column in columns if column not in COLUMNS), default=7) + 2
    lines = [
        "",
        results["protocol_line"],
        f"data {data['name']} {data['hash']}: {data['users']:,} users, {data['items']:,} items, "
        f"{data['actions']:,} actions; loss {results['loss']}, targets {results['targets']}, seed {results['seed']}, "
        f"{results['device']}",
        "",
        " " * width + "".join(f"{column:>{cell}}" for column in columns),
    ]
    for name, metrics in rows:
        lines.append(f"{name:<{width}}" + "".join(f"{metrics[column]:{cell}.4f}" for column in columns))
    if "steps" in results:
        lines.append(f"\n{results['steps']:,} steps, {results['train_seconds']:.1f} s of training")
    if results.get("analysis"):
        found = results["analysis"]
        lines.append(", ".join(f"{title} {found[name]:.3f}" for name, title in FIGURES.items() if name in found))
    if results.get("collapsed"):
        lines.append(f"COLLAPSED at step {results['collapsed']['step']}: the model says the same of everybody")
    return "\n".join(lines)


def name_of(results: dict) -> str:
    """What a run is called: by its task, if it has one, else by its system, and what that was pretrained by."""
    parent = (results.get("parent") or {}).get("system")
    after = f" after {parent}" if parent in PRETRAINING and parent != results["system"] else ""
    return results.get("task") or results["system"] + after


def columns_of(metrics: dict) -> list[str]:
    """The metrics that tables and bars show: COLUMNS of a ranking, else all."""
    return [name for name in COLUMNS if name in metrics] or list(metrics)


def plots(workdir: Path, results: dict) -> None:
    """In plots/: loss, validation, spectrum and alignment curves of each run that was trained, the items of the run
    itself in two dimensions, and test, the bars. Those without anything to show are left out.
    """
    folder, data = workdir / "plots", results["dataset"]["name"]
    folder.mkdir(exist_ok=True)
    own = name_of(results)
    runs = {own: workdir} | {name: workdir / "baselines" / name for name in results["baselines"]}
    if "folds" in results:
        runs = {f"fold {number}": workdir / "folds" / str(number) for number in range(len(results["folds"]))}
    lines = {name: read_lines(run / "metrics.jsonl") for name, run in runs.items()}
    found = {name: read_arrays(run) for name, run in runs.items() if (run / "analysis.npz").is_file()}
    with picture(folder / "loss.png") as (axes,):
        whole = results["system"] in PRETRAINING or "classes" in results
        value, title = ("loss", f"{results['loss']} loss") if whole else ("next_item", "next-item loss")
        draw_curves(axes, lines, "train", value, f"{title}, {data}")
    watched = results["metric"] or "uniformity"
    with picture(folder / "validation.png") as (axes,):
        draw_curves(axes, lines, "valid", watched, f"validation {watched}, {data}")
    if found:
        with picture(folder / "spectrum.png") as (axes,):
            draw_spectra(axes, found, f"singular values of the items, {data}")
    if own in found:
        with picture(folder / "projection.png") as (axes,):
            draw_items(axes, found[own], f"items of {own}, {data}")
        if "users_Nx2" in found[own]:
            with picture(folder / "users.png") as (axes,):
                draw_users(axes, found[own]["users_Nx2"], f"users of {own}, {data}")
    if has_analysis(lines):
        with picture(folder / "alignment.png", panels=2) as panels:
            draw_analysis(panels, lines)
    if "confusion" in results:
        with picture(folder / "confusion.png") as (axes,):
            draw_confusion(axes, np.array(results["confusion"]), results["classes"], f"{results['task']}, {data}")
    columns = columns_of(results["test"])
    if not columns:
        return
    scores = {own: results["test"]} | {n: b["test"] for n, b in results["baselines"].items()}
    with picture(folder / "test.png") as (axes,):
        for index, (name, metrics) in enumerate(scores.items()):
            places = [place + index * 0.8 / len(scores) for place in range(len(columns))]
            axes.bar(places, [metrics[column] for column in columns], 0.8 / len(scores), align="edge", label=name)
        axes.set_xticks([place + 0.4 for place in range(len(columns))], columns, fontsize="small")
        axes.set(title=f"test, {data}, protocol {results['protocol']}")


def read_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """The arrays of `workdir`/analysis.npz."""
    with (workdir / "analysis.npz").open("rb") as file:
        return dict(np.load(file))


@contextlib.contextmanager
def picture(target: Path | BinaryIO, panels: int = 1) -> Iterator[tuple]:
    """Gives `panels` axes side by side to draw on, then writes them to `target` as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(1 + 5 * panels, 4), layout="constrained", squeeze=False)
    yield tuple(axes[0])
    for panel in axes[0]:
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    figure.savefig(target, dpi=120, format="png")
    plt.close(figure)


# What is drawn, of {name of a run: its lines or arrays} ---------------------------------------------------------------


def draw_curves(axes: Any, lines: dict[str, list[dict]], kind: str, value: str, title: str) -> None:
    """`value` of the lines of `kind` (train or valid) by epoch; of pretraining there is no next-item loss to draw."""
    for name, points in lines.items():
        steps = next((line["step"] / line["epoch"] for line in points if "epoch" in line), 1)
        points = [(line["step"] / steps, line[value]) for line in points if line["kind"] == kind and value in line]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", markersize=3, linewidth=1, label=name)
    axes.set(xlabel="epoch", ylabel=title.partition(",")[0], title=title)


def draw_spectra(axes: Any, found: dict[str, dict], title: str) -> None:
    """Normalised singular values of the item tables, as in DuoRec's Figure 1c."""
    for name, arrays in found.items():
        axes.plot(np.arange(1, len(arrays["spectrum_D"]) + 1), arrays["spectrum_D"], label=name)
    axes.set(xlabel="index", ylabel="share of the largest", ylim=(0, 1.05), title=title)


def draw_items(axes: Any, arrays: dict, title: str) -> None:
    """The items along two singular directions, the frequent ones dark and on top, as in DuoRec's Figure 1a."""
    order = np.argsort(arrays["train_count_V"], kind="stable")
    colour_V = np.log10(1 + arrays["train_count_V"][order])
    dots = axes.scatter(*arrays["projection_Vx2"][order].T, c=colour_V, s=4, cmap="viridis_r")
    axes.figure.colorbar(dots, label="log10(1 + times in training)")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="first direction", ylabel="second direction", title=title)


def draw_users(axes: Any, users_Nx2: np.ndarray, title: str) -> None:
    """Users along two principal directions of their unit states, as in CLUE's Figure 7: a collapse is one spot."""
    axes.scatter(*users_Nx2.T, s=4)
    axes.set(xlabel="first direction", ylabel="second direction", xlim=(-1, 1), ylim=(-1, 1), title=title)


def draw_confusion(axes: Any, counts_CxC: np.ndarray, classes: list[str], title: str) -> None:
    """Test users of each true class (row) by the class they were taken for, as shares of the row."""
    shares_CxC = counts_CxC / np.maximum(counts_CxC.sum(axis=1, keepdims=True), 1)
    axes.figure.colorbar(axes.imshow(shares_CxC, vmin=0, vmax=1, cmap="viridis_r"), label="share of the true class")
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="taken for", ylabel="true", title=title)


def has_analysis(lines: dict[str, list[dict]]) -> bool:
    """Whether any validation line has the figures of config.report.analysis."""
    return any({"uniformity", "hr@10"} <= line.keys() for points in lines.values() for line in points)


def draw_analysis(panels: tuple, lines: dict[str, list[dict]]) -> None:
    """Validation HR@10 against uniformity and against alignment; the dot is the last validation."""
    for axes, figure in zip(panels, ("uniformity", "alignment"), strict=True):
        for name, points in lines.items():
            points = [(line[figure], line["hr@10"]) for line in points if figure in line]
            if points:
                (line,) = axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=name)
                axes.plot(*points[-1], "o", color=line.get_color())
        axes.set(xlabel=f"{figure} (smaller is better)", ylabel="validation hr@10", title=f"hr@10 against {figure}")
