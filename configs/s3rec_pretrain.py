"""S3-Rec: Self-Supervised Learning for Sequential Recommendation with Mutual Information Maximization (CIKM 2020).

The pretraining stage; configs/s3rec_finetune.py goes on from its workdir. The four objectives with the published
weights, in the form of the published code (`s3rec.form=paper`: that of the paper's equations). Each history is read
once an epoch, up to an item drawn anew (`s3rec.cut`); `paper` reads every prefix of it, as published. `mip`: masked
items alone, CL4SRec's baseline S3-Rec MIP, which needs no attributes. Small steps matter: with 256 histories a step the
state at a mask does not see its context for long (docs/results.md).

Of cut histories an epoch is short, and it takes many: the published 150 epochs read each prefix, seven a user.

Validation shows that masked items are recovered: it ranks the next item at a mask behind the history, with the map of
masked item prediction (so it tells nothing under s3rec.mip=0). The run goes through all its epochs.

    python -m seqrec_jax.main --config=configs/s3rec_pretrain.py
    python -m seqrec_jax.main --config=configs/s3rec_pretrain.py:beauty --config.data.dir=DATA --workdir=PRETRAINED
    python -m seqrec_jax.main --config=configs/s3rec_pretrain.py:own --config.data.path=ratings.csv \
        --config.data.attributes=items.csv --config.data.attribute_columns=categories,brand
"""

from ml_collections import ConfigDict

from configs import base


def paper(config: ConfigDict) -> None:
    """Section 5.1: batches of 200 (here prefixes) and 100 epochs; the published figures are of 100 or 150."""
    config.train.update(targets="prefix", batch_size=200, max_epochs=100)
    config.s3rec.cut = False


def mip(config: ConfigDict) -> None:
    """Masked item prediction alone."""
    config.data.attributes = ""
    config.s3rec.update(aap=0.0, map=0.0, sp=0.0)


def embedded(config: ConfigDict) -> None:
    """The embedded data: a small encoder, as in configs/cl4srec.py."""
    base.embedded_encoder(config)
    config.train.max_epochs = 40


VARIANTS = {"smoke": base.smoke, "paper": paper, "mip": mip}


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "s3rec_pretrain"
    config.system = "s3rec"
    config.data.attributes = "" if base.data_named(argument) == {"own"} else "included"
    config.train.update(schedule="constant", batch_size=64, max_epochs=450, patience=0)
    if not base.data_named(argument):  # both stages alike, whatever their variants
        embedded(config)
    if "lastfm" in base.data_named(argument):  # 1,090 users
        config.train.update(batch_size=16, max_epochs=100)
    return base.select(config, argument, VARIANTS)
