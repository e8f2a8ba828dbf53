"""SASRec: Self-Attentive Sequential Recommendation (Kang and McAuley, ICDM 2018).

Beauty, seed 0, 2 CPU cores: test HR@10 / NDCG@10 0.0945 / 0.0575 under protocol D and 0.0865 / 0.0431 under B, in some
six minutes of training.

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
    config.train.update(batch_size=128, beta2=0.98, schedule="constant", max_epochs=200)
    if config.data.name == "ml1m":
        config.encoder.update(max_length=200, embedding_dropout=0.2, hidden_dropout=0.2)


VARIANTS = {"smoke": base.smoke, "paper": paper}


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "sasrec"
    config.system = "sasrec"
    return base.select(config, argument, VARIANTS)
