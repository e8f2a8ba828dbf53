"""The page that sets runs side by side."""

import json
import re
import shutil
from pathlib import Path

import pytest

from seqrec_jax.main import main
from seqrec_jax.report import draw_curves, picture

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "data.synthetic_users": 100, "data.synthetic_items": 300, "encoder.max_length": 16, "encoder.dim": 8,
    "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 24, "train.max_epochs": 2, "report.analysis": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A SASRec run with its popularity baseline, in a folder with an odd name."""
    workdir = tmp_path_factory.mktemp("compare") / '<b>$run & "1"'
    settings = TINY | {"data.cache_dir": tmp_path_factory.getbasetemp() / "cache"}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    assert main([f"--config={ROOT / 'configs' / 'sasrec.py'}", f"--workdir={workdir}", *flags]) == 0
    return workdir


def report(out, *workdirs, force=False):
    flags = ["--mode=report", f"--workdirs={','.join(map(str, workdirs))}", f"--out={out}"]
    return main([*flags, *(["--force"] if force else [])])


def cells_of(table):
    """{first cell of a row: {head: cell}}"""
    heads, *rows = [re.findall("<t[dh]>(.*?)</t[dh]>", row) for row in re.findall("<tr>(.*?)</tr>", table)]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def changed_copy(workdir, folder, **changes):
    """A copy with other entries in results.json."""
    shutil.copytree(workdir, folder)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


def test_page_holds_everything(trained, tmp_path, capsys):
    collapse = {"step": 10, "mean_cosine": 1.0, "same_top10": 1.0}
    test = json.loads((trained / "results.json").read_text())["test"]
    test = {name: value + 0.02 for name, value in test.items()}
    other = changed_copy(trained, tmp_path / "other", seed=77, collapsed=collapse, test=test)
    assert report(tmp_path / "page.html", trained, other, trained / "baselines" / "pop") == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    results = json.loads((trained / "results.json").read_text())
    assert results["protocol_line"] in page and results["dataset"]["hash"] in page
    assert "&lt;b&gt;$run &amp; &quot;1&quot;" in page and str(other) in page and "<b>" not in page
    columns, seeds = map(cells_of, re.findall("<table>.*?</table>", page))
    pop = results["baselines"]["pop"]["test"]
    assert columns["1"]["test hr@10"] == f"{results['test']['hr@10']:.4f}"
    assert columns["1"]["uniformity"] == f"{results['analysis']['uniformity']:.4f}" and columns["1"]["collapsed"] == ""
    assert (columns["2"]["seed"], columns["2"]["collapsed"]) == ("77", "at step 10")
    assert (columns["3"]["test hr@10"], columns["3"]["uniformity"]) == (f"{pop['hr@10']:.4f}", "")
    # The second and the first differ in the seed alone.
    assert list(seeds) == ["1, 2"] and seeds["1, 2"]["seeds"] == "0, 77"
    assert seeds["1, 2"]["test hr@10"] == f"{results['test']['hr@10'] + 0.01:.4f} ± {0.02 / 2**0.5:.4f}"
    pictures = re.findall('src="data:image/png;base64,[^"]*" alt="(.*?)"', page)
    assert [picture.split(" of ")[0] for picture in pictures] == [
        "next-item loss and validation ndcg@10", "singular values", "hr@10 against uniformity and alignment",
        "items", "items",
    ]  # fmt: skip
    assert "http" not in page and "<script" not in page and "cannot be compared" not in page


def test_pretraining_shows_its_loss_and_spread(trained, tmp_path):
    clue = changed_copy(trained, tmp_path / "clue", test={})
    found = {"kind": "train", "step": 8, "epoch": 1.0, "above_minimum": 0.5, "spread": 0.1}
    (clue / "metrics.jsonl").write_text(json.dumps(found) + "\n")
    assert report(tmp_path / "page.html", clue) == 0
    page = (tmp_path / "page.html").read_text()
    assert "the spread of its projections" in page and "next-item loss" not in page


def test_curves_of_unlike_steps_go_by_epochs(tmp_path):
    def lines_of(steps):
        logged = {"kind": "train", "step": steps // 2, "epoch": 0.5, "ndcg@10": 9.0}
        return [logged, *({"kind": "valid", "step": steps * n, "ndcg@10": n / 10} for n in (1, 2))]

    with picture(tmp_path / "curves.png") as (axes,):
        draw_curves(axes, {"10 steps": lines_of(10), "88 steps": lines_of(88)}, "valid", "ndcg@10", "validation")
        drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn == [[[1, 0.1], [2, 0.2]]] * 2


def test_untrained_runs_have_no_pictures(trained, tmp_path):
    assert report(tmp_path / "page.html", trained / "baselines" / "pop") == 0
    assert "<img" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("what", ["data", "protocol"])
def test_unlike_runs_are_refused_unless_forced(trained, tmp_path, capsys, what):
    if what == "data":
        dataset = json.loads((trained / "results.json").read_text())["dataset"] | {"hash": "another"}
        other = changed_copy(trained, tmp_path / "other", dataset=dataset)
    else:
        other = tmp_path / "other"
        settings = {key: value for key, value in TINY.items() if key != "report.analysis"} | {"eval.protocol": "B"}
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        assert main([f"--config={ROOT / 'configs' / 'pop.py'}", f"--workdir={other}", *flags]) == 0
    assert report(tmp_path / "page.html", trained, other) == 2
    said = capsys.readouterr().err
    assert str(other) in said and "--force" in said and not (tmp_path / "page.html").exists()
    assert ("another" if what == "data" else "protocol B") in said
    assert report(tmp_path / "page.html", trained, other, force=True) == 0
    assert re.search("<table><caption[^>]*>These runs differ", (tmp_path / "page.html").read_text())


def test_folders_without_a_finished_run_are_named(trained, tmp_path, capsys):
    names = ("begun", "older", "damaged", "torn")
    begun, older, damaged, torn = (shutil.copytree(trained, tmp_path / name) for name in names)
    (begun / "results.json").unlink()
    config = json.loads((older / "config.json").read_text())
    config["train"]["max_epochs"] = 3
    (older / "config.json").write_text(json.dumps(config))
    (damaged / "results.json").write_text("{")
    (torn / "analysis.npz").write_bytes((torn / "analysis.npz").read_bytes()[:-9])
    for folder, reason in (
        (tmp_path / "none", "is no folder"), (begun, "has no results.json: its run is not finished"),
        (older, "results of an earlier config: its run is not finished"), (damaged, "damaged"), (torn, "damaged"),
    ):  # fmt: skip
        assert report(tmp_path / "page.html", trained, folder) == 2
        said = capsys.readouterr().err
        assert str(folder) in said and reason in said and not (tmp_path / "page.html").exists()


def test_page_that_cannot_be_written_is_an_error(trained, tmp_path, capsys):
    assert report(tmp_path / "none" / "page.html", trained) == 2
    assert "--out=" in capsys.readouterr().err
