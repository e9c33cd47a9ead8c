"""What a stage needs, by arithmetic, before anything is loaded: memory, steps, operations, disk.

    prepare: settings, configurations, lengths of samples → settings that fit the card, or a refusal

At its peak a rank holds weights, optimizer, and either all kept activations, while the last layer
or the head works, or all gradients, while the first layer does. `python -m bench.memory --track`
compares this with PyTorch's own tracker.
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.flags import UserError
from common.parallel import GRADIENT_SHARE, Ranks
from hub.connectors import make_connector
from hub.released import PARTS
from model import Decoder, Llava, ViT
from training.settings import TrainConfig, is_sharded, micro_batches, second_samples, stores_all
from training.setup import is_trained, llm_config, read_together, tower_config

# GiB of a card, its dense bfloat16 TFLOP/s, and the share of these that training should reach.
CARDS = {"a100-40": (39.4, 312, 0.5), "a100-80": (79.2, 312, 0.5),
         "h100": (79.1, 989, 0.4), "h200": (139.8, 989, 0.4)}
USABLE = 0.92           # of a card; the rest is CUDA's, NCCL's, or lost in gaps
SMALLEST = 8            # samples: a smaller micro-batch is not chosen in order to recompute less


def outline(cfg: TrainConfig, model: Llava | None = None) -> Llava:
    """Return a stage's model without memory (meta device). What is trained requires gradients."""
    if model is None:
        v, t = tower_config(cfg), llm_config(cfg, cfg.llm)
        with torch.device("meta"):
            projector = make_connector(cfg.connector or "mlp2x", v.hidden_size, t.hidden_size)
            model = Llava(ViT(v), projector, Decoder(t))
            if cfg.moca:
                model.language_model.add_moca()
    encoder, decoder = model.vision_tower.encoder["layers"], model.language_model.model["layers"]
    for name, p in model.named_parameters():
        p.requires_grad_(is_trained(name, cfg, len(encoder), len(decoder)))
    return model


def total(parameters, trained: int = 1, frozen: int = 1) -> int:
    """Sum `trained` over the trained numbers, `frozen` over the others: a count, or bytes."""
    return sum(p.numel() * (trained if p.requires_grad else frozen) for p in parameters)


def memory(cfg: TrainConfig, model: Llava, ranks: int, T: int, low: int,
           room: float | None) -> dict[str, float]:
    """GiB of a rank by kind, and at the peak. T: positions of the longest sample. low: bytes of a
    number in the dtype of computing. room: GiB of the card, if there is one."""
    lm, t, v = model.language_model, model.language_model.config, model.vision_tower.config
    D, V, inner, layers = t.hidden_size, t.vocab_size, t.intermediate_size, list(lm.model["layers"])
    heads = (t.num_attention_heads + t.num_key_value_heads) * t.head_dim
    again, micro = cfg.gradient_checkpointing, cfg.micro_batch
    positions, images, tokens = micro * T, micro * v.num_patches, micro * model.image_tokens
    trained, sharded = total(model.parameters(), 1, 0), is_sharded(cfg, ranks)
    cut = ranks if sharded else 1

    # A layer keeps what its norms read, in float32; queries, keys, values, the attention's output;
    # the MLP's products; if trained, what its maps read. Recomputed, it keeps its input alone.
    own = (8 + 4 * cfg.moca) * D + low * (2 * heads + (1 + 2 * t.gated) * inner)
    whole = []
    for block in layers:
        whole.append(own + low * (4 * D + inner) if total(block.parameters(), 1, 0) else own)
    kept = positions * (low * D * (again + 1) + sum(whole[again:]))
    layer = positions * (2 * low * inner + (whole[-1] if again == len(layers) else 0))
    head = 10 * min(1024, max(1, positions - tokens)) * V + 6 * low * positions * D
    if lm.lm_head.weight.requires_grad:
        head += (8 + 2 * low) * V * D
    extra = 0
    if cfg.unlock_vision != "none":
        extra = images * v.num_hidden_layers * (18 * v.hidden_size + 8 * v.intermediate_size)
    if cfg.loss in ("basic", "vdep"):       # image tokens and their targets in float32
        extra += 12 * tokens * D
    if cfg.loss == "basic":                 # those again, the logits of 128 patches, E
        head = max(head, 12 * tokens * D + (16 * 128 + low * D) * V)

    # Sharded: what is outside of layers is whole throughout. One layer is fetched while another
    # computes, and the gradient of a third is sent in float32; its activations are free by then.
    gathered, gradients, earlier = 0, 4 * trained / cut, 0
    if sharded:
        gathered = total((p for n, p in model.named_parameters() if ".layers." not in n), 4, low)
        gathered += 2 * low * total(layers[0].parameters())
        layer += total(layers[-1].parameters(), low + 4, 0) + total(lm.lm_head.parameters(), 4, 0)
        if again < len(layers):
            layer -= positions * whole[-1]
        once = room is None or 4 * trained < GRADIENT_SHARE * room * 2**30
        if once and cfg.global_batch > ranks * cfg.micro_batch:     # whole until the last of them
            earlier = gradients = gradients + 4 * trained
    fixed = {"weights": total(model.parameters(), 4, low) / cut, "optimizer": 8 * trained / cut,
             "gathered": gathered}
    backward = max(earlier + kept + extra + max(head, layer), gradients + extra + layer)
    kinds = {**fixed, "gradients": gradients, "activations": kept + extra, "layer": max(layer, 0),
             "head": head, "peak": sum(fixed.values()) + backward}
    return {kind: value / 2**30 for kind, value in kinds.items()}


