"""mir.py against closed forms, the definition, stored values of scipy and itself with everything kept in memory."""
import json
import math
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapters import frechet_distance, modality_integration_rate
from conftest import ROOT, call, launch, losses_of
from test_errors import refuses

import mir
from common.roots import factor, five_rounds, newton_schulz, root_trace
from common.streams import Median, Stream
from data import Batch
from hub.checkpoint import load_model
from hub.pairs import mix_pairs, pair_batches, read_pairs, sample
from hub.tokenizer import load_tokenizer
from mir import (
    layer_distances,
    measure,
    outlier_bounds,
    replace_outliers,
    visit,
)
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT
from training.folder import Log

STORED = json.loads((ROOT / "tests/fixtures/mir/distances.json").read_text())["cases"]


def tokens(n, d, seed, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64) * scale + shift


def definition(x, y):
    """Eq. (3) with the matrix square root from the eigenvalues of the product."""
    covariances = [torch.cov(t.T) for t in (x, y)]
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).pow(2).sum() + covariances[0].trace()
            + covariances[1].trace() - 2 * root).item()


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


def test_tokens_that_want_a_gradient_are_measured_as_others():
    x, y = tokens(50, 8, 0), tokens(40, 8, 1)
    assert frechet_distance(x.clone().requires_grad_(), y) == frechet_distance(x, y)


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
        wanted = definition(replace_outliers(alpha * v, "median"),
                            replace_outliers(alpha * t, "median"))
        assert distance == pytest.approx(wanted, rel=1e-8)
    assert modality_integration_rate([(5 * v, 5 * t) for v, t in layers])[0] == pytest.approx(rate)
    assert modality_integration_rate([(5 * v, t) for v, t in layers])[0] > rate


@pytest.mark.parametrize("spoil", [lambda v: v[:1], lambda v: v * math.nan, lambda v: v / 0])
def test_too_few_or_broken_tokens_are_refused_by_layer(spoil):
    layers = [(tokens(60, 8, i), tokens(70, 8, i + 9)) for i in range(3)]
    layers[1] = spoil(layers[1][0]), layers[1][1]
    with pytest.raises(ValueError, match="layer 2"):
        modality_integration_rate(layers)


