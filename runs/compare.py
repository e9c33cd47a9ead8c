"""The table of runs/compare.sh: mean ± standard deviation over seeds, and Welch's t against ce.

    python runs/compare.py out/compare
"""
import json
import statistics
import sys
from pathlib import Path

ONE, TWO = "pretrain", "finetune"


def columns(r: dict) -> dict[str, float]:
    """What the table shows of one run's results.json."""
    answers = {}
    if TWO in r["stages"]:
        unseen = r["accuracy"]["composition"]
        answers = {**r["accuracy"]["test"], "unseen pairs": unseen["mean"], "unseen colour": unseen["colour"],
                   "unseen adversarial": unseen["adversarial"], "shuffled": r["shuffled"]["test"]["mean"]}
    return {**answers, "caption CE, 1": r["stages"][ONE]["ce"],
            **{f"{name}, {n}": r["stages"][stage][key] for n, stage in [(1, ONE), (2, TWO)] if stage in r["stages"]
               for name, key in [("MIR", "mir"), ("norm V", "V_norm"), ("var V", "V_var"), ("norm h", "h_norm")]}}


def show(values: list[float]) -> str:
    """mean ± standard deviation, to a useful number of digits; nothing of no values."""
    if not values:
        return ""
    digits = 3 if max(map(abs, values)) < 10 else 1 if max(map(abs, values)) < 1000 else 0
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def welch(a: list[float], b: list[float]) -> str:
    """Welch's t of a against b; with three runs each, beyond about 3 to 4 is more than noise."""
    error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
    return f"{(statistics.mean(a) - statistics.mean(b)) / error:+.1f}" if error else "0"


def main(folder: Path) -> None:
    runs = {}
    for path in sorted(folder.glob("*/results.json")):
        runs.setdefault(path.parent.name.rsplit("-", 1)[0], []).append(columns(json.loads(path.read_text())))
    first = ["ce", "vdep", "vista", "basic", "moca"]
    names = [n for n in first if n in runs] + sorted(set(runs) - set(first))
    print("| | " + " | ".join(f"{n} (n = {len(runs[n])})" for n in names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for column in next(iter(runs.values()))[0]:
        print(f"| {column} | " + " | ".join(show([r[column] for r in runs[n] if column in r]) for n in names)
              + " |")
    for column in ("mean", "unseen pairs", "caption CE, 1", "MIR, 2"):
        values = {n: [r[column] for r in runs[n] if column in r] for n in names}
        print(f"| t of {column} against ce | " + " | ".join(
            welch(values[n], values["ce"]) if n != "ce" and len(values[n]) > 1 else "" for n in names) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/compare"))
