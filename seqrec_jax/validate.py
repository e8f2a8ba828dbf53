"""What every key may be, and which keys contradict each other."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from seqrec_jax.errors import UserError, unknown
from seqrec_jax.protocol import PROTOCOLS, TASKS
from seqrec_jax.user_conflicts import user_conflicts

SYSTEMS = ("pop", "sasrec", "sasrec_aug", "cl4srec", "duorec", "s3rec", "clue", "downstream")
PRETRAINING = ("s3rec", "clue")  # systems without a next-item loss, for others to start from
METRICS = (*(f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in (1, 5, 10, 20)), "mrr")

# Intervals in the notation of mathematics. Every number of configs/base.py has one.
RANGES = {  # for a tuple: of each element
    "seed": "[0, 2147483647]",
    "split_seed": "[0, 2147483647]",
    "profile.folds": "[1, inf)",
    "data.min_user": "[0, inf)",
    "data.min_item": "[0, inf)",
    "data.synthetic_users": "[1, inf)",
    "data.synthetic_items": "[1, inf)",
    "data.synthetic_seed": "[0, 2147483647]",
    "data.train_fraction": "(0, 1]",
    "encoder.max_length": "[1, inf)",
    "encoder.dim": "[1, inf)",
    "encoder.layers": "[1, inf)",
    "encoder.heads": "[1, inf)",
    "encoder.ffn": "[1, inf)",
    "encoder.filter": "[0, 1)",
    "encoder.filter_width": "[1, inf)",
    "encoder.norm_epsilon": "(0, 1)",
    "encoder.embedding_dropout": "[0, 1)",
    "encoder.hidden_dropout": "[0, 1)",
    "encoder.init_scale": "(0, inf)",
    "loss.negatives": "[1, inf)",
    "contrastive.weight": "[0, inf)",
    "contrastive.temperature": "(0, inf)",
    "contrastive.pairs": "[2, inf)",
    "s3rec.aap": "[0, inf)",
    "s3rec.mip": "[0, inf)",
    "s3rec.map": "[0, inf)",
    "s3rec.sp": "[0, inf)",
    "s3rec.mask": "[0, 1]",
    "s3rec.negatives": "[1, inf)",
    "clue.share": "[0, 1]",
    "clue.width": "[1, inf)",
    "clue.bottleneck": "[1, inf)",
    "augment.crop": "[0, 1]",
    "augment.mask": "[0, 1]",
    "augment.reorder": "[0, 1]",
    "train.batch_size": "[1, inf)",
    "train.max_epochs": "[0, inf)",
    "train.max_steps": "[0, inf)",
    "train.max_seconds": "[0, inf)",
    "train.patience": "[0, inf)",
    "train.learning_rate": "(0, inf)",
    "train.warmup_steps": "[0, inf)",
    "train.weight_decay": "[0, inf)",
    "train.clip_norm": "[0, inf)",
    "train.beta1": "[0, 1)",
    "train.beta2": "[0, 1)",
    "train.log_every": "[1, inf)",
    "train.save_every": "[0, inf)",
    "train.keep_epochs": "[1, inf)",
    "eval.every": "[0, inf)",
    "eval.batch_size": "[1, inf)",
    "eval.num_negatives": "[1, inf)",
    "eval.negatives_seed": "[0, 2147483647]",
    "mesh.data": "[-1, inf)",
    "mesh.model": "[1, inf)",
}
CHOICES = {  # for a tuple: of each element
    "system": SYSTEMS,
    "task": ("", "next_item", *TASKS),
    "data.format": ("", "lines", "csv", "tsv", "parquet", "jsonl", "recbole", "movielens", "tfds"),
    "data.on_bad_row": ("error", "drop"),
    "data.repeats": ("keep", "drop"),
    "encoder.kind": ("transformer", "gru"),
    "encoder.activation": ("gelu", "relu"),
    "encoder.norm": ("post", "pre", "query"),
    "encoder.positions": ("left", "right"),
    "encoder.attention": ("plain", "fused"),
    "encoder.init": ("normal", "truncated_normal"),
    "encoder.dtype": ("float32", "bfloat16"),
    "loss.next_item": ("full", "sampled", "bce", "bpr"),
    "loss.negative_distribution": ("uniform", "popularity"),
    "contrastive.schedule": ("constant", "linear", "cosine"),
    "contrastive.similarity": ("dot", "cosine"),
    "contrastive.mode": ("unsupervised", "supervised", "both_added", "duorec", "cl4srec"),
    "contrastive.same_target_negatives": ("removed", "kept"),
    "contrastive.directions": ("summed", "averaged"),
    "s3rec.form": ("code", "paper"),
    "s3rec.segment_negatives": ("training", "published"),
    "clue.pretraining": ("clue", "masked_items"),
    "clue.view": ("dropout", "mask", "crop", "permute"),
    "augment.operators": ("crop", "mask", "reorder"),
    "augment.choice": ("uniform", "different", "fixed"),
    "train.targets": ("all", "windows", "prefix"),
    "train.optimizer": ("adam", "sgd"),
    "train.schedule": ("constant", "linear", "cosine"),
    "eval.protocol": (*PROTOCOLS, "custom"),
    "eval.hide_history": ("", "yes", "no"),
    "eval.candidates": ("", "all", "sampled"),
    "eval.metric": ("", *METRICS),
    "pop.counts": ("train", "all"),
    "report.baselines": tuple(system for system in SYSTEMS if system not in (*PRETRAINING, "downstream")),
}


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.batch_size": 256, ...} of nested dicts or ConfigDicts."""
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, dict | ConfigDict)
        flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def allowed(key: str, value: Any) -> str:
    """What `key` may be, in words; `value` gives its type."""
    if key in RANGES and isinstance(value, tuple):
        return f"whole numbers in {RANGES[key]}, separated by commas"
    if key in RANGES:
        return f"a {'whole ' if isinstance(value, int) else ''}number in {RANGES[key]}"
    if key in CHOICES:
        choices = ", ".join(filter(None, CHOICES[key]))
        return f"any of {choices}, separated by commas" if isinstance(value, tuple) else f"one of {choices}"
    return "true or false" if isinstance(value, bool) else "text"


