"""S3-Rec's views against plain Python, its loss, what it may not read, and pretraining and finetuning end to end."""

import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import FrozenConfigDict

from seqrec_jax import cloze, systems
from seqrec_jax.config import load
from seqrec_jax.data import batches
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.encoders import transformer
from seqrec_jax.errors import UserError
from seqrec_jax.main import main
from seqrec_jax.sharding import make_mesh, replicate
from seqrec_jax.systems import hparams_of, s3rec

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN, FINETUNE = str(ROOT / "configs" / "s3rec_pretrain.py"), str(ROOT / "configs" / "s3rec_finetune.py")
WIDTH, ITEMS, DRAWS = 6, 15, 4000
LENGTHS = (1, 2, 3, 4, 5, 9, 3, 14, 6, 8, 7, 4)
MASK = 99
MESH = make_mesh(1, 1)
batch_at = jax.jit(batches.batch_at)
TINY = {"encoder.max_length": WIDTH, "encoder.dim": 8, "encoder.ffn": 16, "encoder.layers": 1}
STILL = {"embedding_dropout": 0.0, "hidden_dropout": 0.0}


def dataset_of(histories, num_items=ITEMS):
    """Item v has the attributes v % 4 and v % 3 + 4, but item 1 none."""
    sets = [[]] + [[v % 4 + 1, v % 3 + 5] for v in range(2, num_items + 1)]
    return SequenceDataset(
        np.concatenate(histories).astype(np.int32), np.cumsum([0, *map(len, histories)]).astype(np.int64),
        np.arange(num_items).astype(str), np.arange(len(histories)).astype(str), "", {},
        np.concatenate(sets).astype(np.int32), np.cumsum([0, *map(len, sets)]), np.arange(7).astype(str),
    )  # fmt: skip


def numbered():
    """Item a + 1 at action a, so that an item names its action."""
    ends = np.cumsum(LENGTHS)
    return dataset_of([np.arange(e - n, e) + 1 for n, e in zip(LENGTHS, ends, strict=True)], int(ends[-1]))


def random_dataset(seed=0):
    generator = np.random.default_rng(seed)
    return dataset_of([generator.integers(1, ITEMS + 1, n) for n in LENGTHS])


def training_parts(dataset):
    parts = zip(dataset.offsets_U1, dataset.offsets_U1[1:], strict=False)
    return [dataset.items_A[a : b - 2 if b - a >= 3 else b].tolist() for a, b in parts]


def batch_of(dataset, **layout):
    """All training parts in one batch."""
    examples = batches.train_examples(dataset, "all", WIDTH, whole=True)
    layout = batches.make_layout(examples, 100, WIDTH, **layout)
    return batch_at(jnp.asarray(dataset.items_A), layout, 0, 0)


def lines_of(items_RxL, batch):
    """{user: the items of its cells} of an array over the batch's cells."""
    items, places = np.asarray(items_RxL), jax.tree.map(np.asarray, batch)
    return {
        int(user): items[row, column : column + length].tolist()
        for user, row, column, length in zip(
            places.users_U, places.row_U, places.column_U, places.length_U, strict=True
        )
        if user >= 0
    }  # fmt: skip


def uniform(counts, choices):
    """Whether the counted draws are uniform over all `choices`, by chi squared at five deviations."""
    assert counts.keys() <= set(choices)
    mean = sum(counts.values()) / len(choices)
    chi = sum((counts[choice] - mean) ** 2 / mean for choice in choices)
    return chi <= len(choices) - 1 + 5 * np.sqrt(2 * len(choices))


def keys():
    return jax.random.split(jax.random.key(0), DRAWS)


# Views ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all", "windows", "prefix"])
def test_examples_are_whole_training_parts(targets):
    dataset = numbered()
    found = batches.train_examples(dataset, targets, WIDTH, whole=True)
    expected = []
    for user, part in enumerate(training_parts(dataset)):
        ends = range(1, len(part) + 1) if targets == "prefix" else range(len(part), 0, -WIDTH)
        pieces = [part[max(0, end - WIDTH) : end] for end in ends]
        expected += [(user, piece) for piece in (pieces[:1] if targets == "all" else pieces)]
    starts = zip(found.user_E, found.start_E, found.length_E, strict=True)
    assert [(user, dataset.items_A[a : a + n].tolist()) for user, a, n in starts] == expected


