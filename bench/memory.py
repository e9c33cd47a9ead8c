"""Memory and time of one rank: estimated, or measured on one device that plays rank 0 of 8.

    python -m bench.memory                                         the estimate: GiB a rank, for docs/training.md
    python -m bench.memory --track --shape 13b --moca              PyTorch's tracker, against the estimate
    python -m bench.memory --measure --shape small                 runs anywhere: plays 8 ranks on a CPU
    python -m bench.memory --measure --shape 7b --stage pretrain --loss basic --limit 40       on a GPU, 40 GiB of it
    python -m bench.memory --measure --shape 7b --stage finetune --limit 40
    python -m bench.memory --save                                  host memory of writing a checkpoint: two gloo ranks

The other ranks are PyTorch's fake process group: collectives return at once and move nothing. So
peak memory and computing are those of a real rank, communication takes no time, and the values in
the tensors mean nothing. Stage 1 is played without other ranks: its DDP only sums the projector's
gradient in place. Weights are random. The share of FLOP/s counts the model's own operations,
without recomputation, against the best matmul of this device.
"""
import gc
import os
import socket
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

import losses
from bench.common import SPAWN, memory, random_batch, reset_peak, sampled_peak, step_loss
from common.flags import option, parse, run
from common.parallel import Ranks, choose_device, clip_gradients, local, over, shard, start, wrap
from data import Batch
from losses import LOSSES, Objective
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT
from training.folder import save
from training.plan import memory as plan_memory
from training.plan import outline
from training.settings import TrainConfig, settings
from training.setup import compile_block, is_trained

CLIP_L = VisionConfig(1024, 4096, 24, 16, 336, 14)
SHAPES = {
    "small": (VisionConfig(256, 1024, 6, 4, 112, 14), DecoderConfig(32000, 512, 1376, 8, 8)),
    "3b": (VisionConfig(1152, 4304, 27, 16, 384, 14, 1e-6, "gelu_tanh", False),
           DecoderConfig(51200, 2560, 10240, 32, 32, hidden_act="gelu_tanh", norm="layer",
                         gated=False, bias=True, head_bias=True, parallel=True,
                         partial_rotary_factor=0.4)),
    "7b": (CLIP_L, DecoderConfig()), "13b": (CLIP_L, DecoderConfig(32000, 5120, 13824, 40, 40))}


@dataclass
class Bench:
    """Estimate the GiB a rank needs in stage 1 and stage 2; with --measure, make steps and measure."""
    measure: bool = option(False, "make steps, instead of the estimate alone")
    save: bool = option(False, "write a checkpoint of stage 2 from two ranks, --shape small or 3b")
    track: bool = option(False, "count the peak with PyTorch's trackers on fake tensors, in minutes")
    recomputed: int | None = option(None, "with --track: decoder layers recomputed; unset: all")
    shape: Literal[tuple(SHAPES)] = option("7b", "small, TinyLLaVA-3B, LLaVA-1.5 7B or 13B")
    stage: Literal["pretrain", "finetune"] = option("finetune", "what is measured")
    loss: Literal[tuple(LOSSES)] = option("ce", "the objective")
    moca: bool = option(False, "with MoCa")
    ranks: int = option(8, "ranks, of which this process plays the first", least=1)
    micro_batch: int | None = option(None, "samples; unset: 32 in stage 1, 16 in stage 2", least=1)
    text: int | None = option(None, "text tokens a sample; unset: 32 in stage 1, 256 in stage 2", least=1)
    steps: int = option(3, "steps that are timed, after two that are not", least=1)
    limit: float | None = option(None, "GiB of the GPU that may be used; unset: all")
    compile: bool = option(False, "compile the layers")


def new_model(shape: str, moca: bool = False) -> Llava:
    v, t = SHAPES[shape]
    model = Llava(ViT(v), Projector(v.hidden_size, t.hidden_size), Decoder(replace(t)))
    if moca:
        model.language_model.add_moca()
    return model


def on_meta(shape: str, moca: bool = False) -> Llava:
    with torch.device("meta"):
        return new_model(shape, moca)


# --------------------------------------------------------------------------------------- arithmetic
def estimate(b: Bench, stage: str, ranks: int, micro: int, text: int, layers: int | None = None) -> float:
    """Return the GiB of a rank that training/plan.py estimates, for bfloat16 and no accumulation.
    layers: that are recomputed; None: all."""
    cfg = settings(TrainConfig(data="-", template="v1", loss=b.loss, moca=b.moca), stage, 1)
    model = outline(cfg, on_meta(b.shape, b.moca))
    if layers is None:
        layers = model.language_model.config.num_hidden_layers
    cfg = replace(cfg, micro_batch=micro, global_batch=micro * ranks, gradient_checkpointing=layers)
    return plan_memory(cfg, model, ranks, model.vision_tower.config.image_tokens + text, 2, None)["peak"]


