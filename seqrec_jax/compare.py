"""Several finished runs side by side: one HTML page that needs nothing else, neither network nor scripts."""

import base64
import contextlib
import dataclasses
import html
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from seqrec_jax import config as configuration
from seqrec_jax import report
from seqrec_jax.errors import UserError
from seqrec_jax.protocol import protocol_of
from seqrec_jax.validate import flatten
from seqrec_jax.workdir import read_lines

STYLE = (
    "body{font:15px sans-serif;margin:2em} table{border-collapse:collapse} td,th{padding:.2em .6em;text-align:right}"
    " td:nth-child(-n+5){text-align:left} tr{border-bottom:1px solid #ccc}"
    " table{margin-bottom:1em} img{max-width:100%} .warning{color:#b00;font-weight:bold}"
)
APART = ("seed", "data.dir", "data.path", "data.cache_dir")  # what runs of one recipe may differ in
CURVES = {  # title: for each panel the kind of line, the value, the panel's own title
    "next-item loss and validation ndcg@10": (
        ("train", "next_item", "next-item loss"), ("valid", "ndcg@10", "validation ndcg@10"),
    ),
    "CLUE's loss and the spread of its projections": (
        ("train", "above_minimum", "loss above its minimum of -1"), ("train", "spread", "spread of the projections"),
    ),
}  # fmt: skip
UNFINISHED = "its run is not finished; continue it with the command that began it"
MIXED = "These runs differ in protocol or data, so their figures cannot be compared (--force)."


@dataclasses.dataclass(frozen=True)
class Run:
    """What a finished run left in its workdir."""

    workdir: Path
    results: dict
    lines: list[dict]
    arrays: dict[str, np.ndarray] | None  # None: nothing was trained
    judged_by: tuple  # protocol, negatives if they are drawn, and data: equal ones can be compared
    recipe: str  # the config but for the seed and where things lie


