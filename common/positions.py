"""Positions in a padded batch: where a mask is true, which tokens see which, how much they attend
to the image, and the cache of what was computed at them."""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Places(NamedTuple):
    """Where a batch has what, as indices found on the host: a mask waits for the GPU to count."""
    targets: Tensor         # (2,m) sample and position of what predicts a supervised token
    answers: Tensor         # (2,a) sample and position of the supervised tokens that see an image
    text: Tensor            # (B,M) positions of the text that sees an image, filled up with -1
    seeing: Tensor          # (b,) samples with such text
    reconstruct: Tensor     # (v,) samples in VDEP mode


def find_places(supervised: Tensor, text: Tensor, reconstruct: Tensor) -> Places:
    """Takes masks: supervised (B,T), text (B,T) that sees an image, reconstruct (B,)."""
    return Places(supervised[:, 1:].nonzero().T, (supervised & text).nonzero().T,
                  true_positions(text), text.any(1).nonzero()[:, 0], reconstruct.nonzero()[:, 0])


def true_positions(mask: Tensor, width: int | None = None) -> Tensor:
    """Positions of the True entries of each row of mask (B,T), in order, filled up with -1:
    (B,width); width None: the most that any row has."""
    if width is None:
        width = int(mask.sum(1).max())
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    order = order.masked_fill(~mask.gather(1, order), -1)
    return F.pad(order, (0, width - order.shape[1]), value=-1)


def at_image(h: Tensor, image_mask: Tensor, n: int) -> Tensor:
    """(B,T,D) → (B,n,D) at the image positions. Do not use the rows of samples without an image."""
    positions = true_positions(image_mask, n).clamp(min=0)                                  # (B,n)
    return h.gather(1, positions[..., None].expand(-1, -1, h.shape[-1]))


def visible(distance: Tensor, window: int | None) -> Tensor:
    """True where a query sees a key `distance` tokens before it. window: of sliding attention."""
    if window is None:
        return distance >= 0
    return (distance >= 0) & (distance < window)


@torch.no_grad()
def attention_to_image(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, average: bool = True,
                       window: int | None = None, chunk: int = 64) -> Tensor:
    """Attention probabilities from some query rows to the image positions, averaged over heads:
    (B,M,N) float32. average=False: of every head, (B,H,M,N).

    q (B,H,T,d) and k (B,K,T,d) after rotation. rows (B,M): positions of the queries, columns (B,N):
    of the image tokens; -1 marks no position and gives 0. The softmax is over all keys that a query
    sees. Fused attention returns no probabilities, so they are computed here, `chunk` rows at a
    time: (B,H,T,T) never exists."""
    B, H, T, d = q.shape
    k = k.repeat_interleave(H // k.shape[1], dim=1)
    keys = torch.arange(T, device=q.device)
    out = []
    for part in rows.split(chunk, dim=1):                                                   # (B,m)
        at = part.clamp(min=0)[:, None, :, None]                                            # (B,1,m,1)
        scores = (q.gather(2, at.expand(B, H, -1, d)) @ k.transpose(2, 3)).float() * d ** -0.5
        p = scores.masked_fill(~visible(at - keys, window), -torch.inf).softmax(-1)     # (B,H,m,T)
        if average:
            p = p.mean(1, keepdim=True)                                                     # (B,1,m,T)
        p = p.gather(3, columns.clamp(min=0)[:, None, None].expand(*p.shape[:3], -1))       # (B,1 or H,m,N)
        out.append(p * (part >= 0)[:, None, :, None] * (columns >= 0)[:, None, None])
    p = torch.cat(out, dim=2)
    return p[:, 0] if average else p


def rescale(frequencies: Tensor, scaling: dict | None) -> Tensor:
    """Return Llama-3.1's rotary frequencies (d/2,) for those of rope_theta; scaling None: the same.

    Over original_max_position_embeddings positions, pairs that turn less than low_freq_factor times
    are slowed down by `factor`, those that turn more than high_freq_factor times are not; between
    the two it is interpolated."""
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies


class KVCache:
    """Keys and values of every layer, (L,B,K,S,d), written at each row's own positions."""
    def __init__(self, c, batch: int, length: int, dtype: torch.dtype, device):  # c: DecoderConfig
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, length, c.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