def operations(cfg: TrainConfig, model: Llava, T: float) -> tuple[float, float]:
    """Floating-point operations of a sample of T positions: the model's, and recomputation's."""
    lm, t, v = model.language_model, model.language_model.config, model.vision_tower.config
    blocks = list(lm.model["layers"].parameters())
    width = t.num_attention_heads * t.head_dim
    attention = 2 * T * T * width * t.num_hidden_layers     # causal: half of the pairs
    forward = 2 * total(blocks) * T + attention
    head = 2 * t.vocab_size * t.hidden_size * max(0, T - model.image_tokens)
    own = 2 * forward + attention + 2 * total(blocks, 1, 0) * T
    own += head * (2 + lm.lm_head.weight.requires_grad)
    own += 2 * total(model.vision_tower.parameters(), 3, 1) * v.num_patches
    return own, forward * cfg.gradient_checkpointing / t.num_hidden_layers


def choose(cfg: TrainConfig, typed: TrainConfig, model: Llava, ranks: int, T: int, low: int,
           room: float | None) -> TrainConfig:
    """Return cfg with the micro-batch and the number of recomputed layers that fit into `room` GiB,
    where `typed`, the flags, leave them open: the largest micro-batch; without sharding a smaller
    one if it recomputes fewer layers. Raises UserError if nothing fits."""
    layers, again = len(model.language_model.model["layers"]), cfg.gradient_checkpointing
    if again is None:
        counts = range(layers + 1) if room else [layers]
    else:
        counts = [min(again, layers)]
    sizes = micro_batches(cfg.global_batch // ranks, cfg.micro_batch)
    if typed.micro_batch:
        sizes = [cfg.micro_batch]
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
        raise UserError(f"{cfg.stage} needs {peak:.0f} GiB on each of {ranks} GPUs with "
                        f"micro-batch {micro} and {again} of {layers} layers recomputed; they have "
                        f"{room:.0f}: use more GPUs, --parallel fsdp, a smaller --micro-batch or "
                        "--max-length, or --unlock-llm lora")
    return best or trial


def read_lengths(cfg: TrainConfig, out: Path, image_tokens: int, ranks: Ranks) -> np.ndarray:
    """Return about how many positions each sample has, (n,); one alone before the toy is drawn."""
    path = Path(cfg.data or out / "data" / f"{cfg.stage}.json")
    if not path.exists():
        return np.array([image_tokens + 64])
    characters = read_together(path, ranks)[0].lengths()
    if not len(characters):
        characters = np.zeros(1)            # load_data says what is wrong with them
    template = 8 if cfg.stage == "pretrain" else 64
    positions = np.abs(characters) / 3.5 + template + image_tokens * (characters > 0)
    return np.minimum(positions, cfg.max_length)


def prepare(cfg: TrainConfig, typed: TrainConfig, out: Path, ranks: Ranks) -> TrainConfig:
    """Return settings completed by `choose`, on every rank. The first prints the plan."""
    low, room, speed, count = ranks.dtype.itemsize, None, None, typed.cards or ranks.count
    if typed.card:
        room, flops, share = CARDS[typed.card]
        low, speed = 2, (flops, share)
    elif ranks.device.type == "cuda":
        card = torch.cuda.get_device_properties(ranks.device)
        room = min(ranks.gather(card.total_memory)) / 2**30
    model = outline(cfg)
    lengths = read_lengths(cfg, out, model.image_tokens, ranks)
    T, layers = int(lengths.max()), model.language_model.config.num_hidden_layers
    cfg = choose(cfg, typed, model, count, T, low, room)
    if ranks.first:
        gib = memory(cfg, model, count, T, low, room)
        peak = gib.pop("peak")
        kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in gib.items() if value >= 0.0005)
        print(f"{cfg.stage} needs about {peak:.3f} GiB a rank ({kinds}): micro-batch "
              f"{cfg.micro_batch} × up to {T} positions, {cfg.gradient_checkpointing} of {layers} "
              "layers recomputed")
        print(f"{cfg.stage}: " + "; ".join(effort(cfg, model, count, lengths, low, speed)))
    return cfg


def effort(cfg: TrainConfig, model: Llava, ranks: int, lengths: np.ndarray, low: int,
           speed: tuple | None) -> list[str]:
    """Return what else a stage takes, in words. speed: TFLOP/s of a card, the share reached."""
    sizes = [f"{PARTS[name]} {total(part.parameters()) / 1e6:,.2f} M"
             for name, part in model.named_children()]
    trained = total(model.parameters(), 1, 0)
    stored = 12 * trained / 1e9             # weights and AdamW's two moments, in float32
    largest = max(4 * p.numel() for p in model.parameters() if p.requires_grad) / 1e9
    if stores_all(cfg):
        stored += total(model.parameters(), 0, low) / 1e9
    work = operations(cfg, model, float(lengths.mean()))
    own, again = (cfg.global_batch * x / 1e12 for x in work)
    notes = [f"{', '.join(sizes)} parameters, {trained / 1e6:,.2f} M trained",
             f"a step {own:,.3f} TFLOP and {again:,.3f} of recomputation",
             f"a checkpoint {stored:.3f} GB, {largest:.3f} GB of host memory to save it"]
    if len(lengths) > 1:
        samples = len(lengths) + second_samples(cfg, len(lengths))
        steps = cfg.max_steps or cfg.epochs * -(-samples // cfg.global_batch)
        notes.append(f"{samples:,} samples, {steps:,} steps")
        if speed:
            flops, share = speed
            hours = steps * (own + again) / (flops * share * ranks) / 3600
            notes.append(f"{hours:.1f} h on {ranks} GPUs at {share:.0%} of {flops} TFLOP/s")
    return notes
