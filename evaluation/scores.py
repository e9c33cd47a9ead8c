"""Predictions → numbers: the rules of metrics.py, put together as each benchmark does."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.files import read_json
from common.flags import UserError
from evaluation import metrics
from evaluation.benchmarks import LETTERS, Benchmark
from evaluation.questions import Questions, Sample


# --------------------------------------------------------------------------------------- one answer
def letters_of(s: Sample) -> str:
    return LETTERS[:len(s.options) or 4]


def choice(s: Sample, p: str) -> tuple[str | None, float]:
    letter = metrics.pick_choice(p, letters_of(s), s.options)
    return letter, float(letter in metrics.listed(s.answer))


def yes_no(parse) -> Callable:
    def score_one(s: Sample, p: str):
        word = parse(p)
        return None if word == "other" else word, float(word == s.answer.strip().lower())
    return score_one


def letter_or_text(s: Sample, p: str):
    letter = metrics.pick_choice(p, "ABCD") if s.answer in ("A", "B", "C", "D") else p
    return letter, float(metrics.realworldqa(p, s.answer))


def open_or_choice(s: Sample, p: str):
    if s.record["question_type"] == "multiple-choice":
        return choice(s, p)
    return p, float(metrics.mmmu_open(p, s.answer))


SCORES = {   # (sample, prediction) → (what was understood, None if nothing; score from 0 to 1)
    "vqa": lambda s, p: (metrics.vqa_norm(p), metrics.vqa_acc(p, s.answer)),
    "vqav2": lambda s, p: (metrics.vqa_norm(p, m4c=False), metrics.vqa_acc(p, s.answer, m4c=False)),
    "exact": lambda s, p: (p, float(any(metrics.exact(p, a) for a in metrics.listed(s.answer)))),
    "anls": lambda s, p: (p, metrics.anls(p, s.answer)),
    "contains": lambda s, p: (p, float(metrics.ocrbench(p, s.answer, ""))),
    "ocrbench": lambda s, p: (p, float(metrics.ocrbench(p, s.answer, s.record["dataset"]))),
    "realworldqa": letter_or_text,
    "choice": choice,
    "mmmu": open_or_choice,
    "pope": yes_no(metrics.pope_parse),
    "mme": yes_no(metrics.mme_parse),
    "none": lambda s, p: (p, None),
}
OWN_RULES = ("exact", "vqa", "choice", "anls", "contains", "none")              # for own questions


# -------------------------------------------------------------------------------------- all answers
@dataclass
class Scored:
    """The samples with a reference answer, and what is known of each."""
    samples: list[Sample]
    predictions: list[str | None]
    scores: list[float]                         # summary_cider sets them
    headline: str
    partial: bool                               # --limit: incomplete groups are left out, no error


def mean(values) -> float:
    values = list(values)
    return 100 * sum(values) / len(values) if values else 0.0


def by_category(t: Scored, of=lambda s: s.category) -> dict[str, float]:
    groups = {}
    for s, score in zip(t.samples, t.scores):
        groups.setdefault(of(s), []).append(score)
    return {name: mean(group) for name, group in groups.items() if name is not None}


def summary_mean(t: Scored) -> dict:
    return {t.headline: mean(t.scores), "category": by_category(t)}


def summary_own(t: Scored) -> dict:
    """accuracy is over questions, mean over categories."""
    category = by_category(t, lambda s: s.category or "all")
    average = sum(category.values()) / len(category)
    return {"accuracy": mean(t.scores), "mean": average, "category": category}


def summary_sqa(t: Scored) -> dict:
    with_image = [score for s, score in zip(t.samples, t.scores) if s.image is not None]
    return {"image": mean(with_image), "all": mean(t.scores), "n_image": len(with_image)}


def summary_pope(t: Scored) -> dict:
    """LLaVA's number is the mean F1 of the categories, lmms-eval's the pooled one."""
    def measures(pairs):
        m = metrics.pope([p for _, p in pairs], [s.answer for s, _ in pairs])
        return {k: v if k == "n" else 100 * v for k, v in m.items()}

    # POPE's rule takes "" for a yes. A missing answer becomes the wrong one instead.
    pairs, groups = [], {}
    for s, p in zip(t.samples, t.predictions):
        if p is None:
            p = "no" if s.answer == "yes" else "yes"
        pairs.append((s, p))
        groups.setdefault(s.category, []).append((s, p))
    category = {name: measures(group) for name, group in groups.items()}
    f1 = sum(m["f1"] for m in category.values()) / len(category)
    return {"f1": f1, "pooled": measures(pairs), "category": category}


def summary_mme(t: Scored) -> dict:
    asked = zip(t.samples, t.predictions)
    rows = [(s.category, s.record["group"], p or "", s.answer) for s, p in asked]
    result = metrics.mme(rows, t.partial)
    sums = {k: result.pop(k) for k in ("perception", "cognition", "dropped") if k in result}
    return {**sums, "category": result}


def summary_circular(t: Scored) -> dict:
    """A question's rotations are in the category of its first row, the one of smallest index."""
    own = {}
    for s in sorted(t.samples, key=lambda s: int(s.id)):
        own.setdefault(int(s.id) % 10 ** 6, s)
    sizes = {question: max(2, s.record["rotations"]) for question, s in own.items()}
    rows, groups = [], {}
    for s, score in zip(t.samples, t.scores):
        rows.append((int(s.id), score == 1))
        groups.setdefault(own[int(s.id) % 10 ** 6].category, []).append(rows[-1])
    whole = metrics.circular(rows, sizes, t.partial)
    category = {name: 100 * metrics.circular(group, sizes, t.partial)["circular"]
                for name, group in groups.items() if name is not None}
    return {**whole, "circular": 100 * whole["circular"], "vanilla": 100 * whole["vanilla"],
            "category": category}


