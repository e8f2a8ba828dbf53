"""CLUE's [UR] token, views, heads and loss against numpy, its ablations, and what it may not touch."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from seqrec_jax import augment, encoders, systems
from seqrec_jax.config import load
from seqrec_jax.data import batches
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.prepare import prepare
from seqrec_jax.encoders import transformer
from seqrec_jax.encoders.transformer import USER_TOKEN
from seqrec_jax.errors import UserError
from seqrec_jax.losses import bootstrap
from seqrec_jax.main import main
from seqrec_jax.optimizer import transform
from seqrec_jax.run import train_layout
from seqrec_jax.sharding import make_mesh, replicate
from seqrec_jax.systems import clue, hparams_of
from seqrec_jax.train_step import init_state, make_train_steps

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = str(ROOT / "configs" / "clue_pretrain.py")
WIDTH, ITEMS = 6, 20
LENGTHS = (1, 2, 3, 4, 5, 9, 3, 14, 6, 8, 7, 4)
MESH = make_mesh(1, 1)
batch_at = jax.jit(batches.batch_at)
STILL = {"embedding_dropout": 0.0, "hidden_dropout": 0.0}
TINY = {
    "encoder.max_length": WIDTH,
    "encoder.dim": 8,
    "encoder.ffn": 16,
    "encoder.layers": 1,
    "encoder.init_scale": 0.02,
    "clue.width": 8,
    "clue.bottleneck": 4,
}


def dataset_of(histories, num_items=ITEMS):
    offsets_U1 = np.cumsum([0, *map(len, histories)]).astype(np.int64)
    items_A = np.concatenate(histories).astype(np.int32)
    return SequenceDataset(
        items_A, offsets_U1, np.arange(num_items).astype(str), np.arange(len(histories)).astype(str), "", {}
    )


def random_dataset(seed=0):
    generator = np.random.default_rng(seed)
    return dataset_of([generator.integers(1, ITEMS + 1, n) for n in LENGTHS])


def config_of(**settings):
    values = TINY | {name.replace("__", "."): value for name, value in settings.items()}
    return load(PRETRAIN, [(key, str(value)) for key, value in values.items()])


def batch_of(dataset, *, packed=True, batch_size=100):
    """All training parts in one batch whose rows have room for the token."""
    examples = batches.train_examples(dataset, "all", WIDTH, whole=True)
    layout = batches.make_layout(examples, batch_size, WIDTH, packed=packed, room=1)
    return batch_at(jnp.asarray(dataset.items_A), layout, 0, 0)


def case_of(**settings):
    """(config, system, parameters, enlarged so that attention and positions matter)."""
    config = config_of(**settings)
    system = systems.build(config, random_dataset(), MESH)
    return config, system, jax.tree.map(lambda x: 5 * x, system.init(jax.random.key(0)))


# The [UR] token -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["left", "right"])
@pytest.mark.parametrize("packed", [True, False])
def test_token_stands_behind_every_item(packed, positions):
    """No item is lost, histories share rows, and every place has the id of a history one item longer."""
    dataset = random_dataset()
    batch = encoders.append_user_token(batch_of(dataset, packed=packed), positions)
    assert batch.items_RxL.shape[1] == WIDTH + 1 and (batch.items_RxL.shape[0] < len(LENGTHS)) == packed
    used = 0
    for user, row, column, length in zip(batch.users_U, batch.row_U, batch.column_U, batch.length_U, strict=True):
        if user < 0:
            assert length == 0
            continue
        begin, end = dataset.offsets_U1[user], dataset.offsets_U1[user + 1]
        end -= 2 if end - begin >= 3 else 0
        wanted = [*dataset.items_A[max(begin, end - WIDTH) : end], USER_TOKEN]
        cells = slice(int(column), int(column + length))
        first = WIDTH + 1 - len(wanted) if positions == "left" else 0
        assert batch.items_RxL[row, cells].tolist() == wanted
        assert batch.positions_RxL[row, cells].tolist() == list(range(first, first + len(wanted)))
        assert len(set(batch.segments_RxL[row, cells].tolist())) == 1
        used += len(wanted)
    assert int((batch.segments_RxL > 0).sum()) == int((batch.items_RxL != 0).sum()) == used


def test_user_state_reads_the_whole_history_and_nothing_else():
    """The same packed or alone; every item of it changes it, its order too, no other user does."""
    config, _, params = case_of()
    encoder, dataset = FrozenConfigDict(config.encoder), random_dataset()

    @jax.jit
    def states(batch):
        states_UxD = encoders.user_states(params, batch, encoder, None, STILL)
        return jnp.zeros((len(LENGTHS), 8)).at[batch.users_U].add(jnp.where(batch.users_U[:, None] >= 0, states_UxD, 0))

    whole, batch = states(batch_of(dataset)), encoders.append_user_token(batch_of(dataset), "left")
    hidden_RxLxD = jax.jit(lambda batch: encoders.encode(params, batch, encoder, None, STILL, causal=False))(batch)
    found = jax.jit(lambda batch: encoders.user_states(params, batch, encoder, None, STILL))(batch_of(dataset))
    np.testing.assert_allclose(found, transformer.last_states(hidden_RxLxD, batch), atol=1e-5)
    np.testing.assert_allclose(whole, states(batch_of(dataset, packed=False)), atol=1e-5)
    user = 7
    last = dataset.offsets_U1[user + 1] - 3  # of the training part
    for place in range(last - WIDTH + 1, last + 1):
        items_A = dataset.items_A.copy()
        items_A[place] = items_A[place] % ITEMS + 1
        changed = states(batch_of(dataset_of(np.split(items_A, dataset.offsets_U1[1:-1]))))
        differs = np.abs(changed - whole).max(axis=1) > 1e-4
        assert differs.tolist() == [index == user for index in range(len(LENGTHS))]


def test_other_systems_have_no_token():
    config = load(str(ROOT / "configs" / "sasrec.py"), [])
    params = encoders.init(jax.random.key(0), FrozenConfigDict(config.encoder), ITEMS)
    assert "user_token" not in params["encoder"] and params["encoder"]["positions"].shape == (50, config.encoder.dim)


# Views ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "ratio"), [(1, 0.9), (5, 0.2), (8, 0.5), (8, 1.0), (10, 0.0), (10, 0.33)])
def test_drop_leaves_out_one_window(length, ratio):
    items = jnp.arange(1, 11) * (jnp.arange(10) < length)
    drop = jax.jit(jax.vmap(augment.drop, (0, None, None, None)))
    views, lengths = drop(jax.random.split(jax.random.key(0), 400), items, length, ratio)
    span = min(int(np.float32(ratio) * length), length - 1)
    wanted = {(*range(1, start + 1), *range(start + span + 1, length + 1)) for start in range(length - span + 1)}
    assert set(lengths.tolist()) == {length - span}
    assert {tuple(view[: length - span]) for view in views.tolist()} == wanted
    assert not views[:, length - span :].any()


@pytest.mark.parametrize("view", ["mask", "crop", "permute"])
def test_views_differ_and_keep_what_they_keep(view):
    config, dataset = config_of(clue__view=view, clue__share=0.5), random_dataset()
    batch = batch_of(dataset)
    items_UxL, length_U = batches.histories_of(jnp.asarray(dataset.items_A), batch)
    change = jax.jit(clue.two_views, static_argnames=("view", "mask_item", "positions"))
    views = change(
        jax.random.key(0), batch, jnp.asarray(dataset.items_A), view=view, hparams=hparams_of(config),
        mask_item=ITEMS + 1, positions="left",
    )  # fmt: skip
    lines = []
    for changed in views:
        in_place = changed.replace(start_U=changed.row_U * (WIDTH + 1) + changed.column_U)
        lines.append(np.asarray(batches.histories_of(changed.items_RxL.reshape(-1), in_place)[0]))
    assert (np.asarray(lines[0]) != np.asarray(lines[1])).any()
    for n, before, after in zip(length_U.tolist(), items_UxL, lines[0], strict=True):
        before, after = before[:n].tolist(), after[after > 0].tolist()
        if view == "mask":
            assert after.count(ITEMS + 1) == n // 2
            assert all(a in (b, ITEMS + 1) for a, b in zip(after, before, strict=True))
        elif view == "permute":
            assert sorted(after) == sorted(before)
        else:
            assert len(after) == n - min(n // 2, max(n - 1, 0))


def test_dropout_views_are_the_history_itself():
    batch = batch_of(random_dataset())
    views = clue.two_views(jax.random.key(0), batch, None, "dropout", {}, ITEMS + 1, "left")
    assert all(view is batch for view in views)


# Heads and loss -------------------------------------------------------------------------------------------------------


@pytest.fixture
def heads():
    """(users [2, U, 8], which are real, parameters with all entries moved, fresh statistics), float64 on the host."""
    generator = np.random.default_rng(0)
    users, valid = generator.normal(size=(2, 9, 8)), np.arange(9) < 7
    params = bootstrap.init_heads(jax.random.key(0), 8, 12, 4)
    params = jax.tree.map(lambda x: np.asarray(x) + 0.3 * generator.normal(size=x.shape), params)
    return users, valid, params, bootstrap.init_statistics(12, 4)


def normalised(x, valid, layer):
    x = x @ layer["kernel"]
    real = x[valid]
    return (x - real.mean(axis=0)) / np.sqrt(real.var(axis=0) + 1e-5) * layer["scale"] + layer["bias"], real


def test_heads_normalise_each_view_by_its_real_users(heads):
    users, valid, params, statistics = heads
    users_2xUxD = jnp.asarray(users, jnp.float32)
    z, new = jax.jit(bootstrap.project)(users_2xUxD, valid, params["projector"], statistics["projector"])
    p, new_p = jax.jit(bootstrap.predict)(z, valid, params["predictor"], statistics["predictor"])
    means = []
    for view in (0, 1):
        x = users[view]
        for layer in range(3):
            x, real = normalised(np.maximum(x, 0) if layer else x, valid, params["projector"][f"layer_{layer}"])
            means.append((layer, real.mean(axis=0), real.var(axis=0)))
        np.testing.assert_allclose(z[view], x, atol=2e-4)
        inner, _ = normalised(x, valid, params["predictor"]["layer_0"])
        output = params["predictor"]["output"]
        np.testing.assert_allclose(p[view], np.maximum(inner, 0) @ output["kernel"] + output["bias"], atol=2e-4)
    for layer in range(3):
        mean, variance = (np.mean([m[part] for m in means if m[0] == layer], axis=0) for part in (1, 2))
        found = new[f"layer_{layer}"]
        np.testing.assert_allclose(found["mean"], 0.1 * mean, atol=1e-4)
        np.testing.assert_allclose(found["variance"], 0.9 + 0.1 * variance, atol=1e-4)
    assert new_p["layer_0"]["mean"].shape == (4,)


def test_loss_and_spread_of_a_hand_made_case(heads):
    users, valid, _, _ = heads
    p, z = users, users[::-1] + np.arange(8)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    cosine = (unit(p) * unit(z[::-1])).sum(axis=-1)[:, valid]
    loss = functools.partial(bootstrap.symmetrised_loss, jnp.asarray(p, jnp.float32))
    assert loss(jnp.asarray(z, jnp.float32), valid) == pytest.approx(-cosine.mean(), abs=1e-5)
    assert loss(jnp.asarray(3 * p[::-1], jnp.float32), valid) == pytest.approx(-1, abs=1e-5)
    gradient = jax.grad(lambda z, stop: loss(z, valid, stop_gradient=stop))
    assert not gradient(jnp.asarray(z, jnp.float32), True).any()
    assert gradient(jnp.asarray(z, jnp.float32), False)[:, valid].any()
    assert bootstrap.spread(jnp.asarray(z), valid) == pytest.approx(unit(z)[:, valid].std(axis=1).mean(), abs=1e-5)
    assert bootstrap.spread(jnp.ones((2, 9, 8)), valid) == pytest.approx(0, abs=1e-6)


def test_masked_items_are_recovered_from_their_cells():
    """Cross-entropy over all items at the masked cells alone; what is masked is not read."""
    config, system, params = case_of(clue__pretraining="masked_items", clue__share=0.5)
    assert params.keys() == {"items", "encoder"} and system.state == {}
    batch, key = batch_of(random_dataset()), jax.random.key(3)
    hparams = hparams_of(config) | STILL
    value, _ = jax.jit(system.loss)(params, {}, batch, key, hparams, replicate(MESH, system.data))
    key_mask, _ = jax.random.split(key)
    hidden = np.asarray((jax.random.uniform(key_mask, batch.items_RxL.shape) < 0.5) & (batch.segments_RxL > 0))
    masked = batch.replace(items_RxL=jnp.where(hidden, ITEMS + 1, batch.items_RxL))
    marked = encoders.append_user_token(masked, "left")
    encoder = FrozenConfigDict(config.encoder)
    states = jax.jit(lambda batch: encoders.encode(params, batch, encoder, None, STILL, causal=False))(marked)
    logits = np.asarray(states, np.float64)[hidden] @ np.asarray(params["items"], np.float64)[1 : ITEMS + 1].T
    targets = np.asarray(batch.items_RxL)[hidden] - 1
    wanted = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(targets)), targets]
    assert value == pytest.approx(wanted.mean(), rel=1e-4)


def test_momentum_is_that_of_sgd():
    gradients, params = [jnp.array([1.0, -2.0]), jnp.array([0.5, 1.0])], jnp.zeros(2)
    settings = FrozenConfigDict({"optimizer": "sgd", "weight_decay": 0.0, "clip_norm": 0.0})
    rule = transform(settings, {"beta1": 0.9}, 0.1)
    state, velocity, found, wanted = rule.init(params), np.zeros(2), params, np.zeros(2)
    for gradient in gradients:
        updates, state = rule.update(gradient, state)
        velocity = 0.9 * velocity + np.asarray(gradient)
        found, wanted = found + updates, wanted - 0.1 * velocity
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_user_alone_in_a_step_teaches_nothing():
    """The last step of an epoch may hold one user, whom batch normalisation would make a constant of."""
    config, dataset = config_of(), dataset_of([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])
    system, batch = systems.build(config, dataset, MESH), batch_of(dataset, batch_size=1)
    assert int((batch.users_U >= 0).sum()) == 1
    hparams = jax.tree.map(jnp.float32, hparams_of(config))
    data = replicate(MESH, system.data)
    loss = lambda params: system.loss(params, system.state, batch, jax.random.key(1), hparams, data)[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(system.init(jax.random.key(0)))
    assert value == 0 and not any(leaf.any() for leaf in jax.tree.leaves(gradient))


# Collapse -------------------------------------------------------------------------------------------------------------


def trained(**settings):
    """(distance from -1, spread) of some dozens of steps' end."""
    config = config_of(train__batch_size=64, encoder__embedding_dropout=0.2, encoder__hidden_dropout=0.2,
                       train__learning_rate=0.003, **settings)  # fmt: skip
    generator = np.random.default_rng(0)
    dataset = dataset_of([generator.integers(1, ITEMS + 1, 8) for _ in range(64)])
    system = systems.build(config, dataset, MESH)
    examples = batches.train_examples(dataset, "all", WIDTH, whole=True)
    layout = batches.make_layout(examples, 64, WIDTH, room=1)
    plan = batches.plan_epoch(layout, jax.random.key(0))
    hparams = {name: np.float32(value) for name, value in hparams_of(config).items()}
    arguments = jnp.int32(0), layout, plan, replicate(MESH, system.data), hparams
    state = init_state(system, config, MESH)
    steps = make_train_steps(system, config, MESH, 1000)
    state, _ = steps(state, 590, *arguments)
    _, sums = steps(state, 10, *arguments)
    return float(sums["above_minimum"]) / 10, float(sums["spread"]) / 10


