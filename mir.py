"""MIR, the Modality Integration Rate: how far apart image and text tokens lie inside the language model.

Deciphering Cross-Modal Alignment in Large Vision-Language Models with Modality Integration Rate, arXiv 2410.07167.

    f_v^k, f_t^k = image and text tokens of layer k, of all image-text pairs                          (1)
    α_k = 1 / mean ‖t‖ over the text tokens t of layer k                                              (2)
    MIR = log10 Σ_k FID(ω(α_k f_v^k), ω(α_k f_t^k))               ω: 3σ outliers by ℓ2 norm           (3)
    FID(f_v, f_t) = ‖μ_v − μ_t‖² + Tr(Σ_v + Σ_t − 2 (Σ_v Σ_t)^{1/2})
    μ = mean of the tokens f,  Σ = Σ_i (f_i − μ)(f_i − μ)ᵀ / (n − 1)                                  (4)

    symbol   variable             shape
    f_v^k    vision               (n,D)  image tokens of layer k = 1..L
    f_t^k    text                 (m,D)  text tokens of layer k: every token after the image
    μ, Σ     Moments              (D,), (D,D)
    C        squares              (r,r)  Lᵀ Σ_t L, where L Lᵀ = Σ_v

Where the paper is silent
* The last layer is taken after the final norm, the others as they leave the layer (what transformers calls
  hidden_states[1..L]). Layer 0, the projector's output, is not summed. Images are padded to a square; published values
  were of stage-1 models with the centre cropped (--as-released).
* ω: tokens with |norm − median| > 3 std. The released code puts the per-dimension median in their place (default);
  the paper's words are that they are dropped (outliers="drop").
* The square root: (Σ_v Σ_t)^{1/2} is never formed. Its trace is the sum of the roots of the eigenvalues of the
  symmetric C, in float64 (common/roots.py). L has only as many columns as Σ_v has variance above rounding, or each of
  the others would add 1e-8; its columns fall in size, which keeps the digits of small eigenvalues.
* Covariances: products in float64. In float32, half the time, where Σ is well conditioned and the distance no small
  difference of traces; that costs the distance up to 2e-7 of itself.
* The released script keeps every token of every layer (37 GB for LLaVA-7B and 100 pairs). Here the moments are sums
  about a mean that a pass before has found, the medians are found a byte a pass (`Stream`), and both add up over ranks:
  16 D² bytes a layer (8.6 GB), however many pairs.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.files import refuse_existing, write_json
from common.flags import UserError, option, parse, run
from common.parallel import choose_device, explain_lost_ranks, finish, start
from common.roots import cholesky, five_rounds, newton_schulz, root_trace
from common.streams import Stream, add_up, check_tokens, gram, mean, outlier_bounds, place
from data import TEMPLATES, Batch
from hub.checkpoint import load_model
from hub.pairs import choose_pairs, pair_batches
from hub.usage import model_folder
from methods.ce import next_token_loss
from model import Llava, Output

Mode = Literal["exact", "newton-schulz", "released"]
Outliers = Literal["median", "drop"]


# ------------------------------------------------------------------------------------- the distance
class Moments(NamedTuple):
    mean: Tensor            # (D,)
    covariance: Tensor      # (D,D)

    def scaled(self, alpha: float) -> "Moments":
        """The moments of alpha · f."""
        return Moments(alpha * self.mean, alpha ** 2 * self.covariance)


def moments(tokens: Tensor, products: torch.dtype = torch.float64) -> Moments:
    """Of tokens (n,D), in float64. products: see `gram`."""
    centre = mean(tokens)                           # (D,) first: products of uncentred tokens would cancel
    return Moments(centre, gram(tokens, centre, products) / (len(tokens) - 1))  # eq. (4)


def distance(v: Moments, t: Moments, mode: Mode = "exact") -> tuple[float, float]:
    """(Fréchet distance, residual of the square root). The residual is 0 except for newton-schulz."""
    if mode == "exact":
        root, residual = root_trace(v.covariance, t.covariance), 0.0            # of a symmetric matrix: no iteration
    elif mode == "newton-schulz":
        y, residual = newton_schulz(v.covariance @ t.covariance)                # a real root, to compare speed with
        root = y.trace()
    elif mode == "released":
        v, t = (Moments(m.mean.float(), m.covariance.float()) for m in (v, t))      # it computes in float32
        root, residual = five_rounds(v.covariance @ t.covariance).trace(), 0.0
    else:
        raise ValueError(f"mode {mode!r} is not known: exact, newton-schulz, released are")
    between = (v.mean - t.mean).pow(2).sum() + v.covariance.trace() + t.covariance.trace() - 2 * root      # eq. (3)
    if mode != "released":
        between = between.clamp(min=0)                                          # below 0 by rounding
    return between.item(), residual


def well_conditioned(tokens: Tensor) -> bool:
    """True if products in float32 suffice for the covariance of tokens (n,D) and save time: there are many, of no more
    digits, and the covariance of a sample of 1.5 D of them is well conditioned."""
    n, D = tokens.shape
    if tokens.dtype == torch.float64 or D < 256 or n < 4 * D:
        return False
    # Pivots far above rounding: no direction is nearly empty, so float32's 7 digits lose nothing that counts.
    return cholesky(moments(tokens[::2 * n // (3 * D)], torch.float32).covariance, least=1e-4) is not None


def frechet_distance(x: Tensor, y: Tensor, mode: Mode = "exact") -> float:
    """Fréchet distance between the Gaussians of two token sets x (n,D) and y (m,D), at least 2 tokens each; its error
    is below 1e-6 of it. Inputs are not modified. Raises ValueError if they are too few or not finite."""
    check_tokens("first", x)
    check_tokens("second", y)
    if mode == "exact" and well_conditioned(x) and well_conditioned(y):
        v, t = moments(x, torch.float32), moments(y, torch.float32)
        found = distance(v, t)[0]
        # Float32 costs up to 2e-8 of the traces: too much if the distance is a small part of them.
        if found > 0.1 * (v.covariance.trace() + t.covariance.trace()):
            return found
    return distance(moments(x), moments(y), mode)[0]


# ----------------------------------------------------------------------------------------- the rate
def replace_outliers(tokens: Tensor, outliers: Outliers) -> Tensor:
    """ω of eq. (3): tokens (n,D) with |norm − median| > 3 std replaced by the per-dimension median, or dropped."""
    norms = tokens.norm(dim=1)                                                  # (n,) a token is far by its norm alone
    median, width = outlier_bounds(norms)
    far = (norms - median).abs() > width
    return tokens[~far] if outliers == "drop" else torch.where(far[:, None], tokens.median(0).values, tokens)


def log_sum(distances: list[float]) -> float:
    total = math.fsum(distances)
    if not total >= 0:
        raise ValueError(f"the layers' distances add up to {total:.3g}, which has no logarithm: only the released "
                         "arithmetic can do that; use mode exact")
    return math.log10(total) if total else -math.inf


def modality_integration_rate(layers: list[tuple[Tensor, Tensor]], mode: Mode = "exact",
                              outliers: Outliers = "median", normalise: bool = True) -> tuple[float, list[float]]:
    """(MIR, distance per layer) of a list of (vision (n,D), text (m,D)) pairs, one a layer. normalise=False leaves out
    α (figure 7). Raises ValueError naming the layer (from 1) whose tokens are too few or not finite."""
    distances = []
    for k, (vision, text) in enumerate(layers, 1):
        for name, t in (("vision", vision), ("text", text)):
            check_tokens(f"layer {k}: {name}", t)
        vision, text = vision.double(), text.double()                           # eq. (1)
        alpha = 1 / text.norm(dim=1).mean() if normalise else 1.0               # eq. (2)
        # α scales all norms alike, so the same tokens are outliers before and after.
        v, t = (moments(replace_outliers(alpha * x, outliers)) for x in (vision, text))
        distances.append(distance(v, t, mode)[0])
    return log_sum(distances), distances                                        # eq. (3)


# --------------------------------------------------------------------------------------- of a model
def visit(model: Llava, batch: Batch, see) -> tuple[Output, Tensor]:
    """Run one batch and call see(k, vision (n,D), text (m,D)) with the tokens of each layer k = 1..L. Returns the
    model's output and where the text is, (B,T) bool."""
    after = batch.text_after_image()
    depth = model.language_model.config.num_hidden_layers

    def watch(k: int, h: Tensor, _) -> None:
        if k < depth:                               # the last layer's output is seen below, after the norm
            see(k, h[batch.image_mask], h[after])
    out = model(batch, watch)
    see(depth, out.hidden_states[batch.image_mask], out.hidden_states[after])
    return out, after


