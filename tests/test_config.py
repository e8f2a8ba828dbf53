"""Command line, configuration files, validation messages, config.json."""

import json
import os
from pathlib import Path

import pytest

from seqrec_jax import config as configuration
from seqrec_jax.config import default_workdir, from_json, load, parse_arguments, to_json
from seqrec_jax.data.sources import DATASETS
from seqrec_jax.errors import UserError
from seqrec_jax.protocol import PROTOCOLS
from seqrec_jax.validate import CHOICES, METRICS, RANGES, flatten, mesh_shape, validate

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BASE, CL4SREC = str(CONFIGS / "base.py"), str(CONFIGS / "cl4srec.py")
FREE_TEXT = {
    "name", "init_from", "data.name", "data.dir", "data.path", "data.user_column", "data.item_column",
    "data.time_column", "data.attributes",
    "data.attribute_columns", "data.attribute_separator", "data.cache_dir", "eval.negatives",
    "profile.labels", "profile.vectors", "profile.label", "profile.user_column",
    "cold_start.targets", "cold_start.user_column", "cold_start.item_column",
}  # fmt: skip


def overridden(*overrides, source=BASE):
    """The config of `source` with overrides such as "train.batch_size=4"."""
    return load(source, [tuple(override.split("=", 1)) for override in overrides])


def message(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    return str(error.value)


# Overrides


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.packed", "false", False), ("train.packed", "1", True), ("mesh.distributed", "True", True),
        ("train.batch_size", "64", 64), ("mesh.data", "-1", -1), ("train.learning_rate", "1", 1.0),
        ("train.learning_rate", "5e-4", 5e-4), ("data.path", "a=b,c", "a=b,c"), ("data.time_column", "", ""),
        ("augment.operators", "crop, mask", ("crop", "mask")), ("report.baselines", "", ()),
        ("report.baselines", "pop", ("pop",)), ("train.keep_epochs", "10, 20", (10, 20)), ("train.keep_epochs", "", ()),
    ],
)  # fmt: skip
def test_override_takes_the_type_of_the_default(key, text, value):
    result = flatten(load(BASE, [(key, text)]))[key]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.batch_size=1e3", "a whole number in [1, inf)"),
        ("train.batch_size=64.0", "a whole number in [1, inf)"),
        ("train.learning_rate=fast", "a number in (0, inf)"),
        ("train.packed=yes", "true or false"),
        ("train.keep_epochs=10,2.5", "whole numbers in [1, inf), separated by commas"),
    ],
)
def test_wrong_type_names_key_value_and_range(override, said):
    text = message(overridden, override)
    assert override in text and said in text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.lerning_rate", ["train.learning_rate"]), ("learning_rate", ["train.learning_rate"]),
        ("batch_size", ["train.batch_size", "eval.batch_size"]), ("trian.schedule", ["train.schedule"]),
        ("contrastive.wieght", ["contrastive.weight"]), ("sede", ["seed"]),
    ],
)  # fmt: skip
def test_unknown_key_names_the_nearest(key, nearest):
    text = message(overridden, f"{key}=1")
    assert key in text and all(name in text for name in nearest)


def test_a_loaded_config_is_locked():
    config = load(BASE)
    with pytest.raises(AttributeError):
        config.train.lerning_rate = 1.0


# Configuration files


def test_a_configuration_file_may_lie_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from configs import base\ndef get_config(argument):\n    config = base.get_config()\n"
        "    config.name = argument\n    return config\n"
    )
    assert load("mine.py:here").name == "here"
    folder = Path("2026-11-27T14:11")
    folder.mkdir()
    (folder / "config.json").write_text(to_json(load("mine.py:there")))
    assert load(f"{folder}/config.json").name == "there"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("config.train.lerning_rate = 1e-3", "train.learning_rate"),
        ("config.train.batch_size = 'many'", "batch_size"),
        ("config.trian.batch_size = 3", "trian"),
        ("config.report.baselines = 'pop'", "baselines"),
        ("config.train.keep_epochs = ('10',)", "train.keep_epochs=('10',) has the wrong type"),
        ("import seqrec_jaxx", "seqrec_jaxx"),
        ("config.seed = = 3", "syntax"),
    ],
)
def test_a_faulty_configuration_file_is_named(tmp_path, body, said):
    path = tmp_path / "mine.py"
    path.write_text(
        f"from configs import base\ndef get_config(argument):\n    config = base.get_config()\n    {body}\n"
        "    return config\n"
    )
    text = message(load, str(path))
    assert str(path) in text and said in text


