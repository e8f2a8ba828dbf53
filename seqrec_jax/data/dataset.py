"""Histories in CSR form: what `prepare` makes and every later stage reads."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class SequenceDataset:
    """All users' histories, oldest item first, on the host.

    Dense item ids are 1..num_items in order of first appearance in the source; 0 is padding. Ids above num_items are
    special tokens and never occur here. Users are 0..num_users-1 in order of first appearance.
    """

    items_A: np.ndarray  # [actions] int32, users one after the other
    offsets_U1: np.ndarray  # [users + 1] int64, user u owns items_A[offsets_U1[u] : offsets_U1[u + 1]]
    item_ids: np.ndarray  # [items] str: the source's own id of dense id i + 1
    user_ids: np.ndarray  # [users] str: the source's own id of user u
    hash: str  # of the source's bytes and the preparation's settings
    report: dict  # the data report, JSON-ready
    # What is known of the items besides who met them (data.attributes): the set of item v is
    # attributes_N[attribute_offsets_V1[v - 1] : attribute_offsets_V1[v]]. All empty where nothing is.
    attributes_N: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # 1.., rising in a set
    attribute_offsets_V1: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))  # [items + 1]
    attribute_names: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.str_))  # of a: [a - 1]
    train_fraction: float = 1.0  # share of users who are trained on: see data.batches.train_lengths
    hold_out: bool = True  # whether the last two items of a user are kept from training: see there, too


def first_occurrences(items_A: np.ndarray, offsets_U1: np.ndarray) -> np.ndarray:
    """[actions] bool: the item has not occurred before in the same user's history."""
    user_A = np.repeat(np.arange(len(offsets_U1) - 1), np.diff(offsets_U1))
    order = np.lexsort((items_A, user_A))  # stable: equal pairs stay in time order
    again = (np.diff(items_A[order]) == 0) & (np.diff(user_A[order]) == 0)
    first_A = np.ones(len(items_A), bool)
    first_A[order[1:][again]] = False
    return first_A