# ---------------------------------------------------------------------------- against stored values
def recipe(seed, n, d, rank=None, decay=0, massive=1, dtype="float64"):
    """The tokens of make_mir_fixtures.py, in their dtype."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) if rank is None else rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d))
    x = x * np.logspace(0, -decay, d) * np.where(np.arange(d) == 0, massive, 1) * (1 + seed % 2) + 0.3 * (seed % 2)
    if dtype != "float64":
        bits = x.astype(np.float32).view(np.uint32)
        x = (bits & (0xffff0000 if dtype == "bfloat16" else 0xffffffff)).astype(np.uint32).view(np.float32)
    return torch.from_numpy(x).to(getattr(torch, dtype))


@pytest.mark.parametrize("case", STORED, ids=[c["name"] for c in STORED])
def test_it_is_what_scipy_and_60_digits_give_whatever_the_rank_and_precision(case):
    case = dict(case)
    name, (a, b), n, m = (case.pop(k) for k in ("name", "seeds", "n", "m"))
    value, sqrtm = case.pop("value"), case.pop("sqrtm")
    x, y = recipe(a, n, **case), recipe(b, m, **case)
    assert frechet_distance(x, y) == pytest.approx(sqrtm, rel=1e-6)
    # there the rounding of the input has a spread too
    tolerance = 1e-7 if name == "float32, rank 3" else 1e-11
    assert frechet_distance(x, y) == pytest.approx(value, rel=tolerance), "where Σ is singular sqrtm is off by 1e-8"
    assert frechet_distance(y, x) == pytest.approx(value, rel=tolerance)


def test_directions_that_hold_only_rounding_add_nothing():
    """40 tokens in 300 dimensions: the eigenvalues that are
    rounding, 1e-16 each, would count with their root, 1e-8."""
    x, y = tokens(40, 300, 0), tokens(40, 300, 1)
    a, b = ((t - t.mean(0)) / 39 ** 0.5 for t in (x, y))
    root = torch.linalg.svdvals(torch.linalg.qr(a).R @ torch.linalg.qr(b).R.T).sum()
    wanted = (x.mean(0) - y.mean(0)).pow(2).sum() + a.pow(2).sum() + b.pow(2).sum() - 2 * root
    assert frechet_distance(x, y) == pytest.approx(wanted.item(), rel=1e-11)


def test_small_directions_count_beside_a_massive_one():
    """As in language models, whose hidden states are thousands of times larger in a few dimensions."""
    scale = torch.ones(20, dtype=torch.float64)
    scale[0] = 1e5
    x = tokens(200, 20, 0)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T * scale       # covariance diagonal
    other = torch.full((20,), 3.0, dtype=torch.float64)
    other[0] = 1.0
    turn = torch.linalg.qr(tokens(20, 20, 1)).Q                     # not along the axes: harder
    assert frechet_distance(x @ turn, x * other @ turn) == pytest.approx(19 * 2 ** 2, rel=1e-4), "19 of 1 against 3"


def test_tokens_that_are_all_the_same_have_no_spread():
    x = tokens(50, 8, 0)
    same = torch.ones(9, 8)
    assert frechet_distance(same, x) == pytest.approx((1 - x.mean(0)).pow(2).sum()
                                                      + torch.cov(x.T).trace())
    assert frechet_distance(same, same) == 0


# ---------------------------------------------------------------------------- whatever the spectrum
def turned(n, d, seed, scales):
    """(n,d) float64: independent dimensions of these scales, rotated."""
    turn = torch.linalg.qr(tokens(d, d, seed + 100)).Q
    return tokens(n, d, seed) * scales @ turn


SPECTRA = {"mild": torch.arange(1, 201).double() ** -0.5,
           "1e-2": torch.logspace(0, -2, 200, dtype=torch.float64),
           "1e-5": torch.logspace(0, -5, 200, dtype=torch.float64),
           "half": (torch.arange(200) < 100).double(),
           "massive": torch.where(torch.arange(200) == 7, 1e3, 1.0).double()}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("aligned", [False, True])
def test_no_spectrum_needs_the_slow_route_nor_loses_digits(name, aligned, monkeypatch):
    x = turned(800, 200, 0, SPECTRA[name])
    y = 1.5 * turned(600, 200, 1, SPECTRA[name]) if not aligned else 1.5 * x[:600] + 0.1
    wanted = by_factors_of_tokens(x, y)

    def slow(*_):
        raise AssertionError("the singular values were computed as such")
    monkeypatch.setattr(torch.linalg, "svdvals", slow)
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name, doubled",
                         [("mild", False), ("1e-2", False), ("1e-5", True), ("half", True),
                                           ("massive", True), ("alike", True)])
def test_products_are_in_float32_only_where_that_costs_no_digit_of_the_seventh(name, doubled, monkeypatch):
    """massive and alike: the distance is a small difference of large traces."""
    scales = SPECTRA.get(name, SPECTRA["mild"])
    scales = torch.cat([scales, scales[-1:].expand(56)])
    x, y = (turned(1100, 256, s, scales) for s in (0, 1))
    if name == "alike":
        y = x + 1e-3 * y
    elif name == "massive":
        y = turned(1100, 256, 1, scales.where(scales > 1, 0.5 * scales))
    x, y = x.float(), y.float()
    used = []
    gram = mir.gram
    monkeypatch.setattr(mir, "gram", lambda x, *rest: used.append((len(x), *rest[1:]))
                        or gram(x, *rest))
    assert frechet_distance(x, y) == pytest.approx(by_factors_of_tokens(x.double(), y.double()),
                                                   rel=1e-7)
    assert ((1100, torch.float64) in used) == doubled, used


def by_factors_of_tokens(x, y):
    """The distance from the R of the tokens' QR factors: no covariance is formed."""
    a, b = ((t - t.mean(0)) / (len(t) - 1) ** 0.5 for t in (x, y))
    root = torch.linalg.svdvals(torch.linalg.qr(a).R @ torch.linalg.qr(b).R.T).sum()
    return ((x.mean(0) - y.mean(0)).pow(2).sum() + a.pow(2).sum()
            + b.pow(2).sum() - 2 * root).item()


