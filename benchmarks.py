"""The papers' benchmarks as data: which files, what is asked, how it is scored. One row of BENCHMARKS each.

    files ─ read ─→ rows ─ columns ─→ records, joined with their labels ─ prompt ─→ samples (id, prompt, image, answer)

Two families of files are read: those of LLaVA's scripts and of the benchmarks' authors (JSONL, JSON, TSV, folders;
style "llava"), and lmms-lab's parquet (style "lmms"; needs pyarrow). A question is asked as that harness asks it.
"""
import ast
import base64
import binascii
import csv
import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw

from config import UserError
from data import open_image, read_jsonl

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
YES_OR_NO = " Please answer yes or no."
OCR = "\nReference OCR token: "
REASON = "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"


# ------------------------------------------------------------------------------------------------ images
@dataclass(frozen=True)
class Cell:
    """An image inside a parquet file, read when it is needed. Two cells of the same bytes are the same image."""
    digest: str
    path: str = field(compare=False)
    group: int = field(compare=False)           # the row group, and the row in it
    row: int = field(compare=False)
    column: str = field(compare=False)
    n: int | None = field(compare=False)        # in a column of lists


@lru_cache(maxsize=1)
def row_group(path: str, group: int, column: str):
    from pyarrow.parquet import ParquetFile
    return ParquetFile(path).read_row_group(group, columns=[column]).column(0)


def picture(image: Path | str | Cell, region: tuple | None = None) -> Image.Image:
    """A decoded image: a file, base64 text or a parquet cell. region: ("bbox", (x,y,w,h)) or ("seg", (x,y,x,y,…)) is
    drawn on it, a line of one pixel in red or white, as lmms-eval does. Raises ValueError with a short reason."""
    if isinstance(image, Path):
        image = open_image(image)
    else:
        try:
            if isinstance(image, Cell):
                value = row_group(image.path, image.group, image.column)[image.row].as_py()
                data = (value if image.n is None else value[image.n])["bytes"]
            else:
                data = base64.b64decode(image, validate=True)
            image = Image.open(io.BytesIO(data))
            image.load()
        except (OSError, SyntaxError, binascii.Error, Image.DecompressionBombError) as e:
            raise ValueError(f"not an image ({type(e).__name__})") from None
    if region is not None:
        image = image.convert("RGB")
        kind, xy = region
        if kind == "bbox":
            x, y, w, h = xy
            ImageDraw.Draw(image).rectangle([x, y, x + w, y + h], outline="red")
        else:
            ImageDraw.Draw(image).polygon(list(xy))
    return image


# ------------------------------------------------------------------------------------------------ files → rows
def read(path: Path) -> list[dict]:
    """The rows of a file (or of MME's folder) by its kind, each with _n, its number, and _file, the file's stem."""
    kinds = {".jsonl": read_jsonl, ".json": read_json_rows, ".tsv": read_tsv, ".parquet": read_parquet}
    if not path.is_dir() and path.suffix not in kinds:
        raise UserError(f"{path} is of no kind that is read here: .jsonl, .json, .tsv, .parquet")
    rows = read_mme(path) if path.is_dir() else kinds[path.suffix](path)
    for n, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {n + 1} is not a set of named values: {str(row)[:60]}")
        row.update(_n=n, _file=path.stem)
    if not rows:
        raise UserError(f"{path} is empty: it holds no row")
    return rows


def read_json_rows(path: Path) -> list:
    """A list, the list in an object's questions, annotations or data, an object of objects (its keys become _key), or,
    as POPE's label files are, JSON lines named .json."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return read_jsonl(path)
    if isinstance(value, dict):
        for name in ("questions", "annotations", "data"):
            if isinstance(value.get(name), list):
                return value[name]
        if all(isinstance(v, dict) for v in value.values()):
            return [{**v, "_key": k} for k, v in value.items()]
        return [value]                                          # JSON lines, but only one
    return value


def missing(value) -> bool:
    """Is a table's cell empty? Empty, "nan", "none" and NaN all occur."""
    return value is None or value != value or isinstance(value, str) and value.strip().lower() in ("", "nan", "none")


