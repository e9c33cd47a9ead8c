"""One layer of the decoder, with a plain mean in attention's place, and where MoCa acts in it."""
import torch
from adapters import make_moca
from torch import nn

from model import DecoderConfig, DecoderLayer


class CausalMean(nn.Module):
    """Each position reads the mean of what it sees."""
    window = None

    def forward(self, x, rope, mask=None, cache=None):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None], x[:, None], x[:, None]


def layer(**options):
    torch.manual_seed(0)
    block = DecoderLayer(DecoderConfig(11, 6, 12, 1, 1, head_dim=6, **options)).double()
    block.self_attn = CausalMean()
    return block


def example():
    g = torch.Generator().manual_seed(1)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]).bool()
    return torch.randn(2, 5, 6, generator=g, dtype=torch.float64), mask


def test_a_layer_whose_mlp_gives_nothing_adds_attention_of_the_normed_input():
    block, (x, _) = layer(), example()
    nn.init.zeros_(block.mlp.down_proj.weight)
    torch.testing.assert_close(block(x, None)[0],
                               x + block.self_attn(block.input_layernorm(x), None)[0])


def test_moca_calibrates_what_the_layer_returns_at_image_positions_alone():
    block, moca, (x, mask) = layer(), make_moca(6).double(), example()
    nn.init.constant_(moca.u, 2.0)
    plain, calibrated = block(x, None)[0], block(x, None, moca=moca, image_mask=mask)[0]
    torch.testing.assert_close(calibrated[mask], 2 * plain[mask])
    assert torch.equal(calibrated[~mask], plain[~mask])


def test_attention_to_the_image_is_returned_only_if_somebody_asks():
    block, (x, _) = layer(), example()
    assert block(x, None)[1] is None
    rows, columns = torch.tensor([[4], [4]]), torch.tensor([[1, 2], [2, 3]])
    assert block(x, None, attend=(rows, columns))[1].shape == (2, 1, 2)
