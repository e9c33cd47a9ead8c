"""methods/vdep.py against the definition, and its hybrid batches."""
import pytest
import torch
from adapters import reconstruction_loss
from PIL import Image

from data import Format, ImageProcessor, Order, Samples, collate


def example(B=3, N=5, D=7):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, N, D, generator=g, dtype=torch.float64, requires_grad=True)
            for _ in range(2)]


def naive(h, x, distance="l2", reduce="mean", shift=1):
    """Eq. (11)'s L_i, one position at a time."""
    total = torch.zeros((), dtype=h.dtype)
    for b in range(h.shape[0]):
        of_sample = []
        for i in range(h.shape[1] - shift):
            d = sum((h[b, i, j] - x[b, i + shift, j]) ** 2 for j in range(h.shape[2]))
            if reduce == "mean":
                d = d / h.shape[2]
            of_sample.append({"l2": d, "inverse": 1 - 1 / (1 + d), "sigmoid": 2 / (1 + torch.exp(-d)) - 1}[distance])
        total = total + sum(of_sample) / len(of_sample)
    return total


@pytest.mark.parametrize("options",
                         [{}, {"distance": "inverse"}, {"distance": "sigmoid"}, {"reduce": "sum"},
                                     {"shift": 0}, {"distance": "inverse", "reduce": "sum",
                                                    "shift": 0}])
def test_value_and_gradient_are_those_of_the_definition(options):
    h, x = example()
    total, count = reconstruction_loss(h, x, **options)
    wanted = naive(h, x, **options)
    assert count == 3
    torch.testing.assert_close(total, wanted, atol=1e-12, rtol=0)
    (got,), (grad,) = torch.autograd.grad(total, [h]), torch.autograd.grad(wanted, [h])
    torch.testing.assert_close(got, grad, atol=1e-12, rtol=0)


def test_a_target_is_not_trained():
    h, x = example()
    total, _ = reconstruction_loss(h, x)
    total.backward()
    assert x.grad is None, "the projector would learn to make what is easy to predict"


def test_the_last_position_has_no_target_and_the_first_token_no_prediction():
    h, x = (t.detach() for t in example())
    before = reconstruction_loss(h, x)[0]
    h[:, -1] += 1
    x[:, 0] += 1
    assert reconstruction_loss(h, x)[0] == before


def test_predicting_the_next_token_exactly_costs_nothing():
    h, x = (t.detach() for t in example())
    h[:, :-1] = x[:, 1:]
    for distance in ("l2", "inverse", "sigmoid"):
        assert reconstruction_loss(h, x, distance=distance)[0] == 0


def test_the_ablations_pull_less_at_a_distance():
    h, x = (t.detach() for t in example())
    for distance in ("inverse", "sigmoid"):
        near, mid, far = (reconstruction_loss(h + s, x, distance=distance)[0] / 3
                          for s in (0, 1, 100))
        assert 0 < near < mid < far <= 1


def test_no_sample_in_this_mode_is_a_loss_of_zero():
    h, x = (t[:0] for t in example())
    total, count = reconstruction_loss(h, x)
    assert total == 0 and count == 0 and total.requires_grad


def test_bfloat16_is_compared_in_float32():
    h, x = (t.detach().bfloat16() for t in example())
    total, _ = reconstruction_loss(h, x)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, naive(h.float(), x.float()))


@pytest.mark.parametrize("option", ["distance", "reduce", "shift"])
def test_an_unknown_option_is_refused(option):
    with pytest.raises(ValueError, match=option):
        reconstruction_loss(*example(), **{option: 2})


def test_the_literal_inverse_would_push_a_state_away_from_its_target_and_ours_does_not():
    h, x = example()
    d = (h[:, :-1] - x[:, 1:].detach()).pow(2).mean(-1)
    (literal,) = torch.autograd.grad((1 / d).mean(-1).sum(), h)
    (ours,) = torch.autograd.grad(reconstruction_loss(h, x, distance="inverse")[0], h)
    away = (h - torch.cat([x[:, 1:], x[:, -1:]], dim=1)).detach()[:, :-1]
    # a step against the gradient
    along = [(-g[:, :-1] * away).sum(-1) for g in (literal, ours)]
    assert (along[0] > 0).all() and (along[1] < 0).all()


# ----------------------------------------------------------------------------------- hybrid batches
def test_each_sample_is_seen_once_in_each_mode_an_epoch():
    order = Order(50, 8, 4, seed=1, vdep_samples=50)
    assert order.steps_per_epoch == 13
    it = iter(order)
    for _ in range(2):
        numbers = sorted(i for _ in range(26) for i in next(it))
        assert numbers == [-1] * 4 + list(range(100)), "0..49 is LLaVA mode, 50..99 the same samples in VDEP mode"


def test_a_ratio_below_one_draws_other_samples_every_epoch():
    it = iter(Order(50, 8, 4, seed=1, vdep_samples=25))
    drawn = [{i for _ in range(20) for i in next(it) if i >= 50} for _ in range(2)]
    assert [len(d) for d in drawn] == [25, 25] and drawn[0] != drawn[1]


def test_the_modes_are_mixed_and_resumed_and_dealt_to_ranks_as_one_order():
    whole = iter(Order(50, 8, 2, seed=1, vdep_samples=50))
    steps = [[next(whole) for _ in range(4)] for _ in range(20)]
    assert sum(any(i >= 50 for m in s for i in m) and any(0 <= i < 50 for m in s for i in m) for s in steps) > 15
    ranks = [iter(Order(50, 8, 2, seed=1, rank=r, ranks=2, start=7, vdep_samples=50))
             for r in range(2)]
    for s in steps[7:]:
        assert s == [next(ranks[a % 2]) for a in range(4)]


@pytest.fixture
def two_samples(llama_tokenizer, tmp_path):
    """Makes Samples of two: an image with text, and text alone."""
    Image.effect_noise((20, 20), 90).convert("RGB").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "Describe it.\n<image>"},
             {"from": "gpt", "value": "A cat."}]
    samples = [{"id": "x", "image": "a.png", "conversations": turns},
               {"id": "y", "conversations": [{**t, "value": t["value"].replace("<image>", "")}
                                             for t in turns]}]
    text = Format("plain", 4, 2048, pad=False)
    return lambda **options: Samples(samples, tmp_path, llama_tokenizer, ImageProcessor(16, 16),
                                     text, **options)


def test_a_sample_in_vdep_mode_is_the_image_alone(two_samples):
    data = two_samples()
    n = len(data)
    batch = collate([data[0], data[n], data[n + 1], data[-1]], 16)
    assert batch.reconstruct.tolist() == [False, True, False, False], "1 is text alone, -1 a filler: nothing to rebuild"
    assert batch.input_ids[1][batch.attention_mask[1]].tolist() == [1] + [0] * 4
    assert (batch.labels[1:] == -100).all() and (batch.labels[0] != -100).any()
    assert batch.image_mask[1].sum() == 4 and torch.equal(batch.pixel_values[0],
                                                          batch.pixel_values[1])


def test_in_joint_mode_a_sample_with_an_image_keeps_its_text_and_is_reconstructed_too(two_samples):
    hybrid, joint = two_samples(), two_samples(joint=True)
    plain, both = (collate([data[0], data[1], data[-1]], 16) for data in (hybrid, joint))
    assert plain.reconstruct.tolist() == [False] * 3 and both.reconstruct.tolist() == [True, False, False]
    assert torch.equal(plain.labels, both.labels) and torch.equal(plain.input_ids, both.input_ids)
