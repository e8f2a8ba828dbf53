"""The command line end to end: every system, loss and kind of example; evaluate; recommend; bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import seqrec_jax
from seqrec_jax import config, recommend
from seqrec_jax.data.prepare import prepare
from seqrec_jax.errors import UserError
from seqrec_jax.main import main
from seqrec_jax.workdir import read_lines

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "data.synthetic_users": 100, "data.synthetic_items": 300, "encoder.max_length": 16, "encoder.dim": 8,
    "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 24, "train.max_epochs": 2, "loss.negatives": 16,
}  # fmt: skip
METRICS = {f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in (1, 5, 10, 20)} | {"mrr"}
ODD = ("ü-1", "a b", "007", "7", "3.x", "NaN!", '"q"', "=1+1", "x/y", "日本", "<b>", "-", "z", "Z", "0", "00", "#", "p")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prepared data and compiled programs, one folder for the whole session."""
    return tmp_path_factory.getbasetemp() / "cache"


def flags(cache, workdir, system, **changes):
    values = SMALL | {"data.cache_dir": cache} | {key.replace("__", "."): value for key, value in changes.items()}
    settings = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config={ROOT / 'configs' / system}.py", f"--workdir={workdir}", *settings]


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """A CL4SRec run on synthetic data, under protocol D."""
    workdir = tmp_path_factory.mktemp("trained")
    changes = {"loss__next_item": "sampled", "report__baselines": ""}
    assert main(flags(cache, workdir, "cl4srec", **changes)) == 0
    return workdir


def odd_rows():
    """40 users with 3 to 8 items of odd names each; the tail of `ODD` is rare."""
    generator = np.random.default_rng(0)
    share = 1 / np.arange(1, len(ODD) + 1)
    for user in range(40):
        items = generator.choice(ODD, generator.integers(3, 9), p=share / share.sum())
        yield from ((f"user {user}", item, time) for time, item in enumerate(items))


@pytest.fixture(scope="module")
def odd(cache, tmp_path_factory):
    """(workdir, histories by user) of a run on a file with odd ids; the file and the prepared data are gone."""
    folder = tmp_path_factory.mktemp("odd")
    rows, own_cache = list(odd_rows()), folder / "cache"
    lines = ["\t".join(("user_id", "item_id", "timestamp"))]
    quoted = ('"' + item.replace('"', '""') + '"' for _, item, _ in rows)
    lines += [f"{user}\t{item}\t{time}" for (user, _, time), item in zip(rows, quoted, strict=True)]
    (folder / "data.tsv").write_text("\n".join(lines) + "\n")
    changes = {"data__path": folder / "data.tsv", "data__cache_dir": own_cache, "report__baselines": ""}
    assert main(flags(cache, folder / "run", "sasrec", **changes)) == 0
    (folder / "data.tsv").unlink()
    prepared = [path for path in own_cache.iterdir() if path.name != "programs"]  # JAX goes on writing there
    assert prepared
    for path in prepared:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    histories = {}
    for user, item, _ in rows:
        histories.setdefault(user, []).append(str(item))
    return folder / "run", histories


# Training


