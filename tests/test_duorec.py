"""DuoRec: the same-target index, the packed prefixes and the whole loss against plain Python and float64 numpy."""

import functools
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from seqrec_jax import systems
from seqrec_jax.config import load
from seqrec_jax.data import batches, prefixes
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.same_target import draw_same_target, same_target_index
from seqrec_jax.encoders import transformer
from seqrec_jax.errors import UserError
from seqrec_jax.main import main
from seqrec_jax.sharding import make_mesh
from seqrec_jax.systems import duorec, hparams_of
from seqrec_jax.validate import CHOICES

ROOT = Path(__file__).resolve().parents[1]
WIDTH, ITEMS = 6, 15
MODES = CHOICES["contrastive.mode"]
TINY = {
    "encoder.max_length": WIDTH, "encoder.dim": 8, "encoder.ffn": 16, "encoder.layers": 1, "train.batch_size": 8,
    "contrastive.pairs": 12,
}  # fmt: skip


view_rows = duorec.view_rows


@pytest.fixture(autouse=True)
def rows_enough(monkeypatch):
    """Room for every view of these small steps, without trying steps first; a test may put `view_rows` back."""
    monkeypatch.setattr(duorec, "view_rows", lambda *_: 48)


def dataset_of(histories, num_items=ITEMS):
    offsets = np.cumsum([0, *map(len, histories)]).astype(np.int64)
    items = np.concatenate(histories).astype(np.int32)
    return SequenceDataset(
        items, offsets, np.arange(num_items).astype(str), np.arange(len(histories)).astype(str), "", {}
    )


def random_dataset(users=30, seed=0):
    generator = np.random.default_rng(seed)
    return dataset_of([generator.integers(1, ITEMS + 1, generator.integers(1, 14)) for _ in range(users)])


def training_targets(dataset):
    """{action: (item, inputs before it)} of every training target, user by user."""
    found = {}
    for begin, end in zip(dataset.offsets_U1, dataset.offsets_U1[1:], strict=False):
        training = end - begin - 2 if end - begin >= 3 else end - begin
        found |= {int(begin + p): (int(dataset.items_A[begin + p]), int(p)) for p in range(1, training)}
    return found


def tiny(dataset, **changes):
    """(config, system, the first batch)."""
    values = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    config = load(str(ROOT / "configs" / "duorec.py"), [(key, str(value)) for key, value in values.items()])
    system = systems.build(config, dataset, make_mesh(1, 1))
    targets = config.train.targets
    layout = batches.make_layout(
        batches.train_examples(dataset, targets, WIDTH), config.train.batch_size, WIDTH,
        positions=config.encoder.positions, last_target_only=targets == "prefix",
    )  # fmt: skip
    return config, system, batches.batch_at(jnp.asarray(dataset.items_A), layout, 0, 0)


def step_of(system, batch):
    """step(hparams, key) → (loss, metrics, gradient), compiled once."""
    params, data = system.init(jax.random.key(0)), jax.tree.map(jnp.asarray, system.data)
    loss = jax.value_and_grad(system.loss, has_aux=True)

    def step(hparams, key):
        (value, (_, metrics)), gradient = loss(params, {}, batch, key, hparams, data)
        return value, metrics, gradient

    return jax.jit(step)


def contrast_of(system, batch, hparams):
    """(loss, metrics, parameters)"""
    params = system.init(jax.random.key(0))
    loss, (_, metrics) = jax.jit(system.loss)(params, {}, batch, jax.random.key(0), hparams, system.data)
    return loss, metrics, params


