"""Examples, packing and batches against plain Python over histories whose items are all different."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqrec_jax.data import batches
from seqrec_jax.data.dataset import SequenceDataset

TARGETS = ("all", "windows", "prefix")
LENGTHS = (0, 1, 2, 3, 4, 5, 9, 40, 3, 17, 1, 8, 8, 12, 7, 23, 2, 6, 10, 4)
batch_at = jax.jit(batches.batch_at)
histories_of = jax.jit(batches.histories_of, static_argnames="with_target")
place = jax.jit(batches.place, static_argnums=3)


def dataset_of(lengths):
    """Item a + 1 at action a, so that every input and target names its action."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return SequenceDataset(items, offsets, items.astype(str), np.arange(len(lengths)).astype(str), "", {})


def histories_in(dataset):
    return [dataset.items_A[a:b].tolist() for a, b in zip(dataset.offsets_U1, dataset.offsets_U1[1:], strict=False)]


def training_pairs(history):
    """(input, target) of every training position, oldest first."""
    part = history[:-2] if len(history) >= 3 else history
    return list(zip(part, part[1:], strict=False))


def pieces_of(pairs, targets, width):
    if targets == "prefix":
        return [pairs[max(0, end - width) : end] for end in range(1, len(pairs) + 1)]
    pieces = [pairs[max(0, end - width) : end] for end in range(len(pairs), 0, -width)]
    return pieces[:1] if targets == "all" else pieces


def expected_examples(dataset, targets, width):
    """(user, [(input, target), ...]) of every example."""
    histories = enumerate(histories_in(dataset))
    return [(user, piece) for user, h in histories for piece in pieces_of(training_pairs(h), targets, width)]


def layout_of(dataset, targets, width, batch_size, **settings):
    examples = batches.train_examples(dataset, targets, width)
    return batches.make_layout(examples, batch_size, width, last_target_only=targets == "prefix", **settings)


def examples_in(batch):
    """[(user, inputs, positions, targets)] read from the cells of a batch; checks that the cells are consistent."""
    batch = jax.tree.map(np.asarray, batch)
    found, covered = [], 0
    for slot in np.flatnonzero(batch.length_U):
        row, columns = np.nonzero(batch.segments_RxL == slot + 1)
        assert (row == batch.row_U[slot]).all()
        assert columns.tolist() == list(range(batch.column_U[slot], batch.column_U[slot] + batch.length_U[slot]))
        assert batch.last_U[slot] == row[-1] * batch.items_RxL.shape[1] + columns[-1]
        cells = (x[row, columns].tolist() for x in (batch.items_RxL, batch.positions_RxL, batch.targets_RxL))
        found.append((int(batch.users_U[slot]), *map(tuple, cells)))
        covered += len(columns)
    empty = batch.segments_RxL == 0
    assert covered == (~empty).sum() and (batch.users_U[batch.length_U == 0] == -1).all()
    assert (batch.items_RxL[empty] == 0).all() and (batch.targets_RxL[empty] == 0).all()
    return found


def epoch_of(dataset, layout, seed=0, epoch=0):
    steps = range(epoch * layout.steps, (epoch + 1) * layout.steps)
    return [examples_in(batch_at(dataset.items_A, layout, seed, step)) for step in steps]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("width", [1, 3, 8, 50])
def test_training_examples_equal_the_brute_force_ones(targets, width):
    generator = np.random.default_rng(width)
    dataset = dataset_of([*LENGTHS, *generator.integers(0, 60, 30)])
    examples = batches.train_examples(dataset, targets, width)
    found = [
        (user, [(start + i + 1, start + i + 2) for i in range(length)])  # item a + 1 stands at action a
        for user, start, length in zip(
            examples.user_E.tolist(), examples.start_E.tolist(), examples.length_E.tolist(), strict=True
        )
    ]
    assert sorted(found) == sorted(expected_examples(dataset, targets, width))

    everything = sorted(target for h in histories_in(dataset) for _, target in training_pairs(h))
    learnt = [pairs[-1][1] if targets == "prefix" else target for _, pairs in found for _, target in pairs[-1:]]
    if targets != "prefix":
        learnt = [target for _, pairs in found for _, target in pairs]
    newest = [target for h in histories_in(dataset) for _, target in training_pairs(h)[-width:]]
    assert sorted(learnt) == (sorted(newest) if targets == "all" else everything)
    assert examples.dropped_targets == len(everything) - len(learnt)


