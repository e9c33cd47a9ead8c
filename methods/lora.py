"""LoRA: a low-rank update beside a frozen linear map.

LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.

    h = W x + (α/r) B A x                                                                             (3)

    symbol   variable        shape
    W        weight          (out,in)  frozen
    A        lora_A          (r,in)    random at the start
    B        lora_B          (out,r)   0 at the start, so that training begins at W
    α/r      scale           ()        α = 2 r in LLaVA: r = 128, α = 256

Where the paper is silent, or LLaVA differs
* Which maps? The paper adapts queries and values. LLaVA, and we: every linear map in the decoder's layers.
* How random is A? The paper says Gaussian; its code and everybody's is uniform with bound 1/√in, and so is ours.
* LLaVA drops 5 % of what enters A. We do not: one run less that differs from itself.
"""
import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A linear map and its update. Its weight has the name and shape that it has without."""
    def __init__(self, in_features: int, out_features: int, bias: bool, rank: int, alpha: float):
        super().__init__(in_features, out_features, bias)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)        # eq. (3)

    def merged(self) -> Tensor:
        """W + (α/r) B A, summed in float64 and rounded once, to W's dtype."""
        return (self.weight.double() + self.scale * self.lora_B.double() @ self.lora_A.double()).to(self.weight.dtype)


def linear(in_features: int, out_features: int, c, bias: bool = False) -> nn.Linear:
    """A map of a decoder's layer, as its config `c` wants it. bias: it has one even if the others
    have none."""
    if c.lora_rank:
        return LoRALinear(in_features, out_features, bias or c.bias, c.lora_rank, c.lora_alpha)
    return nn.Linear(in_features, out_features, bias=bias or c.bias)


def lora_start(name: str, shape: torch.Size, seed: int) -> Tensor | None:
    """What A or B are before training, by their name, the same on every rank; None for other
    tensors."""
    if name.endswith("lora_B"):
        return torch.zeros(shape)
    if name.endswith("lora_A"):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return torch.empty(shape).uniform_(-1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]), generator=generator)


@torch.no_grad()
def merge(decoder: nn.Module) -> None:
    """Puts every update into its weight: what is left are plain linear maps, and a config without
    LoRA."""
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                plain.weight, plain.bias = nn.Parameter(child.merged()), child.bias
                setattr(module, name, plain)
    decoder.config.lora_rank = 0