# Examples with the same target ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_index_holds_every_training_target_and_nothing_else(seed):
    dataset = random_dataset(seed=seed)
    index, expected = same_target_index(dataset, WIDTH), training_targets(dataset)
    first = np.asarray(index.first_V1)
    for item in range(ITEMS + 1):
        of_item = np.asarray(index.action_T)[first[item] : first[item + 1]].tolist()
        assert sorted(of_item) == [action for action, (target, _) in expected.items() if target == item]
    assert len(index.action_T) == len(expected) == first[-1]
    for action, (_, inputs) in expected.items():
        assert index.action_T[index.rank_A[action]] == action
        assert index.length_A[action] == min(inputs, WIDTH)


def test_the_draw_is_uniform_over_all_others_of_the_training_part():
    """Validation and test items are targets of others' training parts, so a leak would be drawn."""
    dataset = random_dataset(users=8, seed=3)
    index, expected = same_target_index(dataset, WIDTH), training_targets(dataset)
    actions, draws = np.array(sorted(expected)), 4000
    drawn = jax.jit(jax.vmap(draw_same_target, (0, None, None, None)))(
        jax.random.split(jax.random.key(0), draws), actions, dataset.items_A, index
    )
    alone = 0
    for action, found in zip(actions.tolist(), np.asarray(drawn).T.tolist(), strict=True):
        others = [other for other in expected if other != action and expected[other][0] == expected[action][0]]
        counts, mean = Counter(found), draws / max(len(others), 1)
        assert counts.keys() == set(others or [action])
        alone += not others
        chi = sum((count - mean) ** 2 / mean for count in counts.values())
        assert chi <= len(others) + 5 * np.sqrt(2 * len(others) + 1)
    assert 0 < alone < len(actions)


# Prefixes in rows -----------------------------------------------------------------------------------------------------


def test_targets_are_drawn_uniformly_and_never_twice():
    dataset = random_dataset()
    _, _, batch = tiny(dataset)
    targets = np.asarray(batch.targets_RxL).reshape(-1)
    real, count, draws = np.flatnonzero(targets), 10, 3000
    draw = jax.jit(jax.vmap(lambda key: prefixes.draw_targets(key, batch, count)))
    cells, actions, valid = map(np.asarray, draw(jax.random.split(jax.random.key(0), draws)))
    assert valid.all() and (dataset.items_A[actions] == targets[cells]).all()
    assert all(len(set(row)) == count for row in cells.tolist())
    seen = np.bincount(cells.reshape(-1), minlength=len(targets))
    assert seen[targets == 0].sum() == 0
    mean = draws * count / len(real)
    assert ((seen[real] - mean) ** 2 / mean).sum() <= len(real) + 5 * np.sqrt(2 * len(real))
    cells, _, valid = prefixes.draw_targets(jax.random.key(0), batch, 10_000)
    assert sorted(np.asarray(cells)[np.asarray(valid)].tolist()) == real.tolist() and len(cells) == len(targets)


next_fit = jax.jit(prefixes.next_fit, static_argnums=1)


@pytest.mark.parametrize("seed", range(8))
def test_next_fit_equals_the_plain_loop(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, WIDTH + 1, 33)
    lengths[generator.integers(1, 34) :] = 0
    row, column, expected = 0, 0, []
    for length in lengths:
        if column + length > WIDTH:
            row, column = row + 1, 0
        expected.append((row, column))
        column += length
    rows, columns = map(np.asarray, next_fit(lengths, WIDTH))
    assert [place for place, length in zip(zip(rows, columns, strict=True), lengths, strict=True) if length] == [
        place for place, length in zip(expected, lengths, strict=True) if length
    ]


@functools.partial(jax.jit, static_argnums=2)
def encode(params, batch, encoder):
    """Without dropout."""
    return transformer.encode(params, batch, encoder, None, {"embedding_dropout": 0.0, "hidden_dropout": 0.0})


def encodings_of(dataset, config, params, actions, lengths):
    """Each prefix alone in a row, no dropout."""
    rows = batches.rows_of(
        jnp.asarray(dataset.items_A), users_U=np.arange(len(actions)), start_U=actions - lengths, length_U=lengths,
        row_U=np.arange(len(actions)), column_U=np.zeros(len(actions), int), rows=len(actions), width=WIDTH,
        last_target_only=True, positions=config.encoder.positions,
    )  # fmt: skip
    return transformer.last_states(encode(params, rows, FrozenConfigDict(config.encoder)), rows)


