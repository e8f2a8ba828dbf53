"""Evaluation end to end: published popularity figures, released negatives, and brute force on made-up models."""

import gzip
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from seqrec_jax import config as configuration
from seqrec_jax import systems
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.prepare import prepare
from seqrec_jax.errors import UserError
from seqrec_jax.evaluate import make_evaluator, negatives_of
from seqrec_jax.sharding import make_mesh
from seqrec_jax.systems import System

ROOT = Path(__file__).resolve().parents[1]

# Published by CL4SRec and S3-Rec: HR@5, HR@10, HR@20, NDCG@5, NDCG@10, NDCG@20 of the popularity recommender.
GOLDEN = {
    ("beauty", "train", "B"): (0.0072, 0.0114, 0.0195, 0.0040, 0.0053, 0.0073),
    ("sports", "train", "B"): (0.0055, 0.0090, 0.0149, 0.0040, 0.0051, 0.0066),
    ("beauty", "all", "D"): (0.0080, 0.0152, 0.0217, 0.0044, 0.0068, 0.0084),
    ("sports", "all", "D"): (0.0056, 0.0094, 0.0192, 0.0041, 0.0053, 0.0078),
    ("yelp", "all", "D"): (0.0057, 0.0099, 0.0164, 0.0037, 0.0051, 0.0067),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def pop_config(name, shared_data, **settings):
    overrides = [("data.dir", str(shared_data)), *((key.replace("__", "."), text) for key, text in settings.items())]
    return configuration.load(f"{ROOT}/configs/pop.py:{name}", overrides)


@pytest.mark.parametrize(("name", "counts", "protocol"), GOLDEN)
def test_popularity_scores_as_published(shared_data, cache, name, counts, protocol):
    config = pop_config(name, shared_data, pop__counts=counts, eval__protocol=protocol, eval__batch_size="2048")
    dataset, mesh = prepare(config.data, cache), make_mesh(1, 1)
    system = systems.build(config, dataset, mesh)
    found = make_evaluator(dataset, config, "test", mesh)(system, system.init(jax.random.key(0)))
    figures = [found[f"{metric}@{cutoff}"] for metric in ("hr", "ndcg") for cutoff in (5, 10, 20)]
    assert [f"{figure:.4f}" for figure in figures] == [f"{figure:.4f}" for figure in GOLDEN[name, counts, protocol]]


def lines_of(path):
    with gzip.open(path, "rt") as lines:
        return {user: items for user, *items in map(str.split, lines)}


def test_released_negatives_are_ranked_with_the_mean_over_ties(shared_data, cache):
    """The oracle reads the two files itself and is first held against the figures of the data's README."""
    histories, negatives = lines_of(shared_data / "LastFM.txt.gz"), lines_of(shared_data / "LastFM_sample.txt.gz")
    names, counts = np.unique(sum(histories.values(), []), return_counts=True)
    count = dict(zip(names.tolist(), counts.tolist(), strict=True))
    scores = [[count[item] for item in (histories[user][-1], *negatives[user])] for user in histories]
    ranks = [(sum(s > own for s in others), sum(s == own for s in others)) for own, *others in scores]
    gains = {
        "hr": lambda rank, cutoff: rank <= cutoff,
        "ndcg": lambda rank, cutoff: (rank <= cutoff) / math.log2(rank + 1),
        "mrr": lambda rank, cutoff: (rank <= cutoff) / rank,
    }
    lucky = [("hr", 1, 0.0725), ("hr", 5, 0.1982), ("ndcg", 5, 0.1350), ("hr", 10, 0.3083), ("ndcg", 10, 0.1703)]
    for metric, cutoff, figure in [*lucky, ("mrr", 100, 0.1520)]:  # ties in favour of the target
        assert np.mean([gains[metric](above + 1, cutoff) for above, _ in ranks]) == pytest.approx(figure, abs=6e-5)

    config = pop_config(
        "lastfm", shared_data, eval__protocol="C", eval__negatives=str(shared_data / "LastFM_sample.txt.gz")
    )
    dataset, mesh = prepare(config.data, cache), make_mesh(1, 1)
    table = jnp.array([[0.0], *([float(count[item])] for item in dataset.item_ids)])  # counts, so there are ties
    found = make_evaluator(dataset, config, "test", mesh)(systems.build(config, dataset, mesh), {"items": table})
    assert sum(equal > 0 for _, equal in ranks) > 100
    for metric, gain in gains.items():
        for cutoff in (1, 5, 10, 20):
            mean = np.mean([np.mean([gain(a + 1 + i, cutoff) for i in range(e + 1)]) for a, e in ranks])
            assert found[f"{metric}@{cutoff}"] == pytest.approx(mean)
    assert found["mrr"] == pytest.approx(np.mean([np.mean([1 / (a + 1 + i) for i in range(e + 1)]) for a, e in ranks]))


# Made-up data ---------------------------------------------------------------------------------------------------------

ITEMS = 40


def random_dataset(users=90):
    """Repeats everywhere, and users with 1 and 2 items among the others."""
    generator = np.random.default_rng(0)
    histories = [generator.integers(1, ITEMS + 1, n) for n in generator.integers(1, 30, users)]
    offsets = np.cumsum([0, *map(len, histories)])
    items = np.concatenate(histories).astype(np.int32)
    return SequenceDataset(items, offsets, np.arange(1, ITEMS + 1).astype(str), np.arange(users).astype(str), "", {})


def history_of(dataset, user):
    return dataset.items_A[dataset.offsets_U1[user] : dataset.offsets_U1[user + 1]].tolist()


def config_of(**changes):
    config = get_config()
    config.encoder.update(max_length=8, dim=8, ffn=8, layers=1, init_scale=0.5)
    config.eval.update({"num_negatives": 5} | changes)
    return config


def brute_metrics(dataset, states, table, held_out, candidates_of):
    """HR@5 and MRR, user by user, with the mean over the places of a tied target."""
    hits, reciprocals = [], []
    for user in range(len(dataset.user_ids)):
        history = history_of(dataset, user)
        if len(history) < 3:
            continue
        target, before = history[-held_out], history[:-held_out]
        others = candidates_of(user, target, before)
        scores = table.astype(float) @ states[user]
        above, equal = ((scores[others] > scores[target]).sum(), (scores[others] == scores[target]).sum())
        ranks = np.arange(above + 1, above + equal + 2)
        missed = others is NOTHING
        hits.append(0 if missed else np.mean(ranks <= 5))
        reciprocals.append(0 if missed else np.mean(1 / ranks))
    return np.mean(hits), np.mean(reciprocals)


NOTHING: list[int] = []  # candidates of a user whose target is hidden


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("protocol", ["B", "D", "custom"])
def test_metrics_equal_brute_force_and_count_every_user_once(protocol, split):
    """The model looks its state up by user, with integer scores: a user left out or met twice shows in the means."""
    config = config_of(protocol=protocol)
    if protocol == "custom":
        config.eval.update(candidates="sampled", hide_history="no", metric="mrr")
    dataset, mesh = random_dataset(), make_mesh(1, 1)
    generator = np.random.default_rng(1)
    states = generator.integers(-3, 4, (len(dataset.user_ids), 2)).astype(np.float32)
    table = generator.integers(-3, 4, (64, 2)).astype(np.float32)
    table[0] = table[ITEMS + 1 :] = 100
    drawn = negatives_of(dataset, config, np.flatnonzero(np.diff(dataset.offsets_U1) >= 3))

    def candidates_of(user, target, before):
        if protocol == "custom":
            return drawn[user].tolist()
        hidden = set(before) if protocol == "D" else set()
        return NOTHING if target in hidden else sorted(set(range(1, ITEMS + 1)) - hidden - {target})

    hr, mrr = brute_metrics(dataset, states, table, {"valid": 2, "test": 1}[split], candidates_of)
    system = System(init=None, states=lambda params, batch: params["states"][jnp.maximum(batch.users_U, 0)])
    config.eval.batch_size, config.train.packed = (7, True) if split == "test" else (60, False)
    found = make_evaluator(dataset, config, split, mesh)(system, {"items": table, "states": states})
    assert (found["hr@5"], found["mrr"]) == pytest.approx((hr, mrr))


def test_metrics_do_not_depend_on_the_batches():
    config = config_of()
    dataset, mesh, found = random_dataset(200), make_mesh(1, 1), []
    system = systems.build(config, dataset, mesh)
    params = jax.jit(system.init)(jax.random.key(0))
    for batch_size, packed in ((7, True), (64, False), (300, True)):
        config.eval.batch_size, config.train.packed = batch_size, packed
        found.append(make_evaluator(dataset, config, "test", mesh)(system, params))
    assert found[0]["mrr"] > 0
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-4)


