"""Training steps a second and peak memory, compared with transformers' LLaVA: the same weights and
batch, stage 1 and stage 2. Needs transformers (5.x), as bench/evaluate.py does.

    python -m bench.throughput                      ViT 6×256 at 112 px, LLaMA 8×512, vocabulary 32000, on 2 threads
    python -m bench.throughput --vision-layers 24 --vision-width 1024 --image-size 336 --layers 32 --width 4096 ...

A sample has 112 tokens: 64 of the image, 48 of text, of which 47 are supervised in stage 1 (a
caption) and 24 in stage 2 (half question, half answer). A step is forward, backward, clipping to
norm 1, fused AdamW. Each side has a process of its own, and they make steps in turn, so that other
load on the machine slows both. Peak is what a step needs beyond what was there before the first
one; it includes gradients and AdamW's moments.
"""
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import SPAWN, import_transformers, memory, random_batch, reset_peak, step_loss
from common.flags import option, parse, run
from data import Batch
from hub.checkpoint import load_model
from losses import Objective
from model import VisionConfig
from training.settings import TrainConfig


@dataclass
class Shape:
    """Compare a training step with one of transformers, in stage 1 and in stage 2."""
    batch: int = option(8, "samples", least=1)
    text: int = option(48, "text tokens a sample", least=1)
    vision_layers: int = option(6, "of the vision encoder", least=1)
    vision_width: int = option(256, "of the vision encoder", least=1)
    image_size: int = option(112, "pixels; patches of 14", least=1)
    layers: int = option(8, "of the language model", least=1)
    width: int = option(512, "of the language model", least=1)
    inner: int = option(1376, "width of the language model's MLP", least=1)
    vocabulary: int = option(32000, "tokens", least=1)
    threads: int = option(2, "of each side", least=1)
    rounds: int = option(5, "turns of each side, of one step each after one that is not counted", least=1)


def make_weights(s: Shape, folder: Path) -> None:
    """Random weights as a llava-hf folder, written by transformers."""
    hf = import_transformers()
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=s.vision_width, intermediate_size=4 * s.vision_width, patch_size=14,
        num_hidden_layers=s.vision_layers, num_attention_heads=s.vision_width // 64,
        image_size=s.image_size)
    text = hf.LlamaConfig(
        vocab_size=s.vocabulary, hidden_size=s.width, intermediate_size=s.inner,
        num_hidden_layers=s.layers, num_attention_heads=s.width // 64)
    config = hf.LlavaConfig(vision_config=vision, text_config=text,
                            image_token_index=s.vocabulary - 1)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)


def make_batch(s: Shape, stage: str) -> Batch:
    n = (s.image_size // 14) ** 2
    position = torch.arange(n + s.text)
    supervised = position > n
    if stage == "finetune":
        supervised = position >= n + s.text // 2
    vision = VisionConfig(image_size=s.image_size, patch_size=14)
    batch = random_batch(s.batch, vision, s.vocabulary - 1, s.text, supervised)
    batch.input_ids[batch.image_mask] = s.vocabulary - 1        # so transformers finds the image
    return batch


def ours(folder: Path, batch: Batch, stage: str):
    """Return (model, a function that computes the loss), with what the stage trains unfrozen."""
    model = load_model(folder)
    model.requires_grad_(stage == "finetune")
    model.vision_tower.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(True)
    objective = Objective(model, TrainConfig(stage=stage))
    return model, lambda: step_loss("ce", objective(batch), batch)


def theirs(folder: Path, batch: Batch, stage: str):
    model = import_transformers().LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32)
    model.requires_grad_(stage == "finetune")
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    return model, lambda: model(
        input_ids=batch.input_ids, pixel_values=batch.pixel_values, labels=batch.labels,
        attention_mask=batch.attention_mask, use_cache=False).loss


def side(make, s: Shape, folder: Path, stage: str, pipe) -> None:
    """Make a step whenever the pipe says True. Sends (loss, seconds, peak MiB so far)."""
    torch.set_num_threads(s.threads)
    model, loss_of = make(folder, make_batch(s, stage), stage)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    before = memory("VmRSS")
    reset_peak()
    pipe.send(sum(p.numel() for p in trained))
    while pipe.recv():
        start = time.perf_counter()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pipe.send((loss.item(), time.perf_counter() - start, memory("VmHWM") - before))


def compare(s: Shape, folder: Path, stage: str) -> None:
    """Let the two sides make steps in turn, and print both."""
    pipes, processes, sizes, steps = {}, {}, {}, {"theirs": [], "ours": []}
    for make in (theirs, ours):
        pipe, other_end = SPAWN.Pipe()
        process = SPAWN.Process(target=side, args=(make, s, folder, stage, other_end), daemon=True)
        process.start()
        other_end.close()
        name = make.__name__
        pipes[name], processes[name], sizes[name] = pipe, process, pipe.recv()
    for _ in range(1 + s.rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            steps[name].append(pipe.recv())
    rates, peaks = {}, {}
    for name, pipe in pipes.items():
        pipe.send(False)
        processes[name].join()
        losses, seconds, memories = zip(*steps[name])
        rates[name], peaks[name] = s.batch / statistics.median(seconds[1:]), memories[-1]
        slow, fast = s.batch / max(seconds[1:]), s.batch / min(seconds[1:])
        print(f"{stage:9} {name:7} {sizes[name]:11,} trained   first loss {losses[0]:.5f}   "
              f"{rates[name]:6.2f} samples/s ({slow:.2f} to {fast:.2f})   peak {peaks[name]:6.0f} MiB")
    difference = abs(steps["ours"][0][0] - steps["theirs"][0][0])
    assert difference < 1e-4, "the two sides do not compute the same loss"
    print(f"{stage:9} ours / theirs: samples/s {rates['ours'] / rates['theirs']:.2f} ×   "
          f"peak {peaks['ours'] / peaks['theirs']:.2f} ×", flush=True)


def main() -> None:
    s = parse(Shape)
    with tempfile.TemporaryDirectory() as folder:
        make_weights(s, Path(folder))
        for stage in ("pretrain", "finetune"):
            compare(s, Path(folder), stage)


if __name__ == "__main__":
    run(main)
