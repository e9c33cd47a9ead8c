"""Look inside checkpoints, runs and data: one HTML file that needs no network.

    python -m look --ckpt DIR [DIR …] --image FILE --prompt TEXT --out page.html       checkpoints side by side
    python -m look --run DIR [DIR …] --out page.html                                  runs over each other
    python -m look --data FILE --images DIR --llm DIR --vision DIR --out page.html     samples as the model gets them
"""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.files import refuse_existing, write_json
from common.flags import UserError, option, parse, run
from common.images import open_image
from common.parallel import choose_device
from common.text import show_token
from data import IGNORE, TEMPLATES, Format, Samples
from evaluate import Assistant
from hub.configs import load_processor, vision_config
from hub.samples import read_samples
from hub.tokenizer import load_tokenizer
from look.gather import gather, picture_of
from look.page import convert, write_page, write_pictures
from look.runs import group_runs


@dataclass
class LookConfig:
    """Write one page about checkpoints (--ckpt), runs (--run) or training samples (--data)."""
    ckpt: list[str] | None = option(None, "checkpoints, runs (their newest one), released LLaVAs", "checkpoints")
    image: str | None = option(None, "the picture")
    prompt: str | None = option(None, "the question about it")
    max_new_tokens: int = option(32, "the longest answer", most=2**16)
    tsne: bool = option(False, "t-SNE in place of PCA; needs scikit-learn")
    json: str | None = option(None, "also write the numbers to this file")
    png: str | None = option(None, "also write attention and similarity as pictures to this folder")
    run: list[str] | None = option(None, "--out folders of train.py; seeds of one setting make a band", "runs")
    watch: int | None = option(None, "write the page again every N seconds, until Ctrl-C")
    data: str | None = option(None, "LLaVA JSON or JSONL", "data")
    images: str | None = option(None, "the folder of its images")
    show: int = option(12, "samples to show")
    vdep: bool = option(False, "after each sample with an image the same one in VDEP mode")
    vision: str | None = option(None, "folder of the vision encoder", "model")
    llm: str | None = option(None, "folder of the language model")
    template: Literal[tuple(TEMPLATES)] | None = option(None, "how text is written (unset: as in training, or v1)")
    out: str = option("page.html", "the page")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")


def look_at_checkpoints(cfg: LookConfig) -> None:
    """One checkpoint after the other: only one is in memory at a time."""
    if cfg.image is None or cfg.prompt is None:
        raise UserError("--ckpt needs --image FILE and --prompt TEXT")
    try:
        image = open_image(Path(cfg.image))
    except ValueError as e:
        raise UserError(f"--image {cfg.image}: {e}") from None
    looks = []
    for n, ckpt in enumerate(cfg.ckpt, 1):
        assistant = Assistant.from_checkpoint(ckpt, *choose_device(cfg.device), cfg.template, cfg.vision, cfg.llm)
        looks.append(gather(assistant, ckpt, image, cfg.prompt, cfg.max_new_tokens, cfg.tsne))
        print(f"{ckpt}: {looks[-1]['answer']}")
        if cfg.png:
            write_pictures(Path(cfg.png) / f"{n}-{Path(ckpt).name}", looks[-1])
    write_page(Path(cfg.out), f"“{cfg.prompt}”", looks)
    if cfg.json:
        write_json(Path(cfg.json), convert(looks, lambda t: t.tolist(), lambda picture: picture.size), indent=None)


def look_at_samples(cfg: LookConfig) -> None:
    """The first samples of a file as `Samples` makes them, which is how training gets them."""
    if cfg.llm is None or cfg.vision is None:
        raise UserError("--data needs --llm DIR for its tokenizer and --vision DIR for its preprocessing")
    file, template = read_samples(cfg.data)[0], cfg.template or "v1"
    if file.column("image").any() and cfg.images is None:
        raise UserError(f"{cfg.data} names images: add --images with the folder they are in")
    text = Format(template, vision_config(cfg.vision).image_tokens, pad=template != "plain")
    samples = Samples(file, cfg.images or ".", load_tokenizer(cfg.llm), load_processor(cfg.vision), text)
    shown = []
    for i in range(min(cfg.show, len(samples))):
        shown.append(show_sample(samples, i))
        if cfg.vdep and file[i].get("image") is not None:
            shown.append(show_sample(samples, i + len(samples)))                # the same one in VDEP mode
    write_page(Path(cfg.out), f"{Path(cfg.data).name} as the model gets it, template {template}", samples=shown)


def show_sample(samples: Samples, i: int) -> dict:
    """Picture after preprocessing, and [text, kind] of each token; the image tokens are one entry."""
    e, tokens = samples[i], []
    for token, label, image in zip(e.input_ids.tolist(), e.labels.tolist(), e.image_mask.tolist()):
        if not image:
            tokens.append([show_token(samples.tokenizer, token), "text" if label == IGNORE else "answer"])
        elif not tokens or tokens[-1][1] != "image":
            tokens.append([f"{int(e.image_mask.sum())} image tokens", "image"])
    picture = None if e.pixel_values is None else picture_of(samples.processor, e.pixel_values)
    return {"id": e.id, "picture": picture, "tokens": tokens, "vdep": e.reconstruct, "problem": e.problem,
            "length": len(e.input_ids), "supervised": int((e.labels != IGNORE).sum())}


def main() -> None:
    cfg = parse(LookConfig, program="python -m look")
    if sum(given is not None for given in (cfg.ckpt, cfg.run, cfg.data)) != 1:
        raise UserError("say what to look at: --ckpt DIR …, --run DIR …, or --data FILE")
    if cfg.watch is not None and (cfg.run is None or cfg.watch < 1):
        raise UserError("--watch N goes with --run; N is in seconds, 1 at least")
    refuse_existing(cfg.out, ours="<!doctype html>\n<!-- The page of `python -m look`")
    refuse_existing(cfg.json, "--json")
    refuse_existing(cfg.png, "--png")
    if cfg.ckpt:
        look_at_checkpoints(cfg)
    elif cfg.data:
        look_at_samples(cfg)
    while cfg.run:
        title, groups = "runs " + ", ".join(Path(r).name for r in cfg.run), group_runs([Path(r) for r in cfg.run])
        write_page(Path(cfg.out), title, run={"groups": groups, "answers": []}, refresh=cfg.watch)
        if cfg.watch is None:
            break
        time.sleep(cfg.watch)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    run(main)
