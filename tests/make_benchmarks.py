"""Small synthetic files of every benchmark, with the names, columns and layouts of the released ones of both families.

Each function writes a benchmark into a folder and returns a Case: the prompts that must be asked,
to the character and in order, answers to give, and the scores that these must get, worked out by
hand. Only parquet needs pyarrow.
"""
import base64
import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANS = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


@dataclass
class Case:
    bench: str
    prompts: list[str]
    answers: list[str]
    expect: dict                                # metrics
    ids: list | None = None                     # None: 1, 2, …
    flags: list = field(default_factory=list)   # more flags for evaluate.py
    submission: object = None                   # what the submission file must hold


def jpeg(n: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20 + n % 3, 16), (40 * n % 256, 90, 200)).save(out, "JPEG")
    return out.getvalue()


def picture(path: Path, n: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(n))


def jsonl(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def whole(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def tsv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, list(rows[0]), delimiter="\t")
        out.writeheader()
        out.writerows(rows)


def b64(n: int, padding: int = 0) -> str:
    return base64.b64encode(jpeg(n) + bytes(padding)).decode()


def cell(n: int = 0) -> dict:
    return {"bytes": jpeg(n), "path": f"{n}.jpg"}


def parquet(path: Path, rows: list[dict]) -> None:
    """Write row groups of two rows: a released file has several groups too."""
    import pyarrow
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def ten(*counts: tuple[str, int]) -> list[str]:
    """("down", 4), ("up", 6) → ten answers."""
    answers = []
    for answer, n in counts:
        answers += [answer] * n
    return answers


# ---------------------------------------------------------------------------- LLaVA and the authors
def vqav2(root: Path) -> Case:
    rows = [(262148000, 262148, "Where is he looking?", ten(("down", 4), ("up", 6))),
            (262148001, 262148, "How many?", ten(("2", 2), ("many", 8)))]
    whole(root / "v2_OpenEnded_mscoco_val2014_questions.json",
          {"info": {}, "questions": [{"question_id": q, "image_id": i, "question": t}
                                     for q, i, t, _ in rows]})
    whole(root / "v2_mscoco_val2014_annotations.json", {"annotations": [
        {"question_id": q, "image_id": i, "question_type": "none", "answer_type": "other",
         "multiple_choice_answer": a[0],
         "answers": [{"answer": x, "answer_confidence": "yes", "answer_id": n + 1}
                     for n, x in enumerate(a)]}
        for q, i, _, a in rows]})
    picture(root / "images/COCO_val2014_000000262148.jpg")
    return Case("vqav2", ["Where is he looking?" + SHORT, "How many?" + SHORT], ["Down.", "two"],
                {"accuracy": (100 + 60) / 2}, [262148000, 262148001])


def vqav2_test(root: Path) -> Case:
    picture(root / "images/COCO_test2015_000000000001.jpg")
    rows = [{"question_id": n, "image": "COCO_test2015_000000000001.jpg", "text": f"Q{n}?{SHORT}",
             "category": "default"}
            for n in (1, 2, 3)]
    jsonl(root / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[:2])
    jsonl(root / "llava_vqav2_mscoco_test2015.jsonl", rows)
    return Case("vqav2", [f"Q1?{SHORT}", f"Q2?{SHORT}"], ["The dog, two", "dont"], {}, submission=[
        {"question_id": 1, "answer": "dog 2"}, {"question_id": 2, "answer": "don't"},
        {"question_id": 3, "answer": ""}])


def okvqa(root: Path) -> Case:
    whole(root / "OpenEnded_mscoco_val2014_questions.json",
          {"questions": [{"image_id": 7, "question": "What sport?", "question_id": 75}]})
    whole(root / "mscoco_val2014_annotations.json", {"annotations": [
        {"image_id": 7, "question_id": 75, "question_type": "one", "confidence": 3,
         "answer_type": "other", "answers": [{"answer_id": n, "raw_answer": "surfing",
                                              "answer": "surf", "answer_confidence": "yes"}
                     for n in range(10)]}]})
    picture(root / "images/COCO_val2014_000000000007.jpg")
    return Case("okvqa", ["What sport?" + SHORT], ["surf"], {"accuracy": 100.0}, [75])


def gqa(root: Path) -> Case:
    asked = {"201307251": ("Is it red?", "no", "n1"), "201307252": ("Who is it?", "girl", "n2"),
             "201307253": ("What is it?", "cell phone", "n1")}
    jsonl(root / "llava_gqa_testdev_balanced.jsonl", [
        {"question_id": q, "image": f"{i}.jpg", "text": t + SHORT, "category": "default"}
        for q, (t, _, i) in asked.items()])
    whole(root / "data/testdev_balanced_questions.json", {
        q: {"question": t, "answer": a, "imageId": i, "isBalanced": True}
        for q, (t, a, i) in asked.items()})
    for n in (1, 2):
        picture(root / f"images/n{n}.jpg", n)
    return Case("gqa", [t + SHORT for t, _, _ in asked.values()], ["No.", "woman", "Cell phone"],
                {"accuracy": 200 / 3}, list(asked), flags=["--labels", root / "data"], submission=[
                    {"questionId": "201307251", "prediction": "no"},
                    {"questionId": "201307252", "prediction": "woman"},
                    {"questionId": "201307253", "prediction": "cell phone"}])


def gqa_raw(root: Path) -> Case:
    case = gqa(root)
    (root / "llava_gqa_testdev_balanced.jsonl").unlink()
    (root / "data/testdev_balanced_questions.json").rename(root / "testdev_balanced_questions.json")
    return Case("gqa", case.prompts, case.answers, case.expect, case.ids)


def textvqa(root: Path, ocr: bool | None = None) -> Case:
    """A question_id is its image's, and two questions share one."""
    asked = [("003a8ae2ef43b901", "what is the brand?", "nous, NOUS", "nous", 34602),
             ("003a8ae2ef43b901", "what year is it?", "nous", "1999", 34603),
             ("00c359f294f7dcd9", "who wrote this?", "", "poe", 34604)]
    jsonl(root / "llava_textvqa_val_v051_ocr.jsonl", [
        {"question_id": i, "image": f"{i}.jpg", "text": f"{q}\nReference OCR token: {o}{SHORT}",
         "category": "default"}
        for i, q, o, _, _ in asked])
    whole(root / "TextVQA_0.5.1_val.json", {"data": [
        {"image_id": i, "question": q.capitalize(), "question_id": n, "answers": [a] * 10}
        for i, q, _, a, n in asked]})
    for n, i in enumerate(dict.fromkeys(a[0] for a in asked)):
        picture(root / f"images/{i}.jpg", n)
    prompts = [q + ("" if ocr is False else f"\nReference OCR token: {o}") + SHORT
               for _, q, o, _, _ in asked]
    return Case("textvqa", prompts, ["Nous", "1999", "king"], {"accuracy": 200 / 3},
                [i for i, *_ in asked],
                [] if ocr is None else ["--ocr" if ocr else "--no-ocr"])


def textvqa_no_ocr(root: Path) -> Case:
    return textvqa(root, ocr=False)


def textvqa_json(root: Path) -> Case:
    case = textvqa(root)
    (root / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    return Case("textvqa", [q + SHORT
                            for q in ("What is the brand?", "What year is it?", "Who wrote this?")],
                case.answers, case.expect, [34602, 34603, 34604])


def vizwiz(root: Path) -> Case:
    rows = [("VizWiz_val_00000000.jpg", "Ok. There is another picture I hope it is a better one.",
             ten(("unanswerable", 7), ("cannot repair this computer", 3))),
            ("VizWiz_val_00000001.jpg", "What is THIS?", ten(("basil", 9), ("basil leaves", 1)))]
    whole(root / "val.json", [{"image": i, "question": q, "answerable": 1, "answer_type": "other",
                               "answers": [
        {"answer_confidence": "yes", "answer": x} for x in a]} for i, q, a in rows])
    for i, *_ in rows:
        picture(root / "images" / i)
    return Case("vizwiz", ["Ok. there is another picture i hope it is a better one." + UNANS
                           + SHORT,
                           "What is this?" + UNANS + SHORT], ["Unanswerable", "basil leaves"],
                {"accuracy": (100 + 30) / 2}, [i for i, *_ in rows], submission=[
                    {"image": "VizWiz_val_00000000.jpg", "answer": "unanswerable"},
                    {"image": "VizWiz_val_00000001.jpg", "answer": "basil leaves"}])


def vizwiz_test(root: Path) -> Case:
    text = "What is this?" + UNANS + SHORT
    jsonl(root / "llava_test.jsonl",
          [{"question_id": n, "image": f"VizWiz_test_0000000{n}.jpg", "text": text,
                                       "category": "default"} for n in (0, 1)])
    for n in (0, 1):
        picture(root / f"images/VizWiz_test_0000000{n}.jpg")
    return Case("vizwiz", [text] * 2, ["A dog.", "Two cats"], {}, [0, 1], submission=[
        {"image": "VizWiz_test_00000000.jpg", "answer": "dog"},
        {"image": "VizWiz_test_00000001.jpg", "answer": "2 cats"}])


def sqa(root: Path) -> Case:
    """Three problems of the test split, one without an image, and a problem of another split."""
    one = "<image>\nWhich is it?\nContext: A map.\nA. Maine\nB. Ohio" + LETTER
    whole(root / "llava_test_CQM-A.json", [
        {"id": "4", "image": "4/image.png", "conversations": [{"from": "human", "value": one},
                                                              {"from": "gpt", "value": "The answer is B."}]},
        {"id": "5", "conversations": [{"from": "human",
                                       "value": "Solid?\nA. no\nB. yes\nC. both" + LETTER},
                                      {"from": "gpt", "value": "The answer is A."}]},
        {"id": "11", "image": "11/image.png", "conversations": [{"from": "human", "value": one},
                                                                {"from": "gpt", "value": "The answer is A."}]}])
    whole(root / "problems.json",
          {i: {"question": "?", "choices": c, "answer": a, "hint": "", "split": s}
                                   for i, c, a, s in [("4", ["Maine", "Ohio"], 1, "test"),
                                                      ("9", ["x", "y"], 0, "train"),
                                                      ("5", ["no", "yes", "both"], 0, "test"),
                                                      ("11", ["Maine", "Ohio"], 0, "test")]})
    whole(root / "pid_splits.json", {"test": ["4", "5", "11"], "train": ["9"]})
    for i in ("4", "11"):
        picture(root / f"images/{i}/image.png")
    asked = one.removeprefix("<image>\n")
    return Case("sqa", [asked, "Solid?\nA. no\nB. yes\nC. both" + LETTER, asked],
                ["Ohio", "C", "B. Ohio"],
                {"image": 50.0, "all": 100 / 3, "n_image": 2}, ["4", "5", "11"])


def docvqa(root: Path) -> Case:
    whole(root / "val_v1.0.json", {"dataset_name": "SP-DocVQA", "data": [
        {"questionId": 49153, "question": "What is the date?", "image": "documents/x_1.png",
         "docId": 14465, "answers": ["1/8/93", "Jan 8"]},
        {"questionId": 49154, "question": "Who?", "image": "documents/x_1.png", "docId": 14465,
         "answers": ["abcd"]}]})
    picture(root / "images/documents/x_1.png")
    return Case("docvqa", ["What is the date?" + SHORT, "Who?" + SHORT], ["1/8/93", "abxx"],
                {"anls": 100 * (1 + .5) / 2}, [49153, 49154], submission=[
                    {"questionId": 49153, "answer": "1/8/93"},
                    {"questionId": 49154, "answer": "abxx"}])


def docvqa_test(root: Path) -> Case:
    whole(root / "test_v1.0.json",
          {"data": [{"questionId": 57344, "question": "Who?", "image": "documents/y.png"}]})
    picture(root / "images/documents/y.png")
    return Case("docvqa", ["Who?" + SHORT], ["Paul"], {}, [57344],
                submission=[{"questionId": 57344, "answer": "Paul"}])


def pope(root: Path) -> Case:
    """Two questions a category about one image; adversarial
    in another order than its labels. Right: 2, 1, 0."""
    words = {"adversarial": [("snowboard", "yes"), ("car", "no")],
             "random": [("dog", "yes"), ("cat", "no")], "popular": [("cup", "yes"), ("tie", "no")]}
    rows, first = [], {"adversarial": 0, "random": 10 ** 7, "popular": 2 * 10 ** 7}
    for name, pairs in words.items():
        labels = [{"question_id": n + 1, "image": "COCO_val2014_000000310196.jpg",
                   "text": f"Is there a {w} in the image?",
                   "label": a} for n, (w, a) in enumerate(pairs)]
        jsonl(root / f"coco/coco_pope_{name}.json", labels)
        for line in reversed(labels) if name == "adversarial" else labels:
            rows.append({"question_id": first[name] + line["question_id"], "image": line["image"],
                         "category": name, "text": line["text"] + SHORT})
    jsonl(root / "llava_pope_test.jsonl", rows)
    picture(root / "images/COCO_val2014_000000310196.jpg")
    # adversarial: car no, snowboard yes: F1 1. random: yes yes: P 1/2, R 1, F1 2/3. popular: no yes: 0.
    return Case("pope", [r["text"] for r in rows],
                ["No, there is not", "Yes", "Yes.", "Nope", "no", "NO"],
                {"f1": 100 * (1 + 2 / 3) / 3,
                 "category": {"random": {"acc": 50.0, "yes_ratio": 100.0, "n": 2}},
                 "pooled": {"acc": 50.0, "f1": 100 * 4 / 7}},
                [r["question_id"] for r in rows])


def pope_raw(root: Path) -> Case:
    case = pope(root)
    rows = [json.loads(x) for x in (root / "llava_pope_test.jsonl").read_text().splitlines()]
    (root / "llava_pope_test.jsonl").unlink()
    # that of the label files, sorted by name
    order = [1, 0, 4, 5, 2, 3]
    return Case("pope", [case.prompts[i] for i in order], [case.answers[i] for i in order],
                case.expect,
                [f"{rows[i]['category']}/{rows[i]['question_id'] % 10 ** 7}" for i in order])


def mme(root: Path) -> Case:
    """Both layouts of a category, and a question with two
    spaces before "Please". Right of each two: 2, 1, 0."""
    release = root / "MME_Benchmark_release_version"
    (release / "code_reasoning").mkdir(parents=True)
    (release / "code_reasoning/0020.txt").write_text("Is it Hello?  Please answer yes or no.\tYes\n"
                                                     "Is it World? Please answer yes or no.\tNo\n")
    picture(release / "code_reasoning/0020.png")
    (release / "landmark/questions_answers_YN").mkdir(parents=True)
    for n in (1, 2):
        (release / f"landmark/questions_answers_YN/{n}.txt").write_text(
            f"Is this {n} Rome? Please answer yes or no.\tYes\nIs this {n} Bonn? Please answer "
            "yes or no.\tNo\n")
        picture(release / f"landmark/images/{n}.jpg", n)
    asked = [("code_reasoning/0020.png", "Is it World?"),
             ("code_reasoning/0020.png", "Is it Hello?"),
             ("landmark/1.jpg", "Is this 1 Rome?"), ("landmark/1.jpg", "Is this 1 Bonn?"),
             ("landmark/2.jpg", "Is this 2 Rome?"), ("landmark/2.jpg", "Is this 2 Bonn?")]
    jsonl(root / "llava_mme.jsonl",
          [{"question_id": i, "image": i, "text": q + SHORT, "category": "default"}
                                     for i, q in asked])
    return Case("mme", [q + SHORT for _, q in asked], ["No", "yes.", "Yes", "Unsure", "not", "Yes"],
                {"cognition": 200.0, "perception": 25.0,
                 "category": {"code_reasoning": 200.0, "landmark": 25.0}},
                [i for i, _ in asked])


def mme_folder(root: Path) -> Case:
    mme(root)
    (root / "llava_mme.jsonl").unlink()
    asked = [("code_reasoning/0020.png", "Is it Hello? "),
             ("code_reasoning/0020.png", "Is it World?"),
             ("landmark/1.jpg", "Is this 1 Rome?"), ("landmark/1.jpg", "Is this 1 Bonn?"),
             ("landmark/2.jpg", "Is this 2 Rome?"), ("landmark/2.jpg", "Is this 2 Bonn?")]
    return Case("mme", [q + SHORT for _, q in asked], ["yes", "no", "Yes", "Unsure", "not", "Yes"],
                {"cognition": 200.0, "perception": 25.0}, [i for i, _ in asked])


MILLION = 10 ** 6
# index, question, hint, options, answer, image: that of question 1's rotations is in row 1
BENCH = [
    (1, "Which?", "nan", ["cat", "dog", "cow"], "A", b64(1, 120000)),
    (1 + MILLION, "Which?", "nan", ["dog", "cow", "cat"], "C", "1"),
    (1 + 2 * MILLION, "Which?", "", ["cow", "cat", "dog"], "B", "1"),
    (7, "Is it?", "Look closely.", ["yes", "no"], "B", b64(2)),
    (7 + MILLION, "Is it?", "Look closely.", ["no", "yes"], "A", b64(2))]


def bench_rows(answers: bool = True, split: str = "dev") -> list[dict]:
    return [{"index": i, "question": q, "hint": h, **dict(zip("ABCD", o + ["nan", ""])),
             "category": "object", **({"answer": a} if answers else {}), "image": image,
             "source": "s", "comment": "", "split": split, "l2-category": "coarse" if i % MILLION == 1 else "fine"}
            for i, q, h, o, a, image in BENCH]


BENCH_PROMPTS = ["Which?\nA. cat\nB. dog\nC. cow" + LETTER,
                 "Which?\nA. dog\nB. cow\nC. cat" + LETTER,
                 "Which?\nA. cow\nB. cat\nC. dog" + LETTER,
                 "Look closely.\nIs it?\nA. yes\nB. no" + LETTER,
                 "Look closely.\nIs it?\nA. no\nB. yes" + LETTER]
BENCH_IDS = [index for index, *_ in BENCH]


def mmbench_en(root: Path) -> Case:
    """Question 1 is right in all three rotations, question 7 in one of two."""
    tsv(root / "mmbench_dev_20230712.tsv", bench_rows())
    return Case("mmbench_en", BENCH_PROMPTS, ["A", "C. cat", "B", "B", "B"],
                {"circular": 50.0, "vanilla": 100.0, "groups": 2,
                 "category": {"coarse": 100.0, "fine": 0.0}},
                BENCH_IDS)


def mmbench_cn(root: Path) -> Case:
    tsv(root / "mmbench_dev_cn_20231003.tsv", bench_rows())
    prompts = [p.replace(LETTER, "\n请直接回答选项字母。") for p in BENCH_PROMPTS]
    return Case("mmbench_cn", prompts, ["A", "C", "A", "B", "A"],
                {"circular": 50.0, "vanilla": 100.0}, BENCH_IDS)


def mmbench_test(root: Path) -> Case:
    tsv(root / "mmbench_test_20230712.tsv", bench_rows(False, "test"))
    return Case("mmbench_en", BENCH_PROMPTS, ["A", "C. cat", "B", "B", "B"], {}, BENCH_IDS,
                ["--split", "test"])


def seed(root: Path) -> Case:
    """Two questions about images, and one about a video, which is left out."""
    options = {f"choice_{c}": w for c, w in zip("abcd", ("One", "Two", "Three", "Four"))}
    text = "How many?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER
    whole(root / "SEED-Bench.json",
          {"question_type": {"Instances Counting": 5, "Action": 10}, "questions": [
        {"question_id": q, "question": "How many?", **options, "answer": "B", "data_type": t,
         "question_type_id": n, "data_id": "x"}
         for q, t, n in [("101669", "image", 5), ("101670", "image", 5), ("v1", "video", 10)]]})
    jsonl(root / "llava-seed-bench.jsonl", [
        {"question_id": q, "image": f"SEED-Bench-image/{q}", "text": text, "category": "default"}
        for q in (101669, 101670, "v1")])
    for q in (101669, 101670):
        picture(root / f"images/SEED-Bench-image/{q}")
    return Case("seed", [text, text], ["B", "Three"], {"accuracy": 50.0, "category": {"5": 50.0}},
                ["101669", "101670"], submission=[{"question_id": "101669", "prediction": "B"},
                            {"question_id": "101670", "prediction": "Three"}])


def star_rows(image) -> list[dict]:
    return [{"index": n, "question": f"Which {n}?\nOptions: A: a cat, B: a dog, C: no, "
                                     "nothing, D: all",
             "image": image(n),
             "answer": a, "category": area, "l2_category": kind, "bench": "x"}
            for n, a, area, kind in [(0, "A", "math", "geometry"), (1, "B", "math", "geometry"),
                                     (2, "C", "math", "statistical reasoning"),
                                     (3, "D", "logical reasoning", "code")]]


STAR = [f"Which {n}?\nOptions: A: a cat, B: a dog, C: no, nothing, D: all" + LETTER[:-1]
        for n in range(4)]


def mmstar(root: Path) -> Case:
    """geometry 1 of 2, statistical 1 of 1, code 0 of 1:
    average of three 50, of areas 75 and 0, of questions 50."""
    tsv(root / "MMStar.tsv", star_rows(lambda n: b64(n)))
    return Case("mmstar", STAR, ["A", "A", "no, nothing", "none"],
                {"average": 50.0, "accuracy": 50.0, "category": {"math": 75.0, "logical reasoning": 0.0}}, [0, 1, 2, 3])


def mmmu(root: Path) -> Case:
    """TinyLLaVA's file: prompts are ready to be asked; a question with several images has no image."""
    rows = [("validation_Art_1", "multiple-choice", "Who?\nA. Klee\nB. Miro\n\nAnswer",
             {"A": "Klee", "B": "Miro"}),
            ("validation_Math_2", "open", "How much?\n\nAnswer", None),
            ("validation_Math_3", "multiple-choice", "Which?\nA. 1\nB. 2\n\nAnswer", {"A": "1", "B": "2"})]
    whole(root / "anns_for_eval.json", [
        {"id": i, "question_type": k, "prompt": p,
         **({"image": f"{i}.png"} if i != "validation_Math_3" else {}),
         **({"index2ans": o, "all_choices": list(o)} if o else {})} for i, k, p, o in rows])
    whole(root / "answer_dict_val.json",
          {i: {"question_type": k, "ground_truth": a} for (i, k, *_), a in zip(
        rows, ["B", ["24/7", "3.429"], "A"])})
    for i, *_ in rows[:2]:
        picture(root / f"images/{i}.png")
    return Case("mmmu", [p for *_, p, _ in rows], ["B", "It is 3.43", "I do not know"],
                {"accuracy": 200 / 3, "category": {"Art": 100.0, "Math": 50.0}},
                [i for i, *_ in rows], submission={"validation_Art_1": "B",
                                                   "validation_Math_2": "It is 3.43",
                            "validation_Math_3": "I do not know"})


def mmt_rows(image) -> list[dict]:
    return [{"index": 5, "question": " What is it? ", "A": "cat", "B": "dog", "C": "", "D": "late",
             "E": "", "F": "", "G": "",
             "H": "", "I": "", "answer": "B", "image": image(0), "category": "animals",
             "l2-category": "recognition", "split": "VAL"},
            {"index": 6, "question": "Where?", **{c: f"at {n}" for n, c in enumerate("ABCDEFGHI")},
             "answer": "I", "image": image(1), "category": "places", "l2-category": "localization",
             "split": "VAL"}]


ONE = "\nAnswer the question using a single character from the given options."
MMT = ["Question: <image>\nWhat is it?\nA: cat\nB: dog" + ONE,
       "Question: <image>\nWhere?" + "".join(f"\n{c}: at {n}" for n, c in enumerate("ABCDEFGHI"))
       + ONE]


def mmt(root: Path) -> Case:
    tsv(root / "MMT-Bench_VAL.tsv", mmt_rows(lambda n: b64(n)))
    return Case("mmt", MMT, ["B", "H"],
                {"accuracy": 50.0, "category": {"recognition": 100.0, "localization": 0.0}},
                [5, 6],
                submission={"5": "B", "6": "H"})


def ocrbench(root: Path) -> Case:
    rows = [("IIIT5K", 0, "what is written?", ["CENTRE"], "Regular Text Recognition"),
            ("HME100k", 1, "Write the formula.", "x ^ 2", "Handwritten Mathematical Expression Recognition"),
            ("HME100k", 2, "Write the formula.", ["X"], "Handwritten Mathematical Expression Recognition")]
    whole(root / "OCRBench.json",
          [{"dataset_name": d, "id": i, "image_path": f"IIIT5K/{i}.png", "question": q,
                                    "answers": a,
                                    "type": t} for d, i, q, a, t in rows])
    for _, i, *_ in rows:
        picture(root / f"images/IIIT5K/{i}.png")
    return Case("ocrbench", [r[2] for r in rows], ["The word is Centre", "x^2", "x"],
                {"hits": 2, "recognition": 1,
                 "category": {"Handwritten Mathematical Expression Recognition": 1}},
                [0, 1, 2])


def mmvet(root: Path) -> Case:
    jsonl(root / "llava-mm-vet.jsonl",
          [{"question_id": n, "image": f"v1_{n}.png", "text": "What is x?",
                                         "category": "default"} for n in (0, 1)])
    for n in (0, 1):
        picture(root / f"images/v1_{n}.png")
    return Case("mmvet", ["What is x?"] * 2, ["x is 1", "No."], {}, [0, 1],
                submission={"v1_0": "x is 1", "v1_1": "No."})


def own(root: Path) -> Case:
    jsonl(root / "questions.jsonl", [{"text": "Say a.", "answer": "a", "image": "1.png"},
                                     {"question_id": "b", "text": "Pick.", "answer": ["B", "C"],
                                      "category": "pick"}])
    picture(root / "images/1.png")
    return Case("own", ["Say a.", "Pick."], ["an A, a", "c"], {"accuracy": 100.0}, [1, "b"],
                ["--metric", "contains"])


# ----------------------------------------------------------------------------------------- lmms-lab
def vqav2_lmms(root: Path) -> Case:
    parquet(root / "data/validation-00000-of-00001.parquet", [
        {"question_id": 262148000 + n, "image_id": 262148, "question": "Where?", "image": cell(),
         "question_type": "none",
         "answers": [{"answer": "left,right", "answer_confidence": "yes", "answer_id": k}
                     for k in range(10)],
         "answer_type": "other", "multiple_choice_answer": "x"} for n in range(3)])
    return Case("vqav2", ["Where?" + SHORT] * 3, ["left right", "leftright", "Left, right"],
                {"accuracy": 200 / 3},
                [262148000, 262148001, 262148002])


def okvqa_lmms(root: Path) -> Case:
    parquet(root / "data/val2014-00000-of-00001.parquet", [
        {"question_id": "2971475", "image": cell(), "question": "What sport?",
         "answers": ten(("surf", 3), ("x", 7)), "question_type": "one", "answer_type": "other"}])
    return Case("okvqa", ["What sport?" + UNANS + SHORT], ["surf"], {"accuracy": 90.0}, ["2971475"])


def gqa_lmms(root: Path) -> Case:
    parquet(root / "testdev_balanced_instructions/testdev-00000-of-00001.parquet", [
        {"id": f"20{n}", "imageId": f"n{n % 2}", "question": "Is it?", "answer": "yes",
         "fullAnswer": "Yes."}
        for n in range(3)])
    parquet(root / "testdev_balanced_images/testdev-00000-of-00001.parquet",
            [{"id": f"n{n}", "image": cell(n)} for n in (1, 0)])
    return Case("gqa", ["Is it?" + SHORT] * 3, ["Yes", "yes.", "no"], {"accuracy": 200 / 3},
                ["200", "201", "202"])


def textvqa_lmms(root: Path, ocr: bool = False) -> Case:
    parquet(root / "data/validation-00000-of-00001.parquet", [
        {"image_id": "a", "question_id": n, "question": "WHO is Bob?", "image": cell(),
         "answers": ["bob"] * 10, "ocr_tokens": ["NOUS", "B"]} for n in (34602, 34603)])
    line = "\nReference OCR token: NOUS, B" if ocr else ""
    return Case("textvqa", ["Who is bob?" + line + SHORT] * 2, ["Bob", ""], {"accuracy": 50.0},
                [34602, 34603],
                ["--ocr"] if ocr else [])


def textvqa_lmms_ocr(root: Path) -> Case:
    return textvqa_lmms(root, ocr=True)


def vizwiz_lmms(root: Path) -> Case:
    parquet(root / "data/val-00000-of-00001.parquet", [
        {"question_id": "VizWiz_val_00000000", "image": cell(), "question": "What IS it?",
         "answers": ["dog"] * 10, "category": "other"}])
    return Case("vizwiz", ["What is it?" + UNANS + SHORT], ["Dog"], {"accuracy": 100.0},
                ["VizWiz_val_00000000"], submission=[{"image": "VizWiz_val_00000000.jpg",
                                                      "answer": "dog"}])


def realworldqa(root: Path) -> Case:
    ask = ["How many?\nPlease answer directly with a single word or number.",
           "Where?\nA. left\nB. right\nPlease answer directly with only the letter of the correct "
           "option and nothing else."]
    parquet(root / "data/test-00000-of-00001.parquet", [
        {"image": cell(n), "image_path": f"{n}.webp", "question": ask[n % 2],
         "answer": "2" if n % 2 == 0 else "A"}
        for n in range(4)])
    return Case("realworldqa", ask * 2, ["2.", "(A)", "two", "B"], {"accuracy": 50.0}, [0, 1, 2, 3])


def sqa_lmms(root: Path) -> Case:
    parquet(root / "ScienceQA-IMG/test-00000-of-00001.parquet", [
        {"image": cell(n), "question": "Which?", "choices": ["x", "y"], "answer": n,
         "hint": "" if n else "See.", "task": "closed choice"} for n in (0, 1)])
    return Case("sqa", ["Context: See.\nWhich?\nA. x\nB. y" + LETTER, "Which?\nA. x\nB. y" + LETTER], ["A", "A"],
                {"image": 50.0}, [0, 1])


def docvqa_lmms(root: Path) -> Case:
    parquet(root / "DocVQA/validation-00000-of-00001.parquet", [
        {"questionId": "337", "question": "Who?", "image": cell(), "docId": 279,
         "answers": ["A Name"]}])
    parquet(root / "InfographicVQA/validation-00000-of-00001.parquet",
            [{"questionId": "1", "question": "no"}])
    return Case("docvqa", ["Who?" + SHORT], ["a  name"], {"anls": 100.0}, ["337"])


def pope_lmms(root: Path) -> Case:
    rows = [(c, n, a) for c in ("adversarial", "popular", "random")
            for n, a in ((1, "yes"), (2, "no"))]
    parquet(root / "data/test-00000-of-00001.parquet", [
        {"id": str(k), "question_id": str(n), "question": "Is there a cat?", "answer": a,
         "image_source": "COCO_1", "image": cell(), "category": c}
         for k, (c, n, a) in enumerate(rows)])
    return Case("pope", ["Is there a cat?" + SHORT] * 6, ["yes", "no"] * 2 + ["no", "no"],
                {"f1": 200 / 3, "pooled": {"f1": 80.0}}, [f"{c}/{n}" for c, n, _ in rows])


def mme_lmms(root: Path) -> Case:
    parquet(root / "data/test-00000-of-00001.parquet", [
        {"question_id": "existence/1.png", "image": cell(),
         "question": f"Is it {w}? Please answer yes or no.", "answer": a,
         "category": "existence"} for w, a in (("red", "Yes"), ("blue", "No"))])
    return Case("mme", [f"Is it {w}?" + SHORT for w in ("red", "blue")], ["Yes", "No"],
                {"perception": 200.0},
                ["existence/1.png"] * 2)


def mmbench_lmms(root: Path, lang: str = "en") -> Case:
    rows = bench_rows()
    for n, r in enumerate(rows):
        r.update(image=cell(n), index=str(r["index"]), hint=r["hint"] or "nan")
        r["L2-category"] = r.pop("l2-category")
    parquet(root / lang / "dev-00000-of-00001.parquet", rows)
    none, ask = ("", LETTER) if lang == "en" else ("nan ", "\n请直接使用所提供的选项字母作为答案回答。")
    prompts = [f"{hint}{q} There are several options:"
               + "".join(f"\n{c}. {o}" for c, o in zip("ABC", options))
               + "\n" + ask
               for hint, q, options in [(none, "Which?", "cat dog cow".split()),
                                        (none, "Which?", "dog cow cat".split()),
                                        (none, "Which?", "cow cat dog".split()),
                                        ("Look closely. ", "Is it?", ["yes", "no"]),
                                        ("Look closely. ", "Is it?", ["no", "yes"])]]
    return Case("mmbench_" + lang, prompts, ["A", "C", "B", "B", "A"],
                {"circular": 100.0, "vanilla": 100.0}, BENCH_IDS)


def mmbench_cn_lmms(root: Path) -> Case:
    return mmbench_lmms(root, "cn")


def seed_lmms(root: Path) -> Case:
    parquet(root / "data/test-00000-of-00001.parquet", [
        {"question_id": q, "question": "How?", "image": [cell(k) for k in range(n)], "answer": "D",
         "data_type": t, "data_id": "x", "question_type_id": 5,
         **{f"choice_{c}": c for c in "abcd"}}
        for q, n, t in [("1", 1, "image"), ("2", 1, "image"), ("3", 8, "video")]])
    return Case("seed", ["How?\nA. a\nB. b\nC. c\nD. d" + LETTER] * 2, ["D", "(D) d"],
                {"accuracy": 100.0}, ["1", "2"])


def mmstar_lmms(root: Path) -> Case:
    parquet(root / "data/val-00000-of-00001.parquet", star_rows(cell))
    return Case("mmstar", STAR, ["A", "B", "C", "D"], {"average": 100.0}, [0, 1, 2, 3])


def ai2d(root: Path) -> Case:
    parquet(root / "data/test-00000-of-00001.parquet", [
        {"question": "Which?", "options": ["frog", "fox", "owl", "ant"], "answer": a, "image": cell()} for a in "02"])
    return Case("ai2d", ["Which?\nA. frog\nB. fox\nC. owl\nD. ant" + LETTER] * 2,
                ["A", "It is the ant."],
                {"accuracy": 50.0}, [0, 1])


def mmmu_lmms(root: Path) -> Case:
    """Lists kept as text; a question that names its second image alone, and one that names two."""
    none = {f"image_{n}": None for n in range(3, 8)}
    parquet(root / "data/validation-00000-of-00001.parquet", [
        {"id": "validation_Accounting_1", "question": "See <image 2>. How much?",
         "options": "['$6', '$7']", "answer": "B",
         "question_type": "multiple-choice", "image_1": cell(1), "image_2": cell(2), **none},
        {"id": "validation_Accounting_2", "question": "<image 1> or <image 2>?", "options": "[]",
         "image_1": cell(1), "answer": "['24/7', '3.429']", "question_type": "open",
         "image_2": cell(2), **none}])
    return Case("mmmu", ["See <image 2>. How much?\nA. $6\nB. $7\n" + LETTER,
                         "<image 1> or <image 2>?\n" + SHORT],
                ["$7", "24/7"], {"accuracy": 100.0, "category": {"Accounting": 100.0}},
                ["validation_Accounting_1", "validation_Accounting_2"])


def mmt_lmms(root: Path) -> Case:
    parquet(root / "data/val-00000-of-00001.parquet", mmt_rows(lambda n: [cell(n)]))
    return Case("mmt", MMT, ["B", "I"], {"accuracy": 100.0}, [5, 6])


def ocrbench_lmms(root: Path) -> Case:
    parquet(root / "data/test-00000-of-00001.parquet", [
        {"dataset": "IIIT5K", "question": "what?", "question_type": "Regular Text Recognition",
         "answer": ["CENTRE"], "image": cell()}])
    return Case("ocrbench", ["what?"], ["centre"], {"hits": 1, "recognition": 1}, [0])


def mmvet_lmms(root: Path) -> Case:
    parquet(root / "data/test-00000-of-00001.parquet", [
        {"question_id": "v1_0", "image": cell(), "question": "What is x?", "answer": "1",
         "capability": "ocr"}])
    return Case("mmvet", ["First please perform reasoning, and think step by step to provide best "
                          "answer to the following question: \n\nWhat is x?"], ["1"], {}, ["v1_0"],
                          submission={"v1_0": "1"})


def refcoco(root: Path, flags: tuple = ()) -> Case:
    """Two regions of one picture. Each answer equals its
    reference of four words: 10 of 10 for n = 1 to 4."""
    parquet(root / "data/val-00000-of-00001.parquet", [
        {"question_id": str(n), "image": cell(), "question": "Please carefully observe",
         "answer": [said], "segmentation": [2.0, 2.0, 9.0, 2.0 + n, 9.0, 9.0],
         "bbox": [2.0, 3.0, 8.0 + n, 6.0], "file_name": "x.jpg"}
        for n, said in enumerate(["the left red car", "a big brown dog"])])
    return Case("refcoco", ["Provide a short description for this region."] * 2,
                ["the left red car", "a big brown dog"],
                {"cider": 1000.0}, [0, 1], list(flags))


def refcoco_seg(root: Path) -> Case:
    return refcoco(root, ("--region", "seg"))


LLAVA = [vqav2, vqav2_test, okvqa, gqa, gqa_raw, textvqa, textvqa_no_ocr, textvqa_json, vizwiz,
         vizwiz_test, sqa, docvqa, docvqa_test, pope, pope_raw, mme, mme_folder, mmbench_en,
         mmbench_cn, mmbench_test, seed, mmstar, mmmu, mmt, ocrbench, mmvet, own]
LMMS = [vqav2_lmms, okvqa_lmms, gqa_lmms, textvqa_lmms, textvqa_lmms_ocr, vizwiz_lmms, realworldqa,
        sqa_lmms, docvqa_lmms, pope_lmms, mme_lmms, mmbench_lmms, mmbench_cn_lmms, seed_lmms,
        mmstar_lmms, ai2d, mmmu_lmms, mmt_lmms, ocrbench_lmms, mmvet_lmms, refcoco, refcoco_seg]
