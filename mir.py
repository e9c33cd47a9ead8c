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
    C        product              (r,s)  L_vᵀ L_t, where L Lᵀ = Σ

Where the paper is silent
* The last layer is taken after the final norm, the others as they leave the layer (what transformers calls
  hidden_states[1..L]). Layer 0, the projector's output, is not summed. Images are padded to a square.
* ω: tokens with |norm − median| > 3 std. The released code puts the per-dimension median in their place (default);
  the paper's words are that they are dropped (outliers="drop").
* The square root: (Σ_v Σ_t)^{1/2} is never formed. Its trace is the sum of the singular values of C, the roots of the
  eigenvalues of the symmetric CᵀC, in float64. Where Σ is singular (fewer tokens than dimensions), L has only as many
  columns as Σ has eigenvalues above rounding: the root of each of the others would add 1e-8. Where the eigenvalues of
  CᵀC span more than 1e10, squaring has cost the small ones, and the singular values are computed as such.
* The released script keeps every token of every layer (37 GB for LLaVA-7B and 100 pairs). Here the moments are sums
  about a mean that a pass before has found, the medians are found a byte a pass (`Stream`), and both add up over ranks:
  16 D² bytes a layer (8.6 GB), however many pairs.
"""
import json
import math
import os
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common.files import read_json
from common.flags import UserError, option, parse, run
from common.parallel import choose_device
from data import TEMPLATES, Batch, Format, Samples
from hub.checkpoint import checkpoint_folder, is_released, load_model
from hub.configs import load_processor, vision_config
from hub.samples import question_file
from hub.tokenizer import load_tokenizer
from methods.ce import next_token_loss
from model import Llava, Output
from pairing import Batches, mix_pairs, read_pairs

Mode = Literal["exact", "newton-schulz", "released"]
Outliers = Literal["median", "drop"]


# ------------------------------------------------------------------------------------------------ the distance
class Moments(NamedTuple):
    mean: Tensor            # (D,)
    covariance: Tensor      # (D,D)


def gram(x: Tensor, centre: Tensor | float = 0.0) -> Tensor:
    """Σ_i (x_i − c)(x_i − c)ᵀ (D,D) of x (n,D), in float64. It is symmetric: a quarter of its rows at a time, from the
    diagonal on; and 512 tokens at a time, which in float64 fit the cache where all of them may not fit the memory."""
    D = x.shape[1]
    out, step = x.new_zeros(D, D, dtype=torch.float64), -(-D // 4)
    for part in x.split(512):
        part = part.double() - centre
        for i in range(0, D, step):
            out[i:i + step, i:].addmm_(part[:, i:i + step].T, part[:, i:])
    return out.triu() + out.triu(1).T


def moments(tokens: Tensor) -> Moments:
    """Of tokens (n,D), in float64."""
    mean = tokens.mean(0, dtype=torch.float64)                                  # (D,)
    return Moments(mean, gram(tokens, mean) / (len(tokens) - 1))                # eq. (4)


def factor(covariance: Tensor) -> Tensor:
    """L (D,r) with L Lᵀ = Σ (D,D) of rank r: Cholesky's, and where that is not safe, from the eigenvectors."""
    L, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and L.diagonal().min() > 1e-5 * L.diagonal().max():
        return L
    values, vectors = torch.linalg.eigh(covariance)                             # (D,) ascending, (D,D)
    kept = values > 4 * len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def root_trace(v: Tensor, t: Tensor) -> Tensor:
    """Tr (Σ_v Σ_t)^{1/2}, exactly: the sum of the singular values of C = L_vᵀ L_t."""
    product = factor(v).T @ factor(t)                                           # (r,s)
    if product.numel() == 0:
        return v.new_zeros(())                                                  # tokens that are all the same
    product = product if product.shape[0] >= product.shape[1] else product.T
    squares = torch.linalg.eigvalsh(gram(product))                              # (min(r,s),) ascending
    if squares[0] > 1e-10 * squares[-1]:
        return squares.sqrt().sum()
    return torch.linalg.svdvals(product).sum()                                  # squaring would lose the small ones


