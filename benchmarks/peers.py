"""The same model, training step and evaluation in plain PyTorch, and the child process that times them.

The batches come ready made, so that gathering them costs the peer nothing (ours pays for it in every step). The model
is that of configs/sasrec.py: post-norm, GELU, dropout, output tied to the item table, Adam. Items are numbered from 0,
padding takes any item: no real cell sees it.
"""

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

    def forward(self, batch):
        """→ states [R, L, D]"""
        segments = batch["segments"]
        visible = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
        x = self.dropout(self.norm_input(self.items(batch["items"]) + self.positions(batch["positions"])))
        for block in self.blocks:
            x = block(x, visible)
        return x


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """A batch of benchmarks/data.py with items counted from 0 and NONE for no target."""
    ready = {name: torch.from_numpy(np.asarray(array, np.int64)) for name, array in batch.items()}
    for name in {"items", "target", "hidden_item"} & ready.keys():
        ready[name] = (ready[name] - 1).clamp(min=0)
    ready["targets"] = torch.where(ready["targets"] > 0, ready["targets"] - 1, NONE)
    return ready


def next_item_loss(model: Sasrec, batch: dict, everywhere: bool = False) -> torch.Tensor:
    """Mean cross-entropy at the real targets; `everywhere`: logits at all cells, those without target ignored."""
    states, targets = model(batch), batch["targets"]
    if not everywhere:
        states, targets = states[targets != NONE], targets[targets != NONE]
    logits = states @ model.items.weight.T
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=NONE)


def train_step(model: Sasrec, optimizer: torch.optim.Optimizer, batch: dict, everywhere: bool = False) -> None:
    """One step of Adam on `next_item_loss`."""
    optimizer.zero_grad()
    next_item_loss(model, batch, everywhere).backward()
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


def serve(pipe: Connection, encoder: dict, num_items: int, batches: dict[str, list], steps: int, threads: int) -> None:
    """The child process: answers each name it receives with the seconds of one unit of that work, until it gets None.

    `batches`: lists `padded`, `packed`, `prefix` and `evaluate` of batches of benchmarks/data.py. Between questions it
    waits for the pipe and uses no core. Steps are timed over `steps` at a time.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = Sasrec(encoder, num_items)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    ready = {name: [tensors(batch) for batch in parts] for name, parts in batches.items()}
    endless = {name: itertools.cycle(parts) for name, parts in ready.items()}

    def training(name: str, everywhere: bool = False) -> Callable[[], float]:
        return lambda: _seconds(lambda: train_step(model, optimizer, next(endless[name]), everywhere), steps)

    work = {
        "real": training("padded"),
        "packed": training("packed"),
        "all": training("padded", everywhere=True),
        "prefix": training("prefix"),
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
