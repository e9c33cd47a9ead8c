"""Files that a benchmark's server or official script takes."""
from importlib.util import find_spec
from pathlib import Path

from common.files import read_jsonl, write_json
from common.flags import UserError
from evaluation import metrics
from evaluation.benchmarks import Benchmark
from evaluation.files import write_jsonl
from evaluation.questions import Sample


def vqa_rows(pairs):
    return [{"question_id": int(s.id) if s.id.isdigit() else s.id, "answer": metrics.vqa_norm(r["prediction"] or "")}
            for s, r in pairs]


def vizwiz_rows(pairs):
    rows = []
    for s, r in pairs:
        name = s.record.get("file") or (s.image.name if isinstance(s.image, Path) else s.id)
        rows.append({"image": name, "answer": metrics.vqa_norm(r["prediction"] or "")})
    return rows


def mmbench_rows(pairs):
    rows = []
    for s, r in pairs:
        row = {"index": int(s.id), "question": s.record["question"], **dict.fromkeys("ABCD", "")}
        row.update(zip("ABCD", s.options))
        row["prediction"] = r["prediction"] or ""
        if s.answer is not None:
            row["answer"] = s.answer
        rows.append({**row, "split": s.record["split"] or ""})
    return rows


def parsed_by_id(pairs):
    return {s.id: r["parsed"] or r["prediction"] or "" for s, r in pairs}


SUBMISSIONS = {   # name → (file ending, pairs of (sample, row of `score`) → what is written)
    "vqav2": ("json", vqa_rows),
    "textvqa": ("json", vqa_rows),
    "vizwiz": ("json", vizwiz_rows),
    "gqa": ("json", lambda pairs: [{"questionId": s.id, "prediction": (r["prediction"] or "").rstrip(".").lower()}
                                   for s, r in pairs]),
    "docvqa": ("json", lambda pairs: [{"questionId": int(s.id), "answer": r["prediction"] or ""} for s, r in pairs]),
    "mmmu": ("json", parsed_by_id),
    "mmt": ("json", parsed_by_id),
    "mmvet": ("json", lambda pairs: {"v1_" + s.id.removeprefix("v1_"): r["prediction"] or "" for s, r in pairs}),
    "seed": ("jsonl", lambda pairs: [{"question_id": s.id, "prediction": r["prediction"] or ""} for s, r in pairs]),
    "mmbench": ("xlsx", mmbench_rows),
}


def check_packages(benchmark: Benchmark, samples: list[Sample]) -> None:
    """Raise UserError if the spreadsheet is all that there will be, because no answer is public, and openpyxl, which
    writes it, is missing. Call before answering."""
    private = all(s.answer is None for s in samples)
    if benchmark.submission == "mmbench" and private and not find_spec("openpyxl"):
        raise UserError("the benchmark's server takes a spreadsheet, which needs openpyxl: pip install openpyxl")


def write_submission(benchmark: Benchmark, samples: list[Sample], rows: list[dict], data: Path,
                     out: Path) -> str | None:
    """Write submission.json, .jsonl or .xlsx to `out`. Returns its path, None if there is none, or openpyxl is missing.

    rows: those of `score`; data: the folder of the questions."""
    if benchmark.submission is None:
        return None
    ending, make = SUBMISSIONS[benchmark.submission]
    path, value = out / f"submission.{ending}", make(list(zip(samples, rows)))
    if benchmark.submission == "vqav2":
        value = fill_test2015(value, data)
    if ending == "json":
        write_json(path, value, indent=None)
    elif ending == "jsonl":
        write_jsonl(path, value)
    elif find_spec("openpyxl"):
        write_xlsx(path, value)
    else:
        return None
    return str(path)


def fill_test2015(answers: list[dict], folder: Path) -> list[dict]:
    """VQAv2's server takes an answer to every question of test2015: add "" for those that were not asked."""
    by_id = {a["question_id"]: a["answer"] for a in answers}
    rows = []
    for path in folder.glob("**/llava_vqav2_mscoco_test2015.jsonl"):
        for r in read_jsonl(path):
            rows.append({"question_id": r["question_id"], "answer": by_id.get(r["question_id"], "")})
    return rows or answers


def write_xlsx(path: Path, rows: list[dict]) -> None:
    """Write a table of one sheet: a header, then a line a row. Texts stay texts, also "=1+1"."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    book = Workbook()
    for n, values in enumerate([list(rows[0]), *(row.values() for row in rows)], 1):
        for column, value in enumerate(values, 1):
            if isinstance(value, str):
                cell = book.active.cell(n, column, ILLEGAL_CHARACTERS_RE.sub("", value))
                cell.data_type = "s"
            else:
                book.active.cell(n, column, value)
    book.save(path)
