"""VISTA: the word embeddings of an answer stay close to the state at the last image token.

VISTA: Enhancing Vision-Text Alignment in MLLMs via Cross-Modal Mutual Information Maximization,
arXiv 2505.10917.

    L = L_CE + (1/m) Σ_{t=1..m} f(t) d(x_t, S_n)                                                      (9)
    f(t) = t/m,  d(x, S) = ‖x − S‖²                                                                   (10)

    symbol   variable        shape
    x_t      text_embeds     (B,T,D)  input embedding of the t-th text token, where text_mask (B,T)
    S_n      visual_state    (B,D)    final hidden state at the last image token, which sees the whole image
    m        m               (B,)     text tokens of a sample
    f(t)     f               (M,)     grows along the answer: later tokens see more text and relatively less image
    d        d               (M,)     M = Σ m

Both stages; no weight to tune. L_CE (its eq. 1) is methods/ce.py.

Where the paper is silent
* Which text: the supervised tokens after the image, t = 1..m over all turns of a conversation. Tokens before the image
  are not about it.
* ‖·‖² over D: the mean. The sum is D times larger and drowns L_CE; reduce="sum" is the literal reading.
* The gradient into x_t: kept. It matters in stage 2 alone, where word embeddings are trained.
* Precision: S_n in float32 (losses.py). |S_n| is far larger than |x_t|, so the gradient by S_n is nearly parallel to
  S_n, and the final norm's backward cancels the parallel part.
* Ablations: d = 1 − cos (distance="cosine"); f(t) = t and f(t) = 1 (weighting).
"""
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def alignment_loss(text_embeds: Tensor, text_mask: Tensor, visual_state: Tensor,
                   weighting: Literal["t/m", "t", "1"] = "t/m", distance: Literal["l2", "cosine"] = "l2",
                   reduce: Literal["mean", "sum"] = "mean", places: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(total, count): the second term of eq. (9) summed over samples, and the samples with text.

    text_embeds (B,T,D), text_mask (B,T) bool, visual_state (B,D). A sample without text adds
    nothing. For one without an image, text_mask must be all False. reduce is over D, for distance
    "l2" alone. places (2,M): sample and position of each text token, where the caller knows them;
    nonzero() has to wait for a GPU."""
    for name, value, known in [("weighting", weighting, ("t/m", "t", "1")), ("distance", distance, ("l2", "cosine")),
                               ("reduce", reduce, ("mean", "sum"))]:
        if value not in known:
            raise ValueError(f"{name} {value!r} is not known; {', '.join(known)} are")
    exact = torch.promote_types(text_embeds.dtype, torch.float32)

    # Text tokens of all samples in one list: no padding is computed.
    sample, position = text_mask.nonzero().T if places is None else places                      # (M,), (M,)
    x, S = text_embeds[sample, position].to(exact), visual_state.to(exact)[sample]              # (M,D)
    if distance == "cosine":
        d = 1 - F.cosine_similarity(x, S, dim=-1)
    else:
        d = (x - S).pow(2)
        d = d.mean(-1) if reduce == "mean" else d.sum(-1)                                       # (M,)
    # t counts text tokens, not positions: between two answers there are questions.
    t = text_mask.cumsum(1)[sample, position].to(exact)                                         # 1..m
    m = text_mask.sum(1)[sample].to(exact)
    f = {"t/m": t / m, "t": t, "1": torch.ones_like(t)}[weighting]                              # eq. (10)
    return (f * d / m).sum(), text_mask.any(1).sum()                                            # eq. (9)
