"""The papers' benchmarks as data: which files, what is asked, how it is scored. One row each."""
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evaluation.files import literal, missing

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
INSTRUCTIONS = (SHORT, LETTER, UNANSWERABLE)
YES_OR_NO = " Please answer yes or no."
OCR = "\nReference OCR token: "
REASON = ("First please perform reasoning, and think step by step to provide best answer to the "
          "following question: \n\n")
REGION = "Provide a short description for this region."


@dataclass(frozen=True)
class Source:
    """A kind of file that holds a benchmark, or its labels.

    files: the names to look for, with {split} filled in; the first that is there is read.
    columns: our name → the file's column, a format over columns, or a function of the row. "?" in
    front marks a column that may be absent. Required are `id` and one of `question` (raw), `text`
    (written as LLaVA asks it) and `prompt` (asked as it is). `image`: a file's name, or the image."""
    files: str
    columns: dict
    split: str = ""
    labels: "Source | None" = None
    join: tuple = ("id",)                       # columns that labels are matched by
    strict: bool = False                        # of labels: none may be left over
    shards: bool = False                        # several files may match


@dataclass(frozen=True)
class Benchmark:
    """body and suffix make the prompt: functions of (record, style). Style: "llava" or "lmms"."""
    sources: tuple[Source, ...]
    score: str                                  # rule for one answer: a key of SCORES
    headline: str = "accuracy"                  # the metric to quote
    max_new: int | Callable = 64                # tokens of an answer, or a function of the style
    suffix: str | Callable = ""
    body: Callable = lambda r, style: r["question"]
    summary: str = "mean"                       # rule for all answers: a key of SUMMARIES
    submission: str | None = None               # a key of SUBMISSIONS
    keep: Callable = lambda r: True             # False for a record to leave out
    sizes: tuple = ()                           # questions in the released splits
    repeats: bool = False                       # ids may repeat; the second is then id#2


# ----------------------------------------------------------------------------- helpers of the table
def near(name: str) -> str:
    """Look for a file in the folder, then one folder below."""
    return f"{name} */{name}"


def parquet(columns: dict, split: str, config: str = "data", **more) -> Source:
    files = f"{config}/{{split}}-*.parquet {{split}}-*.parquet"
    return Source(files, columns, split, shards=True, **more)


def options(row: dict, names: str = "ABCDEFGHI") -> list[str]:
    """Return columns A, B, …, up to the first empty one. Tables may write "nan" for empty: at the
    end it is no option, unless it is the answer."""
    found = []
    for name in names:
        if row.get(name) in (None, "") or row[name] != row[name]:
            break
        found.append(str(row[name]))
    while found and found[-1] == "nan" and LETTERS[len(found) - 1] != row.get("answer"):
        found.pop()
    return found


def listing(r: dict, mark: str = ". ") -> str:
    """One line for each option: "A. a cat"."""
    return "".join(f"\n{letter}{mark}{text}" for letter, text in zip(LETTERS, r["options"]))


def ask_options(r: dict, style: str) -> str:
    return r["question"] + listing(r)


def ask_sqa(r: dict, style: str) -> str:
    hint = f"Context: {r['hint']}\n" if r["hint"] else ""
    return hint + ask_options(r, style)


def ask_mmstar(r: dict, style: str) -> str:
    if "Options:" in r["question"] or not r["options"]:
        return r["question"]
    listed = ", ".join(f"{letter}: {text}" for letter, text in zip(LETTERS, r["options"]))
    return f"{r['question']}\nOptions: {listed}"


def mmstar_options(row: dict) -> list[str]:
    """Take options from their columns, or from the question: "… Options: A: a cat, B: a dog"."""
    text = str(row["question"]).partition("Options:")[2].strip()
    return options(row) or re.split(r",?\s*\b[A-Z]: ", text)[1:]


def mmmu_images(row: dict) -> list:
    """Return the images that the question names, in order of number; the first if it names none."""
    named = sorted(set(re.findall(r"<image (\d)>", f"{row['question']} {row['options']}"))) or ["1"]
    return [row[f"image_{n}"] for n in named if row.get(f"image_{n}") is not None]


def pope_category(row: dict) -> str:
    """coco_pope_adversarial.json → adversarial."""
    return row["_file"].rpartition("_")[2]


def subject(name: str) -> str:
    """validation_Art_Theory_12 → Art_Theory."""
    return re.sub(r"^[a-z]+_|_\d+$", "", name)


