"""losses.py: the contract between an objective and the trainer."""
import torch
from test_model import batch_of, prompts, tiny

from data import Batch
from losses import LOSSES, Objective, counts


def example() -> Batch:
    ids, masks, pixels = prompts([9, 12, 7], without_image=[2])
    b = batch_of(ids, masks, pixels)
    labels = torch.where(b.attention_mask & (torch.arange(12) > 6), b.input_ids, -100)
    return Batch(b.input_ids, labels, b.image_mask, b.attention_mask, pixels, b.image_mask.any(1))


def test_counts_are_known_from_the_batch_before_any_forward():
    batch = example()
    for loss in LOSSES:
        known = counts(batch)
        for term in Objective(tiny(), loss)(batch):
            assert term.count == known[term.name] and term.total.ndim == 0


def test_cross_entropy_is_that_of_the_full_logits():
    batch, model = example(), tiny()
    (term,) = Objective(model, "ce")(batch)
    logits = model.language_model.lm_head(model(batch).hidden_states)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    assert term.name == "ce" and term.weight == 1.0
    torch.testing.assert_close(term.total / term.count, wanted)


def test_a_batch_cut_in_pieces_has_the_gradient_of_the_whole():
    """Sums divided by global counts: what each micro-batch holds does not matter."""
    batch = example()
    def gradient(parts):
        model = tiny()
        for rows in parts:
            piece = Batch(**{k: v[rows] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)})
            for term in Objective(model, "ce")(piece):
                (term.total / counts(batch)[term.name]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient([[0, 1, 2]]), gradient([[0], [2], [1]]), atol=1e-12, rtol=0)