def test_a_missing_file_and_a_wrong_argument_name_what_there_is():
    assert "configs/sasrec.py'?" in message(load, str(CONFIGS / "sasrc.py"))
    text = message(load, f"{CL4SREC}:beuty")
    assert "beuty" in text and "beauty" in text and "paper" in text


SOURCES = [
    (path.name, data, variant)
    for path in sorted(CONFIGS.glob("*.py"))
    for variant in ("", *getattr(configuration._import(path), "VARIANTS", ()))
    for data in (("", *DATASETS) if path.name != "base.py" else ("",))
]


@pytest.mark.parametrize(("file", "data", "variant"), SOURCES)
def test_every_configuration_is_valid(file, data, variant):
    overrides = [("data.dir", "somewhere")] if data else []
    config = load(f"{CONFIGS / file}:{data},{variant}", overrides)
    validate(config, num_devices=1)
    validate(config, num_devices=4)
    assert (config.name, config.data.name) == (file.removesuffix(".py"), data)


@pytest.mark.parametrize(("first", "second"), [("clue_pretrain.py:masked_items", "clue_finetune.py:probe"),
                                               ("s3rec_pretrain.py:mip", "s3rec_finetune.py")])  # fmt: skip
def test_both_stages_have_one_encoder_on_the_embedded_data_whatever_their_variants(first, second):
    one, other = (load(str(CONFIGS / name)).encoder for name in (first, second))
    assert one == other and one.dim == 32


@pytest.mark.parametrize(("file", "variant"), [("s3rec_pretrain.py", "mip"), ("clue_finetune.py", "probe")])
def test_a_file_of_ones_own_has_the_recipe_for_real_data_whatever_the_variant(file, variant):
    given = load(f"{CONFIGS / file}:{variant}", [("data.path", "mine.csv")])
    assert given == load(f"{CONFIGS / file}:{variant},own", [("data.path", "mine.csv")])
    embedded = load(f"{CONFIGS / file}:{variant}")
    assert (given.encoder.dim, embedded.encoder.dim) == (64, 32)
    if file == "clue_finetune.py":
        assert (given.profile.labels, embedded.profile.labels) == ("", "included")


def test_the_data_set_after_the_colon_is_one():
    with pytest.raises(UserError, match="names 2 data sets: lastfm, beauty"):
        load(f"{CONFIGS / 'pop.py'}:lastfm,beauty")
    with pytest.raises(UserError, match="set --config.data.path=FILE"):
        load(f"{CONFIGS / 'pop.py'}:own,smoke")


def test_the_paper_variants_follow_the_papers():
    sasrec = load(f"{CONFIGS / 'sasrec.py'}:ml1m,paper")
    assert (sasrec.encoder.max_length, sasrec.encoder.hidden_dropout, sasrec.train.beta2) == (200, 0.2, 0.98)
    assert (sasrec.encoder.norm, sasrec.loss.next_item, sasrec.train.batch_size) == ("query", "bce", 128)
    yelp, ml1m = load(f"{CL4SREC}:yelp,paper"), load(f"{CL4SREC}:ml1m,paper")
    assert (yelp.augment.operators, ml1m.augment.operators) == (("crop",), ("mask",))
    assert (yelp.encoder.max_length, ml1m.encoder.max_length, ml1m.train.targets) == (50, 20, "windows")
    ablation = flatten(load(f"{CONFIGS / 'sasrec_aug.py'}:yelp,paper"))
    assert {key for key, value in flatten(yelp).items() if ablation[key] != value} == {"name", "system"}