@pytest.mark.slow
def test_both_ablations_collapse_where_the_method_does_not():
    """Figure 6: without stop-gradient, or without predictor, all users are projected to one place."""
    post = {"encoder__norm": "post", "encoder__input_norm": True, "encoder__final_norm": False}
    distance, spread = trained(**post)
    assert distance > 0.2 and spread > 0.8 / 8**0.5
    for ablation in ("stop_gradient", "predictor"):
        distance, spread = trained(**post, **{f"clue__{ablation}": False})
        assert distance < 0.05 and spread < 0.3 / 8**0.5


def pretrained(variant, cache_dir):
    """(mean distance from -1 over the last 10 of 640 steps of 64 users, effective rank of the users' unit states)."""
    config = load(f"{PRETRAIN}:{variant}", [])
    dataset = prepare(config.data, cache_dir)
    system = systems.build(config, dataset, MESH)
    layout = train_layout(config, dataset, MESH)
    hparams = {name: np.float32(value) for name, value in hparams_of(config).items()}
    data = replicate(MESH, system.data)
    plan = batches.plan_epoch(layout, jax.random.key(0))
    arguments = jnp.int32(0), layout, plan, data, hparams
    state, steps = init_state(system, config, MESH), make_train_steps(system, config, MESH, 1000)
    state, _ = steps(state, 630, *arguments)
    state, sums = steps(state, 10, *arguments)
    states, read = jax.jit(system.states), jax.jit(batches.batch_of)
    users = []
    for step in range(layout.steps):
        batch = read(data["items_A"], layout, plan, step)
        users.append(np.asarray(states(state.params, batch), np.float64)[np.asarray(batch.users_U) >= 0])
    users_UxD = np.concatenate(users)
    assert len(users_UxD) == len(dataset.user_ids)
    users_UxD /= np.linalg.norm(users_UxD, axis=1, keepdims=True)
    variance_D = np.linalg.svd(users_UxD - users_UxD.mean(axis=0), compute_uv=False) ** 2
    share_D = variance_D / variance_D.sum()
    return float(sums["above_minimum"]) / 10, np.exp(-(share_D * np.log(share_D + 1e-12)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["", "no_stop_gradient", "no_predictor"])
def test_users_keep_their_dimensions_and_lose_them_in_both_ablations(tmp_path, ablation):
    """The configuration as it is, on the embedded data: the ablations leave the loss at -1 and the users on a line.

    Their projections stay apart, because batch normalisation enlarges the one direction that is left.
    """
    distance, rank = pretrained(ablation, tmp_path)
    if ablation:
        assert distance < 0.01 and rank < 2.5
    else:
        assert distance > 0.02 and rank > 5


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.train.batch_size=1"], "train.batch_size=1 leaves CLUE's batch normalisation a single user"),
        (["--config.encoder.user_token=false"], "system=clue needs the [UR] token"),
        (["--config.encoder.kind=gru"], "encoder.kind=gru has no [UR] token"),
        (["--config.encoder.embedding_dropout=0", "--config.encoder.hidden_dropout=0"], "makes two equal views"),
        (["--config.clue.pretraining=masked_items", "--config.clue.share=0"], "clue.share=0 masks no item"),
        (["--config.train.targets=prefix"], "train.targets=prefix"),
        (["--config.report.baselines=sasrec"], "names sasrec, without the [UR] token"),
        (["--config.task=profile"], "a task belongs to system=downstream"),
        (["--config.data.synthetic_users=1"], "one training user"),
    ],
)
def test_bad_settings_end_with_code_2(tmp_path, capsys, flags, said):
    assert main([f"--config={PRETRAIN}", f"--workdir={tmp_path}/run", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_single_user_is_refused():
    with pytest.raises(UserError, match="one training user"):
        systems.build(config_of(), dataset_of([[1, 2, 3, 4]]), MESH)


def test_data_without_a_user_of_three_items_are_refused_before_training(tmp_path, capsys):
    (tmp_path / "data.txt").write_text("".join(f"{user} {user % 5 + 1} {user % 7 + 6}\n" for user in range(1, 31)))
    flags = [f"--config.data.path={tmp_path}/data.txt", "--config.train.max_epochs=1"]
    assert main([f"--config={PRETRAIN}:own", f"--workdir={tmp_path}/run", *flags]) == 2
    assert "no user has 3 items or more" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