@pytest.mark.parametrize(
    ("system", "changes"),
    [
        ("pop", {}),
        ("sasrec", {"loss__next_item": "full"}),
        pytest.param(
            "sasrec",
            {"loss__next_item": "bce", "train__targets": "windows", "encoder__max_length": 8},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sasrec_aug",
            {"loss__next_item": "bpr", "train__targets": "prefix", "report__baselines": "pop"},
            marks=pytest.mark.slow,
        ),
        ("cl4srec", {"loss__next_item": "sampled"}),
    ],
    ids=["pop", "sasrec full all", "sasrec bce windows", "sasrec_aug bpr prefix", "cl4srec sampled all"],
)
def test_run_writes_results_of_the_promised_shape(cache, tmp_path, capsys, system, changes):
    assert main(flags(cache, tmp_path, system, **changes)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    settings = config.load(str(tmp_path / "config.json"))
    assert results["protocol"] == "D" and results["seed"] == 0 and results["device"] == "1 x cpu"
    assert results["dataset"]["users"] == 100 and results["dataset"]["name"] == "synthetic"
    assert results["train_seconds"] >= 0 and results["steps"] >= 0
    assert tuple(results["baselines"]) == settings.report.baselines
    for metrics in (results, *results["baselines"].values()):
        assert metrics["test"].keys() == metrics["valid"].keys() == METRICS
        assert all(0 <= value <= 1 for value in [*metrics["test"].values(), *metrics["valid"].values()])
    for name in ("loss", "validation", "test"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert results["protocol_line"] in said and f"{results['test']['ndcg@10']:.4f}" in said
    assert json.loads((tmp_path / "data_report.json").read_text())["hash"] == results["dataset"]["hash"]
    if system != "pop":
        lines = read_lines(tmp_path / "metrics.jsonl")
        assert results["steps"] == lines[-1]["step"] and {line["kind"] for line in lines} == {"train", "valid"}
        best = max((line for line in lines if line["kind"] == "valid"), key=lambda line: line["ndcg@10"])
        assert best["step"] == results["best_step"] and best["ndcg@10"] == results["valid"]["ndcg@10"]
        assert list((tmp_path / "tensorboard").iterdir())


def test_config_json_is_the_same_run(trained, capsys):
    assert main([f"--config={trained / 'config.json'}", f"--workdir={trained}"]) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_baseline_equals_the_system_run_alone(cache, tmp_path):
    """Same data, loss, budget and seed; and a run that was stopped after it does not run it again."""
    assert main(flags(cache, tmp_path / "with", "sasrec")) == 0
    baseline = tmp_path / "with" / "baselines" / "pop" / "results.json"
    (tmp_path / "with" / "results.json").unlink()
    written = baseline.stat().st_mtime_ns
    assert main(flags(cache, tmp_path / "with", "sasrec")) == 0 and baseline.stat().st_mtime_ns == written
    assert main(flags(cache, tmp_path / "alone", "pop")) == 0
    beside, alone = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("with", "alone"))
    assert beside["baselines"]["pop"]["test"] == alone["test"]


def test_a_run_that_failed_before_its_first_checkpoint_takes_the_corrected_config(cache, tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("user,item\n" + "".join(f"{n % 9},{n % 7}\n" for n in range(60)) + "1\n")
    changes = {"data__path": tmp_path / "bad.csv", "data__user_column": "user", "data__item_column": "item",
               "data__time_column": "", "report__baselines": "", "train__max_epochs": 1}  # fmt: skip
    assert main(flags(cache, tmp_path / "run", "sasrec", **changes)) == 2
    assert "data.on_bad_row=drop" in capsys.readouterr().err
    assert main(flags(cache, tmp_path / "run", "sasrec", **changes, data__on_bad_row="drop")) == 0
    assert main(flags(cache, tmp_path / "run", "sasrec", **changes)) == 2, "now there is something to protect"
    assert "made with another config" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main(flags(cache, tmp_path / "run", "sasrec", **changes)) == 2, "results are kept, too"


# Evaluate


@pytest.mark.parametrize("protocol", ["A", "B", "C", "D"])
def test_evaluate_recomputes_from_the_best_checkpoint(trained, protocol, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    for path in ("metrics.jsonl", "results.json"):
        (workdir / path).unlink()
    assert main([f"--workdir={workdir}", "--mode=evaluate", f"--config.eval.protocol={protocol}"]) == 0
    again = json.loads((workdir / f"results_{protocol}.json").read_text())
    first = json.loads((trained / "results.json").read_text())
    assert again["protocol"] == protocol and again["best_step"] == first["best_step"]
    assert again["protocol_line"].endswith("checkpoint chosen on validation ndcg@10"), "as the run chose it"
    if protocol in "AD":  # the same candidates and hiding, another metric for the choice
        assert again["test"] == first["test"] and again["valid"] == first["valid"]
    else:
        assert again["test"] != first["test"]


def test_evaluate_does_not_depend_on_the_batch(trained):
    command = [f"--workdir={trained}", "--mode=evaluate", "--config.eval.batch_size=7"]
    assert main(command) == 0
    again = json.loads((trained / "results_D.json").read_text())
    assert again["test"] == json.loads((trained / "results.json").read_text())["test"]


def test_evaluate_refuses_another_encoder_and_other_data(trained, capsys):
    command = [f"--workdir={trained}", "--mode=evaluate"]
    assert main([*command, "--config.encoder.layers=2"]) == 2
    assert "trained with config.encoder.layers=1, not 2" in capsys.readouterr().err
    for mode in (["evaluate"], ["recommend", "--history=1,2"], ["embed", "--out=x.parquet"]):
        assert main([f"--workdir={trained}", f"--mode={mode[0]}", *mode[1:], "--config.seed=7"]) == 2
        assert "trained with config.seed=0, not 7" in capsys.readouterr().err
    assert main([*command, "--config.data.synthetic_seed=1"]) == 2
    assert "trained on data" in capsys.readouterr().err


# Recommend


def test_ranking_is_that_of_the_evaluation(trained, cache):
    """From each user's history before the test item: the places of that item give the metrics of results.json."""
    recommender = seqrec_jax.load(trained)
    settings = config.load(str(trained / "config.json"))
    dataset = prepare(settings.data, cache)
    ids = dataset.item_ids[dataset.items_A - 1]
    parts = [part.tolist() for part in np.split(ids, dataset.offsets_U1[1:-1])]
    histories, targets = [part[:-1] for part in parts], [part[-1] for part in parts]
    found = recommender.recommend(histories, 20)
    hidden = recommender.recommend(histories, 20, hide_history=False)
    places = [items.index(target) + 1 if target in items else None
              for items, target in zip(found.items, targets, strict=True)]  # fmt: skip
    results = json.loads((trained / "results.json").read_text())["test"]
    for k in (1, 5, 10, 20):
        hits = [place is not None and place <= k for place in places]
        assert np.mean(hits) == pytest.approx(results[f"hr@{k}"], abs=1e-9)
    assert not any(set(items) & set(history) for items, history in zip(found.items, histories, strict=True))
    assert any(set(items) & set(history) for items, history in zip(hidden.items, histories, strict=True))


def test_recommend_needs_no_data_and_speaks_in_the_users_ids(odd, tmp_path):
    workdir, histories = odd
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")  # the checkpoint alone
    recommender = seqrec_jax.load(str(tmp_path))
    met = {item for history in histories.values() for item in history}
    history = ["ü-1", "007", "a b"]
    found = recommender.recommend([history], len(met) - 3)
    assert sorted([*found.items[0], *history]) == sorted(met) and found.unknown == [[]]
    assert found.scores[0] == sorted(found.scores[0], reverse=True)
    shown = recommender.recommend([history], len(met), hide_history=False)
    assert sorted(shown.items[0]) == sorted(met)
    assert [item for item in shown.items[0] if item not in history] == found.items[0]


def test_command_line_recommends_the_same(odd, capsys):
    workdir, _ = odd
    expected = seqrec_jax.load(workdir).recommend([["007", "a b"]], 4)
    capsys.readouterr()
    assert main([f"--workdir={workdir}", "--mode=recommend", "--history=007, a b,never seen", "--k=4"]) == 0
    captured = capsys.readouterr()
    rows = [line.split("\t") for line in captured.out.splitlines()]
    assert [row[0] for row in rows] == expected.items[0]
    assert [float(row[1]) for row in rows] == pytest.approx(expected.scores[0], abs=1e-6)
    assert captured.err.strip().endswith("unknown items, left out: never seen")


def test_unknown_ids_change_nothing_and_are_reported(odd):
    recommender = seqrec_jax.load(odd[0])
    plain = recommender.recommend([["007"], ["a b", "z"]], 5)
    mixed = recommender.recommend([["what", "007"], ["a b", "0x7", "z", "8"]], 5)
    assert mixed.items == plain.items and mixed.scores == plain.scores
    assert mixed.unknown == [["what"], ["0x7", "8"]]


def test_histories_do_not_influence_each_other(odd):
    """Any number of histories, any length: the same answers one by one."""
    recommender = seqrec_jax.load(odd[0])
    histories = [["007", "7"] * length + ["a b"] for length in range(recommend.GROUP + 3)]
    together = recommender.recommend(histories, 3)
    for number in (0, 1, 30, recommend.GROUP, recommend.GROUP + 2):
        alone = recommender.recommend([histories[number]], 3)
        assert alone.items[0] == together.items[number]
        assert alone.scores[0] == pytest.approx(together.scores[number], rel=1e-5, abs=1e-7)


def test_equal_scores_by_lower_id(odd):
    recommender = seqrec_jax.load(odd[0])
    model = recommender.model
    object.__setattr__(model, "params", model.params | {"items": model.params["items"] * 0})
    found = recommender.recommend([[model.item_ids[2]]], 5)
    assert found.items[0] == model.item_ids[[0, 1, 3, 4, 5]].tolist()


@pytest.mark.parametrize("k", [0, -1, 17, 10**9])
def test_k_out_of_range_is_an_error_with_the_bounds(odd, k):
    recommender = seqrec_jax.load(odd[0])
    left = len(recommender.model.item_ids) - 2
    with pytest.raises(UserError, match=f"k={k} is out of range for history 1; allowed: 1 to {left}"):
        recommender.recommend([["007", "a b", "007"]], k)


def test_k_is_a_number_and_something_must_be_left(odd):
    recommender = seqrec_jax.load(odd[0])
    for k in (2.5, "3", True):
        with pytest.raises(UserError, match="is no whole number"):
            recommender.recommend([["007"]], k)
    assert len(recommender.recommend([["007"]], np.int64(3)).items[0]) == 3
    with pytest.raises(UserError, match="history 2 covers the whole catalogue"):
        recommender.recommend([["007"], recommender.model.item_ids.tolist()], 1)
    assert len(repr(recommender)) < 200


def test_history_without_a_known_item_is_an_error(odd, capsys):
    assert main([f"--workdir={odd[0]}", "--mode=recommend", "--history=what,else"]) == 2
    assert "history 1 (what, else) has no item this model knows" in capsys.readouterr().err


def test_popularity_recommends_the_most_frequent(cache, tmp_path):
    (tmp_path / "data.txt").write_text("1 30 20 1 2\n2 30 10 1 2\n3 30 20 1 2\n4 30 10 7 3 4\n")
    assert main(flags(cache, tmp_path / "run", "pop", data__path=tmp_path / "data.txt")) == 0
    found = seqrec_jax.load(tmp_path / "run").recommend([["2"]], 4)
    assert found.items == [["30", "20", "10", "7"]]  # 4, 2, 2 and 1 times in training, equal ones by first appearance


def test_nothing_trained_is_an_error(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    for mode in (["--mode=evaluate"], ["--mode=recommend", "--history=1"]):
        assert main([f"--workdir={tmp_path}", *mode]) == 2
        assert "no checkpoints here; train first" in capsys.readouterr().err


def test_run_on_eight_devices_recommends_on_one(odd, tmp_path):
    """What mesh.data says binds the training, not the user of the model."""
    workdir = shutil.copytree(odd[0], tmp_path / "run")
    settings = json.loads((workdir / "config.json").read_text())
    settings["mesh"]["data"] = 8
    (workdir / "config.json").write_text(json.dumps(settings))
    assert main([f"--workdir={workdir}", "--mode=recommend", "--history=007"]) == 0


# Bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__batch_size": 0}, "train.batch_size=0 is out of range"),
        ({"encoder__heads": 3}, "encoder.heads=3"),
        ({"data__path": "/nowhere/data.txt"}, "/nowhere/data.txt does not exist: correct --config.data.path"),
        ({"data__min_user": 1000}, "lower these"),
        ({"eval__protocol": "C", "data__synthetic_items": 60}, "config.eval.num_negatives"),
        ({"init_from": "/nowhere/run"}, "no such workdir or checkpoint (config.init_from)"),
        ({"mesh__data": 3}, "mesh.data=3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_exits_2_and_names_the_key(cache, tmp_path, capsys, changes, said):
    assert main(flags(cache, tmp_path / "run", "sasrec", **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_bad_row_names_file_and_line(cache, tmp_path, capsys):
    data = tmp_path / "data.csv"
    data.write_text("user_id,item_id,timestamp\nu,1,5\nu,2,soon\n")
    assert main(flags(cache, tmp_path / "run", "sasrec", data__path=data)) == 2
    assert f"{data}:3" in capsys.readouterr().err


def test_the_process_exits_with_the_code(tmp_path):
    command = [sys.executable, "-m", "seqrec_jax.main", f"--workdir={tmp_path}", "--mode=train"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2 and process.stderr.startswith("error: --config is missing")


def test_checkpoints_alone_are_enough_to_recommend(trained, tmp_path, capsys):
    """No config.json, no data: the config travels inside the checkpoint."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    assert main([f"--workdir={tmp_path}", "--mode=recommend", "--history=1,2", "--k=3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
