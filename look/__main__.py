"""Look inside checkpoints and runs: one HTML file that needs no network.

    python -m look --ckpt DIR [DIR …] --image FILE --prompt TEXT --out page.html    side by side
    python -m look --run DIR [DIR …] --out page.html                               over each other
"""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.files import refuse_existing, write_json
from common.flags import UserError, option, parse, run
from common.images import open_image
from common.parallel import choose_device
from data import TEMPLATES
from evaluate import Assistant
from look.gather import gather
from look.page import convert, write_page, write_pictures
from look.runs import group_runs


@dataclass
class LookConfig:
    """Write one page about checkpoints (--ckpt) or runs (--run)."""
    ckpt: list[str] | None = option(
        None, "checkpoints, runs (their newest one), released LLaVAs", "checkpoints")
    image: str | None = option(None, "the picture")
    prompt: str | None = option(None, "the question about it")
    max_new_tokens: int = option(32, "the longest answer", most=2**16)
    tsne: bool = option(False, "t-SNE in place of PCA; needs scikit-learn")
    json: str | None = option(None, "also write the numbers to this file")
    png: str | None = option(None, "also write attention and similarity as pictures to this folder")
    run: list[str] | None = option(
        None, "--out folders of train.py; seeds of one setting make a band", "runs")
    watch: int | None = option(None, "write the page again every N seconds, until Ctrl-C")
    vision: str | None = option(None, "folder of the vision encoder", "model")
    llm: str | None = option(None, "folder of the language model")
    template: Literal[tuple(TEMPLATES)] | None = option(
        None, "how text is written; unset: as in training, or v1")
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
        device, dtype = choose_device(cfg.device)
        parts = cfg.template, cfg.vision, cfg.llm
        assistant = Assistant.from_checkpoint(ckpt, device, dtype, *parts)
        looks.append(gather(assistant, ckpt, image, cfg.prompt, cfg.max_new_tokens, cfg.tsne))
        print(f"{ckpt}: {looks[-1]['answer']}")
        if cfg.png:
            write_pictures(Path(cfg.png) / f"{n}-{Path(ckpt).name}", looks[-1])
    write_page(Path(cfg.out), f"“{cfg.prompt}”", looks)
    if cfg.json:
        numbers = convert(looks, lambda t: t.tolist(), lambda picture: picture.size)
        write_json(Path(cfg.json), numbers, indent=None)


def main() -> None:
    cfg = parse(LookConfig, program="python -m look")
    if (cfg.ckpt is None) == (cfg.run is None):
        raise UserError("say what to look at: --ckpt DIR …, or --run DIR …")
    if cfg.watch is not None and (cfg.run is None or cfg.watch < 1):
        raise UserError("--watch N goes with --run; N is in seconds, 1 at least")
    refuse_existing(cfg.out, ours="<!doctype html>\n<!-- The page of `python -m look`")
    refuse_existing(cfg.json, "--json")
    refuse_existing(cfg.png, "--png")
    if cfg.ckpt:
        look_at_checkpoints(cfg)
    folders = [Path(folder) for folder in cfg.run or []]
    title = "runs " + ", ".join(folder.name for folder in folders)
    while folders:
        runs = {"groups": group_runs(folders), "answers": []}
        write_page(Path(cfg.out), title, run=runs, refresh=cfg.watch)
        if cfg.watch is None:
            break
        time.sleep(cfg.watch)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    run(main)