def test_where_squaring_would_lose_digits_singular_values_are_computed_as_such():
    """Two subspaces at angles whose cosines span 1 to 1e-9: a spectrum that pivoting does not order."""
    turn, (left, right) = torch.linalg.qr(tokens(80, 80, 0)).Q, (torch.linalg.qr(tokens(40, 40, s)).Q for s in (1, 2))
    cosine = torch.logspace(0, -9, 40, dtype=torch.float64)
    zeros = torch.zeros(40, 40, dtype=torch.float64)
    # (40,80), orthonormal rows
    first = torch.cat([left, zeros], dim=1) @ turn
    second = torch.cat([right * cosine, right * (1 - cosine ** 2).sqrt()], dim=1) @ turn
    assert root_trace(first.T @ first, second.T @ second).item() == pytest.approx(cosine.sum().item(), rel=1e-12)


def test_the_factor_has_a_column_for_every_direction_with_variance():
    x = turned(500, 60, 0, torch.logspace(0, -4, 60, dtype=torch.float64))
    x[:, 7] = x[:, 3]                                                           # a dimension twice
    # and one that is constant
    x[:, 9] = 4.0
    covariance = torch.cov(x.T)
    L = factor(covariance, panel=16)
    assert L.shape == (60, 58)
    assert torch.allclose(L @ L.T, covariance, rtol=0,
                          atol=1e-14 * covariance.diagonal().max().item())
    assert factor(torch.zeros(5, 5, dtype=torch.float64)).shape == (5, 0)


# ---------------------------------------------------------------------------------- the other modes
def published(vision, text):
    """The distance of one layer as the released script computes it, written from its description:
    everything in float32; the text's scale; outliers replaced; covariances; five rounds of two
    inversions for the root."""
    vision, text = vision.float(), text.float()
    scale = 1 / torch.stack([row.norm() for row in text]).mean()
    means, covariances = [], []
    for tokens in (scale * vision, scale * text):
        norms = torch.stack([row.norm() for row in tokens])
        far = [i for i in range(len(tokens)) if abs(norms[i] - norms.median()) > 3 * norms.std()]
        tokens[far] = tokens.median(dim=0).values
        means.append(tokens.sum(dim=0) / len(tokens))
        rest = tokens - means[-1]
        covariances.append(rest.T.mm(rest) / (len(tokens) - 1))
    product = covariances[0].mm(covariances[1])
    first, second = product, torch.eye(len(product))
    for _ in range(5):
        first = (first + torch.inverse(second).mm(product)) * 0.5
        second = (second + torch.inverse(first).mm(product)) * 0.5
    traces = [m.diagonal().sum() for m in (*covariances, first)]
    return ((means[0] - means[1]).square().sum() + traces[0] + traces[1] - 2 * traces[2]).item()


def test_released_is_the_published_arithmetic_which_is_no_distance():
    layers = [(tokens(60, 8, i, 3.0), tokens(70, 8, i + 9, 2.0, 1.0)) for i in range(3)]
    each = [published(v, t) for v, t in layers]
    rate, distances = modality_integration_rate(layers, "released")
    assert distances == pytest.approx(each, rel=1e-4) and rate == pytest.approx(math.log(sum(each), 10), rel=1e-5)
    x = tokens(200, 12, 0)
    assert abs(frechet_distance(x, x.clone(), "released")) > 0.1, "the published arithmetic takes no root"
    with pytest.raises(ValueError, match="no logarithm"):
        modality_integration_rate([(9 * x, 9 * x)], "released", normalise=False)


def test_released_is_literal_also_where_it_drifts_from_its_fixed_point():
    """A covariance of condition 1e3 and thus A of 1e6:
    without rounding the rounds would end at Tr Σ_v Σ_t."""
    scales = torch.logspace(0, -1.5, 40, dtype=torch.float64)
    turn = torch.linalg.qr(tokens(40, 40, 0)).Q
    covariance = turn * scales ** 2 @ turn.T
    product = covariance @ covariance
    assert five_rounds(product).trace().item() == pytest.approx(product.trace().item(), rel=1e-2)
    assert five_rounds(product.float()).trace() < 0.9 * product.trace(), "the drift of float32"
    x = turned(400, 40, 0, scales)
    covariance = torch.cov(x.T)
    fixed = 2 * covariance.trace() - 2 * (covariance @ covariance).trace()
    assert frechet_distance(x, x.clone(), "released") > fixed + 0.1 * (covariance @ covariance).trace()
    with pytest.raises(ValueError, match="singular: use mode exact"):
        frechet_distance(torch.ones(9, 4), torch.ones(9, 4), "released")