def summary_mmstar(t: Scored) -> dict:
    """average: of the accuracies of 18 fine categories; category: their averages by area."""
    detail = by_category(t, lambda s: (s.record["area"], s.category))
    areas = {}
    for (area, _), value in detail.items():
        areas.setdefault(area, []).append(value / 100)
    return {"average": mean(v / 100 for v in detail.values()), "accuracy": mean(t.scores),
            "category": {area: mean(values) for area, values in areas.items()},
            "detail": {name: value for (_, name), value in detail.items()}}


def summary_ocrbench(t: Scored) -> dict:
    types = {}
    for s, score in zip(t.samples, t.scores):
        types[s.category] = types.get(s.category, 0) + int(score)
    text = [n for name, n in types.items() if "Recogni" in name and "Expression" not in name]
    return {"hits": sum(types.values()), "recognition": sum(text), "category": types}


def summary_cider(t: Scored) -> dict:
    answers = [s.answer for s in t.samples]
    value, t.scores = metrics.cider([p or "" for p in t.predictions], answers)
    return {"cider": 100 * value}


SUMMARIES = {   # Scored → metrics, in % where they are ratios
    "mean": summary_mean, "own": summary_own, "sqa": summary_sqa, "pope": summary_pope,
    "mme": summary_mme, "circular": summary_circular, "mmstar": summary_mmstar,
    "ocrbench": summary_ocrbench, "cider": summary_cider}


def score(benchmark: Benchmark, samples: list[Sample], predictions: dict[str, str],
          partial: bool = False) -> tuple[list[dict], dict]:
    """Score predictions by id. A sample without a prediction scores 0.

    Returns (rows, results): a row a sample; metrics, headline and counts: n, n_scored, n_missing,
    n_unparsed, n_text_matched (letters found by an option's text), n_no_option (references that are
    none of the options). partial: MME and MMBench leave incomplete groups out."""
    rows = [score_row(benchmark, s, predictions.get(s.id)) for s in samples]
    with_answer = [(s, r) for s, r in zip(samples, rows) if s.answer is not None]
    answered = [(s, r) for s, r in with_answer if r["prediction"] is not None]
    results = {"n": len(samples), "n_scored": len(with_answer),
               "n_missing": sum(r["prediction"] is None for r in rows),
               "n_unparsed": sum(r["parsed"] is None for _, r in answered),
               "n_text_matched": 0, "n_no_option": 0}
    if benchmark.score in ("choice", "mmmu"):
        for s, r in with_answer:
            if s.record.get("question_type") == "open":
                continue
            letters = letters_of(s)
            if not set(metrics.listed(s.answer)) <= set(letters):
                results["n_no_option"] += 1
            if s.options and r["parsed"] and metrics.pick_choice(r["prediction"], letters) is None:
                results["n_text_matched"] += 1
    if with_answer and (benchmark.score != "none" or benchmark.summary == "cider"):
        scored = Scored([s for s, _ in with_answer], [r["prediction"] for _, r in with_answer],
                        [r["score"] for _, r in with_answer], benchmark.headline, partial)
        try:
            results["metrics"] = SUMMARIES[benchmark.summary](scored)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise UserError(f"cannot be scored: {e}") from None
        for (_, row), value in zip(with_answer, scored.scores):
            row["score"] = value
        results["headline"] = {benchmark.headline: results["metrics"][benchmark.headline]}
    return rows, results


def score_row(benchmark: Benchmark, s: Sample, p: str | None) -> dict:
    """Return the row of one question. p: its prediction; None: it was not answered."""
    parsed, value = None, None                  # without a reference nothing is scored
    if s.answer is not None and p is None:
        value = 0.0
    elif s.answer is not None:
        try:
            parsed, value = SCORES[benchmark.score](s, p)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"question {s.id} has the reference {str(s.answer)[:60]!r}, "
                            "which its benchmark's rule cannot compare an answer with") from None
    image = str(s.image) if isinstance(s.image, Path) else None
    return {"id": s.id, "image": image, "prompt": s.prompt, "prediction": p, "parsed": parsed,
            "answer": s.answer, "score": value}


