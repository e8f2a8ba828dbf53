"""S3-Rec (Zhou et al., CIKM 2020), the pretraining stage: four objectives on a bidirectional encoder.

It hands on the item table and the encoder; finetuning is system sasrec with config.init_from (configs/s3rec_finetune).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from seqrec_jax import cloze, encoders
from seqrec_jax.data.batches import train_counts, train_lengths
from seqrec_jax.data.dataset import SequenceDataset
from seqrec_jax.encoders.transformer import initializer
from seqrec_jax.errors import UserError
from seqrec_jax.losses import mutual_information as mim
from seqrec_jax.losses.negatives import Absent, absent_items, draw_absent
from seqrec_jax.sharding import split_rows
from seqrec_jax.systems.sasrec import NO_DROPOUT
from seqrec_jax.systems.system import System

OBJECTIVES = ("aap", "mip", "map", "sp")  # associated attributes, masked items, masked attributes, segments


def build(config: ConfigDict, dataset: SequenceDataset, mesh: Mesh) -> System:
    """The objectives whose weight in config.s3rec is above 0, on whole training parts.

    A state of validation is that of a mask behind the history, through the map of masked items: the next item is
    ranked as the last item of a history is in pretraining. With s3rec.mip=0 that map stays random, and so do the ranks.

    Raises UserError where an objective lacks attributes or segments.
    """
    encoder, s3rec, mask_item = FrozenConfigDict(config.encoder), config.s3rec, len(dataset.item_ids) + 1
    used, causal = tuple(name for name in OBJECTIVES if s3rec[name] > 0), is_causal(encoder, s3rec)

    def loss(params, state, batch, key, hparams, data):
        key_views, key_encode, key_negatives = jax.random.split(key, 3)
        if s3rec.cut:
            batch = cloze.cut(jax.random.fold_in(key, 3), batch, encoder.positions)
        views, masked_N, whole_U = views_of(key_views, batch, data, hparams, used, s3rec, mask_item)
        hidden = encode_views(params, batch, views, encoder, key_encode, hparams, mesh, causal)
        terms = objectives(key_negatives, params, hidden, batch, masked_N, whole_U, data, used, s3rec, mesh)
        return sum(hparams[name] * term for name, term in terms.items()), (state, terms)

    def states(params, batch, key=None, hparams=NO_DROPOUT):
        asked = cloze.ask_next(batch, mask_item, encoder.positions)
        last_UxD = encoders.encode(params, asked, encoder, key, hparams, causal=causal, last_only=True)
        return mim.project(last_UxD, params["maps"]["mip"])

    # The state of a mask is much the same behind every history until late; without a map that trains it may stay so.
    judged = "end" if "mip" in used else "never"
    system = System(functools.partial(init, config=config, dataset=dataset), states, judged=judged)
    if not len(dataset.items_A):  # a vocabulary alone, to recommend
        return system
    check(used, dataset)
    data = {
        "items_A": dataset.items_A,
        "attributes": mim.item_attributes(dataset) if {"aap", "map"} & set(used) else None,
        "negatives": trained_items(dataset) if "mip" in used else None,
        "segments": cloze.segment_pool(dataset, encoder.max_length) if "sp" in used else None,
    }
    return dataclasses.replace(system, loss=loss, data=data)


def init(key: jax.Array, config: ConfigDict, dataset: SequenceDataset) -> dict:
    """Parameters {"items", "encoder", "maps": one linear map an objective, "attributes": [attributes, dim]}."""
    key_encoder, key_attributes, *keys = jax.random.split(key, 2 + len(OBJECTIVES))
    normal, dim = initializer(config.encoder), config.encoder.dim
    bias = {"bias": jnp.zeros(dim)} if config.s3rec.form == "code" else {}
    maps = {name: {"kernel": normal(key, (dim, dim)), **bias} for name, key in zip(OBJECTIVES, keys, strict=True)}
    names = dataset.attribute_names
    table = {"attributes": normal(key_attributes, (len(names), dim))} if len(names) else {}
    encoder = FrozenConfigDict(config.encoder)
    shared = encoders.init(key_encoder, encoder, len(dataset.item_ids), causal=is_causal(encoder, config.s3rec))
    return shared | {"maps": maps} | table


def is_causal(encoder: FrozenConfigDict, s3rec: ConfigDict) -> bool:
    """Pretraining reads both ways unless told otherwise (`s3rec.causal`); a GRU cannot."""
    return s3rec.causal or encoder.kind == "gru"


def views_of(key, batch, data, hparams, used, s3rec, mask_item):
    """({view: items [R, L]} that the objectives read, masked_N, the histories with a segment and a corrupted one)."""
    key_cloze, key_segments, key_windows = jax.random.split(key, 3)
    masked_RxL, views, whole_U = cloze.masked_cells(key_cloze, batch, hparams["cloze"]), {}, None
    if {"mip", "map"} & set(used) or ("aap" in used and s3rec.form == "code"):
        views["cloze"] = jnp.where(masked_RxL, mask_item, batch.items_RxL)
    if "sp" in used:
        items_A = data["items_A"]
        begin_U, span_U = cloze.draw_segments(key_segments, batch.length_U)
        if s3rec.segment_negatives == "published":
            source_U, whole_U = cloze.draw_published_windows(key_windows, span_U, len(items_A))
        else:
            source_U, whole_U = cloze.draw_windows(key_windows, batch.users_U, span_U, data["segments"])
        segments = cloze.segment_views(batch, items_A, begin_U, span_U, source_U, mask_item)
        views |= dict(zip(("context", "segment", "corrupted"), segments, strict=True))
    return views, masked_RxL.reshape(-1), whole_U


def encode_views(params, batch, views, encoder, key, hparams, mesh, causal):
    """{view: states [R * L, D]}, from one pass in which the views of a row are neighbours."""
    if not views:
        return {}
    beside = lambda x_RxL: jnp.repeat(x_RxL, len(views), axis=0)  # noqa: E731
    many = batch.replace(
        items_RxL=jnp.stack([*views.values()], axis=1).reshape(-1, encoder.max_length),
        segments_RxL=beside(batch.segments_RxL),
        positions_RxL=beside(batch.positions_RxL),
    )
    hidden = encoders.encode(params, split_rows(mesh, many), encoder, key, hparams, causal=causal)
    hidden_RxVxLxD = hidden.reshape(-1, len(views), encoder.max_length, encoder.dim)
    return {name: hidden_RxVxLxD[:, view].reshape(-1, encoder.dim) for view, name in enumerate(views)}


def objectives(key, params, hidden, batch, masked_N, whole_U, data, used, s3rec, mesh):
    """{objective: its sum over the batch} (Section 4.3)."""
    form, maps, attributes, items_N = s3rec.form, params["maps"], data["attributes"], batch.items_RxL.reshape(-1)
    terms, hidden_item_N = {}, jnp.where(masked_N, items_N, 0)
    if "aap" in used:  # Eq. 10, in the code on the states of the places that are not masked
        code = form == "code"
        x_NxD = hidden["cloze"] if code else params["items"][items_N]
        known_N = jnp.where(masked_N, 0, items_N) if code else items_N
        terms["aap"] = mim.associated_attribute_prediction(
            x_NxD, known_N, maps["aap"], params["attributes"], attributes, form, mesh
        )
    if "mip" in used:  # Eq. 12
        negatives_NxK = draw_negatives(key, batch, data["negatives"], s3rec.negatives)
        terms["mip"] = mim.masked_item_prediction(
            hidden["cloze"], hidden_item_N, negatives_NxK, maps["mip"], params["items"], form
        )
    if "map" in used:  # Eq. 14
        terms["map"] = mim.masked_attribute_prediction(
            hidden["cloze"], hidden_item_N, maps["map"], params["attributes"], attributes, form, mesh
        )
    if "sp" in used:  # Eq. 16, states of the last places
        sequences_UxD = (hidden[name][batch.last_U] for name in ("context", "segment", "corrupted"))
        terms["sp"] = mim.segment_prediction(*sequences_UxD, whole_U, maps["sp"], form)
    return terms


def check(used: list[str], dataset: SequenceDataset) -> None:
    """Raises UserError where `dataset` lacks what an objective needs."""
    if {"aap", "map"} & set(used) and not len(dataset.attribute_names):
        raise UserError(
            "s3rec.aap and s3rec.map need attributes of the items: set --config.data.attributes=FILE (for a named data "
            "set: included), or --config.s3rec.aap=0 --config.s3rec.map=0"
        )
    if "sp" in used and train_lengths(dataset).max() < 2:
        raise UserError(
            "s3rec.sp needs histories with two training items to cut segments from, and there are none: set "
            "--config.s3rec.sp=0"
        )


@struct.dataclass
class TrainedItems:
    """The items of the training part, numbered among themselves, and which of them each user has not met in it."""

    ids_T: jax.Array
    absent: Absent


def trained_items(dataset: SequenceDataset) -> TrainedItems:
    """Made on the host."""
    count_V = train_counts(dataset)
    number_V = np.cumsum(count_V > 0)  # an item that does not train has the number of another, and is never looked at
    absent = absent_items(number_V[dataset.items_A], dataset.offsets_U1, train_lengths(dataset))
    return TrainedItems(jnp.asarray(np.flatnonzero(count_V), jnp.int32), absent)


def draw_negatives(key: jax.Array, batch, source: TrainedItems, count: int) -> jax.Array:
    """[R * L, count]: for each cell items uniform over those of training that its user has not met there; 0 = none."""
    users_N = jnp.maximum(batch.users_U[jnp.maximum(batch.segments_RxL - 1, 0)], 0).reshape(-1)
    users_NxK = jnp.repeat(users_N[:, None], count, axis=1)
    number_NxK = draw_absent(key, users_NxK, source.absent, len(source.ids_T))
    return jnp.where(number_NxK > 0, source.ids_T[number_NxK - 1], 0)
