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


def fast(config: ConfigDict) -> None:
    """The shortest way to good figures on short histories: one layer with the recency filter, less dropout, a higher
    rate, and a softmax over 2,048 popular negatives and the history's own items, which estimates the one over all
    items at a fifth of its cost.
    """
    config.encoder.update(layers=1, embedding_dropout=0.4, hidden_dropout=0.4, filter=0.7)
    config.loss.update(next_item="sampled", negatives=2048, negative_distribution="popularity", history_negatives=True)
    config.train.update(learning_rate=4e-3, max_epochs=16)


def paper(config: ConfigDict) -> None:
    """The original: its encoder, the last max_length targets of each user with one uniform negative; on ml1m 200 items
    of history and less dropout.
    """
    base.original_backbone(config)
    config.loss.next_item = "bce"
    config.train.update(targets="all", batch_size=128, beta2=0.98, schedule="constant", max_epochs=200)
    if config.data.name == "ml1m":
        config.encoder.update(max_length=200, embedding_dropout=0.2, hidden_dropout=0.2)


VARIANTS = {"smoke": base.smoke, "paper": paper, "fast": fast}


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "sasrec"
    config.system = "sasrec"
    return base.select(config, argument, VARIANTS)
