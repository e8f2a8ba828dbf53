"""Vectors as a product: of all users of a run's data, of the histories in a file, or of the items."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from seqrec_jax import checkpoint
from seqrec_jax.data.batches import pack, rows_of
from seqrec_jax.data.histories import Histories, read_histories
from seqrec_jax.data.prepare import prepare
from seqrec_jax.data.vectors import vector_writer
from seqrec_jax.errors import UserError
from seqrec_jax.recommend import Model, load_model
from seqrec_jax.sharding import make_mesh, replicated, split_rows
from seqrec_jax.validate import PRETRAINING, mesh_shape
from seqrec_jax.workdir import check_trained

CHUNK = 2**14  # users held at once


def embed(config: ConfigDict, workdir: Path, kind: str, histories: Path | None, cache: Path, out: Path) -> None:
    """Writes the vectors of `kind` (users or items) to `out`.

    Users: those of `histories`, else all of the run's data, with their whole histories. The model is the run's best
    checkpoint, of a pretraining run the last. Raises UserError.
    """
    mesh = make_mesh(*mesh_shape(config, jax.device_count()))
    model = load_model(workdir, mesh, "last" if config.system in PRETRAINING else "best")
    check_trained(config, model.meta, workdir)
    if model.config.system == "pop":
        raise UserError(f"{workdir}: system=pop has no vectors; name the workdir of another system")
    if model.config.profile.vectors:
        raise UserError(f"{workdir}: it learned from vectors and makes none; name the workdir of an encoder")
    if kind == "items":
        items_VxD = np.asarray(jax.device_get(model.params["items"]))[1 : len(model.item_ids) + 1]
        with vector_writer(out, "item_id", items_VxD.shape[1]) as write:
            for begin in range(0, len(items_VxD), CHUNK):
                write(model.item_ids[begin : begin + CHUNK].tolist(), items_VxD[begin : begin + CHUNK])
        print(f"{out}: {len(items_VxD):,} items, {items_VxD.shape[1]} dimensions")
        return
    if histories:
        if not histories.is_file():
            raise UserError(f"{histories}: no such file (--histories)")
        found = read_histories(histories, config.data, model.item_ids.tolist())
    else:
        dataset = prepare(config.data, cache)
        trained_on = model.meta["dataset_hash"].partition("-")[0]  # what a task adds is not read here
        checkpoint.check_data({"dataset_hash": trained_on}, dataset, workdir)
        found = Histories(pl.Series(dataset.user_ids.tolist()), dataset.items_A, dataset.offsets_U1)
    count, begin = len(found.user_ids), time.perf_counter()
    with (
        vector_writer(out, "user_id", model.config.encoder.dim) as write,
        tqdm(total=count, unit="user", desc="embed", disable=jax.process_index() > 0) as bar,
    ):
        for first, vectors_UxD in user_vectors(model, found, mesh, config.eval.batch_size):
            write(found.user_ids[first : first + len(vectors_UxD)].to_list(), vectors_UxD)
            bar.update(len(vectors_UxD))
    speed = count / (time.perf_counter() - begin)
    print(f"{out}: {count:,} users, {model.config.encoder.dim} dimensions, {speed:,.0f} users/s")
    for number, what in (
        (found.unknown_actions, "actions with items that this model does not know"),
        (found.unknown_users, "users of such items alone"),
        (found.bad_rows, "bad rows"),
    ):
        if number:
            print(f"left out: {number:,} {what}")


def user_vectors(model: Model, histories: Histories, mesh: Mesh, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first user, [users, D]) for CHUNK users after the other: their states after the whole history.

    Only the last max_length items of each are read. Histories are packed into steps of about `batch_size`; while the
    device works on one chunk, the next is packed.
    """
    encoder, devices = model.config.encoder, mesh.shape["data"]
    room = int(encoder.user_token)
    width = encoder.max_length + room
    mean = np.minimum(np.diff(histories.offsets_U1), encoder.max_length).mean() + room
    rows = math.ceil(batch_size * mean / width / devices) * devices

    @jax.jit
    def step(params, items_A, row_U, column_U, length_U):
        batch = rows_of(
            items_A,
            users_U=jnp.where(length_U > 0, 0, -1),
            start_U=row_U * width + column_U,
            length_U=length_U,
            row_U=row_U,
            column_U=column_U,
            rows=rows,
            width=width,
            last_target_only=False,
            positions=encoder.positions,
        )
        return replicated(mesh, model.system.states(params, split_rows(mesh, batch)))

    waiting = None
    for first in range(0, len(histories.user_ids), CHUNK):
        steps, slot_U = pack_steps(histories, first, first + CHUNK, encoder.max_length, width, rows)
        states = [step(model.params, *arrays) for arrays in zip(*steps, strict=True)]
        if waiting:
            yield _collect(*waiting)
        waiting = first, slot_U, states
    if waiting:
        yield _collect(*waiting)


def _collect(first: int, slot_U: np.ndarray, states: list[jax.Array]) -> tuple[int, np.ndarray]:
    return first, np.concatenate(jax.device_get(states))[slot_U]


def pack_steps(
    histories: Histories, first: int, last: int, max_length: int, width: int, rows: int
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The users first..last - 1 in T steps of equal shape.

    Returns int32 (items_TxA, each step's cells row after row; row_TxU, column_TxU, length_TxU, 0 for an empty slot) and
    slot_U, each user's place among all T * U slots. Slots a step are a power of two: few shapes to compile, whatever
    the lengths.
    """
    offsets_U1 = histories.offsets_U1[first : last + 1]
    length_U = np.minimum(np.diff(offsets_U1), max_length)
    row_U, column_U = np.empty((2, len(length_U)), np.int64)
    row_S, column_S, room_S = pack(length_U + width - max_length, width)
    by_length = np.argsort(length_U, kind="stable")
    by_room = np.argsort(room_S, kind="stable")
    row_U[by_length], column_U[by_length] = row_S[by_room], column_S[by_room]
    # Rows with many histories and rows with few are dealt to all steps alike.
    rank_R = np.argsort(np.argsort(-np.bincount(row_U), kind="stable"))
    steps = -(-len(rank_R) // rows)
    step_U, row_U = rank_R[row_U] % steps, rank_R[row_U] // steps
    count_T = np.bincount(step_U, minlength=steps)
    slots = 1 << int(count_T.max() - 1).bit_length()
    slot_U = np.empty(len(length_U), np.int64)
    in_row_order = np.lexsort((column_U, row_U, step_U))  # as rows_of wants them
    real_TxU = np.arange(slots) < count_T[:, None]
    slot_U[in_row_order] = np.flatnonzero(real_TxU)
    of_slots = np.zeros((3, steps * slots), np.int32)
    of_slots[:, slot_U] = row_U, column_U, length_U
    cells_A = np.zeros(steps * rows * width, np.int32)
    before_U = np.cumsum(length_U) - length_U
    to_U, from_U = (step_U * rows + row_U) * width + column_U, offsets_U1[1:] - length_U
    number_A = np.arange(length_U.sum())
    source_A = histories.items_A[np.repeat(from_U - before_U, length_U) + number_A]
    cells_A[np.repeat(to_U - before_U, length_U) + number_A] = source_A
    return (cells_A.reshape(steps, -1), *of_slots.reshape(3, steps, slots)), slot_U
