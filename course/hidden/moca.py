"""MoCa, eq. (5), and its place in the forward."""
import torch
from torch import nn

from course.hidden import item, tools
from course.hidden.tools import grads, normal, randn, size


class CausalMean(nn.Module):
    """In place of attention: a position reads the mean of what it sees; q and k are the input."""
    window = None

    def forward(self, x, rope, mask=None, cache=None):
        y = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return y, x[:, None], x[:, None]


def example(g, dtype=torch.float64):
    B, T, D = size(g, 2, 4), size(g, 6, 9), size(g, 4, 7)
    mask = torch.rand(B, T, generator=g) < 0.5
    mask[:, 1], mask[:, 2] = True, False
    return normal(g, B, T, D, dtype=dtype), mask


def trained(f, g, D):
    """A map that is not the identity."""
    moca = f.MoCa(D).double()
    moca.load_state_dict({name: 1 + randn(g, D) for name in ("u", "v")})
    return moca


def layer_of(f, g, D, **options):
    c = f.DecoderConfig(11, D, 2 * D, 1, 1, head_dim=D, **options)
    layer = f.DecoderLayer(c).double()
    layer.self_attn = CausalMean()
    for _, p in sorted(layer.named_parameters()):
        p.data = 0.5 * randn(g, *p.shape)
    return layer


@item(20, view=lambda r: [r[0][r[1] > 0]])
def affine(f, g):
    """Image tokens become u · f + v, dimension by dimension."""
    h, mask = example(g)
    return trained(f, g, h.shape[-1])(h, mask), mask


@item(10, view=lambda r: [r[0], r[1], r[2] - r[3]])
def starts_as_the_identity(f, g):
    """At the start u = 1 and v = 0, both (D,): training begins at the model as it was."""
    h, mask = example(g)
    moca = f.MoCa(h.shape[-1]).double()
    return dict(moca.named_parameters())["u"], dict(moca.named_parameters())["v"], moca(h, mask), h


@item(10, view=lambda r: [(r[0] - r[1])[r[2] == 0], (r[3] - r[4])[r[2] == 0]])
def text_unchanged(f, g):
    """Text tokens are returned bit for bit, in every dtype, and the input is not written to."""
    h, mask = example(g)
    moca, low, kept = trained(f, g, h.shape[-1]), h.detach().bfloat16() * 1.7, h.detach().clone()
    return moca(h.detach(), mask), kept, mask, moca.float()(low, mask), low


@item(10, view=tools.directions)
def gradients(f, g):
    """u, v and the hidden states get their gradients; text passes its own on as it is."""
    h, mask = example(g)
    moca = trained(f, g, h.shape[-1])
    out = moca(h, mask)
    return grads((out * randn(g, *out.shape)).sum(), moca.u, moca.v, h)


@item(10, tolerance=1e-3, view=lambda r: [r[1], (r[0] - r[2]).abs().max() < 0.3])
def precision(f, g):
    """Computed in float32 and rounded once, to the dtype of the input."""
    h = torch.full((1, 3, 4), 256.0, dtype=torch.bfloat16)
    u, v = 1 + torch.rand(4, generator=g) / 512, torch.rand(4, generator=g) / 4 + 0.5
    moca = f.MoCa(4)
    moca.load_state_dict({"u": u, "v": v})
    out = moca(h, torch.ones(1, 3).bool())
    return out, out.element_size(), (u * 256 + v).bfloat16().expand(1, 3, 4)


@item(15)
def layer(f, g):
    """A layer: x + attention(norm(x)), then x + mlp(norm(x)), each with its own norm."""
    h, _ = example(g)
    return layer_of(f, g, h.shape[-1])(h, None)[0]


@item(15, view=lambda r: [r[0] - r[1], (r[0] - r[2]).abs().amax(-1) > 1e-9])
def place(f, g):
    """The map comes last, after attention, MLP and both sums, and on image positions alone."""
    h, mask = example(g)
    block, moca = layer_of(f, g, h.shape[-1]), trained(f, g, h.shape[-1])
    plain = block(h, None)[0]
    return block(h, None, moca=moca, image_mask=mask)[0], moca(plain, mask), plain


@item(5)
def parallel(f, g):
    """Without a second norm (Phi-2) attention and MLP read the same normed input, side by side."""
    h, _ = example(g)
    return layer_of(f, g, h.shape[-1], parallel=True)(h, None)[0]


@item(5)
def attention_maps(f, g):
    """The second result is None, or attention_to_image of queries and keys if `attend` asks."""
    h, mask = example(g)
    block = layer_of(f, g, h.shape[-1])
    rows, columns = torch.tensor([[4, 5]] * len(h)), torch.tensor([[1, 2]] * len(h))
    return block(h, None)[1], block(h, None, attend=(rows, columns))[1]
