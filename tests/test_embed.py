"""Exported vectors: the states that evaluation and recommendation use, for any histories, batch and device count."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

import seqrec_jax
from seqrec_jax import checkpoint, embed, systems
from seqrec_jax.config import load, to_json
from seqrec_jax.data.batches import batch_of, history_examples, make_layout, plan_epoch
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.data.prepare import prepare
from seqrec_jax.data.vectors import read_vectors
from seqrec_jax.main import main
from seqrec_jax.recommend import load_model
from seqrec_jax.sharding import make_mesh
from seqrec_jax.train import identity
from seqrec_jax.train_step import TrainState

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "data.synthetic_users": 60, "data.synthetic_items": 100, "encoder.max_length": 10, "encoder.dim": 8,
    "encoder.ffn": 16, "encoder.layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """run_of(config file, changes): the workdir of a run whose parameters are those it starts with."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run_of(name, **changes):
        key = repr((name, changes))
        if key not in made:
            values = SMALL | {k.replace("__", "."): value for k, value in changes.items()}
            config = load(str(ROOT / "configs" / f"{name}.py"), [(k, str(value)) for k, value in values.items()])
            dataset = prepare(config.data, folder / ".cache")
            params = jax.jit(systems.build(config, dataset, make_mesh(1, 1)).init)(jax.random.key(0))
            made[key] = folder / str(len(made))
            made[key].mkdir()
            (made[key] / "config.json").write_text(to_json(config))
            state = TrainState(jnp.int32(0), params, {}, {})
            store = checkpoint.open_store(made[key], create=True)
            checkpoint.save(store, state, identity(config, dataset) | {"best_step": 0})
        return made[key]

    return run_of


def export(workdir, out, *flags):
    assert main([f"--workdir={workdir}", "--mode=embed", f"--out={out}", *flags]) == 0
    return pl.read_parquet(out)


