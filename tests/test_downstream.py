"""The downstream stage: its examples, its loss and metrics against numpy, and pretraining to three tasks end to end."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import polars as pl
import pytest

from seqrec_jax import checkpoint, judge, systems
from seqrec_jax.config import load
from seqrec_jax.data import batches, splits
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.prepare import prepare
from seqrec_jax.data.tasks import Task, parts_of, read_tasks
from seqrec_jax.data.vectors import read_vectors
from seqrec_jax.main import main
from seqrec_jax.sharding import make_mesh, replicate
from seqrec_jax.systems import hparams_of

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN, FINETUNE = (str(ROOT / "configs" / f"clue_{stage}.py") for stage in ("pretrain", "finetune"))
WIDTH, ITEMS, CLASSES = 6, 20, 5
LENGTHS = (1, 2, 3, 4, 5, 9, 3, 14, 6, 8, 7, 4)
MESH = make_mesh(1, 1)
batch_at = jax.jit(batches.batch_at)
STILL = {"embedding_dropout": 0.0, "hidden_dropout": 0.0}
TINY = {"encoder.max_length": WIDTH, "encoder.dim": 8, "encoder.ffn": 16, "encoder.layers": 1, "init_from": ""}


def random_dataset(fraction=1.0):
    generator = np.random.default_rng(0)
    items_A = generator.integers(1, ITEMS + 1, sum(LENGTHS)).astype(np.int32)
    offsets_U1, users = np.cumsum([0, *LENGTHS]).astype(np.int64), np.arange(len(LENGTHS)).astype(str)
    return SequenceDataset(items_A, offsets_U1, np.arange(ITEMS).astype(str), users, "", {}, train_fraction=fraction)


def task_of(dataset, seed=1):
    """Users 1 to 11, those with an odd number twice, each time with a class drawn anew."""
    generator = np.random.default_rng(seed)
    user_E = np.array([u for u in range(1, len(LENGTHS)) for _ in range(1 + u % 2)])
    class_E = generator.integers(1, CLASSES + 1, len(user_E)).astype(np.int32)
    split = splits.Split(np.arange(1, 7), np.array([7, 8]), np.array([9, 10, 11]))
    parts = parts_of(split, user_E, dataset, WIDTH)
    return Task(parts, class_E, np.arange(CLASSES).astype(str), "", {}, ""), user_E


def case_of(name, **settings):
    dataset = random_dataset()
    task, user_E = task_of(dataset)
    values = TINY | {"task": name} | settings
    config = load(FINETUNE, [(key, str(value)) for key, value in values.items()])
    system = systems.build(config, dataset, MESH, None if name == "next_item" else task)
    return config, dataset, task, user_E, system, jax.tree.map(lambda x: 5 * x, system.init(jax.random.key(0)))


def states_of(system, params, dataset):
    """[users, D] by one history a row, apart from the code that packs and deals examples."""
    layout = batches.make_layout(batches.history_examples(dataset, 0, WIDTH), 100, WIDTH, packed=False, room=1)
    batch = batch_at(jnp.asarray(dataset.items_A), layout, 0, 0)
    found = np.asarray(jax.jit(system.states)(params, batch), np.float64)
    return found[np.argsort(np.asarray(batch.users_U))]


def loss_of(config, system, params, batch, seed=0, **hparams):
    """(loss, its gradient) of one step."""

    def step(params, key, data):
        return system.loss(params, {}, batch, key, hparams_of(config) | hparams, data)[0]

    return jax.jit(jax.value_and_grad(step))(params, jax.random.key(seed), replicate(MESH, system.data))


# Examples -------------------------------------------------------------------------------------------------------------


def test_examples_are_whole_histories_one_for_every_target():
    dataset = random_dataset()
    task, user_E = task_of(dataset)
    numbers = np.concatenate([part.user_E for part in task.parts.values()])
    assert sorted(numbers.tolist()) == list(range(len(user_E)))
    for name, users in (("train", range(1, 7)), ("valid", (7, 8)), ("test", (9, 10, 11))):
        part = task.parts[name]
        assert set(user_E[part.user_E].tolist()) == set(users)
        for number, start, length in zip(part.user_E, part.start_E, part.length_E, strict=True):
            end = dataset.offsets_U1[user_E[number] + 1]
            assert length == min(LENGTHS[user_E[number]], WIDTH) and start + length == end


def test_a_fraction_trains_on_fewer_users_and_tests_all():
    whole, half = task_of(random_dataset())[0], task_of(random_dataset(0.5))[0]
    assert set(half.parts["train"].start_E) < set(whole.parts["train"].start_E)
    assert len(set(half.parts["train"].start_E)) == 3
    assert half.parts["test"].user_E.tolist() == whole.parts["test"].user_E.tolist()


# Loss and metrics -----------------------------------------------------------------------------------------------------


def test_loss_is_the_cross_entropy_of_the_head():
    config, dataset, task, user_E, system, params = case_of("cold_start")
    layout = batches.make_layout(task.parts["train"], 100, WIDTH, room=1)
    batch = batch_at(jnp.asarray(dataset.items_A), layout, 0, 0)
    value, _ = loss_of(config, system, params, batch, **STILL)
    number_E = task.parts["train"].user_E
    head = np.asarray(params["head"], np.float64)[1 : CLASSES + 1]
    logits = states_of(system, params, dataset)[user_E[number_E]] @ head[:, :-1].T + head[:, -1]
    wanted = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(number_E)), task.class_E[number_E] - 1]
    assert value == pytest.approx(wanted.mean(), rel=1e-4)


def test_a_frozen_encoder_trains_its_head_alone():
    config, dataset, task, _, system, params = case_of("profile", **{"freeze_encoder": True})
    layout = batches.make_layout(task.parts["train"], 100, WIDTH, room=1)
    batch = batch_at(jnp.asarray(dataset.items_A), layout, 0, 0)

    (value, gradient), (again, _) = (loss_of(config, system, params, batch, seed) for seed in (0, 1))
    assert gradient.pop("head").any() and not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    assert value == again  # no dropout


def test_next_item_is_ranked_at_the_end_of_every_prefix():
    config, dataset, _, _, system, params = case_of("next_item")
    examples = batches.train_examples(dataset, "prefix", WIDTH)
    layout = batches.make_layout(examples, 200, WIDTH, room=1, last_target_only=True)
    batch = batch_at(jnp.asarray(dataset.items_A), layout, 0, 0)
    value, _ = loss_of(config, system, params, batch, **STILL)
    table, wanted = np.asarray(params["items"], np.float64)[1 : ITEMS + 1], []
    prefixes = [dataset.items_A[s : s + n] for s, n in zip(examples.start_E, examples.length_E, strict=True)]
    offsets = np.cumsum([0, *map(len, prefixes)]).astype(np.int64)
    alone = dataclasses.replace(dataset, items_A=np.concatenate(prefixes), offsets_U1=offsets)
    for state, end in zip(states_of(system, params, alone), examples.start_E + examples.length_E, strict=True):
        logits = table @ state
        wanted.append(np.log(np.exp(logits).sum()) - logits[dataset.items_A[end] - 1])
    assert value == pytest.approx(np.mean(wanted), rel=1e-4)


@pytest.mark.parametrize("name", ["profile", "cold_start"])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_metrics_count_every_example_of_the_part_once(name, batch_size):
    config, dataset, task, user_E, system, params = case_of(name, **{"eval.batch_size": batch_size})
    found = judge.make_task_evaluator(task, "test", dataset, config, MESH)
    number_E, head = task.parts["test"].user_E, np.asarray(params["head"], np.float64)[1 : CLASSES + 1]
    logits = states_of(system, params, dataset)[user_E[number_E]] @ head[:, :-1].T + head[:, -1]
    class_E = task.class_E[number_E] - 1
    ranks = 1 + (logits > logits[np.arange(len(class_E)), class_E][:, None]).sum(axis=1)
    metrics = found(system, params)
    if name == "cold_start":
        assert metrics["mrr@10"] == pytest.approx(np.mean(1 / ranks)) and metrics["hr@1"] == np.mean(ranks == 1)
    else:
        assert metrics["accuracy"] == pytest.approx(np.mean(ranks == 1))
        assert metrics["majority"] == pytest.approx(np.bincount(class_E).max() / len(class_E))
        assert np.array(found.confusion(system, params)).sum() == len(class_E)


def test_macro_f1_of_a_hand_made_case():
    counts = judge.confusion(np.array([1, 1, 1, 2, 2, 3]), np.array([1, 1, 2, 2, 3, 3]), 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    found = judge.profile_metrics(counts)  # precision 1, 1/2, 1/2; recall 2/3, 1/2, 1; the fourth class is nowhere
    assert found == pytest.approx({"accuracy": 4 / 6, "majority": 3 / 6, "macro_f1": (0.8 + 0.5 + 2 / 3) / 3})


# End to end -----------------------------------------------------------------------------------------------------------


def flags_of(**settings):
    small = {"data.synthetic_users": 120, "data.synthetic_items": 60, "encoder.max_length": 8, "encoder.dim": 8,
             "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 32, "train.max_epochs": 2}  # fmt: skip
    return [f"--config.{key}={value}" for key, value in (small | settings).items()]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A workdir of two epochs of CLUE."""
    folder = tmp_path_factory.mktemp("clue") / "pretrained"
    assert main([f"--config={PRETRAIN}", f"--workdir={folder}", *flags_of()]) == 0
    return folder


