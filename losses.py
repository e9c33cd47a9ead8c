"""The objectives side by side: how each wires the model's output to the pure functions of methods/.

A loss takes (model, batch, cfg) and returns Terms; cfg are the flags of train.py. A term is a sum and what it is to be
divided by; training divides by that count over the whole global batch (`counts`, known from the batch alone, before any
forward), so
    1 rank × 8 accumulation steps = 8 ranks × 1.
A weight of 0 switches a term off: it is not computed.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data import IGNORE, Batch
from methods.basic import direction_loss, layer_weights, semantic_loss, supervision_degree
from methods.ce import next_token_loss
from methods.vdep import reconstruction_loss
from methods.vista import alignment_loss
from model import Llava, Output, marked


class Term(NamedTuple):
    name: str
    total: Tensor       # summed over this batch
    count: Tensor       # what of: tokens, or samples
    weight: float       # in the loss


def next_token(model: Llava, batch: Batch, out: Output) -> Term:
    """Cross-entropy over the supervised tokens, a term of every objective."""
    head = model.language_model.lm_head
    return Term("ce", *next_token_loss(out.hidden_states, batch.labels, head.weight, head.bias), 1.0)


def at_image(h: Tensor, batch: Batch, n: int) -> Tensor:
    """(B,T,D) → (B,N,D) at the image positions. The rows of samples without an image hold what nobody should use."""
    positions = marked(batch.image_mask, n).clamp(min=0)                                    # (B,N)
    return h.gather(1, positions[..., None].expand(-1, -1, h.shape[-1]))


def ce(model: Llava, batch: Batch, cfg) -> list[Term]:
    """LLaVA-1.5: next-token cross-entropy alone."""
    return [next_token(model, batch, model(batch))]


def vdep(model: Llava, batch: Batch, cfg) -> list[Term]:
    """VDEP eq. (11). Samples in VDEP mode (batch.reconstruct) have no labels, the others no reconstruction."""
    out = model(batch)
    terms = [next_token(model, batch, out)]
    if cfg.stage == "pretrain" and cfg.vdep_alpha:
        h = at_image(out.hidden_states, batch, out.image_embeds.shape[1])[batch.reconstruct]
        terms.append(Term("vdep", *reconstruction_loss(h, out.image_embeds[batch.reconstruct], cfg.vdep_distance),
                          cfg.vdep_alpha))
    return terms


def vista(model: Llava, batch: Batch, cfg) -> list[Term]:
    """VISTA eq. (9): supervised tokens of samples with an image, against the state at its last token."""
    out = model(batch)
    # S_n through the final norm in float32. The gradient by S_n is almost parallel to S_n, and the norm's backward
    # removes that part. In bfloat16, half of what remains is rounding error.
    last = at_image(out.before_norm, batch, out.image_embeds.shape[1])[:, -1]               # (B,D)
    state = model.language_model.model["norm"](last.to(torch.promote_types(last.dtype, torch.float32)))
    text = (batch.labels != IGNORE) & batch.has_image[:, None]
    return [next_token(model, batch, out),
            Term("vista", *alignment_loss(out.text_embeds, text, state, cfg.vista_weighting, cfg.vista_distance,
                                          cfg.vista_reduce), 1.0)]


def basic(model: Llava, batch: Batch, cfg) -> list[Term]:
    """BASIC eq. (8): layers 1..k are watched; what they make of the image and where text looks become the targets."""
    lm, n = model.language_model, model.vision_tower.config.image_tokens
    if not (cfg.basic_das or cfg.basic_sds):
        return ce(model, batch, cfg)
    k = cfg.basic_k or max(1, lm.config.num_hidden_layers // 2)
    w = layer_weights(k, cfg.basic_weights).tolist()
    text = batch.text_after_image()
    refined, looks = [], []                               # running sums of eq. (4) and (5)

    def watch(i: int, h: Tensor, attention: Tensor | None) -> None:
        refined[:] = [sum(refined) + w[i - 1] * at_image(h, batch, n).float()]              # eq. (4)
        if attention is not None:
            looks[:] = [sum(looks) + attention]
    attended = cfg.basic_degree == "attention"
    out = model(batch, watch, text if attended else None, k)
    if attended:
        rows = marked(text) >= 0                                                            # (B,M)
        degree = supervision_degree(looks[0], rows)
    else:
        degree = (batch.has_image & text.any(1)).float()[:, None].expand(-1, n) / n         # (B,N)
    terms = [next_token(model, batch, out)]
    if cfg.basic_das:
        terms.append(Term("das", *direction_loss(out.image_embeds, refined[0], degree), cfg.basic_das))     # eq. (8)
    if cfg.basic_sds:
        E = lm.model["embed_tokens"].weight
        terms.append(Term("sds", *semantic_loss(out.image_embeds, refined[0], degree, E), cfg.basic_sds))
    return terms


LOSSES = {"ce": ce, "vdep": vdep, "vista": vista, "basic": basic}


def counts(batch: Batch) -> dict[str, Tensor]:
    """The denominators of every term, by its name."""
    supervised = batch.labels[:, 1:] != IGNORE                                              # (B,T-1)
    seen = batch.has_image & batch.text_after_image().any(1)                                # (B,)
    return {"ce": supervised.sum(), "vdep": batch.reconstruct.sum(), "das": seen.sum(), "sds": seen.sum(),
            "vista": (batch.has_image & (batch.labels != IGNORE).any(1)).sum()}


class Objective(nn.Module):
    """Model and loss as one module: what DDP and FSDP wrap, so that weights a loss uses (the head) are in its graph."""
    def __init__(self, model: Llava, cfg):
        super().__init__()
        self.model, self.cfg = model, cfg

    def forward(self, batch: Batch) -> list[Term]:
        return LOSSES[self.cfg.loss](self.model, batch, self.cfg)
