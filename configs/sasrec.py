"""SASRec: Self-Attentive Sequential Recommendation (Kang and McAuley, ICDM 2018).

The default trains the backbone that S3-Rec and DuoRec share with the softmax over all items; `paper` is the original:
its encoder and binary cross-entropy with one negative a position.

    python -m seqrec_jax.main --config=configs/sasrec.py
    python -m seqrec_jax.main --config=configs/sasrec.py:beauty,paper --config.data.dir=DATA
"""

from ml_collections import ConfigDict

from configs import base


def paper(config: ConfigDict) -> None:
    """The original: its encoder, one uniform negative a position; on ml1m 200 items of history and less dropout."""
    base.original_backbone(config)
    config.loss.next_item = "bce"
    config.train.batch_size, config.train.beta2 = 128, 0.98
    if config.data.name == "ml1m":
        config.encoder.update(max_length=200, embedding_dropout=0.2, hidden_dropout=0.2)


VARIANTS = {"smoke": base.smoke, "paper": paper}


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "sasrec"
    config.system = "sasrec"
    return base.select(config, argument, VARIANTS)
