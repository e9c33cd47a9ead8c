"""Files that a benchmark's server or official script takes."""
from importlib.util import find_spec
from pathlib import Path

from common.files import write_json
from common.flags import UserError
from evaluation import metrics
from evaluation.benchmarks import Benchmark, Source
from evaluation.files import write_jsonl
from evaluation.questions import Sample, records


def number(id: str) -> int | str:
    """Servers take ids as the files have them: 7 as a number."""
    return int(id) if id.isdecimal() else id


def vqa_row(s: Sample, p: str, parsed) -> dict:
    return {"question_id": number(s.id), "answer": metrics.vqa_norm(p)}


def vizwiz_row(s: Sample, p: str, parsed) -> dict:
    name = s.record.get("file") or (s.image.name if isinstance(s.image, Path) else s.id)
    return {"image": name, "answer": metrics.vqa_norm(p)}


def mmbench_row(s: Sample, p: str, parsed) -> dict:
    row = {"index": int(s.id), "question": s.record["question"], **dict.fromkeys("ABCD", "")}
    row.update(zip("ABCD", s.options))
    row["prediction"] = p
    if s.answer is not None:
        row["answer"] = s.answer
    return {**row, "split": s.record["split"] or ""}


# Name → (kind of file, (sample, prediction, parsed) → its row; of an object its (key, value)).
SUBMISSIONS = {
    "vqav2": ("json", vqa_row),
    "textvqa": ("json", vqa_row),
    "vizwiz": ("json", vizwiz_row),
    "gqa": ("json", lambda s, p, parsed: {"questionId": s.id, "prediction": p.rstrip(".").lower()}),
    "docvqa": ("json", lambda s, p, parsed: {"questionId": number(s.id), "answer": p}),
    "mmmu": ("object", lambda s, p, parsed: (s.id, parsed or p)),
    "mmt": ("object", lambda s, p, parsed: (s.id, parsed or p)),
    "mmvet": ("object", lambda s, p, parsed: ("v1_" + s.id.removeprefix("v1_"), p)),
    "seed": ("jsonl", lambda s, p, parsed: {"question_id": s.id, "prediction": p}),
    "mmbench": ("xlsx", mmbench_row),
}


def check_submission(benchmark: Benchmark, samples: list[Sample], data: Path) -> None:
    """Raise UserError if nothing would come of answering: no answer is public, and openpyxl, which
    writes the server's spreadsheet, is missing; or VQAv2's list of questions cannot be read."""
    if benchmark.submission == "vqav2":
        test2015(data)
    private = all(s.answer is None for s in samples)
    if benchmark.submission == "mmbench" and private and not find_spec("openpyxl"):
        raise UserError("the benchmark's server takes a spreadsheet, which needs openpyxl: "
                        "pip install openpyxl")


def write_submission(benchmark: Benchmark, samples: list[Sample], rows: list[dict], data: Path,
                     out: Path) -> str | None:
    """Write submission.json, .jsonl or .xlsx to `out`. Returns its path, None if none is written.
    rows: those of `score`; data: the folder of the questions."""
    if benchmark.submission is None:
        return None
    kind, make = SUBMISSIONS[benchmark.submission]
    value = [make(s, r["prediction"] or "", r["parsed"]) for s, r in zip(samples, rows)]
    if benchmark.submission == "vqav2":
        value = fill_test2015(value, data)
    path = out / f"submission.{'json' if kind == 'object' else kind}"
    if kind == "xlsx":
        if not find_spec("openpyxl"):
            return None
        write_xlsx(path, value)
    elif kind == "jsonl":
        write_jsonl(path, value)
    else:
        write_json(path, dict(value) if kind == "object" else value, indent=None)
    return str(path)


def fill_test2015(answers: list[dict], folder: Path) -> list[dict]:
    """Add "" for questions of test2015 that were not asked: VQAv2's server takes them all."""
    by_id = {a["question_id"]: a["answer"] for a in answers}
    rows = [{"question_id": i, "answer": by_id.get(i, "")} for i in test2015(folder)]
    return rows or answers


def test2015(folder: Path) -> list:
    """Return the ids of all questions of test2015, of which test-dev2015 asks a part."""
    files = sorted(folder.glob("**/llava_vqav2_mscoco_test2015.jsonl"))
    return [r["id"] for r in records(Source("", {"id": "question_id"}, "test"), files)]


def write_xlsx(path: Path, rows: list[dict]) -> None:
    """Write a table of one sheet: a header, then a line a row. Texts stay texts, also "=1+1"."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    book = Workbook()
    for n, values in enumerate([list(rows[0]), *(row.values() for row in rows)], 1):
        for column, value in enumerate(values, 1):
            if isinstance(value, int):
                book.active.cell(n, column, value)
            else:
                cell = book.active.cell(n, column, ILLEGAL_CHARACTERS_RE.sub("", str(value)))
                cell.data_type = "s"
    book.save(path)
