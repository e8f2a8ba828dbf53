"""The same model, training steps and evaluation in plain PyTorch, and the child process that times them.

The batches come ready made, so that gathering them, and drawing views and negatives, costs the peer nothing (ours pays
for it in every step). The model is that of configs/sasrec.py: post-norm, GELU, dropout, output tied to the item table,
Adam. Items are numbered from 0, padding takes any item: no real cell sees it.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

NONE = -100  # the target of a cell that has none
CUTOFF = 10
CONTRAST_WEIGHT = 0.1  # of DuoRec's published step
S3REC_WEIGHTS = {"aap": 0.2, "mip": 1.0, "map": 1.0, "sp": 0.5}  # published


class Block(nn.Module):
    """Self-attention and feed-forward, each with dropout, residual and norm."""

    def __init__(self, encoder: dict):
        super().__init__()
        dim, self.heads = encoder["dim"], encoder["heads"]
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.inner, self.outer = nn.Linear(dim, encoder["ffn"]), nn.Linear(encoder["ffn"], dim)
        self.norm_attention, self.norm_ffn = (nn.LayerNorm(dim, encoder["norm_epsilon"]) for _ in range(2))
        self.dropout = nn.Dropout(encoder["hidden_dropout"])

    def forward(self, x, visible):
        """x [R, L, D], visible [R, 1, L, L] → [R, L, D]"""
        heads = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        rate = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*heads, visible, rate).transpose(1, 2).flatten(-2)
        x = self.norm_attention(x + self.dropout(self.output(mixed)))
        return self.norm_ffn(x + self.dropout(self.outer(F.gelu(self.inner(x)))))


class Sasrec(nn.Module):
    """The encoder of a batch of rows, padded or packed: attention stays within a segment."""

    def __init__(self, encoder: dict, num_items: int):
        super().__init__()
        self.items = nn.Embedding(num_items, encoder["dim"])
        self.positions = nn.Embedding(encoder["max_length"], encoder["dim"])
        self.norm_input = nn.LayerNorm(encoder["dim"], encoder["norm_epsilon"])
        self.dropout = nn.Dropout(encoder["embedding_dropout"])
        self.blocks = nn.ModuleList(Block(encoder) for _ in range(encoder["layers"]))
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=encoder["init_scale"])
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)

    def forward(self, batch, causal=True):
        """→ states [R, L, D]"""
        segments = batch["segments"]
        visible = (segments[:, :, None] == segments[:, None, :])[:, None]
        visible = visible.tril() if causal else visible
        x = self.dropout(self.norm_input(self.items(batch["items"]) + self.positions(batch["positions"])))
        for block in self.blocks:
            x = block(x, visible)
        return x


class S3rec(nn.Module):
    """A bidirectional encoder with a map for each objective; the item table has one row more, for the mask."""

    def __init__(self, encoder: dict, multi_hot: np.ndarray):
        super().__init__()
        items, attributes = multi_hot.shape
        self.encoder = Sasrec(encoder, items + 1)
        self.attributes = nn.Embedding(attributes, encoder["dim"])
        nn.init.normal_(self.attributes.weight, std=encoder["init_scale"])
        self.maps = nn.ModuleDict({name: nn.Linear(encoder["dim"], encoder["dim"]) for name in S3REC_WEIGHTS})
        self.register_buffer("multi_hot", torch.from_numpy(multi_hot).float())


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """A batch of benchmarks/data.py with items counted from 0 and NONE for no target."""
    ready = {name: torch.from_numpy(np.asarray(array, np.int64)) for name, array in batch.items()}
    for name in {"items", "hidden_item", "known", "negatives"} & ready.keys():
        ready[name] = (ready[name] - 1).clamp(min=0)
    for name in {"masked", "segmented"} & ready.keys():
        ready[name] = ready[name] > 0
    for name in {"targets", "target"} & ready.keys():
        ready[name] = torch.where(ready[name] > 0, ready[name] - 1, NONE)
    return ready


def next_item_loss(model: Sasrec, batch: dict, everywhere: bool = False) -> torch.Tensor:
    """Mean cross-entropy at the real targets; `everywhere`: logits at all cells, those without target ignored."""
    states, targets = model(batch), batch["targets"]
    if not everywhere:
        states, targets = states[targets != NONE], targets[targets != NONE]
    logits = states @ model.items.weight.T
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=NONE)


def softmax_at(model: Sasrec, batch: dict, negatives: int) -> torch.Tensor:
    """Mean cross-entropy at the cells `place` [M] over all items, or over the target and `negatives` shared ones drawn
    uniformly; fixed shapes, as compiled code wants them: cells with `target` NONE do not count.
    """
    states, target = model(batch).flatten(0, 1)[batch["place"]], batch["target"]
    if not negatives:
        return F.cross_entropy(states @ model.items.weight.T, target, ignore_index=NONE)
    drawn = torch.randint(model.items.num_embeddings, (negatives,), device=target.device)
    others = (states @ model.items(drawn).T).masked_fill(drawn == target[:, None], -math.inf)
    positive = (states * model.items(target.clamp(min=0))).sum(1, keepdim=True)
    first = torch.where(target == NONE, NONE, 0)
    return F.cross_entropy(torch.cat([positive, others], 1).float(), first, ignore_index=NONE)


def duorec_loss(model: Sasrec, prefixes: dict, same_target: dict) -> torch.Tensor:
    """DuoRec's published step: three encodings of padded rows with one target each, at their last places: next items,
    the same again under other dropout masks, and the prefixes with the same targets; the last two are contrasted.
    """
    targets = prefixes["targets"]
    states, again, other = (model(batch)[batch["targets"] != NONE] for batch in (prefixes, prefixes, same_target))
    next_item = F.cross_entropy(states @ model.items.weight.T, targets[targets != NONE])
    return next_item + CONTRAST_WEIGHT * info_nce(again, other)


def info_nce(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Each of the 2B states against the other view of its example, among all but itself; dot products, as published."""
    states, count = torch.cat([one, other]), len(one)
    similarity = (states @ states.T).fill_diagonal_(-math.inf)
    return F.cross_entropy(similarity, torch.arange(2 * count).roll(count))