def test_newton_schulz_converges_to_the_root_and_reports_what_is_left():
    x, y = tokens(200, 12, 0), tokens(150, 12, 1, 2.0, 0.5)
    assert frechet_distance(x, y, "newton-schulz") == pytest.approx(frechet_distance(x, y), rel=1e-9)
    a = torch.cov(x.T) @ torch.cov(y.T)
    root, residual = newton_schulz(a)
    assert residual < 1e-13 and torch.allclose(root @ root, a, rtol=1e-10)
    early, left = newton_schulz(a, steps=4)
    assert left == pytest.approx(((early @ early - a).norm() / a.norm()).item(), rel=1e-9) and left > 1e-3
    # A is singular: its inverse root does not exist
    few = tokens(6, 12, 2), tokens(7, 12, 3)
    assert frechet_distance(*few, "newton-schulz") == pytest.approx(frechet_distance(*few), rel=1e-6)


def test_modes_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="'fast' is not known"):
        frechet_distance(tokens(9, 4, 0), tokens(9, 4, 1), "fast")


def test_without_normalisation_a_layer_weighs_as_much_as_its_scale_squared():
    layers = [(tokens(60, 8, 0, 3.0), tokens(70, 8, 1)), (tokens(60, 8, 2, 3.0), tokens(70, 8, 3))]
    plain = modality_integration_rate(layers, normalise=False)[1]
    grown = modality_integration_rate([layers[0], tuple(10 * t for t in layers[1])], normalise=False)[1]
    assert grown == pytest.approx([plain[0], 100 * plain[1]])
    alpha = [1 / t.norm(dim=1).mean().item() for _, t in layers]
    assert modality_integration_rate(layers)[1] == pytest.approx([d * a ** 2 for d, a in zip(plain, alpha)])


# -------------------------------------------------------------------------------- keeping no tokens
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 99, 100])
def test_the_median_is_found_byte_by_byte(dtype, n):
    x = torch.cat([tokens(n, 6, 5), torch.zeros(n, 1), -torch.ones(n, 1)], dim=1)
    x[:n // 2, 6] = -0.0
    x[:, 0] *= 1e30
    x[:, 1] = x[:, 1].round()                                       # many values are equal
    x = x.to(dtype)
    median, below = Median(8, "cpu"), torch.full((8,), (n - 1) // 2)
    passes = 0
    while median.value is None:
        for part in x.split(7):
            median.add(part)
        below = median.close(below)
        passes += 1
    assert passes == dtype.itemsize
    assert torch.equal(median.value, x.median(0).values.double())


def a_model(dtype=torch.float64) -> Llava:
    """Random weights; some words have long embeddings, so that every layer has outliers."""
    torch.manual_seed(0)
    vision = VisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                          num_attention_heads=2, image_size=8, patch_size=4)
    llm = DecoderConfig(vocab_size=40, hidden_size=12, intermediate_size=16, num_hidden_layers=3,
                        num_attention_heads=2)
    model = Llava(ViT(vision), Projector(8, 12), Decoder(llm))
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape) if p.dim() > 1 else 1 + 0.1 * torch.randn(p.shape)
    model.language_model.model["embed_tokens"].weight.data[35:] *= 20
    return model.to(dtype)


