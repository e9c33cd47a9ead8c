"""MoCa, modality calibration: an affine map of the image tokens at the end of every layer.

Deciphering Cross-Modal Alignment in Large Vision-Language Models with Modality Integration Rate,
arXiv 2410.07167.

    ψ_k(f) = u_k · f + v_k   for image tokens f of layer k;  text tokens stay as they are               (5)

    symbol   variable        shape
    f        hidden_states   (B,T,D)  layer k's output; image tokens where image_mask (B,T)
    u, v     self.u, self.v  (D,)     one pair a layer; u = 1, v = 0 at the start

Where the paper is silent
* Precision: float32 inside, then the input's dtype. Text tokens are returned bit for bit (as in the released code).
* Training: in both stages, also where the language model is frozen (`--moca`).
* Decoding: a generated token is text, so the map acts on the prompt alone.
"""
import torch
from torch import Tensor, nn


class MoCa(nn.Module):
    """The map of one layer, the identity at the start."""
    def __init__(self, hidden_size: int):
        super().__init__()
        # One number a dimension, not a matrix: the map shifts and stretches, and mixes nothing.
        self.u = nn.Parameter(torch.ones(hidden_size))
        self.v = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor, image_mask: Tensor) -> Tensor:
        """hidden_states (B,T,D), image_mask (B,T) bool → (B,T,D) of the same dtype."""
        # bfloat16 has 8 bits: a u of 1.001 would be 1 again.
        exact = torch.promote_types(hidden_states.dtype, torch.float32)
        calibrated = torch.addcmul(self.v.to(exact), self.u.to(exact), hidden_states.to(exact))     # eq. (5)
        # hidden_states[image_mask] would wait for a GPU to count the mask; where() need not.
        return torch.where(image_mask[..., None], calibrated.to(hidden_states.dtype), hidden_states)