@pytest.mark.parametrize("targets", TARGETS)
def test_a_fraction_of_the_users_is_trained_on_and_a_smaller_one_is_part_of_it(targets):
    dataset = dataset_of(np.random.default_rng(0).integers(3, 9, 1000))
    everybody, whole, before = np.arange(1000), histories_in(dataset), set()
    for share in (0.2, 0.4, 0.6, 0.8, 1.0):
        part = dataclasses.replace(dataset, train_fraction=share)
        trained = np.flatnonzero(batches.train_lengths(part))
        assert len(trained) == 1000 * share and before < set(trained.tolist())
        assert abs((trained < 500).mean() - 0.5) < 0.1  # from everywhere in the file
        before = set(trained.tolist())
        found = batches.train_examples(part, targets, 5)
        wanted = [(u, len(p)) for u, p in expected_examples(dataset, targets, 5) if u in before]
        assert sorted(zip(found.user_E.tolist(), found.length_E.tolist(), strict=True)) == sorted(wanted)
        counted = np.flatnonzero(batches.train_counts(part)).tolist()
        assert counted == sorted(item for user in before for item in whole[user][:-2])
        assert batches.history_examples(part, 1, 5).user_E.tolist() == everybody.tolist()


def test_without_hold_out_whole_histories_are_read():
    dataset = dataclasses.replace(dataset_of(LENGTHS), hold_out=False)
    assert batches.train_lengths(dataset).tolist() == list(LENGTHS)
    found = batches.train_examples(dataset, "windows", 5, whole=True)
    read = [place for s, n in zip(found.start_E, found.length_E, strict=True) for place in range(s, s + n)]
    assert sorted(read) == list(range(len(dataset.items_A)))
    assert batches.train_counts(dataset).sum() == len(dataset.items_A)


def test_the_users_of_a_fraction_are_the_same_for_ever():
    dataset = dataclasses.replace(dataset_of([4] * 12), train_fraction=0.5)
    assert np.flatnonzero(batches.train_lengths(dataset)).tolist() == [1, 2, 3, 6, 8, 11]
    one = dataclasses.replace(dataset, train_fraction=1e-9)
    assert (batches.train_lengths(one) > 0).sum() == 1


def test_histories_end_before_the_held_out_item():
    dataset = dataset_of(LENGTHS)
    for held_out, width in ((1, 5), (2, 5), (1, 50), (2, 50)):
        examples = batches.history_examples(dataset, held_out, width)
        wanted = {u: h[:-held_out][-width:] for u, h in enumerate(histories_in(dataset)) if len(h) >= 3}
        found = {
            int(user): dataset.items_A[start : start + length].tolist()
            for user, start, length in zip(examples.user_E, examples.start_E, examples.length_E, strict=True)
        }
        assert found == wanted and len(examples.user_E) == len(wanted)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_packed_slots_lie_in_their_row_without_overlap(data):
    width = data.draw(st.integers(1, 20))
    lengths = np.array(data.draw(st.lists(st.integers(1, width), min_size=1, max_size=60)))
    row, column, length = batches.pack(lengths, width)
    assert sorted(length) == sorted(lengths)
    used = np.zeros((row.max() + 1, width), int)
    for r, c, n in zip(row, column, length, strict=True):
        assert 0 <= c and c + n <= width
        used[r, c : c + n] += 1
    assert used.max() == 1 and used.any(axis=1).all()
    assert len(used) <= 2 * lengths.sum() / width + 1  # no two rows could be one


@pytest.mark.parametrize(
    ("targets", "packed", "batch_size"),
    [("all", True, 7), ("windows", True, 1000), ("prefix", True, 16), ("prefix", False, 1000)],
)
def test_an_epoch_holds_every_example_once(targets, packed, batch_size):
    dataset, width = dataset_of(LENGTHS), 12
    wanted = []
    for user, pairs in expected_examples(dataset, targets, width):
        inputs, outputs = zip(*pairs, strict=True)
        outputs = (0,) * (len(pairs) - 1) + outputs[-1:] if targets == "prefix" else outputs
        wanted.append((user, inputs, tuple(range(width - len(pairs), width)), outputs))
    layout = layout_of(dataset, targets, width, batch_size, packed=packed)
    assert sorted(sum(epoch_of(dataset, layout, epoch=1), [])) == sorted(wanted)
    assert layout.steps == -(-len(wanted) // batch_size)


@pytest.mark.parametrize("targets", TARGETS)
def test_training_batches_never_hold_a_validation_or_test_item(targets):
    dataset = dataset_of(LENGTHS)
    held_out = {item for h in histories_in(dataset) if len(h) >= 3 for item in h[-2:]}
    layout = layout_of(dataset, targets, 12, 8)
    for step in range(layout.steps):
        batch = batch_at(dataset.items_A, layout, 0, step)
        longer, _ = histories_of(dataset.items_A, batch, with_target=True)
        met = np.concatenate([np.ravel(x) for x in (batch.items_RxL, batch.targets_RxL, longer)])
        assert met.any() and not held_out & set(met.tolist())


def test_a_batch_depends_on_seed_and_step_alone():
    dataset = dataset_of(LENGTHS * 5)
    layout = layout_of(dataset, "windows", 12, 16)
    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))  # noqa: E731
    last = layout.steps - 1
    first = batch_at(dataset.items_A, layout, 3, last)
    batch_at(dataset.items_A, layout, 3, 0)
    assert same(first, batch_at(dataset.items_A, layout, 3, last))
    plan = jax.jit(batches.plan_epoch)(layout, batches.epoch_key(3, 0))  # what the training loop does
    assert same(first, jax.jit(batches.batch_of)(dataset.items_A, layout, plan, last))
    assert not same(first, batch_at(dataset.items_A, layout, 4, last))
    assert not same(first, batch_at(dataset.items_A, layout, 3, last + layout.steps))


