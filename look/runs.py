"""A run's page: curves, tables and answers; several runs over each other, with seeds as a band."""
import statistics
from pathlib import Path

from common.files import read_json, read_log
from common.flags import UserError
from look.page import write_page

NOT_CURVES = ("stage", "step", "kind", "supervised", "tokens_per_s", "peak_gib")
NOT_STUDIED = ("seed", "out", "resume", "overwrite", "workers", "device", "timeout", "files")


def write_report(out: Path, answers=(), looks=()) -> None:
    """Write out/report.html. answers: of `gather`, with wanted and right. looks: shown whole."""
    run = {"groups": group_runs([out]), "answers": answers}
    write_page(out / "report.html", f"run {out.name}", looks, run)


def read_curves(run: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Stage → name → {step: value} of what a run has logged so far."""
    stages = {"pretrain": {}, "finetune": {}}
    for line in read_log(run / "metrics.jsonl"):
        names = ["mir"] if line.get("kind") == "mir" else [k for k in line if k not in NOT_CURVES]
        curves = stages.get(line["stage"], {})                  # {}: of neither stage
        for name in names:
            curves.setdefault(name, {})[line["step"]] = line[name]
    return stages


def overlay_curves(curves: list[dict[int, float]]) -> dict[str, list]:
    """A curve of several runs → x (steps), y (mean), low, high: means of `width` steps, of runs."""
    width = -(-max(max(curve) for curve in curves) // 200)      # a curve has 200 points at most
    points = {}
    for curve in curves:
        bins = {}
        for step, value in curve.items():
            bins.setdefault(-(-step // width) * width, []).append(value)
        for step, values in bins.items():
            points.setdefault(step, []).append(statistics.fmean(values))
    steps = sorted(points)
    return {"x": steps, "y": [statistics.fmean(points[s]) for s in steps],
            "low": [min(points[s]) for s in steps], "high": [max(points[s]) for s in steps]}


def group_runs(runs: list[Path]) -> list[dict]:
    """Runs that differ in their seed alone make one group, with a band around its curves."""
    groups = {}
    for folder in runs:
        settings = read_json(folder / "run.json", dict)
        if not isinstance(settings.get("loss"), str):
            raise UserError(f"{folder}/run.json has no loss: it is not of a run")
        key = str({k: v for k, v in settings.items() if k not in NOT_STUDIED})
        groups.setdefault(key, (settings, []))[1].append(folder)
    out = []
    for settings, folders in groups.values():
        title = settings["loss"] + (" + MoCa" if settings.get("moca") else "")
        if [s["loss"] for s, _ in groups.values()].count(settings["loss"]) > 1:
            title += f" ({folders[0].name})"
        read, stages = [read_curves(f) for f in folders], {}
        for stage in ("pretrain", "finetune"):
            names = dict.fromkeys(n for curves in read for n in curves[stage])  # as in the log
            stages[stage] = {}
            for name in names:
                found = [curves[stage][name] for curves in read if name in curves[stage]]
                stages[stage][name] = overlay_curves(found)
        out.append({"name": title, "stages": stages, **results_of(folders)})
    return out


def results_of(folders: list[Path]) -> dict:
    """Of ended runs: table → category → [mean, standard deviation]; stage → distance by layer."""
    paths = [f / "results.json" for f in folders]
    results = [read_json(path, dict) for path in paths if path.is_file()]
    tables, layers = {}, {}
    for r in results:
        rows = dict(r["accuracy"])
        rows |= {f"{name}, images shuffled": row for name, row in r["shuffled"].items()}
        for name, row in rows.items():
            for category, value in row.items():
                tables.setdefault(name, {}).setdefault(category, []).append(value)
        for stage, measured in r["stages"].items():
            layers.setdefault(stage, []).append(measured["layers"])
    for row in tables.values():
        for category, v in row.items():
            row[category] = [statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0]
    means = {stage: [statistics.fmean(v) for v in zip(*rows)] for stage, rows in layers.items()}
    return {"finished": len(results), "accuracy": tables, "mir_layers": means}
