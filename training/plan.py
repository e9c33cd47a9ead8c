"""What a stage needs, by arithmetic, before anything is loaded: memory, steps, operations, hours, disk.

    prepare: settings, configurations, lengths of samples ─→ settings that fit the card, or a refusal; prints two lines

At its peak a rank holds weights, optimizer, and one of two: every activation that was kept, while the last layer or the
head works, or every gradient, while the first layer does. bench/memory.py compares this with PyTorch's own tracker.
"""
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.flags import UserError
from common.parallel import GRADIENT_SHARE, Ranks
from hub.configs import decoder_config
from hub.connectors import make_connector
from hub.samples import read_samples
from model import Decoder, Llava, ViT
from training.settings import TrainConfig, is_sharded, micro_batches, second_samples, stores_all
from training.setup import is_trained, tower_config

# GiB of a card, its dense bfloat16 TFLOP/s, and the share of these that training is assumed to reach.
CARDS = {"a100-40": (39.4, 312, 0.5), "a100-80": (79.2, 312, 0.5), "h100": (79.1, 989, 0.4), "h200": (139.8, 989, 0.4)}
USABLE = 0.92                       # of a card, for what is chosen here: the rest is CUDA's, NCCL's, or lost in gaps
SMALLEST = 8                        # samples: a smaller micro-batch is not chosen in order to recompute less


def outline(cfg: TrainConfig, model: Llava | None = None) -> Llava:
    """Return the model of a stage on the meta device, without memory. What the stage trains requires gradients."""
    if model is None:
        v, t = tower_config(cfg), decoder_config(cfg.llm)
        if cfg.unlock_llm == "lora" and not t.lora_rank:
            t = replace(t, lora_rank=cfg.lora_rank, lora_alpha=cfg.lora_alpha)
        with torch.device("meta"):
            model = Llava(ViT(v), make_connector(cfg.connector or "mlp2x", v.hidden_size, t.hidden_size), Decoder(t))
            if cfg.moca:
                model.language_model.add_moca()
    layers = [len(x["layers"]) for x in (model.vision_tower.encoder, model.language_model.model)]
    for name, p in model.named_parameters():
        p.requires_grad_(is_trained(name, cfg, *layers))
    return model


def total(parameters, trained: int = 1, frozen: int = 1) -> int:
    """Count parameters, or their bytes: `trained` for each number that is trained, `frozen` for each other."""
    return sum(p.numel() * (trained if p.requires_grad else frozen) for p in parameters)