@pytest.mark.parametrize("positions", [pytest.param("left", marks=pytest.mark.slow), "right"])
def test_packed_prefixes_are_encoded_like_rows_of_their_own(positions):
    dataset = random_dataset()
    config, system, _ = tiny(dataset, encoder__positions=positions)
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), system.init(jax.random.key(0))
    )
    index = same_target_index(dataset, WIDTH)
    actions = np.random.default_rng(0).permutation(np.asarray(index.action_T))
    lengths = np.asarray(index.length_A)[actions]
    alone = encodings_of(dataset, config, params, actions, lengths)

    def packed(rows):
        batch = prefixes.prefix_batch(
            jnp.asarray(dataset.items_A), jnp.asarray(actions), jnp.asarray(lengths),
            rows=rows, width=WIDTH, positions=positions,
        )  # fmt: skip
        return batch, np.asarray(
            transformer.last_states(encode(params, batch, FrozenConfigDict(config.encoder)), batch)
        )

    rows, _ = prefixes.next_fit(jnp.asarray(lengths), WIDTH)
    batch, states = packed(int(rows.max()) + 1)
    np.testing.assert_allclose(states, alone, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(batch.targets_RxL).reshape(-1)[batch.last_U], dataset.items_A[actions])
    assert (np.asarray(batch.targets_RxL) > 0).sum() == len(actions) > int(rows.max()) + 1

    batch, states = packed(3)  # too few rows: the last prefixes are left out, the first are as before
    fits = np.asarray(rows) < 3
    assert 0 < fits.sum() < len(actions)
    np.testing.assert_allclose(states[fits], np.asarray(alone)[fits], atol=1e-5)
    assert (np.asarray(batch.users_U) >= 0).tolist() == (np.asarray(batch.length_U) > 0).tolist() == fits.tolist()


# The loss -------------------------------------------------------------------------------------------------------------


def contrast_oracle(a, b, targets, temperature, similarity, removed, summed):
    """Eq. 14 in float64, anchor by anchor."""
    if similarity == "cosine":
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    losses = []
    for one, two in ((a, b), (b, a)):
        for i in range(len(one)):
            others = [j for j in range(len(one)) if j != i and not (removed and targets[j] == targets[i])]
            scores = np.array([one[i] @ two[i], *(one[i] @ two[j] for j in others), *(one[i] @ one[j] for j in others)])
            scores /= temperature
            losses.append(np.log(np.exp(scores - scores[0]).sum()))
    return np.mean(losses) * (2 if summed else 1)


@pytest.mark.parametrize(
    ("similarity", "negatives", "directions"),
    [("cosine", "removed", "averaged"), ("dot", "kept", "summed"), ("dot", "removed", "summed")],
)
def test_without_dropout_the_unsupervised_views_are_the_next_item_states(similarity, negatives, directions):
    """Every target is drawn, so the contrast is that of all states with themselves, whatever the order."""
    dataset = random_dataset()
    settings = {"similarity": similarity, "same_target_negatives": negatives, "directions": directions,
                "temperature": 0.7, "mode": "unsupervised", "pairs": 500}  # fmt: skip
    changes = {f"contrastive__{key}": value for key, value in settings.items()}
    config, system, batch = tiny(
        dataset, encoder__embedding_dropout=0, encoder__hidden_dropout=0, encoder__positions="right", **changes
    )
    # Each history starts where the user does: one that is cut off has older inputs in its prefixes than in its row.
    begins = np.isin(np.asarray(batch.start_U), dataset.offsets_U1)
    owner = np.maximum(np.asarray(batch.segments_RxL) - 1, 0)
    batch = batch.replace(targets_RxL=jnp.where(begins[owner], batch.targets_RxL, 0))
    loss, metrics, params = contrast_of(system, batch, hparams_of(config))
    hidden = encode(params, batch, FrozenConfigDict(config.encoder))
    targets = np.asarray(batch.targets_RxL).reshape(-1)
    states = np.asarray(hidden, np.float64).reshape(len(targets), -1)[targets > 0]
    expected = contrast_oracle(
        states, states, targets[targets > 0], 0.7, similarity, negatives == "removed", directions == "summed"
    )
    assert metrics["pairs"] == (targets > 0).sum()
    assert float(metrics["contrast"]) == pytest.approx(expected, rel=1e-4)
    assert float(loss) == pytest.approx(float(metrics["next_item"] + 0.1 * metrics["contrast"]), rel=1e-6)


