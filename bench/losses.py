"""Time and peak memory of a training step of every objective, as ratios to cross-entropy's.

    python -m bench.losses             ViT 6×256 (112 px, 64 image tokens), LLaMA 8×512, vocab 32000, B=8, 192 words
    python -m bench.losses --text 48   the same with short texts
    python -m bench.losses --gpu       7B shapes on a GPU: ViT-L/14-336 (576 tokens), LLaMA 32×4096, bf16, stage 1 alone

A step: forward, backward, clipping, AdamW. Every objective takes one step in turn, round after
round; times and their ratios are medians over rounds. Peak memory, of three steps, is measured in a
process of its own, beyond the model: gradients and optimiser are in it. basic-naive writes BASIC
down literally: all attention maps, both distributions whole.
"""
import statistics
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import in_own_process, memory, random_batch, reset_peak, step_loss
from common.flags import option, parse, run
from common.positions import at_image, true_positions
from data import Batch
from losses import Objective, Term, next_token
from methods.basic import layer_weights
from model import Decoder, DecoderConfig, Llava, Output, Projector, VisionConfig, ViT, rotary, rotate
from training.settings import TrainConfig

Stage = Literal["pretrain", "finetune"]


class Case(NamedTuple):
    loss: str
    moca: bool = False

    def __str__(self) -> str:
        return f"{self.loss} + moca" if self.moca else self.loss


CE, BASIC, NAIVE = Case("ce"), Case("basic"), Case("basic-naive")
NAMES = ("ce", "vdep", "vista", "basic")
CASES = [Case(loss, moca) for moca in (False, True) for loss in NAMES] + [NAIVE]


@dataclass
class Bench:
    """Compare a training step of every objective with one of cross-entropy."""
    gpu: bool = option(False, "7B shapes in bfloat16 on a GPU, stage 1 alone")
    text: int | None = option(None, "words a sample; unset: 192, with --gpu 64", least=1)
    batch: int = option(8, "samples", least=1)
    rounds: int = option(5, "steps that are timed, after one that is not", least=1)

    @property
    def shapes(self) -> tuple[VisionConfig, DecoderConfig]:
        if self.gpu:
            return VisionConfig(1024, 4096, 24, 16, 336, 14), DecoderConfig()
        return VisionConfig(256, 1024, 6, 4, 112, 14), DecoderConfig(32000, 512, 1376, 8, 8)

    @property
    def device(self) -> tuple[str, torch.dtype]:
        return ("cuda", torch.bfloat16) if self.gpu else ("cpu", torch.float32)