def ocr_line(r: dict) -> str:
    return "" if r.get("ocr") is None else OCR + ", ".join(r["ocr"])


def mmbench(lang: str) -> Benchmark:
    names = "mmbench_{split}_2*.tsv mmbench_{split}_en_2*.tsv MMBench_{SPLIT}_EN*.tsv"
    letter = {"llava": LETTER, "lmms": LETTER}
    if lang == "cn":
        names = "mmbench_{split}_cn_2*.tsv MMBench_{SPLIT}_CN*.tsv"
        letter = {"llava": "\n请直接回答选项字母。", "lmms": "\n请直接使用所提供的选项字母作为答案回答。"}
    names = " ".join(near(name) for name in names.split())
    columns = dict(id=lambda r: int(float(r["index"])), question="question", hint="?hint",
                   options=options, image="image", answer="?answer",
                   category=lambda r: r.get("l2-category", r.get("L2-category")), split="?split")

    def body(r, style):
        if style == "llava":
            hint = "" if missing(r["hint"]) else r["hint"] + "\n"
            return hint + r["question"] + listing(r)
        # lmms-eval asks Chinese questions with an English heading too, and without a hint "nan".
        none = "nan " if lang == "cn" else ""
        hint = none if missing(r["hint"]) else r["hint"] + " "
        return f"{hint}{r['question']} There are several options:{listing(r)}\n"

    return Benchmark(
        (Source(names, columns, "dev"), Source(names, columns, "test"),
         parquet(columns, "dev", lang), parquet(columns, "test", lang)),
        score="choice", headline="circular", suffix=lambda r, style: letter[style], body=body,
        max_new=lambda style: 256 if (lang, style) == ("cn", "lmms") else 1024,
        summary="circular", submission="mmbench", sizes=(4377, 4329, 6666))


def refcoco(*sizes: int) -> Benchmark:
    columns = dict(id="question_id", question=lambda r: REGION, image="image", answer="answer",
                   bbox="bbox", seg="segmentation")
    return Benchmark((parquet(columns, "val"),), score="none", headline="cider", max_new=1024,
                     summary="cider", sizes=sizes, repeats=True)


# ---------------------------------------------------------------------------------------- the table
LLAVA = dict(id="question_id", text="text", image="?image", category="?category")
RAW = dict(id="question_id", question="question", image="?image", answer="?answers")
ROW = dict(id="_n", question="question", image="image", answer="answer")        # of parquet files
COCO = {**RAW, "image": "COCO_val2014_{image_id:012d}.jpg", "answer": "?"}
COCO_LABELS = dict(id="question_id", answer="answers")
TEXTVQA = {**RAW, "ocr": "ocr_tokens"}
VIZWIZ = {**RAW, "file": "{question_id}.jpg"}
DOCVQA = {**RAW, "id": "questionId"}
POPE = dict(category=pope_category, image="image", question="text", answer="label")
MME = {**ROW, "id": "question_id", "group": "question_id", "category": "category"}
MME_DIR = Source(near("MME_Benchmark_release_version"), dict(MME, stem="stem"), "test", strict=True)
PROBLEMS = Source(near("problems.json"), dict(
    id="_key", options="choices", answer=lambda r: LETTERS[r["answer"]], split="?split"))
FOUR = dict(options=lambda r: [str(r[f"choice_{c}"]) for c in "abcd"], data_type="data_type",
            answer="answer")
SEED = dict(id="question_id", category="question_type_id", **FOUR)
MMSTAR = {**ROW, "id": "index", "options": mmstar_options, "category": "l2_category",
          "area": "category"}
MMT = {**ROW, "id": "index", "options": options, "answer": "?answer",
       "category": lambda r: r.get("l2-category", r.get("category"))}
MMMU = dict(id="id", question="question", options=lambda r: literal(r["options"]),
            image=mmmu_images, question_type="question_type", answer=lambda r: literal(r["answer"]),
            category=lambda r: subject(r["id"]))
MMMU_FILES = "data/{split}-*.parquet */{split}-*.parquet {split}-*.parquet"

