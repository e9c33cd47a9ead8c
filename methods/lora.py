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
    """A linear map and its update. The map's own weight keeps its name and shape."""
    def __init__(self, in_features: int, out_features: int, bias: bool, rank: int, alpha: float):
        super().__init__(in_features, out_features, bias)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))          # filled by lora_start
        self.lora_B = nn.Parameter(torch.empty(out_features, rank))
        self.scale = alpha / rank               # so that another rank needs no other learning rate

    def forward(self, x: Tensor) -> Tensor:
        # (…,in) → (…,r) → (…,out). The product B A, which is as large as W, is never made.
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)        # eq. (3)

    def merged(self) -> Tensor:
        """W + (α/r) B A, summed in float64 and rounded once, to W's dtype."""
        return (self.weight.double() + self.scale * self.lora_B.double() @ self.lora_A.double()).to(self.weight.dtype)


def linear(in_features: int, out_features: int, c, bias: bool = False) -> nn.Linear:
    """A map of a decoder's layer, as its config `c` says. bias: it has one even if c.bias is False."""
    # LLaVA adapts every map of a layer, so the config alone decides. W is frozen by the trainer,
    # which trains what has "lora_" in its name.
    if c.lora_rank:
        return LoRALinear(in_features, out_features, bias or c.bias, c.lora_rank, c.lora_alpha)
    return nn.Linear(in_features, out_features, bias=bias or c.bias)


def lora_start(name: str, shape: torch.Size, seed: int) -> Tensor | None:
    """What A or B is before training, by its name; None for any other tensor."""
    # One of the two is 0, so training begins at W. With both 0 it would never leave: the gradient
    # of A has B as a factor, and that of B has A.
    if name.endswith("lora_B"):
        return torch.zeros(shape)
    # The seed is made of the name, so that every rank draws the same A, whatever it draws before.
    if name.endswith("lora_A"):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return torch.empty(shape).uniform_(-1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]), generator=generator)


@torch.no_grad()
def merge(decoder: nn.Module) -> None:
    """Add every update to its weight. Plain linear maps are left, and a config without LoRA."""
    for module in list(decoder.modules()):                  # lists: children are replaced on the way
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                # On the meta device a new map allocates nothing before it gets its weight.
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                plain.weight, plain.bias = nn.Parameter(child.merged()), child.bias
                setattr(module, name, plain)
    decoder.config.lora_rank = 0
