"""The embedded default data: users with drifting interests over clustered items with a long tail."""

import numpy as np

CLUSTERS = 25
FOLLOW = 0.2  # share of actions that go to a successor of the previous item, so that order matters
NOISE = 0.2  # share of actions that come from anywhere, by popularity
DRIFT = 0.15  # chance, after an action, that the user's current interest moves on
TASTES = 5  # classes of users
SUCCESSORS = 3  # an item has so many; they lie in its own cluster


def synthetic_table(users: int, items: int, seed: int) -> list[np.ndarray]:
    """One array of item ids (1..items) per user, oldest first, 5 to 60 long, without repeats.

    Items fall into clusters and have Zipf popularity. A user has two lasting interests (clusters) and acts on one at a
    time; it drifts to the other, or on along a ring of clusters. An action is a successor of the previous item, an
    item of the current cluster by popularity, or noise.
    """
    generator = np.random.default_rng(seed)
    weight_V, members = _catalogue(generator, items)
    shares = [np.cumsum(weight_V[part]) / weight_V[part].sum() for part in members]
    anywhere = np.cumsum(weight_V) / weight_V.sum()
    successors = np.zeros((items, SUCCESSORS), int)
    for part, share in zip(members, shares, strict=True):
        successors[part] = part[np.searchsorted(share, generator.random((len(part), SUCCESSORS)))]
    lengths_U = np.clip(5 + generator.geometric(0.18, users) - 1, 5, min(60, items))
    return [_history(generator, length, members, shares, anywhere, successors) for length in lengths_U]


def synthetic_taste(users: int, items: int, seed: int) -> np.ndarray:
    """[users] a label to learn, 0..4: the fifth of the ring of clusters that most of a user's items lie in."""
    fifth_V = synthetic_clusters(items, seed) * TASTES // min(CLUSTERS, items)
    return np.array([np.bincount(fifth_V[history - 1]).argmax() for history in synthetic_table(users, items, seed)])


def synthetic_clusters(items: int, seed: int) -> np.ndarray:
    """[items] the cluster of each item (1..items), counted from 0: what is to be known of an item."""
    _, members = _catalogue(np.random.default_rng(seed), items)
    cluster_V = np.zeros(items, int)
    for cluster, part in enumerate(members):
        cluster_V[part] = cluster
    return cluster_V


def _catalogue(generator, items) -> tuple[np.ndarray, list[np.ndarray]]:
    """(popularity of each item, the items of each cluster), items counted from 0."""
    weight_V = 1 / np.arange(1, items + 1) ** 0.8
    generator.shuffle(weight_V)
    return weight_V, np.array_split(generator.permutation(items), min(CLUSTERS, items))


def _history(generator, length, members, shares, anywhere, successors) -> np.ndarray:
    interests = generator.integers(0, len(members), 2)
    current, history = interests[0], []
    while len(history) < length:
        kind, draw = generator.random(2)
        if history and kind < FOLLOW:
            item = generator.choice(successors[history[-1]])
        elif kind > 1 - NOISE:
            item = np.searchsorted(anywhere, draw)
        else:
            item = members[current][np.searchsorted(shares[current], draw)]
        if generator.random() < DRIFT:
            back = generator.random() < 0.7
            current = interests[generator.integers(2)] if back else (current + 1) % len(members)
        if item not in history:
            history.append(int(item))
    return np.array(history) + 1
