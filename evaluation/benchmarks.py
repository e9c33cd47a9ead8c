"""The papers' benchmarks as data: which files, what is asked, how it is scored. One row of BENCHMARKS each."""
import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.files import missing

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
YES_OR_NO = " Please answer yes or no."
OCR = "\nReference OCR token: "
REASON = "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"


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


def ocr_line(r: dict) -> str:
    return OCR + ", ".join(r["ocr"]) if r.get("ocr") is not None else ""


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