def test_every_epoch_deals_the_examples_anew():
    dataset = dataset_of([10] * 60)  # equal lengths: all examples change places
    layout = layout_of(dataset, "all", 16, 10)
    first, second = (epoch_of(dataset, layout, seed=1, epoch=epoch) for epoch in (0, 1))
    assert sorted(sum(first, [])) == sorted(sum(second, []))
    assert all(sorted(a) != sorted(b) for a, b in zip(first, second, strict=True))  # company changes, not only order


def test_packed_rows_hold_what_padded_rows_hold():
    dataset = dataset_of(LENGTHS)
    packed, padded = (
        sorted(sum(epoch_of(dataset, layout_of(dataset, "windows", 12, 12, packed=p, positions="right")), []))
        for p in (True, False)
    )
    assert packed == padded


@pytest.mark.usefixtures("form")
def test_every_cell_belongs_to_the_history_that_lies_there():
    """In both forms, alone and side by side: with gaps, rows without a history, and places without one."""
    rng, rows, width, places = np.random.default_rng(0), 7, 9, 25
    many = np.zeros((3, 3, places), np.int32)  # row, column, length
    expected = np.zeros((2, 3, rows, width), np.int32)
    lengths = np.zeros((3, rows, width), np.int32)
    for number, (row_U, column_U, length_U) in enumerate(many):
        row_U[:] = np.sort(rng.choice([0, 1, 2, 4, 5], places))
        free = np.zeros(rows, int)
        for u in range(places):
            column_U[u] = min(free[row_U[u]] + rng.integers(2), width - 1)
            length_U[u] = min(rng.integers(4), width - column_U[u]) * (free[row_U[u]] <= column_U[u])
            free[row_U[u]] = max(free[row_U[u]], column_U[u] + length_U[u])
            here = number, row_U[u], slice(column_U[u], column_U[u] + length_U[u])
            expected[0][here], expected[1][here], lengths[here] = u + 1, np.arange(length_U[u]), length_U[u]
    segments, offsets, found = jax.jit(jax.vmap(lambda x: batches.cells(*x, rows, width)))(many)
    np.testing.assert_array_equal([segments, offsets], expected)
    np.testing.assert_array_equal(np.where(segments > 0, found, 0), lengths)
    assert (segments == 0).any() and (lengths > 1).any() and (found[segments == 0] >= 0).all()


def test_positions_end_at_the_last_id_or_start_at_the_first():
    for positions in ("left", "right"):
        layout = layout_of(dataset_of(LENGTHS), "all", 12, 100, positions=positions)
        (examples,) = epoch_of(dataset_of(LENGTHS), layout)
        assert {len(ids) for _, _, ids, _ in examples} > {1, 3, 12}
        for _, inputs, ids, _ in examples:
            count = len(inputs)
            assert ids == tuple(range(12 - count, 12) if positions == "left" else range(count))


def test_every_step_holds_about_batch_size_histories():
    lengths = 5 + np.random.default_rng(0).geometric(0.2, 2000)
    dataset = dataset_of(lengths)
    for batch_size, packed in ((64, True), (64, False)):
        layout = layout_of(dataset, "all", 50, batch_size, packed=packed)
        users = [batch_at(dataset.items_A, layout, 0, step).users_U for step in range(layout.steps)]
        held = np.array([(np.asarray(users_U) >= 0).sum() for users_U in users])
        even = len(lengths) / layout.steps
        assert abs(held - even).max() <= 0.15 * even
        assert len(layout.row_U) <= 1.15 * even  # little room for slots that stay empty
        cells = layout.steps * layout.rows * 50
        assert not packed or np.minimum(lengths - 3, 50).sum() > 0.9 * cells  # little padding


