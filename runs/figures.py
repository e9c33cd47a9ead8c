"""The numbers and pictures of docs/figures.md: the same pictures and questions put to every run.

    python -m runs.figures --run out/figures/*-[0-9] --out out/figures

Prints one table, mean ± standard deviation over the seeds of an objective. Writes figures.json;
attention.png and similarity.png (one line an objective: the picture, then every layer); inside.html
and runs.html, pages of look/. Scenes are drawn here, to know where each object is, and are new.
"""
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from common.files import read_json, write_json
from common.flags import UserError, option, parse, run
from evaluate import Assistant
from evaluation.metrics import exact
from hub.checkpoint import checkpoints
from look.gather import gather
from look.page import overlay, write_page
from look.runs import group_runs
from toy.world import COLUMNS, ROWS, draw_from, render


@dataclass
class FigureConfig:
    """Ask finished toy runs about the same pictures."""
    run: list[str] = option(None, "--out folders of train.py")
    out: str = option("out/figures", "folder for figures.json and the pictures")
    scenes: int = option(200, "pictures", least=1)


def draw_scenes(n: int) -> list[tuple]:
    """(scene, picture, object asked for) n times, from the toy's test split."""
    rng, out = random.Random(7), []
    for i in range(n):
        scene = draw_from("test", rng, 1 + i % 3)
        out.append((scene, render(scene, rng), rng.choice(scene)))
    return out


def patch_of(thing: tuple) -> int:
    """The image token that shows an object (row, column, colour, shape)."""
    return 3 * ROWS.index(thing[0]) + COLUMNS.index(thing[1])


def measure_scene(look: dict, scene: tuple, thing: tuple) -> dict[str, float]:
    """What one picture gives to the table."""
    L, last, at = look["layers"], look["prompt_rows"] - 1, patch_of(thing)
    objects = [patch_of(t) for t in scene]
    word = [t.strip() for t in look["tokens"]].index(thing[3])
    to_image = look["attention"][:, last]                                       # (L,N)
    share = to_image / to_image.sum(1, keepdim=True)
    similarity = look["similarity"]                                             # (L+1,M,N)
    prompt = similarity[:, :last + 1].mean(1)                                   # (L+1,N)
    others = [i for i in range(9) if i != at]
    numbers = {f"attention on the object asked for, layer {k + 1}, %": 100 * share[k, at].item()
               for k in range(L)}
    numbers[f"brightest patch is that object, layer {L}, %"] = 100.0 * (share[-1].argmax().item() == at)
    for k, name in ((0, "projector"), (L, f"layer {L}")):
        numbers[f"cosine of its word with its patch, {name}"] = similarity[k, word, at].item()
        rest = similarity[k, word, others].mean().item()
        numbers[f"… minus the other patches, {name}"] = similarity[k, word, at].item() - rest
        numbers[f"cosine of the prompt with all patches, {name}"] = prompt[k].mean().item()
    for k in range(L + 1):
        numbers[f"whole words, layer {k}, %"] = 100 * look["meaningful"][k]
    for k in (0, L):
        named = 0
        for row, column, colour, shape in scene:
            nearest = look["nearest"][k, patch_of((row, column))].tolist()
            words = {look["words"][w].strip() for w in nearest}
            named += colour in words or shape in words
        title = f"objects with their colour or shape among the nearest 3, layer {k}, %"
        numbers[title] = 100 * (named / len(scene))
    numbers["answers right, %"] = 100.0 * bool(exact(look["answer"], thing[2]))
    numbers["answers right, patches as words, %"] = 100.0 * bool(exact(look["answer_with_words"], thing[2]))
    empty = [i for i in range(9) if i not in objects]
    norms = look["patch_norm"][0]
    ratio = norms[objects].mean() / norms[empty].mean()
    numbers["norm of objects' patches / empty ones"] = ratio.item()
    return numbers


def measure_run(run: Path, scenes: list[tuple]) -> tuple[dict[str, float], dict]:
    """The means over all scenes, MIR and distances; and the look of the first of three objects."""
    assistant = Assistant.from_checkpoint(checkpoints(run, "finetune")[-1], "cpu", torch.float32)
    rows, first = [], None
    for scene, picture, thing in scenes:
        look = gather(assistant, run.name, picture, f"What colour is the {thing[3]}?", 8)
        rows.append(measure_scene(look, scene, thing))
        if first is None and len(scene) == 3:
            first = look
    numbers = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    results = read_json(run / "results.json")
    for stage, name in (("pretrain", "stage 1"), ("finetune", "stage 2")):
        numbers[f"MIR after {name}"] = results["stages"][stage]["mir"]
        for k, d in enumerate(results["stages"][stage]["layers"], 1):
            numbers[f"distance with α after {name}, layer {k}"] = d
    numbers["test accuracy, mean, %"] = results["accuracy"]["test"]["mean"]
    return numbers, first


def sheet(path: Path, looks: dict[str, dict], kind: str) -> None:
    """One line an objective: the picture, then a map a layer; of attention that of the question's
    last token, of similarity the mean over the prompt."""
    size, gap, left, top = 144, 6, 60, 24
    columns = ["picture"] + [f"layer {k}" for k in range(kind == "attention", 5)]
    width, height = left + len(columns) * (size + gap), top + len(looks) * (size + gap)
    page = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for x, column in enumerate(columns):
        pen.text((left + x * (size + gap) + size / 2, top / 2), column, "black", font, "mm")
    for y, (name, look) in enumerate(looks.items()):
        last = look["prompt_rows"] - 1
        pictures = [look["picture"].resize((size, size), Image.Resampling.NEAREST)]
        for values in look[kind]:
            values = values[last] if kind == "attention" else values[:last + 1].mean(0)
            low = 0 if kind == "attention" else values.min()
            pictures.append(overlay(look["picture"], values - low, look["side"], size=size))
        pen.text((left / 2, top + y * (size + gap) + size / 2), name, "black", font, "mm")
        for x, picture in enumerate(pictures):
            page.paste(picture, (left + x * (size + gap), top + y * (size + gap)))
    page.quantize(64).save(path, optimize=True)


def main() -> None:
    cfg = parse(FigureConfig, program="python -m runs.figures")
    if not cfg.run:
        raise UserError("say with --run which runs")
    scenes, found, looks = draw_scenes(cfg.scenes), {}, {}
    for folder in cfg.run:
        loss = read_json(Path(folder) / "run.json")["loss"]
        numbers, look = measure_run(Path(folder), scenes)
        found.setdefault(loss, []).append(numbers)
        looks.setdefault(loss, look)
    names = sorted(found, key=["ce", "vdep", "vista", "basic"].index)
    print("| | " + " | ".join(f"{n} (n = {len(found[n])})" for n in names) + " |\n"
          + "|---" * (len(names) + 1) + "|")
    for number in next(iter(found.values()))[0]:
        cells = []
        for name in names:
            values = [row[number] for row in found[name]]
            spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3g}{spread}")
        print(f"| {number} | " + " | ".join(cells) + " |")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "figures.json", found)
    write_page(out / "inside.html", f"“{looks[names[0]]['prompt']}”",
               [looks[name] for name in names])
    write_page(out / "runs.html", "the papers' objectives on the toy",
               run={"groups": group_runs([Path(r) for r in cfg.run]), "answers": []})
    for kind in ("attention", "similarity"):
        sheet(out / f"{kind}.png", {name: looks[name] for name in names}, kind)


if __name__ == "__main__":
    run(main)