# Command line


def test_command_line(tmp_path):
    overrides = ["--config.seed", "3", "--config.train.learning_rate=0.01"]
    arguments = parse_arguments([f"--config={CL4SREC}:smoke", *overrides, f"--workdir={tmp_path}"])
    assert (arguments.config.seed, arguments.config.train.learning_rate) == (3, 0.01)
    assert (arguments.workdir, arguments.mode, arguments.config.encoder.dim) == (tmp_path, "train", 16)


def test_recommend_takes_a_history_and_the_config_of_the_workdir(tmp_path):
    (tmp_path / "config.json").write_text(to_json(overridden("seed=7", source=CL4SREC)))
    arguments = parse_arguments([f"--workdir={tmp_path}", "--mode=recommend", '--history=a, b=1,"c,d"', "--k=5"])
    assert (arguments.history, arguments.k, arguments.config.seed) == (("a", "b=1", "c,d"), 5, 7)


def test_report_reads_the_runs_own_configs():
    arguments = parse_arguments(["--mode=report", "--workdirs=a, b", "--force", "--out=page.html"])
    assert (arguments.config, arguments.workdirs) == (None, (Path("a"), Path("b")))
    assert (arguments.force, arguments.out) == (True, Path("page.html"))
    assert not parse_arguments(["--mode=report", "--workdirs=a"]).force


CONFIG = f"--config={BASE}"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([CONFIG, "lmd=0.1"], ["lmd=0.1", "--config."]),
        ([CONFIG, "config.train.beta2=0.9"], ["'config.train.beta2=0.9'", "--config.train.beta2?"]),
        ([CONFIG, "beta2=0.9"], ["--config.train.beta2?"]),
        ([CONFIG, "--train.lerning_rate=1"], ["--train.lerning_rate", "--config.train.learning_rate?"]),
        ([CONFIG, "--config.train.lerning_rate=1"], ["--config.train.learning_rate?"]),
        ([CONFIG, "--wrkdir=x"], ["--wrkdir", "--workdir?"]),
        ([CONFIG, "--config.seed=1", "--config.seed=1"], ["--config.seed is given twice"]),
        ([CONFIG, CONFIG], ["--config is given twice"]),
        ([CONFIG, "--config.seed"], ["--config.seed needs a value"]),
        ([CONFIG, "--config.train.packed", "--mode=train"], ["--config.train.packed needs a value"]),
        ([CONFIG, "--mode=recomend"], ["recomend", "'recommend'?", "evaluate"]),
        ([CONFIG, "--mode=recommend"], ["--history"]),
        ([CONFIG, "--mode=recommend", "--history=a", "--k=0"], ["--k=0", "[1, inf)"]),
        ([CONFIG, "--history=a"], ["--history", "--mode=recommend"]),
        (["--mode=train"], ["--config is missing"]),
        (["--mode=report"], ["--workdirs=A,B"]),
        (["--mode=report", "--workdirs=a", CONFIG], ["--config", "--mode=report"]),
        (["--mode=report", "--workdirs=a", "--force=yes"], ["--force takes no value"]),
        ([CONFIG, "--force"], ["--force", "--mode=report"]),
    ],
)
def test_command_line_mistakes_are_explained(argv, said):
    text = message(parse_arguments, argv)
    assert all(part in text for part in said), text


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}=" in text for name in configuration.FLAGS)


# Validation


def test_every_key_has_a_rule_of_its_kind():
    for key, value in flatten(load(BASE)).items():
        kinds = [key in RANGES, key in CHOICES, key in FREE_TEXT, isinstance(value, bool)]
        assert sum(kinds) == 1, key
        assert (key in RANGES) == (type(value) in (int, float) or key == "train.keep_epochs"), key
    assert RANGES.keys() | CHOICES.keys() | FREE_TEXT <= flatten(load(BASE)).keys()


