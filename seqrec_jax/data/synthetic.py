"""The embedded default data: users with drifting interests over clustered items with a long tail."""

import numpy as np

CLUSTERS = 20
FOLLOW = 0.35  # share of actions that follow the previous item's own successor
DRIFT = 0.15  # share of actions after which a user's current interest moves on
NOISE = 0.10  # share of actions that come from anywhere, by popularity


def synthetic_table(users: int, items: int, seed: int) -> list[np.ndarray]:
    """One array of item ids (1..items) per user, oldest first, 5 to 60 long.

    Items fall into clusters and have Zipf popularity. A user has two long-term interests (clusters) and a current one,
    which drifts along a ring. The next item is the previous item's successor (so order matters), an item of the current
    cluster by popularity, or noise.
    """
    generator = np.random.default_rng(seed)
    cluster_V = generator.integers(0, CLUSTERS, items)
    weight_V = 1 / np.arange(1, items + 1) ** 0.8
    generator.shuffle(weight_V)
    members = [np.flatnonzero(cluster_V == c) for c in range(CLUSTERS)]
    members = [m if len(m) else np.arange(items) for m in members]
    shares = [weight_V[m] / weight_V[m].sum() for m in members]
    popularity_V = weight_V / weight_V.sum()
    successor_V = np.array([generator.choice(members[c], p=shares[c]) for c in cluster_V])
    lengths_U = np.clip(5 + generator.geometric(0.16, users) - 1, 5, 60)
    return [_history(generator, length, members, shares, successor_V, popularity_V) for length in lengths_U]


def _history(generator, length, members, shares, successor_V, popularity_V) -> np.ndarray:
    interests = generator.integers(0, CLUSTERS, 2)
    current, item, history = interests[0], None, []
    for _ in range(length):
        kind = generator.random()
        if item is not None and kind < FOLLOW:
            item = successor_V[item]
        elif kind > 1 - NOISE:
            item = generator.choice(len(popularity_V), p=popularity_V)
        else:
            item = generator.choice(members[current], p=shares[current])
        if generator.random() < DRIFT:
            current = interests[generator.integers(2)] if generator.random() < 0.7 else (current + 1) % CLUSTERS
        history.append(item + 1)
    return np.array(history)
