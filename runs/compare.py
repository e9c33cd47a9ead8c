"""Tables of toy runs: mean ± standard deviation over seeds, and Welch's t against ce.

    python -m runs.compare out/compare            a folder of runs METHOD-SEED, by runs/compare.sh
    python -m runs.compare out/toy-seed*          any runs, together one column
    python -m runs.compare --by-category DIR …    accuracy by category, a row for each question file

Prints Markdown. Needs finished runs of the toy; reads results.json alone.
"""
import statistics
import sys
from pathlib import Path

from common.files import read_json
from common.flags import UserError, run

ONE, TWO = "pretrain", "finetune"
FIRST = ["ce", "vdep", "vista", "basic", "moca"]           # columns; other methods follow
T_ROWS = ("mean", "unseen pairs", "caption CE, 1", "MIR, 2")
FILES = {"test": ("accuracy", "test"), "unseen pairs": ("accuracy", "composition"),
         "test, images shuffled": ("shuffled", "test")}
SCALES = {"MIR": "mir", "norm V": "V_norm", "var V": "V_var", "norm h": "h_norm"}


def numbers_of(results: dict) -> dict[str, float]:
    """Return what the table shows of one run's results.json, by row."""
    rows = {}
    if TWO in results["stages"]:
        unseen = results["accuracy"]["composition"]
        rows |= results["accuracy"]["test"]
        rows |= {"unseen pairs": unseen["mean"], "unseen colour": unseen["colour"],
                 "unseen adversarial": unseen["adversarial"],
                 "shuffled": results["shuffled"]["test"]["mean"]}
    if ONE in results["stages"]:
        rows["caption CE, 1"] = results["stages"][ONE]["ce"]
    for n, stage in [(1, ONE), (2, TWO)]:
        if stage in results["stages"]:
            rows |= {f"{name}, {n}": results["stages"][stage][key] for name, key in SCALES.items()}
    return rows


def show(values: list[float]) -> str:
    """mean ± standard deviation, with as many digits as help; nothing for no values."""
    if not values:
        return ""
    largest = max(map(abs, values))
    if largest < 10:
        digits = 3
    elif largest < 1000:
        digits = 1
    else:
        digits = 0
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def welch(a: list[float], b: list[float]) -> str:
    """Welch's t of a against b. With three runs each, less than about 3 to 4 is noise."""
    error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
    return f"{(statistics.mean(a) - statistics.mean(b)) / error:+.1f}" if error else "0"


def read_runs(folders: list[Path]) -> dict[str, list[dict]]:
    """Return method → the results.json of its runs. Raises UserError for a folder without any."""
    runs = {}
    for folder in folders:
        paths = sorted(folder.glob("*/results.json"))
        if (folder / "results.json").is_file():
            paths = [folder / "results.json"]
        if not paths:
            raise UserError(f"{folder} has no results.json, and no folder in it has one: give "
                            "runs of the toy")
        for path in paths:
            method = path.parent.name.rsplit("-", 1)[0]
            runs.setdefault(method, []).append(read_results(path))
    return runs


def read_results(path: Path) -> dict:
    """Return what a run of the toy wrote. Raises UserError for other results, as of an evaluation."""
    results = read_json(path, dict)
    try:
        complete = {"accuracy", "shuffled", "mir"} <= set(results)
        numbers = numbers_of(results).values()
    except (KeyError, TypeError):
        complete, numbers = False, []
    if not complete or not all(isinstance(n, int | float) for n in numbers):
        raise UserError(f"{path} is not of a run of the toy: give the --out folders of such runs")
    return results


def compare(runs: dict[str, list[dict]]) -> str:
    """Return the table with a column per method."""
    names = [n for n in FIRST if n in runs] + sorted(set(runs) - set(FIRST))
    numbers = {name: [numbers_of(r) for r in runs[name]] for name in names}
    lines = ["| | " + " | ".join(f"{n} (n = {len(runs[n])})" for n in names) + " |",
             "|---" * (len(names) + 1) + "|"]
    values = {}                                            # row → method → values
    for name in names:
        for found in numbers[name]:
            for key, value in found.items():
                values.setdefault(key, {n: [] for n in names})[name].append(value)
    for key, row in values.items():
        lines.append(f"| {key} | " + " | ".join(show(row[n]) for n in names) + " |")
    for key in T_ROWS:
        row = values.get(key, {})
        if len(names) > 1 and len(row.get("ce", [])) > 1:
            cells = [""] * len(names)
            for i, name in enumerate(names):
                if name != "ce" and len(row[name]) > 1:
                    cells[i] = welch(row[name], row["ce"])
            lines.append(f"| t of {key} against ce | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_category(runs: dict[str, list[dict]]) -> str:
    """Return the table of accuracy, %, with a column per category, and MIR after each stage."""
    results = sum(runs.values(), [])
    categories = list(results[0]["accuracy"]["test"])
    lines = ["| | " + " | ".join(categories) + " |", "|---" * (len(categories) + 1) + "|"]
    for name, (kind, split) in FILES.items():
        cells = [show([r[kind][split][c] for r in results]) for c in categories]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for stage in results[0]["mir"]:
        lines.append(f"MIR after {stage}: {show([r['mir'][stage] for r in results])}")
    return "\n".join(lines)


def main() -> None:
    words = sys.argv[1:]
    unknown = [w for w in words if w.startswith("-") and w != "--by-category"]
    if unknown:
        raise UserError(f"{unknown[0]} is no flag: give folders, and --by-category for another table")
    table = by_category if "--by-category" in words else compare
    folders = [Path(w) for w in words if w != "--by-category"]
    print(table(read_runs(folders or [Path("out/compare")])))


if __name__ == "__main__":
    run(main)
