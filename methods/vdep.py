"""VDEP: the language model predicts the next image token, as the projector made it.

From Visuals to Vocabulary: Establishing Equivalence Between Image and Text Token Through
Autoregressive Pre-training in MLLMs (VDEP), arXiv 2502.09093.

    L = L_t + α L_i,  α = 0.001                                                                       (11)
    L_i = 1/(N−1) Σ_{i<N} d(h_i, x_{i+1})     h: final hidden states;  x: the "dynamic embeddings", the projector's
                                              output, here as targets
    Hybrid batches (§4.3): a sample is in LLaVA mode and adds to L_t (cross-entropy, its eq. 2: methods/ce.py), or in
    VDEP mode and adds to L_i. The data of stage 1 is seen once in each. Stage 2 is plain cross-entropy.
    Joint (`--vdep-joint`), the ablation's row without hybrid batches: every sample adds to both.

    symbol   variable        shape
    h        hidden_states   (B,N,D)  at the image positions of samples in VDEP mode
    x        image_embeds    (B,N,D)
    L_i      total / count   ()       count: samples

Where the paper is silent
* The target's gradient: none, a label is not trained. With it the projector finds the constant image, which is easy to
  predict (docs/log.md).
* h: after the final norm, as next-token prediction reads it. The norm fixes |h|, the target's |x| is free.
* VDEP-mode prompts are marked <auto_image> in the paper. Attention is causal, so the caption, which comes after the
  image, cannot reach its hidden states. A sample in VDEP mode is therefore <s> and the image alone, and L_i of a joint
  sample is the same number. A mark before the image would be a word embedding that stage 1 does not train; we add none.

Where the paper can be read in two ways
* The distance over D. §4.2 has "L2 distance", appendix D "E‖X−Y‖² = Tr Σ", which is the sum. Ours: the mean, so that α
  means the same for every width; reduce="sum" is D times as large.
* The target of position i. "x_{≥t}" makes it the next token, shift=1. "Reconstruct visual information" makes it the
  token itself, shift=0, with N in place of N−1.
* The ablation's "1/L2" and "Sigmoid(L2)". Literally, a loss of 1/d falls as d grows, so training would push h away from
  its target. Ours are saturating forms of both: d / (1 + d) = 1 − 1/(1 + d) and 2σ(d) − 1 (σ(d), moved and stretched).
  They are 0 at d = 0, rise with d and stay below 1: far targets pull less.
"""
from typing import Literal

import torch
from torch import Tensor


def reconstruction_loss(hidden_states: Tensor, image_embeds: Tensor,
                        distance: Literal["l2", "inverse", "sigmoid"] = "l2",
                        reduce: Literal["mean", "sum"] = "mean", shift: Literal[0, 1] = 1) -> tuple[Tensor, Tensor]:
    """(total, count): each sample's mean distance over its N − shift predicted positions, summed
    over samples; the samples.

    hidden_states (B,N,D) at the image positions, image_embeds (B,N,D). Position i predicts token
    i + shift. reduce is over D. No gradient reaches the targets."""
    for name, value, known in [("distance", distance, ("l2", "inverse", "sigmoid")),
                               ("reduce", reduce, ("mean", "sum")), ("shift", shift, (0, 1))]:
        if value not in known:
            raise ValueError(f"{name} {value!r} is not known; {', '.join(map(str, known))} are")
    exact = torch.promote_types(hidden_states.dtype, torch.float32)         # bf16 is squared in float32

    # The last `shift` positions have no target. Their number is subtracted: [:-0] would be empty.
    predicted = hidden_states[:, :hidden_states.shape[1] - shift].to(exact)                         # (B,N-shift,D)
    target = image_embeds[:, shift:].detach().to(exact)
    squares = (predicted - target).pow(2)
    d = squares.mean(-1) if reduce == "mean" else squares.sum(-1)                                   # (B,N-shift)
    # Saturating forms of d in [0, 1): see "1/L2" and "Sigmoid(L2)" above.
    if distance == "inverse":
        d = d / (1 + d)
    elif distance == "sigmoid":
        d = 2 * d.sigmoid() - 1
    # A mean over positions but a sum over samples: training divides by those of the global batch.
    total = d.mean(-1).sum()                                                                        # eq. (11), L_i
    return total, torch.full((), len(d), device=d.device)
