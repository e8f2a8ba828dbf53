"""batch_at(data, layout, seed, step): a pure function on the device, so the state of the data is the step number.

Examples (pieces of histories) are packed into rows of `max_length` columns once, from the multiset of their lengths;
every epoch permutes the examples among slots of equal length and deals the rows to the steps anew.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seqrec_jax import native
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.splits import trained_on

WORTH_PACKING = 0.9  # packed rows a history, above which histories are left one a row


@struct.dataclass
class Batch:
    """Histories in rows. Empty user slots have users_U = -1 and length_U = 0; every mean is masked by them."""

    items_RxL: jax.Array  # 0 = padding
    segments_RxL: jax.Array  # 0 = padding, else 1 + index into the U axis of the history the cell belongs to
    positions_RxL: jax.Array  # position ids
    targets_RxL: jax.Array  # item to predict at this cell, 0 = none
    users_U: jax.Array
    start_U: jax.Array  # first input in the data's items_A
    length_U: jax.Array
    row_U: jax.Array
    column_U: jax.Array  # the history occupies columns column_U .. column_U + length_U - 1 of its row

    @property
    def last_U(self) -> jax.Array:
        """Flat index, into [R * L], of each history's last cell (0 for empty slots)."""
        width = self.items_RxL.shape[1]
        return self.row_U * width + jnp.maximum(self.column_U + self.length_U - 1, 0)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Pieces of histories: inputs items_A[start : start + length]; the target of input i is items_A[start + i + 1]."""

    start_E: np.ndarray  # int32
    length_E: np.ndarray  # int32, 1..max_length
    user_E: np.ndarray  # int32
    dropped_targets: int = 0  # targets that `targets=all` leaves out because they are older than max_length


def train_lengths(dataset: SequenceDataset) -> np.ndarray:
    """Length of each user's training part: all but the last two items; everything for users with fewer than 3 items.

    Without dataset.hold_out everything for all; nothing for those whom dataset.train_fraction leaves out. All that
    counts or draws training actions asks here.
    """
    lengths_U = np.diff(dataset.offsets_U1)
    users_U = np.arange(len(lengths_U))
    train_U = np.where(dataset.hold_out & (lengths_U >= 3), lengths_U - 2, lengths_U)
    train_U[~np.isin(users_U, trained_on(users_U, dataset))] = 0
    return train_U


def train_counts(dataset: SequenceDataset) -> np.ndarray:
    """[items + 1] how often each item occurs in the training part."""
    lengths_U = np.diff(dataset.offsets_U1)
    place_A = np.arange(len(dataset.items_A)) - np.repeat(dataset.offsets_U1[:-1], lengths_U)
    inside_A = place_A < np.repeat(train_lengths(dataset), lengths_U)
    return np.bincount(dataset.items_A[inside_A], minlength=len(dataset.item_ids) + 1)


def train_examples(dataset: SequenceDataset, targets: str, max_length: int, *, whole: bool = False) -> Examples:
    """The training examples of `train.targets`: all, windows or prefix (see configs/base.py).

    `whole`: for a system that predicts no next item, the last training item is an input, too; the target of that input
    lies outside the training part and must not be read.
    """
    offset_U, inputs_U = dataset.offsets_U1[:-1], train_lengths(dataset)
    inputs_U = inputs_U if whole else np.maximum(inputs_U - 1, 0)  # else the last training item is only a target
    users_U = np.arange(len(inputs_U))
    if targets == "all":
        length_U = np.minimum(inputs_U, max_length)
        keep = length_U > 0
        start_U = offset_U + inputs_U - length_U
        return _examples(start_U[keep], length_U[keep], users_U[keep], int((inputs_U - length_U).sum()))
    pieces_U = inputs_U if targets == "prefix" else -(-inputs_U // max_length)
    user_E = np.repeat(users_U, pieces_U)
    piece_E = np.arange(len(user_E)) - np.repeat(np.cumsum(pieces_U) - pieces_U, pieces_U)
    if targets == "prefix":  # piece p ends with input p
        end_E = piece_E + 1
        begin_E = np.maximum(end_E - max_length, 0)
    else:  # windows are cut from the end, so that the newest are full
        end_E = inputs_U[user_E] - piece_E * max_length
        begin_E = np.maximum(end_E - max_length, 0)
    return _examples(offset_U[user_E] + begin_E, end_E - begin_E, user_E, 0)


def history_examples(dataset: SequenceDataset, held_out: int, max_length: int) -> Examples:
    """The last `max_length` items before each evaluated user's held-out item (1 = test, 2 = validation).

    0 holds nothing out: the last `max_length` items of every user.
    """
    lengths_U = np.diff(dataset.offsets_U1)
    users_E = np.flatnonzero(lengths_U >= (3 if held_out else 1))
    inputs_E = lengths_U[users_E] - held_out
    length_E = np.minimum(inputs_E, max_length)
    return _examples(dataset.offsets_U1[users_E] + inputs_E - length_E, length_E, users_E, 0)


def _examples(start, length, user, dropped) -> Examples:
    return Examples(start.astype(np.int32), length.astype(np.int32), user.astype(np.int32), dropped)


def pack(lengths_E: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best-fit decreasing on the multiset of lengths. Returns row, column and length of every slot (any order).

    Works on whole groups of equal rows, so its cost depends on `width`, not on the number of examples.
    """
    todo_of = np.bincount(lengths_E, minlength=width + 1)
    free = [np.empty(0, np.int64) for _ in range(width + 1)]  # free[s]: rows with s columns left
    slots, rows = [], 0
    for length in range(width, 0, -1):
        todo = int(todo_of[length])
        while todo:
            space = next((s for s in range(length, width + 1) if len(free[s])), None)
            if space is None:
                opened = -(-todo // (width // length))
                free[width] = np.arange(rows, rows + opened)
                rows, space = rows + opened, width
            taken, free[space] = free[space][:todo], free[space][todo:]
            slots.append((taken, np.full(len(taken), width - space), np.full(len(taken), length)))
            free[space - length] = np.concatenate([free[space - length], taken])
            todo -= len(taken)
    row_S, column_S, length_S = (np.concatenate(parts) for parts in zip(*slots, strict=True))
    return row_S, column_S, length_S


@struct.dataclass
class Layout:
    """Where examples sit: made once on the host, kept on the device. T steps an epoch, J rows a step.

    Rows are numbered by falling number of slots; step t takes one row from each of J strata of T neighbouring rows, so
    that every step holds about the same number of histories and the U axis has no slack to speak of.
    """

    example_Ex3: jax.Array  # start, length, user
    class_E: jax.Array  # examples of one class may change places: their length if packed, else one class
    first_R1: jax.Array  # row r holds slots first_R1[r] .. first_R1[r + 1] - 1
    slot_Sx2: jax.Array  # the example at which rank of the order by class it takes; its column
    row_U: jax.Array  # U axis: row of the step
    nth_U: jax.Array  # U axis: which slot of that row
    steps: int = struct.field(pytree_node=False)
    rows: int = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)
    packed: bool = struct.field(pytree_node=False)
    last_target_only: bool = struct.field(pytree_node=False)
    positions: str = struct.field(pytree_node=False)