def finetune(pretrained, workdir, **settings):
    flags = flags_of(**{"init_from": pretrained, **settings})
    return main([f"--config={FINETUNE}", f"--workdir={workdir}", *flags])


def test_pretraining_describes_users_and_hands_on_its_last_checkpoint(pretrained):
    results = json.loads((pretrained / "results.json").read_text())
    assert results["test"] == results["valid"] == {} and results["best_step"] == results["steps"]
    assert {"alignment", "uniformity", "mean_cosine"} <= results["analysis"].keys()
    assert (pretrained / "plots" / "users.png").is_file()
    assert np.load(pretrained / "analysis.npz")["users_Nx2"].shape == (120, 2)
    lines = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert all({"spread", "above_minimum"} <= line.keys() for line in lines if line["kind"] == "train")
    assert main(["--mode=recommend", f"--workdir={pretrained}", "--history=1,2"]) == 2
    assert main(["--mode=evaluate", f"--workdir={pretrained}"]) == 2


@pytest.mark.slow
def test_resumed_pretraining_has_the_same_batch_statistics(pretrained, tmp_path):
    """Stopped after two epochs or not: equal parameters and running statistics, bit for bit."""
    shutil.copytree(pretrained, tmp_path / "resumed")
    rests = []
    for name in ("resumed", "whole"):
        assert main([f"--config={PRETRAIN}", f"--workdir={tmp_path / name}", *flags_of(**{"train.max_epochs": 3})]) == 0
        store, step, _ = checkpoint.find(tmp_path / name, "last")
        parts = ocp.args.Composite(params=ocp.args.StandardRestore(), rest=ocp.args.StandardRestore())
        rests.append(dict(store.manager.restore(step, args=parts)))
    assert rests[0]["rest"]["state"]["projector"]["layer_0"]["mean"].any()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *rests))