# ------------------------------------------------------------------------------------------- tables
def table(results: dict[str, dict[str, float]]) -> str:
    """Rows of numbers by name, as aligned text."""
    columns = list(dict.fromkeys(c for r in results.values() for c in r))
    width = max(len(name) for name in results) + 2
    lines, header = [], {c: c for c in columns}
    for name, r in {"": header, **results}.items():
        line = f"{name:{width}}"
        for c in columns:
            cell = f"{r[c]:.1f}" if isinstance(r.get(c), float) else str(r.get(c, ""))
            line += f"{cell:>{max(len(c), 5) + 2}}"
        lines.append(line)
    return "\n".join(lines)


def own_row(report: dict) -> dict[str, float]:
    """Return the accuracy by category and its mean, from the results of own questions."""
    return {**report["metrics"]["category"], "mean": report["metrics"]["mean"]}


def summary(reports: list[dict]) -> str:
    """Results as text: one table of own questions; all numbers and settings of a benchmark."""
    lines = []
    rows = {r["name"]: own_row(r) for r in reports if r["benchmark"] == "own" and "metrics" in r}
    if rows:
        lines.append(table(rows))
    counted = ("n", "n_scored", "n_missing", "n_unparsed", "n_text_matched")
    for r in reports:
        counts = [f"{k} {r[k]}" for k in counted]
        name = r["name"] + (f", PARTIAL: the first {r['n']} questions" if r["partial"] else "")
        if r["benchmark"] == "own":
            if r["partial"] or r["n_scored"] < r["n"] or r["n_missing"] or r["n_unparsed"]:
                lines.append("  ".join([name, *counts]))
        else:
            shown = [f"{k} {v}" for k, v in r["settings"].items()
                     if v is not None and k not in ("checkpoint", "questions", "code_version")]
            lines += [name, "  ".join(shown)]
            lines.append(table(metric_rows(r["metrics"])) if "metrics" in r else
                         "no public reference answers: nothing to score")
            headline = [f"{k} {v:.2f}" for k, v in r.get("headline", {}).items()]
            lines.append("  ".join(headline + counts))
        lines += [f"warning: {w}" for w in r["warnings"]]
        if r["submission"]:
            lines.append(f"for the benchmark's server: {r['submission']}")
    return "\n".join(lines + [f"written to {Path(reports[0]['folder']).parent}"])


def metric_rows(m: dict) -> dict[str, dict]:
    """Return the rows of a benchmark's table: all, then a row for each category."""
    rows = {"all": {k: v for k, v in m.items() if not isinstance(v, dict)}}
    if "pooled" in m:
        rows["pooled"] = m["pooled"]
    for k, v in {**m.get("category", {}), **m.get("detail", {})}.items():
        rows[str(k)] = v if isinstance(v, dict) else {"by category": v}     # POPE's are dicts
    return rows


def compare(folders: list[str]) -> str:
    """Headline numbers of the results.json in folders, a row each; warnings of other settings."""
    rows, values = {}, {}
    for folder in map(Path, folders):
        reports = [read_json(p, dict) for p in sorted(folder.glob("**/results.json"))]
        reports = [r for r in reports if "benchmark" in r]
        if not reports:
            raise UserError(f"{folder} holds no results.json that evaluate.py has written")
        for r in reports:
            r = {"headline": {}, "partial": False, **r}
            kinds = {"name": str, "settings": dict, "n": int, "headline": dict}
            whole = all(isinstance(r.get(k), kind) for k, kind in kinds.items())
            if not whole or not all(isinstance(v, int | float) for v in r["headline"].values()):
                lacks = "without a name, settings and numbers"
                raise UserError(f"{folder} holds a results.json {lacks}: evaluate again")
            name = r["name"] + (", partial" if r["partial"] else "")
            for metric, value in r["headline"].items():
                rows.setdefault(str(folder), {})[f"{name} {metric}"] = value
            for k, v in {**r["settings"], "n": r["n"]}.items():
                if k not in ("checkpoint", "answers"):
                    values.setdefault((r["name"], k), {}).setdefault(str(v), str(folder))
    if not rows:
        raise UserError(f"{', '.join(folders)}: no question has a reference answer, so there is "
                        "no number to compare")
    lines = [table(rows)]
    for (name, k), found in values.items():
        if len(found) > 1:
            where = ", ".join(f"{value} in {folder}" for value, folder in found.items())
            lines.append(f"warning: {name}'s {k} differs: {where}")
    return "\n".join(lines)


def notes(q: Questions, counts: dict[str, int], submission: str | None) -> list[str]:
    """Return what to know about these results. counts: what → how many."""
    found = [f"{count} {what}" for what, count in counts.items() if count]
    n, sizes = len(q.loaded.samples), q.benchmark.sizes
    if sizes and n not in sizes:
        found.append(f"{n} questions; the released files have {' or '.join(map(str, sizes))}")
    if q.benchmark.submission and not submission:
        found.append("no spreadsheet for the benchmark's server: pip install openpyxl")
    return found
