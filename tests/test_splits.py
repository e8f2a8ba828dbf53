"""Which users train, validate and test."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqrec_jax.data.batches import train_lengths
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.splits import split_folds, split_users, trained_on
from seqrec_jax.errors import UserError


def parts(split):
    return {name: set(getattr(split, name).tolist()) for name in ("train", "valid", "test")}


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 500), min_size=4, max_size=60), st.integers(2, 10), st.integers(0, 5))
def test_folds_test_every_user_once(users, count, seed):
    users_N = np.array(sorted(users))
    if count > len(users) // 2:
        with pytest.raises(UserError, match="do not make"):
            split_folds(users_N, count, seed)
        return
    folds = split_folds(users_N, count, seed)
    assert sorted(np.concatenate([fold.test for fold in folds])) == sorted(users)
    for fold in folds:
        found = parts(fold)
        assert set().union(*found.values()) == users
        assert sum(map(len, found.values())) == len(users) and all(found.values())
        assert len(fold.valid) == max(len(users) // 10, 1)
        assert abs(len(fold.test) - len(users) / count) < 1


def test_the_papers_split():
    users_N = np.arange(100, 6140)
    split = split_users(users_N, 0)
    assert (len(split.train), len(split.valid), len(split.test)) == (4832, 302, 906)
    assert set().union(*parts(split).values()) == set(users_N.tolist())
    with pytest.raises(UserError, match="8 users are too few to split 80/5/15"):
        split_users(np.arange(8), 0)


def test_the_draws_never_change():
    """Written down once: whoever splits the same users with the same seed gets these."""
    users_N = np.arange(20)
    assert split_users(users_N, 0).test.tolist() == [5, 9, 16]
    assert [fold.test.tolist() for fold in split_folds(users_N, 4, 1)] == [
        [2, 9, 16, 18, 19],
        [4, 7, 12, 14, 17],
        [0, 5, 8, 11, 15],
        [1, 3, 6, 10, 13],
    ]


def test_a_smaller_share_is_part_of_a_larger_one_and_of_those_trained_on():
    lengths_U = np.full(200, 4)
    offsets_U1 = np.concatenate([[0], np.cumsum(lengths_U)])
    users_N, before = np.arange(0, 200, 2), set()
    for share in (0.001, 0.2, 0.4, 1.0):
        dataset = SequenceDataset(
            np.ones(800, np.int32),
            offsets_U1,
            np.array(["a"]),
            np.arange(200).astype(str),
            "",
            {},
            train_fraction=share,
        )
        chosen = trained_on(users_N, dataset)
        assert len(chosen) == max(round(share * 100), 1) and set(chosen) <= set(users_N)
        assert before <= set(chosen)
        before = set(chosen)
        assert (train_lengths(dataset) > 0).sum() == max(round(share * 200), 1)