def table(b: Bench) -> None:
    print("estimated GiB a rank (bf16, every layer recomputed; stage 1: 32 text tokens, stage 2: 256)")
    for shape in ("3b", "7b", "13b"):
        b = replace(b, shape=shape)
        for micro in (32, 8):
            gib = estimate(b, "pretrain", 1, micro, 32)
            print(f"{shape:4} pretrain  micro-batch {micro:2}   any rank {gib:6.1f}")
        for micro in (16, 4, 1):
            line = f"{shape:4} finetune  micro-batch {micro:2}"
            for ranks in (1, 2, 4, 8, 16):
                line += f"   {ranks} ranks {estimate(b, 'finetune', ranks, micro, 256):6.1f}"
            print(line)


# ------------------------------------------------------------------------------------------ tracked
class AnyTracker(MemTracker):
    """PyTorch's tracker, without its hooks on gradients: they fail on frozen parameters."""
    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def track(b: Bench) -> None:
    """Print the peak that PyTorch's trackers count in two steps on fake tensors, and the estimate."""
    ranks, cfg, micro, text = play(b, torch.device("cpu"), torch.bfloat16)
    batch, fake = make_batch(b, micro, text), FakeTensorMode()

    # Fake tensors hold no numbers. What is made of numbers is made before: places, layer weights.
    _ = batch.places
    weights = losses.layer_weights(max(1, SHAPES[b.shape][1].num_hidden_layers // 2)).tolist()
    losses.layer_weights = lambda k, scheme: SimpleNamespace(tolist=lambda: weights)
    batch = batch.moved(fake.from_tensor)
    with fake:
        objective = make(b, cfg, ranks, meta=False)
        if b.recomputed is not None:
            objective.model.language_model.recomputed = b.recomputed
        trained = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        if b.stage == "finetune":
            tracker = FSDPMemTracker(objective, optimizer)
        else:
            tracker = AnyTracker()
            tracker.track_external(objective, optimizer)
        for step in range(2):
            with tracker:
                with torch.autocast("cpu", torch.bfloat16):
                    terms = objective(batch)
                step_loss(b.loss, terms, batch).backward()
                del terms
                clip_gradients(trained, ranks, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if step == 0:
                tracker.reset_mod_stats()
    gib = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 2**30
    guess = estimate(b, b.stage, ranks.count, micro, text, b.recomputed)
    print(f"{title(b)}, micro-batch {micro} × {batch.input_ids.shape[1]}: tracked {gib:.2f} GiB, "
          f"estimated {guess:.2f} ({guess / gib - 1:+.1%})")


# ----------------------------------------------------------------------------------------- measured
def play(b: Bench, device: torch.device, dtype: torch.dtype) -> tuple[Ranks, TrainConfig, int, int]:
    """Play rank 0 of b.ranks. Returns (ranks, settings, samples a micro-batch, text tokens)."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=b.ranks)
    cfg = settings(TrainConfig(data="-", template="v1", loss=b.loss, moca=b.moca), b.stage, 1)
    ranks = Ranks(0, 1, device, dtype)
    if b.stage == "pretrain":
        return ranks, cfg, b.micro_batch or 32, b.text or 32
    ranks = over(replace(ranks, count=b.ranks), sharded=True)
    return ranks, cfg, b.micro_batch or 16, b.text or 256


def title(b: Bench) -> str:
    name = f"{b.loss} + MoCa" if b.moca else b.loss
    return f"{b.shape} {b.stage} {name}, rank 0 of {b.ranks}"


def make(b: Bench, cfg: TrainConfig, ranks: Ranks, meta: bool = True) -> torch.nn.Module:
    """Make the objective as training wraps it, with random weights: sharded on the meta device,
    then given memory. Without `meta`: made where it stays, for the tracker."""
    model, (v, t) = on_meta(b.shape, b.moca) if meta else new_model(b.shape, b.moca), SHAPES[b.shape]
    for name, p in model.named_parameters():
        trained = is_trained(name, cfg, v.num_hidden_layers, t.num_hidden_layers)
        p.requires_grad_(trained).data = p.data.to(torch.float32 if trained else ranks.dtype)
    vision_blocks = list(model.vision_tower.encoder["layers"])
    if not meta:                # nothing calls the last one: the tracker fails on such a unit
        vision_blocks.pop()
    for block in vision_blocks + list(model.language_model.model["layers"]):
        if b.compile:
            compile_block(block)
        if ranks.mesh is not None:
            shard(block, ranks)
    if meta:
        model.to_empty(device=ranks.device)
        for p in model.parameters():
            local(p.data).normal_(0, 0.02)
    model.language_model.recomputed = SHAPES[b.shape][1].num_hidden_layers
    return wrap(Objective(model, cfg), ranks)


def make_batch(b: Bench, micro: int, text: int) -> Batch:
    """The second half of the text is supervised. VDEP: every second sample is the image alone."""
    v, t = SHAPES[b.shape]
    supervised = torch.arange(v.image_tokens + text) >= v.image_tokens + text // 2
    alone = torch.arange(micro) % 2 == 0 if b.loss == "vdep" else None
    return random_batch(micro, v, t.vocab_size, text, supervised, alone)


def flops(b: Bench, tokens: int, text: int) -> float:
    """Return the floating-point operations of one step, without recomputation."""
    model, (v, t) = on_meta(b.shape), SHAPES[b.shape]
    T = v.image_tokens + text
    blocks = sum(p.numel() for p in model.language_model.model["layers"].parameters())
    attention = 2 * T * t.hidden_size * t.num_hidden_layers     # causal: half of the pairs
    vision = sum(p.numel() for p in model.vision_tower.parameters()) * 2 * v.num_patches / T
    passes = 3 if b.stage == "finetune" else 2                  # a frozen map has no weight gradient
    return tokens * (passes * (2 * blocks + attention) + vision)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return this device's best FLOP/s in a square matmul."""
    n = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(n, n, device=device, dtype=dtype), 0.0
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(b: Bench, cfg: TrainConfig, ranks: Ranks, batch: Batch) -> float:
    """Make steps as train.py does. Returns the seconds of the fastest."""
    objective = make(b, cfg, ranks)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    seconds = []
    for step in range(2 + b.steps):
        if step == 2:
            gc.collect()
            if ranks.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        wait(ranks.device)
        start = time.perf_counter()
        mixed = ranks.dtype == torch.bfloat16
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=mixed):
            terms = objective(batch)
        step_loss(b.loss, terms, batch).backward()
        clip_gradients(trained, ranks, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(ranks.device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def measured(b: Bench) -> None:
    device, dtype = choose_device("auto")
    if b.limit and device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(b.limit * 2**30 / total)
    ranks, cfg, micro, text = play(b, device, dtype)
    ceiling = matmul_ceiling(device, dtype)
    batch = make_batch(b, micro, text).to(device)
    reset_peak()
    best = time_steps(b, cfg, ranks, batch)
    peak = memory("VmHWM") / 2**10
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    guess, tokens = estimate(b, b.stage, ranks.count, micro, text), batch.input_ids.numel()
    share = flops(b, tokens, text) / best / ceiling
    print(f"{title(b)}, {dtype} on {device}, micro-batch {micro} × {tokens // micro} tokens: "
          f"peak {peak:.2f} GiB (estimated {guess:.2f}), {best:.3f} s a step, "
          f"{tokens / best:,.0f} tokens/s, {share:.1%} of {ceiling / 1e12:.2f} TFLOP/s")
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- saving
def save_as_rank(b: Bench, rank: int, folder: str, port: int, pipe) -> None:
    """One of two ranks that share a model and AdamW's moments. Sends the seconds that saving took,
    and its peak of memory beyond what was there before, in MiB."""
    torch.set_num_threads(1)
    group = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    ranks = over(start(torch.device("cpu"), torch.float32, 10), sharded=True)
    cfg = settings(TrainConfig(data="-", template="v1"), "finetune", 2)
    cfg = replace(cfg, vision="toy/clip", llm="toy/llm")
    objective = make(b, cfg, ranks)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    began = time.perf_counter()
    with sampled_peak("RssAnon") as peak:
        save(Path(folder), cfg, objective.model, optimizer, 1, 2, ranks)
    pipe.send((time.perf_counter() - began, peak["RssAnon"]))


def measure_saving(b: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        pipes = []
        for rank in range(2):
            here, there = SPAWN.Pipe()
            SPAWN.Process(target=save_as_rank, args=(b, rank, folder, port, there)).start()
            there.close()
            pipes.append(here)
        for rank, pipe in enumerate(pipes):
            seconds, peak = pipe.recv()
            print(f"rank {rank} of 2: peak of saving {peak:.0f} MiB beyond its own share, "
                  f"{seconds:.1f} s", flush=True)
        for path in sorted(Path(folder).glob("*/*")):
            if path.stat().st_size > 2**22:
                print(f"{path.relative_to(folder)}: {path.stat().st_size / 2**20:.0f} MiB")


def main() -> None:
    b = parse(Bench)
    if b.save:
        measure_saving(replace(b, shape="small" if b.shape == "7b" else b.shape))
    elif b.measure:
        measured(b)
    elif b.track:
        track(b)
    else:
        table(b)


if __name__ == "__main__":
    run(main)