@pytest.mark.slow
def test_profile_in_folds_that_resume(pretrained, tmp_path, capsys):
    settings = {"profile.folds": 2, "train.max_epochs": 1}
    assert finetune(pretrained, tmp_path, **settings) == 0
    said = capsys.readouterr().out
    assert "profile taste (test)" in said and "deviation of 2 folds" in said
    results = json.loads((tmp_path / "results.json").read_text())
    folds = [json.loads((tmp_path / "folds" / str(k) / "results.json").read_text()) for k in range(2)]
    accuracies = [fold["test"]["accuracy"] for fold in folds]
    assert results["test"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert results["std"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    assert results["protocol"] == "profile"
    assert main(["--mode=evaluate", f"--workdir={tmp_path}"]) == 2
    assert "a profile in folds is judged once" in capsys.readouterr().err
    assert main(["--mode=embed", f"--workdir={tmp_path}", f"--out={tmp_path}/v.parquet"]) == 2
    assert f"name one of them: --workdir={tmp_path}/folds/0" in capsys.readouterr().err
    again = ["--mode=evaluate", f"--workdir={tmp_path}/folds/1", "--config.profile.folds=1"]
    assert main(again) == 2, "another split would test users whom this fold was trained on"
    assert "was trained with config.profile.folds=2, not 1" in capsys.readouterr().err
    assert np.sum(results["confusion"]) == 120 and results["parent"]["left_out"] == ["predictor", "projector"]
    assert (tmp_path / "plots" / "confusion.png").is_file()
    for path in (tmp_path / "results.json", tmp_path / "folds" / "1" / "results.json"):
        path.unlink()
    assert finetune(pretrained, tmp_path, **settings) == 0
    assert json.loads((tmp_path / "results.json").read_text())["test"] == results["test"]


@pytest.mark.slow
def test_a_profile_reads_the_vectors_of_a_file(pretrained, tmp_path, capsys):
    """--mode=embed to profile.vectors: the linear probe of that encoder, as freeze_encoder makes it."""
    folder, path = tmp_path / "vectors", tmp_path / "users.parquet"
    assert main(["--mode=embed", f"--workdir={pretrained}", f"--out={path}"]) == 0
    settings = {"profile.folds": 1, "train.max_epochs": 3, "train.learning_rate": 0.05}
    assert finetune("", folder, **settings, **{"profile.vectors": path}) == 0
    assert finetune(pretrained, tmp_path / "probe", **settings, freeze_encoder=True) == 0
    given, frozen = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("vectors", "probe"))
    assert given["test"]["accuracy"] == frozen["test"]["accuracy"] and given["best_step"] == frozen["best_step"]
    store, step, _ = checkpoint.find(folder)
    params = checkpoint.restore_params(store, step, MESH)
    assert params.keys() == {"vectors", "head"}
    ids = pl.read_parquet(path)["user_id"].to_list()
    assert np.array_equal(params["vectors"], read_vectors(path, ids))  # not trained
    assert np.abs(params["head"][1:]).max() > 0.1

    assert main(["--mode=evaluate", f"--workdir={folder}"]) == 0
    assert main(["--mode=embed", f"--workdir={folder}", f"--out={tmp_path}/v.parquet"]) == 2
    assert finetune(folder, tmp_path / "other") == 2
    assert finetune(pretrained, tmp_path / "both", **{"profile.vectors": path}) == 2
    pl.read_parquet(path).head(100).write_parquet(path)
    assert finetune("", tmp_path / "few", **{"profile.vectors": path}) == 2
    said = capsys.readouterr().err
    assert all(words in said for words in ("makes none", "has no encoder", "stand for the encoder", "20 are missing"))


@pytest.mark.slow
def test_cold_start_and_next_item_from_the_same_checkpoint(pretrained, tmp_path, capsys):
    targets = tmp_path / "targets.txt"
    targets.write_text("".join(f"{user} {user % 7 + 1} {user % 5 + 3}\n" for user in range(1, 101)))
    settings = {"task": "cold_start", "cold_start.targets": targets}
    assert finetune(pretrained, tmp_path / "cold", **settings) == 0
    results = json.loads((tmp_path / "cold" / "results.json").read_text())
    assert {"mrr@10", "hr@10"} <= results["test"].keys() and results["metric"] == "mrr@10"
    assert main(["--mode=evaluate", f"--workdir={tmp_path}/cold"]) == 0
    found = json.loads((tmp_path / "cold" / "results_cold_start.json").read_text())
    assert found["test"] == results["test"]
    targets.write_text(targets.read_text().replace("1 2 4", "1 2 5"))
    assert main(["--mode=evaluate", f"--workdir={tmp_path}/cold"]) == 2
    assert "trained on data" in capsys.readouterr().err
    settings = {"task": "next_item", "train.max_steps": 4, "report.baselines": "pop"}
    assert finetune(pretrained, tmp_path / "next", **settings) == 0
    assert main(["--mode=recommend", f"--workdir={tmp_path}/next", "--history=1,2,3", "--k=5"]) == 0


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "the workdir of a pretraining run"),
        (["--config.init_from=", "--config.task=cold_start"], "set --config.cold_start.targets=FILE"),
        (["--config.init_from=", "--config.profile.labels="], "set --config.profile.labels=FILE"),
        (["--config.init_from=", "--config.profile.folds=31"], "do not make 31 folds"),
        (["--config.task="], "a task belongs to system=downstream"),
        (["--config.train.targets=all"], "train.targets=all"),
        (["--config.loss.next_item=bce"], "loss.next_item=bce"),
        (["--config.task=next_item", "--config.freeze_encoder=true"], "leaves task=next_item nothing to train"),
        (["--config.freeze_encoder=true", "--config.train.weight_decay=0.1"], "train.weight_decay=0.1"),
        (["--config.report.baselines=pop"], "rank items, task=profile does not"),
        (["--config.data.hold_out=false"], "would train on what it is tested on"),
    ],
)
def test_bad_settings_end_with_code_2(tmp_path, capsys, flags, said):
    small = ["--config.data.synthetic_users=60", "--config.data.synthetic_items=30"]
    assert main([f"--config={FINETUNE}", f"--workdir={tmp_path}/run", *small, *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_checkpoint_without_the_token_is_refused(tmp_path, capsys):
    flags = flags_of(**{"train.max_steps": 1, "report.baselines": ""})
    assert main([f"--config={ROOT / 'configs' / 'sasrec.py'}", f"--workdir={tmp_path}/sasrec", *flags]) == 0
    assert finetune(tmp_path / "sasrec", tmp_path / "run") == 2
    assert "its encoder has no [UR] token" in capsys.readouterr().err


def test_folds_test_everybody_once_and_the_paper_split_some(tmp_path):
    for folds, count, tested in ((5, 5, 200), (1, 1, 30)):
        changes = [("profile.folds", folds), ("profile.label", "taste"), ("data.synthetic_users", 200)]
        config = load(FINETUNE, [(key, str(value)) for key, value in changes])
        tasks = read_tasks(config, prepare(config.data, tmp_path))
        users = np.concatenate([task.parts["test"].user_E for task in tasks])
        assert len(tasks) == count and len(set(users)) == len(users) == tested