BENCHMARKS = {
    # ---------------------------------------------------------------- R1: VQA accuracy
    "vqav2": Benchmark((
        Source(near("v2_OpenEnded_mscoco_val2014_questions.json"), COCO, "val",
               Source(near("v2_mscoco_val2014_annotations.json"), COCO_LABELS)),
        Source(near("llava_vqav2_mscoco_test-dev2015.jsonl"), LLAVA, "test-dev"),
        parquet(RAW, "validation"), parquet(RAW, "testdev")),
        score="vqav2", max_new=16, suffix=SHORT, submission="vqav2",
        sizes=(214354, 107394, 447793)),
    "okvqa": Benchmark((
        Source(near("OpenEnded_mscoco_val2014_questions.json"), COCO, "val",
               Source(near("mscoco_val2014_annotations.json"), COCO_LABELS)),
        parquet(RAW, "val2014")),
        score="vqa", max_new=1024, sizes=(5046,),
        suffix=lambda r, style: UNANSWERABLE + SHORT if style == "lmms" else SHORT),
    "textvqa": Benchmark((  # a question_id is its image's: it may repeat
        Source(near("llava_textvqa_val_v051_ocr.jsonl"), dict(LLAVA, image_id="question_id"), "val",
               Source(near("TextVQA_0.5.1_val.json"), dict(
                   image_id="image_id", question="question", answer="answers")),
               join=("image_id", "question")),
        Source(near("TextVQA_0.5.1_val.json"), {**RAW, "image": "{image_id}.jpg"}, "val"),
        parquet(TEXTVQA, "validation"), parquet(TEXTVQA, "test")),
        score="vqa", max_new=1024, suffix=SHORT, submission="textvqa", sizes=(5000, 5734),
        repeats=True, body=lambda r, style: r["question"].capitalize() + ocr_line(r)),
    "vizwiz": Benchmark((
        Source(near("llava_test.jsonl"), LLAVA, "test"),
        Source(near("val.json"), {**RAW, "id": "image"}, "val"),
        Source(near("test.json"), {**RAW, "id": "image"}, "test"),
        parquet(VIZWIZ, "val"), parquet(VIZWIZ, "test")),
        score="vqa", max_new=1024, suffix=UNANSWERABLE + SHORT, submission="vizwiz",
        sizes=(4319, 8000), body=lambda r, style: r["question"].capitalize()),
    # ---------------------------------------------------------------- R2: exact match
    "gqa": Benchmark((
        Source(near("llava_gqa_testdev_balanced.jsonl"), LLAVA, "testdev",
               Source(near("testdev_balanced_questions.json"), dict(id="_key", answer="answer"))),
        Source(near("testdev_balanced_questions.json"), dict(
            id="_key", question="question", image="{imageId}.jpg", answer="answer"), "testdev"),
        parquet(dict(id="id", image_id="imageId", question="question", answer="answer"), "testdev",
                "testdev_balanced_instructions", join=("image_id",), labels=parquet(
                    dict(image_id="id", image="image"), "testdev", "testdev_balanced_images"))),
        score="exact", max_new=16, suffix=SHORT, submission="gqa", sizes=(12578,)),
    "own": Benchmark((
        Source("questions.jsonl", dict(
            id=lambda r: r.get("question_id", r["_n"] + 1), prompt="text", image="?image",
            answer="?answer", category="?category", options="?options")),),
        score="exact", summary="own"),
    # ---------------------------------------------------------------- R3, R4: yes or no
    "pope": Benchmark((
        Source(near("llava_pope_test.jsonl"), LLAVA, "test",
               Source(near("coco_pope_*.json"), POPE, strict=True, shards=True),
               join=("category", "image", "question")),
        Source(near("coco_pope_*.json"), {
            **POPE, "id": lambda r: f"{pope_category(r)}/{r['question_id']}"}, "test", shards=True),
        parquet({**ROW, "id": "{category}/{question_id}", "category": "category"}, "test")),
        score="pope", headline="f1", max_new=128, suffix=SHORT, summary="pope", sizes=(9000, 8910)),
    "mme": Benchmark((
        Source(near("llava_mme.jsonl"), {
            **LLAVA, "group": "question_id", "stem": lambda r: Path(r["question_id"]).stem,
            "category": lambda r: r["question_id"].split("/")[0]}, "test",
            MME_DIR, join=("category", "stem", "question")),
        MME_DIR, parquet(MME, "test")),
        score="mme", headline="perception", max_new=16, suffix=SHORT, summary="mme", sizes=(2374,),
        repeats=True, body=lambda r, style: r["question"].strip().replace(YES_OR_NO, "")),
    # ---------------------------------------------------------------- R5, R6, R7, R11: choices
    "mmbench_en": mmbench("en"),
    "mmbench_cn": mmbench("cn"),
    "sqa": Benchmark((
        Source(near("llava_test_CQM-A.json"), dict(
            id="id", image="?image",
            text=lambda r: r["conversations"][0]["value"].replace("<image>", "").strip()), "test",
            PROBLEMS),
        parquet({**ROW, "options": "choices", "answer": lambda r: LETTERS[r["answer"]],
                 "hint": "?hint"}, "test", "ScienceQA-IMG")),
        score="choice", headline="image", max_new=16, suffix=LETTER, body=ask_sqa, summary="sqa",
        sizes=(2017, 4241)),
    "seed": Benchmark((
        Source(near("llava-seed-bench.jsonl"), LLAVA, "test",
               Source(near("SEED-Bench.json"), SEED)),
        parquet({**ROW, **SEED, "category": "?question_type_id"}, "test")),
        score="choice", max_new=1024, suffix=LETTER, body=ask_options, submission="seed",
        sizes=(14233,), keep=lambda r: r["data_type"] == "image"),
    "mmstar": Benchmark((
        Source(near("MMStar*.tsv"), MMSTAR, "val"), parquet(MMSTAR, "val")),
        score="choice", headline="average", max_new=1024, suffix=LETTER[:-1], body=ask_mmstar,
        summary="mmstar", sizes=(1500,)),
    "ai2d": Benchmark((parquet({
        **ROW, "options": "options", "answer": lambda r: LETTERS[int(r["answer"])]}, "test"),),
        score="choice", max_new=16, suffix=LETTER, body=ask_options, sizes=(3088,)),
    "mmt": Benchmark((
        Source(near("MMT-Bench_VAL.tsv"), MMT, "val"), parquet(MMT, "val"), parquet(MMT, "test")),
        score="choice", max_new=8, submission="mmt", sizes=(3127, 28198),
        suffix="\nAnswer the question using a single character from the given options.",
        body=lambda r, style: f"Question: <image>\n{r['question'].strip()}" + listing(r, ": ")),
    "mmmu": Benchmark((
        Source(near("anns_for_eval.json"), dict(
            id="id", prompt="prompt", image="?image", question_type="question_type",
            options=lambda r: list((r.get("index2ans") or {}).values()),
            category=lambda r: subject(r["id"])), "val",
            Source(near("answer_dict_val.json"), dict(id="_key", answer="ground_truth"))),
        Source(MMMU_FILES, MMMU, "validation", shards=True),
        Source(MMMU_FILES, MMMU, "test", shards=True)),
        score="mmmu", max_new=128, submission="mmmu", sizes=(900, 10500),
        suffix=lambda r, style: LETTER if r["question_type"] == "multiple-choice" else SHORT,
        body=lambda r, style: ask_options(r, style) + "\n"),
    "realworldqa": Benchmark(
        (parquet(ROW, "test"),), score="realworldqa", max_new=16, sizes=(765,)),
    # ---------------------------------------------------------------- R8, R9: text in images
    "ocrbench": Benchmark((
        Source(near("OCRBench.json"), dict(
            id="id", question="question", image="image_path", answer="answers",
            dataset="dataset_name", category="type"), "test"),
        parquet({**ROW, "dataset": "dataset", "category": "question_type"}, "test")),
        score="ocrbench", headline="hits", max_new=128, summary="ocrbench", sizes=(1000,)),
    "docvqa": Benchmark((
        Source(near("val_v1.0*.json"), DOCVQA, "val"),
        Source(near("test_v1.0*.json"), DOCVQA, "test"),
        parquet(DOCVQA, "validation", "DocVQA"), parquet(DOCVQA, "test", "DocVQA")),
        score="anls", headline="anls", max_new=32, suffix=SHORT, submission="docvqa",
        sizes=(5349, 5188)),
    # ---------------------------------------------------------------- R10: CIDEr
    "refcoco": refcoco(8811, 5000, 1975, 1810),
    "refcoco+": refcoco(),
    "refcocog": refcoco(7573),
    # ---------------------------------------------------------------- scored elsewhere, by GPT-4
    "mmvet": Benchmark((
        Source(near("llava-mm-vet.jsonl"), LLAVA, "test"),
        parquet(dict(id="question_id", question="question", image="image"), "test")),
        score="none", max_new=1024, submission="mmvet", sizes=(218,),
        body=lambda r, style: REASON + r["question"] if style == "lmms" else r["question"]),
}
