"""What a method is to the rest of the project: a few plain functions and the arrays they read."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class System:
    """init and loss train a model; states and params["items"] rank items by their dot product."""

    init: Callable[[Any], dict]  # key -> params, with the item table params["items"] [rows, D]
    # (params, batch) -> user states [U, D], no dropout; of what is trained also (params, batch, key, hparams), with it
    states: Callable[..., Any]
    # (params, state, batch, key, hparams, data) -> (scalar, (state, metrics)); None: nothing to train
    loss: Callable[..., Any] | None = None
    data: Any = None  # pytree of device arrays that `loss` reads
    judged: str = "always"  # when the collapse watch judges `states`: always | end (they begin alike) | never
    state: Any = dataclasses.field(default_factory=dict)  # what is neither trained nor constant, e.g. batch statistics


def hparams_of(config: ConfigDict) -> dict:
    """The traced scalars of a run: changing one compiles nothing anew."""
    return {
        "embedding_dropout": config.encoder.embedding_dropout,
        "hidden_dropout": config.encoder.hidden_dropout,
        "contrast_weight": config.contrastive.weight,
        "temperature": config.contrastive.temperature,
        "crop": config.augment.crop,
        "mask": config.augment.mask,
        "reorder": config.augment.reorder,
        "aap": config.s3rec.aap,
        "mip": config.s3rec.mip,
        "map": config.s3rec.map,
        "sp": config.s3rec.sp,
        "cloze": config.s3rec.mask,
        "view_share": config.clue.share,
        "learning_rate": config.train.learning_rate,
        "weight_decay": config.train.weight_decay,
        "beta1": config.train.beta1,
        "beta2": config.train.beta2,
        "clip_norm": config.train.clip_norm,
    }
