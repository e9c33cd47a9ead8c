"""Questions a second of evaluation/generate.py and of transformers, 18 questions an image as POPE.

    python -m bench.evaluate              a random model: ViT 6x256 of 576 image tokens, LLaMA 8x512, vocabulary 32000
    python -m bench.evaluate --ckpt DIR   a checkpoint trained on the toy, asked yes/no questions about its pictures

The checkpoint is exported to llava-hf's layout, which transformers loads (only this bench needs
transformers). Both sides get the same ids and pixels, in float32, greedily, on as many threads;
each answers a few questions first.

The random model's prompts are random ids, as many as LLaMA's tokenizer makes of POPE's prompts in
LLaVA's v1 template: 35 before the image and 22 to 28 after it, of which the last 17 are the same.
Its answers are 4 tokens long. Large weights make them differ.
"""
import json
import random
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.common import import_transformers
from common.files import read_json
from common.flags import option, parse, run
from data import IMAGE, encode, eos_id
from evaluation.generate import generate
from hub.checkpoint import checkpoint_folder, load_model, save_checkpoint
from hub.configs import load_processor
from hub.export import export
from hub.tokenizer import load_tokenizer
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT
from toy import world

ROOT = Path(__file__).resolve().parent.parent
VISION = VisionConfig(256, 1024, 6, 4, image_size=336, patch_size=14)
DECODER = DecoderConfig(32000, 512, 1376, 8, 8)
QUESTIONS = 18                                              # an image


@dataclass
class Config:
    """Measure questions a second, of this repository and of transformers."""
    ckpt: str | None = option(None, "a checkpoint trained on the toy (unset: a random model)")
    images: int = option(4, "images, of 18 questions each", least=1)
    batch_size: int = option(36, "questions at a time, where there is a batch", least=1)
    threads: int | None = option(None, "threads of PyTorch (unset: its own choice)", least=1)


@dataclass
class Load:
    input_ids: list[Tensor]
    image_mask: list[Tensor]
    image_index: list[int]
    pixel_values: Tensor            # (I,3,H,W)
    eos: int | None
    max_new_tokens: int