def test_long_histories_are_left_one_a_row():
    """Packing them would cost slots and save no row."""
    for length, packed in ((40, False), (10, True)):
        layout = layout_of(dataset_of([length] * 60), "all", 50, 8)
        assert layout.packed == packed and (len(layout.row_U) == layout.rows) != packed


def test_no_step_is_empty_where_a_row_holds_more_histories_than_a_step():
    dataset = dataset_of([5] * 60)  # two inputs each: a row of 12 takes six
    layout = layout_of(dataset, "all", 12, 2)
    assert min(len(step) for step in epoch_of(dataset, layout)) > 0


def test_row_multiple_only_appends_empty_rows():
    dataset = dataset_of(LENGTHS)
    one, four = (layout_of(dataset, "windows", 12, 12, row_multiple=multiple) for multiple in (1, 4))
    assert one.rows % 4 and four.rows == -(-one.rows // 4) * 4
    for step in range(one.steps):
        a, b = (jax.tree.map(np.asarray, batch_at(dataset.items_A, layout, 0, step)) for layout in (one, four))
        for name in ("items_RxL", "segments_RxL", "targets_RxL", "positions_RxL"):
            assert (getattr(a, name) == getattr(b, name)[: one.rows]).all()
        for name in ("users_U", "start_U", "length_U", "row_U", "column_U", "last_U"):
            assert (getattr(a, name) == getattr(b, name)).all()
        assert not b.segments_RxL[one.rows :].any() and not b.items_RxL[one.rows :].any()


def test_histories_come_out_of_the_rows_and_go_back():
    dataset = dataset_of(LENGTHS)
    batch = batch_at(dataset.items_A, layout_of(dataset, "windows", 12, 12), 0, 1)
    items_A = jnp.asarray(dataset.items_A)
    items, length = map(np.asarray, histories_of(items_A, batch))
    longer, length_1 = map(np.asarray, histories_of(items_A, batch, with_target=True))
    assert items.shape == (len(batch.users_U), 12) and longer.shape == (len(batch.users_U), 13)
    by_first = {example[1][0]: example for example in examples_in(batch)}
    assert len(by_first) == (length > 0).sum() > 5
    for row, row_1, n, n_1 in zip(items, longer, length, length_1, strict=True):
        assert not row[n:].any() and not row_1[n_1:].any()
        if n:
            _, inputs, _, targets = by_first[row[0]]
            assert tuple(row[:n]) == inputs and tuple(row_1[:n_1]) == (*inputs, targets[-1])
        assert n_1 == (n + 1 if n else 0)
    back = place(jnp.asarray(items), jnp.asarray(length), batch, "left")
    for name in ("items_RxL", "segments_RxL", "positions_RxL"):
        assert (getattr(back, name) == getattr(batch, name))[np.asarray(batch.segments_RxL) > 0].all()
    assert not back.targets_RxL.any() and (back.last_U == batch.last_U)[length > 0].all()


@pytest.mark.parametrize("positions", ["left", "right"])
def test_other_histories_go_where_the_old_ones_were(positions):
    dataset = dataset_of(LENGTHS)
    batch = batch_at(dataset.items_A, layout_of(dataset, "windows", 12, 12), 0, 0)
    length = np.asarray(batch.length_U)
    shorter = length // 2  # histories of one item vanish
    items = np.where(np.arange(12) < shorter[:, None], 1000 + np.arange(len(length))[:, None] * 20 + np.arange(12), 0)
    view = place(jnp.asarray(items), jnp.asarray(shorter), batch, positions)
    assert (shorter[length > 0] == 0).any() and (np.asarray(view.items_RxL) > 0).sum() == shorter.sum()
    for slot, count in enumerate(shorter):
        row, column = batch.row_U[slot], batch.column_U[slot]
        cells = slice(column, column + count)
        assert view.items_RxL[row, cells].tolist() == items[slot, :count].tolist()
        assert (view.segments_RxL[row, cells] == slot + 1).all()
        assert view.positions_RxL[row, cells].tolist() == list(
            range(12 - count, 12) if positions == "left" else range(count)
        )
        if count:
            assert view.last_U[slot] == row * 12 + column + count - 1
    assert (np.asarray(view.segments_RxL) > 0).sum() == shorter.sum() and not view.targets_RxL.any()