def read_tsv(path: Path) -> list[dict]:
    """A table with a base64 image a row; a short image cell is the index of the row that has it (VLMEvalKit's way)."""
    csv.field_size_limit(sys.maxsize)                           # images are far above csv's default of 131072
    with open(path, encoding="utf-8-sig", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    for n, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(f"{path}: row {n} has {'more' if None in row else 'fewer'} cells than the header: "
                            "is the file cut off?")
    if not rows or "image" not in rows[0]:
        return rows
    cells, same = {row.get("index"): row["image"] for row in rows}, {}
    for n, row in enumerate(rows, 1):
        cell, seen = row["image"], set()
        while len(cell) <= 64:
            if cell not in cells or cell in seen:
                raise UserError(f"{path}: row {n} has its image in row {cell!r}, which is not there")
            seen.add(cell)
            cell = cells[cell]
        row["image"] = same.setdefault(cell, cell)              # one copy in memory of what rotations repeat
        if cell.startswith("["):
            row["image"] = ast.literal_eval(cell)
    return rows


def read_parquet(path: Path) -> list[dict]:
    """Rows without the images' bytes: in their place stands where they are."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path.name} is parquet, which needs pyarrow: pip install pyarrow, or give the benchmark's "
                        "JSONL, JSON or TSV files") from None
    try:
        file = ParquetFile(path)
    except Exception as e:                                      # pyarrow's errors have no common class but this
        raise UserError(f"{path} is not parquet ({str(e).splitlines()[0]}): download it again") from None

    def cell(value, group, row, column, n=None):
        if not isinstance(value, dict) or value.keys() != {"bytes", "path"}:
            return value
        if value["bytes"] is None:
            return value["path"]
        return Cell(hashlib.sha1(value["bytes"]).hexdigest(), str(path), group, row, column, n)
    rows = []
    for group in range(file.num_row_groups):
        first = len(rows)
        for batch in file.iter_batches(64, row_groups=[group]):
            for row in batch.to_pylist():
                at = group, len(rows) - first
                rows.append({c: [cell(v, *at, c, n) for n, v in enumerate(value)] if isinstance(value, list) else
                             cell(value, *at, c) for c, value in row.items()})
    return rows


def read_mme(folder: Path) -> list[dict]:
    """MME's release: <category>/{*.jpg,*.txt} or <category>/{images,questions_answers_YN}; lines of question, tab, Yes
    or No."""
    rows = []
    for path in sorted([*folder.glob("*/*.txt"), *folder.glob("*/questions_answers_YN/*.txt")]):
        category = folder / path.relative_to(folder).parts[0]
        pictures = [p for d in (path.parent, category, category / "images") for p in sorted(d.glob(f"{path.stem}.*"))
                    if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                question, tab, answer = line.rstrip().rpartition("\t")
                if not tab:
                    raise UserError(f"{path}: no tab between question and answer in {line[:60]!r}")
                rows.append({"category": category.name, "stem": path.stem, "question": question, "answer": answer,
                             "question_id": f"{category.name}/{pictures[0].name if pictures else path.stem}",
                             "image": pictures[0] if pictures else category / f"{path.stem}.jpg"})
    return rows


# ------------------------------------------------------------------------------------------------ the table
@dataclass(frozen=True)
class Source:
    """A kind of file that holds a benchmark, or its labels.

    files: names to look for, the first that is there; {split} is filled in. columns: our name → the file's column, a
    format over columns, or a function of the row; "?" in front marks what may be absent. Wanted are `id` and one of
    `question` (raw), `text` (written as LLaVA asks it) and `prompt` (to be asked as it is); `image` is a file's name in
    --images, or the image. labels are joined by the columns in `join`; of `strict` labels none may be left over.
    shards: may several files match?"""
    files: str
    columns: dict
    split: str = ""
    labels: "Source | None" = None
    join: tuple = ("id",)
    strict: bool = False
    shards: bool = False


@dataclass(frozen=True)
class Benchmark:
    sources: tuple[Source, ...]
    score: str                                  # in SCORES: one answer; in SUMMARIES: all of them
    headline: str                               # the metric to quote
    max_new: int
    suffix: str | Callable = ""                 # of (record, style), as body: what stands before it
    body: Callable = lambda r, style: r["question"]
    summary: str = "mean"
    submission: str | None = None               # in SUBMISSIONS
    keep: Callable = lambda r: True             # of a record
    sizes: tuple = ()                           # questions in the released splits
    repeats: bool = False                       # may ids repeat? The second is then id#2


def near(name: str) -> str:
    return f"{name} */{name}"


def parquet(columns: dict, split: str, config: str = "data", **more) -> Source:
    return Source(f"{config}/{{split}}-*.parquet {{split}}-*.parquet", columns, split, shards=True, **more)


def options(row: dict, names: str = "ABCDEFGHI") -> list[str]:
    """Columns A, B, …, up to the first that is missing."""
    found = []
    for name in names:
        if missing(row.get(name)):
            break
        found.append(str(row[name]))
    return found


def literal(value):
    """MMMU keeps lists as their Python text."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass
    return value


def listing(r: dict, mark: str = ". ") -> str:
    return "".join(f"\n{letter}{mark}{text}" for letter, text in zip(LETTERS, r["options"]))


def ask_mmbench(r: dict, style: str, several: str) -> str:
    hint = "" if missing(r["hint"]) else r["hint"] + ("\n" if style == "llava" else " ")
    return hint + r["question"] + (listing(r) if style == "llava" else f" {several}{listing(r)}\n")


def ask_mmstar(r: dict, style: str) -> str:
    if "Options:" in r["question"] or not r["options"]:
        return r["question"]
    return f"{r['question']}\nOptions: " + ", ".join(f"{a}: {o}" for a, o in zip(LETTERS, r["options"]))


def mmstar_options(row: dict) -> list[str]:
    """From their columns, or from the question: "… Options: A: a cat, B: a dog"."""
    told = str(row["question"]).partition("Options:")[2].strip()
    return options(row) or re.split(r",?\s*\b[A-Z]: ", told)[1:]


def mmmu_images(row: dict) -> list:
    """What the question's text names, in order of number (else the first)."""
    named = sorted(set(re.findall(r"<image (\d)>", f"{row['question']} {row['options']}"))) or ["1"]
    return [row[f"image_{n}"] for n in named if row.get(f"image_{n}") is not None]


def pope_category(row: dict) -> str:
    """Of coco_pope_adversarial.json, adversarial."""
    return row["_file"].rpartition("_")[2]


def subject(name: str) -> str:
    return re.sub(r"^[a-z]+_|_\d+$", "", name)


def mmbench(lang: str) -> Benchmark:
    columns = dict(id=lambda r: int(float(r["index"])), question="question", hint="?hint", options=options,
                   image="image", answer="?answer", category=lambda r: r.get("l2-category", r.get("L2-category")),
                   split="?split")
    cn = lang == "cn"
    letter = {"llava": "\n请直接回答选项字母。", "lmms": "\n请直接使用所提供的选项字母作为答案回答。"}
    several = "有如下几个选项：" if cn else "There are several options:"
    names = near("mmbench_{split}_cn_2*.tsv") + " " + near("MMBench_{SPLIT}_CN*.tsv") if cn else " ".join(
        near(name) for name in ("mmbench_{split}_2*.tsv", "mmbench_{split}_en_2*.tsv", "MMBench_{SPLIT}_EN*.tsv"))
    return Benchmark(
        (Source(names, columns, "dev"), Source(names, columns, "test"), parquet(columns, "dev", lang),
         parquet(columns, "test", lang)),
        "choice", "circular", 1024, lambda r, style: letter[style] if cn else LETTER,
        lambda r, style: ask_mmbench(r, style, several), "circular", "mmbench", sizes=(4377, 4329, 6666))


def refcoco(*sizes: int) -> Benchmark:
    columns = dict(id="question_id", question=lambda r: "Provide a short description for this region.", image="image",
                   answer="answer", bbox="bbox", seg="segmentation")
    return Benchmark((parquet(columns, "val"),), "none", "cider", 1024, summary="cider", sizes=sizes, repeats=True)


LLAVA = dict(id="question_id", text="text", image="?image", category="?category")
RAW = dict(id="question_id", question="question", image="?image", answer="?answers")
KEYED = {**LLAVA, "image_id": "question_id"}                    # TextVQA's question_id is its image's
FOUR = dict(options=lambda r: [str(r[f"choice_{c}"]) for c in "abcd"])
PROBLEMS = Source(near("problems.json"), dict(id="_key", options="choices", answer=lambda r: LETTERS[r["answer"]],
                                              split="?split"))
MME_FOLDER = Source(near("MME_Benchmark_release_version"), dict(id="question_id", stem="stem", category="category",
                    question="question", answer="answer", image="image", group="question_id"), strict=True)
SEED_BENCH = Source(near("SEED-Bench.json"), dict(id="question_id", answer="answer", data_type="data_type",
                                                  category="question_type_id", **FOUR))
MMSTAR = dict(id="index", question="question", options=mmstar_options, image="image", answer="answer",
              category="l2_category", area="category")
MMT = dict(id="index", question="question", options=options, image="image", answer="?answer",
           category=lambda r: r.get("l2-category", r.get("category")))
VQA_LABELS = "mscoco_val2014_annotations.json"
COCO = {**RAW, "image": "COCO_val2014_{image_id:012d}.jpg"}

BENCHMARKS = {
    "vqav2": Benchmark((
        Source(near("v2_OpenEnded_mscoco_val2014_questions.json"), {**COCO, "answer": "?"}, "val",
               Source(near("v2_" + VQA_LABELS), dict(id="question_id", answer="answers"))),
        Source(near("llava_vqav2_mscoco_test-dev2015.jsonl"), LLAVA, "test-dev"),
        parquet(RAW, "validation"), parquet(RAW, "testdev")),
        "vqav2", "accuracy", 16, SHORT, submission="vqav2", sizes=(214354, 107394, 447793)),
    "okvqa": Benchmark((
        Source(near("OpenEnded_mscoco_val2014_questions.json"), {**COCO, "answer": "?"}, "val",
               Source(near(VQA_LABELS), dict(id="question_id", answer="answers"))),
        parquet(RAW, "val2014")),
        "vqa", "accuracy", 1024, lambda r, style: (UNANSWERABLE if style == "lmms" else "") + SHORT, sizes=(5046,)),
    "gqa": Benchmark((
        Source(near("llava_gqa_testdev_balanced.jsonl"), LLAVA, "testdev",
               Source(near("testdev_balanced_questions.json"), dict(id="_key", answer="answer"))),
        Source(near("testdev_balanced_questions.json"),
               dict(id="_key", question="question", image="{imageId}.jpg", answer="answer"), "testdev"),
        parquet(dict(id="id", image_id="imageId", question="question", answer="answer"), "testdev",
                "testdev_balanced_instructions", join=("image_id",),
                labels=parquet(dict(image_id="id", image="image"), "testdev", "testdev_balanced_images"))),
        "exact", "accuracy", 16, SHORT, submission="gqa", sizes=(12578,)),
    "textvqa": Benchmark((
        Source(near("llava_textvqa_val_v051_ocr.jsonl"), KEYED, "val",
               Source(near("TextVQA_0.5.1_val.json"), dict(image_id="image_id", question="question", answer="answers")),
               ("image_id", "question")),
        Source(near("TextVQA_0.5.1_val.json"), {**RAW, "image": "{image_id}.jpg"}, "val"),
        parquet({**RAW, "ocr": "ocr_tokens"}, "validation"), parquet({**RAW, "ocr": "ocr_tokens"}, "test")),
        "vqa", "accuracy", 1024, SHORT, lambda r, style: r["question"].capitalize() + ocr_line(r), submission="textvqa",
        sizes=(5000, 5734), repeats=True),
    "vizwiz": Benchmark((
        Source(near("llava_test.jsonl"), LLAVA, "test"),
        Source(near("val.json"), {**RAW, "id": "image"}, "val"),
        Source(near("test.json"), {**RAW, "id": "image"}, "test"),
        parquet({**RAW, "file": "{question_id}.jpg"}, "val"), parquet({**RAW, "file": "{question_id}.jpg"}, "test")),
        "vqa", "accuracy", 1024, UNANSWERABLE + SHORT, lambda r, style: r["question"].capitalize(), submission="vizwiz",
        sizes=(4319, 8000)),
    "realworldqa": Benchmark((parquet(dict(id="_n", question="question", image="image", answer="answer"), "test"),),
                             "realworldqa", "accuracy", 16, sizes=(765,)),
    "sqa": Benchmark((
        Source(near("llava_test_CQM-A.json"),
               dict(id="id", image="?image",
                    text=lambda r: r["conversations"][0]["value"].replace("<image>", "").strip()), "test", PROBLEMS),
        parquet(dict(id="_n", question="question", options="choices", answer=lambda r: LETTERS[r["answer"]],
                     hint="?hint", image="image"), "test", "ScienceQA-IMG")),
        "choice", "image", 16, LETTER,
        lambda r, style: (f"Context: {r['hint']}\n" if r["hint"] else "") + r["question"] + listing(r), "sqa",
        sizes=(2017, 4241)),
    "docvqa": Benchmark((
        Source(near("val_v1.0*.json"), {**RAW, "id": "questionId"}, "val"),
        Source(near("test_v1.0*.json"), {**RAW, "id": "questionId"}, "test"),
        parquet({**RAW, "id": "questionId"}, "validation", "DocVQA"),
        parquet({**RAW, "id": "questionId"}, "test", "DocVQA")),
        "anls", "anls", 32, SHORT, submission="docvqa", sizes=(5349, 5188)),
    "pope": Benchmark((
        Source(near("llava_pope_test.jsonl"), LLAVA, "test",
               Source(near("coco_pope_*.json"), dict(category=pope_category, image="image", question="text",
                                                     answer="label"), strict=True, shards=True),
               ("category", "image", "question")),
        Source(near("coco_pope_*.json"), dict(id=lambda r: f"{pope_category(r)}/{r['question_id']}",
               category=pope_category, question="text", image="image", answer="label"), "test", shards=True),
        parquet(dict(id="{category}/{question_id}", question="question", image="image", answer="answer",
                     category="category"), "test")),
        "pope", "f1", 128, SHORT, summary="pope", sizes=(9000, 8910)),
    "mme": Benchmark((
        Source(near("llava_mme.jsonl"), {**LLAVA, "group": "question_id", "stem": lambda r: Path(r["question_id"]).stem,
                                         "category": lambda r: r["question_id"].split("/")[0]}, "test",
               MME_FOLDER, ("category", "stem", "question")),
        replace(MME_FOLDER, split="test"),
        parquet(dict(id="question_id", group="question_id", question="question", image="image", answer="answer",
                     category="category"), "test")),
        "mme", "perception", 16, SHORT, lambda r, style: r["question"].strip().replace(YES_OR_NO, ""), "mme",
        sizes=(2374,), repeats=True),
    "mmbench_en": mmbench("en"),
    "mmbench_cn": mmbench("cn"),
    "seed": Benchmark((
        Source(near("llava-seed-bench.jsonl"), LLAVA, "test", SEED_BENCH),
        parquet(dict(id="question_id", question="question", image="image", answer="answer", data_type="data_type",
                     category="?question_type_id", **FOUR), "test")),
        "choice", "accuracy", 1024, LETTER, lambda r, style: r["question"] + listing(r), submission="seed",
        keep=lambda r: r["data_type"] == "image", sizes=(14233,)),
    "mmstar": Benchmark((Source(near("MMStar*.tsv"), MMSTAR, "val"), parquet(MMSTAR, "val")),
                        "choice", "average", 1024, LETTER[:-1], ask_mmstar, "mmstar", sizes=(1500,)),
    "ai2d": Benchmark((parquet(dict(id="_n", question="question", options="options", image="image",
                                    answer=lambda r: LETTERS[int(r["answer"])]), "test"),),
                      "choice", "accuracy", 16, LETTER, lambda r, style: r["question"] + listing(r), sizes=(3088,)),
    "mmmu": Benchmark((
        Source(near("anns_for_eval.json"), dict(id="id", prompt="prompt", image="?image", question_type="question_type",
               options=lambda r: list((r.get("index2ans") or {}).values()), category=lambda r: subject(r["id"])), "val",
               Source(near("answer_dict_val.json"), dict(id="_key", answer="ground_truth"))),
        *(Source(f"data/{split}-*.parquet */{split}-*.parquet {split}-*.parquet",
                 dict(id="id", question="question", options=lambda r: literal(r["options"]), image=mmmu_images,
                      question_type="question_type", answer=lambda r: literal(r["answer"]),
                      category=lambda r: subject(r["id"])), split, shards=True) for split in ("validation", "test"))),
        "mmmu", "accuracy", 128, lambda r, style: LETTER if r["question_type"] == "multiple-choice" else SHORT,
        lambda r, style: r["question"] + listing(r) + "\n", submission="mmmu", sizes=(900, 10500)),
    "mmt": Benchmark((Source(near("MMT-Bench_VAL.tsv"), MMT, "val"), parquet(MMT, "val"), parquet(MMT, "test")),
                     "choice", "accuracy", 8, "\nAnswer the question using a single character from the given options.",
                     lambda r, style: f"Question: <image>\n{r['question'].strip()}" + listing(r, ": "),
                     submission="mmt", sizes=(3127, 28198)),
    "ocrbench": Benchmark((
        Source(near("OCRBench.json"), dict(id="id", question="question", image="image_path", answer="answers",
                                           dataset="dataset_name", category="type"), "test"),
        parquet(dict(id="_n", question="question", image="image", answer="answer", dataset="dataset",
                     category="question_type"), "test")),
        "ocrbench", "hits", 128, summary="ocrbench", sizes=(1000,)),
    "mmvet": Benchmark((
        Source(near("llava-mm-vet.jsonl"), LLAVA, "test"),
        parquet(dict(id="question_id", question="question", image="image"), "test")),
        "none", "", 1024, body=lambda r, style: (REASON if style == "lmms" else "") + r["question"], submission="mmvet",
        sizes=(218,)),
    "refcoco": refcoco(8811, 5000, 1975, 1810),
    "refcoco+": refcoco(),
    "refcocog": refcoco(7573),
    "own": Benchmark((Source("questions.jsonl", dict(id=lambda r: r.get("question_id", r["_n"] + 1), prompt="text",
                                                     image="?image", answer="?answer", category="?category",
                                                     options="?options")),), "exact", "accuracy", 64),
}


# ------------------------------------------------------------------------------------------------ rows → samples
@dataclass
class Sample:
    id: str                         # question_id, or question_id#2 where a file repeats it
    prompt: str                     # as it is asked, <image> left out where it comes first
    image: Path | str | Cell | None
    answer: str | list[str] | None  # None: not public
    category: str | None
    options: list[str]
    record: dict                    # what else scorers and submissions need
    region: tuple | None = None     # see `picture`


def ocr_line(r: dict) -> str:
    return OCR + ", ".join(r["ocr"]) if r.get("ocr") is not None else ""


def bare(text: str) -> str:
    """The question of a text that is already a prompt."""
    lines = [line for line in text.split("\n") if not line.startswith(OCR.strip()) and
             "\n" + line not in (SHORT, LETTER, UNANSWERABLE)]
    return "\n".join(lines)


def join_key(record: dict, names: tuple) -> tuple:
    """What records are matched by: case and white space do not count, nor how MME's question ends."""
    def plain(value):
        return " ".join(str(value).split()).lower().removesuffix(YES_OR_NO.lower()).strip()
    return tuple(plain(record[name]) for name in names)


def looked_for(source: Source, split: str | None) -> list[str]:
    split = split or source.split
    return [p.replace("{split}", split).replace("{SPLIT}", split.upper()) for p in source.files.split()]


def find(source: Source, folder: Path, split: str | None) -> list[Path]:
    """The files of a source in a folder (or that folder itself), of the first of its patterns that any matches. Raises
    UserError where several match that are not parts of one."""
    for pattern in looked_for(source, split):
        hits = [folder] if fnmatch(folder.name, pattern) else sorted(folder.glob(pattern))
        if len(hits) > 1 and not source.shards:
            raise UserError(f"{folder} holds {', '.join(p.name for p in hits)}: say which one with --data FILE")
        if hits:
            return hits
    return []


def choose(name: str, data: Path, split: str | None) -> tuple[Source, list[Path]]:
    """The first source of a benchmark whose files are there. Raises UserError naming all that was looked for, or what
    benchmark and split a file is of by its name, if not of these."""
    if not data.exists():
        raise UserError(f"--data {data} does not exist")
    sources = BENCHMARKS[name].sources
    # A split that no source is called by is one of those whose names say it: refcoco's testA.
    sources = [s for s in sources if split in (None, s.split)] or [s for s in sources if "{split}" in s.files]
    if data.is_file():
        def fits(s, split):
            return any(fnmatch(data.name, Path(p).name) for p in looked_for(s, split))
        for s in sources:
            if fits(s, split):
                return s, [data]
        others = [(n, s.split) for n, b in BENCHMARKS.items() for s in b.sources
                  if ".parquet" not in s.files and fits(s, None)]
        if others and name != "own":
            theirs, ours = others[0], (name, split) if split else (name,)
            raise UserError(f"{data} is by its name of {', split '.join(theirs)}; asked for is {', split '.join(ours)}")
        for s in sources:
            if Path(s.files.split()[0]).suffix == data.suffix:
                return s, [data]
    else:
        for s in sources:
            files = find(s, data, split)
            if files:
                return s, files
    wanted = dict.fromkeys(p for s in sources for p in looked_for(s, split))
    there = sorted(p.name for p in data.iterdir()) if data.is_dir() else [data.name]
    raise UserError(f"{data} holds no file of {name}{f', split {split}' if split else ''}: looked for "
                    f"{', '.join(wanted)}; there is {', '.join(there[:8]) or 'nothing'}")


def records(source: Source, files: list[Path]) -> list[dict]:
    """Rows under our names. Raises UserError for a column that is not there, naming those that are."""
    found = []
    for path in files:
        for row in read(path):
            record = {}
            for name, column in source.columns.items():
                try:
                    if callable(column):
                        record[name] = column(row)
                    elif column.startswith("?"):
                        record[name] = row.get(column[1:])
                    else:
                        record[name] = column.format(**row) if "{" in column else row[column]
                except (KeyError, ValueError, IndexError, TypeError, AttributeError) as e:
                    what = f"no column {e}" if isinstance(e, KeyError) else f"a {name} that cannot be used ({e})"
                    raise UserError(f"{path}: row {row['_n'] + 1} has {what}; its columns are "
                                    f"{', '.join(k for k in row if not k.startswith('_'))}") from None
            if "text" in record:
                record["question"] = bare(str(record["text"]))
            for name in ("text", "prompt", "question"):
                if not isinstance(record.get(name, ""), str):
                    raise UserError(f"{path}: row {row['_n'] + 1} has no text in {name}: {record[name]!r}")
            found.append(record)
    return found


def attach(questions: list[dict], source: Source, files: list[Path], labels: list[Path], split: str | None) -> int:
    """Gives questions what their labels say; → labels left over. A question that is asked twice with two labels gets
    them in order. Raises UserError for a question without a label, two labels for one, and, where labels are strict,
    for labels left over: the files are then of different releases."""
    answers = {}
    names, theirs = [", ".join(p.name for p in group) for group in (files, labels)]
    for label in records(source.labels, labels):
        if label.pop("split", None) in (None, split or source.split):
            answers.setdefault(join_key(label, source.join), []).append(label)
    keys = [join_key(q, source.join) for q in questions]
    lost = [key for key in keys if key not in answers]
    if lost:
        raise UserError(f"{len(lost)} of {len(keys)} questions of {names} have no label in {theirs}, the first "
                        f"{' · '.join(lost[0])}: the two are of different releases or splits")
    times, used = Counter(keys), Counter()
    for question, key in zip(questions, keys):
        same = all(label == answers[key][0] for label in answers[key])
        if not same and len(answers[key]) != times[key]:
            raise UserError(f"{theirs}: different labels for one question, {' · '.join(key)}")
        label = answers[key][0 if same else used[key]]
        used[key] += 1
        question.update({k: v for k, v in label.items() if k not in ("id", "question")})
    left = len(answers) - len(used)
    if left and source.labels.strict:
        first = next(key for key in answers if key not in used)
        raise UserError(f"{left} labels of {theirs} have no question in {names}, the first {' · '.join(first)}: the "
                        "two are of different releases")
    return left


def load(name: str, data: Path, images: Path | None = None, labels: Path | None = None, split: str | None = None,
         style: str | None = None, ocr: bool | None = None, region: str = "bbox") -> tuple[list[Sample], dict]:
    """The samples of a benchmark in the file's order, and what was read: files, split, style, ocr, n, counts.

    data: its file or folder; labels: where those are, if elsewhere; style: ask as llava or lmms does (None: as the
    family of the files); ocr: TextVQA's OCR line (None: as the style has it). Raises UserError."""
    benchmark = BENCHMARKS[name]
    source, files = choose(name, data, split)
    split = split or source.split
    style = style or ("lmms" if files[0].suffix == ".parquet" else "llava")
    info = {"files": [str(p) for p in files], "split": split, "style": style, "counts": {}}
    found = records(source, files)
    if style == "lmms" and ("text" in source.columns or "prompt" in source.columns and name != "own"):
        raise UserError(f"--style lmms: {files[0].name} holds questions as LLaVA asks them; give raw ones")
    if source.labels is not None:
        home = labels or (data if data.is_dir() else data.parent)
        there = [home] if home.is_file() else find(source.labels, home, split)
        if not there:
            raise UserError(f"{home} holds no labels for {files[0].name}: looked for "
                            f"{', '.join(looked_for(source.labels, split))} (--labels says where they are)")
        info["files"] += [str(p) for p in there]
        info["counts"]["labels without a question"] = attach(found, source, files, there, split)
    of_split = [r for r in found if r.get("split") in (None, "", split)]
    if not of_split:
        other = found[0]["split"]
        raise UserError(f"{files[0]} holds split {other}, asked for is {split}: --split {other}?")
    kept = [r for r in of_split if benchmark.keep(r)]
    info["counts"]["questions of another kind left out"] = len(found) - len(kept)
    info["counts"]["samples of which only the first image is shown"] = sum(
        isinstance(r.get("image"), list) and len(r["image"]) > 1 for r in kept)
    wants_ocr = style == "llava" if ocr is None else ocr
    if ocr is not None and name != "textvqa":
        raise UserError(f"--ocr and --no-ocr are about textvqa's OCR line; {name} has none")
    if ocr and not any(r.get("ocr") is not None or OCR in r.get("text", "") for r in kept):
        raise UserError(f"--ocr: {files[0].name} holds no OCR tokens; llava_textvqa_val_v051_ocr.jsonl and parquet do")
    samples, seen = [], Counter()
    for r in kept:
        if not wants_ocr:
            r["ocr"] = None
            if OCR in r.get("text", ""):
                r["text"] = "\n".join(line for line in r["text"].split("\n") if not line.startswith(OCR.strip()))
        image = r.get("image")
        if isinstance(image, list):
            image = image[0] if image else None
        number = str(r["id"])
        seen[number] += 1
        if seen[number] > 1 and not benchmark.repeats:
            raise UserError(f"{files[0]}: question id {number} is there twice")
        category = None if missing(r.get("category")) or r["category"] == "default" else str(r["category"])
        samples.append(Sample(
            number if seen[number] == 1 else f"{number}#{seen[number]}", prompt_of(benchmark, r, style),
            locate(image, images, files[0]), reference(r.get("answer")), category,
            [str(o) for o in r.get("options") or []], r, outline(r, region)))
    if name == "textvqa":
        lines = sum(OCR in s.prompt for s in samples)
        info["ocr"] = "on" if lines == len(samples) else "off" if not lines else f"on for {lines} of {len(samples)}"
    if name.startswith("refcoco"):
        info["region"] = region
    return samples, {**info, "n": len(samples), "released": list(benchmark.sizes)}


def prompt_of(benchmark: Benchmark, r: dict, style: str) -> str:
    """A record's question with its suffix, once."""
    if "prompt" in r:
        return r["prompt"]
    text = r["text"] if "text" in r else benchmark.body(r, style)
    suffix = benchmark.suffix(r, style) if callable(benchmark.suffix) else benchmark.suffix
    return text if text.endswith(suffix) else text + suffix


def locate(image, images: Path | None, source: Path) -> Path | str | Cell | None:
    """A row's image: a file's path in --images, or what the file holds itself."""
    if missing(image):
        return None
    if isinstance(image, (Path, Cell)) or source.suffix == ".tsv":
        return image
    if images is None:
        raise UserError(f"{source} names images, such as {image}: say with --images in which folder they are")
    return images / image


def reference(answer) -> str | list[str] | None:
    """An answer, or the list of them; None where it is not public."""
    if isinstance(answer, list):
        answers = [str(a["answer"] if isinstance(a, dict) else a) for a in answer]
        return answers if any(answers) else None
    return None if answer is None or answer != answer or answer in ("", "nan", "?") else str(answer)


def outline(r: dict, region: str) -> tuple | None:
    """What is to be drawn on the image: see `picture`."""
    if region not in r:
        return None
    xy = r[region]
    return region, tuple(xy[0] if xy and isinstance(xy[0], list) else xy)


def absent(samples: list[Sample]) -> None:
    """Raises UserError if image files are not there, with their number and the first."""
    files = dict.fromkeys(s.image for s in samples if isinstance(s.image, Path))
    lost = [f for f in files if not f.is_file()]
    if lost:
        raise UserError(f"{len(lost)} of {len(files)} images are not there, such as {lost[0]}: is --images the folder "
                        "that the names are relative to?")
