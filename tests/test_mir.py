"""mir.py against closed forms and the definition."""
import math

import pytest
import torch
from adapters import frechet_distance, modality_integration_rate

from mir import replace_outliers


def tokens(n, d, seed, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64) * scale + shift


def definition(x, y):
    """Eq. (3) with the matrix square root from the eigenvalues of the product."""
    covariances = [torch.cov(t.T) for t in (x, y)]
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).pow(2).sum() + covariances[0].trace() + covariances[1].trace() - 2 * root).item()


@pytest.mark.parametrize("n, m", [(200, 150), (5, 150), (6, 4), (2, 2)])
def test_it_is_the_definition_also_with_fewer_tokens_than_dimensions(n, m):
    x, y = tokens(n, 12, 0), tokens(m, 12, 1, 2.0, 0.5)
    assert frechet_distance(x, y) == pytest.approx(definition(x, y), rel=1e-6)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-12)


def test_a_set_and_itself_are_at_distance_zero():
    x = tokens(100, 12, 0)
    assert frechet_distance(x, x.clone()) < 1e-10


def test_a_shift_costs_its_square_and_nothing_else():
    x = tokens(100, 12, 0)
    assert frechet_distance(x, x + 3.0) == pytest.approx(12 * 9, rel=1e-9)


def test_scaling_costs_the_squared_difference_of_standard_deviations():
    x = tokens(500, 12, 0)
    x = x - x.mean(0)
    s = torch.linspace(0.5, 3, 12, dtype=torch.float64)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T       # covariance 1
    assert frechet_distance(white, white * s) == pytest.approx((1 - s).pow(2).sum().item(), rel=1e-9)


def test_inputs_in_any_precision_are_left_as_they_were():
    for dtype in (torch.float32, torch.bfloat16):
        x, y = tokens(50, 8, 0).to(dtype), tokens(40, 8, 1).to(dtype)
        kept = x.clone(), y.clone()
        assert modality_integration_rate([(x, y)])[1][0] > 0
        assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])


def test_outliers_become_the_median_or_are_dropped():
    x = tokens(100, 8, 0)
    x[7] *= 50
    replaced, dropped = replace_outliers(x, "median"), replace_outliers(x, "drop")
    assert len(dropped) == 99 and torch.equal(dropped, torch.cat([x[:7], x[8:]]))
    assert torch.equal(replaced[7], x.median(0).values) and torch.equal(replaced[8:], x[8:])


def test_outliers_begin_at_three_standard_deviations():
    norms = torch.ones(102, dtype=torch.float64)
    norms[:50] += 0.1
    norms[50:100] -= 0.1
    for far, found in [(0.29, 0), (0.45, 1)]:           # std is about 0.1
        norms[100], norms[101] = 1 + far, 1.0
        assert len(replace_outliers(norms[:, None], "drop")) == 102 - found


def test_the_rate_is_the_logarithm_of_the_sum_over_layers_at_the_scale_of_the_text():
    layers = [(tokens(60, 8, i, 3.0), tokens(70, 8, i + 9, 2.0, 1.0)) for i in range(3)]
    rate, each = modality_integration_rate(layers)
    assert rate == pytest.approx(math.log10(sum(each)))
    for (v, t), distance in zip(layers, each):
        alpha = 1 / t.norm(dim=1).mean()
        wanted = definition(replace_outliers(alpha * v, "median"), replace_outliers(alpha * t, "median"))
        assert distance == pytest.approx(wanted, rel=1e-8)
    assert modality_integration_rate([(5 * v, 5 * t) for v, t in layers])[0] == pytest.approx(rate)
    assert modality_integration_rate([(5 * v, t) for v, t in layers])[0] > rate


@pytest.mark.parametrize("spoil", [lambda v: v[:1], lambda v: v * math.nan, lambda v: v / 0])
def test_too_few_or_broken_tokens_are_refused_by_layer(spoil):
    layers = [(tokens(60, 8, i), tokens(70, 8, i + 9)) for i in range(3)]
    layers[1] = spoil(layers[1][0]), layers[1][1]
    with pytest.raises(ValueError, match="layer 2"):
        modality_integration_rate(layers)
