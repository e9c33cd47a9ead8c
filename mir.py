"""MIR, the Modality Integration Rate: how far apart image and text tokens lie inside the language model.

Deciphering Cross-Modal Alignment in Large Vision-Language Models with Modality Integration Rate, arXiv 2410.07167.

    α_k = 1 / mean ‖t‖ over the text tokens t of layer k                                              (1)
    f_v ← ω(α_k f_v),  f_t ← ω(α_k f_t)              ω: 3σ outliers by ℓ2 norm                        (2)
    FID(f_v, f_t) = ‖μ_v − μ_t‖² + Tr(Σ_v + Σ_t − 2 (Σ_v Σ_t)^{1/2})                                  (3)
    MIR = log10 Σ_k FID(f_v^k, f_t^k)                                                                 (4)

    symbol   variable             shape
    f_v^k    vision               (n,D)  image tokens of layer k = 1..L, over all samples
    f_t^k    text                 (m,D)  text tokens of layer k: every token after the image
    μ, Σ     mean, covariance     (D,), (D,D)  the latter with n − 1

Where the paper is silent
* The last layer is taken after the final norm, the others as they leave the layer (what transformers calls
  hidden_states[1..L]). Layer 0, the projector's output, is not summed.
* ω: tokens with |norm − median| > 3 std. The released code puts the per-dimension median in their place (default);
  the paper's words are that they are dropped (outliers="drop").
* The square root: (Σ_v Σ_t)^{1/2} is never formed. With centred tokens A, B (Σ_v = AᵀA, Σ_t = BᵀB) its trace is the
  sum of the singular values of A Bᵀ, the same as of R_A R_Bᵀ from the two QR factorisations, which are at most D × D:
  exact in float64, also with fewer tokens than dimensions.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import weights
from config import UserError, option, parse, read_json, run
from data import Batch, ImageProcessor, Samples, collate, question_file, read_questions
from model import Llava
from tokenizer import load_tokenizer


def check_tokens(name: str, tokens: Tensor) -> None:
    if len(tokens) < 2 or not tokens.isfinite().all():
        raise ValueError(f"{name} tokens: " + ("some are not finite" if len(tokens) > 1 else
                                               f"{len(tokens)}, but a covariance needs 2"))


def frechet_distance(x: Tensor, y: Tensor, mode: Literal["exact"] = "exact") -> float:
    """Fréchet distance between the Gaussians of two token sets x (n,D) and y (m,D), in float64; at least 2 tokens each.
    Inputs are not modified. Raises ValueError if they are too few or not finite."""
    if mode != "exact":
        raise ValueError(f"mode {mode!r} is not known; exact is")
    factors, means, traces = [], [], []
    for name, t in (("first", x), ("second", y)):
        check_tokens(name, t)
        t = t.double()
        mean = t.mean(0)                                                        # (D,)
        centred = (t - mean) / (len(t) - 1) ** 0.5                              # (n,D), Σ = centredᵀ centred
        means.append(mean)
        traces.append(centred.pow(2).sum())
        factors.append(torch.linalg.qr(centred, mode="r").R)                    # (min(n,D),D)
    cross = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()               # Tr (Σ_v Σ_t)^{1/2}
    distance = (means[0] - means[1]).pow(2).sum() + traces[0] + traces[1] - 2 * cross       # eq. (3)
    return max(distance.item(), 0.0)                                            # a set and itself: 0, not −1e-16


def replace_outliers(tokens: Tensor, outliers: Literal["median", "drop"]) -> Tensor:
    """ω of eq. (2): tokens (n,D) with |norm − median| > 3 std replaced by the per-dimension median, or dropped."""
    norms = tokens.norm(dim=1)                                                  # (n,)
    far = (norms - norms.median()).abs() > 3 * norms.std()
    return tokens[~far] if outliers == "drop" else torch.where(far[:, None], tokens.median(0).values, tokens)


def modality_integration_rate(layers: list[tuple[Tensor, Tensor]], mode: Literal["exact"] = "exact",
                              outliers: Literal["median", "drop"] = "median") -> tuple[float, list[float]]:
    """(MIR, distance per layer) of a list of (vision (n,D), text (m,D)) pairs, one a layer. Raises ValueError naming
    the layer (from 1) whose tokens are too few or not finite."""
    distances = []
    for k, (vision, text) in enumerate(layers, 1):
        for name, t in (("vision", vision), ("text", text)):
            check_tokens(f"layer {k}: {name}", t)
        vision, text = vision.double(), text.double()
        alpha = 1 / text.norm(dim=1).mean()                                     # eq. (1)
        vision, text = (replace_outliers(alpha * t, outliers) for t in (vision, text))      # eq. (2)
        distances.append(frechet_distance(vision, text, mode))
    total = torch.tensor(sum(distances), dtype=torch.float64)
    return total.log10().item(), distances                                      # eq. (4)


@torch.inference_mode()
def measure(model: Llava, batches: list[Batch]) -> dict:
    """MIR of a model over batches, with the scales that explain most of what it does: |V| and var V of the projector's
    output (mean norm of a token, variance summed over dimensions), |text| of word embeddings, |h| of final states."""
    depth = len(model.language_model.model["layers"])
    vision, text = [[] for _ in range(depth)], [[] for _ in range(depth)]
    embeds, words = [], []
    for batch in tqdm(batches, "MIR", leave=False):
        batch = batch.to(next(model.parameters()).device)
        after = batch.attention_mask & ~batch.image_mask & (batch.image_mask.cumsum(1) > 0)
        states = []
        out = model(batch, lambda i, h, _: states.append(h))                    # noqa: B023
        states[-1] = out.hidden_states                                          # the last one after the norm
        for k, h in enumerate(states):
            vision[k].append(h[batch.image_mask].float().cpu())
            text[k].append(h[after].float().cpu())
        embeds.append(out.image_embeds[batch.has_image].flatten(0, 1).float().cpu())
        words.append(out.text_embeds[after].float().cpu())
    rate, layers = modality_integration_rate([(torch.cat(v), torch.cat(t)) for v, t in zip(vision, text)])
    V = torch.cat(embeds)
    return {"mir": rate, "layers": layers, "V_norm": V.norm(dim=1).mean().item(), "V_var": V.var(0).sum().item(),
            "text_norm": torch.cat(words).norm(dim=1).mean().item(),
            "h_norm": torch.cat([*vision[-1], *text[-1]]).norm(dim=1).mean().item()}


def pairs(folder: Path, data: Path, images: Path, n: int, batch_size: int = 20) -> list[Batch]:
    """The first n questions with an image of a file, with their answers, in the v1 template, as batches."""
    c = read_json(folder / "config.json")
    rows = [r for r in read_questions(data, images) if r["image"] is not None][:n]
    if len(rows) < 2:
        raise UserError(f"{data} has {len(rows)} questions with an image; MIR needs 2 at least")
    samples = [{"id": r["question_id"], "image": r["image"], "conversations": [
        {"from": "human", "value": "<image>\n" + r["text"]}, {"from": "gpt", "value": str(r["answer"])}]} for r in rows]
    model_config = weights.vision_config(folder)
    processor = ImageProcessor.from_folder(folder)
    dataset = Samples(samples, images, load_tokenizer(folder), processor, "v1", model_config.image_tokens,
                      c["max_length"], pad=True)
    return [collate([dataset[i] for i in range(s, min(s + batch_size, len(dataset)))], processor.crop_size)
            for s in range(0, len(dataset), batch_size)]


@dataclass
class Config:
    """Measure the Modality Integration Rate of a checkpoint."""
    ckpt: str = option("out/toy", "a checkpoint's folder, or a run's (its newest checkpoint)")
    data: str | None = option(None, "questions with images, JSONL; unset: the toy's validation questions")
    images: str | None = option(None, "the folder of their images")
    n: int = option(100, "how many image-text pairs")
    vision: str | None = option(None, "where the vision encoder of a stage-1 checkpoint is now")
    llm: str | None = option(None, "where its language model is now")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")


def main() -> None:
    cfg = parse(Config)
    if cfg.n < 2:
        raise UserError(f"--n must be 2 or more, not {cfg.n}: a covariance needs 2 samples")
    folder = weights.checkpoint_folder(cfg.ckpt)
    device, dtype = weights.choose_device(cfg.device)
    data, images = question_file(folder, cfg.data, cfg.images, "val.jsonl")
    model = weights.load(folder, cfg.vision, cfg.llm, dtype, device)
    batches = pairs(folder, data, images, cfg.n)
    try:
        result = measure(model, batches)
    except ValueError as e:
        raise UserError(f"{folder}: {e}") from None
    for k, distance in enumerate(result["layers"], 1):
        print(f"layer {k:3}  {distance:10.4f}  {'█' * round(40 * distance / max(result['layers']))}")
    print(json.dumps({k: round(v, 4) for k, v in result.items() if k != "layers"}))


if __name__ == "__main__":
    run(main)
