"""VDEP: the language model predicts the next image token, as the projector made it.

From Visuals to Vocabulary: Establishing Equivalence Between Image and Text Token Through Autoregressive Pre-training
in MLLMs (VDEP), arXiv 2502.09093.

    L = L_t + α L_i,  α = 0.001                                                                       (11)
    L_i = 1/(N−1) Σ_{i<N} d(h_i, x_{i+1})     h: final hidden states;  x: the "dynamic embeddings", what the projector
                                              makes of the image, here as targets
    Hybrid batches (§4.3): a sample is in LLaVA mode and adds to L_t (cross-entropy, its eq. 2: methods/ce.py), or in
    VDEP mode and adds to L_i. The data of stage 1 is seen once in each. Stage 2 is plain cross-entropy.

    symbol   variable        shape
    h        hidden_states   (B,N,D)  at the image positions of samples in VDEP mode
    x        image_embeds    (B,N,D)
    L_i      total / count   ()       count: samples

Where the paper is silent
* The target's gradient: none, a label is not trained. With it the projector finds the constant image, which is easy to
  predict (LOG.md).
* The distance over D: the mean, so that α means the same for every width. With the sum the term is D times as large.
* h: after the final norm, as next-token prediction reads it. The norm fixes |h|, the target's |x| is free.
* "inverse" and "sigmoid" of the ablation, as functions of d: d / (1 + d) = 1 − 1/(1 + d), and 2σ(d) − 1. Both are 0 at
  d = 0, rise with d and stay below 1: far targets pull less.
* VDEP-mode prompts are marked <auto_image> in the paper. Attention is causal, so the caption and whatever else comes
  after the image cannot reach its hidden states: such a sample is <s> and the image alone. A mark before the image
  would be a word embedding that stage 1 does not train; there is none.
"""
from typing import Literal

import torch
from torch import Tensor


def reconstruction_loss(hidden_states: Tensor, image_embeds: Tensor,
                        distance: Literal["l2", "inverse", "sigmoid"] = "l2") -> tuple[Tensor, Tensor]:
    """(total, count): each sample's mean distance over its N − 1 predicted positions, summed; and the samples.

    hidden_states (B,N,D) at the image positions, image_embeds (B,N,D). The last position has no target, the first
    token no prediction. No gradient reaches the targets."""
    exact = torch.promote_types(hidden_states.dtype, torch.float32)
    predicted, target = hidden_states[:, :-1].to(exact), image_embeds[:, 1:].detach().to(exact)     # (B,N-1,D)
    d = (predicted - target).pow(2).mean(-1)                                                        # (B,N-1)
    if distance == "inverse":
        d = d / (1 + d)
    elif distance == "sigmoid":
        d = 2 * d.sigmoid() - 1
    elif distance != "l2":
        raise ValueError(f"distance {distance!r} is not known; l2, inverse and sigmoid are")
    total = d.mean(-1).sum()                                                                        # eq. (11), L_i
    return total, torch.tensor(len(d), device=d.device)
