"""methods/vista.py against the definition."""
import pytest
import torch
from adapters import alignment_loss


def example():
    g = torch.Generator().manual_seed(0)
    x, S = (torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
            for shape in [(4, 6, 5), (4, 5)])
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0],
                         [1, 1, 1, 1, 1, 1]]).bool()
    return x, mask, S


def naive(x, mask, S, weighting="t/m", distance="l2", reduce="mean"):
    """Eq. (9) and (10), one token at a time."""
    total = torch.zeros((), dtype=x.dtype)
    for b in range(len(x)):
        tokens = [x[b, p] for p in range(x.shape[1]) if mask[b, p]]
        m = len(tokens)
        for t, token in enumerate(tokens, 1):
            d = sum((token - S[b]) ** 2) / (len(token) if reduce == "mean" else 1)
            if distance == "cosine":
                d = 1 - token @ S[b] / (token @ token).sqrt() / (S[b] @ S[b]).sqrt()
            total = total + {"t/m": t / m, "t": t, "1": 1}[weighting] * d / m
    return total


@pytest.mark.parametrize("options",
                         [{}, {"weighting": "t"}, {"weighting": "1"}, {"distance": "cosine"},
                                     {"reduce": "sum"}, {"distance": "cosine", "weighting": "t"}])
def test_value_and_gradients_are_those_of_the_definition(options):
    x, mask, S = example()
    total, count = alignment_loss(x, mask, S, **options)
    wanted = naive(x, mask, S, **options)
    assert count == 3, "a sample without text is not counted"
    torch.testing.assert_close(total, wanted, atol=1e-12, rtol=0)
    for got, grad in zip(torch.autograd.grad(total, (x, S)), torch.autograd.grad(wanted, (x, S))):
        torch.testing.assert_close(got, grad, atol=1e-12, rtol=0)


def test_one_token_weighs_one_whatever_the_weighting():
    x, mask, S = example()
    totals = [alignment_loss(x[1:2], mask[1:2], S[1:2], weighting=w)[0] for w in ("t/m", "t", "1")]
    assert totals[0] == totals[1] == totals[2] > 0, "f(1) = 1 when m = 1"


def test_later_tokens_weigh_more():
    x, S = torch.zeros(1, 4, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    costs = []
    for t in range(4):
        moved = x.clone()
        moved[0, t] = 1
        costs.append(alignment_loss(moved, torch.ones(1, 4).bool(), S)[0].item())
    assert costs == pytest.approx([t / 16 for t in (1, 2, 3, 4)]), "f(t)/m = t/m² for t = 1..4"


def test_where_text_stands_in_the_sequence_does_not_matter_only_its_order():
    x, mask, S = example()
    packed = torch.zeros_like(x)
    packed[0, :4] = x[0, mask[0]]
    first = torch.arange(6) < 4
    assert alignment_loss(x[:1], mask[:1], S[:1])[0] == alignment_loss(packed[:1], first[None], S[:1])[0]


def test_text_that_is_what_was_seen_costs_nothing():
    x, mask, S = example()
    same = S[:, None].expand_as(x)
    assert alignment_loss(same, mask, S)[0] == 0
    assert alignment_loss(same, mask, 2 * S, distance="cosine")[0].abs() < 1e-12, "cosine sees directions alone"


def test_masked_positions_get_no_gradient_and_an_empty_batch_stays_in_the_graph():
    x, mask, S = example()
    (gradient,) = torch.autograd.grad(alignment_loss(x, mask, S)[0], x)
    assert (gradient[~mask] == 0).all() and (gradient[mask].abs().sum(-1) > 0).all()
    total, count = alignment_loss(x, torch.zeros_like(mask), S)
    total.backward()
    assert total == 0 and count == 0 and (S.grad == 0).all()


def test_the_literal_sum_is_the_mean_times_the_width():
    x, mask, S = example()
    mean, literal = (alignment_loss(x, mask, S, reduce=r)[0] for r in ("mean", "sum"))
    torch.testing.assert_close(literal, 5 * mean)