def memory(cfg: TrainConfig, model: Llava, ranks: int, T: int, low: int, room: float | None) -> dict[str, float]:
    """GiB of a rank by kind, and at the peak. T: positions of the longest sample. low: bytes of a number in the dtype
    of computing. room: GiB of the card, if there is one."""
    lm, t, v = model.language_model, model.language_model.config, model.vision_tower.config
    D, inner, layers = t.hidden_size, t.intermediate_size, list(lm.model["layers"])
    sharded, positions, trained = is_sharded(cfg, ranks), cfg.micro_batch * T, total(model.parameters(), 1, 0)
    cut, block = ranks if sharded else 1, total(layers[0].parameters())

    # A layer keeps what its norms read, in float32; queries, keys, values, the attention's output; the MLP's products;
    # and, where its maps are trained, what they read. Of a layer that is recomputed only its input is kept.
    own = 8 * D + low * (2 * (t.num_attention_heads + t.num_key_value_heads) * t.head_dim + (1 + 2 * t.gated) * inner)
    own += 4 * D * cfg.moca
    whole = [own + low * (4 * D + inner) if total(layer.parameters(), 1, 0) else own for layer in layers]
    again = cfg.gradient_checkpointing
    kept = low * D * (again + 1) + sum(whole[again:])
    work = 2 * low * inner + (whole[-1] if again == len(layers) else 0)

    trains_head = lm.lm_head.weight.requires_grad
    head = 10 * 1024 * t.vocab_size + 6 * low * positions * D + (trains_head and (8 + 2 * low) * t.vocab_size * D)
    extra = 0
    if cfg.unlock_vision != "none":
        extra = cfg.micro_batch * v.num_patches * v.num_hidden_layers * (18 * v.hidden_size + 8 * v.intermediate_size)
    if cfg.loss in ("basic", "vdep"):                     # image tokens and their targets in float32
        extra += cfg.micro_batch * 12 * model.image_tokens * D
    if cfg.loss == "basic":                               # those again, the logits of 128 patches, E
        head = max(head, cfg.micro_batch * 12 * model.image_tokens * D + (16 * 128 + low * D) * t.vocab_size)

    # Sharded: what is outside of layers is whole throughout. One layer is fetched while another computes, and the
    # gradient of a third is on its way in float32.
    gathered, gradients, sending = 0, 4 * trained / cut, 0
    if sharded:
        gathered = total((p for n, p in model.named_parameters() if ".layers." not in n), 4, low) + 2 * low * block
        sending = total(layers[-1].parameters(), low + 4, 0) + total(lm.lm_head.parameters(), 4, 0)
        fits = room is None or 4 * trained < GRADIENT_SHARE * room * 2**30
        if fits and cfg.global_batch > ranks * cfg.micro_batch:
            gradients += 4 * trained                      # stay whole until the last micro-batch
    earlier = gradients if gradients > 4 * trained else 0
    freed = whole[-1] if sharded and again < len(layers) else 0        # before its gradient is sent
    gib = {"weights": total(model.parameters(), 4, low) / cut, "optimizer": 8 * trained / cut, "gathered": gathered,
           "gradients": gradients, "activations": positions * kept + extra, "layer": positions * work + sending,
           "head": head}
    gib["peak"] = gib["weights"] + gib["optimizer"] + gathered + max(
        earlier + gib["activations"] + max(head, gib["layer"] - positions * freed), gradients + extra + gib["layer"])
    return {kind: value / 2**30 for kind, value in gib.items()}


def operations(cfg: TrainConfig, model: Llava, T: float) -> tuple[float, float]:
    """Floating-point operations of a sample of T positions: those of the model, and those of recomputation."""
    lm, t, v = model.language_model, model.language_model.config, model.vision_tower.config
    blocks = list(lm.model["layers"].parameters())
    attention = 2 * T * T * t.num_attention_heads * t.head_dim * t.num_hidden_layers        # causal: half of the pairs
    forward = 2 * total(blocks) * T + attention
    head = 2 * t.vocab_size * t.hidden_size * max(0, T - model.image_tokens) * (2 + lm.lm_head.weight.requires_grad)
    tower = 2 * total(model.vision_tower.parameters(), 3, 1) * v.num_patches
    model_own = 2 * forward + attention + 2 * total(blocks, 1, 0) * T + head + tower
    return model_own, forward * cfg.gradient_checkpointing / t.num_hidden_layers