def make_layout(
    examples: Examples,
    batch_size: int,
    width: int,
    *,
    positions: str = "left",
    packed: bool = True,
    last_target_only: bool = False,
    row_multiple: int = 1,
    room: int = 0,
) -> Layout:
    """Packs `examples` into rows of `width` and deals about `batch_size` of them to a step.

    Not `packed`, or where packing would save less than a tenth of the rows: one history a row.
    `room`: cells left free behind each history, for which rows are as much wider (for a [UR] token: 1).
    `row_multiple`: devices that share the rows; it appends empty rows, which changes no draw and no value.
    """
    count = len(examples.length_E)
    steps = -(-count // batch_size)
    class_E = examples.length_E
    row_S, column_S, length_S = pack(examples.length_E + room, width + room)
    rows = row_S.max() + 1
    packed = packed and steps <= rows <= WORTH_PACKING * count  # with fewer rows than steps, some would be empty
    if not packed:
        row_S, column_S, length_S = np.arange(count), np.zeros(count, int), np.zeros(count, int)
        class_E = np.zeros(count, np.int32)
    slots_R = np.bincount(row_S)
    by_count = np.argsort(-slots_R, kind="stable")
    row_S = np.argsort(by_count, kind="stable")[row_S]
    rows = -(-len(slots_R) // steps)
    first_R1 = np.zeros(steps * rows + 1, np.int64)
    first_R1[1 : len(slots_R) + 1] = slots_R[by_count]
    first_R1 = np.cumsum(first_R1)
    in_row_order = np.lexsort((column_S, row_S))
    rank_S = np.empty(count, np.int64)
    rank_S[np.argsort(length_S, kind="stable")] = np.arange(count)
    most_J = np.diff(first_R1).reshape(rows, steps).max(axis=1)  # slots of the fullest row of each stratum
    row_U = np.repeat(np.arange(rows), most_J)
    nth_U = np.arange(len(row_U)) - np.repeat(np.cumsum(most_J) - most_J, most_J)
    int32 = lambda array: jax.device_put(array.astype(np.int32))  # noqa: E731 (jnp.asarray would compile a program)
    return Layout(
        example_Ex3=int32(np.stack([examples.start_E, examples.length_E, examples.user_E], axis=1)),
        class_E=int32(class_E),
        first_R1=int32(first_R1),
        slot_Sx2=int32(np.stack([rank_S, column_S], axis=1)[in_row_order]),
        row_U=int32(row_U),
        nth_U=int32(nth_U),
        steps=steps,
        rows=-(-rows // row_multiple) * row_multiple,
        width=width + room,
        packed=packed,
        last_target_only=last_target_only,
        positions=positions,
    )


def layout_of(
    examples: Examples, batch_size: int, config: ConfigDict, mesh: Mesh, *, last_target_only: bool = False
) -> Layout:
    """The Layout of `examples` that the config asks for, in rows that the mesh divides."""
    encoder = config.encoder
    return make_layout(
        examples, batch_size, encoder.max_length, positions=encoder.positions, packed=config.train.packed,
        last_target_only=last_target_only, row_multiple=mesh.shape["data"], room=encoder.user_token,
    )  # fmt: skip


@struct.dataclass
class Plan:
    """One epoch's arrangement."""

    order_E: jax.Array  # example at each rank
    row_TxJ: jax.Array  # rows of each step


def plan_epoch(layout: Layout, key: jax.Array | None) -> Plan:
    """The arrangement of one epoch; `key` None: the fixed one that evaluation uses."""
    examples, rows = layout.class_E.shape[0], layout.first_R1.shape[0] - 1
    if key is None:
        order_E, order_R = jnp.argsort(layout.class_E, stable=True), jnp.arange(rows)
    else:  # one draw and one sort for both, which take half as long to compile
        most = max(examples, rows)
        bits_2xM = jax.vmap(lambda key: jax.random.bits(key, (most,)))(jax.random.split(key))
        stratum_R = layout.width + 1 + jnp.arange(rows) // layout.steps  # behind all classes
        groups = jnp.concatenate([layout.class_E, stratum_R])
        order = jnp.lexsort((jnp.concatenate([bits_2xM[0, :examples], bits_2xM[1, :rows]]), groups))
        order_E, order_R = order[:examples], order[examples:] - examples
    return Plan(order_E=order_E, row_TxJ=order_R.reshape(-1, layout.steps).T)


def batch_of(items_A: jax.Array, layout: Layout, plan: Plan, step_in_epoch: jax.Array) -> Batch:
    """Gathers one step's batch on the device."""
    # What is read at the same place lies together: a program compiles and runs one gather, not several.
    row_J = plan.row_TxJ[step_in_epoch]
    begin_U, end_U = layout.first_R1[row_J[:, None] + jnp.arange(2)][layout.row_U].T
    slot_U = begin_U + layout.nth_U
    real_U = slot_U < end_U
    rank_U, column_U = layout.slot_Sx2[jnp.where(real_U, slot_U, 0)].T
    start_U, length_U, user_U = layout.example_Ex3[plan.order_E[rank_U]].T
    return rows_of(
        items_A,
        users_U=jnp.where(real_U, user_U, -1),
        start_U=start_U,
        length_U=jnp.where(real_U, length_U, 0),
        row_U=layout.row_U,
        column_U=jnp.where(real_U, column_U, 0),
        rows=layout.rows,
        width=layout.width,
        last_target_only=layout.last_target_only,
        positions=layout.positions,
    )


def rows_of(items_A, *, users_U, start_U, length_U, row_U, column_U, rows, width, last_target_only, positions) -> Batch:
    """Writes histories, given by where they start in items_A, into their cells; those of a row come left to right."""
    segments_RxL, offset_RxL, length_RxL = cells(row_U, column_U, length_U, rows, width)
    real_RxL = segments_RxL > 0
    source_RxL = jnp.where(real_RxL, start_U[jnp.maximum(segments_RxL - 1, 0)] + offset_RxL, 0)
    targeted_RxL = real_RxL & (offset_RxL == length_RxL - 1) if last_target_only else real_RxL
    here_RxL, next_RxL = items_A[jnp.stack([source_RxL, jnp.minimum(source_RxL + 1, items_A.shape[0] - 1)])]
    return Batch(
        items_RxL=jnp.where(real_RxL, here_RxL, 0),
        segments_RxL=segments_RxL,
        positions_RxL=position_ids(offset_RxL, length_RxL, width, positions),
        targets_RxL=jnp.where(targeted_RxL, next_RxL, 0),
        users_U=users_U,
        start_U=start_U,
        length_U=length_U,
        row_U=row_U,
        column_U=column_U,
    )


def histories_of(items_A: jax.Array, batch: Batch, *, with_target: bool = False) -> tuple[jax.Array, jax.Array]:
    """The histories of a batch one a line, (items_UxL, length_U); `with_target`: each with its last target behind."""
    longer = int(with_target)
    length_U = jnp.where(batch.length_U > 0, batch.length_U + longer, 0)
    places_L = jnp.arange(batch.items_RxL.shape[1] + longer)
    inside_UxL = places_L < length_U[:, None]
    return jnp.where(inside_UxL, items_A[jnp.where(inside_UxL, batch.start_U[:, None] + places_L, 0)], 0), length_U


def place(items_UxL: jax.Array, length_U: jax.Array, batch: Batch, positions: str) -> Batch:
    """Writes other histories, none longer than the batch's own, into the batch's rows; without targets."""
    rows, width = batch.items_RxL.shape
    segments_RxL, offset_RxL, length_RxL = cells(batch.row_U, batch.column_U, length_U, rows, width)
    return batch.replace(
        items_RxL=jnp.where(segments_RxL > 0, items_UxL[jnp.maximum(segments_RxL - 1, 0), offset_RxL], 0),
        segments_RxL=segments_RxL,
        positions_RxL=position_ids(offset_RxL, length_RxL, width, positions),
        targets_RxL=jnp.zeros_like(batch.targets_RxL),
        length_U=length_U,
    )


def cells(row_U, column_U, length_U, rows: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(segments_RxL, offset_RxL, length_RxL): which history each cell belongs to (0 = none), its place in that history,
    and that history's length (in padding, of any one).
    """
    if jax.default_backend() == "cpu" and (kernel := native.at_hand("cells")):  # not for speed: it compiles sooner
        shapes = [jax.ShapeDtypeStruct((rows, width), jnp.int32)] * 3
        return jax.ffi.ffi_call(kernel, shapes, vmap_method="sequential")(row_U, column_U, length_U)
    owner_U = jnp.where(length_U > 0, jnp.arange(1, length_U.shape[0] + 1), 0)
    # Set, and empty slots dropped: a maximum or sum would be divided among the devices, and on a mesh with two axes
    # that does not divide the slots, XLA (JAX 0.10 to 0.12) would write into the first row.
    begun_RxL = jnp.zeros((rows, width), jnp.int32)
    begun_RxL = begun_RxL.at[jnp.where(owner_U > 0, row_U, rows), column_U].set(owner_U, mode="drop")
    owner_RxL = jax.lax.cummax(begun_RxL, axis=1)
    column_RxL, length_RxL = jnp.stack([column_U, length_U])[:, jnp.maximum(owner_RxL - 1, 0)]
    offset_RxL = jnp.arange(width) - column_RxL
    inside_RxL = (owner_RxL > 0) & (offset_RxL < length_RxL)
    return jnp.where(inside_RxL, owner_RxL, 0), jnp.where(inside_RxL, offset_RxL, 0), length_RxL


def position_ids(offset, length, width: int, positions: str) -> jax.Array:
    """left: the last item of every history has id width - 1, as if padded on the left; right: the first has id 0."""
    return width - length + offset if positions == "left" else offset


def batch_at(items_A: jax.Array, layout: Layout, seed: int | jax.Array, step: jax.Array) -> Batch:
    """The batch of a step, from nothing but (seed, step). A loop makes the epoch's plan once instead."""
    plan = plan_epoch(layout, epoch_key(seed, step // layout.steps))
    return batch_of(items_A, layout, plan, step % layout.steps)


def epoch_key(seed: int | jax.Array, epoch: jax.Array) -> jax.Array:
    """The key that arranges an epoch: stream 0 of the seed; initial parameters are of stream 1, training of 2."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), epoch)
