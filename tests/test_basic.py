"""methods/basic.py against the definition."""
import pytest
import torch
from adapters import direction_loss, layer_weights, semantic_loss, supervision_degree

B, N, D, V = 3, 4, 6, 15


def example():
    """v, v_hat, degree (the last sample: none, it has no image), embedding."""
    g = torch.Generator().manual_seed(0)
    v, v_hat = (torch.randn(B, N, D, generator=g, dtype=torch.float64, requires_grad=True)
                for _ in range(2))
    degree = torch.rand(B, N, generator=g, dtype=torch.float64)
    degree[0, 2] = 0
    degree[2] = 0
    degree = degree / degree.sum(1, keepdim=True).clamp(min=1e-30)
    return v, v_hat, degree, torch.randn(V, D, generator=g, dtype=torch.float64, requires_grad=True)


def naive_direction(v, v_hat, a):
    """Eq. (6), one patch at a time."""
    total = torch.zeros((), dtype=v.dtype)
    for b in range(B):
        for i in range(N):
            u, w = v[b, i] / (v[b, i] @ v[b, i]).sqrt(), v_hat[b, i] / (v_hat[b, i] @ v_hat[b, i]).sqrt()
            total = total + a[b, i] * sum((u - w) ** 2)
    return total


def naive_semantic(v, v_hat, a, E):
    """Eq. (7), one word at a time."""
    total = torch.zeros((), dtype=v.dtype)
    for b in range(B):
        for i in range(N):
            p, q = ([torch.exp(e @ x[b, i]) for e in E] for x in (v_hat, v))
            p, q = ([x / sum(z) for x in z] for z in (p, q))
            total = total + a[b, i] * sum(pj * torch.log(pj / qj) for pj, qj in zip(p, q))
    return total


@pytest.mark.parametrize("scheme, wanted",
                         [("increasing", [1, 4, 9, 16]), ("constant", [1, 1, 1, 1]),
                                            ("decreasing", [16, 9, 4, 1])])
def test_layers_weigh_as_the_square_of_their_depth(scheme, wanted):
    w = layer_weights(4, scheme)
    assert w.tolist() == pytest.approx([x / sum(wanted) for x in wanted]) and w.sum() == pytest.approx(1)
    assert layer_weights(1, scheme).tolist() == [1.0]


def test_the_degree_is_the_share_of_text_attention_that_a_patch_gets():
    g = torch.Generator().manual_seed(0)
    attention, rows = torch.rand(2, 5, N, generator=g), torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    degree = supervision_degree(attention, rows)
    for i in range(N):
        seen = [attention[0, r, i] for r in (0, 2, 3)]
        of_all = sum(attention[0, r, j] for r in (0, 2, 3) for j in range(N))
        assert degree[0, i] == pytest.approx((sum(seen) / of_all).item())
    assert degree[0].sum() == pytest.approx(1) and (degree[1] == 0).all(), "no text: no degree, and no NaN"
    # a sum over layers or their mean
    torch.testing.assert_close(supervision_degree(7 * attention, rows), degree)


