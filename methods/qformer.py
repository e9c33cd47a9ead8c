"""Q-Former: learned queries read the patches through a small BERT, and are the image tokens.

BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
Models, arXiv 2301.12597. As a connector of LLaVA: table 4 of the MIR paper, arXiv 2410.07167.
BLIP-2 draws its blocks and writes no equations; these are BERT's (arXiv 1810.04805):

    z_0 = LN(q)                                                                              (1)
    a = LN(z_l + MHA(z_l, z_l))                                                              (2)
    c = LN(a + MHA(a, x))                 in every other layer, from the first; else c = a   (3)
    z_{l+1} = LN(c + W_2 GELU(W_1 c))                                                        (4)
    v = W z_L + b                                                                            (5)

    symbol   variable        shape
    x        patches         (B,N,Dv)  of the vision encoder
    q        query_tokens    (1,Q,C)   learned, the same for every image
    z        z               (B,Q,C)
    v                        (B,Q,D)   image tokens: Q of them, whatever N is
    L        layers          12, with C = 768 and heads of 64 dimensions in BERT-base

Where the paper is silent, or released connectors differ
* Start: BLIP-2 starts from BERT's weights and trains on image-text pairs before. MIR's and
  TinyLLaVA's code draw all weights from N(0, 0.02²), and so do we; --projector starts from a
  released Q-Former.
* The text branch: InstructBLIP and MIR's code let the question's tokens join eq. (2). TinyLLaVA's
  do not, nor do ours: image tokens depend on the image alone.
* Eq. (1)'s norm has weights in BLIP-2 and MIR, none in TinyLLaVA. Ours has; they are 1 and 0 where
  a file holds none.
* BERT drops 10 % of activations in training. We drop none, so that runs are reproducible.
* The patches get no positions, nor do the queries: the vision encoder's features hold the places.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-12)                       # BERT's; PyTorch's default is 1e-5


class Attention(nn.Module):
    """Attention from z (B,Q,C) to x (B,S,source), with BERT's norm behind it."""
    def __init__(self, width: int, source: int):
        super().__init__()
        self.heads = width // 64 if width % 64 == 0 else 1      # one head: the toy's width of 96

        # These names, `self` among them, are those of BERT's checkpoints.
        sizes = {"query": width, "key": source, "value": source}
        self.self = nn.ModuleDict({name: nn.Linear(size, width) for name, size in sizes.items()})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": norm(width)})

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        q, k, v = (self.self[name](t).unflatten(-1, (self.heads, -1)).transpose(1, 2)       # (B,H,·,d)
                   for name, t in [("query", z), ("key", x), ("value", x)])
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)      # (B,Q,C)
        # BERT norms the sum, after the residual. LLaMA norms the input of a block, before it.
        return self.output["LayerNorm"](z + self.output["dense"](y))


class Layer(nn.Module):
    def __init__(self, width: int, vision_size: int, cross: bool):
        super().__init__()
        self.attention = Attention(width, width)
        self.crossattention = Attention(width, vision_size) if cross else None
        # "_query": released Q-Formers have a second MLP, for text, which we do not read.
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output_query = nn.ModuleDict({"dense": nn.Linear(4 * width, width),
                                           "LayerNorm": norm(width)})

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        z = self.attention(z, z)                                                    # eq. (2)
        if self.crossattention is not None:
            z = self.crossattention(z, x)                                           # eq. (3)
        y = self.output_query["dense"](F.gelu(self.intermediate_query["dense"](z)))
        return self.output_query["LayerNorm"](z + y)                                # eq. (4)


class QFormer(nn.Module):
    """Patches (B,N,Dv) → image tokens (B,Q,D). Parameters have the names of BLIP-2's own code."""
    def __init__(self, vision_size: int, hidden_size: int, queries: int = 32, width: int = 768,
                 layers: int = 12):
        super().__init__()
        self.queries = queries
        self.query_tokens = nn.Parameter(torch.empty(1, queries, width).normal_(std=0.02))
        blocks = nn.ModuleList(Layer(width, vision_size, cross=i % 2 == 0) for i in range(layers))
        self.bert = nn.ModuleDict({"embeddings": nn.ModuleDict({"LayerNorm": norm(width)}),
                                   "encoder": nn.ModuleDict({"layer": blocks})})
        # BERT's start. The projector at the end is no part of BERT: it keeps PyTorch's.
        for module in self.bert.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.projector = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        z = self.bert["embeddings"]["LayerNorm"](self.query_tokens)                         # eq. (1)
        z = z.expand(len(x), -1, -1)                            # (B,Q,C), the same for every image
        for layer in self.bert["encoder"]["layer"]:
            z = layer(z, x)
        return self.projector(z)                                                    # eq. (5)
