"""Predictions → numbers: the rules of metrics.py, put together as each benchmark does."""
from collections.abc import Callable
from pathlib import Path

from common.files import read_json, read_lines
from common.flags import UserError
from evaluation import metrics
from evaluation.benchmarks import LETTERS, Benchmark
from evaluation.questions import Sample, bare, join_key


# ------------------------------------------------------------------------------------------------ answers
def read_answers(path: Path, samples: list[Sample], repeats: bool, counts: dict) -> dict[str, str]:
    """Predictions by id from any answers file: ours, or LLaVA's {question_id, text, prompt}. Where question_ids repeat
    (MME, TextVQA), the prompt tells which is meant. Raises UserError for two answers to one question."""
    if not path.is_file():
        raise UserError(f"--score-only {path} does not exist")
    by_id, found, unknown, twice = {}, {}, 0, 0
    for s in samples:
        for key in {s.id, str(s.record["id"])}:
            by_id.setdefault(key, []).append(s)
    lines, last = read_lines(path)
    for n, line in enumerate(lines + [last] * (last is not None), 1):
        if "settings" in line:
            continue
        number, text = line.get("id", line.get("question_id")), line.get("prediction", line.get("text"))
        if number is None or not (text is None or isinstance(text, str)):
            raise UserError(f"{path} line {n} has no question_id, or no text that is one: it has {', '.join(line)}")
        if "prediction" not in line and "text" not in line:
            raise UserError(f"{path} line {n} has neither text nor prediction: it has {', '.join(line)}")
        asked = by_id.get(str(number), [])
        if repeats and "prompt" in line and "id" not in line:
            said = join_key({"q": bare(str(line.get("prompt")))}, ("q",))
            asked = [s for s in asked if join_key({"q": bare(s.prompt)}, ("q",)) == said]
        asked = [s for s in asked if s.id == line.get("id")] or asked
        if len(asked) > 1:
            raise UserError(f"{path} line {n}: {len(asked)} questions have the id {number}, and no prompt says which")
        if not asked:
            unknown += 1
        elif text is not None:
            if found.setdefault(asked[0].id, text) != text:
                raise UserError(f"{path} line {n}: a second, different answer to question {number}")
            twice += 1
    counts["answers to questions that are not asked"] = unknown
    counts["answers given twice"] = twice - len(found)
    if not found:
        raise UserError(f"{path} answers none of the {len(samples)} questions: is it of another benchmark or split?")
    return found


# ------------------------------------------------------------------------------------------------ scores
def many(answer) -> list[str]:
    return answer if isinstance(answer, list) else [answer]


def letters_of(s: Sample) -> str:
    return LETTERS[:len(s.options) or 4]


def choice(s: Sample, p: str) -> tuple[str | None, float]:
    letter = metrics.pick_choice(p, letters_of(s), s.options)
    return letter, float(letter in many(s.answer))


def yes_no(parse) -> Callable:
    def one(s: Sample, p: str):
        word = parse(p)
        return None if word == "other" else word, float(word == s.answer.strip().lower())
    return one


def open_or_choice(s: Sample, p: str):
    if s.record["question_type"] == "multiple-choice":
        return choice(s, p)
    return p, float(metrics.mmmu_open(p, s.answer))


SCORES = {   # (sample, answer) → (what was understood, None if nothing; score from 0 to 1)
    "vqa": lambda s, p: (metrics.vqa_norm(p), metrics.vqa_acc(p, many(s.answer))),
    "vqav2": lambda s, p: (metrics.vqa_norm(p, m4c=False), metrics.vqa_acc(p, many(s.answer), m4c=False)),
    "exact": lambda s, p: (p, float(any(metrics.exact(p, a) for a in many(s.answer)))),
    "anls": lambda s, p: (p, metrics.anls(p, many(s.answer))),
    "contains": lambda s, p: (p, float(metrics.ocrbench(p, s.answer, ""))),
    "ocrbench": lambda s, p: (p, float(metrics.ocrbench(p, s.answer, s.record["dataset"]))),
    "realworldqa": lambda s, p: (metrics.pick_choice(p, "ABCD") if s.answer in ("A", "B", "C", "D") else p,
                                 float(metrics.realworldqa(p, s.answer))),
    "choice": choice,
    "mmmu": open_or_choice,
    "pope": yes_no(metrics.pope_parse),
    "mme": yes_no(metrics.mme_parse),
    "none": lambda s, p: (p, None),
}


def mean(values) -> float:
    values = list(values)
    return 100 * sum(values) / len(values) if values else 0.0


