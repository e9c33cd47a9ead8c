"""Look inside checkpoints, runs and data: one HTML file that needs no network.

    python -m look --ckpt DIR [DIR …] --image FILE --prompt TEXT --out page.html       checkpoints side by side
    python -m look --run DIR [DIR …] --out page.html                                  runs over each other
    python -m look --data FILE --images DIR --llm DIR --vision DIR --out page.html     samples as the model gets them
"""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mir
from common.files import write_json
from common.flags import UserError, option, parse, run
from common.parallel import choose_device
from common.text import RULES
from data import IGNORE, TEMPLATES, Format, ImageProcessor, Samples, collate, open_image
from hub.configs import vision_config
from hub.samples import SampleFile
from hub.tokenizer import load_tokenizer
from look.gather import gather, open_checkpoint, show_token, undo
from look.page import as_lists, write_page, write_pictures
from look.runs import write_comparison
from pairing import read_pairs


@dataclass
class LookConfig:
    """Write one page about checkpoints (--ckpt), runs (--run) or training samples (--data)."""
    ckpt: list[str] | None = option(None, "checkpoints, runs (their newest), released LLaVAs", "checkpoints")
    image: str | None = option(None, "the picture")
    prompt: str | None = option(None, "the question about it")
    max_new_tokens: int = option(32, "the longest answer")
    pairs: str | None = option(None, "question file or LLaVA JSON for Fréchet distances, its images in --images; unset: "
                               "the tokens of the one picture")
    tsne: bool = option(False, "t-SNE beside PCA; needs scikit-learn")
    json: str | None = option(None, "also write the numbers to this file")
    png: str | None = option(None, "also write attention and similarity as pictures to this folder")

    run: list[str] | None = option(None, "--out folders of train.py; those that differ in the seed alone make a band",
                                   "runs")
    watch: int | None = option(None, "write the page again every N seconds, until you press Ctrl-C")

    data: str | None = option(None, "LLaVA JSON or JSONL", "data")
    show: int = option(12, "samples to show")
    vdep: bool = option(False, "after each sample with an image the same one in VDEP mode")
    after_special: Literal[RULES] = option("4.31", "spaces after </s>: as this version of transformers has them")
    max_length: int = option(2048, "positions a sample may have")

    images: str | None = option(None, "folder of the images of --data or --pairs", "folders")
    vision: str | None = option(None, "folder of the vision encoder")
    llm: str | None = option(None, "folder of the language model")
    template: Literal[tuple(TEMPLATES)] | None = option(None, "how a conversation is written; unset: as the checkpoint "
                                                        "was trained; v1 for released ones and for --data")

    out: str = option("page.html", "the page", "output")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of computing; auto: bfloat16 where the GPU has it")


def look_at_checkpoints(cfg: LookConfig) -> None:
    """Gather one checkpoint after the other: only one is in memory at a time."""
    if cfg.image is None or cfg.prompt is None:
        raise UserError("--ckpt needs --image FILE and --prompt TEXT")
    try:
        image = open_image(Path(cfg.image))
    except ValueError as e:
        raise UserError(f"--image {cfg.image}: {e}") from None
    device, dtype = choose_device(cfg.device, cfg.dtype)
    looks = []
    for ckpt in cfg.ckpt:
        a = open_checkpoint(ckpt, cfg.vision, cfg.llm, device, dtype, cfg.template)
        look = gather(a, ckpt, image, cfg.prompt, cfg.max_new_tokens, cfg.tsne, distances_of(cfg, ckpt, a))
        looks.append(look)
        if cfg.png:
            write_pictures(Path(cfg.png) / Path(ckpt).name, look)
        print(f"{ckpt}: {look['answer']}")
    write_page(Path(cfg.out), f"“{cfg.prompt}”", looks)
    if cfg.json:
        write_json(Path(cfg.json), as_lists(looks), indent=None)


def distances_of(cfg: LookConfig, ckpt: str, a) -> dict[str, list[float]] | None:
    """Fréchet distances by layer over the first 100 of --pairs, with α and without."""
    if cfg.pairs is None:
        return None
    images = None if cfg.images is None else Path(cfg.images)
    text = Format("v1" if a.template == "plain" else a.template, a.model.vision_tower.config.image_tokens)
    samples = Samples(read_pairs(Path(cfg.pairs), images, 100), images, a.tokenizer, a.processor, text)
    batches = [collate([samples[i] for i in range(at, min(at + 20, len(samples)))], a.processor.crop_size)
               for at in range(0, len(samples), 20)]
    return {name: mir.measure(a.model, batches, normalise=normalise)["layers"]
            for name, normalise in (("with α", True), ("without α", False))}


def look_at_samples(cfg: LookConfig) -> None:
    """Show the first samples of a file as `Samples` makes them, the one way that training gets them."""
    if cfg.llm is None or cfg.vision is None:
        raise UserError("--data needs --llm DIR for its tokenizer and --vision DIR for its preprocessing")
    tokenizer, template = load_tokenizer(cfg.llm), cfg.template or "v1"
    text = Format(template, vision_config(cfg.vision).image_tokens, cfg.max_length, template != "plain",
                  cfg.after_special)
    file = SampleFile(cfg.data)
    if file.column("image").any() and cfg.images is None:
        raise UserError(f"{cfg.data} names images: add --images with the folder they are in")
    samples = Samples(file, cfg.images or ".", tokenizer, ImageProcessor.from_folder(cfg.vision), text)
    shown = []
    for i in range(min(cfg.show, len(samples))):
        shown.append(show_sample(samples, i))
        if cfg.vdep and file[i].get("image") is not None:
            shown.append(show_sample(samples, i + len(samples)))
    write_page(Path(cfg.out), f"{Path(cfg.data).name}: {len(shown)} samples as the model gets them, template "
               f"{template}", samples=shown)


def show_sample(samples: Samples, i: int) -> dict:
    """One sample: picture after preprocessing, tokens, which of them are supervised, where the image is."""
    e = samples[i]
    tokens, n = [], int(e.image_mask.sum())
    for position, (token, label) in enumerate(zip(e.input_ids.tolist(), e.labels.tolist())):
        if e.image_mask[position]:
            if not tokens or tokens[-1][1] != "image":
                tokens.append([f"{n} image tokens", "image"])
        else:
            tokens.append([show_token(samples.tokenizer, token), "answer" if label != IGNORE else "text"])
    picture = None if e.pixel_values is None else undo(samples.processor, e.pixel_values)
    return {"id": e.id, "picture": picture, "tokens": tokens, "vdep": e.reconstruct, "problem": e.problem,
            "length": len(e.input_ids), "supervised": int((e.labels != IGNORE).sum())}


def look_at_runs(cfg: LookConfig) -> None:
    """Write the page of one run or several, once or every --watch seconds."""
    runs = [Path(r) for r in cfg.run]
    while True:
        write_comparison(runs, Path(cfg.out), cfg.watch)
        if cfg.watch is None:
            break
        time.sleep(cfg.watch)


def main() -> None:
    cfg = parse(LookConfig, program="python -m look")
    if sum(x is not None for x in (cfg.ckpt, cfg.run, cfg.data)) != 1:
        raise UserError("say what to look at: --ckpt DIR …, --run DIR …, or --data FILE (one of the three)")
    if cfg.watch is not None and (cfg.run is None or cfg.watch < 1):
        raise UserError("--watch N belongs to --run, N seconds from 1 on")
    if cfg.ckpt:
        look_at_checkpoints(cfg)
    elif cfg.run:
        look_at_runs(cfg)
    else:
        look_at_samples(cfg)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    run(main)