def test_vectors_rank_items_as_recommend_does(runs, tmp_path, monkeypatch):
    """For the whole histories of all users, most of them longer than max_length."""
    monkeypatch.setattr(embed, "CHUNK", 25)
    workdir = runs("sasrec")
    config = load(str(workdir / "config.json"))
    dataset = prepare(config.data, workdir.parent / ".cache")
    users = export(workdir, tmp_path / "users.parquet", "--config.eval.batch_size=3")
    items = export(workdir, tmp_path / "items.parquet", "--embed=items")
    assert users["user_id"].to_list() == dataset.user_ids.tolist()
    assert items["item_id"].to_list() == dataset.item_ids.tolist()
    parts = np.split(dataset.item_ids[dataset.items_A - 1], dataset.offsets_U1[1:-1])
    found = seqrec_jax.load(workdir).recommend([part.tolist() for part in parts], len(items), hide_history=False)
    scores_UxV = users["vector"].to_numpy() @ items["vector"].to_numpy().T
    row = {item: number for number, item in enumerate(items["item_id"])}
    for scores_V, names, scores in zip(scores_UxV, found.items, found.scores, strict=True):
        assert scores_V[[row[name] for name in names]] == pytest.approx(scores, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sasrec", {}),
        ("clue_pretrain", {}),
        pytest.param("sasrec", {"encoder__kind": "gru", "encoder__positions": "right"}, marks=pytest.mark.slow),
        pytest.param("s3rec_pretrain", {"s3rec__aap": 0, "s3rec__map": 0}, marks=pytest.mark.slow),
    ],
    ids=["sasrec", "clue", "gru", "s3rec"],
)
def test_every_system_gives_its_own_states(runs, tmp_path, name, changes):
    """One history a row, in the rows that evaluation makes."""
    workdir = runs(name, **changes)
    rng = np.random.default_rng(0)
    model = load_model(workdir, make_mesh(1, 1), "last")
    lengths_U = np.array([1, 2, 9, 10, 11, 30, 1, 4, 5, 5])
    items_A = rng.integers(1, len(model.item_ids) + 1, lengths_U.sum()).astype(np.int32)
    offsets_U1 = np.concatenate([[0], np.cumsum(lengths_U)])
    dataset = SequenceDataset(items_A, offsets_U1, model.item_ids, np.arange(10).astype(str), "", {})
    encoder = model.config.encoder
    layout = make_layout(
        history_examples(dataset, 0, encoder.max_length), 10, encoder.max_length, positions=encoder.positions,
        packed=False, room=int(encoder.user_token),
    )  # fmt: skip
    batch = batch_of(jnp.asarray(items_A), layout, plan_epoch(layout, None), 0)
    expected = np.zeros((10, 8), np.float32)
    expected[np.asarray(batch.users_U)] = jax.jit(model.system.states)(model.params, batch)
    lines = (f"{u} {' '.join(model.item_ids[part - 1])}" for u, part in enumerate(np.split(items_A, offsets_U1[1:-1])))
    (tmp_path / "h.txt").write_text("\n".join(lines))
    export(workdir, tmp_path / "v.parquet", f"--histories={tmp_path / 'h.txt'}")
    assert read_vectors(tmp_path / "v.parquet", dataset.user_ids) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_histories_need_the_checkpoint_alone(runs, tmp_path, capsys):
    workdir = runs("sasrec")
    shutil.copytree(workdir / "checkpoints", tmp_path / "run" / "checkpoints")
    known = seqrec_jax.load(workdir).model.item_ids[:3].tolist()
    (tmp_path / "h.csv").write_text(
        "who,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in (
            ("b", known[0], 2), ("a", known[2], 1), ("b", known[1], 1), ("c", "unheard of", 1), ("a", "?", 5)))
    )  # fmt: skip
    (tmp_path / "h.txt").write_text(f"b {known[1]} {known[0]}\na {known[2]}\n")
    flags = [f"--histories={tmp_path / 'h.csv'}", "--config.data.user_column=who"]
    found = export(tmp_path / "run", tmp_path / "csv.parquet", *flags)
    said = capsys.readouterr().out
    assert "2 users, 8 dimensions" in said and "2 actions with items that this model does not know" in said
    assert "1 users of such items alone" in said
    plain = export(tmp_path / "run", tmp_path / "txt.parquet", f"--histories={tmp_path / 'h.txt'}")
    assert found.equals(plain) and found["user_id"].to_list() == ["b", "a"]
    assert "left out" not in capsys.readouterr().out


def test_eight_devices_give_the_vectors_of_one(runs, tmp_path):
    workdir = runs("sasrec")
    export(workdir, tmp_path / "one.parquet")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "PJRT_NPROC": "16"}
    command = [sys.executable, "-m", "seqrec_jax.main", f"--workdir={workdir}", "--mode=embed",
               f"--out={tmp_path / 'eight.parquet'}", "--config.mesh.model=2", "--config.eval.batch_size=6",
               ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, eight = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("one", "eight"))
    assert eight["user_id"].to_list() == one["user_id"].to_list()
    assert eight["vector"].to_numpy() == pytest.approx(one["vector"].to_numpy(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--embed=itms"], "'items'?"),
        (["--embed=items", "--histories=h.txt"], "--histories has no meaning with --embed=items"),
        (["--out=v.csv"], "a name that ends in .parquet"),
        (["--histories=none.csv"], "none.csv: no such file (--histories)"),
        (["--config.data.synthetic_seed=1"], "trained on data"),
        (["--k=3"], "--k belongs to --mode=recommend"),
    ],
)
def test_mistakes_are_explained(runs, tmp_path, monkeypatch, capsys, flags, said):
    workdir = runs("sasrec")
    monkeypatch.chdir(tmp_path)
    assert main([f"--workdir={workdir}", "--mode=embed", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.parquet*"))


def test_popularity_has_no_vectors(runs, tmp_path, capsys):
    assert main([f"--workdir={runs('pop')}", "--mode=embed", f"--out={tmp_path / 'v.parquet'}"]) == 2
    assert "system=pop has no vectors" in capsys.readouterr().err
