"""Figures of the representations against brute force over all pairs in float64; the collapse watch in whole runs."""

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqrec_jax import analysis, report, run, systems, train
from seqrec_jax.config import load
from seqrec_jax.data.batches import train_counts
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.main import main
from seqrec_jax.sharding import make_mesh
from seqrec_jax.systems import System, hparams_of
from seqrec_jax.workdir import read_lines

SASREC = str(Path(__file__).resolve().parents[1] / "configs" / "sasrec.py")
# Five steps an epoch.
TINY = {
    "data.synthetic_users": 100, "data.synthetic_items": 300, "encoder.max_length": 16, "encoder.dim": 8,
    "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 24, "train.schedule": "constant",
    "report.baselines": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prepared data and compiled programs, one folder for the whole session."""
    return tmp_path_factory.getbasetemp() / "cache"


def values_of(cache, **changes):
    values = TINY | {"data.cache_dir": cache} | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: str(value) for key, value in values.items()}


def config_of(cache, **changes):
    return load(SASREC, values_of(cache, **changes).items())


def results_of(cache, workdir, **changes):
    """results.json of a run from the command line, which keeps compiled programs."""
    flags = [f"--config.{key}={value}" for key, value in values_of(cache, **changes).items()]
    assert main([f"--config={SASREC}", f"--workdir={workdir}", *flags]) == 0
    return json.loads((workdir / "results.json").read_text())


def random_rows(rows=41, width=6, seed=0):
    """Rows of unlike lengths around a common direction."""
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(rows, width)) + 1.5) * generator.uniform(0.1, 9, (rows, 1))


def units(rows):
    return [row / np.sqrt((row**2).sum()) for row in rows]


def pairs_of(rows):
    return itertools.combinations(units(rows), 2)


# Figures


def test_alignment_is_the_mean_squared_distance_of_the_pairs():
    one, other = random_rows(seed=1), random_rows(seed=2)
    expected = np.mean([((x - y) ** 2).sum() for x, y in zip(units(one), units(other), strict=True)])
    assert analysis.alignment(jnp.array(one), jnp.array(other)) == pytest.approx(expected, rel=1e-5)


def test_target_alignment_is_that_of_all_pairs_with_one_target():
    rows, targets = random_rows(), np.random.default_rng(3).integers(1, 9, 41) * 1000
    same = [one == other for one, other in itertools.combinations(targets, 2)]
    distances = [((x - y) ** 2).sum() for x, y in pairs_of(rows)]
    found = analysis.target_alignment(jnp.array(rows), jnp.array(targets))
    assert sum(same) > 50 and found == pytest.approx(np.mean(np.array(distances)[same]), rel=1e-5)


@pytest.mark.parametrize("block", [2**22, 41 * 4, 1])
def test_uniformity_is_that_of_all_pairs_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr(analysis, "BLOCK_SCORES", block)
    rows = random_rows()
    expected = np.log(np.mean([np.exp(-2 * ((x - y) ** 2).sum()) for x, y in pairs_of(rows)]))
    assert analysis.uniformity(jnp.array(rows)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_mean_cosine_is_that_of_all_pairs(flip):
    rows = random_rows() * np.where(np.arange(41) % 2 * flip, -1, 1)[:, None]
    expected = np.mean([x @ y for x, y in pairs_of(rows)])
    assert analysis.mean_cosine(jnp.array(rows)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_figures_without_a_pair_are_nan():
    assert np.isnan(analysis.target_alignment(jnp.array(random_rows()), jnp.arange(41)))
    assert np.isnan(analysis.uniformity(jnp.ones((1, 3)))) and np.isnan(analysis.mean_cosine(jnp.ones((1, 3))))


@pytest.mark.parametrize("shape", [(41, 6), (4, 6)])
def test_spectrum_and_effective_rank(shape):
    rows = random_rows(*shape)
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(rows @ rows.T)[::-1][: min(shape)], 0))
    found = analysis.spectrum(jnp.array(rows))
    assert np.asarray(found) == pytest.approx(values / values[0], rel=1e-4, abs=1e-6)
    share = values / values.sum()
    assert analysis.effective_rank(found) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)


def test_user_rank_is_that_of_the_directions_around_their_mean():
    generator = np.random.default_rng(0)
    for count, dims in ((300, 1), (300, 3), (5, 8)):
        x_NxD = generator.normal(size=(count, dims)) @ generator.normal(size=(dims, 8)) + 2
        unit_NxD = x_NxD / np.linalg.norm(x_NxD, axis=1, keepdims=True)
        values_D = np.linalg.svd(unit_NxD - unit_NxD.mean(axis=0), compute_uv=False)
        share_D = values_D[values_D > 1e-9] / values_D.sum()
        wanted = np.exp(-(share_D * np.log(share_D)).sum())
        assert analysis.user_rank(jnp.asarray(x_NxD, jnp.float32)) == pytest.approx(wanted, rel=1e-3)
    assert np.isnan(analysis.user_rank(jnp.ones((4, 8))))


def test_effective_rank_of_known_tables():
    equal, single = jnp.array(np.tile(np.eye(5), (3, 1))), jnp.ones((7, 3))
    assert analysis.effective_rank(analysis.spectrum(equal)) == pytest.approx(5, rel=1e-5)
    assert analysis.effective_rank(analysis.spectrum(single)) == pytest.approx(1, abs=1e-3)


def test_projection_keeps_the_two_largest_directions():
    rows = random_rows()
    places = np.asarray(analysis.project(jnp.array(rows)))
    left, values, _ = np.linalg.svd(rows)
    assert np.abs(places) == pytest.approx(np.abs(left[:, :2] * values[:2]), rel=1e-3, abs=1e-4)
    assert (places.mean(axis=0) > 0).all()
    assert np.asarray(analysis.project(jnp.array(rows[:, :1])))[:, 0] == pytest.approx(rows[:, 0], rel=1e-5)


@pytest.mark.parametrize("block", [2**22, 1])
def test_top_items_are_the_best_real_ones_and_equal_ones_by_lower_id(monkeypatch, block):
    monkeypatch.setattr(analysis, "BLOCK_SCORES", block)
    generator = np.random.default_rng(0)
    states, items = generator.integers(-2, 3, (13, 4)), generator.integers(-2, 3, (64, 4))
    scores = states @ items.T
    best = [sorted(range(1, 31), key=lambda item, own=own: (-own[item], item))[:10] for own in scores]
    found = analysis.top_items(jnp.array(states, jnp.float32), jnp.array(items, jnp.float32), 30, 10)
    assert np.asarray(found).tolist() == best


# Samples of a data set


def random_dataset(users=60, items=30):
    """Users with 1 and 2 items among the others."""
    generator = np.random.default_rng(0)
    histories = [generator.integers(1, items + 1, n) for n in generator.integers(1, 20, users)]
    offsets = np.cumsum([0, *map(len, histories)])
    flat = np.concatenate(histories).astype(np.int32)
    return SequenceDataset(flat, offsets, np.arange(1, items + 1).astype(str), np.arange(users).astype(str), "", {})


def history_of(dataset, user):
    return dataset.items_A[dataset.offsets_U1[user] : dataset.offsets_U1[user + 1]].tolist()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("size", "count"),
    [(1000, 49), (20, 20)],  # 49 users have 3 items or more
)
def test_sample_holds_validation_histories_with_their_targets(monkeypatch, cache, packed, size, count):
    monkeypatch.setattr(analysis, "ENCODED", 7)  # several steps
    dataset = random_dataset()
    sample = analysis.make_sample(dataset, config_of(cache, train__packed=packed), size, make_mesh(1, 1))
    batches = jax.device_get(sample.batches)
    user_N = batches.users_U.reshape(-1)[sample.slot_N]
    assert len(user_N) == len(set(user_N)) == count
    assert all(len(history_of(dataset, user)) > 2 for user in user_N)
    assert np.asarray(sample.target_N).tolist() == [history_of(dataset, user)[-2] for user in user_N]
    last_N = [
        step_items.reshape(-1)[last] for step_items, last in zip(batches.items_RxL, last_cells(batches), strict=True)
    ]
    assert np.concatenate(last_N)[sample.slot_N].tolist() == [history_of(dataset, user)[-3] for user in user_N]


def last_cells(batches):
    """The flat cell of each history's last item, step by step."""
    ends = batches.row_U * batches.items_RxL.shape[-1] + batches.column_U + batches.length_U - 1
    return np.maximum(ends, 0)


def test_training_counts_leave_the_held_out_items_out():
    dataset = random_dataset()
    counts = np.zeros(31, int)
    for user in range(60):
        history = history_of(dataset, user)
        for item in history[:-2] if len(history) > 2 else history:
            counts[item] += 1
    assert train_counts(dataset).tolist() == counts.tolist()


@pytest.fixture(scope="module")
def model(cache):
    """(system, params, analysis of it, config, dataset) of an untrained SASRec."""
    config, dataset = config_of(cache), random_dataset()
    mesh = make_mesh(1, 1)
    system = systems.build(config, dataset, mesh)
    return system, system.init(jax.random.key(0)), analysis.Analysis(dataset, config, mesh), config, dataset


def test_figures_do_not_see_padding_and_special_rows(model):
    system, params, looks, _, _ = model
    table = params["items"].at[31:].set(9.0)  # row 0 is in no real cell
    figures = looks.figures(system, params)
    assert figures == looks.figures(system, params | {"items": table.at[0].set(7.0)})
    assert looks.watch(system, params) == looks.watch(system, params | {"items": table})


def test_figures_are_those_of_the_parts(model):
    system, params, looks, _, _ = model
    sample, figures = looks.compared, looks.figures(system, params)
    items = np.asarray(params["items"], np.float64)[1:31]
    states_UxD = np.concatenate(
        [system.states(params, jax.tree.map(lambda leaf, t=t: leaf[t], sample.batches))
         for t in range(len(sample.batches.users_U))]
    )[sample.slot_N]  # fmt: skip
    expected = np.log(np.mean([np.exp(-2 * ((x - y) ** 2).sum()) for x, y in pairs_of(states_UxD)]))
    assert figures["uniformity"] == pytest.approx(expected, rel=1e-4)
    assert figures["item_cosine"] == pytest.approx(np.mean([x @ y for x, y in pairs_of(items)]), abs=1e-5)
    watched = looks.watch(system, params)
    assert watched["mean_cosine"] == pytest.approx(np.mean([x @ y for x, y in pairs_of(states_UxD)]), rel=1e-4)
    best = [frozenset(np.argsort(-(items @ state))[:10]) for state in states_UxD]
    assert watched["same_top10"] == max(map(best.count, best)) / len(best)


def test_alignment_is_that_of_dropout_and_evaluation_has_none(model):
    system, params, looks, config, _ = model
    none = config.copy_and_resolve_references().unlock()
    none.encoder.update(embedding_dropout=0.0, hidden_dropout=0.0)
    without = dataclasses.replace(looks, config=none)
    assert without.figures(system, params)["alignment"] == pytest.approx(0, abs=1e-6)
    assert looks.figures(system, params)["alignment"] > 0.1
    batch = jax.tree.map(lambda leaf: leaf[0], looks.compared.batches)
    plain = system.states(params, batch)
    assert np.array_equal(plain, system.states(params, batch))
    assert not np.array_equal(plain, system.states(params, batch, jax.random.key(0), hparams_of(config)))


def test_figures_without_a_pair_are_left_out(cache):
    offsets, items = np.array([0, 4]), np.array([1, 2, 3, 4], np.int32)
    dataset = SequenceDataset(items, offsets, np.arange(1, 5).astype(str), np.array(["u"]), "", {})
    config, mesh = config_of(cache), make_mesh(1, 1)
    looks, system = analysis.Analysis(dataset, config, mesh), systems.build(config, dataset, mesh)
    params = system.init(jax.random.key(0))
    assert looks.figures(system, params).keys() == {"alignment", "item_cosine", "effective_rank"}
    seen = looks.watch(system, params)
    assert seen == {"same_top10": 1.0} and looks.collapse(7, seen) is None


# The collapse watch


def looks_at(users):
    looks = analysis.Analysis(dataset=SimpleNamespace(item_ids=range(100)), config=None, mesh=None)
    vars(looks)["watched"] = SimpleNamespace(slot_N=np.arange(users))
    return looks


@pytest.mark.parametrize(
    ("cosine", "share", "users", "gives_alarm"),
    [
        (0.995, 0.1, 500, True), (0.2, 0.6, 500, True), (0.99, 0.5, 500, False), (0.2, 1.0, 99, False),
        (1.0, 1.0, 99, True),
    ],
)  # fmt: skip
def test_alarm_is_given_above_the_bounds(cosine, share, users, gives_alarm):
    looks = looks_at(users)
    seen = {"mean_cosine": cosine, "same_top10": share}
    assert looks.collapse(7, seen) == ({"step": 7} | seen if gives_alarm else None)


def test_an_alarm_lasts_until_a_later_model_recovers(caplog):
    looks, progress = looks_at(users=500), train.Progress()
    steps = []
    for step, cosine in enumerate((0.3, 1.0, 1.0, 0.3, 1.0, 1.0)):
        train._judge(looks, progress, step, {"mean_cosine": cosine, "same_top10": 0.1})
        steps.append(progress.collapsed and progress.collapsed["step"])
    assert steps == [None, 1, 1, None, 4, 4]
    told = [message[:21] for message in warnings_of(caplog)]
    assert told == ["COLLAPSED: at step 1 ", "recovered: at step 3 ", "COLLAPSED: at step 4 "]


@pytest.fixture
def constant(monkeypatch):
    """Every system's users have one and the same state."""
    monkeypatch.setattr(report, "plots", lambda *_: None)
    build = systems.build

    def collapsed(*arguments):
        system = build(*arguments)

        def states(params, batch, key=None, hparams=None):
            return jnp.ones((len(batch.users_U), params["items"].shape[1]))

        return System(system.init, states, system.loss, system.data) if system.loss else system

    monkeypatch.setattr(systems, "build", collapsed)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.slow
def test_constant_states_give_alarm_once_after_three_epochs(constant, cache, tmp_path, caplog):
    config = config_of(cache, train__max_epochs=5)
    stop = SimpleNamespace(is_set=iter([False] * 4 + [True]).__next__)  # a dispatch an epoch
    with pytest.raises(train.Stopped, match="step 20"):
        run.train_and_evaluate(config, tmp_path, stop)
    results = results_of(cache, tmp_path, train__max_epochs=5)
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["kind"] == "valid"]
    assert [line["mean_cosine"] > 0.99 and line["same_top10"] == 1 for line in lines] == [True] * 5
    told = [message for message in warnings_of(caplog) if "COLLAPSED" in message]
    assert len(told) == 1 and "step 15" in told[0] and "1.0000" in told[0] and "100%" in told[0]
    assert results["collapsed"] == {"step": 15, "mean_cosine": lines[2]["mean_cosine"], "same_top10": 1.0}


