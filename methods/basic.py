"""BASIC: what the shallow layers make of an image token supervises the projector that made it.

Boosting Visual Alignment with Intrinsic Refined Embeddings in MLLMs (BASIC), ICCV 2025, arXiv 2508.06895.

    V̂ = Σ_{i=1..k} w_i Ṽ_i,  w_i = i² / Σ_j j²                      k = L/2                           (4)
    a_i ∝ text → image attention, averaged over layers 1..k, heads and text rows;  Σ_i a_i = 1        (5)
    L_das = Σ_i a_i ‖ v_i/|v_i| − v̂_i/|v̂_i| ‖²                                                        (6)
    L_sds = Σ_i a_i KL( softmax(v̂_i Eᵀ) ‖ softmax(v_i Eᵀ) )                                           (7)
    L = L_lm + λ₁ L_das + λ₂ L_sds,  λ₁ = 1, λ₂ = 0.01                                                (8)

    symbol   variable      shape
    v        v             (B,N,D)  image tokens as the projector makes them: the only thing that is trained here
    Ṽ_i      h             (B,N,D)  the same positions as they leave layer i
    v̂        v_hat         (B,N,D)  refined embeddings, a target
    w        layer_weights (k,)
    a        degree        (B,N)    of supervision
    E        embedding     (V,D)    the language model's input embeddings

Both stages. L_lm (its eq. 3) is methods/ce.py.

Where the paper is silent
* Gradients reach v alone: v̂, a and E are taken as numbers, in stage 2 too. (Otherwise the layers would be trained to
  leave their input as it is.)
* Text rows of eq. (5): every text token after the image; those before it do not see it. Each layer's attention is a
  softmax over all it sees, text included; only a is normalised.
* KL: in nats, target first, as written. Never (B,N,V) at once: value and gradient, a (softmax(v Eᵀ) − softmax(v̂ Eᵀ)) E,
  are made together, `chunk` patches at a time.
* Ablations: constant and decreasing w; equal a_i = 1/N; other k; λ = 0 for each loss alone.
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
    """a (B,N) of eq. (5): sums to 1 over a sample's image tokens, all 0 for a sample without text or image.

    attention (B,M,N) from text rows to image tokens, summed or averaged over layers and heads; text_mask (B,M) bool
    says which rows count."""
    a = attention.masked_fill(~text_mask[..., None], 0).sum(1)                                  # (B,N)
    return a / a.sum(1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)                      # eq. (5)


def direction_loss(v: Tensor, v_hat: Tensor, degree: Tensor) -> tuple[Tensor, Tensor]:
    """(total, count): L_das of eq. (6) summed over samples, and the samples that have a degree.

    v, v_hat (B,N,D), degree (B,N). The gradient reaches v alone."""
    exact = torch.promote_types(v.dtype, torch.float32)
    difference = F.normalize(v.to(exact), dim=-1) - F.normalize(v_hat.detach().to(exact), dim=-1)     # (B,N,D)
    a = degree.detach().to(exact)
    return (a * difference.pow(2).sum(-1)).sum(), (a > 0).any(1).sum()                          # eq. (6)


class _ChunkedDivergence(torch.autograd.Function):
    """Σ_i a_i KL(softmax(v̂_i Eᵀ) ‖ softmax(v_i Eᵀ)), its gradient by v made with the value."""

    @staticmethod
    def forward(ctx, v: Tensor, v_hat: Tensor, a: Tensor, embedding: Tensor, chunk: int) -> Tensor:
        exact = a.dtype
        total = a.new_zeros(())
        grad = torch.empty_like(v) if ctx.needs_input_grad[0] else None
        for part in (slice(i, i + chunk) for i in range(0, len(v), chunk)):
            z, z_hat = ((x[part] @ embedding.T).to(exact) for x in (v, v_hat))                  # (chunk,V) logits
            log_z, log_z_hat = (x.logsumexp(-1, keepdim=True) for x in (z, z_hat))              # (chunk,1)
            p = (z_hat - log_z_hat).exp_()                                                      # of v̂, the target
            kl = torch.linalg.vecdot(p, z_hat.sub_(z)) + (log_z - log_z_hat)[:, 0]              # (chunk,)
            total += a[part] @ kl                                                               # eq. (7)
            if grad is not None:
                q = z.sub_(log_z).exp_()
                grad[part] = (q.sub_(p).to(v.dtype) @ embedding) * a[part, None].to(v.dtype)    # (chunk,D)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        (grad,) = ctx.saved_tensors
        return None if grad is None else grad * grad_total.to(grad.dtype), None, None, None, None


def semantic_loss(v: Tensor, v_hat: Tensor, degree: Tensor, embedding: Tensor, chunk: int = 128
                  ) -> tuple[Tensor, Tensor]:
    """(total, count): L_sds of eq. (7), in nats, summed over samples, and the samples that have a degree.

    v, v_hat (B,N,D), degree (B,N), embedding (V,D). The gradient reaches v alone. Peak memory: three times `chunk` rows
    of V. Patches of degree 0 are left out, not computed."""
    seen = degree.detach() > 0                                                                  # (B,N)
    patches = v[seen]                                                                           # (P,D)
    if torch.is_autocast_enabled(v.device.type):
        patches = patches.to(torch.get_autocast_dtype(v.device.type))
    a = degree.detach()[seen].to(torch.promote_types(patches.dtype, torch.float32))             # (P,)
    total = _ChunkedDivergence.apply(patches, v_hat.detach()[seen].to(patches.dtype), a,
                                     embedding.detach().to(patches.dtype), chunk)
    return total, seen.any(1).sum()
