"""CLUE: Learning Transferable User Representations with Sequential Behaviors via Contrastive Pre-training (ICDM 2021).

The pretraining stage; configs/clue_finetune.py goes on from its workdir. Two views of each history by dropout alone
(`clue.view=mask|crop|permute`: changed histories), no negatives. `masked_items`: PeterRec's objective on the same
encoder, [UR] token included, the paper's baseline. The run goes through all its epochs and its last checkpoint counts;
watch `above_minimum` (the loss's distance from -1), `spread` (of the normalised projections) and `user rank` for a
collapse, which `no_stop_gradient` and `no_predictor` show (Figure 6): the loss at its minimum, all users on a
line or in a point.

    python -m seqrec_jax.main --config=configs/clue_pretrain.py
    python -m seqrec_jax.main --config=configs/clue_pretrain.py:ml1m --config.data.dir=DATA --workdir=PRETRAINED
"""

from ml_collections import ConfigDict

from configs import base


def masked_items(config: ConfigDict) -> None:
    """PeterRec's pretraining objective, with the data's own dropout: no views depend on it."""
    config.clue.pretraining = "masked_items"


def no_stop_gradient(config: ConfigDict) -> None:
    """Figure 6b: collapses."""
    config.clue.stop_gradient = False


def no_predictor(config: ConfigDict) -> None:
    """Figure 6a: collapses."""
    config.clue.predictor = False


VARIANTS = {
    "smoke": base.smoke,
    "masked_items": masked_items,
    "no_stop_gradient": no_stop_gradient,
    "no_predictor": no_predictor,
}


def user_encoder(config: ConfigDict) -> None:
    """The paper's encoder and batch: SASRec's blocks, which norm what they read, 4 heads, [UR]; 64 users a step.

    What [UR] reads of a history has to be heard beside its own embedding and the noise of dropout. With norms behind
    the blocks the states of all users became one within 700 steps on MovieLens-1M; kernels drawn with 1 / sqrt(64)
    and no norm on the input give the history the largest share from the first step on (docs/results.md).
    """
    config.encoder.update(user_token=True, heads=4, activation="relu", norm="pre", input_norm=False, final_norm=True)
    config.encoder.update(init_scale=0.125, embedding_dropout=0.2, hidden_dropout=0.2)  # at 0.5 nothing was learned
    config.train.batch_size = 64


def weak_views(config: ConfigDict) -> None:
    """Views by weak dropout, for a predictor without a bottleneck (`clue.bottleneck`).

    Users differ in the more dimensions, the sooner the predictor follows the projector and the less noise has to be
    outdone: on MovieLens-1M `user rank` is 22, with a bottleneck of 16 and dropout 0.1 it was 6 (docs/results.md). The
    paper names no width, and searches dropout from 0.1 on.
    """
    config.encoder.update(embedding_dropout=0.02, hidden_dropout=0.02)


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "clue_pretrain"
    config.system = "clue"
    config.train.update(schedule="constant", max_epochs=50, patience=0)
    user_encoder(config)
    if not base.data_named(argument):  # both stages alike, whatever their variants
        base.embedded_encoder(config)
    base.select(config, argument, VARIANTS)
    if config.clue.pretraining == "clue":
        weak_views(config)  # whatever the data's own dropout
    config.report.baselines = ()  # nothing is ranked
    return config
