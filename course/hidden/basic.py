"""BASIC, eq. (4) to (7)."""
import torch
import torch._dynamo  # noqa: F401  for torch.utils.checkpoint: a locked process loads nothing

from course.hidden import item, tools
from course.hidden.tools import detached, grads, normal, size


def example(g, B=3):
    """v, v_hat (B,N,D), degree (B,N) with zeros, 0 in the last sample, embedding (V,D)."""
    N, D, V = size(g, 4, 6), size(g, 4, 7), size(g, 11, 17)
    degree = torch.rand(B, N, generator=g, dtype=torch.float64)
    degree[0, 1], degree[-1] = 0, 0
    degree = degree / degree.sum(1, keepdim=True).clamp(min=1e-30)
    return normal(g, B, N, D), normal(g, B, N, D), degree.requires_grad_(), normal(g, V, D)


def one_patch(g):
    v, v_hat, _, E = example(g)
    return v[:1, :1], v_hat[:1, :1], torch.ones(1, 1, dtype=torch.float64), E


def by_patch(loss, g):
    """The count and total of a batch, and its total put together from patches one at a time."""
    v, v_hat, a, E = detached(*example(g))
    total, count = loss(v, v_hat, a, E)
    one = torch.ones(1, 1, dtype=torch.float64)
    parts = [a[b, i] * loss(v[b:b + 1, i:i + 1], v_hat[b:b + 1, i:i + 1], one, E)[0]
             for b in range(len(v)) for i in range(v.shape[1])]
    return count, total, sum(parts)


def direction_of(f):
    return lambda v, v_hat, a, E: f.direction_loss(v, v_hat, a)


@item(10)
def increasing_weights(f, g):
    """w_i = i² / Σ j²: i counts from 1, and the weights sum to 1."""
    return f.layer_weights(size(g, 3, 5)), f.layer_weights(size(g, 6, 9)), f.layer_weights(1)


@item(5, view=lambda r: [r[0] / r[0].sum(), r[1] / r[1].sum() - r[2].flip(0) / r[2].sum()])
def other_weights(f, g):
    """constant: equal weights. decreasing: the increasing ones in reversed order."""
    k = size(g, 4, 9)
    return f.layer_weights(k, "constant"), f.layer_weights(k, "decreasing"), f.layer_weights(k)


@item(10)
def degree(f, g):
    """a_i is the share of the text's attention that image token i gets: Σ_i a_i = 1 per sample."""
    shape = size(g, 2, 4), size(g, 3, 6), size(g, 4, 7)
    attention = torch.rand(shape, generator=g, dtype=torch.float64)
    return f.supervision_degree(attention, torch.ones(attention.shape[:2]).bool())


@item(10, view=lambda r: [r[0] - r[1], r[2]])
def degree_of_text_rows(f, g):
    """Padding rows do not count; a sample without text rows has degree 0 everywhere, not NaN."""
    attention = torch.rand(3, 6, size(g, 4, 7), generator=g, dtype=torch.float64)
    rows = torch.arange(6) < torch.tensor([[6], [4], [0]])
    rows[0, 2] = False
    other = attention.masked_fill(~rows[..., None], 9)
    a = f.supervision_degree(attention.clone(), rows)
    return a[:2], f.supervision_degree(other, rows)[:2], a[2]


@item(10)
def direction(f, g):
    """‖v/|v| − v̂/|v̂|‖² of one patch: unit vectors, the sum over the width, no root."""
    return f.direction_loss(*one_patch(g)[:3])[0]


@item(10, view=lambda r: [r[0], r[1] / r[2]])
def direction_total(f, g):
    """The total is Σ a_i d_i over patches and samples; count: the samples that have a degree."""
    return by_patch(direction_of(f), g)


@item(15)
def divergence(f, g):
    """KL(softmax(v̂ Eᵀ) ‖ softmax(v Eᵀ)) = Σ p log(p / q) in nats, p being of the target v̂."""
    v, v_hat, a, E = one_patch(g)
    return f.semantic_loss(v, v_hat, a, E)[0], f.semantic_loss(v / 3, v_hat, a, E)[0]


@item(5, view=lambda r: [r[0], r[1] / r[2]])
def divergence_total(f, g):
    """The total is Σ a_i KL_i over patches and samples; count: the samples that have a degree."""
    return by_patch(f.semantic_loss, g)


@item(10, view=lambda r: [*tools.directions(r[:2]), r[0].norm() / r[2].norm(),
                          r[1].norm() / r[3].norm()])
def gradients(f, g):
    """The divergence's gradient of v: a (softmax(v Eᵀ) − softmax(v̂ Eᵀ)) E, times what arrives."""
    v, v_hat, a, E = example(g)
    losses = [lambda: f.direction_loss(v, v_hat, a)[0], lambda: f.semantic_loss(v, v_hat, a, E)[0]]
    return [grads(loss(), v)[0] for loss in losses], [grads(loss() / 3, v)[0] for loss in losses]


@item(5, view=lambda r: [x.norm() == 0 for x in r])
def constants(f, g):
    """No gradient reaches v̂, a or E: else the layers would learn to leave their input as it is."""
    v, v_hat, a, E = example(g)
    direction, semantic = f.direction_loss(v, v_hat, a)[0], f.semantic_loss(v, v_hat, a, E)[0]
    return grads(direction, v, v_hat, a), grads(semantic, v, v_hat, a, E), direction, semantic


@item(5, view=tools.equal_all)
def chunks(f, g):
    """The size of a chunk changes nothing, in value and gradient."""
    v, *args = example(g)
    return tools.with_chunks(lambda c: f.semantic_loss(v, *args, chunk=c), v)


@item(5, tolerance=1e-3, memory=220, view=tools.whole)
def memory(f, g):
    """Compute value and gradient by chunks of patches: no (B,N,V) distribution may exist."""
    v, v_hat = (torch.randn(8, 50, 8, generator=g, requires_grad=True) for _ in range(2))
    E, a = torch.randn(50000, 8, generator=g), torch.rand(8, 50, generator=g)
    return tools.in_parts(lambda i: f.semantic_loss(v[i], v_hat[i], a[i], E, chunk=8), v)