class Beside:
    """What stands beside MIR, from sums over the same pairs: loss per answer token (nats) and perplexity, which the
    paper compares it with, and the scales that explain most of it. |V| and var V are of the projector's output (mean
    norm of a token; variance summed over dimensions), |text| is the mean norm of a word embedding."""
    def __init__(self, dim: int, device):
        self.V_sum = torch.zeros(dim, dtype=torch.float64, device=device)       # Σ V
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)          # in the order of `add`

    def add(self, model: Llava, batch: Batch, out: Output, after: Tensor) -> None:
        head = model.language_model.lm_head
        V = out.image_embeds[batch.has_image].flatten(0, 1).double()            # (n,D)
        words = out.text_embeds[after].double().norm(dim=1)                     # (m,)
        # A sum and a count, as in training: ranks add up theirs, then divide once.
        loss, answers = next_token_loss(out.hidden_states, batch.labels, head.weight, head.bias)
        self.V_sum += V.sum(0)
        self.sums += torch.stack([V.new_tensor(len(V)), V.norm(dim=1).sum(), V.pow(2).sum(),
                                  V.new_tensor(len(words)), words.sum(), answers.double(), loss.double()])

    def results(self) -> dict:
        """The means over all ranks' pairs."""
        # Σ (V − mean)² = Σ V² − |Σ V|² / n, summed over dimensions.
        V_mean_square = add_up(self.V_sum).pow(2).sum().item()
        n, V_norms, V_squares, m, word_norms, answers, loss = add_up(self.sums).tolist()
        ce = loss / answers if answers else None
        return {"V_norm": V_norms / n, "V_var": (V_squares - V_mean_square / n) / (n - 1), "text_norm": word_norms / m,
                "answer_ce": ce, "perplexity": None if ce is None else math.exp(ce)}


