"""methods/ce.py against the definition."""
import math

import pytest
import torch
import torch.nn.functional as F
from adapters import next_token_loss


def example(dtype=torch.float64, ignored=0.5):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(3, 9, 8, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(20, 8, generator=g, dtype=dtype, requires_grad=True)
    bias = torch.randn(20, generator=g, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 20, (3, 9), generator=g)
    labels[torch.rand(3, 9, generator=g) < ignored] = -100
    return h, labels, weight, bias


def naive(h, labels, weight, bias):
    """Eq. (1) and (2), one token at a time."""
    total, count = torch.zeros((), dtype=h.dtype), 0
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                logits = weight @ h[b, t - 1] + bias
                total = total - (logits[labels[b, t]] - logits.exp().sum().log())
                count += 1
    return total, count


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_value_and_gradients_are_those_of_the_definition_for_any_chunk(chunk):
    h, labels, weight, bias = example()
    total, count = next_token_loss(h, labels, weight, bias, chunk=chunk)
    wanted, n = naive(h, labels, weight, bias)
    assert count == n and count > 5
    torch.testing.assert_close(total, wanted, atol=1e-11, rtol=0)
    got = torch.autograd.grad(3 * total, (h, weight, bias))
    for a, b in zip(got, torch.autograd.grad(3 * wanted, (h, weight, bias))):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_it_is_the_library_function_in_float32():
    h, labels, weight, _ = example(torch.float32)
    total, count = next_token_loss(h, labels, weight)
    wanted = F.cross_entropy((h @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(total / count, wanted)


def test_the_first_label_has_nothing_to_be_predicted_from():
    h, labels, weight, bias = example()
    labels[:] = -100
    labels[:, 0] = 5
    assert next_token_loss(h, labels, weight, bias)[1] == 0


def test_without_a_target_the_loss_is_zero_and_still_reaches_every_parameter():
    """Else a rank whose micro-batch has no answer would leave the others waiting for its gradient."""
    h, labels, weight, bias = example(ignored=2.0)
    total, count = next_token_loss(h, labels, weight, bias)
    assert total == 0 and count == 0
    for gradient in torch.autograd.grad(total, (h, weight, bias)):
        assert (gradient == 0).all()


def test_unsupervised_positions_get_no_gradient():
    h, labels, weight, bias = example()
    total, _ = next_token_loss(h, labels, weight, bias)
    (gradient,) = torch.autograd.grad(total, h)
    supervised = F.pad(labels[:, 1:] != -100, (0, 1))
    assert (gradient[~supervised] == 0).all() and (gradient[supervised].abs().sum(-1) > 0).all()


def test_a_frozen_head_costs_no_gradient():
    h, labels, weight, _ = example()
    total, _ = next_token_loss(h, labels, weight.detach())
    total.backward()
    assert h.grad is not None and weight.grad is None


def test_bfloat16_is_summed_in_float32():
    h = torch.zeros(1, 5001, 4, dtype=torch.bfloat16)
    total, count = next_token_loss(h, torch.zeros(1, 5001, dtype=torch.int64),
                                   torch.zeros(8, 4, dtype=torch.bfloat16))
    assert total.dtype == torch.float32
    assert abs(total / count - math.log(8)) < 1e-4, "a bfloat16 sum of 5000 terms stops growing long before its end"


def test_under_autocast_the_head_works_in_bfloat16_and_its_gradient_is_float32():
    h, labels, weight, _ = example(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, count = next_token_loss(h, labels, weight)
    total.backward()
    exact, _ = next_token_loss(h.detach(), labels, weight.detach())
    assert total.dtype == torch.float32 and weight.grad.dtype == torch.float32
    assert 0 < abs(total - exact) < 0.02 * exact