def by_category(samples: list[Sample], scores: list[float], of=lambda s: s.category) -> dict[str, float]:
    groups = {}
    for s, score in zip(samples, scores):
        groups.setdefault(of(s), []).append(score)
    return {name: mean(g) for name, g in groups.items() if name is not None}


def summary_mean(benchmark, samples, answers, scores, partial):
    return {benchmark.headline: mean(scores), "category": by_category(samples, scores)}


def summary_sqa(benchmark, samples, answers, scores, partial):
    with_image = [score for s, score in zip(samples, scores) if s.image is not None]
    return {"image": mean(with_image), "all": mean(scores), "n_image": len(with_image)}


def summary_pope(benchmark, samples, answers, scores, partial):
    """The mean of the categories' F1 is LLaVA's number, the pooled one lmms-eval's."""
    def measures(part):
        m = metrics.pope([a for _, a in part], [s.answer for s, _ in part])
        return {k: v if k == "n" else 100 * v for k, v in m.items()}
    # No answer at all is a wrong one here, though an empty one would count as a yes.
    pairs = [(s, a if a is not None else "no" if s.answer == "yes" else "yes") for s, a in zip(samples, answers)]
    names = dict.fromkeys(s.category for s in samples)
    category = {name: measures([p for p in pairs if p[0].category == name]) for name in names}
    f1 = sum(m["f1"] for m in category.values()) / len(category)
    return {"f1": f1, "pooled": measures(pairs), "category": category}


def summary_mme(benchmark, samples, answers, scores, partial):
    rows = [(s.category, s.record["group"], a or "", s.answer) for s, a in zip(samples, answers)]
    result = metrics.mme(rows, partial)
    sums = {k: result.pop(k) for k in ("perception", "cognition", "dropped") if k in result}
    return {**sums, "category": result}


def summary_circular(benchmark, samples, answers, scores, partial):
    """MMBench's number; its rows are of the category that their question's own row has."""
    base = {int(s.id) % 10 ** 6: s for s in sorted(samples, key=lambda s: -int(s.id))}
    sizes, groups = {q: len(s.options) for q, s in base.items()}, {"": []}
    for s, value in zip(samples, scores):
        for name in ("", base[int(s.id) % 10 ** 6].category):
            groups.setdefault(name, []).append((int(s.id), value == 1))
    found = {name: metrics.circular(rows, sizes, partial) for name, rows in groups.items() if name is not None}
    whole = found.pop("")
    return {**whole, "circular": 100 * whole["circular"], "vanilla": 100 * whole["vanilla"],
            "category": {name: 100 * r["circular"] for name, r in found.items()}}


def summary_mmstar(benchmark, samples, answers, scores, partial):
    detail = by_category(samples, scores, lambda s: (s.record["area"], s.category))
    areas = {}
    for (area, _), value in detail.items():
        areas.setdefault(area, []).append(value / 100)
    return {"average": mean(v / 100 for v in detail.values()), "accuracy": mean(scores),
            "category": {area: mean(v) for area, v in areas.items()}, "detail": {n: v for (_, n), v in detail.items()}}


def summary_ocrbench(benchmark, samples, answers, scores, partial):
    types = {name: 0 for name in dict.fromkeys(s.category for s in samples)}
    for s, score in zip(samples, scores):
        types[s.category] += int(score)
    return {"hits": sum(types.values()), "recognition": sum(n for t, n in types.items() if "Recogni" in t and
                                                            "Expression" not in t), "category": types}


def summary_cider(benchmark, samples, answers, scores, partial):
    value, cases = metrics.cider([a or "" for a in answers], [many(s.answer) for s in samples])
    scores[:] = map(float, cases)
    return {"cider": 100 * float(value)}


SUMMARIES = {   # (benchmark, samples with a reference, answers, scores, partial) → metrics, in % where they are parts
    "mean": summary_mean, "sqa": summary_sqa, "pope": summary_pope, "mme": summary_mme, "circular": summary_circular,
    "mmstar": summary_mmstar, "ocrbench": summary_ocrbench, "cider": summary_cider}


