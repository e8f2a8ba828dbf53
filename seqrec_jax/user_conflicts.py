"""Which keys of CLUE's two stages contradict each other, or other systems."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from seqrec_jax.protocol import TASKS

USER_TOKEN = ("clue", "downstream")  # systems that read the [UR] token


def user_conflicts(config: ConfigDict) -> Iterator[str]:
    """What is wrong, and what to say instead."""
    yield from _token_conflicts(config)
    yield from _downstream_conflicts(config)


def _token_conflicts(config: ConfigDict) -> Iterator[str]:
    encoder, clue = config.encoder, config.clue
    if encoder.user_token != (config.system in USER_TOKEN):
        needs = "needs" if config.system in USER_TOKEN else "does not read"
        yield (
            f"encoder.user_token={encoder.user_token}: system={config.system} {needs} the [UR] token; "
            f"allowed: {not encoder.user_token}"
        )
    if encoder.user_token and encoder.kind != "transformer":
        yield f"encoder.kind={encoder.kind} has no [UR] token; allowed: transformer"
    others = config.system in USER_TOKEN and set(config.report.baselines) - {"pop"}
    if not config.data.hold_out and config.system != "clue":
        yield f"data.hold_out=False: system={config.system} would train on what it is tested on; allowed: True"
    if others:
        yield f"report.baselines names {', '.join(sorted(others))}, without the [UR] token; allowed: pop"
    if config.system != "clue":
        return
    if config.report.baselines:
        yield "report.baselines=pop ranks items, system=clue does not; leave it out"
    if clue.pretraining == "clue" and config.train.batch_size < 2:
        yield (
            f"train.batch_size={config.train.batch_size} leaves CLUE's batch normalisation a single user, whose "
            "statistics say nothing; allowed: [2, inf)"
        )
    if clue.pretraining == "clue" and clue.view == "dropout" and not encoder.embedding_dropout + encoder.hidden_dropout:
        yield (
            "clue.view=dropout with encoder.embedding_dropout=0 and encoder.hidden_dropout=0 makes two equal views; "
            "set one above 0, or clue.view=mask, crop, permute"
        )
    if clue.pretraining == "masked_items" and not clue.share:
        yield "clue.share=0 masks no item, so there is nothing to predict; allowed: (0, 1]"
    if config.train.targets == "prefix":
        yield "train.targets=prefix gives pretraining one user in many; allowed: all, windows"


def _downstream_conflicts(config: ConfigDict) -> Iterator[str]:
    train, task = config.train, config.task
    if bool(task) != (config.system == "downstream"):
        yield (
            f"task={task} with system={config.system}: a task belongs to system=downstream (configs/clue_finetune.py); "
            f"allowed there: next_item, {', '.join(TASKS)}"
        )
    if config.profile.vectors and (task != "profile" or config.init_from or config.freeze_encoder):
        yield (
            f"profile.vectors={config.profile.vectors} stand for the encoder of task=profile; leave out other tasks, "
            "init_from (--config.init_from=) and freeze_encoder"
        )
    if config.freeze_encoder and not task:
        yield "freeze_encoder=True belongs to system=downstream (configs/clue_finetune.py); allowed: False"
    if not task:
        return
    if train.targets != "prefix":
        yield f"train.targets={train.targets}: system=downstream learns one target a history; allowed: prefix"
    if config.loss.next_item != "full":
        yield f"loss.next_item={config.loss.next_item}: system=downstream learns by the full softmax; allowed: full"
    if config.freeze_encoder and task == "next_item":
        yield "freeze_encoder=True leaves task=next_item nothing to train: its softmax is tied to the items"
    if config.freeze_encoder and train.weight_decay:
        yield f"train.weight_decay={train.weight_decay} would change what freeze_encoder=True holds fast; allowed: 0"
    if task in TASKS and config.report.baselines:
        yield f"report.baselines={','.join(config.report.baselines)} rank items, task={task} does not; leave it out"