def test_the_supervised_view_is_the_only_other_example_of_its_target():
    """Two users of each target: the partner is known, so the whole supervised contrast is, and DuoRec's too."""
    histories = [[1, 2, 3, 9, 9], [4, 5, 6, 9, 9], [7, 2, 6, 9, 9], [8, 5, 3, 9, 9]]
    dataset = dataset_of(histories)
    found = training_targets(dataset)
    partner = {a: b for a in found for b in found if a != b and found[a][0] == found[b][0]}
    values = {}
    for mode in ("supervised", "both_added", "duorec"):
        config, system, batch = tiny(
            dataset, contrastive__mode=mode, encoder__embedding_dropout=0, encoder__hidden_dropout=0
        )
        _, metrics, params = contrast_of(system, batch, hparams_of(config))
        values[mode] = float(metrics["contrast"])
    actions = np.array(list(found))
    length = np.array([found[action][1] for action in actions])
    own = np.asarray(encodings_of(dataset, config, params, actions, length), np.float64)
    other = own[[actions.tolist().index(partner[action]) for action in actions]]
    targets = dataset.items_A[actions]
    assert values["duorec"] == pytest.approx(contrast_oracle(own, other, targets, 1, "cosine", True, False), rel=1e-4)

    hidden = np.asarray(encode(params, batch, FrozenConfigDict(config.encoder)), np.float64)
    cells = np.flatnonzero(np.asarray(batch.targets_RxL).reshape(-1))
    at = {}
    for cell in cells:
        slot = int(batch.segments_RxL.reshape(-1)[cell]) - 1
        at[int(batch.start_U[slot]) + cell % WIDTH - int(batch.column_U[slot]) + 1] = hidden.reshape(-1, 8)[cell]
    states = np.array([at[action] for action in actions.tolist()])
    scl, ucl = (contrast_oracle(states, view, targets, 1, "cosine", True, False) for view in (other, own))
    assert values["supervised"] == pytest.approx(scl, rel=1e-4)
    assert values["both_added"] == pytest.approx(scl + ucl, rel=1e-4)


@pytest.mark.parametrize(
    "mode", [mode if mode == "duorec" else pytest.param(mode, marks=pytest.mark.slow) for mode in MODES]
)
def test_each_mode_trains_and_runs_under_vmap(mode):
    """One program for three settings: finite gradients, and each lane is the step it would be alone."""
    config, system, batch = tiny(random_dataset(), contrastive__mode=mode)
    hparams, step, key = hparams_of(config), step_of(system, batch), jax.random.key(0)
    lanes = [hparams, hparams | {"temperature": 0.3}, hparams | {"contrast_weight": 0.9, "hidden_dropout": 0.0}]
    stacked = jax.tree.map(lambda *x: jnp.array(x, jnp.float32), *lanes)
    losses, metrics, gradients = jax.jit(jax.vmap(step, (0, None)))(stacked, key)
    assert (metrics["pairs"] == 12).all() and (metrics["contrast"] > 0).all() and len(set(losses.tolist())) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    for lane, loss in zip(lanes, losses, strict=True):
        assert step(jax.tree.map(jnp.float32, lane), key)[0] == pytest.approx(float(loss), rel=1e-5)