@pytest.mark.parametrize("key", RANGES)
def test_every_range_is_kept(key):
    value = flatten(load(BASE))[key]
    low = float(RANGES[key][1:].split(",")[0])
    below = low if RANGES[key][0] == "(" else low - 1
    text = message(validate, overridden(f"{key}={below if isinstance(value, float) else int(below)}"), 1)
    assert f"{key}=" in text and RANGES[key] in text
    if isinstance(value, float):
        assert RANGES[key] in message(validate, overridden(f"{key}=nan"), 1)
        assert RANGES[key] in message(validate, overridden(f"{key}=inf"), 1)


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_kept(key):
    right = CHOICES[key][-1]
    text = message(validate, overridden(f"{key}={right}x"), 1)
    assert key in text and f"'{right}x'" in text and right in text.split("Known:")[1]


@pytest.mark.parametrize("key", ["encoder.embedding_dropout", "train.beta1"])
def test_an_open_end_is_outside(key):
    assert "[0, 1)" in message(validate, overridden(f"{key}=1"), 1)
    validate(overridden("augment.crop=1"), 1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["name=a/b"], ["name='a/b'"]),
        (["data.name=beauty"], ["data.name=beauty", "--config.data.dir"]),
        (["data.dir=x"], ["data.dir=x", "no data set is named"]),
        (["data.format=csv"], ["data.format=csv", "data.path"]),
        (["encoder.heads=3"], ["encoder.dim=64", "encoder.heads=3", "multiples of 3"]),
        (["encoder.kind=gru", "encoder.filter=0.7"], ["encoder.filter=0.7", "encoder.kind=gru has no filter"]),
        (["system=cl4srec", "train.batch_size=1"], ["train.batch_size=1", "[2, inf)"]),
        (["train.max_epochs=0"], ["train.max_epochs=0", "[1, inf)"]),
        (["freeze_encoder=true"], ["freeze_encoder=True", "belongs to system=downstream"]),
        (["train.keep_epochs=10,50,20"], ["train.keep_epochs=50", "train.max_epochs=40"]),
        (["init_from=RUN", "system=pop", "report.baselines="], ["init_from=RUN", "system=pop"]),
        (["train.warmup_steps=5", "train.max_steps=5"], ["train.warmup_steps=5", "train.max_steps=5"]),
        (["loss.negative_distribution=popularity"], ["loss.negative_distribution", "loss.next_item=sampled"]),
        (["augment.operators="], ["augment.operators is empty", "crop, mask, reorder"]),
        (["augment.operators=crop", "augment.choice=different"], ["augment.choice=different", "two"]),
        (["augment.operators=crop,crop", "augment.choice=different"], ["augment.choice=different", "two"]),
        (["augment.choice=fixed"], ["augment.choice=fixed", "1 or 2"]),
        (["report.baselines=pop,sasrec"], ["report.baselines", "sasrec", "itself"]),
        (["report.baselines=pop,pop"], ["report.baselines=pop,pop", "twice"]),
        (["eval.hide_history=no"], ["eval.hide_history=no", "eval.protocol=D", "eval.protocol=custom frees it"]),
        (["eval.candidates=sampled"], ["eval.candidates=sampled", "says all", "custom"]),
        (["eval.protocol=A", "eval.metric=ndcg@10"], ["eval.metric=ndcg@10", "says ndcg@20", "custom"]),
        (["eval.protocol=C", "eval.num_negatives=50"], ["eval.num_negatives=50", "says 99", "custom"]),
        (["eval.negatives=file"], ["eval.negatives=file", "eval.protocol=C"]),
        (["eval.protocol=custom", "eval.candidates=all", "eval.metric=mrr"], ["needs eval.hide_history", "yes, no"]),
        (
            ["eval.protocol=custom", "eval.candidates=sampled", "eval.metric=mrr", "eval.hide_history=yes"],
            ["eval.hide_history=yes has no use with eval.candidates=sampled"],
        ),
    ],
)
def test_contradictions_are_explained(overrides, said):
    text = message(validate, overridden(*overrides), 1)
    assert all(part in text for part in said), text


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_saying_what_the_protocol_says_is_no_contradiction(protocol):
    said = PROTOCOLS[protocol]
    values = [f"eval.{key}={getattr(said, key)}" for key in ("candidates", "hide_history", "metric")]
    validate(overridden(f"eval.protocol={protocol}", *values), 1)
    assert said.metric in METRICS


