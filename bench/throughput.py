"""Training steps a second and peak memory: ours against transformers' LlavaForConditionalGeneration, the same weights
and batch, stage 1 and stage 2. Needs transformers (5.x), which nothing else here does.

    python -m bench.throughput                      ViT 6×256 at 112 px, LLaMA 8×512, vocabulary 32000, on 2 threads
    python -m bench.throughput --vision-layers 24 --vision-width 1024 --image-size 336 --layers 32 --width 4096 ...

A sample has 112 tokens: 64 of the image, 48 of text, of which 47 are supervised in stage 1 (a caption) and 24 in stage
2 (half question, half answer). A step is forward, backward, clipping to norm 1, fused AdamW. The sides take turns, each
in a process of its own, so that what else the machine does hits both; peak is what a step needs beyond what was there
before the first one (gradients and AdamW's moments included).
"""
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.flags import UserError, option, parse, run
from data import IGNORE, Batch
from hub.checkpoint import load_model
from losses import Objective, count_terms
from training.settings import TrainConfig


@dataclass
class Shape:
    """Ours against transformers, a training step of stage 1 and of stage 2."""
    batch: int = option(8, "samples")
    text: int = option(48, "text tokens a sample")
    vision_layers: int = option(6, "of the vision encoder")
    vision_width: int = option(256, "of the vision encoder")
    image_size: int = option(112, "pixels; patches of 14")
    layers: int = option(8, "of the language model")
    width: int = option(512, "of the language model")
    inner: int = option(1376, "width of the language model's MLP")
    vocabulary: int = option(32000, "tokens")
    threads: int = option(2, "of each side")
    rounds: int = option(5, "turns of each side, of one step each after one that is not counted")


def make_weights(s: Shape, folder: Path) -> None:
    """Random weights as a llava-hf folder, written by transformers."""
    try:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    except ImportError:
        raise UserError("this bench compares with transformers, which is not installed: pip install transformers, in "
                        "another environment") from None
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=s.vision_width, intermediate_size=4 * s.vision_width,
                              num_hidden_layers=s.vision_layers, num_attention_heads=s.vision_width // 64,
                              image_size=s.image_size, patch_size=14)
    text = LlamaConfig(vocab_size=s.vocabulary, hidden_size=s.width, intermediate_size=s.inner,
                       num_hidden_layers=s.layers, num_attention_heads=s.width // 64)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=s.vocabulary - 1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def make_batch(s: Shape, stage: str) -> Batch:
    torch.manual_seed(1)
    n = (s.image_size // 14) ** 2
    T = n + s.text
    ids = torch.randint(3, s.vocabulary - 2, (s.batch, T))
    ids[:, 0] = 1
    image = torch.zeros(s.batch, T, dtype=torch.bool)
    image[:, 1:1 + n] = True
    labels = ids.clone()
    labels[:, :1 + n + (0 if stage == "pretrain" else s.text // 2 - 1)] = IGNORE
    ids[image] = s.vocabulary - 1                           # transformers finds the image by this id, ours by the mask
    everywhere = torch.ones(s.batch, T, dtype=torch.bool)
    return Batch(ids, labels, image, everywhere, torch.randn(s.batch, 3, s.image_size, s.image_size),
                 everywhere[:, 0], ~everywhere[:, 0])


def ours(folder: Path, batch: Batch, stage: str):
    """(model, a function that makes the loss) with what the stage trains asking for gradients."""
    model = load_model(folder)
    model.requires_grad_(stage == "finetune")
    model.vision_tower.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(True)
    objective, count = Objective(model, TrainConfig(stage=stage)), count_terms("ce", batch)
    return model, lambda: sum(t.weight * t.total / count[t.name] for t in objective(batch))


def theirs(folder: Path, batch: Batch, stage: str):
    from transformers import LlavaForConditionalGeneration
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(stage == "finetune")
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    return model, lambda: model(input_ids=batch.input_ids, pixel_values=batch.pixel_values, labels=batch.labels,
                                attention_mask=batch.attention_mask, use_cache=False).loss


def memory(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, in MiB."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024


def side(make, s: Shape, folder: Path, stage: str, pipe) -> None:
    """A step each time the pipe says so: sends (loss, seconds, peak MiB so far)."""
    torch.set_num_threads(s.threads)
    model, loss_of = make(folder, make_batch(s, stage), stage)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")           # sets the peak back to the present
    pipe.send(sum(p.numel() for p in trained))
    while pipe.recv():
        start = time.perf_counter()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pipe.send((loss.item(), time.perf_counter() - start, memory("VmHWM") - before))


def main() -> None:
    s = parse(Shape)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        make_weights(s, Path(folder))
        for stage in ("pretrain", "finetune"):
            sides = []
            for make in (theirs, ours):
                here, there = spawn.Pipe()
                process = spawn.Process(target=side, args=(make, s, Path(folder), stage, there), daemon=True)
                process.start()
                sides.append((make.__name__, here, process, here.recv()))
            steps = {name: [] for name, *_ in sides}
            for _ in range(1 + s.rounds):
                for name, pipe, *_ in sides:
                    pipe.send(True)
                    steps[name].append(pipe.recv())
            rows = {}
            for name, pipe, process, trained in sides:
                pipe.send(False)
                process.join()
                loss, seconds = steps[name][0][0], [t for _, t, _ in steps[name][1:]]
                rows[name] = s.batch / statistics.median(seconds), steps[name][-1][2], loss
                print(f"{stage:9} {name:7} {trained:11,} trained   first loss {loss:.5f}   {rows[name][0]:6.2f} samples"
                      f"/s ({s.batch / max(seconds):.2f} to {s.batch / min(seconds):.2f})   peak {rows[name][1]:6.0f} "
                      "MiB")
            assert abs(rows["ours"][2] - rows["theirs"][2]) < 1e-4, "the two sides do not compute the same loss"
            print(f"{stage:9} ours / theirs: samples/s {rows['ours'][0] / rows['theirs'][0]:.2f} ×   "
                  f"peak {rows['ours'][1] / rows['theirs'][1]:.2f} ×", flush=True)


if __name__ == "__main__":
    run(main)
