"""Files that a benchmark's server or official script takes."""
import json
import re
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

from common.files import read_jsonl
from evaluation import metrics
from evaluation.benchmarks import Benchmark
from evaluation.questions import Sample


def file_name(s: Sample) -> str:
    return s.record.get("file") or (s.image.name if isinstance(s.image, Path) else s.id)


def table_mmbench(samples, answers, parsed):
    columns = ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    for s, p in zip(samples, answers):
        cells = dict(zip("ABCD", s.options), index=int(s.id), question=s.record["question"], prediction=p or "",
                     answer=s.answer or "", split=s.record["split"] or "")
        yield {c: cells.get(c, "") for c in columns if c != "answer" or s.answer is not None}


def plain(answer: str | None) -> str:
    return "" if answer is None else metrics.vqa_norm(answer)


def normed(samples, answers, parsed):
    return [{"question_id": as_number(s.id), "answer": plain(p)} for s, p in zip(samples, answers)]


SUBMISSIONS = {   # name → (file ending, (samples, predictions, parsed) → what is written)
    "vqav2": ("json", normed),
    "textvqa": ("json", normed),
    "vizwiz": ("json", lambda ss, ps, parsed: [{"image": file_name(s), "answer": plain(p)} for s, p in zip(ss, ps)]),
    "gqa": ("json", lambda ss, ps, parsed: [{"questionId": s.id, "prediction": (p or "").rstrip(".").lower()}
                                            for s, p in zip(ss, ps)]),
    "docvqa": ("json", lambda ss, ps, parsed: [{"questionId": int(s.id), "answer": p or ""} for s, p in zip(ss, ps)]),
    "mmmu": ("json", lambda ss, ps, parsed: {s.id: q or p or "" for s, p, q in zip(ss, ps, parsed)}),
    "mmt": ("json", lambda ss, ps, parsed: {s.id: q or p or "" for s, p, q in zip(ss, ps, parsed)}),
    "mmvet": ("json", lambda ss, ps, parsed: {"v1_" + s.id.removeprefix("v1_"): p or "" for s, p in zip(ss, ps)}),
    "seed": ("jsonl", lambda ss, ps, parsed: [{"question_id": s.id, "prediction": p or ""} for s, p in zip(ss, ps)]),
    "mmbench": ("xlsx", lambda ss, ps, parsed: list(table_mmbench(ss, ps, parsed))),
}


def as_number(number: str) -> int | str:
    return int(number) if number.isdigit() else number


def write_xlsx(path: Path, rows: list[dict]) -> None:
    """A table as the least that spreadsheet programs and openpyxl read: one sheet, texts written in their cells."""
    def cell(value) -> str:
        if isinstance(value, int):
            return f"<c><v>{value}</v></c>"
        text = escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "", str(value)))
        return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'
    lines = [list(rows[0]), *([row[c] for c in rows[0]] for row in rows)]
    sheet = "".join(f"<row>{''.join(map(cell, line))}</row>" for line in lines)
    site, kind = "http://schemas.openxmlformats.org/", "application/vnd.openxmlformats-"
    main, office = site + "spreadsheetml/2006/main", site + "officeDocument/2006/relationships"
    package, sheets = site + "package/2006/", kind + "officedocument.spreadsheetml."
    parts = {
        "[Content_Types].xml":
            f'<Types xmlns="{package}content-types">'
            f'<Default Extension="rels" ContentType="{kind}package.relationships+xml"/>'
            f'<Override PartName="/xl/workbook.xml" ContentType="{sheets}sheet.main+xml"/>'
            f'<Override PartName="/xl/sheet1.xml" ContentType="{sheets}worksheet+xml"/></Types>',
        "_rels/.rels":
            f'<Relationships xmlns="{package}relationships">'
            f'<Relationship Id="r1" Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/_rels/workbook.xml.rels":
            f'<Relationships xmlns="{package}relationships">'
            f'<Relationship Id="r1" Type="{office}/worksheet" Target="sheet1.xml"/></Relationships>',
        "xl/workbook.xml":
            f'<workbook xmlns="{main}" xmlns:r="{office}">'
            '<sheets><sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{sheet}</sheetData></worksheet>'}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in parts.items():
            z.writestr(name, '<?xml version="1.0" encoding="UTF-8"?>' + text)


def write_submission(benchmark: Benchmark, samples: list[Sample], rows: list[dict], data: Path,
                     out: Path) -> Path | None:
    """The file that the benchmark's server or official script takes, if there is such; rows are those of `score`."""
    if benchmark.submission is None:
        return None
    ending, make = SUBMISSIONS[benchmark.submission]
    value = make(samples, [r["prediction"] for r in rows], [r["parsed"] for r in rows])
    if benchmark.submission == "vqav2":                         # the server wants an answer for all of test
        folder = data if data.is_dir() else data.parent
        given = {a["question_id"]: a["answer"] for a in value}
        every = [r["question_id"] for p in folder.glob("**/llava_vqav2_mscoco_test2015.jsonl") for r in read_jsonl(p)]
        value = [{"question_id": i, "answer": given.get(i, "")} for i in every] or value
    path = out / f"submission.{ending}"
    if ending == "xlsx":
        write_xlsx(path, value)
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in value), encoding="utf-8")
    else:
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path