def newton_schulz(a: Tensor, steps: int = 100) -> tuple[Tensor, float]:
    """(Y, residual): Y ≈ A^{1/2} of a (D,D) with real eigenvalues ≥ 0, by matrix products alone; the residual is
    ‖Y² − A‖ / ‖A‖ (Frobenius). Divided by its norm, A has eigenvalues in [0,1], where each step makes the residual
    smaller, until it is rounding: there the iteration ends. Roots below about 1e-8 of the largest are lost in it."""
    scale = a.norm()
    if scale == 0:
        return a, 0.0
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    a = a / scale
    y, z, root, residual = a, eye, a, math.inf
    for _ in range(steps):
        left = (y @ y - a).norm().item()
        if not left < residual:
            break
        root, residual = y, left
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z                                                     # → A^{1/2}, A^{-1/2}
    return root * scale.sqrt(), residual


def distance(v: Moments, t: Moments, mode: Mode = "exact") -> tuple[float, float]:
    """(Fréchet distance, residual of the square root). The residual is 0 but for newton-schulz."""
    residual = 0.0
    if mode == "exact":
        root = root_trace(v.covariance, t.covariance)
    elif mode == "newton-schulz":
        y, residual = newton_schulz(v.covariance @ t.covariance)
        root = y.trace()
    elif mode == "released":
        # For A = Σ_v Σ_t the released code's fast mode, its default, repeats five times, from Y = A and Z = I,
        #     Y ← (Y + Z⁻¹A) / 2,  Z ← (Z + Y⁻¹A) / 2.
        # That is where it ends, too: Y ← (A + A) / 2 = A and Z ← (I + A⁻¹A) / 2 = I. So A stands where its root should,
        # the distance of a set to itself is not 0, and below 0 is possible. (Its matrices are float32, and A⁻¹ is noise
        # where tokens are fewer than dimensions; this is the arithmetic without rounding.)
        root = (v.covariance * t.covariance).sum()                              # Tr Σ_v Σ_t
    else:
        raise ValueError(f"mode {mode!r} is not known: exact, newton-schulz, released are")
    between = (v.mean - t.mean).pow(2).sum() + v.covariance.trace() + t.covariance.trace() - 2 * root      # eq. (3)
    return between.item() if mode == "released" else max(between.item(), 0.0), residual


def check_tokens(name: str, tokens: Tensor) -> None:
    if len(tokens) < 2 or not tokens.isfinite().all():
        raise ValueError(f"{name} tokens: " + ("some are not finite" if len(tokens) > 1 else
                                               f"{len(tokens)}, but a covariance needs 2"))


def frechet_distance(x: Tensor, y: Tensor, mode: Mode = "exact") -> float:
    """Fréchet distance between the Gaussians of two token sets x (n,D) and y (m,D), in float64; at least 2 tokens each.
    Inputs are not modified. Raises ValueError if they are too few or not finite."""
    check_tokens("first", x)
    check_tokens("second", y)
    return distance(moments(x), moments(y), mode)[0]


# ------------------------------------------------------------------------------------------------ the rate
def outlier_bounds(norms: Tensor) -> tuple[Tensor, Tensor]:
    """(median, 3 std) of norms (n,): what is farther from the median than that is an outlier."""
    norms = norms.sort().values                             # sums do not depend on the order that tokens came in
    return norms.median(), 3 * norms.std()


def replace_outliers(tokens: Tensor, outliers: Outliers) -> Tensor:
    """ω of eq. (3): tokens (n,D) with |norm − median| > 3 std replaced by the per-dimension median, or dropped."""
    norms = tokens.norm(dim=1)                                                  # (n,)
    median, width = outlier_bounds(norms)
    far = (norms - median).abs() > width
    return tokens[~far] if outliers == "drop" else torch.where(far[:, None], tokens.median(0).values, tokens)


