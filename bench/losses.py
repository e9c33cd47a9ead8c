"""Time and peak memory of one training step for every objective, as ratios to cross-entropy in the same run.

    python -m bench.losses             ViT 6×256 (112 px, 64 image tokens), LLaMA 8×512, vocab 32000, B=8, 192 words
    python -m bench.losses --text 48   the same with short texts
    python -m bench.losses --gpu       7B shapes on a GPU: ViT-L/14-336 (576 tokens), LLaMA 32×4096, bf16, stage 1 alone

A step: forward, backward, clipping, AdamW. Times are medians over rounds in which every objective takes one step in
turn; their ratios are medians over rounds too. Peak memory, of three steps, is measured in a process of its own, beyond
the model: gradients and optimiser are in it. basic-naive writes BASIC down literally: all attention maps, both
distributions whole.
"""
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import losses
from data import Batch
from methods.basic import layer_weights
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT, rotary, rotate
from training.settings import TrainConfig

GPU = "--gpu" in sys.argv
TEXT = int(sys.argv[sys.argv.index("--text") + 1]) if "--text" in sys.argv else 64 if GPU else 192
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
if GPU:
    VISION, LLM = VisionConfig(1024, 4096, 24, 16, 336, 14), DecoderConfig()
    B, ROUNDS, STAGES = 8, 10, ("pretrain",)
else:
    VISION, LLM = VisionConfig(256, 1024, 6, 4, 112, 14), DecoderConfig(32000, 512, 1376, 8, 8)
    B, ROUNDS, STAGES = 8, 5, ("pretrain", "finetune")
CASES = [(loss, moca) for moca in (False, True) for loss in ("ce", "vdep", "vista", "basic")] + [("basic-naive", False)]