def test_shorter_run_is_judged_by_its_best_checkpoint(constant, cache, tmp_path, caplog):
    results = results_of(cache, tmp_path, train__max_epochs=2)
    assert results["collapsed"]["step"] == results["best_step"]
    assert sum("COLLAPSED" in message for message in warnings_of(caplog)) == 1


@pytest.mark.parametrize("judged", ["end", "never"])
def test_states_that_begin_alike_are_judged_at_the_end_or_never(constant, cache, tmp_path, monkeypatch, judged):
    build = systems.build
    monkeypatch.setattr(systems, "build", lambda *arguments: dataclasses.replace(build(*arguments), judged=judged))
    results = results_of(cache, tmp_path, train__max_epochs=4)
    assert results["analysis"]["same_top10"] == 1
    assert (results["collapsed"] or {}).get("step") == (results["best_step"] if judged == "end" else None)


def test_normal_run_gives_no_alarm_and_leaves_its_figures(cache, tmp_path):
    assert main([f"--config={SASREC}:smoke", f"--workdir={tmp_path}", f"--config.data.cache_dir={cache}"]) == 0
    results, pop = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in (".", "baselines/pop"))
    assert results["collapsed"] is None and "collapsed" not in pop
    assert results["analysis"].keys() == {
        "alignment", "target_alignment", "uniformity", "user_rank", "item_cosine", "effective_rank", "mean_cosine",
        "same_top10",
    }  # fmt: skip
    arrays, items = report.read_arrays(tmp_path), results["dataset"]["items"]
    assert arrays["projection_Vx2"].shape == (items, 2) and arrays["train_count_V"].shape == (items,)
    share = arrays["spectrum_D"] / arrays["spectrum_D"].sum()
    assert results["analysis"]["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    for name in ("projection", "spectrum"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "plots" / "alignment.png").exists()
    assert "uniformity" not in read_lines(tmp_path / "metrics.jsonl")[-1]
