"""Projector, merge and rotary attention."""
import torch

from course.hidden import item
from course.hidden.tools import grads, normal, randn, size

THETA = 10000.0


def attention(f, g, heads, groups):
    """An Attention of random weights, an input (B,T,D), and a rope that turns nothing."""
    d = 2 * size(g, 2, 4)
    layer = f.Attention(f.DecoderConfig(11, heads * d, 8, 1, heads, groups, d)).double()
    for _, p in sorted(layer.named_parameters()):
        p.data = randn(g, *p.shape) / p.shape[1] ** 0.5
    x = 2 * normal(g, 2, size(g, 5, 7), heads * d)
    return layer, x, lambda n: (torch.ones(n, d).double(), torch.zeros(n, d).double()), d


def angles(g, n, d, first=0):
    """cos and sin (n,d), both halves alike."""
    a = torch.rand(n, d // 2, generator=g, dtype=torch.float64).repeat(1, 2) * 6 + first
    return a.cos(), a.sin()


def example(g):
    """text (B,T,D), image (B,N,D), mask (B,T): N scattered positions a row, none in the last."""
    B, N, D = size(g, 3, 4), size(g, 3, 5), size(g, 3, 6)
    mask = torch.stack([torch.randperm(2 * N, generator=g) < N for _ in range(B)])
    mask[-1] = False
    return normal(g, B, 2 * N, D), normal(g, B, N, D), mask


@item(15)
def projector(f, g):
    """Two linear maps with GELU between them, the exact one and not its tanh approximation."""
    p = f.Projector(size(g, 3, 5), size(g, 6, 8)).double()
    for _, w in sorted(p.named_parameters()):
        w.data = randn(g, *w.shape)
    return p(normal(g, 2, 3, p.linear_1.in_features))


@item(15, tolerance=1e-5)
def rotation_angles(f, g):
    """Position p turns pair i by p / theta^(2i/d); both halves of cos and sin are alike."""
    d = 2 * size(g, 2, 5)
    positions = torch.randint(0, 40, (size(g, 3, 6),), generator=g)
    return f.rotary(positions, d, THETA, torch.float64), f.rotary(positions, d, 50.0, torch.float64)


@item(5, tolerance=1e-3, view=lambda r: [r[0] / r[2].abs().max(), r[1] / r[2].abs().max(), r[3]])
def rotation_precision(f, g):
    """Angles are float32, rounded last: bfloat16 cannot tell position 1001 from 1002."""
    positions = 1000 + torch.randint(0, 900, (5,), generator=g)
    cos, sin = f.rotary(positions, 4, THETA, torch.bfloat16)
    return cos, sin, f.rotary(positions, 4, THETA, torch.float32)[0], cos.element_size()


@item(15)
def rotation(f, g):
    """The pair (a, b) = (i, i + d/2), not neighbours, becomes (a cos − b sin, b cos + a sin)."""
    d = 2 * size(g, 2, 5)
    return f.rotate(normal(g, 2, 3, 4, d), *angles(g, 4, d))


@item(5, view=lambda r: [r[0] - r[1], r[2] - r[3], *r[4:]])
def partial_rotation(f, g):
    """Where cos is narrower than the head, the rest of the head passes as it is (Phi-2)."""
    d = 2 * size(g, 2, 4)
    x, turn = normal(g, 1, 2, 3, d + 4), angles(g, 3, d)
    out = f.rotate(x, *turn)
    return out[..., d:], x[..., d:], out[..., :d], f.rotate(x[..., :d], *turn), out.shape


@item(15, view=lambda r: [r[0][r[1] > 0]])
def merge(f, g):
    """The j-th True of a row of image_mask takes that row's j-th image token, wherever it is."""
    text, image, mask = example(g)
    return f.Llava.merge(None, text, image, mask), mask


@item(5, view=lambda r: [(r[0] - r[1])[r[2] == 0], r[3], r[4][:, 0, 0]])
def rows_of_text(f, g):
    """Text and its gradient stay; a row without an image keeps its image in the graph."""
    text, image, mask = example(g)
    out = f.Llava.merge(None, text, image, mask)
    alone = f.Llava.merge(None, text[-1:], image[-1:], mask[-1:])
    return out, text, mask, grads(alone.sum(), image)[0], grads(out.sum(), text)[0].sum((1, 2), keepdim=True)


@item(15)
def causal_attention(f, g):
    """softmax(q kᵀ / √d) v over a position and those before it, heads side by side, then o_proj."""
    layer, x, still, _ = attention(f, g, 3, 3)
    return layer(x, still(x.shape[1]))[0]


@item(5, view=lambda r: [r[0] - r[1], *r[2:]])
def grouped_heads(f, g):
    """K key heads for H query heads: heads 0..H/K−1 share key head 0, and so on."""
    layer, x, still, d = attention(f, g, 4, 2)
    wide = f.Attention(f.DecoderConfig(11, 4 * d, 8, 1, 4, 4, d)).double()
    state = layer.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].view(2, d, -1).repeat_interleave(2, 0).flatten(0, 1)
    wide.load_state_dict(state)
    y, _, k = layer(x, still(x.shape[1]))
    return y, wide(x, still(x.shape[1]))[0], k.shape


@item(5, view=lambda r: [r[0] - r[1], r[2] - r[3], r[4] - r[5], (r[0] - r[6]).abs().max() > 1e-3])
def rotated(f, g):
    """Queries and keys are rotated, and returned so; values are not."""
    layer, x, still, d = attention(f, g, 2, 2)
    T = x.shape[1]
    turn = angles(g, T, d)
    _, q, k = layer(x, turn)
    _, q0, k0 = layer(x, still(T))
    one = [layer(x[:, :1], rope)[0] for rope in (angles(g, 1, d, 2), still(1))]
    return q, f.rotate(q0, *turn), k, f.rotate(k0, *turn), one, q0
