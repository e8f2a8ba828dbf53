"""Which users train, validate and test where the target is not the history's own last item (profiles, cold start)."""

import dataclasses

import numpy as np

from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Three disjoint sets of users (rising numbers of the dataset's users)."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def drawn(users_N: np.ndarray, seed: int) -> np.ndarray:
    """`users_N` in a random order: by raw draws of PCG64, which are the same in every version of NumPy."""
    return users_N[np.argsort(np.random.PCG64(seed).random_raw(len(users_N)), kind="stable")]


def split_users(users_N: np.ndarray, seed: int) -> Split:
    """80 / 5 / 15 percent of `users_N` (CLUE, Section V-A). Raises UserError where one part would be empty."""
    train, valid = round(0.8 * len(users_N)), round(0.05 * len(users_N))
    if not valid:
        raise UserError(f"{len(users_N)} users are too few to split 80/5/15; allowed: 11 or more")
    train_N, valid_N, test_N = np.split(drawn(users_N, seed), [train, train + valid])
    return Split(np.sort(train_N), np.sort(valid_N), np.sort(test_N))


def split_folds(users_N: np.ndarray, count: int, seed: int) -> list[Split]:
    """`count` splits that test every user once. Validation is a tenth of all users, from those tested next.

    Raises UserError for fewer than 2 folds, or than 2 users in one.
    """
    if not 2 <= count <= len(users_N) // 2:
        raise UserError(f"{len(users_N)} users do not make {count} folds; allowed: [2, {len(users_N) // 2}]")
    parts, valid, splits = np.array_split(drawn(users_N, seed), count), max(len(users_N) // 10, 1), []
    for fold, test_N in enumerate(parts):
        following_N = np.concatenate([*parts[fold + 1 :], *parts[:fold]])
        splits.append(Split(np.sort(following_N[valid:]), np.sort(following_N[:valid]), np.sort(test_N)))
    return splits


def trained_on(users_N: np.ndarray, dataset: SequenceDataset) -> np.ndarray:
    """The share dataset.train_fraction of `users_N`, one at least; a smaller share is part of a larger one."""
    order_U = drawn(np.arange(len(dataset.offsets_U1) - 1), 0)
    chosen_N = order_U[np.isin(order_U, users_N)][: max(round(dataset.train_fraction * len(users_N)), 1)]
    return np.sort(chosen_N)
