"""CL4SRec: Contrastive Learning for Sequential Recommendation (Xie et al., SIGIR 2021 and ICDE 2022).

The default draws each view's operator anew and uses the shared backbone and the softmax over all items; `paper` is the
published setting: its encoder, one operator a data set, sampled softmax, linear decay. Both compare views by cosine,
not by the paper's dot product at temperature 1 (`contrastive.similarity=dot contrastive.temperature=1.0`): that costs
accuracy here.

Beauty, `paper`, seed 0, one CPU core, nine minutes of training: test HR@10 / NDCG@10 0.0931 / 0.0560 under protocol D,
0.0842 / 0.0405 under B (the paper: 0.0681 / 0.0299); SASRec with the same loss is its equal: docs/results.md.

    python -m seqrec_jax.main --config=configs/cl4srec.py
    python -m seqrec_jax.main --config=configs/cl4srec.py:beauty,paper --config.data.dir=DATA
"""

from ml_collections import ConfigDict

from configs import base


def paper(config: ConfigDict) -> None:
    """Section 4.1 and Table 3. Dropout, epochs, patience and the number of negatives are not in the paper, but ours."""
    config.encoder.update(activation="relu", input_norm=False, init="truncated_normal", init_scale=0.01)
    config.loss.update(next_item="sampled", negatives=512)
    config.train.max_epochs = 60
    # By cosine: dot products of states of length 8 (after a layer norm) at temperature 1, as published, cost much here.
    config.contrastive.update(similarity="cosine", temperature=0.2, weight=0.01)
    # One operator for both views: crop is the best on Yelp, mask on Sports (Table 3); elsewhere it is not printed.
    config.augment.update(choice="fixed", operators=("crop",) if config.data.name == "yelp" else ("mask",), mask=0.5)
    if config.data.name == "ml1m":
        config.encoder.max_length = 20


def embedded(config: ConfigDict) -> None:
    """The embedded data, in a minute: a small encoder, and few negatives, where the contrast has most to add."""
    base.embedded_encoder(config)
    config.loss.update(next_item="sampled", negatives=8)
    config.contrastive.weight = 0.1
    config.train.update(schedule="constant", patience=5)


VARIANTS = {"smoke": base.smoke, "paper": paper}


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "cl4srec"
    config.system = "cl4srec"
    config.report.baselines = ("pop", "sasrec")
    config.contrastive.update(similarity="cosine", temperature=0.2, weight=0.03)
    if not argument:
        embedded(config)
    return base.select(config, argument, VARIANTS)