def test_the_last_item_is_always_masked_the_others_by_chance():
    batch = batch_of(numbered())
    assert batch.items_RxL.shape[0] < len(LENGTHS)  # packed
    last = {user: [False] * (len(line) - 1) + [True] for user, line in lines_of(batch.items_RxL, batch).items()}
    draw = jax.jit(jax.vmap(cloze.masked_cells, (0, None, None)))
    masked = np.asarray(draw(keys(), batch, jnp.float32(0.3)))
    real, is_last = np.asarray(batch.segments_RxL) > 0, np.zeros_like(masked[0])
    is_last.reshape(-1)[np.asarray(batch.last_U)] = True
    assert masked[:, is_last].all() and not masked[:, ~real].any()
    assert masked[:, real & ~is_last].mean(axis=0) == pytest.approx(0.3, abs=5 * np.sqrt(0.3 * 0.7 / DRAWS))
    assert lines_of(draw(keys(), batch, jnp.float32(0))[0], batch) == last
    assert (np.asarray(draw(keys(), batch, jnp.float32(1)))[0] == real).all()


@pytest.mark.parametrize("positions", ["left", "right"])
def test_histories_are_cut_behind_any_of_their_items_alike(positions):
    batch = batch_of(numbered(), positions=positions)
    whole = lines_of(batch.items_RxL, batch)
    ends_UxK = np.asarray(jax.vmap(lambda key: cloze.cut(key, batch, positions).length_U)(keys())).T
    for user, length, ends_K in zip(batch.users_U.tolist(), batch.length_U.tolist(), ends_UxK, strict=True):
        assert uniform(Counter(ends_K.tolist()), range(1, length + 1) if user >= 0 else [0])
    cut = cloze.cut(jax.random.key(1), batch, positions)
    for user, items in lines_of(cut.items_RxL, cut).items():
        assert items == whole[user][: len(items)]
        first = WIDTH - len(items) if positions == "left" else 0
        assert lines_of(cut.positions_RxL, cut)[user] == list(range(first, first + len(items)))
    assert (cut.items_RxL > 0).sum() == (cut.segments_RxL > 0).sum() == cut.length_U.sum() < batch.length_U.sum()


