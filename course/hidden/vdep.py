"""VDEP, eq. (11): L_i."""
from course.hidden import item, tools
from course.hidden.tools import detached, grads, normal, size


def example(g, B=3):
    """h and x (B,N,D)."""
    N, D = size(g, 4, 7), size(g, 4, 8)
    return normal(g, B, N, D), normal(g, B, N, D)


def alike(g, N):
    """h and x (1,N,D) whose tokens are all the same: only the distance of two vectors matters."""
    return [t[:1, :1].expand(1, N, -1) for t in example(g)]


@item(15)
def distance(f, g):
    """d is the mean over the width of the squared differences: no sum, no root, no half."""
    return f.reconstruction_loss(*alike(g, 2))[0]


@item(20, view=lambda r: [r[0].abs().sum(-1) > 0, *(x.abs() > 1e-9 for x in r[1:])])
def next_token(f, g):
    """Position i predicts token i + 1: the last position and the first token are left out."""
    h, x = (t[:1] for t in example(g))
    moved = []
    for i in range(x.shape[1]):
        other = x.detach().clone()
        other[0, i] += 1
        a, b = (grads(f.reconstruction_loss(h, y)[0], h)[0][0].sum(-1) for y in (other, x.detach()))
        moved.append(a - b)
    return grads(f.reconstruction_loss(h, x)[0], h)[0], moved


@item(10, view=lambda r: [r[0].abs().sum(-1) > 0, r[1] / sum(r[2:]) * (len(r) - 2)])
def same_token(f, g):
    """shift=0 compares each position with its own token, N in place of N − 1."""
    h, x = (t[:1] for t in example(g))
    d = f.reconstruction_loss(h, x, shift=0)[0]
    return grads(d, h), d, [f.reconstruction_loss(h[:, [i, i]], x[:, [i, i]])[0]
                            for i in range(h.shape[1])]


@item(10, view=tools.ratio)
def positions(f, g):
    """A sample's L_i is the mean over its predicted positions, N − 1 of them."""
    h, x = alike(g, 2)
    n = size(g, 5, 9)
    many = f.reconstruction_loss(h[:, [0] * n], x[:, [0] * n])[0]
    return many, f.reconstruction_loss(h, x)[0]


@item(10, view=lambda r: [r[0] / sum(r[2:]), r[1]])
def samples(f, g):
    """The total is the sum over samples, and the count their number."""
    h, x = example(g, B=size(g, 3, 5))
    total, count = f.reconstruction_loss(h, x)
    return total, count, [f.reconstruction_loss(h[[b]], x[[b]])[0] for b in range(len(h))]


@item(15, view=lambda r: [r[0] / r[0].norm(), r[1].norm() == 0])
def target(f, g):
    """The target is not trained: image_embeds gets no gradient, the hidden states keep theirs."""
    h, x = example(g)
    return grads(f.reconstruction_loss(h, x)[0], h, x)


@item(5, view=tools.ratio)
def inverse(f, g):
    """distance="inverse" is d / (1 + d) of each position: it grows with d, while 1/d falls."""
    h, x = alike(g, 2)
    d = f.reconstruction_loss(h, x)[0]
    return f.reconstruction_loss(h, x, distance="inverse")[0], d / (1 + d)


@item(5, view=tools.ratio)
def sigmoid(f, g):
    """distance="sigmoid" is 2 σ(d) − 1 of each position: 0 at d = 0."""
    h, x = alike(g, 2)
    d = f.reconstruction_loss(h, x)[0]
    return f.reconstruction_loss(h, x, distance="sigmoid")[0], 2 * d.sigmoid() - 1


@item(5, view=lambda r: [r[0] / r[1], r[2] / r[3]])
def literal_sum(f, g):
    """reduce="sum" is the sum over the width, D times the mean, before it saturates."""
    h, x = (t / 3 for t in alike(g, 2))
    mean, literal = f.reconstruction_loss(h, x)[0], f.reconstruction_loss(h, x, reduce="sum")[0]
    inverse = f.reconstruction_loss(h, x, reduce="sum", distance="inverse")[0]
    return literal, mean, inverse, literal / (1 + literal)


@item(5, tolerance=2e-5, view=tools.equal_all)
def half_precision(f, g):
    """bfloat16 inputs are subtracted, squared and summed in float32 or better."""
    h, x = (t.bfloat16() for t in detached(*example(g)))
    return f.reconstruction_loss(h.double(), x.double())[0], f.reconstruction_loss(h, x)[0]
