"""CLUE (Cheng et al., ICDM 2021), the downstream stage: a pretrained user encoder on one task.

config.init_from has to name the pretraining run (configs/clue_pretrain.py, CLUE's or PeterRec's objective), or to be
set to nothing: `--config.init_from=` trains from scratch (the paper's CLUEZero). Encoder and, but for new items, data
have to be those of the pretraining run. The whole model is finetuned; `probe`: the new head alone, on the encoder as it
is (a linear probe).

    python -m seqrec_jax.main --config=configs/clue_finetune.py:ml1m --config.data.dir=DATA \
        --config.init_from=PRETRAINED --config.task=profile --config.profile.label=age
    python -m seqrec_jax.main --config=configs/clue_finetune.py:ml1m --config.data.dir=DATA \
        --config.init_from=PRETRAINED --config.task=next_item \
        --config.eval.every=500 --config.train.max_steps=10000     # of a million prefixes
    python -m seqrec_jax.main --config=configs/clue_finetune.py:own --config.data.path=source.txt \
        --config.task=cold_start --config.cold_start.targets=targets.txt --config.init_from=PRETRAINED
"""

from ml_collections import ConfigDict

from configs import base
from configs.clue_pretrain import user_encoder


def probe(config: ConfigDict) -> None:
    """A linear probe: states without dropout are read by a head that learns faster."""
    config.freeze_encoder = True
    config.train.update(learning_rate=1e-2, max_epochs=50, patience=10)


VARIANTS = {"smoke": base.smoke, "probe": probe}


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "clue_finetune"
    config.system = "downstream"
    config.task = "profile"
    config.profile.labels = "" if base.data_named(argument) == {"own"} else "included"
    config.init_from = "the workdir of a pretraining run"  # to be named, or emptied; no folder has this name
    config.eval.protocol = "B"  # next_item
    user_encoder(config)
    if not base.data_named(argument):  # both stages alike, whatever their variants
        base.embedded_encoder(config)
    config.train.update(schedule="constant", max_epochs=20, patience=5)
    base.select(config, argument, VARIANTS)
    config.train.targets = "prefix"  # one target a history, also where the data set says otherwise
    config.report.baselines = ()
    return config
