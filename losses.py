"""The objectives side by side: how each connects the model to the functions of methods/."""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.positions import at_image
from data import IGNORE, Batch
from methods.basic import direction_loss, layer_weights, semantic_loss, supervision_degree
from methods.ce import next_token_loss
from methods.vdep import reconstruction_loss
from methods.vista import alignment_loss
from model import Llava, Output


class Term(NamedTuple):
    name: str
    total: Tensor       # summed over this batch. Its count is known before the forward: see LOSSES
    weight: float       # in the loss


def next_token(model: Llava, batch: Batch, out: Output) -> Term:
    """Cross-entropy over the supervised tokens, a term of every objective."""
    head, at = model.language_model.lm_head, batch.places.targets
    return Term("ce", next_token_loss(out.hidden_states, batch.labels, head.weight, head.bias, places=at)[0], 1.0)


def ce(model: Llava, batch: Batch, cfg) -> list[Term]:
    """LLaVA-1.5: next-token cross-entropy alone."""
    return [next_token(model, batch, model(batch))]


def vdep(model: Llava, batch: Batch, cfg) -> list[Term]:
    """VDEP eq. (11). In hybrid batches the samples in VDEP mode have no labels."""
    if cfg.stage != "pretrain" or not cfg.vdep_alpha:
        return ce(model, batch, cfg)                        # the paper's stage 2
    out = model(batch)
    x, which = out.image_embeds, batch.places.reconstruct   # (B,N,D), (v,) samples in VDEP mode
    h = at_image(out.hidden_states, batch.image_mask, model.image_tokens)                  # (B,N,D)
    total = reconstruction_loss(h[which], x[which], cfg.vdep_distance, cfg.vdep_reduce, int(cfg.vdep_shift))[0]
    return [next_token(model, batch, out), Term("vdep", total, cfg.vdep_alpha)]


def vista(model: Llava, batch: Batch, cfg) -> list[Term]:
    """VISTA eq. (9): the answers' word embeddings against S_n, the last image token's state."""
    out = model(batch)
    # S_n goes through the final norm in float32: see "Precision" in methods/vista.py.
    last = at_image(out.before_norm, batch.image_mask, model.image_tokens)[:, -1]            # (B,D)
    state = model.language_model.model["norm"](last.to(torch.promote_types(last.dtype, torch.float32)))
    options = cfg.vista_weighting, cfg.vista_distance, cfg.vista_reduce, batch.places.answers
    total = alignment_loss(out.text_embeds, batch.answer_tokens(), state, *options)[0]
    return [next_token(model, batch, out), Term("vista", total, 1.0)]


def basic(model: Llava, batch: Batch, cfg) -> list[Term]:
    """BASIC eq. (8): outputs and attention of the layers 1..k teach the projector."""
    if not (cfg.basic_das or cfg.basic_sds):
        return ce(model, batch, cfg)                        # the ablation's row of neither
    lm, n, equal = model.language_model, model.image_tokens, cfg.basic_degree == "equal"
    k = cfg.basic_k or max(1, lm.config.num_hidden_layers // 2)
    w, E = layer_weights(k, cfg.basic_weights).tolist(), lm.model["embed_tokens"].weight     # (V,D)
    rows, which = batch.places.text, batch.places.seeing   # (B,M) text after an image; its samples

    # Sums over layers, filled while the model runs: no layer's output is kept for them.
    exact = torch.promote_types(E.dtype, torch.float32)
    v_hat = torch.zeros(len(rows), n, E.shape[1], dtype=exact, device=E.device)            # (B,N,D)
    attention = torch.full((*rows.shape, n), float(equal), device=E.device)  # (B,M,N), 1: all equal
    def watch(i: int, h: Tensor, layer_attention: Tensor | None) -> None:
        v_hat.add_(w[i - 1] * at_image(h, batch.image_mask, n).to(exact))                  # eq. (4)
        if layer_attention is not None:
            attention.add_(layer_attention)
    out = model(batch, watch, attention_from=None if equal else rows, watch_layers=k)
    degree, terms = supervision_degree(attention, rows >= 0), [next_token(model, batch, out)]

    # Both losses train the projector alone: with --unlock-vision their gradient stops at its input.
    v = model.multi_modal_projector(out.patches.detach()) if out.patches.requires_grad else out.image_embeds
    if cfg.basic_das:
        terms.append(Term("das", direction_loss(v, v_hat, degree)[0], cfg.basic_das))      # eq. (8)
    if cfg.basic_sds:
        s = lm.config.embed_scale              # Gemma's layers read s E as words; (s E) v = E (s v)
        total = semantic_loss(s * v[which].to(exact), s * v_hat[which], degree[which], E)[0]
        terms.append(Term("sds", total, cfg.basic_sds))
    return terms


class Loss(NamedTuple):
    function: Callable[..., list[Term]]                 # (model, batch, train.py's flags) → terms
    counts: dict[str, Callable[[Batch], Tensor]]        # term → what divides its total


def supervised_tokens(batch: Batch) -> Tensor:
    return (batch.labels[:, 1:] != IGNORE).sum()


# The registry. Training sums totals and counts over the global batch, then divides.
LOSSES = {"ce": Loss(ce, {"ce": supervised_tokens}),
          "vdep": Loss(vdep, {"ce": supervised_tokens, "vdep": lambda batch: batch.reconstruct.sum()}),
          "vista": Loss(vista, {"ce": supervised_tokens, "vista": lambda batch: batch.answer_tokens().any(1).sum()}),
          "basic": Loss(basic, {"ce": supervised_tokens, "das": lambda batch: batch.text_after_image().any(1).sum(),
                                "sds": lambda batch: batch.text_after_image().any(1).sum()})}


def count_terms(loss: str, batch: Batch) -> dict[str, Tensor]:
    """Term of an objective → its denominator in this batch."""
    return {name: count(batch) for name, count in LOSSES[loss].counts.items()}


class Objective(nn.Module):
    """Model and loss as one module for DDP and FSDP: weights that a loss uses are in its graph."""
    def __init__(self, model: Llava, cfg):
        super().__init__()
        self.model, self.cfg = model, cfg

    def forward(self, batch: Batch) -> list[Term]:
        return LOSSES[self.cfg.loss].function(self.model, batch, self.cfg)


if __name__ == "__main__":
    raise SystemExit("losses.py is a library. Train with an objective: python train.py --loss vista")
