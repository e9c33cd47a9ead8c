"""BASIC: the outputs of the shallow layers at the image positions supervise the projector.

Boosting Visual Alignment with Intrinsic Refined Embeddings in MLLMs (BASIC), ICCV 2025, arXiv 2508.06895.

    V̂ = Σ_{i=1..k} w_i Ṽ_i,  w_i = i² / Σ_j j²                      k = L/2                           (4)
    a_i ∝ text → image attention, averaged over layers 1..k, heads and text rows;  Σ_i a_i = 1        (5)
    L_das = Σ_i a_i ‖ v_i/|v_i| − v̂_i/|v̂_i| ‖²                                                        (6)
    L_sds = Σ_i a_i KL( softmax(v̂_i Eᵀ) ‖ softmax(v_i Eᵀ) )                                           (7)
    L = L_lm + λ₁ L_das + λ₂ L_sds,  λ₁ = 1, λ₂ = 0.01                                                (8)

    symbol   variable      shape
    v        v             (B,N,D)  the projector's output, the only thing trained here
    Ṽ_i      h             (B,N,D)  layer i's output at the same positions
    v̂        v_hat         (B,N,D)  refined embeddings, a target
    w        layer_weights (k,)
    a        degree        (B,N)    of supervision
    E        embedding     (V,D)    the language model's input embeddings

Both stages. L_lm (its eq. 3) is methods/ce.py.

Gradients, in the words of supplement B: the two losses "only influence the gradients of the vision
projector parameters". So v̂, a and E are constants, in stage 2 too. (Else the layers would learn to
leave their input unchanged.) Where --unlock-vision trains the vision tower, losses.py stops the
gradient at the projector's input.

Where the paper is silent
* Text rows of eq. (5): every text token after the image. Those before it cannot attend to it. Each layer's attention is
  a softmax over all visible keys, text included; only a is normalised.
* E: the embeddings as the layers receive them. Gemma multiplies them by √D, and so does losses.py.
* KL: in nats, target first, as written.
* Ablations: constant and decreasing w; equal a_i = 1/N; other k; λ = 0 for each loss alone.

Computing eq. (7): the two (B,N,V) distributions never exist. Value and gradient, which is
a (softmax(v Eᵀ) − softmax(v̂ Eᵀ)) E, are computed together, `chunk` patches at a time. The logits of
v are v̂ Eᵀ − (v̂ − v) Eᵀ: if v is close to v̂, v Eᵀ and v̂ Eᵀ differ by little but their rounding.
"""
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_weights(k: int, scheme: Literal["increasing", "constant", "decreasing"] = "increasing") -> Tensor:
    """w (k,) of eq. (4), float64, summing to 1."""
    i = torch.arange(1, k + 1, dtype=torch.float64)
    if scheme not in ("increasing", "constant", "decreasing"):
        raise ValueError(f"scheme {scheme!r} is not known; increasing, constant and decreasing are")
    w = {"increasing": i, "constant": torch.ones_like(i), "decreasing": i.flip(0)}[scheme] ** 2
    return w / w.sum()                                                                          # eq. (4)


def supervision_degree(attention: Tensor, text_mask: Tensor) -> Tensor:
    """a (B,N) of eq. (5): sums to 1 over a sample's image tokens; all 0 without text or image.

    attention (B,M,N) from text rows to image tokens, summed or averaged over layers and heads;
    text_mask (B,M) bool: the rows that are text, not padding."""
    a = attention.masked_fill(~text_mask[..., None], 0).sum(1)                                  # (B,N)
    return a / a.sum(1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)                      # eq. (5)


def direction_loss(v: Tensor, v_hat: Tensor, degree: Tensor) -> tuple[Tensor, Tensor]:
    """(total, count): L_das of eq. (6) summed over samples; the samples with a degree.

    v, v_hat (B,N,D), degree (B,N). The gradient reaches v alone."""
    exact = torch.promote_types(v.dtype, torch.float32)
    difference = F.normalize(v.to(exact), dim=-1) - F.normalize(v_hat.detach().to(exact), dim=-1)     # (B,N,D)
    a = degree.detach().to(exact)
    return (a * difference.pow(2).sum(-1)).sum(), (a > 0).any(1).sum()                          # eq. (6)


class _ChunkedDivergence(torch.autograd.Function):
    """Σ_i a_i KL(softmax(v̂_i Eᵀ) ‖ softmax(v_i Eᵀ)) of patches v, v_hat (P,D), a (P,); its gradient by v is computed
    with the value. The products with `embedding` (V,D) are in its dtype, all else in that of a."""

    @staticmethod
    def forward(ctx, v: Tensor, v_hat: Tensor, a: Tensor, embedding: Tensor, chunk: int) -> Tensor:
        exact, low = a.dtype, embedding.dtype
        total = a.new_zeros(())
        grad = torch.empty_like(v) if ctx.needs_input_grad[0] else None
        for start in range(0, len(v), chunk):
            part = slice(start, start + chunk)
            delta = (v_hat[part].to(exact) - v[part].to(exact)).to(low)                         # (chunk,D)
            z_hat = (v_hat[part].to(low) @ embedding.T).to(exact)                               # (chunk,V) logits of v̂
            z = z_hat - (delta @ embedding.T).to(exact)                                         # (chunk,V) logits of v
            log_p, log_q = z_hat.log_softmax(-1), z.log_softmax(-1)                             # p of v̂, the target
            del z_hat, z                                                                        # large: chunk rows of V
            p = log_p.exp()
            kl = torch.linalg.vecdot(p, log_p.sub_(log_q))                                      # (chunk,)
            difference = log_q.exp_().sub_(p)                                                   # (chunk,V) q − p
            kl += difference.sum(-1)        # Σ q − Σ p: removes from kl what rounding left of 1 − Σ p and 1 − Σ q
            total += a[part] @ kl                                                               # eq. (7)
            if grad is not None:
                grad[part] = ((difference.to(low) @ embedding) * a[part, None]).to(v.dtype)              # (chunk,D)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        (grad,) = ctx.saved_tensors
        return None if grad is None else grad * grad_total.to(grad.dtype), None, None, None, None


def semantic_loss(v: Tensor, v_hat: Tensor, degree: Tensor, embedding: Tensor, chunk: int = 128
                  ) -> tuple[Tensor, Tensor]:
    """(total, count): L_sds of eq. (7), in nats, summed over samples; the samples with a degree.

    v, v_hat (B,N,D), degree (B,N), embedding (V,D). The gradient reaches v alone. Under autocast
    the products with the embedding are in its dtype, the rest in float32. Peak memory: four times
    `chunk` rows of V. Every patch is computed: leave out the samples that have no degree."""
    # The dtype that autocast would choose for the products. It is off below, for all else is exact.
    device = v.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype
    patches = v.flatten(0, 1), v_hat.detach().flatten(0, 1)                                     # (P,D) twice
    a = degree.detach().flatten().to(torch.promote_types(v.dtype, torch.float32))               # (P,)
    with torch.autocast(device, enabled=False):
        total = _ChunkedDivergence.apply(*patches, a, embedding.detach().to(low), chunk)
    return total, (degree > 0).any(1).sum()