def compare(workdirs: Sequence[Path], out: Path, *, force: bool = False) -> None:
    """Writes the page `out` and prints where it is.

    Raises UserError for a folder that is missing or whose run is not finished, for an `out` that cannot be written,
    and, unless `force`, for runs of different protocols or data.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    mixed = len({run.judged_by for run in runs}) > 1
    if mixed and not force:
        told = "\n".join(f"  {run.workdir}: data {_data(run)}; {_protocol(run)}" for run in runs)
        raise UserError(
            f"--workdirs: runs of different protocols or data cannot be compared (--force does it):\n{told}"
        )
    try:
        out.write_text(page(runs, mixed=mixed), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from error
    print(f"{MIXED}\n{out}" if mixed else out)


def read_run(workdir: Path) -> Run:
    """Reads a workdir, also one of `workdir/baselines`; UserError if its run is not finished."""
    if not workdir.is_dir():
        raise UserError(f"--workdirs: {workdir} is no folder")
    try:
        config = configuration.from_json((workdir / "config.json").read_text())
        results = json.loads((workdir / "results.json").read_text())
        arrays = report.read_arrays(workdir) if results.get("analysis") else None
    except FileNotFoundError as error:
        raise UserError(f"--workdirs: {workdir} has no {Path(error.filename).name}: {UNFINISHED}") from error
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--workdirs: {workdir} has a damaged file: {error}") from error
    if results["config_hash"] != configuration.config_hash(config):
        raise UserError(f"--workdirs: {workdir} has results of an earlier config: {UNFINISHED}")
    protocol = protocol_of(config)
    drawn = results["negatives"] if protocol.candidates == "sampled" else None
    judged_by = (protocol, drawn, results["dataset"]["hash"])
    recipe = {key: value for key, value in flatten(config).items() if key not in APART}
    return Run(workdir, results, read_lines(workdir / "metrics.jsonl"), arrays, judged_by, str(recipe))


def page(runs: Sequence[Run], *, mixed: bool) -> str:
    """The whole HTML page; every text in it is escaped."""
    named = {f"{number} {_name(run)}": run for number, run in enumerate(runs, 1)}
    protocols = "".join(f"<p>{html.escape(line)}</p>" for line in dict.fromkeys(map(_protocol, runs)))
    pictures = "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{html.escape(title)}">'
        for title, png in _pictures(named)
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Runs side by side</title>'
        f"<style>{STYLE}</style></head><body><h1>Runs side by side</h1>{protocols}{_table(runs, mixed)}"
        f"{_spread(runs)}{pictures}</body></html>\n"
    )


def _columns(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in report.columns_of(run.results["test"])))


def _table(runs: Sequence[Run], mixed: bool) -> str:
    columns = _columns(runs)
    heads = ["run", "system", "workdir", "protocol", "data", "seed", *(f"test {name}" for name in columns)]
    heads += ["best step", "steps", "seconds", *report.FIGURES.values(), "collapsed"]
    caption = f'<caption class="warning">{MIXED}</caption>' if mixed else ""
    return _html([heads, *(_row(number, run, columns) for number, run in enumerate(runs, 1))], caption)


def _spread(runs: Sequence[Run]) -> str:
    """Means and sample standard deviations of the runs that differ in the seed alone; "" where there are none."""
    groups, columns = {}, _columns(runs)
    for number, run in enumerate(runs, 1):
        groups.setdefault((run.judged_by, run.recipe), {})[number] = run
    rows = [["runs", "system", "seeds", *(f"test {name}" for name in columns)]]
    for group in groups.values():
        found = [run.results for run in group.values()]
        seeds = [results["seed"] for results in found]
        if len(seeds) > 1 and len(set(seeds)) == len(seeds):
            tests = [[results["test"].get(name, np.nan) for results in found] for name in columns]
            spread = [f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" for values in tests]
            words = [", ".join(map(str, group)), report.name_of(found[0]), ", ".join(map(str, seeds))]
            rows.append([*words, *spread])
    return _html(rows, "<caption>means over seeds ± standard deviation</caption>") if len(rows) > 1 else ""


def _html(rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table, its first row the heads; every cell is escaped."""
    cells = ["".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row)
             for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)]  # fmt: skip
    return f"<table>{caption}" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _row(number: int, run: Run, columns: list[str]) -> list[str]:
    results, collapsed = run.results, run.results.get("collapsed")
    figures = results.get("analysis") or {}
    return [
        str(number), report.name_of(results), str(run.workdir), results["protocol"], _data(run), str(results["seed"]),
        *(f"{results['test'][name]:.4f}" if name in results["test"] else "" for name in columns),
        str(results.get("best_step", "")), f"{results['steps']:,}", f"{results['train_seconds']:.1f}",
        *(f"{figures[name]:.4f}" if name in figures else "" for name in report.FIGURES),
        f"at step {collapsed['step']}" if collapsed else "",
    ]  # fmt: skip


def _pictures(named: dict[str, Run]) -> Iterator[tuple[str, bytes]]:
    """(title, PNG) of every picture that has something to show."""
    lines = {name: run.lines for name, run in named.items()}
    arrays = {name: run.arrays for name, run in named.items() if run.arrays}
    for title, curves in CURVES.items():
        if any(value in line for points in lines.values() for line in points for _, value, _ in curves):
            yield title, _png(lambda panels, curves=curves: _draw_curves(panels, lines, curves), 2)
    if arrays:
        title = "singular values of the items"
        yield title, _png(lambda panels: report.draw_spectra(panels[0], arrays, title))
    if report.has_analysis(lines):
        yield "hr@10 against uniformity and alignment", _png(lambda panels: report.draw_analysis(panels, lines), 2)
    for name, found in arrays.items():
        title = f"items of {name}"
        yield title, _png(lambda panels, found=found, title=title: report.draw_items(panels[0], found, title))


def _png(draw: Callable[[tuple], None], panels: int = 1) -> bytes:
    with contextlib.closing(io.BytesIO()) as png:
        with report.picture(png, panels) as axes:
            draw(axes)
        return png.getvalue()


def _draw_curves(panels, lines, curves) -> None:
    for axes, (kind, value, title) in zip(panels, curves, strict=True):
        report.draw_curves(axes, lines, kind, value, title)


def _name(run: Run) -> str:
    """In legends; a dollar would begin a formula there."""
    system, folder = report.name_of(run.results), run.workdir.name.replace("$", r"\$")
    return system if folder == system else f"{system} ({folder})"


def _protocol(run: Run) -> str:
    return run.results["protocol_line"]


def _data(run: Run) -> str:
    return f"{run.results['dataset']['name']} {run.results['dataset']['hash']}"