def s3rec_loss(model: S3rec, batch: dict) -> torch.Tensor:
    """S3-Rec's published pretraining step: four bidirectional encodings, and the weighted sums of the objectives. Like
    ours, and unlike the published one, it computes attributes at real cells alone.
    """
    views = (model.encoder(batch | {"items": items}, causal=False) for items in batch["items"])
    cloze, context, segment, corrupted = views
    masked, items = batch["masked"], model.encoder.items.weight

    def attributes(name, cells):
        logits = model.maps[name](cloze[cells]) @ model.attributes.weight.T
        wanted = model.multi_hot[batch["known"][cells]]
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")

    def pairs(state, positive, negative):
        positive, negative = ((state * other).sum(1).sigmoid() for other in (positive, negative))
        return -F.logsigmoid(positive - negative).sum()

    known, negatives = (items[batch[name][masked]] for name in ("known", "negatives"))
    last = batch["last"][batch["segmented"]]
    ends = [states.flatten(0, 1)[last] for states in (context, segment, corrupted)]
    terms = {
        "aap": attributes("aap", (batch["segments"] > 0) & ~masked),
        "mip": pairs(model.maps["mip"](cloze[masked]), known, negatives),
        "map": attributes("map", masked),
        "sp": pairs(model.maps["sp"](ends[0]), *ends[1:]),
    }
    return sum(weight * terms[name] for name, weight in S3REC_WEIGHTS.items())


def train_step(optimizer: torch.optim.Optimizer, loss: Callable[..., torch.Tensor], *arguments) -> None:
    """One step of Adam on `loss` of `arguments`."""
    optimizer.zero_grad()
    loss(*arguments).backward()
    optimizer.step()


@torch.inference_mode()
def evaluate(model: Sasrec, batches: list[dict]) -> tuple[float, float]:
    """(HR, NDCG) at CUTOFF over all items with the history hidden."""
    model.eval()
    hits = []
    for batch in batches:
        scores = model(batch).flatten(0, 1)[batch["last"]] @ model.items.weight.T
        scores[batch["hidden_user"], batch["hidden_item"]] = -math.inf
        hits.append(scores.topk(CUTOFF).indices == batch["target"][:, None])
    model.train()
    hits = torch.cat(hits).double()
    return hits.sum(1).mean().item(), (hits @ (1 / torch.arange(2.0, CUTOFF + 2).log2()).double()).mean().item()


def serve(
    pipe: Connection, encoder: dict, multi_hot: np.ndarray, batches: dict[str, list], steps: int, threads: int
) -> None:
    """The child process: answers each name it receives with the seconds of one unit of that work, until it gets None.

    `batches`: lists `padded`, `packed`, `prefix`, `same_target`, `cloze` and `evaluate` of batches of
    benchmarks/data.py; `multi_hot` [items, attributes]. Between questions it waits for the pipe and uses no core. Steps
    are timed over `steps` at a time.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model, pretrained = Sasrec(encoder, len(multi_hot)), S3rec(encoder, multi_hot)
    ready = {name: [tensors(batch) for batch in parts] for name, parts in batches.items()}

    def training(loss: Callable, model: nn.Module, *parts: list) -> Callable[[], float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        endless = itertools.cycle(zip(*parts, strict=True))
        return lambda: _seconds(lambda: train_step(optimizer, loss, model, *next(endless)), steps)

    work = {
        "real": training(next_item_loss, model, ready["padded"]),
        "packed": training(next_item_loss, model, ready["packed"]),
        "all": training(functools.partial(next_item_loss, everywhere=True), model, ready["padded"]),
        "prefix": training(next_item_loss, model, ready["prefix"]),
        "duorec": training(duorec_loss, model, ready["prefix"], ready["same_target"]),
        "s3rec": training(s3rec_loss, pretrained, ready["cloze"]),
        "loss": lambda: _seconds(loss_alone(model, ready["packed"][0]), steps),
        "evaluate": lambda: _seconds(lambda: evaluate(model, ready["evaluate"]), 1),
    }
    while (name := pipe.recv()) is not None:
        pipe.send(work[name]())


def loss_alone(model: Sasrec, batch: dict) -> Callable[[], None]:
    """Cross-entropy and its gradients for random states and the batch's real targets."""
    targets = batch["targets"][batch["targets"] != NONE]
    states = torch.randn(len(targets), model.items.embedding_dim, requires_grad=True)

    def run():
        states.grad = model.items.weight.grad = None
        F.cross_entropy(states @ model.items.weight.T, targets).backward()

    return run


def _seconds(work: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - began) / repeats