def random_checkpoint(folder: Path) -> Path:
    """Save a random model with the toy's tokenizer, whose special tokens alone matter here."""
    torch.manual_seed(0)
    model = Llava(ViT(VISION), Projector(VISION.hidden_size, DECODER.hidden_size), Decoder(DECODER))
    for name, p in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(p, float(norm), 0.1 if norm else 2 * p.shape[-1] ** -0.5)
    (folder / "vision").mkdir()
    size = VISION.image_size
    (folder / "vision/preprocessor_config.json").write_text(json.dumps(
        {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size},
         "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    config = {"stage": "finetune", "step": 1, "steps": 1, "template": "v1", "pad": True,
              "after_special": "4.31", "vision": str(folder / "vision"),
              "llm": str(ROOT / "toy/llm")}
    names = {n for n, _ in model.named_parameters()}
    save_checkpoint(folder / "finetune-1", model, names, config, {})
    return folder / "finetune-1"


def random_load(images: int) -> Load:
    g = torch.Generator().manual_seed(0)
    def ids(n):
        return torch.randint(3, DECODER.vocab_size, (n,), generator=g)
    before, after = ids(35), ids(17)
    N = VISION.image_tokens
    pixels = torch.randn(images, 3, VISION.image_size, VISION.image_size, generator=g)
    out = Load([], [], [], pixels, None, 4)
    for i in range(images * QUESTIONS):
        question = torch.cat([ids(5 + i % 7), after])
        out.input_ids.append(torch.cat([before, torch.zeros(N, dtype=torch.long), question]))
        position = torch.arange(35 + N + len(question))
        out.image_mask.append((position >= 35) & (position < 35 + N))
        out.image_index.append(i // QUESTIONS)
    return out


def toy_load(ckpt: Path, model: Llava, images: int) -> Load:
    """Ask for every pair of the toy's world, as POPE asks for objects, and two questions more."""
    tokenizer, processor, rng = load_tokenizer(ckpt), load_processor(ckpt), random.Random(0)
    config = read_json(ckpt / "config.json")
    questions = [f"Is there a {c} {s}?" for c in world.COLOURS for s in world.SHAPES]
    questions += ["How many objects are there?", "Which row has the circle?"]
    ids, masks, index, pixels = [], [], [], []
    for i in range(images):
        pixels.append(processor(world.render(world.draw_from("test", rng), rng), config["pad"]))
        for text in questions:
            turns = [{"from": "human", "value": f"{IMAGE}\n{text}"}]
            prompt, _, mask = encode(turns, tokenizer, config["template"], model.image_tokens,
                                     after_special=config["after_special"])
            ids.append(prompt)
            masks.append(mask)
            index.append(i)
    eos = eos_id(tokenizer, config["template"])
    return Load(ids, masks, index, torch.stack(pixels), eos, 8)


def ours(model: Llava, load: Load, rows: range, shared: bool = True) -> list[list[int]]:
    ids, masks = load.input_ids[rows.start:rows.stop], load.image_mask[rows.start:rows.stop]
    index = load.image_index[rows.start:rows.stop]
    if not shared:
        return generate(model, ids, load.pixel_values[index], load.max_new_tokens, masks, load.eos)
    images = sorted(set(index))
    return generate(model, ids, load.pixel_values[images], load.max_new_tokens, masks, load.eos,
                    [images.index(i) for i in index])


def theirs(model, load: Load, rows: range) -> list[list[int]]:
    """Answer with transformers, which takes prompts padded on the left."""
    width = max(len(load.input_ids[r]) for r in rows)
    ids, seen = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, r in enumerate(rows):
        n = len(load.input_ids[r])
        ids[i, -n:] = load.input_ids[r].masked_fill(load.image_mask[r], model.config.image_token_id)
        seen[i, -n:] = 1
    pixels = load.pixel_values[[load.image_index[r] for r in rows]]
    new = model.generate(input_ids=ids, attention_mask=seen, do_sample=False, pixel_values=pixels,
                         max_new_tokens=load.max_new_tokens)[:, width:].tolist()
    return [a[:a.index(load.eos)] if load.eos in a else a for a in new]


def measure(answer, model, load: Load, size: int) -> tuple[list[list[int]], float]:
    """Return the answers and questions a second, in batches of `size`."""
    n = len(load.input_ids)
    answer(model, load, range(min(size, 4)))
    start = time.perf_counter()
    answers = []
    for first in range(0, n, size):
        answers += answer(model, load, range(first, min(first + size, n)))
    return answers, n / (time.perf_counter() - start)


def main() -> None:
    cfg = parse(Config)
    transformers = import_transformers()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    with tempfile.TemporaryDirectory() as folder:
        ckpt = checkpoint_folder(cfg.ckpt) if cfg.ckpt else random_checkpoint(Path(folder))
        model = load_model(ckpt, dtype=torch.float32).eval()
        load = toy_load(ckpt, model, cfg.images) if cfg.ckpt else random_load(cfg.images)
        export(ckpt, Path(folder) / "out")
        other = transformers.LlavaForConditionalGeneration.from_pretrained(
            Path(folder) / "out", dtype=torch.float32)
    other.generation_config.eos_token_id = load.eos
    lengths = [len(ids) for ids in load.input_ids]
    print(f"{len(lengths)} questions about {cfg.images} images of {model.image_tokens} tokens, "
          f"prompts of {min(lengths)} to {max(lengths)}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")
    n, alone = cfg.batch_size, partial(ours, shared=False)
    wanted, fastest = None, None
    for name, answer, which, size in [(f"ours, batches of {n}", ours, model, n),
                                      (f"ours, nothing shared, batches of {n}", alone, model, n),
                                      (f"transformers, batches of {n}", theirs, other, n),
                                      ("transformers, one at a time", theirs, other, 1)]:
        answers, speed = measure(answer, which, load, size)
        wanted, fastest = wanted or answers, fastest or speed
        same = sum(a == b for a, b in zip(answers, wanted))
        print(f"{name:40}{speed:8.2f} questions/s   ours / this {fastest / speed:6.2f}   "
              f"same ids {same}/{len(wanted)}", flush=True)
    print(f"{len(set(map(tuple, wanted)))} different answers")


if __name__ == "__main__":
    run(main)
