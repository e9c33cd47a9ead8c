"""Next-token cross-entropy, eq. (1) and (2) of the handout."""
import torch
import torch._dynamo  # noqa: F401  for torch.utils.checkpoint: a locked process loads nothing

from course.hidden import item, tools
from course.hidden.tools import detached, grads, normal, size


def example(g, ignored=0.4, low=2, dtype=torch.float64):
    """h (B,T,D), labels (B,T), weight (V,D), bias (V,)."""
    B, T, D, V = size(g, low, 4), size(g, 6, 9), size(g, 4, 8), size(g, 11, 17)
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[:, 1:][torch.rand(B, T - 1, generator=g) < ignored] = -100
    labels[0, 1], labels[:, 3] = 5, 7
    return normal(g, B, T, D, dtype=dtype), labels, normal(g, V, D, dtype=dtype), normal(g, V, dtype=dtype)


def one_word(f, g, scale=1.0):
    """One target, the same hidden state at both positions."""
    h, labels, weight, b = example(g)
    same, five = scale * h[:1, :1].expand(1, 2, -1), torch.full_like(labels[:1, :2], 5)
    return f.next_token_loss(same, five, weight, b)


@item(10)
def one_token(f, g):
    """The loss of a token is log Σ exp(W h + b) minus the logit of the label, in nats."""
    return one_word(f, g)[0]


@item(5, view=tools.ratio)
def without_a_bias(f, g):
    """head_bias=None is a head without a bias, which is one whose bias is 0."""
    *args, b = example(g)
    return f.next_token_loss(*args)[0], f.next_token_loss(*args, 0 * b)[0]


@item(5, view=tools.ratio)
def large_logits(f, g):
    """Logits of some hundred must not overflow: subtract the largest, or use logsumexp."""
    state = g.get_state()
    large = one_word(f, g, scale=2000.0)[0]
    return large, one_word(f, g.set_state(state), scale=4000.0)[0]


@item(15, view=lambda r: [r[0].abs().sum(-1) > 0])
def shift(f, g):
    """Position t − 1 predicts label t: the last position and the first label are left out."""
    h, *args = example(g)
    return grads(f.next_token_loss(h, *args)[0], h)


@item(10, view=lambda r: [r[0] - r[1], r[2], r[3]])
def ignored_labels(f, g):
    """Labels of -100 are in neither total nor count, whatever hidden states predict them."""
    h, labels, *head = detached(*example(g))
    other, none = h.clone(), torch.full_like(labels, -100)
    other[:, :-1][labels[:, 1:] == -100] += 3
    total, count = f.next_token_loss(h, labels, *head)
    return total, f.next_token_loss(other, labels, *head)[0], count, f.next_token_loss(h, none, *head)[1]


@item(10, view=tools.share)
def sums(f, g):
    """The total is the sum over the supervised tokens of all samples; training divides by count."""
    h, labels, *head = example(g)
    return f.next_token_loss(h, labels, *head)[0], [
        f.next_token_loss(h[[i]], labels[[i]], *head)[0] for i in range(len(h))]


@item(15, view=lambda r: [*(x / r[0].norm() for x in r[:3]), r[0].norm() / r[3].norm()])
def gradients(f, g):
    """The gradients come from (softmax − one-hot), times what arrives in backward."""
    h, labels, weight, b = example(g)
    total = f.next_token_loss(h, labels, weight, b)[0]
    return grads(total, h, weight, b), grads(f.next_token_loss(h, labels, weight, b)[0] / 3, h)


@item(5, view=tools.equal_all)
def chunks(f, g):
    """The size of a chunk changes nothing, also where it does not divide the number of tokens."""
    h, *args = example(g)
    return tools.with_chunks(lambda c: f.next_token_loss(h, *args, chunk=c), h)


@item(10, tolerance=1e-3, memory=140, view=tools.whole)
def memory(f, g):
    """Compute value and gradient by chunks: the (B,T,V) logits must never exist."""
    h, V = torch.randn(8, 51, 8, generator=g, requires_grad=True), 60000
    weight, labels = torch.randn(V, 8, generator=g), torch.randint(0, V, (8, 51), generator=g)
    return tools.in_parts(lambda rows: f.next_token_loss(h[rows], labels[rows], weight, chunk=8), h)


@item(5, view=lambda r: r[:5])
def nothing_to_predict(f, g):
    """Without a supervised token total and count are 0, not NaN; the total stays in the graph."""
    h, labels, weight, b = example(g)
    total, count = f.next_token_loss(h, torch.full_like(labels, -100), weight, b)
    return total, count, grads(total, h, weight, b), f.next_token_loss(h, labels, weight, b)[0]


@item(5, tolerance=2e-5, view=lambda r: [r[0] / r[1] / r[2]])
def half_precision(f, g):
    """Sum bfloat16 losses in float32: a bfloat16 sum stops growing after 256 equal terms."""
    T, V = size(g, 3001, 4000), size(g, 8, 16)
    h, weight = torch.zeros(1, T, 4).bfloat16(), torch.zeros(V, 4).bfloat16()
    labels = torch.zeros(1, T, dtype=torch.int64)
    total = f.next_token_loss(h, labels, weight)[0]
    return total, T - 1, f.next_token_loss(h[:, :2], labels[:, :2], weight)[0], V


@item(5, view=tools.untouched)
def inputs_unchanged(f, g):
    """Inputs stay as they are: the labels too."""
    return tools.twice(f.next_token_loss, detached(*example(g)))