def test_drawn_negatives_are_seeded_unique_and_never_in_the_history():
    dataset, config = random_dataset(), config_of(protocol="C", negatives_seed=7)
    users = np.flatnonzero(np.diff(dataset.offsets_U1) >= 3)
    drawn = negatives_of(dataset, config, users)
    assert drawn.shape == (90, 5) and (drawn == negatives_of(dataset, config, users)).all()
    for user in users:
        assert len(set(drawn[user])) == 5 and not set(drawn[user]) & set(history_of(dataset, user))
        assert 1 <= drawn[user].min() and drawn[user].max() <= ITEMS
    config.eval.negatives_seed = 8
    assert not (drawn == negatives_of(dataset, config, users)).all()


def test_drawn_negatives_are_uniform_over_what_the_user_has_not_met():
    items = np.array([1, 2, 3] * 2000, np.int32)
    dataset = SequenceDataset(items, np.arange(2001) * 3, np.arange(8).astype(str), np.arange(2000).astype(str), "", {})
    drawn = negatives_of(dataset, config_of(num_negatives=2), np.arange(2000))
    np.testing.assert_allclose(np.bincount(drawn.ravel(), minlength=9) / 4000, [0] * 4 + [0.2] * 5, atol=0.025)


def test_a_users_negatives_stand_in_one_line(tmp_path):
    items = np.array([1, 2, 3], np.int32)
    dataset = SequenceDataset(items, np.array([0, 3]), np.arange(8).astype(str), np.array(["u"]), "", {})
    (tmp_path / "negatives.txt").write_text("u 4\n\nu 5\n")
    with pytest.raises(UserError, match="negatives.txt:3: user u has negatives already"):
        negatives_of(dataset, config_of(num_negatives=1, negatives=str(tmp_path / "negatives.txt")), np.array([0]))


def test_too_few_items_for_the_negatives_is_an_error():
    dataset = random_dataset()
    with pytest.raises(UserError, match="num_negatives|negatives"):
        negatives_of(dataset, config_of(num_negatives=40), np.arange(90))
