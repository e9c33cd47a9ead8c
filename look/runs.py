"""A run's page: its curves, tables and six answers; several runs laid over each other, a study's seeds as a band."""
import statistics
from pathlib import Path

import torch
from PIL import Image

from common.files import read_json, read_jsonl, read_lines
from common.flags import UserError
from evaluate import Assistant
from evaluation.metrics import exact
from hub.checkpoint import checkpoints
from look.gather import gather, run, seen_picture
from look.page import write_page

POINTS = 200                        # of a curve: longer ones are averaged over neighbouring steps
NOT_CURVES = {"stage", "step", "kind", "supervised", "tokens_per_s", "peak_gib"}
SAME_STUDY = {"seed", "out", "resume", "overwrite", "workers", "device", "timeout"}     # may differ between seeds


def write_report(out: Path, assistant: Assistant | None = None, refresh: int | None = None) -> Path:
    """Write out/report.html. With an assistant and the toy's data in `out` it shows answers, and looks inside one."""
    pictures, looks = [], []
    if assistant is not None and (out / "data" / "test.jsonl").is_file():
        pictures, question = six_answers(assistant, out / "data")
        name = checkpoints(out)[-1].name
        looks = [gather(assistant, name, question["picture"], question["text"])]
    write_page(out / "report.html", f"run {out.name}", looks, {"groups": group_runs([out]), "answers": pictures},
               refresh=refresh)
    return out / "report.html"


def write_comparison(runs: list[Path], path: Path, refresh: int | None = None) -> None:
    """Write one page for several runs."""
    names = ", ".join(r.name for r in runs)
    write_page(path, f"runs {names}" if len(runs) > 1 else f"run {names}",
               run={"groups": group_runs(runs), "answers": []}, refresh=refresh)


# ------------------------------------------------------------------------------------------------ curves
def read_curves(run: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Stage → name → [(step, value)] of what a run has logged so far. MIR has its own steps."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl: give the --out folder of a run")
    lines, last = read_lines(path)
    stages = {}
    for line in [*lines, last or {}]:
        if line.get("stage") not in ("pretrain", "finetune"):
            continue
        curves = stages.setdefault(line["stage"], {})
        names = ["mir"] if line.get("kind") == "mir" else [k for k in line if k not in NOT_CURVES]
        for name in names:
            curves.setdefault(name, []).append((line["step"], line[name]))
    return stages


def overlay_curves(curves: list[list[tuple[int, float]]]) -> dict:
    """The same curve of several runs → its mean, least and largest value over runs, at POINTS steps at most. Each point
    is a mean over neighbouring steps, then over the runs that have come so far."""
    width = max(1, -(-max(step for curve in curves for step, _ in curve) // POINTS))        # steps a point
    bins = {}
    for number, curve in enumerate(curves):
        for step, value in curve:
            bins.setdefault((step - 1) // width, {}).setdefault(number, []).append(value)
    out = {"steps": [], "mean": [], "low": [], "high": [], "width": width}
    for b in sorted(bins):
        values = [statistics.fmean(v) for v in bins[b].values()]
        out["steps"].append(min((b + 1) * width, b * width + max(len(v) for v in bins[b].values())) if width > 1
                            else b + 1)
        out["mean"].append(statistics.fmean(values))
        out["low"].append(min(values))
        out["high"].append(max(values))
    return out


def group_runs(runs: list[Path]) -> list[dict]:
    """Runs that differ in their seed alone make one group, with a band over its curves."""
    groups = {}
    for folder in runs:
        settings = read_json(folder / "run.json")
        key = str({k: v for k, v in settings.items() if k not in SAME_STUDY})
        groups.setdefault(key, (settings, []))[1].append(folder)
    titles = [settings["loss"] + (" + MoCa" if settings["moca"] else "") for settings, _ in groups.values()]
    out = []
    for title, (_, folders) in zip(titles, groups.values()):
        if titles.count(title) > 1:
            title = f"{title} ({folders[0].name})"
        read = [read_curves(folder) for folder in folders]
        stages = {}
        for stage in ("pretrain", "finetune"):
            names = {name: None for curves in read for name in curves.get(stage, {})}       # a set that keeps order
            stages[stage] = {name: overlay_curves([c[stage][name] for c in read if name in c.get(stage, {})])
                             for name in names}
        out.append({"name": title, "runs": [f.name for f in folders], "stages": stages, **results_of(folders)})
    return out


def results_of(folders: list[Path]) -> dict:
    """Accuracy tables and MIR by layer of the runs that have ended: [mean, standard deviation] over runs."""
    results = [read_json(f / "results.json") for f in folders if (f / "results.json").is_file()]
    tables, layers = {}, {}
    for r in results:
        for kind, title in (("accuracy", ""), ("shuffled", ", images shuffled")):
            for name, row in r[kind].items():
                for category, value in row.items():
                    tables.setdefault(name + title, {}).setdefault(category, []).append(value)
        for stage, m in r["stages"].items():
            layers.setdefault(stage, []).append(m["layers"])
    accuracy = {name: {category: [statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0]
                       for category, v in row.items()} for name, row in tables.items()}
    return {"accuracy": accuracy, "finished": len(results),
            "mir_layers": {stage: torch.tensor(rows).mean(0).tolist() for stage, rows in layers.items()}}


# ------------------------------------------------------------------------------------------------ six answers
def six_answers(a: Assistant, data: Path) -> tuple[list[dict], dict]:
    """A question of every category about six pictures: the answer, and the attention of the question's last token in
    the last layer. Returns them and one question to look at more closely, about a colour."""
    rows = read_jsonl(data / "test.jsonl")
    device = next(a.model.parameters()).device
    out, chosen = [], None
    for row in rows[::len(rows) // 6 + 1]:
        image = Image.open(data / "images" / row["image"])
        inside = run(a, a.processor(image, a.pad)[None].to(device), row["text"], 16)
        last = int((inside.rows < inside.answer).sum()) - 1
        attention = inside.attention[-1].mean(0)[last][inside.image]                        # (N,)
        answer = a.tokenizer.decode(inside.ids[inside.answer:].tolist()).strip()
        c = a.model.vision_tower.config
        out.append({"picture": seen_picture(a, image), "question": row["text"], "answer": answer,
                    "wanted": row["answer"], "right": exact(answer, row["answer"]), "attention": attention,
                    "side": int(c.num_patches ** 0.5), "first": c.num_patches - c.image_tokens})
        if chosen is None or row["category"] == "colour":
            chosen = {"picture": image, "text": row["text"]}
    return out, chosen
