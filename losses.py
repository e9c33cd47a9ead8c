"""The objectives side by side: how each wires the model's output to the pure functions of methods/.

A loss takes (model, batch) and returns Terms. A term is a sum and what it is to be divided by; training divides by
that count over the whole global batch (`counts`, known from the batch alone, before any forward), so
    1 rank × 8 accumulation steps = 8 ranks × 1.
"""
from typing import NamedTuple

from torch import Tensor, nn

from data import IGNORE, Batch
from methods.ce import next_token_loss
from model import Llava


class Term(NamedTuple):
    name: str
    total: Tensor       # summed over this batch
    count: Tensor       # what of: tokens, or samples
    weight: float       # in the loss


def ce(model: Llava, batch: Batch) -> list[Term]:
    """LLaVA-1.5: next-token cross-entropy over the supervised tokens."""
    out = model(batch)
    head = model.language_model.lm_head
    return [Term("ce", *next_token_loss(out.hidden_states, batch.labels, head.weight, head.bias), 1.0)]


LOSSES = {"ce": ce}


def counts(batch: Batch) -> dict[str, Tensor]:
    """The denominators of every term, by its name."""
    return {"ce": (batch.labels[:, 1:] != IGNORE).sum()}


class Objective(nn.Module):
    """Model and loss as one module: what DDP wraps, so that the weights a loss uses (the head) are in its graph."""
    def __init__(self, model: Llava, loss: str):
        super().__init__()
        self.model = model
        self.loss = LOSSES[loss]

    def forward(self, batch: Batch) -> list[Term]:
        return self.loss(self.model, batch)