# --------------------------------------------------------------------------------- BASIC, literally
def naive_layers(model: Llava, h: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Run the language model on h (B,T,D). Returns of every layer h and attention map (B,H,T,T)."""
    lm, T = model.language_model, h.shape[1]
    positions = torch.arange(T, device=h.device)
    rope = rotary(positions, lm.config.head_dim, lm.config.rope_theta, h.dtype)
    causal = torch.ones(T, T, dtype=torch.bool, device=h.device).triu(1)
    states, maps = [], []
    for layer in lm.model["layers"]:
        a, x = layer.self_attn, layer.input_layernorm(h)
        q, k, v = (p(x).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
                   for p in (a.q_proj, a.k_proj, a.v_proj))
        scores = rotate(q, *rope) @ rotate(k, *rope).transpose(2, 3) / a.head_dim ** 0.5
        maps.append(scores.masked_fill(causal, -torch.inf).softmax(-1))
        h = h + a.o_proj((maps[-1] @ v).transpose(1, 2).flatten(2))
        h = h + layer.mlp(layer.post_attention_layernorm(h))
        states.append(h)
    return states, maps


def naive_basic(model: Llava, batch: Batch) -> list[Term]:
    """BASIC's eq. (4) to (8), written literally: all attention maps, both distributions (B,N,V)."""
    lm, text = model.language_model, model.language_model.embed(batch.input_ids)
    patches = model.encode_images(batch.pixel_values)
    image = model.multi_modal_projector(patches)                                        # (B,N,D)
    states, maps = naive_layers(model, model.merge(text, image, batch.image_mask))

    # What the first k layers make of the image, and where the text looks in them.
    k, n = len(states) // 2, image.shape[1]
    w, mask = layer_weights(k).tolist(), batch.image_mask
    v_hat = sum(w[i] * at_image(states[i], mask, n) for i in range(k)).detach()         # (B,N,D)
    rows = batch.text_after_image()                                                     # (B,T)
    attention = torch.stack(maps[:k]).mean((0, 2)).detach() * rows[..., None]           # (B,T,T)
    degree = attention.sum(1).gather(1, true_positions(mask, n))                        # (B,N)
    degree = degree / degree.sum(1, keepdim=True)

    E = lm.model["embed_tokens"].weight.detach()
    p, q = (v_hat @ E.T).log_softmax(-1), (image @ E.T).log_softmax(-1)                 # (B,N,V)
    das = degree * (F.normalize(image, dim=-1) - F.normalize(v_hat, dim=-1)).pow(2).sum(-1)
    sds = degree * (p.exp() * (p - q)).sum(-1)
    out = Output(lm.model["norm"](states[-1]), image, text, states[-1], patches)
    ce = next_token(model, batch, out)
    return [ce, Term("das", das.sum(), 1.0), Term("sds", sds.sum(), 0.01)]


# ------------------------------------------------------------------------------------------- a step
def make_model(b: Bench, stage: Stage, moca: bool) -> Llava:
    """A random model, with what the stage trains asking for gradients in float32."""
    vision, decoder = b.shapes
    device, dtype = b.device
    torch.manual_seed(0)
    with torch.device(device):
        vit, projector = ViT(vision), Projector(vision.hidden_size, decoder.hidden_size)
        model = Llava(vit, projector, Decoder(decoder))
        if moca:
            model.language_model.add_moca()
    if stage == "pretrain":
        model.to(dtype)
    model.requires_grad_(stage == "finetune")
    model.vision_tower.requires_grad_(False)
    model.multi_modal_projector.float().requires_grad_(True)
    if moca:
        model.language_model.moca.float().requires_grad_(True)
    model.language_model.recomputed = 10**9 if b.gpu else 0
    return model


def make_batch(b: Bench, stage: Stage, loss: str) -> Batch:
    """Stage 1: all of the text is supervised. Stage 2: the second half of every 16 words. VDEP in
    stage 1: every second sample is the image alone."""
    vision, decoder = b.shapes
    text = b.text or (64 if b.gpu else 192)
    position = torch.arange(vision.image_tokens + text)
    supervised = position > vision.image_tokens
    if stage == "finetune":
        supervised &= position % 16 >= 8
    alone = None
    if loss == "vdep" and stage == "pretrain":
        alone = torch.arange(b.batch) % 2 == 0
    batch = random_batch(b.batch, vision, decoder.vocab_size, text, supervised, alone)
    return batch.to(b.device[0])


class Stepper:
    """Training steps of one objective on a model."""
    def __init__(self, b: Bench, case: Case, stage: Stage, model: Llava):
        self.b, self.loss = b, case.loss.removesuffix("-naive")
        self.batch = make_batch(b, stage, case.loss)
        if case == NAIVE:
            self.terms = lambda batch: naive_basic(model, batch)
        else:
            self.terms = Objective(model, TrainConfig(loss=self.loss, moca=case.moca, stage=stage))
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)

    def step(self) -> float:
        """Make one step. Returns its seconds."""
        device, dtype = self.b.device
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            terms = self.terms(self.batch)
        step_loss(self.loss, terms, self.batch).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        if self.b.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def peak_of(b: Bench, case: Case, stage: Stage) -> float:
    """Return the peak memory of three steps beyond the model, in MiB."""
    stepper = Stepper(b, case, stage, make_model(b, stage, case.moca))
    if b.gpu:
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = memory("VmRSS")
        reset_peak()
    for _ in range(3):
        stepper.step()
    return (torch.cuda.max_memory_allocated() / 2**20 if b.gpu else memory("VmHWM")) - before


def compare(b: Bench, stage: Stage) -> None:
    peaks = {case: in_own_process(peak_of, b, case, stage) for case in CASES}
    models = {moca: make_model(b, stage, moca) for moca in (False, True)}
    steppers = {case: Stepper(b, case, stage, models[case.moca]) for case in CASES}
    rounds = [{case: s.step() for case, s in steppers.items()} for _ in range(1 + b.rounds)][1:]
    device, dtype = b.device
    shape, n = tuple(steppers[CE].batch.input_ids.shape), b.shapes[0].image_tokens
    print(f"\n{stage}: B={b.batch}, {shape} positions, {n} of an image, {dtype} on {device}, "
          f"{torch.get_num_threads()} threads")
    print(f"{'':18}{'s a step':>10}{'× ce':>8}{'extra MiB':>12}{'× ce':>8}")
    for case in CASES:
        seconds = statistics.median(r[case] for r in rounds)
        ratio = statistics.median(r[case] / r[CE] for r in rounds)
        print(f"{case!s:18}{seconds:10.3f}{ratio:8.3f}{peaks[case]:12.0f}{peaks[case] / peaks[CE]:8.3f}")
    extra, naive = peaks[BASIC] - peaks[CE], peaks[NAIVE] - peaks[CE]
    print(f"BASIC's memory beyond ce's: {extra:.0f} MiB; naively {naive:.0f} MiB; ratio {extra / naive:.3f}")


def main() -> None:
    b = parse(Bench)
    for stage in ("pretrain",) if b.gpu else ("pretrain", "finetune"):
        compare(b, stage)


if __name__ == "__main__":
    run(main)