def test_segments_are_uniform():
    lengths = jnp.arange(WIDTH + 2)
    begins, spans = jax.jit(jax.vmap(cloze.draw_segments, (0, None)))(keys(), lengths)
    for length in range(WIDTH + 2):
        drawn = list(zip(np.asarray(begins)[:, length].tolist(), np.asarray(spans)[:, length].tolist(), strict=True))
        if length < 2:
            assert set(drawn) == {(0, 0)}
            continue
        assert uniform(Counter(span for _, span in drawn), range(1, length // 2 + 1))
        for span in range(1, length // 2 + 1):
            assert uniform(Counter(begin for begin, s in drawn if s == span), range(length - span + 1))


@pytest.mark.parametrize("packed", [True, False])
def test_segment_views_against_plain_python(packed):
    dataset = numbered()
    batch = batch_of(dataset, packed=packed)
    generator = np.random.default_rng(0)
    lengths = np.asarray(batch.length_U)
    span = np.array([generator.integers(1, max(n // 2, 1) + 1) if n >= 2 else 0 for n in lengths])
    begin = np.array([generator.integers(0, n - s + 1) for n, s in zip(lengths, span, strict=True)])
    source = generator.integers(0, len(dataset.items_A) - WIDTH, len(lengths))
    views = jax.jit(cloze.segment_views, static_argnums=5)(
        batch, jnp.asarray(dataset.items_A), jnp.asarray(begin), jnp.asarray(span), jnp.asarray(source), MASK
    )
    expected = [{}, {}, {}]
    for slot in np.flatnonzero(lengths):
        user, a, b = int(batch.users_U[slot]), begin[slot], begin[slot] + span[slot]
        line = training_parts(dataset)[user][-WIDTH:]
        other = dataset.items_A[source[slot] : source[slot] + span[slot]].tolist()
        masks = [MASK] * len(line)
        expected[0][user] = line[:a] + masks[a:b] + line[b:]
        expected[1][user] = masks[:a] + line[a:b] + masks[b:]
        expected[2][user] = masks[:a] + other + masks[b:]
    padding = np.asarray(batch.segments_RxL) == 0
    for view, lines in zip(views, expected, strict=True):
        assert lines_of(view, batch) == lines and not np.asarray(view)[padding].any()


def test_corrupted_segments_are_of_others_training_parts():
    """Uniform over the users whose part is long enough, then over the windows in it; nothing else is ever drawn."""
    dataset = numbered()
    parts, pool = training_parts(dataset), cloze.segment_pool(dataset, WIDTH)
    users = jnp.arange(len(parts))
    draw = jax.jit(jax.vmap(cloze.draw_windows, (0, None, None, None)))
    for span in range(WIDTH // 2 + 1):
        sources, found = draw(keys(), users, jnp.full(len(parts), span), pool)
        for user in range(len(parts)):
            others = [other for other, part in enumerate(parts) if other != user and len(part) >= span]
            assert np.asarray(found)[:, user].all() == (span > 0)
            if span:
                owner = np.searchsorted(dataset.offsets_U1, np.asarray(sources)[:, user], side="right") - 1
                places = np.asarray(sources)[:, user] - dataset.offsets_U1[owner]
                assert uniform(Counter(owner.tolist()), others)
                longest = max(others, key=lambda other: len(parts[other]))
                assert uniform(Counter(places[owner == longest].tolist()), range(len(parts[longest]) - span + 1))
                assert (places + span <= np.array([len(part) for part in parts])[owner]).all()
    alone = cloze.segment_pool(dataset_of([[1, 2, 3, 4, 5, 6], [1]]), WIDTH)
    assert not cloze.draw_windows(jax.random.key(0), jnp.arange(2), jnp.array([2, 0]), alone)[1].any()


def test_the_published_corrupted_segments_lie_anywhere():
    actions, spans = sum(LENGTHS), jnp.array([0, 1, 3])
    draw = jax.jit(jax.vmap(cloze.draw_published_windows, (0, None, None)), static_argnums=2)
    sources, found = draw(keys(), spans, actions)
    assert (np.asarray(found) == [False, True, True]).all()
    for column, span in ((1, 1), (2, 3)):
        assert uniform(Counter(np.asarray(sources)[:, column].tolist()), range(actions - span + 1))


@pytest.mark.parametrize("positions", ["left", "right"])
def test_the_mask_behind_a_history(positions):
    dataset = numbered()
    batch = batch_of(dataset, positions=positions)
    asked = jax.jit(cloze.ask_next, static_argnums=(1, 2))(batch, MASK, positions)
    lines = lines_of(asked.items_RxL, asked)
    parts = training_parts(dataset)
    assert lines == {user: [*part[-(WIDTH - 1) :], MASK] for user, part in enumerate(parts)}
    ids = lines_of(asked.positions_RxL, asked)
    for user, line in lines.items():
        first = WIDTH - len(line) if positions == "left" else 0
        assert ids[user] == list(range(first, first + len(line)))
    real = np.asarray(asked.segments_RxL) > 0
    assert (np.asarray(asked.items_RxL) > 0).tolist() == real.tolist() and real.sum() == sum(map(len, lines.values()))
    assert (
        np.asarray(asked.items_RxL).reshape(-1)[np.asarray(asked.last_U)][np.asarray(asked.users_U) >= 0] == MASK
    ).all()


def test_negatives_are_training_items_that_the_user_has_not_met():
    histories = [[1, 2, 3, 14, 15], [4, 2, 2, 5, 1], [1, 2, 3, 4, 6, 7, 8], [9, 8]]  # 5, 7, 8, 14, 15 are held out
    dataset = dataset_of(histories)
    batch, source = batch_of(dataset), s3rec.trained_items(dataset)
    trained = set().union(*map(set, training_parts(dataset)))
    assert trained == {1, 2, 3, 4, 6, 8, 9}
    drawn = jax.jit(jax.vmap(lambda key: s3rec.draw_negatives(key, batch, source, 2)))(keys()[:500])
    owner = np.asarray(batch.users_U)[np.maximum(np.asarray(batch.segments_RxL) - 1, 0)].reshape(-1)
    for user, part in enumerate(training_parts(dataset)):
        cells = (owner == user) & (np.asarray(batch.segments_RxL) > 0).reshape(-1)
        assert uniform(Counter(np.asarray(drawn)[:, cells].reshape(-1).tolist()), sorted(trained - set(part)))


# The loss -------------------------------------------------------------------------------------------------------------


def case_of(dataset, **changes):
    values = TINY | {key if "." in key else f"s3rec.{key}": value for key, value in changes.items()}
    config = load(PRETRAIN, [(key, str(value)) for key, value in values.items()])
    return config, systems.build(config, dataset, MESH)


@pytest.fixture(scope="module", params=["code", "paper"])
def case(request):
    """(hparams, parameters, data, step), the step compiled once."""
    dataset = random_dataset()
    config, system = case_of(dataset, form=request.param, negatives=2)
    loss = jax.value_and_grad(system.loss, has_aux=True)

    def step(params, hparams, key, data):
        batch = batches.batch_at(data["items_A"], layout, 0, 0)
        (value, (_, terms)), gradient = loss(params, {}, batch, key, hparams, data)
        return value, terms, gradient

    layout = batches.make_layout(batches.train_examples(dataset, "all", WIDTH, whole=True), 100, WIDTH)
    hparams = jax.tree.map(jnp.float32, hparams_of(config))
    params = jax.tree.map(lambda x: 5 * x, system.init(jax.random.key(0)))
    return *replicate(MESH, (hparams, params, system.data)), jax.jit(step)


@pytest.mark.slow
def test_what_is_cut_is_learned_from_as_if_it_were_all():
    dataset = random_dataset()
    (config, system), (_, plain) = (case_of(dataset, cut=cut) for cut in (True, False))
    key, params, batch = jax.random.key(2), plain.init(jax.random.key(0)), batch_of(dataset)
    shorter = cloze.cut(jax.random.fold_in(key, 3), batch, "left")
    hparams = jax.tree.map(jnp.float32, hparams_of(config))
    loss = lambda system, batch: jax.jit(system.loss)(params, {}, batch, key, hparams, plain.data)[0]  # noqa: E731
    assert loss(system, batch) == pytest.approx(float(loss(plain, shorter)), rel=1e-5)
    assert abs(loss(system, batch) - loss(plain, batch)) > 1


def off(*names):
    return replicate(MESH, {name: jnp.float32(0) for name in names})


def test_the_loss_is_the_weighted_sum_and_a_weight_of_0_has_no_gradient(case):
    hparams, params, data, step = case
    key = jax.random.key(1)
    value, terms, gradient = step(params, hparams, key, data)
    assert terms.keys() == set(s3rec.OBJECTIVES)
    assert float(value) == pytest.approx(sum(float(hparams[n] * terms[n]) for n in terms), rel=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(gradient["maps"][name]["kernel"].any() for name in terms) and gradient["attributes"].all()
    for name in s3rec.OBJECTIVES:
        off_value, off_terms, slopes = step(params, hparams | off(name), key, data)
        assert float(off_value) == pytest.approx(float(value - hparams[name] * terms[name]), rel=1e-5)
        assert not any(leaf.any() for leaf in jax.tree.leaves(slopes["maps"][name]))
        assert off_terms == terms
    assert not step(params, hparams | off("aap", "map"), key, data)[2]["attributes"].any()


def test_nothing_held_out_is_read(case):
    """Other validation and test items, the same loss and gradient, bit for bit."""
    hparams, params, data, step = case
    changed, dataset = np.asarray(data["items_A"]).copy(), random_dataset()
    for end, length in zip(dataset.offsets_U1[1:], LENGTHS, strict=True):
        if length >= 3:
            changed[end - 2 : end] = changed[end - 2 : end] % ITEMS + 1
    histories = np.split(changed, dataset.offsets_U1[1:-1])
    _, other = case_of(dataset_of(histories), form="code" if "bias" in params["maps"]["sp"] else "paper", negatives=2)
    assert not np.array_equal(changed, data["items_A"])
    for seed in range(4):
        found = step(params, hparams, jax.random.key(seed), data)
        again = step(params, hparams, jax.random.key(seed), replicate(MESH, other.data))
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, again))


def test_some_steps_lower_every_objective(case):
    hparams, params, data, step = case
    hparams, adam = hparams | off(*STILL), optax.adam(0.01)
    params = jax.tree.map(lambda x: x / 5, params)  # as drawn: sharper scores would depend on the last digit

    def objectives(params):  # the mean over some draws of masks, segments and negatives
        found = [step(params, hparams, jax.random.key(seed), data)[1] for seed in range(100, 120)]
        return jax.tree.map(lambda *values: float(sum(values)) / len(values), *found)

    start = objectives(params)
    state = adam.init(params)
    update = jax.jit(lambda gradient, state, params: (lambda u, s: (optax.apply_updates(params, u), s))(
        *adam.update(gradient, state)))  # fmt: skip
    for seed in range(1, 81):
        params, state = update(step(params, hparams, jax.random.key(seed), data)[2], state, params)
    end = objectives(params)
    assert {name: end[name] < start[name] for name in end} == dict.fromkeys(end, True)


def test_views_are_encoded_like_histories_of_their_own():
    """Packed beside one another or each in a batch of its own: the same states, in both directions."""
    dataset = numbered()
    config, system = case_of(dataset)
    params, encoder = jax.tree.map(lambda x: 5 * x, system.init(jax.random.key(0))), FrozenConfigDict(config.encoder)
    batch, alone = batch_of(dataset), batch_of(dataset, packed=False)
    encode = jax.jit(lambda batch: transformer.encode(params, batch, encoder, None, STILL, causal=False))
    encode_views = jax.jit(
        lambda views: s3rec.encode_views(params, batch, views, encoder, None, STILL, MESH, causal=False)
    )
    reverse = {
        "forth": lambda items: items,
        "back": lambda items: jnp.where(items > 0, len(dataset.item_ids) + 1 - items, 0),
    }
    views = {name: change(batch.items_RxL) for name, change in reverse.items()}
    hidden = encode_views(views)
    for name, change in reverse.items():
        plain = alone.replace(items_RxL=change(alone.items_RxL))
        expected = lines_of(encode(plain), plain)
        found = lines_of(hidden[name].reshape(*batch.items_RxL.shape, -1), batch)
        for user, states in expected.items():
            np.testing.assert_allclose(found[user], states, atol=1e-5)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_each_objective_reads_its_own_view(form):
    """The sums again, cell by cell, from views whose states are all different."""
    dataset = random_dataset()
    config, system = case_of(dataset, form=form)
    params, batch = jax.tree.map(lambda x: 20 * x, system.init(jax.random.key(0))), batch_of(dataset)
    generator, cells = np.random.default_rng(0), batch.items_RxL.size
    hidden = {name: generator.normal(size=(cells, 8)) for name in ("cloze", "context", "segment", "corrupted")}
    items_N, masked_N = np.asarray(batch.items_RxL).reshape(-1), generator.random(cells) < 0.4
    whole_U, key = generator.random(len(batch.users_U)) < 0.7, jax.random.key(3)
    arguments = (key, params, jax.tree.map(jnp.float32, hidden), batch, jnp.asarray(masked_N), jnp.asarray(whole_U))
    found = s3rec.objectives(*arguments, system.data, s3rec.OBJECTIVES, config.s3rec, MESH)
    table_VxD, names_AxD = np.asarray(params["items"], np.float64), np.asarray(params["attributes"], np.float64)
    maps = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["maps"])
    mapped = lambda name, x: x @ maps[name]["kernel"] + maps[name].get("bias", 0)  # noqa: E731
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    pair = (lambda p, n: -np.log(sigmoid(p - n))) if form == "code" else (lambda p, n: np.log(np.exp(n)) - p)
    offsets = dataset.attribute_offsets_V1
    sets = [set(), *(set(dataset.attributes_N[a:b] - 1) for a, b in zip(offsets, offsets[1:], strict=False))]

    def attributes(name, states_NxD, counts_N):
        total = 0.0
        for cell in np.flatnonzero(counts_N):
            own, logit_A = sets[items_N[cell]], names_AxD @ mapped(name, states_NxD[cell])
            if not own:
                continue
            others = [a for a in range(len(logit_A)) if a not in own]
            if form == "code":
                total -= sum(np.log(sigmoid(logit_A[list(own)]))) + sum(np.log(sigmoid(-logit_A[others])))
            else:
                normaliser = np.log(np.exp(sigmoid(logit_A[others])).sum())
                total += normaliser - sigmoid(logit_A[list(own)]).mean()
        return total

    real_N = items_N > 0
    aap = hidden["cloze"] if form == "code" else table_VxD[items_N]
    wanted = {"aap": attributes("aap", aap, real_N & ~masked_N if form == "code" else real_N)}
    wanted["map"] = attributes("map", hidden["cloze"], real_N & masked_N)
    negatives_N = np.asarray(s3rec.draw_negatives(key, batch, system.data["negatives"], 1))[:, 0]
    wanted["mip"] = wanted["sp"] = 0.0
    for cell in np.flatnonzero(real_N & masked_N & (negatives_N > 0)):
        state_D = mapped("mip", hidden["cloze"][cell])
        wanted["mip"] += pair(*(sigmoid(table_VxD[item[cell]] @ state_D) for item in (items_N, negatives_N)))
    for user in np.flatnonzero(whole_U & (np.asarray(batch.users_U) >= 0)):
        last = int(batch.last_U[user])
        state_D = mapped("sp", hidden["context"][last])
        wanted["sp"] += pair(*(sigmoid(hidden[name][last] @ state_D) for name in ("segment", "corrupted")))
    assert config.s3rec.negatives == 1 and found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"encoder.kind": "gru"}, {"causal": True}], ids=["gru", "causal"])
def test_encoders_that_read_leftwards_pretrain_as_well(changes):
    """The loss falls, every objective teaches, and what stands behind a place does not change its state."""
    dataset = random_dataset()
    config, system = case_of(dataset, **changes)
    params, batch = jax.jit(system.init)(jax.random.key(0)), batch_of(dataset)
    hparams = jax.tree.map(jnp.float32, hparams_of(config)) | STILL
    data, optimizer = replicate(MESH, system.data), optax.adam(0.01)
    loss = lambda params, key: system.loss(params, {}, batch, key, hparams, data)  # noqa: E731

    @jax.jit
    def step(params, state, key):
        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value, gradient

    state, values = jax.jit(optimizer.init)(params), []
    for number in range(60):
        key = jax.random.fold_in(jax.random.key(1), number)
        params, state, value, gradient = step(params, state, key)
        values.append(float(value))
    assert np.mean(values[-10:]) < 0.95 * np.mean(values[:10])
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient["maps"] | gradient["encoder"]))
    encoder, causal = FrozenConfigDict(config.encoder), s3rec.is_causal(config.encoder, config.s3rec)
    views = {"plain": batch.items_RxL, "changed": jnp.where(batch.positions_RxL == WIDTH - 1, 1, batch.items_RxL)}
    encode = jax.jit(lambda params: s3rec.encode_views(params, batch, views, encoder, None, STILL, MESH, causal))
    hidden = encode(params)
    before_N = np.asarray((batch.items_RxL > 0) & (batch.positions_RxL < WIDTH - 1)).reshape(-1)
    np.testing.assert_array_equal(hidden["plain"][before_N], hidden["changed"][before_N])
    assert np.abs(hidden["plain"] - hidden["changed"]).max() > 0.01


def test_only_what_is_used_is_made():
    """No attributes, and a single encoding a step, for masked items alone."""
    dataset = random_dataset()
    bare = SequenceDataset(dataset.items_A, dataset.offsets_U1, dataset.item_ids, dataset.user_ids, "", {})
    config = load(f"{PRETRAIN}:mip", [(key, str(value)) for key, value in TINY.items()])
    system = systems.build(config, bare, MESH)
    params = system.init(jax.random.key(0))
    assert params.keys() == {"items", "encoder", "maps"} and params["maps"].keys() == set(s3rec.OBJECTIVES)
    views, _, _ = s3rec.views_of(
        jax.random.key(0), batch_of(bare), system.data, hparams_of(config), ("mip",), config.s3rec, ITEMS + 1
    )
    assert views.keys() == {"cloze"}
    nothing = SequenceDataset(np.zeros(0, np.int32), np.zeros(1, np.int64), bare.item_ids, np.array([], str), "", {})
    assert systems.build(config, nothing, MESH).states


@pytest.mark.slow
def test_weights_and_rates_run_under_vmap(case):
    hparams, params, data, step = case
    lanes = [hparams, hparams | {"sp": jnp.float32(0)}, hparams | {"cloze": jnp.float32(0.7)}]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *lanes)
    values, _, _ = jax.jit(jax.vmap(step, (None, 0, None, None)))(params, stacked, jax.random.key(0), data)
    for lane, value in zip(lanes, values, strict=True):
        assert step(params, lane, jax.random.key(0), data)[0] == pytest.approx(float(value), rel=1e-5)