def test_both_losses_and_their_gradients_are_those_of_the_definition():
    v, v_hat, a, E = example()
    for (total, count), wanted in [(direction_loss(v, v_hat, a),
                                    naive_direction(v, v_hat.detach(), a)),
                                   (semantic_loss(v, v_hat, a, E),
                                    naive_semantic(v, v_hat.detach(), a, E.detach()))]:
        assert count == 2
        torch.testing.assert_close(total, wanted, atol=1e-12, rtol=0)
        (got,), (grad,) = torch.autograd.grad(3 * total, [v]), torch.autograd.grad(3 * wanted, [v])
        torch.testing.assert_close(got, grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_chunks_change_nothing(chunk):
    v, v_hat, a, E = example()
    whole, part = semantic_loss(v, v_hat, a, E)[0], semantic_loss(v, v_hat, a, E, chunk=chunk)[0]
    torch.testing.assert_close(part, whole, atol=1e-10, rtol=0)
    (got,), (grad,) = torch.autograd.grad(part, [v]), torch.autograd.grad(whole, [v])
    torch.testing.assert_close(got, grad, atol=1e-10, rtol=0)


def test_gradients_reach_the_projectors_output_alone():
    v, v_hat, a, E = example()
    a.requires_grad_()
    (direction_loss(v, v_hat, a)[0] + semantic_loss(v, v_hat, a, E)[0]).backward()
    assert v.grad is not None and v_hat.grad is None and a.grad is None and E.grad is None


def test_a_patch_that_nobody_looks_at_adds_nothing():
    v, v_hat, a, E = example()
    for loss in (lambda v: direction_loss(v, v_hat, a)[0],
                 lambda v: semantic_loss(v, v_hat, a, E)[0]):
        changed = v.detach().clone()
        changed[0, 2] += 5
        changed[2] -= 5
        assert loss(changed) == loss(v)
        (gradient,) = torch.autograd.grad(loss(v), v)
        assert (gradient[0, 2] == 0).all() and (gradient[2] == 0).all() and (gradient[0, 1] != 0).any()


def test_the_divergence_is_zero_at_equality_and_positive_elsewhere():
    v, v_hat, a, E = example()
    assert semantic_loss(v, v, a, E)[0] == 0 and direction_loss(v, v, a)[0] == 0
    for s in range(20):
        torch.manual_seed(s)
        assert semantic_loss(torch.randn_like(v), v_hat, a, E)[0] > 0


@pytest.mark.parametrize("std", [0.02, 0.06, 0.1])
def test_near_the_target_autocast_costs_no_accuracy(std):
    """v 2 % away from v̂, word embeddings of this std: rounded logits of the two would hardly differ."""
    g = torch.Generator().manual_seed(0)
    v_hat = torch.randn(2, 32, 256, generator=g)
    v = (v_hat + 0.02 * torch.randn(v_hat.shape, generator=g)).requires_grad_()
    E = (std * torch.randn(2000, 256, generator=g)).bfloat16()
    degree = torch.full((2, 32), 1 / 32)
    exact, _ = semantic_loss(v.double(), v_hat.double(), degree.double(), E.double())
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = semantic_loss(v, v_hat, degree, E)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(exact.item(), rel=3e-4)
    (got,), (wanted,) = torch.autograd.grad(low, v), torch.autograd.grad(exact, v)
    cosine = torch.nn.functional.cosine_similarity(got.double().flatten(),
                                                   wanted.double().flatten(), dim=0)
    assert cosine >= 0.9998, cosine


def test_it_is_the_targets_divergence_from_ours_and_not_the_other_way_round():
    v, v_hat, a, E = example()
    forward, backward = semantic_loss(v, v_hat, a, E)[0], semantic_loss(v_hat, v, a, E)[0]
    assert (forward - backward).abs() > 1e-3


def test_direction_ignores_length_and_is_bounded():
    v, v_hat, a, _ = example()
    torch.testing.assert_close(direction_loss(100 * v, v_hat, a)[0],
                               direction_loss(v, 0.1 * v_hat, a)[0])
    opposite = direction_loss(v, -3 * v, a)[0].item()
    assert opposite == pytest.approx(2 * 2 ** 2), "2 samples, each at distance 2"


def test_logits_too_large_for_exp_are_no_trouble():
    v, v_hat, a, E = example()
    total, _ = semantic_loss(1e4 * v, 1e4 * v_hat, a, E)
    (gradient,) = torch.autograd.grad(total, v)
    assert total.isfinite() and gradient.isfinite().all() and total > 0


def test_a_batch_without_images_is_a_loss_of_zero_in_the_graph():
    v, v_hat, a, E = example()
    total = direction_loss(v, v_hat, 0 * a)[0] + semantic_loss(v, v_hat, 0 * a, E)[0]
    total.backward()
    assert total == 0 and (v.grad == 0).all()


def test_bfloat16_is_summed_in_float32():
    v, v_hat, a, E = (t.detach() for t in example())
    exact = [direction_loss(v, v_hat, a)[0], semantic_loss(v, v_hat, a, E)[0]]
    v, v_hat, E = (t.bfloat16() for t in (v, v_hat, E))
    for low, wanted in zip([direction_loss(v, v_hat, a.float())[0], semantic_loss(v, v_hat, a.float(), E)[0]], exact):
        assert low.dtype == torch.float32 and abs(low - wanted) < 0.05 * wanted
