"""Each term's own gradient under bfloat16 autocast against float32, on the same weights.

The sum of all terms would hide a bad one: cross-entropy is the largest. The model has LLaMA's
scales: word embeddings of 0.02, norms that multiply by 1. A final state (about 1 a dimension) is
then far from every word embedding.
"""
import pytest
import torch

from data import Batch
from losses import LOSSES, Objective
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT
from training.settings import TrainConfig

WIDTH, N = 256, 16                                          # N image tokens
FAMILIES = {
    "llama": {},
    "phi": dict(norm="layer", parallel=True, gated=False, bias=True, head_bias=True,
                hidden_act="gelu_tanh"),
    "gemma": dict(norm_plus_one=True, embed_scale=WIDTH ** 0.5, tie_word_embeddings=True,
                  hidden_act="gelu_tanh")}
CASES = [(loss, stage, moca, "llama") for loss in LOSSES for stage in ("pretrain", "finetune")
         for moca in (False, True)]
CASES += [(loss, "pretrain", False, family) for loss in LOSSES for family in ("phi", "gemma")]


def make_model(stage: str, moca: bool, family: str) -> Llava:
    """Trained parameters float32, frozen ones bfloat16, as a run on a GPU stores them."""
    torch.manual_seed(0)
    model = Llava(ViT(VisionConfig(64, 128, 3, 2, 32, 8)), Projector(64, WIDTH),
                  Decoder(DecoderConfig(512, WIDTH, 688, 4, 4, moca=moca, **FAMILIES[family])))
    for name, p in model.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(p, std=0.02)
        elif p.dim() > 1:
            torch.nn.init.normal_(p, std=p.shape[1:].numel() ** -0.5)
        elif family == "gemma" and name.startswith("language_model") and name.endswith("norm.weight"):
            torch.nn.init.zeros_(p)                         # Gemma multiplies by 1 + weight
        part = name.split(".")[0]
        p.requires_grad_(part == "multi_modal_projector" or ".moca." in name
                         or part == "language_model" and stage == "finetune")
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    return model


def make_batch() -> Batch:
    """Four samples of an image and text; the last one is the image alone, in VDEP mode."""
    g = torch.Generator().manual_seed(1)
    B, T = 4, 40
    ids = torch.randint(3, 512, (B, T), generator=g)
    image = torch.zeros(B, T, dtype=torch.bool)
    image[:, 2:2 + N] = True
    real = torch.ones(B, T, dtype=torch.bool)
    real[3, 2 + N:] = False
    labels = ids.masked_fill(~real | (torch.arange(T) < 24), -100)
    return Batch(ids, labels, image, real, torch.randn(B, 3, 32, 32, generator=g), image.any(1),
                 torch.tensor([False, False, False, True]))


def term_gradients(model: Llava, cfg: TrainConfig, autocast: bool) -> dict:
    """Term → its gradient by all trained parameters, as one float64 vector."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = Objective(model, cfg)(make_batch())
    found = {}
    for term in terms:
        gradients = torch.autograd.grad(term.total, trained, retain_graph=True, allow_unused=True)
        found[term.name] = torch.cat([g.double().flatten() for g in gradients if g is not None])
    return found


@pytest.mark.parametrize("loss, stage, moca, family", CASES)
def test_every_terms_gradient_under_autocast_is_that_of_float32(loss, stage, moca, family):
    cfg = TrainConfig(loss=loss, stage=stage, moca=moca)
    model = make_model(stage, moca, family)
    low = term_gradients(model, cfg, autocast=True)
    exact = term_gradients(model.float(), cfg, autocast=False)
    for name, wanted in exact.items():
        cosine = torch.nn.functional.cosine_similarity(low[name], wanted, dim=0).item()
        error = ((low[name] - wanted).norm() / wanted.norm()).item()
        assert cosine >= 0.9995 and error <= 0.03, f"{name}: cosine {cosine:.5f}, relative error {error:.4f}"