def some_batches(samples=30, batch_size=7, order=None, words=36) -> list[Batch]:
    """Image-text pairs of different lengths; with words > 35 long embeddings turn up."""
    rng = random.Random(3)
    rows = []
    for _ in range(samples):
        before = [1] + rng.choices(range(3, 35), k=rng.randint(0, 2))
        after = rng.choices(range(3, words), k=rng.randint(3, 9))
        rows.append((torch.tensor(before + [0] * 4 + after), len(before)))
    pictures = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    chosen = list(range(samples)) if order is None else order
    out = []
    for s in range(0, samples, batch_size):
        part = chosen[s:s + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence([rows[i][0] for i in part], batch_first=True)
        image = torch.zeros(ids.shape, dtype=torch.bool)
        for j, i in enumerate(part):
            image[j, rows[i][1]:rows[i][1] + 4] = True
        real = torch.arange(ids.shape[1]) < torch.tensor([[len(rows[i][0])] for i in part])
        after = real & (image.cumsum(1) == 4) & ~image
        out.append(Batch(ids, torch.where(after, ids, -100), image, real, pictures[part],
                         torch.ones(len(part), dtype=torch.bool),
                         torch.zeros(len(part), dtype=torch.bool)))
    return out


def kept(model, batches, depth=3):
    """Every token of every layer, as the released script keeps them."""
    layers = [([], []) for _ in range(depth)]
    with torch.no_grad():
        for batch in batches:
            visit(model, batch, lambda k, v,
                  t: (layers[k - 1][0].append(v), layers[k - 1][1].append(t)))
    return [(torch.cat(v), torch.cat(t)) for v, t in layers]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words, outliers", [(36, "median"), (36, "drop"), (35, "median")])
def test_streaming_equals_everything_in_memory(dtype, words, outliers):
    model, batches = a_model(dtype), some_batches(words=words)
    layers = kept(model, batches)
    replaced = [len(t) - len(replace_outliers(t.double(), "drop")) for _, t in layers]
    assert all(replaced) if words == 36 else not any(replaced), "this is to test both cases"
    for mode in ("exact", "newton-schulz", "released"):
        for normalise in (True, False):
            wanted = modality_integration_rate(layers, mode, outliers, normalise)
            got = measure(model, batches, mode, outliers, normalise)
            assert got["layers"] == pytest.approx(wanted[1],
                                                  rel=1e-6 if mode == "newton-schulz" else 1e-9)
            assert got["mir"] == pytest.approx(wanted[0], rel=1e-9)


def test_layers_end_with_the_final_norm_and_text_is_what_comes_after_the_image():
    model, batches = a_model(), some_batches(samples=4)
    layers = kept(model, batches)
    with torch.no_grad():
        h = model(batches[0]).hidden_states
    real, image = batches[0].attention_mask, batches[0].image_mask
    assert torch.equal(layers[-1][0], h[image])
    first = image.int().argmax(1)
    text = torch.cat([h[i, first[i] + 4:real[i].sum()] for i in range(4)])
    assert torch.equal(layers[-1][1], text)
    assert not torch.allclose(layers[-2][0], h[image])


def test_neither_the_order_nor_the_batch_size_matters():
    """In float64: in float32 a batch's padding alone moves hidden states by 1e-7."""
    norms = tokens(1000, 1, 0)[:, 0].exp()
    assert outlier_bounds(norms) == outlier_bounds(norms.flip(0)), "who is an outlier hangs on the last bit of a sum"
    model = a_model()
    wanted = measure(model, some_batches())
    for batch_size, order in [(1, None), (30, None), (4, random.Random(5).sample(range(30), 30))]:
        got = measure(model, some_batches(batch_size=batch_size, order=order))
        for key, value in wanted.items():
            assert got[key] == pytest.approx(value, rel=1e-9), key


def test_beside_it_stand_the_loss_and_the_scales_on_the_same_pairs():
    model, batches = a_model(), some_batches(batch_size=30)
    got, b = measure(model, batches), batches[0]
    with torch.no_grad():
        out = model(b)
        logits = model.language_model.lm_head(out.hidden_states)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), b.labels[:, 1:].flatten())
    assert got["answer_ce"] == pytest.approx(loss.item()) and got["perplexity"] == pytest.approx(loss.exp().item())
    V = out.image_embeds.flatten(0, 1)
    assert got["V_norm"] == pytest.approx(V.norm(dim=1).mean().item())
    assert got["V_var"] == pytest.approx(V.var(0).sum().item())
    vision, text = kept(model, batches)[-1]
    assert got["h_norm"] == pytest.approx(torch.cat([vision, text]).norm(dim=1).mean().item())


def test_measuring_leaves_a_model_in_training_as_it_was():
    model, batches = a_model(torch.float32), some_batches()
    model.train()
    model.vision_tower.eval()
    modes = [m.training for m in model.modules()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {n: (p.clone(), p.grad.clone()) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    measure(model, batches)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state), "the random state moved: the next draw of training would differ"
    assert all(torch.equal(p, before[n][0])
               and torch.equal(p.grad, before[n][1]) for n, p in model.named_parameters())
    # nothing left behind is in its way
    model(batches[0]).hidden_states.sum().backward()


def test_a_broken_layer_is_named_also_when_streaming():
    model = a_model(torch.float32)
    model.language_model.model["layers"][1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer 2: vision tokens: some are not finite"):
        measure(model, some_batches())


# ------------------------------------------------------------------------------------- command line
@pytest.fixture(scope="module")
def checkpoint(small_world, tmp_path_factory):
    """A run of 4 steps with a measurement every 2, and its data beside it, as the toy has it."""
    out = tmp_path_factory.mktemp("mir") / "run"
    assert train(small_world, out, "--mir-every", 2, "--mir-data", small_world / "val.jsonl").returncode == 0
    (out / "data").symlink_to(small_world)
    return out


def train(small_world, out, *more, ranks=1):
    arguments = ["train.py", "--stage", "finetune", "--data", small_world / "finetune.json",
                 "--images", small_world / "images", "--out", out, "--global-batch", "16", "--lr",
                 "5e-4", "--max-steps", "4", "--workers", "0", "--dtype", "float32", "--projector",
                 "random", *more]
    return call(*arguments) if ranks == 1 else launch(*arguments, ranks=ranks)


def lines_of(out, kind=None):
    drop = ("tokens_per_s", "peak_gib")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in drop}
            for line in lines if line.get("kind") == kind]