# What is refused ------------------------------------------------------------------------------------------------------


def test_data_that_lack_something_are_refused():
    dataset = random_dataset()
    bare = SequenceDataset(dataset.items_A, dataset.offsets_U1, dataset.item_ids, dataset.user_ids, "", {})
    with pytest.raises(UserError, match="attributes of the items: set --config.data.attributes=FILE"):
        case_of(bare)
    with pytest.raises(UserError, match="s3rec.sp needs histories with two training items"):
        case_of(dataset_of([[1, 2, 3], [2, 4, 5], [3]]))
    case_of(dataset_of([[1, 2, 3], [2, 4, 5], [3]]), sp=0)
    case_of(bare, aap=0, map=0)


ZERO = [f"--config.s3rec.{name}=0" for name in s3rec.OBJECTIVES]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([*ZERO], "are all 0"),
        (["--config.s3rec.mask=1.5"], "s3rec.mask=1.5"),
        (["--config.s3rec.negatives=0"], "s3rec.negatives=0"),
        (["--config.s3rec.form=papr"], "Did you mean 'paper'"),
        (["--config.report.baselines=s3rec"], "'s3rec' is not known"),
        (["--config.data.attributes="], "--config.data.attributes=FILE"),
        (["--config.data.attributes=none.json"], "none.json: no such file"),
    ],
)
def test_bad_settings_end_with_code_2(tmp_path, capsys, flags, said):
    small = ["--config.data.synthetic_users=20", "--config.data.synthetic_items=30"]
    assert main([f"--config={PRETRAIN}", f"--workdir={tmp_path}/run", *small, *flags]) == 2
    assert said in capsys.readouterr().err


