"""Ranks and metrics against brute force. Scores are integers, so that ties are exact and counts must be equal."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqrec_jax import native, ranking
from seqrec_jax.data.dataset import first_occurrences

ITEMS, ROWS, DIM = 53, 64, 2
BLOCKS = (7, 17, 64, 10**6)
WAYS = (*BLOCKS, "kernel")
in_blocks = jax.jit(ranking.count_better, static_argnums=(3, 5), static_argnames="alone")


def count_better(*arguments):
    """In blocks of the last argument, or by the kernel for a CPU."""
    if arguments[-1] != "kernel":
        return in_blocks(*arguments)
    if jax.default_backend() != "cpu" or not native.kernels():
        pytest.skip("needs a C compiler, and JAX on a CPU")
    return in_blocks(*arguments[:-1], 0, alone=True)


def case(seed=0):
    """(states, items, targets, histories): ties everywhere, repeats, a long history, hidden targets, an empty one."""
    generator = np.random.default_rng(seed)
    histories = [generator.integers(1, ITEMS + 1, n) for n in (0, 1, 5, 30, 30, 200, 9, 12, 3, 64, 65)]
    states = generator.integers(-2, 3, (len(histories), DIM)).astype(np.float32)
    items = generator.integers(-2, 3, (ROWS, DIM)).astype(np.float32)
    items[0] = items[ITEMS + 1 :] = 1000  # no candidates, whatever they score
    targets = generator.integers(1, ITEMS + 1, len(histories)).astype(np.int32)
    targets[3] = histories[3][7]
    return states, items, targets, histories


def hidden_of(histories):
    offsets = np.cumsum([0, *map(len, histories)])
    items = np.concatenate(histories).astype(np.int32)
    first = first_occurrences(items, offsets)
    return ranking.Hidden(*jax.device_put((items, first, offsets[:-1].astype(np.int32), offsets[1:].astype(np.int32))))


def brute_counts(states, items, targets, histories):
    counts = []
    for state, target, history in zip(states.astype(float), targets.tolist(), histories, strict=True):
        others = set(range(1, ITEMS + 1)) - {target} - set(map(int, history))
        scores = [state @ items[item] for item in others]
        own = state @ items[target]
        counts.append((sum(s > own for s in scores), sum(s == own for s in scores), target in history))
    return [list(column) for column in zip(*counts, strict=True)]


def brute_metrics(greater, tied, missed, cutoff):
    """hr, ndcg and mrr at a cutoff: the mean over every order of the target (0) and those tied with it."""
    sums = np.zeros(3)
    for above, equal, miss in zip(greater, tied, missed, strict=True):
        orders = list(itertools.permutations(range(equal + 1)))
        for order in orders:
            rank = above + 1 + order.index(0)
            if rank <= cutoff and not miss:
                sums += np.array([1, 1 / np.log2(rank + 1), 1 / rank]) / len(orders)
    return sums / len(greater)


@pytest.mark.parametrize("block", WAYS)
def test_counts_equal_brute_force(block):
    for seed in range(5):
        states, items, targets, histories = case(seed)
        found = count_better(states, items, targets, ITEMS, hidden_of(histories), block)
        assert [x.tolist() for x in found] == brute_counts(states, items, targets, histories)
        found = count_better(states, items, targets, ITEMS, None, block)
        assert [x.tolist() for x in found] == brute_counts(states, items, targets, [[]] * len(targets))


@pytest.mark.parametrize("users", [1, 63, 64, 130])
def test_the_kernel_finds_equal_items_tied_whatever_their_scores(users):
    """Of 3,000 items each is there three times; users are no whole block, entries no whole vector, parts several."""
    generator = np.random.default_rng(0)
    once = generator.normal(size=(1_000, 50)).astype(np.float32)
    items = np.concatenate([once[:1], *[once] * 3])
    states = generator.normal(size=(users, 50)).astype(np.float32)
    targets = generator.integers(1, 3_001, users)
    histories = [np.append(generator.integers(1, 3_001, 40), targets[0]) for _ in range(users)]
    found = count_better(states, items, jnp.asarray(targets), 3_000, hidden_of(histories), "kernel")
    scores = states.astype(float) @ items.T.astype(float)
    for user, (target, history) in enumerate(zip(targets, histories, strict=True)):
        others = np.setdiff1d(np.arange(1, 3_001), [target, *history])
        twins = (others - target) % 1_000 == 0
        greater = (scores[user, others[~twins]] > scores[user, target]).sum()  # no two others are nearer than rounding
        assert [int(x[user]) for x in found] == [greater, twins.sum(), target in history]


def test_metrics_are_the_mean_over_every_order_of_the_ties():
    generator = np.random.default_rng(0)
    greater, tied, missed = generator.integers(0, 24, 40), generator.integers(0, 6, 40), generator.random(40) < 0.2
    found = ranking.metrics(greater, tied, missed)
    for cutoff in (1, 5, 10, 20):
        expected = brute_metrics(greater, tied, missed, cutoff)
        assert [found[f"{name}@{cutoff}"] for name in ("hr", "ndcg", "mrr")] == pytest.approx(expected)
    assert found["mrr"] == pytest.approx(brute_metrics(greater, tied, missed, 10**9)[2])
    assert len(found) == 13


def test_metrics_of_ranks_known_by_hand():
    one = lambda *counts: ranking.metrics(*(np.array([x]) for x in counts))  # noqa: E731
    assert one(0, 0, False)["ndcg@1"] == one(0, 0, False)["mrr"] == 1
    assert one(2, 0, False)["ndcg@5"] == pytest.approx(0.5) and one(2, 0, False)["mrr@1"] == 0
    assert one(9, 1, False)["hr@10"] == pytest.approx(0.5) and one(10, 0, False)["hr@10"] == 0
    assert one(3, 10**6, False)["hr@5"] == pytest.approx(2 / (10**6 + 1))
    assert set(one(0, 0, True).values()) == {0.0}


@pytest.mark.parametrize("block", WAYS)
def test_a_constant_model_scores_like_chance(block):
    targets = np.arange(1, ITEMS + 1, dtype=np.int32)
    ones = np.ones((ROWS, 1), np.float32)
    found = ranking.metrics(*map(np.asarray, count_better(ones[:ITEMS], ones, targets, ITEMS, None, block)))
    for cutoff in (1, 5, 10, 20):
        ranks = np.arange(1, cutoff + 1)
        assert found[f"hr@{cutoff}"] == pytest.approx(cutoff / ITEMS)
        assert found[f"ndcg@{cutoff}"] == pytest.approx((1 / np.log2(ranks + 1)).sum() / ITEMS)
        assert found[f"mrr@{cutoff}"] == pytest.approx((1 / ranks).sum() / ITEMS)


@pytest.mark.parametrize("block", WAYS)
@pytest.mark.parametrize("hides", [False, True])
def test_a_model_of_nan_scores_worst(block, hides):
    states, items, targets, histories = case()
    hidden = hidden_of(histories) if hides else None
    greater, tied, missed = map(np.asarray, count_better(states * np.nan, items, targets, ITEMS, hidden, block))
    others = [ITEMS - len({t, *map(int, h if hides else [])}) for t, h in zip(targets.tolist(), histories, strict=True)]
    assert not tied.any() and (greater >= others).tolist() == [True] * len(others)
    assert missed[3] == hides


@pytest.mark.parametrize("block", [17, "kernel"])
def test_an_item_of_nan_counts_as_above(block):
    states, items, targets, _ = case()
    states = states + 0.5  # no state is zero
    items[20] = np.nan
    targets[:] = 21
    greater, tied, _ = map(np.asarray, count_better(states, items, targets, ITEMS, None, block))
    items[20] = 0  # after the results are there: JAX may read a numpy array in place
    without = np.array(brute_counts(states, items, targets, [[20]] * len(targets))[:2])
    assert greater.tolist() == (without[0] + 1).tolist() and tied.tolist() == without[1].tolist()


def test_counts_of_given_candidates():
    states, items, targets, _ = case()
    generator = np.random.default_rng(1)
    negatives = np.array([generator.choice(np.setdiff1d(np.arange(1, ITEMS + 1), t), 20, False) for t in targets])
    others = [sorted(set(range(1, ITEMS + 1)) - set(row)) for row in negatives.tolist()]
    expected = brute_counts(
        states, items, targets, [[i for i in o if i != t] for o, t in zip(others, targets, strict=True)]
    )
    found = ranking.count_better_of(states, items, targets, negatives)
    assert [x.tolist() for x in found] == expected
    items[negatives[0, 3]] = np.nan
    worst = ranking.count_better_of(states * np.nan, items, targets, negatives)
    assert (np.asarray(worst[0]) == 20).all() and not worst[1].any()


def test_first_occurrences():
    histories = [[3, 3, 1, 3], [], [1, 1], [3, 2, 1], [2, 5, 2, 5, 2]]
    offsets = np.cumsum([0, *map(len, histories)])
    expected = [item not in history[:place] for history in histories for place, item in enumerate(history)]
    assert first_occurrences(np.concatenate(histories).astype(np.int32), offsets).tolist() == expected


def test_a_full_block_of_better_items_does_not_overflow_the_two_counts(monkeypatch):
    monkeypatch.setattr(ranking, "MOST_COUNTED", 2**6)
    items_VxD = np.concatenate([[[0.0], [0.0]], np.ones((254, 1))]).astype(np.float32)  # item 1 is below all others
    greater_U, tied_U, _ = ranking.count_better(jnp.ones((1, 1)), items_VxD, jnp.array([1]), 255, None, 2**6)
    assert (int(greater_U[0]), int(tied_U[0])) == (254, 0)


@pytest.mark.parametrize("every", [1, 7, 10**6])
def test_blocks_of_several_parts_count_exactly(every):
    """A padded block of four parts; each `every`-th item is above item 1, the others tie with it."""
    count = 2 * ranking.MOST_COUNTED + 2
    items_VxD = (np.arange(count + 1)[:, None] % every == 0).astype(np.float32)
    items_VxD[1] = 0
    above = int(items_VxD[1:].sum())
    greater_U, tied_U, _ = ranking.count_better(jnp.ones((1, 1)), items_VxD, jnp.array([1]), count, None, 10**6)
    assert (int(greater_U[0]), int(tied_U[0])) == (above, count - 1 - above)


@pytest.mark.parametrize("block", [7, 10**6])
def test_many_parts_equal_brute_force(block, monkeypatch):
    monkeypatch.setattr(ranking, "MOST_COUNTED", 8)
    states, items, targets, histories = case()
    found = ranking.count_better(states, items, targets, ITEMS, hidden_of(histories), block)
    assert [x.tolist() for x in found] == brute_counts(states, items, targets, histories)


def test_metrics_are_the_same_number_in_any_order_of_the_users():
    random = np.random.default_rng(0)
    counts = random.integers(0, 300, 999), random.integers(0, 3, 999), random.random(999) < 0.1
    expected = ranking.metrics(*counts)
    for _ in range(5):
        order = random.permutation(999)
        assert ranking.metrics(*(count_U[order] for count_U in counts)) == expected