def run_mir(checkpoint, *more, ranks=1):
    out = checkpoint.parent / "mir.json"
    arguments = ["mir.py", "--ckpt", checkpoint, "--device", "cpu", "--out", out, "--overwrite",
                 *more]
    done = call(*arguments) if ranks == 1 else launch(*arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_measuring_every_n_steps_changes_no_loss_and_is_what_the_command_measures(small_world, checkpoint, tmp_path):
    assert train(small_world, tmp_path / "run").returncode == 0
    assert losses_of(tmp_path / "run", "finetune") == losses_of(checkpoint, "finetune")
    assert lines_of(tmp_path / "run") == lines_of(checkpoint), "a step differs from that of a run without --mir-every"
    first, last = lines_of(checkpoint, "mir")
    assert (first["stage"], first["step"], last["step"]) == ("finetune", 2, 4) and len(last["layers"]) == 4
    # the same 36 pairs, of the checkpoint of step 4
    result, printed = run_mir(checkpoint)
    assert result["mir"] == pytest.approx(last["mir"], rel=1e-6)
    assert result["answer_ce"] == pytest.approx(last["answer_ce"], rel=1e-6)
    bars = [line for line in printed.splitlines() if line.startswith("layer")]
    assert len(bars) == 4 and max(line.count("█") for line in bars) == 40
    assert f"MIR {result['mir']:.3f}" in printed and "perplexity" in printed


def kept_by(checkpoint, small_world):
    """(model, batches, every token of every layer) of the run's last checkpoint."""
    folder, images = sorted(checkpoint.glob("finetune-*"))[-1], small_world / "images"
    batches = pair_batches(folder, read_pairs(small_world / "val.jsonl", images, 100), images)
    model = load_model(folder).eval()
    return model, batches, kept(model, batches, 4)


def test_on_a_checkpoint_exact_is_the_accurate_mode_and_released_the_fast_one(checkpoint, small_world):
    model, batches, layers = kept_by(checkpoint, small_world)
    accurate = []
    for vision, text in layers:
        alpha = 1 / text.double().norm(dim=1).mean()
        accurate.append(definition(*(replace_outliers(alpha * f.double(), "median")
                                     for f in (vision, text))))
    assert measure(model, batches)["layers"] == pytest.approx(accurate, rel=1e-6)
    fast = [published(vision, text) for vision, text in layers]
    assert measure(model, batches, "released")["layers"] == pytest.approx(fast, rel=1e-4)
    assert modality_integration_rate(layers, "released")[1] == pytest.approx(fast, rel=1e-4)


def test_each_rank_computes_its_share_of_the_layers(checkpoint, small_world, monkeypatch):
    streams = [[Stream(6, "cpu") for _ in range(2)] for _ in range(3)]
    for k, layer in enumerate(streams):
        for name, s in zip(("vision", "text"), layer):
            for step in range(2):
                s.add(tokens(50, 6, 2 * k + (name == "text")), step)
                s.close(name, step)
    every, _ = layer_distances(streams, "exact", True)
    assert all(every)
    for rank, wanted in ((0, [every[0], 0, every[2]]), (1, [0, every[1], 0])):
        monkeypatch.setattr(mir, "place", lambda rank=rank: (rank, 2))
        assert layer_distances(streams, "exact", True)[0] == wanted


def test_inputs_as_released_are_images_as_trained_uncut_text_and_the_newline(checkpoint, small_world):
    folder, images = sorted(checkpoint.glob("finetune-*"))[-1], small_world / "images"
    pairs = read_pairs(small_world / "pretrain.json", images, 4)
    pairs = [sample(p["image"], "There is a red circle. " * 100) for p in pairs]

    def text_of(batch):
        ids = batch.input_ids[0][batch.attention_mask[0] & ~batch.image_mask[0]]
        return batch.image_mask[0].sum(), "".join(load_tokenizer(folder).id_to_token(i)
                                                  for i in ids.tolist())
    ours, theirs = (pair_batches(folder, pairs, images, as_released=r) for r in (False, True))
    ours.samples.format = replace(ours.samples.format, max_length=200)
    (_, cut), (n, whole) = text_of(ours[0]), text_of(theirs[0])
    assert "▁USER:▁▁<0x0A>▁ASSISTANT:" in whole and "<0x0A>" not in cut, "the newline of an empty question"
    assert cut.count("▁circle") < whole.count("▁circle") == 100
    assert n == theirs.samples.format.image_tokens
    assert theirs.samples.format.pad and ours.samples.format.pad, "after stage 2 images are padded"
    config = json.loads((folder / "config.json").read_text())
    stage_1 = checkpoint.parent / "stage-1"
    shutil.copytree(folder, stage_1)
    (stage_1 / "config.json").write_text(json.dumps({**config, "pad": False}))
    cropped = pair_batches(stage_1, pairs, images, as_released=True).samples.format
    assert not cropped.pad, "after stage 1 the centre is cropped"
    assert pair_batches(stage_1, pairs, images).samples.format.pad
    asked = pair_batches(folder, [sample("a.png", "Yes", "Is it red?")], images, as_released=True)
    assert asked.samples.samples[0]["conversations"][0]["value"] == "<image>\nIs it red?"


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(small_world, checkpoint, tmp_path):
    # 5 batches: one rank has one more
    wanted = run_mir(checkpoint, "-n", 36, "--batch-size", 8)[0]
    got = run_mir(checkpoint, "-n", 36, "--batch-size", 8, ranks=2)[0]
    for key in ("mir", "layers", "V_norm", "V_var", "text_norm", "h_norm", "answer_ce",
                "perplexity"):
        assert got[key] == pytest.approx(wanted[key], rel=1e-9), key
    done = train(small_world, tmp_path / "run", "--mir-every", 2, "--mir-data",
                 small_world / "val.jsonl", ranks=2)
    assert done.returncode == 0, done.stderr
    for a, b in zip(lines_of(checkpoint, "mir"), lines_of(tmp_path / "run", "mir"), strict=True):
        assert a["mir"] == pytest.approx(b["mir"], rel=1e-4) and a["step"] == b["step"]


def test_resuming_drops_the_measurements_of_steps_that_are_made_again(checkpoint, tmp_path):
    shutil.copyfile(checkpoint / "metrics.jsonl", tmp_path / "metrics.jsonl")
    Log(tmp_path / "metrics.jsonl", "finetune", step=3).file.close()
    assert [line["step"] for line in lines_of(tmp_path, "mir")] == [2]
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


@pytest.fixture
def stories(tmp_path):
    folder = tmp_path / "stories"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.story").write_text(f"There is a red circle number {i}.\n\n@highlight\n\nNothing of this.\n")
    (folder / "empty.story").write_text("\n@highlight\n\nOnly this.\n")
    return folder


def test_images_and_texts_are_paired_by_the_seed_alone(small_world, stories):
    images = small_world / "images"
    samples, root = mix_pairs(images, stories, 8, seed=1)
    assert root == images and len({s["image"] for s in samples}) == 8
    texts = [s["conversations"][1]["value"] for s in samples]
    assert sorted(texts) == [f"There is a red circle number {i}." for i in range(8)], "cut before @highlight, once each"
    assert mix_pairs(images, stories, 8, seed=1)[0] == samples != mix_pairs(images, stories, 8, seed=2)[0]
    drawn = [{s["conversations"][1]["value"] for s in mix_pairs(images, stories, 4, seed)[0]}
             for seed in (1, 2)]
    assert drawn[0] != drawn[1], "texts are drawn too, not only images"
    by_json, root = mix_pairs(small_world / "pretrain.json", stories, 3, seed=1)
    assert root == images and all((root / s["image"]).is_file() for s in by_json)


def test_texts_may_be_plain_or_json(small_world, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n"two"\n')
    (tmp_path / "c.json").write_text(json.dumps([{"conversations": [{"from": "human", "value": "?"}, {
        "from": "gpt", "value": t}]} for t in ("one", "two")]))
    for name in ("a.txt", "b.jsonl", "c.json"):
        samples, _ = mix_pairs(small_world / "images", tmp_path / name, 2, seed=0)
        assert sorted(s["conversations"][1]["value"] for s in samples) == ["one", "two"]


def test_any_images_and_texts_can_be_measured_in_any_template(checkpoint, small_world, stories):
    some = ["--images", small_world / "images", "--texts", stories, "-n", 8]
    v1, plain = run_mir(checkpoint, *some)[0], run_mir(checkpoint, *some, "--template", "plain")[0]
    assert v1["settings"]["pairs"] == 8 and v1["mir"] != plain["mir"]
    assert run_mir(checkpoint, *some, "--seed", "0")[0]["layers"] == v1["layers"]
    assert run_mir(checkpoint, *some, "--seed", "1")[0]["layers"] != v1["layers"]
    result, printed = run_mir(checkpoint, *some, "--outliers", "drop", "--no-normalise")
    assert result["mir"] > v1["mir"] + 1 and "outliers drop, without normalisation" in printed
    result, printed = run_mir(checkpoint, *some, "--mode", "newton-schulz")
    assert result["layers"] == pytest.approx(v1["layers"], rel=1e-3) and "residual of the square roots" in printed


def test_a_released_layout_is_measured_as_our_own(checkpoint, small_world, tmp_path):
    assert call("hub", "export", checkpoint, tmp_path / "hf").returncode == 0
    data = ["--data", small_world / "val.jsonl", "--images", small_world / "images"]
    got, wanted = run_mir(tmp_path / "hf", *data)[0], run_mir(checkpoint)[0]
    assert got["layers"] == pytest.approx(wanted["layers"], rel=1e-6)


def test_a_batch_is_prepared_when_it_is_asked_for(checkpoint, small_world):
    folder = next(checkpoint.glob("finetune-*"))
    images = small_world / "images"
    batches = pair_batches(folder, read_pairs(small_world / "val.jsonl", images, 30), images,
                           batch_size=8)
    assert len(batches) == 4 and [len(b.input_ids) for b in batches] == [8, 8, 8, 6]


@pytest.mark.parametrize("arguments, says", [
    ("-n 1", ["--n must be 2 or more"]),
    ("--batch-size 0", ["--batch-size must be 1 or more"]),
    ("--texts {stories}", ["--texts is paired with --images"]),
    ("--texts {stories} --images absent", ["absent does not exist"]),
    ("--texts {stories} --images {images} -n 9", ["stories has 8 texts that are not empty; -n 9"]),
    ("--texts {texts} --images {images}", ["texts.jsonl, entry 1 is no text"]),
    ("--texts {stories} --images {elsewhere}",
     ["names x.png, which is neither in", "give the folder of the images"]),
    ("--data absent.jsonl", ["absent.jsonl does not exist"]),
    ("--data {texts}", ["line 1 lacks a text"]),
    ("--out absent/mir.json", ["there is no folder absent"]),
    ("--mode fast", ["invalid choice: 'fast'"]),
])
def test_what_cannot_be_measured_is_one_line(arguments, says, checkpoint, small_world, stories,
                                             tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"words": "one"}\n')
    (tmp_path / "elsewhere.json").write_text('[{"image": "x.png"}]')
    places = {"stories": stories, "images": small_world / "images",
              "texts": tmp_path / "texts.jsonl", "elsewhere": tmp_path / "elsewhere.json"}
    refuses(call("mir.py", "--ckpt", checkpoint, *(a.format(**places) for a in arguments.split())),
            *says)


def test_training_says_what_mir_every_needs(small_world, tmp_path):
    refuses(train(small_world, tmp_path / "run", "--mir-every", 2),
            "--mir-every N and --mir-data FILE go together")
    refuses(train(small_world, tmp_path / "run", "--mir-data", small_world / "val.jsonl"),
            "--mir-every N and --mir-data FILE go together")
    refuses(train(small_world, tmp_path / "run", "--mir-data", "x", "--mir-every", 2),
            "--mir-data x does not exist")
    refuses(train(small_world, tmp_path / "run", "--mir-every", 0),
            "--mir-every must be more than 0")
    assert not (tmp_path / "run").exists()