def test_custom_frees_every_choice():
    custom = ["eval.protocol=custom", "eval.hide_history=no", "eval.candidates=sampled", "eval.metric=hr@1"]
    validate(overridden(*custom, "eval.num_negatives=5", "eval.negatives=file"), 1)


def test_pop_may_train_no_epoch():
    validate(overridden("system=pop", "report.baselines=", "train.max_epochs=0"), 1)


def test_heads_are_the_transformers_alone():
    validate(overridden("encoder.kind=gru", "encoder.heads=3"), 1)


def test_mesh():
    assert mesh_shape(overridden(), 8) == (8, 1)
    assert mesh_shape(overridden("mesh.model=2"), 8) == (4, 2)
    assert mesh_shape(overridden("mesh.data=2"), 8) == (2, 1)
    for wrong in ("mesh.model=3", "mesh.data=3", "mesh.data=16", "mesh.model=16", "mesh.data=0"):
        text = message(validate, overridden(wrong), 8)
        assert wrong in text and "8 device(s)" in text and "1, 2, 4, 8" in text


def test_a_batch_that_the_devices_do_not_divide():
    text = message(validate, overridden("train.batch_size=100"), 8)
    assert "train.batch_size=100" in text and "multiples of 8" in text
    validate(overridden("train.batch_size=100", "mesh.model=2"), 8)


# config.json


def test_config_json_reloads_to_the_same_run(tmp_path):
    overrides = ("report.baselines=", "train.learning_rate=1", "augment.operators=mask")
    config = overridden(*overrides, source=f"{CL4SREC}:ml1m")
    (tmp_path / "config.json").write_text(to_json(config))
    again = load(str(tmp_path / "config.json"))
    assert again == config and to_json(again) == to_json(config)
    assert {key: type(value) for key, value in flatten(again).items()} == {
        key: type(value) for key, value in flatten(config).items()
    }
    assert default_workdir(again) == default_workdir(config)
    assert os.listdir(tmp_path) == ["config.json"]
    assert load(str(tmp_path / "config.json"), [("seed", "5")]).seed == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"sede": 1}, "seed"), ({"seed": "1"}, "whole number"), ({"seed": True}, "whole number"), ({"train": 3}, "train")],
)
def test_a_damaged_config_json_is_refused(changes, said):
    assert said in message(from_json, json.dumps(json.loads(to_json(load(BASE))) | changes))


def test_config_json_that_is_no_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    assert str(path) in message(load, str(path))
    assert "colon" in message(load, f"{path}:beauty")


def test_an_older_config_json_takes_the_new_keys_defaults():
    values = json.loads(to_json(load(BASE)))
    del values["mesh"]
    assert from_json(json.dumps(values)) == load(BASE)


def test_default_workdir_tells_runs_apart():
    plain, seeded = load(f"{CL4SREC}:beauty"), load(f"{CL4SREC}:beauty", [("seed", "1")])
    assert default_workdir(plain) == default_workdir(load(f"{CL4SREC}:beauty"))
    assert default_workdir(plain) != default_workdir(seeded)
    assert default_workdir(plain).parts[0] == "runs" and default_workdir(plain).name.startswith("cl4srec-beauty-")
    assert len(default_workdir(load(CL4SREC)).name) == len("cl4srec-") + 8