def one_pass(model: Llava, batches, streams: list[list[Stream]], step: int, beside: Beside | None) -> None:
    """Add every batch to the streams, each rank a share of them, and to `beside` if there is one."""
    rank, ranks = place()
    device = next(model.parameters()).device
    # All ranks run the same number of forward passes, or FSDP deadlocks. Repeated batches are not counted.
    turns = range(-(-len(batches) // ranks))
    for i in tqdm(turns, f"MIR, pass {step + 1}", leave=False, disable=rank > 0 or None):
        j = i * ranks + rank
        counted = j < len(batches)
        batch = batches[j % len(batches)].to(device)

        def see(k: int, vision: Tensor, text: Tensor, counted=counted) -> None:
            if counted:
                streams[k - 1][0].add(vision, step)
                streams[k - 1][1].add(text, step)
        out, after = visit(model, batch, see)
        if counted and beside is not None:
            beside.add(model, batch, out, after)


def layer_distances(streams: list[list[Stream]], mode: Mode, normalise: bool) -> tuple[list[float], float]:
    """(distance per layer, the largest residual of a square root). Each rank computes every ranks-th layer."""
    rank, ranks = place()
    found = torch.zeros(len(streams), 2, dtype=torch.float64, device=streams[0][0].sum.device)
    for k in range(rank, len(streams), ranks):      # rows of other ranks stay 0, so their sum is the whole
        alpha = 1 / streams[k][1].norms.mean().item() if normalise else 1.0     # eq. (2)
        # α is known only now, after the passes; it scales a mean by α and a covariance by α².
        v, t = (Moments(*s.mean_and_covariance()).scaled(alpha) for s in streams[k])
        found[k] = found.new_tensor(distance(v, t, mode))
    distances, residuals = add_up(found).T.tolist()
    return distances, max(residuals)


@torch.no_grad()            # inference_mode would leave tensors behind that training cannot use, in a sharded model
def measure(model: Llava, batches, mode: Mode = "exact", outliers: Outliers = "median", normalise: bool = True) -> dict:
    """MIR of a model over a sequence of batches, each rank of torchrun taking its share of them; beside it what
    `Beside` says, and |h|, the mean norm of a final hidden state. The model is left as it was.

    Raises ValueError naming the layer whose tokens are too few or not finite."""
    c, device = model.language_model.config, next(model.parameters()).device
    streams = []
    for _ in range(c.num_hidden_layers):
        streams.append([Stream(c.hidden_size, device, outliers == "drop") for _ in ("vision", "text")])
    beside = Beside(c.hidden_size, device)
    modes = {module: module.training for module in model.modules()}     # to be put back: training may go on
    model.eval()
    try:
        step = 0            # two passes for the moments, more while a median is not complete
        while step < 2 or any(s.median is not None for layer in streams for s in layer):
            one_pass(model, batches, streams, step, beside if step == 0 else None)
            # Ranks meet here: sums and counts of bytes are added up over them.
            for k, layer in enumerate(streams, 1):
                for name, s in zip(("vision", "text"), layer):
                    s.close(f"layer {k}: {name}", step)
            step += 1
    finally:
        for module, training in modes.items():
            module.training = training
    distances, residual = layer_distances(streams, mode, normalise)
    h_norm = torch.cat([s.norms for s in streams[-1]]).mean().item()
    return {"mir": log_sum(distances), "layers": distances, "residual": residual, "h_norm": h_norm, **beside.results()}


# ------------------------------------------------------------------------------------- command line
@dataclass
class MIRConfig:
    """Measure the Modality Integration Rate of a checkpoint."""
    ckpt: str = option("out/toy", "a checkpoint's folder, or a run's (its newest one), or a released LLaVA", "run")
    out: str | None = option(None, "a JSON file for all the numbers; unset: they are only printed")
    overwrite: bool = option(False, "replace the file in --out")
    batch_size: int = option(20, "pairs at a time, on a rank", least=1)

    data: str | None = option(None, "pairs: questions or LLaVA samples; unset: the toy's validation questions", "pairs")
    images: str | None = option(None, "the folder of their images; with --texts: what to pair, a folder or a JSON")
    texts: str | None = option(None, "texts for --images, paired at random: a folder (.story, .txt), .txt, JSON, JSONL")
    n: int = option(100, "how many image-text pairs: a covariance needs 2", least=2)
    seed: int | None = option(None, "draws the pairs; unset: the first ones of --data, and seed 0 for --texts")
    template: Literal[tuple(TEMPLATES)] | None = option(None, "how a pair is written; plain: the image and the text "
                                                        "alone; unset: as the model was trained, v1 after stage 1")
    as_released: bool = option(False, "prepare pairs as published numbers did: images as in training, text never cut, "
                                      "the newline of an empty question kept")

    mode: Literal["exact", "newton-schulz", "released"] = option("exact", "released: the published arithmetic", "MIR")
    outliers: Literal["median", "drop"] = option("median", "what replaces them: the median as released; drop: nothing, "
                                                           "as the paper writes")
    no_normalise: bool = option(False, "leave the scale of each layer as it is (the paper's figure 7)")

    vision: str | None = option(None, "folder of the vision encoder; unset: where the checkpoint says", "model")
    llm: str | None = option(None, "folder of the language model; unset: where the checkpoint says")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 where the GPU has it")


def show(result: dict) -> str:
    """The printed form of what `measure` returns."""
    lines, most = [], max(result["layers"]) or 1.0
    for k, d in enumerate(result["layers"], 1):
        lines.append(f"layer {k:3}  {d:12.4f}  {'█' * max(0, round(40 * d / most))}")
    lines.append(f"\nMIR {result['mir']:.3f}, the log10 of their sum")
    if result["residual"]:
        lines[-1] += f"; residual of the square roots ≤ {result['residual']:.1e}"
    if result["answer_ce"] is not None:
        lines.append(f"loss {result['answer_ce']:.3f} nats per answer token, perplexity {result['perplexity']:.2f}")
    lines.append(f"|V| {result['V_norm']:.1f}   var V {result['V_var']:.0f}   |text| {result['text_norm']:.1f}   "
                 f"|h| {result['h_norm']:.1f}")
    return "\n".join(lines)


def check(cfg: MIRConfig) -> None:
    """Raise UserError for settings that cannot be, before any long work."""
    if cfg.out and not Path(cfg.out).parent.is_dir():
        raise UserError(f"--out {cfg.out}: there is no folder {Path(cfg.out).parent}")
    refuse_existing(None if cfg.overwrite else cfg.out)


def main() -> None:
    cfg = parse(MIRConfig)
    check(cfg)
    folder = model_folder(cfg.ckpt)
    samples, images = choose_pairs(folder, cfg.data, cfg.images, cfg.texts, cfg.n, cfg.seed)
    batches = pair_batches(folder, samples, images, cfg.template, cfg.batch_size, cfg.vision, cfg.as_released)
    ranks = start(*choose_device(cfg.device, cfg.dtype), minutes=60)
    with explain_lost_ranks(ranks):
        model = load_model(folder, cfg.vision, cfg.llm, ranks.dtype, ranks.device)
        try:
            result = measure(model, batches, cfg.mode, cfg.outliers, not cfg.no_normalise)
        except ValueError as e:
            raise UserError(f"{folder}: {e}") from None
    if ranks.first:
        cfg.template = batches.samples.format.template              # what was used where the flag was unset
        notes = [f"{folder}: {len(samples)} image-text pairs", cfg.template, cfg.mode, f"outliers {cfg.outliers}"]
        if cfg.no_normalise:
            notes.append("without normalisation")
        if cfg.as_released:
            notes.append("inputs as released")
        print(", ".join(notes) + "\n\n" + show(result), flush=True)
        if cfg.out:
            settings = {**vars(cfg), "checkpoint": str(folder), "pairs": len(samples), "dtype": str(ranks.dtype)}
            write_json(Path(cfg.out), {**result, "settings": settings})
    finish(ranks)


if __name__ == "__main__":
    run(main)
