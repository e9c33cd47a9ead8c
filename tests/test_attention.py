"""Projector, merge, rotation and attention: what a reader can check by hand."""
import math

import torch
from torch import nn

from model import Attention, DecoderConfig, Llava, Projector, rotary, rotate


def test_the_projector_is_gelu_between_two_maps():
    p = Projector(1, 1)
    for w in p.parameters():
        nn.init.ones_(w)
    x = torch.tensor([[[0.0]], [[1.0]]])
    gelu = [z * 0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (1.0, 2.0)]
    torch.testing.assert_close(p(x).flatten(), torch.tensor([g + 1 for g in gelu]))


def test_merging_puts_image_tokens_in_order_and_leaves_text():
    text, image = torch.zeros(2, 5, 1), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    assert Llava.merge(None, text, image, mask)[..., 0].tolist() == [[0, 1, 0, 2, 0], [0, 0, 0, 0, 0]]


def test_the_first_pair_turns_by_the_position_itself():
    cos, sin = rotary(torch.tensor([0, 1, 2]), 4, 10000.0, torch.float64)
    assert cos.shape == sin.shape == (3, 4)
    wanted = torch.tensor([0.0, 1.0, 2.0]).sin().double()
    torch.testing.assert_close(sin[:, 0], wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[:, 2], wanted, atol=1e-6, rtol=0)


def test_a_quarter_turn_sends_the_first_half_to_the_second():
    x, cos, sin = torch.tensor([1.0, 0, 0, 0]), torch.zeros(4), torch.ones(4)
    assert rotate(x, cos, sin).tolist() == [0, 0, 1, 0]
    assert rotate(rotate(x, cos, sin), cos, sin).tolist() == [-1, 0, 0, 0]


def test_attention_is_causal_and_of_equal_scores_the_mean():
    layer = Attention(DecoderConfig(5, 4, 4, 1, 2)).double()
    for p in layer.parameters():
        nn.init.zeros_(p)
    nn.init.eye_(layer.v_proj.weight), nn.init.eye_(layer.o_proj.weight)
    x = torch.arange(12, dtype=torch.float64).view(1, 3, 4)
    still = torch.ones(3, 2).double(), torch.zeros(3, 2).double()
    y, q, k = layer(x, still)
    torch.testing.assert_close(y[0], x[0].cumsum(0) / torch.tensor([[1.0], [2], [3]]).double())
    assert q.shape == k.shape == (1, 2, 3, 2)