def naive_basic(model, batch, cfg):
    """Eq. (4) to (8) as one would write them first: every layer's (B,H,T,T), both (B,N,V)."""
    lm, image = model.language_model, model.embed_images(batch.pixel_values)
    text = lm.embed(batch.input_ids)
    h, states, maps = model.merge(text, image, batch.image_mask), [], []
    T = h.shape[1]
    rope = rotary(torch.arange(T, device=h.device), lm.config.head_dim, lm.config.rope_theta, h.dtype)
    causal = torch.ones(T, T, dtype=torch.bool, device=h.device).triu(1)
    for layer in lm.model["layers"]:
        a, x = layer.self_attn, layer.input_layernorm(h)
        q, k, v = (p(x).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        scores = rotate(q, *rope) @ rotate(k, *rope).transpose(2, 3) / a.head_dim ** 0.5
        maps.append(scores.masked_fill(causal, -torch.inf).softmax(-1))                     # (B,H,T,T)
        h = h + a.o_proj((maps[-1] @ v).transpose(1, 2).flatten(2))
        h = h + layer.mlp(layer.post_attention_layernorm(h))
        states.append(h)
    out = lm.model["norm"](h)
    k, n = len(states) // 2, image.shape[1]
    w = layer_weights(k).tolist()
    v_hat = sum(w[i] * losses.at_image(states[i], batch, n) for i in range(k)).detach()
    rows = batch.text_after_image()
    columns = batch.image_mask.int().argsort(dim=1, descending=True, stable=True)[:, :n]
    look = torch.stack(maps[:k]).mean((0, 2)).detach() * rows[..., None]                    # (B,T,T)
    degree = look.sum(1).gather(1, columns)
    degree = degree / degree.sum(1, keepdim=True)
    E = lm.model["embed_tokens"].weight.detach()
    p, q = (v_hat @ E.T).log_softmax(-1), (image @ E.T).log_softmax(-1)                     # (B,N,V)
    das = (degree * (nn.functional.normalize(image, dim=-1) - nn.functional.normalize(v_hat, dim=-1)).pow(2).sum(-1))
    sds = degree * (p.exp() * (p - q)).sum(-1)
    ce = losses.next_token_loss(out, batch.labels, lm.lm_head.weight)
    return [losses.Term("ce", *ce, 1.0), losses.Term("das", das.sum(), rows.any(1).sum(), 1.0),
            losses.Term("sds", sds.sum(), rows.any(1).sum(), 0.01)]


def make_model(stage: str, moca: bool) -> Llava:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        torch.set_default_dtype(DTYPE if stage == "pretrain" else torch.float32)
        model = Llava(ViT(VISION), Projector(VISION.hidden_size, LLM.hidden_size), Decoder(LLM))
        torch.set_default_dtype(torch.float32)
        model.multi_modal_projector.float()
        if moca:
            model.language_model.add_moca()
            LLM.moca = False
    model.vision_tower.requires_grad_(False)
    model.language_model.requires_grad_(stage == "finetune")
    if moca:
        model.language_model.moca.requires_grad_(True)
    model.language_model.gradient_checkpointing = GPU
    return model


def make_batch(stage: str, loss: str) -> Batch:
    """<s>, the image, text. Stage 1: all of the text supervised; stage 2: every second half of a turn. VDEP in stage 1:
    every second sample is the image alone."""
    g = torch.Generator().manual_seed(0)
    n = VISION.image_tokens
    T = n + TEXT
    ids, position = torch.randint(3, LLM.vocab_size, (B, T), generator=g), torch.arange(T)
    image = ((position > 0) & (position <= n)).expand(B, T)
    alone = torch.arange(B) % 2 == (0 if loss == "vdep" and stage == "pretrain" else 2)
    attention = ~(alone[:, None] & (position > n))
    supervised = (position > n) & attention & ((stage == "pretrain") | (position % 16 >= 8))
    pixels = torch.randn(B, 3, VISION.image_size, VISION.image_size, generator=g)
    return Batch(ids, ids.where(supervised, -100), image, attention, pixels, torch.ones(B, dtype=torch.bool),
                 alone).to(DEVICE)


class Stepper:
    """One objective's step() on a model of its own."""
    def __init__(self, loss: str, moca: bool, stage: str, model: Llava):
        self.cfg = TrainConfig(loss=loss.removesuffix("-naive"), moca=moca, stage=stage)
        self.terms = naive_basic if loss == "basic-naive" else losses.LOSSES[loss].function
        self.model, self.batch = model, make_batch(stage, loss)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)

    def step(self) -> float:
        start = time.perf_counter()
        count = losses.counts(self.batch)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DTYPE == torch.bfloat16):
            terms = self.terms(self.model, self.batch, self.cfg)
        sum(t.weight * t.total / count[t.name] for t in terms).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def memory(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, in MiB."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak(loss: str, moca: bool, stage: str, queue) -> None:
    stepper = Stepper(loss, moca, stage, make_model(stage, moca))
    before = torch.cuda.memory_allocated() / 2**20 if GPU else memory("VmRSS")
    if not GPU:
        Path("/proc/self/clear_refs").write_text("5")               # sets the peak back to the present
    for _ in range(3):
        stepper.step()
    queue.put((torch.cuda.max_memory_allocated() / 2**20 if GPU else memory("VmHWM")) - before)


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    for stage in STAGES:
        peaks = {}
        for case in CASES:
            queue = spawn.Queue()
            process = spawn.Process(target=peak, args=(*case, stage, queue))
            process.start()
            peaks[case] = queue.get()
            process.join()
        models = {moca: make_model(stage, moca) for moca in (False, True)}
        steppers = {case: Stepper(*case, stage, models[case[1]]) for case in CASES}
        rounds = []
        for r in range(ROUNDS + 1):
            seconds = {case: s.step() for case, s in steppers.items()}
            rounds += [seconds] * (r > 0)                           # the first one warms up
        base = ("ce", False)
        print(f"\n{stage}: B={B}, {VISION.image_tokens} image + {TEXT} text positions, {DTYPE} on {DEVICE}, "
              f"{torch.get_num_threads()} threads")
        print(f"{'':18}{'s a step':>10}{'× ce':>8}{'extra MiB':>12}{'× ce':>8}")
        for case in CASES:
            ratio = statistics.median(s[case] / s[base] for s in rounds)
            name = case[0] + " + moca" * case[1]
            print(f"{name:18}{statistics.median(s[case] for s in rounds):10.3f}{ratio:8.3f}{peaks[case]:12.0f}"
                  f"{peaks[case] / peaks[base]:8.3f}")
        extra, naive = (peaks[c, False] - peaks[base] for c in ("basic", "basic-naive"))
        print(f"BASIC's memory beyond ce's: {extra:.0f} MiB; naively {naive:.0f} MiB; ratio {extra / naive:.3f}")


if __name__ == "__main__":
    main()