def validate(config: ConfigDict, num_devices: int) -> None:
    """Raises UserError for the first value out of range, else for the first keys that contradict each other."""
    for key, value in flatten(config).items():
        for word in value if isinstance(value, tuple) else (value,):
            if key in RANGES and not _inside(word, RANGES[key]):
                raise UserError(f"{key}={word} is out of range; allowed: {allowed(key, value)}")
            if key in CHOICES and word not in CHOICES[key]:
                raise unknown(key, str(word), filter(None, CHOICES[key]))
    data, _ = mesh_shape(config, num_devices)
    if 64 % config.mesh.model:
        raise UserError(
            f"mesh.model={config.mesh.model} does not divide the item table; allowed: 1, 2, 4, 8, 16, 32, 64"
        )
    of_training = _training_conflicts(config, data)
    for message in (*_data_conflicts(config), *of_training, *user_conflicts(config), *_eval_conflicts(config)):
        raise UserError(message)


def mesh_shape(config: ConfigDict, num_devices: int) -> tuple[int, int]:
    """(data, model) devices, with mesh.data = -1 resolved; UserError where they do not divide the devices there are."""
    model = config.mesh.model
    data = max(num_devices // model, 1) if config.mesh.data == -1 else config.mesh.data
    if data == 0 or num_devices % (data * model):
        divisors = ", ".join(str(n) for n in range(1, num_devices + 1) if num_devices % n == 0)
        raise UserError(
            f"mesh.data={config.mesh.data} with mesh.model={model} does not fit {num_devices} device(s); "
            f"allowed: mesh.data * mesh.model = {divisors}, or mesh.data=-1 for all that mesh.model leaves"
        )
    return data, model


def _inside(value: float, interval: str) -> bool:
    """Whether `value` is in "[0, 1)", in the notation of mathematics; NaN is in none."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below


def _data_conflicts(config: ConfigDict) -> Iterator[str]:
    data = config.data
    if not config.name or "/" in config.name:
        yield f"name='{config.name}' names a folder: it cannot be empty or hold a '/'"
    if data.name and not data.dir and not data.path:
        yield f"data.name={data.name} needs --config.data.dir=FOLDER, the folder that holds the named data sets"
    if not data.attribute_separator:
        yield "data.attribute_separator is empty; allowed: what stands between two attributes, as in '|'"
    if not data.name and not data.path:  # synthetic data
        if data.dir:
            yield f"data.dir={data.dir} is given, but no data set is named: --config=FILE.py:NAME, or set data.path"
        if data.format:
            yield f"data.format={data.format} is given, but no file: set data.path"


def _training_conflicts(config: ConfigDict, data_devices: int) -> Iterator[str]:
    train, loss, augment, encoder = config.train, config.loss, config.augment, config.encoder
    operators, baselines = augment.operators, config.report.baselines
    if encoder.kind == "transformer" and encoder.dim % encoder.heads:
        yield (
            f"encoder.dim={encoder.dim} is not divisible by encoder.heads={encoder.heads}; "
            f"allowed: multiples of {encoder.heads}"
        )
    if encoder.filter and encoder.kind != "transformer":
        yield f"encoder.filter={encoder.filter}: encoder.kind={encoder.kind} has no filter; allowed: 0"
    if train.batch_size % data_devices:
        yield (
            f"train.batch_size={train.batch_size} is not divisible by the {data_devices} devices of mesh.data; "
            f"allowed: multiples of {data_devices}"
        )
    one_state_each = config.system == "cl4srec" or (config.system == "duorec" and train.targets == "prefix")
    if one_state_each and train.batch_size < 2:
        yield (
            f"train.batch_size={train.batch_size} leaves {config.system}'s contrast without negatives; "
            "allowed: [2, inf)"
        )
    if config.system != "pop" and train.max_epochs == 0:
        yield f"train.max_epochs=0 does not train system={config.system}; allowed: [1, inf)"
    if config.system == "s3rec" and not any(config.s3rec[name] for name in ("aap", "mip", "map", "sp")):
        yield "s3rec.aap, s3rec.mip, s3rec.map and s3rec.sp are all 0, so there is nothing to learn; set one above 0"
    if max(train.keep_epochs, default=0) > train.max_epochs:
        yield f"train.keep_epochs={max(train.keep_epochs)} is never reached: train.max_epochs={train.max_epochs}"
    if config.init_from and config.system == "pop":
        yield f"init_from={config.init_from} has no use with system=pop, which has nothing to transfer; leave it out"
    if 0 < train.max_steps <= train.warmup_steps:
        yield f"train.warmup_steps={train.warmup_steps} must be less than train.max_steps={train.max_steps}"
    if loss.negative_distribution != "uniform" and loss.next_item != "sampled":
        yield (
            f"loss.negative_distribution={loss.negative_distribution} needs loss.next_item=sampled, "
            f"not {loss.next_item}"
        )
    if loss.history_negatives and loss.next_item != "sampled":
        yield (
            f"loss.history_negatives=True needs loss.next_item=sampled, not {loss.next_item}: the other losses "
            "have these items already, or one negative alone"
        )
    if not operators:
        yield f"augment.operators is empty; allowed: {allowed('augment.operators', operators)}"
    if augment.choice == "different" and (len(operators) < 2 or len(set(operators)) < len(operators)):
        yield "augment.choice=different needs two or more augment.operators, none of them twice"
    if augment.choice == "fixed" and len(operators) > 2:
        yield "augment.choice=fixed takes one of augment.operators for both views, or one for each: name 1 or 2"
    if config.system in baselines:
        yield f"report.baselines names {config.system}, which is the system itself; leave it out"
    if len(set(baselines)) < len(baselines):
        yield f"report.baselines={','.join(baselines)} names a system twice"


def _eval_conflicts(config: ConfigDict) -> Iterator[str]:
    evaluation = config.eval
    protocol, candidates = evaluation.protocol, evaluation.candidates
    if protocol == "custom":
        for key in ("candidates", "hide_history", "metric"):
            if not evaluation[key]:
                yield f"eval.protocol=custom needs eval.{key}; allowed: {allowed(f'eval.{key}', '')}"
        if candidates == "sampled" and evaluation.hide_history == "yes":
            yield "eval.hide_history=yes has no use with eval.candidates=sampled (none is in the history); allowed: no"
    else:
        fixed = PROTOCOLS[protocol]
        candidates = fixed.candidates
        said = {name: getattr(fixed, name) for name in ("candidates", "hide_history", "metric")}
        said |= {"num_negatives": 99} if candidates == "sampled" else {}
        for key, value in said.items():
            if evaluation[key] not in ("", value):
                yield (
                    f"eval.{key}={evaluation[key]} contradicts eval.protocol={protocol}, which says {value}; "
                    "eval.protocol=custom frees it"
                )
    if evaluation.negatives and candidates == "all":
        yield (
            f"eval.negatives={evaluation.negatives} has no use when the candidates are all items; "
            "allowed: eval.protocol=C, or custom with eval.candidates=sampled"
        )