def score(benchmark: Benchmark, samples: list[Sample], predictions: dict[str, str], partial: bool = False):
    """Predictions by id → (rows of id, prompt, prediction, parsed, answer, score, one a sample; results: metrics,
    headline, n, n_scored, n_missing, n_unparsed, n_text_matched (letters found by an option's text), n_no_option
    (references that are none of the options)).

    A sample without a prediction scores 0. partial: incomplete groups of MME and MMBench are left out and counted
    (`dropped`), instead of raising UserError."""
    rows, scored = [], []
    for s in samples:
        p = predictions.get(s.id)
        parsed, value = None, None
        if s.answer is not None:
            parsed, value = (None, 0.0) if p is None else SCORES[benchmark.score](s, p)
            scored.append((s, p, value))
        rows.append({"id": s.id, "prompt": s.prompt, "prediction": p, "parsed": parsed, "answer": s.answer,
                     "score": value})
    results = {"n": len(samples), "n_scored": len(scored), "n_missing": sum(r["prediction"] is None for r in rows),
               "n_unparsed": sum(r["parsed"] is None and None not in (r["answer"], r["prediction"]) for r in rows),
               "n_text_matched": 0, "n_no_option": 0}
    if benchmark.score in ("choice", "mmmu"):
        results["n_text_matched"] = sum(bool(s.options) and r["parsed"] in tuple(letters_of(s)) and
                                        metrics.pick_choice(r["prediction"], letters_of(s)) is None
                                        for s, r in zip(samples, rows))
        results["n_no_option"] = sum(not set(many(s.answer)) <= set(letters_of(s)) for s, _, _ in scored
                                     if s.record.get("question_type") != "open")
    if scored and (benchmark.score, benchmark.summary) != ("none", "mean"):
        part, answers, values = map(list, zip(*scored))
        try:
            results["metrics"] = SUMMARIES[benchmark.summary](benchmark, part, answers, values, partial)
        except ValueError as e:
            raise UserError(f"cannot be scored: {e}") from None
        for row, value in zip((r for r in rows if r["answer"] is not None), values):
            row["score"] = value
        results["headline"] = {benchmark.headline: results["metrics"][benchmark.headline]}
    return rows, results


# ------------------------------------------------------------------------------------------------ tables
def table(results: dict[str, dict[str, float]]) -> str:
    """Rows of numbers by name, as aligned text."""
    columns = list(dict.fromkeys(c for r in results.values() for c in r))
    width = max(len(name) for name in results) + 2
    lines = [" " * width + "".join(f"{c:>{max(len(c), 5) + 2}}" for c in columns)]
    for name, r in results.items():
        cells = ((f"{r[c]:.1f}" if isinstance(r[c], float) else str(r[c])) if c in r else "" for c in columns)
        lines.append(f"{name:{width}}" + "".join(f"{cell:>{max(len(c), 5) + 2}}" for c, cell in zip(columns, cells)))
    return "\n".join(lines)


def summary(report: dict) -> str:
    """A results.json as text: its numbers, and what stands between them and a published one."""
    told = {k: v for k, v in report["settings"].items() if k not in ("checkpoint", "questions", "code_version") and
            v is not None}
    lines = [report["benchmark"] + (f", PARTIAL: the first {told['limit']} questions" if report["partial"] else ""),
             "  ".join(f"{k} {v}" for k, v in told.items())]
    m = report.get("metrics", {})
    rows = {"all": {k: v for k, v in m.items() if not isinstance(v, dict)}}
    for group in (v for v in m.values() if isinstance(v, dict)):
        if group and not isinstance(next(iter(group.values())), dict):
            group = {"pooled": group} if "f1" in group else {k: {"by category": v} for k, v in group.items()}
        rows.update(group)
    lines += [table({k: r for k, r in rows.items() if r})] if m else ["no public reference answers: nothing to score"]
    lines += [f"warning: {w}" for w in report["warnings"]]
    counts = ("n", "n_scored", "n_missing", "n_unparsed", "n_text_matched")
    lines.append("  ".join([*(f"{k} {v:.2f}" for k, v in report.get("headline", {}).items()),
                            *(f"{k} {report[k]}" for k in counts)]))
    return "\n".join(lines)


def compare(folders: list[str]) -> str:
    """The headline numbers of results.json files in folders, a row each, and what they do not have in common."""
    rows, said = {}, {}
    for folder in map(Path, folders):
        files = sorted(p for p in folder.glob("**/results.json") if "benchmark" in read_json(p))
        if not files:
            raise UserError(f"{folder} holds no results.json of a benchmark (evaluate.py --bench writes them)")
        for r in map(read_json, files):
            for metric, value in r.get("headline", {}).items():
                column = f"{r['benchmark']} {metric}" + (", partial" if r["partial"] else "")
                rows.setdefault(str(folder), {})[column] = value
            for k, v in {**r["settings"], "n": r["n"]}.items():
                if k not in ("checkpoint", "answers"):
                    said.setdefault((r["benchmark"], k), {}).setdefault(str(v), str(folder))
    lines = [f"warning: {bench}'s {k} differs: " + ", ".join(f"{v} in {f}" for v, f in values.items())
             for (bench, k), values in said.items() if len(values) > 1]
    return "\n".join([table(rows), *lines])