def log_sum(distances: list[float]) -> float:
    total = math.fsum(distances)
    if total < 0:
        raise ValueError(f"the layers' distances add up to {total:.3g}, which has no logarithm: that is the released "
                         "arithmetic; mode exact cannot fall below 0")
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
        v, t = (moments(replace_outliers(alpha * x, outliers)) for x in (vision, text))
        distances.append(distance(v, t, mode)[0])
    return log_sum(distances), distances                                        # eq. (3)


# ------------------------------------------------------------------------------------------------ keeping no tokens
def add_up(t: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(t)
    return t


def gather(t: Tensor) -> Tensor:
    """Every rank's t, one after the other, on the CPU."""
    parts = [t.cpu()]
    if dist.is_available() and dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, t.cpu())
    return torch.cat(parts)


class Median:
    """The exact (lower) median of every dimension, a byte a pass from the highest: of the values that agree with it so
    far, count which have which byte next; the one where the middle value lies is its next byte (radix selection).

    Bits of floats are in the order of integers once those below the sign are flipped in negative ones."""
    def __init__(self, dim: int, device):
        self.base = torch.full((dim,), -128, device=device)                     # (D,) the bytes so far, times 256
        self.counts = torch.zeros(256, dim, dtype=torch.int32, device=device)
        self.dtype, self.shift, self.value = None, None, None

    def add(self, x: Tensor) -> None:
        if self.shift is None:
            self.dtype, self.shift = x.dtype, 8 * (x.element_size() - 1)
        key = self.flip(x.view(self.integer()).long())                          # (n,D)
        byte = (key >> self.shift) - self.base                                  # 0..255 if all before it agree
        agree = (byte >= 0) & (byte < 256)
        self.counts.scatter_add_(0, byte.clamp(0, 255), agree.int())

    def close(self, middle: Tensor) -> Tensor:
        """Ends a pass. middle (D,): how many of the values that agree so far lie below the median; returns it anew."""
        below = add_up(self.counts).cumsum(0)                                   # (256,D)
        byte = (below <= middle).sum(0)                                         # (D,)
        middle = middle - below.gather(0, (byte - 1).clamp(min=0)[None])[0].where(byte > 0, 0)
        self.base += byte
        if self.shift == 0:
            self.value = self.flip(self.base).to(self.integer()).view(self.dtype).double()
        self.base, self.shift = self.base * 256, self.shift - 8
        self.counts.zero_()
        return middle

    def integer(self) -> torch.dtype:
        return {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.dtype.itemsize]

    def flip(self, key: Tensor) -> Tensor:
        return key ^ ((key >> 63) & torch.iinfo(self.integer()).max)