def test_prefix_examples_have_one_target_each():
    config, system, batch = tiny(random_dataset(), train__targets="prefix")
    loss, metrics, _ = contrast_of(system, batch, hparams_of(config))
    assert np.isfinite(loss) and metrics["pairs"] == min(12, (batch.targets_RxL > 0).sum())


@pytest.mark.parametrize("rows", [1, 3])
def test_pairs_that_find_no_room_leave_the_contrast(monkeypatch, rows):
    monkeypatch.setattr(duorec, "view_rows", lambda *_: rows)
    config, system, batch = tiny(random_dataset())
    step, seen = step_of(system, batch), []
    for key in range(8):
        loss, metrics, gradient = step(hparams_of(config), jax.random.key(key))
        seen.append(int(metrics["pairs"]))
        assert all(np.isfinite(leaf).all() for leaf in (loss, *jax.tree.leaves(gradient)))
        # Cosines are within ±1, so no anchor's loss exceeds that of 2 (pairs − 1) negatives as far off as can be.
        assert 0 <= metrics["contrast"] <= np.log1p(2 * max(seen[-1] - 1, 0) * np.exp(2)) + 1e-6
    assert 0 <= min(seen) <= max(seen) < 12 and max(seen) <= rows * WIDTH // 2


def test_rows_are_enough_and_fewer_than_one_a_view(monkeypatch):
    monkeypatch.setattr(duorec, "view_rows", view_rows)
    dataset = random_dataset(users=200, seed=5)
    config, system, batch = tiny(dataset, train__batch_size=50, contrastive__pairs=80)
    assert view_rows(config, dataset, same_target_index(dataset, WIDTH), make_mesh(1, 1)) < 2 * 80
    params, hparams, data = system.init(jax.random.key(0)), hparams_of(config), jax.tree.map(jnp.asarray, system.data)
    pairs_of = jax.jit(jax.vmap(lambda key: system.loss(params, {}, batch, key, hparams, data)[1][1]["pairs"]))
    assert (pairs_of(jax.random.split(jax.random.key(0), 200)) == 80).mean() >= 0.98


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_needs_same_targets_refuses_data_without(mode):
    histories = np.arange(1, 41).reshape(8, 5)
    dataset = dataset_of(histories.tolist(), num_items=40)
    if mode in ("unsupervised", "cl4srec"):
        tiny(dataset, contrastive__mode=mode)
    else:
        with pytest.raises(UserError, match=f"contrastive.mode={mode} .*unsupervised"):
            tiny(dataset, contrastive__mode=mode)


def test_a_vocabulary_alone_is_enough_to_recommend():
    nothing = SequenceDataset(np.zeros(0, np.int32), np.zeros(1, np.int64), np.array(["a"]), np.array([], str), "", {})
    config = load(str(ROOT / "configs" / "duorec.py"))
    assert systems.build(config, nothing, make_mesh(1, 1)).states


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["contrastive.weight=-0.1"], "contrastive.weight=-0.1"),
        (["contrastive.temperature=0"], "contrastive.temperature=0.0"),
        (["contrastive.pairs=1"], "contrastive.pairs=1 is out of range; allowed: a whole number in [2, inf)"),
        (["contrastive.mode=us_x"], "'us_x'"),
        (["train.targets=prefix", "train.batch_size=1"], "train.batch_size=1"),
    ],
)
def test_bad_settings_end_with_code_2(tmp_path, capsys, caplog, overrides, said):
    flags = [f"--config={ROOT / 'configs' / 'duorec.py'}", f"--workdir={tmp_path}"]
    assert main([*flags, *(f"--config.{override}" for override in overrides)]) == 2
    assert said in capsys.readouterr().err + caplog.text