# End to end -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pretraining_then_finetuning(tmp_path, capsys):
    """What was learnt arrives: the finetuned run starts from the item table and the encoder of the pretraining."""
    small = TINY | {"encoder.max_length": 16, "data.synthetic_users": 200, "data.synthetic_items": 100,
                    "train.batch_size": 32, "train.max_epochs": 2}  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in small.items()]
    pretrained = tmp_path / "pretrained"
    assert main([f"--config={PRETRAIN}", f"--workdir={pretrained}", *flags]) == 0
    results = json.loads((pretrained / "results.json").read_text())
    assert results["loss"] == "pretraining" and 0 < results["valid"]["mrr"] <= 1
    assert (pretrained / "plots" / "loss.png").is_file()
    assert main(["--mode=recommend", f"--workdir={pretrained}", "--history=1,2,3"]) == 0
    assert main(["--mode=evaluate", f"--workdir={pretrained}", "--config.s3rec.causal=true"]) == 2
    assert "was trained with config.s3rec.causal=False, not True" in capsys.readouterr().err
    last = max((pretrained / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    finetune = [f"--config={FINETUNE}", *flags, f"--workdir={tmp_path}/run"]
    assert main([*finetune, f"--config.init_from={last}"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["parent"]["step"] == int(last.name) and results["parent"]["items_new"] == 0