class Stream:
    """The moments of ω(f) for one modality of one layer, from passes over the same batches of tokens.

    Pass 0 keeps the norm of every token and their mean, pass 1 adds up the moments of all but the outliers about that
    mean (so that nothing cancels), and the medians for the outliers' places take a pass for every byte of the tokens'
    dtype, those two included: bfloat16 is done after 2 passes, float32 after 4 if there are outliers."""
    def __init__(self, dim: int, device, outliers: Outliers):
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)         # Σ f, then Σ (f − centre)
        self.scatter = None                                                     # Σ (f − centre)(f − centre)ᵀ
        self.norms = array("d")         # not tensors: a small one kept of each batch would keep the heap from shrinking
        self.median = Median(dim, device) if outliers == "median" else None
        self.drop = outliers == "drop"

    def add(self, x: Tensor, step: int) -> None:
        """x (n,D), in the same dtype and with the same values in every pass."""
        f = x.double()
        norms = f.norm(dim=1)                                                   # (n,)
        if step == 0:
            self.norms.extend(norms.tolist())
            self.sum += f.sum(0)
        elif step == 1:
            f = f[(norms - self.middle).abs() <= self.width]
            self.sum += (f - self.centre).sum(0)
            self.scatter += gram(f, self.centre)
        if self.median is not None:
            self.median.add(x)

    def close(self, name: str, step: int) -> None:
        """Ends a pass, together with the other ranks. Raises ValueError after pass 0 if tokens cannot be used."""
        if step == 0:
            norms = gather(torch.tensor(self.norms, dtype=torch.float64)).to(self.sum.device)
            check_tokens(name, norms)
            self.n, self.norms = len(norms), norms.sort().values
            self.middle, self.width = outlier_bounds(norms)
            self.far = int(((norms - self.middle).abs() > self.width).sum())
            self.centre = add_up(self.sum) / self.n
            self.sum, self.scatter = torch.zeros_like(self.sum), self.sum.new_zeros(len(self.sum), len(self.sum))
            self.rank = torch.full_like(self.sum, (self.n - 1) // 2, dtype=torch.int64)
            if not self.far:
                self.median = None
        elif step == 1:
            add_up(self.sum)
            add_up(self.scatter)
        if self.median is not None:
            self.rank = self.median.close(self.rank)
            if self.median.value is not None:
                shift = self.median.value - self.centre
                self.sum += self.far * shift
                self.scatter += self.far * torch.outer(shift, shift)
                self.median = None

    def moments(self, alpha: float) -> Moments:
        """Of ω(α f)."""
        n = self.n - self.far * self.drop
        mean = self.sum / n
        covariance = (self.scatter - n * torch.outer(mean, mean)) / (n - 1)
        return Moments(alpha * (self.centre + mean), alpha ** 2 * covariance)


def visit(model: Llava, batch: Batch, see) -> tuple[Output, Tensor]:
    """Calls see(k, vision (n,D), text (m,D)) with the tokens of each layer k = 1..L of one batch; returns the model's
    output and where the text is, (B,T)."""
    after = batch.text_after_image()
    depth = model.language_model.config.num_hidden_layers

    def watch(k: int, h: Tensor, _) -> None:
        if k < depth:
            see(k, h[batch.image_mask], h[after])
    out = model(batch, watch)
    see(depth, out.hidden_states[batch.image_mask], out.hidden_states[after])   # the last one after the norm
    return out, after


@torch.no_grad()            # inference_mode would leave tensors behind that training cannot use, in a sharded model
def measure(model: Llava, batches, mode: Mode = "exact", outliers: Outliers = "median", normalise: bool = True) -> dict:
    """MIR of a model over a sequence of batches, each rank of torchrun taking its share of them. Beside it what the
    paper compares it with on the same pairs, cross-entropy per answer token (nats) and perplexity, and the scales that
    explain most of what it does: |V| and var V of the projector's output (mean norm of a token, variance summed over
    dimensions), |text| of word embeddings, |h| of final states. The model is left as it was.

    Raises ValueError naming the layer whose tokens are too few or not finite."""
    c, device = model.language_model.config, next(model.parameters()).device
    together = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    streams = [[Stream(c.hidden_size, device, outliers) for _ in range(2)] for _ in range(c.num_hidden_layers)]
    every = [(f"layer {k}: {name}", s) for k, two in enumerate(streams, 1) for name, s in zip(("vision", "text"), two)]
    totals = torch.zeros(7, dtype=torch.float64, device=device)
    V_sum = torch.zeros(c.hidden_size, dtype=torch.float64, device=device)
    head, step = model.language_model.lm_head, 0
    modes = {module: module.training for module in model.modules()}
    model.eval()
    while step < 2 or any(s.median is not None for _, s in every):
        # Every rank runs as many batches, or a sharded model would wait for ever: what is left over counts for nobody.
        for i in tqdm(range(-(-len(batches) // ranks)), f"MIR, pass {step + 1}", leave=False, disable=rank > 0 or None):
            j = i * ranks + rank
            counted = j < len(batches)
            batch = batches[j % len(batches)].to(device)

            def see(k: int, *tokens: Tensor) -> None:
                for s, x in zip(streams[k - 1], tokens):                        # noqa: B023
                    s.add(x[:len(x) * counted], step)                           # noqa: B023
            out, after = visit(model, batch, see)
            if step == 0 and counted:
                V = out.image_embeds[batch.has_image].flatten(0, 1).double()    # (n,D)
                words = out.text_embeds[after].double().norm(dim=1)
                loss, answers = next_token_loss(out.hidden_states, batch.labels, head.weight, head.bias)
                totals += torch.stack([x.double() for x in (
                    V.norm(dim=1).sum(), V.pow(2).sum(), V.new_tensor(len(V)), words.sum(), V.new_tensor(len(words)),
                    loss, answers)])
                V_sum += V.sum(0)
        for name, s in every:
            s.close(name, step)
        step += 1
    for module, training in modes.items():
        module.training = training
    V_norms, V_squares, n, word_norms, m, loss, answers = add_up(totals).tolist()
    results = []
    for vision, text in streams:
        alpha = 1 / text.norms.mean().item() if normalise else 1.0              # eq. (2)
        results.append(distance(vision.moments(alpha), text.moments(alpha), mode))
    layers, residuals = zip(*results)
    ce = loss / answers if answers else None
    h = torch.cat([s.norms for s in streams[-1]])
    return {"mir": log_sum(layers), "layers": list(layers), "residual": max(residuals),
            "V_norm": V_norms / n, "V_var": ((V_squares - add_up(V_sum).pow(2).sum().item() / n) / (n - 1)),
            "text_norm": word_norms / m, "h_norm": h.mean().item(), "answer_ce": ce,
            "perplexity": None if ce is None else math.exp(ce)}


# ------------------------------------------------------------------------------------------------ on image-text pairs
def pairs(folder: Path, data: Path, images: Path, n: int, batch_size: int = 20) -> Batches:
    """The first n questions with an image of a file, with their answers, in the v1 template, as batches."""
    return batches_of(folder, read_pairs(data, images, n), images, "v1", batch_size)


def batches_of(folder: Path, samples: list[dict], images: Path, template: str, batch_size: int,
               vision: Path | None = None) -> Batches:
    """Samples as a checkpoint reads them. vision: the folder of its vision encoder, where it has none inside."""
    c, vision = read_json(folder / "config.json"), vision or folder
    processor = load_processor(vision)
    text = Format(template, vision_config(vision).image_tokens, c.get("max_length", 2048), True,
                  c.get("after_special", "4.31"))
    return Batches(Samples(samples, images, load_tokenizer(folder), processor, text), batch_size)


def held_out(data: Samples, path: Path, images: Path, n: int = 100) -> list[Batch]:
    """The first n pairs of a file, as `data` of a training run is read (in v1 where that is plain), for --mir-every."""
    text = replace(data.format, template="v1" if data.format.template == "plain" else data.format.template, pad=True)
    samples = Samples(read_pairs(path, images, n), images, data.tokenizer, data.processor, text)
    return list(Batches(samples, 20))


# ------------------------------------------------------------------------------------------------ command line
@dataclass
class Config:
    """Measure the Modality Integration Rate of a checkpoint."""
    ckpt: str = option("out/toy", "a checkpoint's folder, or a run's (its newest checkpoint), or a released LLaVA")
    data: str | None = option(None, "pairs: questions or LLaVA's samples; unset: the toy's validation questions")
    images: str | None = option(None, "the folder of their images; with --texts: what to pair, a folder or a JSON")
    texts: str | None = option(None, "texts for --images, paired at random: a folder (.story, .txt), .txt, JSON, JSONL")
    n: int = option(100, "how many image-text pairs")
    seed: int | None = option(None, "draws the pairs; unset: the first of --data, and seed 0 for --texts")
    template: Literal[tuple(TEMPLATES)] = option("v1", "how a pair is written; plain: the image and the text alone")
    mode: Literal["exact", "newton-schulz", "released"] = option("exact", "released: as published numbers were made")
    outliers: Literal["median", "drop"] = option("median", "what becomes of them: median as released, drop as written")
    no_normalise: bool = option(False, "leave the scale of each layer as it is (the paper's figure 7)")
    out: str | None = option(None, "a JSON file for all the numbers")
    batch_size: int = option(20, "pairs at a time, on a rank")
    vision: str | None = option(None, "where the vision encoder of a stage-1 checkpoint, or of LLaVA's, is now")
    llm: str | None = option(None, "where its language model is now")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 where the GPU has it")


def choose_pairs(cfg: Config, folder: Path) -> tuple[list[dict], Path]:
    """(samples, image folder) of the command line, before any long work."""
    if cfg.texts is None:
        data, images = question_file(folder, cfg.data, cfg.images, "val.jsonl")
        return read_pairs(data, images, cfg.n, cfg.seed), images
    if cfg.data or not cfg.images:
        raise UserError("--texts is paired with --images DIR|JSON, and stands in the place of --data")
    for path in (cfg.images, cfg.texts):
        if not Path(path).exists():
            raise UserError(f"{path} does not exist")
    return mix_pairs(Path(cfg.images), Path(cfg.texts), cfg.n, cfg.seed or 0)


def show(result: dict) -> str:
    most = max(result["layers"]) or 1.0
    lines = [f"layer {k:3}  {d:12.4f}  {'█' * max(0, round(40 * d / most))}" for k, d in enumerate(result["layers"], 1)]
    residual = f"; residual of the square roots ≤ {result['residual']:.1e}" if result["residual"] else ""
    lines.append(f"\nMIR {result['mir']:.3f}, the log10 of their sum{residual}")
    if result["answer_ce"] is not None:
        lines.append(f"loss {result['answer_ce']:.3f} nats per answer token, perplexity {result['perplexity']:.2f}")
    return "\n".join(lines) + (f"\n|V| {result['V_norm']:.1f}   var V {result['V_var']:.0f}   "
                               f"|text| {result['text_norm']:.1f}   |h| {result['h_norm']:.1f}")


def main() -> None:
    cfg = parse(Config)
    for name, least in (("n", 2), ("batch_size", 1)):
        if getattr(cfg, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, not {getattr(cfg, name)}"
                            + ": a covariance needs 2 samples" * (name == "n"))
    if cfg.out and not Path(cfg.out).parent.is_dir():
        raise UserError(f"--out {cfg.out}: there is no folder {Path(cfg.out).parent}")
    released = is_released(Path(cfg.ckpt))
    folder = Path(cfg.ckpt) if released else checkpoint_folder(cfg.ckpt)
    device, dtype = choose_device(cfg.device, cfg.dtype)
    samples, images = choose_pairs(cfg, folder)
    batches = batches_of(folder, samples, images, cfg.template, cfg.batch_size,
                         Path(cfg.vision) if released and cfg.vision else None)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = load_model(folder, cfg.vision, cfg.llm, dtype, device)
    try:
        result = measure(model, batches, cfg.mode, cfg.outliers, not cfg.no_normalise)
    except ValueError as e:
        raise UserError(f"{folder}: {e}") from None
    if ranks == 1 or dist.get_rank() == 0:
        print(f"{folder}: {len(samples)} image-text pairs, {cfg.template}, {cfg.mode}, outliers {cfg.outliers}"
              + ", without normalisation" * cfg.no_normalise + "\n")
        print(show(result), flush=True)
        if cfg.out:
            settings = {**vars(cfg), "checkpoint": str(folder), "pairs": len(samples), "dtype": str(dtype)}
            Path(cfg.out).write_text(json.dumps({**result, "settings": settings}, indent=1) + "\n")
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)                 # as in train.py: taking the interpreter down under gloo's threads may abort it


if __name__ == "__main__":
    run(main)
