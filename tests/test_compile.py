"""--compile: one graph for every length, of the decoder's layers and of the vision encoder's."""
import pytest
import torch
from test_losses import cfg, tiny
from test_model import batch_of, prompts

from data import Batch
from losses import LOSSES, Objective
from training.setup import compile_block


def batch(T: int) -> Batch:
    ids, masks, pixels = prompts([T, T - 1, T - 2])
    b = batch_of(ids, masks, pixels.float())
    labels = torch.where(b.attention_mask & (torch.arange(T) > 6), b.input_ids, -100)
    return Batch(b.input_ids, labels, b.image_mask, b.attention_mask, pixels.float(),
                 b.image_mask.any(1), torch.tensor([False, False, True]))


@pytest.mark.parametrize("loss",
                         [loss if loss == "basic" else pytest.param(loss, marks=pytest.mark.slow)
                                  for loss in LOSSES])
def test_twelve_lengths_make_two_graphs_and_the_same_losses(loss):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    plain, model = tiny(torch.float32, moca=True), tiny(torch.float32, moca=True)
    model.language_model.recomputed = 1
    for block in [*model.vision_tower.encoder["layers"], *model.language_model.model["layers"]]:
        compile_block(block, backend=count)
    for T in range(10, 22):
        results = []
        for each in (plain, model):
            terms = Objective(each, cfg(loss))(batch(T))
            sum(term.total for term in terms).backward()
            results.append(torch.stack([term.total.detach() for term in terms]))
        torch.testing.assert_close(*results)
    assert len(graphs) == 2
