"""VISTA, eq. (9) and (10)."""
import torch

from course.hidden import item, tools
from course.hidden.tools import detached, grads, normal, randn, size


def example(g, B=4, ragged=True):
    """x (B,T,D), mask (B,T), S (B,D). Ragged: gaps, one token in sample 1, none in sample 2."""
    T, D = size(g, 6, 9), size(g, 4, 7)
    mask = torch.rand(B, T, generator=g) < 0.6
    mask[:, 1], mask[:, 3], mask[0, 2] = True, True, False
    if ragged:
        mask[1], mask[2] = torch.arange(T) == T - 1, False
    return normal(g, B, T, D), mask, normal(g, B, D)


def costs(f, g, *weightings):
    """What each of m tokens at one distance from S adds, with gaps between: (weightings,m)."""
    D, m = size(g, 3, 6), size(g, 3, 5)
    text = torch.arange(2 * m + 1) % 2 == 1
    S, away = randn(g, 2, 1, D)
    found = []
    for weighting in weightings:
        for t in text.nonzero().flatten():
            x = randn(g, 1, 2 * m + 1, D)
            x[0, text] = S
            x[0, t] = S + away
            found.append(f.alignment_loss(x, text[None], S.clone(), weighting=weighting)[0])
    return torch.stack(found).view(len(weightings), m)


@item(15)
def distance(f, g):
    """‖x − S‖² is the mean over the width of the squared differences."""
    D, text = size(g, 4, 7), torch.ones(1, 1).bool()
    return f.alignment_loss(normal(g, 1, 1, D), text, normal(g, 1, D), weighting="1")[0]


@item(20, view=lambda r: [r[0][0] / r[0][1]])
def weights(f, g):
    """f(t) = t/m: t counts the text tokens alone from 1, so that the last one weighs 1."""
    return costs(f, g, "t/m", "1")


@item(10, view=lambda r: [r[0][1] / r[0][0], r[0][0] / r[0][0].max()])
def weightings(f, g):
    """weighting="t" is f(t) = t, weighting="1" is f(t) = 1, both still divided by m."""
    return costs(f, g, "1", "t")


@item(10, view=tools.ratio)
def average(f, g):
    """The sum over a sample's text tokens is divided by m, their number in that sample."""
    x, _, S = example(g)
    same = (S[:1, None] + x[:1, :1]).expand(-1, x.shape[1], -1)
    every = torch.ones(1, x.shape[1]).bool()
    one = f.alignment_loss(same, torch.arange(x.shape[1])[None] == 0, S[:1], weighting="1")[0]
    return f.alignment_loss(same, every, S[:1], weighting="1")[0], one


@item(10, view=tools.share)
def samples(f, g):
    """The total is the sum over samples: each has its own m, its own t and its own S_n."""
    x, mask, S = example(g, ragged=False)
    rows = [f.alignment_loss(x[[b]], mask[[b]], S[[b]])[0] for b in range(4)]
    return f.alignment_loss(x, mask, S)[0], rows


@item(10, view=lambda r: [*r[:4], r[4] / r[5]])
def nothing_to_align(f, g):
    """A sample without text adds 0 to total and count; a batch of them is 0, in the graph."""
    x, mask, S = example(g)
    some, count = f.alignment_loss(x, mask, S)
    none, zero = f.alignment_loss(x, torch.zeros_like(mask), S)
    rest = [0, 1, 3]
    return count, zero, none, grads(none, S), some, f.alignment_loss(x[rest], mask[rest], S[rest])[0]


@item(10, view=tools.directions)
def gradients(f, g):
    """The gradient reaches x_t and S_n; neither is detached."""
    x, mask, S = example(g)
    return grads(f.alignment_loss(x, mask, S, weighting="1")[0], x, S)


@item(5)
def cosine(f, g):
    """distance="cosine" is 1 − cos(x_t, S_n)."""
    D, text = size(g, 4, 7), torch.ones(1, 1).bool()
    x, S = normal(g, 1, 1, D), normal(g, 1, D)
    return [f.alignment_loss(y, text, S, weighting="1", distance="cosine")[0] for y in (x, -x)]


@item(5, tolerance=2e-4, view=tools.equal_all)
def half_precision(f, g):
    """bfloat16 inputs are compared and summed in float32 or better."""
    x, mask, S = detached(*example(g))
    x, S = 10 * x.bfloat16(), 10 * S.bfloat16()
    exact = f.alignment_loss(x.double(), mask, S.double())[0]
    return exact, f.alignment_loss(x, mask, S)[0]


@item(5, view=tools.untouched)
def inputs_unchanged(f, g):
    """Inputs stay as they are: others read them after you."""
    return tools.twice(f.alignment_loss, detached(*example(g)))