def choose(cfg: TrainConfig, typed: TrainConfig, model: Llava, ranks: int, T: int, low: int,
           room: float | None) -> TrainConfig:
    """Return cfg with the micro-batch and the number of recomputed layers that fit into `room` GiB, where `typed`, the
    flags, leave them open: the largest micro-batch; without sharding a smaller one if fewer layers are recomputed.
    Raises UserError if nothing fits."""
    layers = len(model.language_model.model["layers"])
    counts = [layers] if cfg.gradient_checkpointing is None else [min(cfg.gradient_checkpointing, layers)]
    if room and cfg.gradient_checkpointing is None:
        counts = range(layers + 1)
    sizes = [cfg.micro_batch] if typed.micro_batch else micro_batches(cfg.global_batch // ranks, cfg.micro_batch)
    best = None
    for micro in sizes:
        if best and (is_sharded(cfg, ranks) or micro < SMALLEST):
            break
        for again in counts:
            trial = replace(cfg, micro_batch=micro, gradient_checkpointing=again)
            peak = memory(trial, model, ranks, T, low, room)["peak"]
            if room is None or peak < room * USABLE:
                if best is None or again < best.gradient_checkpointing:
                    best = trial
                break
    if best is None and peak > room:
        raise UserError(f"{cfg.stage} needs {peak:.0f} GiB on each of {ranks} GPUs with micro-batch {micro} and "
                        f"{again} of {layers} layers recomputed; they have {room:.0f}: use more GPUs, --parallel fsdp, "
                        "a smaller --micro-batch or --max-length, or --unlock-llm lora")
    return best or trial


def read_lengths(cfg: TrainConfig, out: Path, image_tokens: int, ranks: Ranks) -> np.ndarray:
    """Return about how many positions each sample has, (n,); a single one before the toy's data is drawn."""
    path = Path(cfg.data or out / "data" / f"{cfg.stage}.json")
    if not path.exists():
        return np.array([image_tokens + 64])
    if os.environ.get("LOCAL_RANK", "0") == "0":
        read_samples(path)                                # makes its index, once a machine
    ranks.wait()
    characters = read_samples(path)[0].lengths()
    template = 8 if cfg.stage == "pretrain" else 64
    return np.minimum(np.abs(characters) / 3.5 + template + image_tokens * (characters > 0), cfg.max_length)


def prepare(cfg: TrainConfig, typed: TrainConfig, out: Path, ranks: Ranks) -> TrainConfig:
    """Return a stage's settings completed by `choose`, on every rank. The first prints the plan in two lines."""
    low, room, speed, count = ranks.dtype.itemsize, None, None, typed.cards or ranks.count
    if typed.card:
        low, (room, *speed) = 2, CARDS[typed.card]
    elif ranks.device.type == "cuda":
        room = min(ranks.gather(torch.cuda.get_device_properties(ranks.device).total_memory)) / 2**30
    model = outline(cfg)
    lengths = read_lengths(cfg, out, model.image_tokens, ranks)
    T = int(lengths.max())
    cfg = choose(cfg, typed, model, count, T, low, room)
    if ranks.first:
        gib = memory(cfg, model, count, T, low, room)
        kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in gib.items() if value >= 0.005 and kind != "peak")
        layers = model.language_model.config.num_hidden_layers
        print(f"{cfg.stage} needs about {gib['peak']:.2f} GiB a rank ({kinds}): micro-batch {cfg.micro_batch} × up to "
              f"{T} positions, {cfg.gradient_checkpointing} of {layers} layers recomputed")
        print(f"{cfg.stage}: " + "; ".join(work(cfg, model, count, lengths, low, speed)))
    return cfg


def work(cfg: TrainConfig, model: Llava, ranks: int, lengths: np.ndarray, low: int, speed: list | None) -> list[str]:
    """Return what else a stage takes, in words. speed: TFLOP/s of a card, and the share of them that is reached."""
    parts = {"vision": model.vision_tower, "projector": model.multi_modal_projector, "decoder": model.language_model}
    sizes = [f"{name} {total(part.parameters()) / 1e6:,.2f}" for name, part in parts.items()]
    trained = total(model.parameters(), 1, 0)
    stored = 4 * trained + (total(model.parameters(), 0, low) if stores_all(cfg) else 0)
    own, again = (cfg.global_batch * x / 1e12 for x in operations(cfg, model, float(lengths.mean())))
    notes = [f"million parameters: {', '.join(sizes)}, trained {trained / 1e6:,.2f}",
             f"a step {own:,.2f} TFLOP and {again:,.2f} of recomputation",
             f"a checkpoint {(stored + 8 * trained) / 1e9:.2f} GB, {8 * trained / 1e9:.2f} GB of host memory to save"]
    if len(lengths) > 1:
        samples = len(lengths) + second_samples(cfg, len(lengths))
        steps = cfg.max_steps or cfg.epochs * -(-samples // cfg.global_batch)
        notes.append(f"{samples:,} samples, {steps:,} steps")
        if speed:
            hours = steps * (own + again) / (speed[0] * speed[1] * ranks) / 3600
            notes.append(f"{hours:.1f} h on {ranks} GPUs at {speed[1]:.0%} of {speed[0]} TFLOP/s")
    return notes
