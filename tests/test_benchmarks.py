"""evaluate.py and evaluation/: from files on a disk to numbers, and no silently wrong number."""
import json
import re
import shutil
import sys

import make_benchmarks
import pytest
import torch
from conftest import ROOT, call, launch
from make_benchmarks import LETTER, LLAVA, LMMS, MILLION, SHORT, b64, jsonl, picture, tsv, whole

import evaluate
from common.files import files_digest
from common.flags import UserError
from common.parallel import Ranks
from evaluation import answers, metrics
from evaluation.benchmarks import BENCHMARKS
from evaluation.files import group_by_image
from evaluation.files import picture as decoded
from evaluation.questions import Questions, Reading, Sample, load_benchmark
from evaluation.scores import SCORES, SUMMARIES
from evaluation.submit import SUBMISSIONS, write_xlsx
from hub.checkpoint import save_checkpoint
from hub.released import load_llm, load_vision
from model import Llava, Projector


def run(case, root, *flags, out="out"):
    images = ["--images", root / "images"] if (root / "images").is_dir() else []
    return call("evaluate.py", "--bench", case.bench, "--data", root, *images, "--out", root / out,
                *case.flags, *flags)


def answer(case, root, answers=None, name="answers.jsonl"):
    """Write a file of answers as LLaVA's scripts do."""
    ids = case.ids or range(1, len(case.prompts) + 1)
    jsonl(root / name, [{"question_id": i, "prompt": p, "text": a, "answer_id": "x",
                         "model_id": "m", "metadata": {}}
                        for i, p, a in zip(ids, case.prompts, answers or case.answers)])
    return root / name


def written(root, name, out="out"):
    """The one file of that name below root/out."""
    path, = (root / out).glob(f"**/{name}")
    return path


def result(root, out="out"):
    return json.loads(written(root, "results.json", out).read_text())


def agrees(got, want, path=""):
    for k, v in want.items():
        if isinstance(v, dict):
            agrees(got[k], v, f"{path}{k}.")
        else:
            assert got[k] == pytest.approx(v), f"{path}{k} is {got[k]}, by hand it is {v}"


def refuses(done, *says):
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for text in says:
        assert text in lines[0]


# ---------------------------------------------------------------------------------- every benchmark
@pytest.mark.parametrize("make", LLAVA + LMMS, ids=lambda f: f.__name__)
def test_each_is_asked_to_the_character_and_scored_as_by_hand(make, tmp_path):
    if make in LMMS or make is make_benchmarks.realworldqa:
        pytest.importorskip("pyarrow")
    if make is make_benchmarks.mmbench_test:               # its server takes a spreadsheet
        pytest.importorskip("openpyxl")
    case = make(tmp_path)
    done = run(case, tmp_path, "--score-only", answer(case, tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in written(tmp_path, "pred.jsonl").open()]
    assert [r["prompt"] for r in rows] == case.prompts
    assert [r["prediction"] for r in rows] == case.answers
    results = result(tmp_path)
    assert results["n"] == len(case.prompts) and results["n_missing"] == 0
    agrees(results.get("metrics", {}), case.expect)
    assert ("headline" in results) == bool(case.expect), "what is not public is not scored"
    if case.bench != "own":
        assert "n_missing 0" in done.stdout and "n_unparsed" in done.stdout
    if case.submission is not None:
        path = written(tmp_path, "submission.json*")
        lines = path.read_text().splitlines()
        sent = [json.loads(x) for x in lines] if path.suffix == ".jsonl" else json.loads(path.read_text())
        assert sent == case.submission


def test_the_table_has_all_benchmarks_and_only_scores_that_exist():
    names = ("vqav2 okvqa gqa textvqa vizwiz realworldqa sqa docvqa pope mme mmbench_en "
             "mmbench_cn seed mmstar ai2d mmmu mmt ocrbench mmvet refcoco refcoco+ refcocog own")
    assert sorted(BENCHMARKS) == sorted(names.split())
    for name, b in BENCHMARKS.items():
        assert b.score in SCORES and b.summary in SUMMARIES, name
        assert b.submission is None or b.submission in SUBMISSIONS, name


def test_unparsed_answers_and_those_found_by_an_options_text_are_counted(tmp_path):
    case = make_benchmarks.mmstar(tmp_path)
    run(case, tmp_path, "--score-only",
        answer(case, tmp_path, ["A", "maybe", "no, nothing", "(D)"]))
    results = result(tmp_path)
    assert (results["n_unparsed"], results["n_text_matched"]) == (1, 1)
    assert results["metrics"]["accuracy"] == 75.0


def test_references_that_are_no_option_are_counted(tmp_path):
    case = make_benchmarks.seed(tmp_path)
    path = tmp_path / "SEED-Bench.json"
    path.write_text(path.read_text().replace('"answer": "B"', '"answer": "E"', 1))
    done = run(case, tmp_path, "--score-only", answer(case, tmp_path))
    assert "warning: 1 references that are none of the options" in done.stdout and result(tmp_path)["n_no_option"] == 1


def test_a_missing_answer_is_wrong_even_if_an_empty_one_would_be_a_yes(tmp_path):
    case = make_benchmarks.pope(tmp_path)
    path = answer(case, tmp_path, ["No", "Yes", "yes", "no", "yes", "no"])
    shutil.rmtree(tmp_path / "images")                # scoring opens no image
    full = run(case, tmp_path, "--score-only", path)
    assert full.returncode == 0 and result(tmp_path)["headline"]["f1"] == 100.0
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    done = run(case, tmp_path, "--score-only", path, "--overwrite")
    assert "n_missing 1" in done.stdout
    agrees(result(tmp_path)["metrics"]["category"], {"random": {"acc": 50.0, "f1": 0.0}})


def four_options(root):
    """As in MMBench dev 20230712: own rows first, then their rotations. Question 9 has four options
    and three of them. Question 12 has all four, and the answer to its last is wrong."""
    rows, cell = [], b64(1)
    for rotation in range(4):
        for question, names in [(1, "cat dog cow"), (9, "up down in out"),
                                (12, "red blue pink grey")]:
            names = names.split()
            if rotation < (4 if question == 12 else 3):
                turned = names[rotation:] + names[:rotation]
                rows.append({"index": question + rotation * MILLION, "question": "Which?",
                             "hint": "", **dict(zip("ABCD", turned + [""])),
                             "answer": "ABCD"[turned.index(names[0])], "category": "object",
                             "image": cell, "source": "s", "l2-category": "fine", "comment": "",
                             "split": "dev"})
    tsv(root / "mmbench_dev_20230712.tsv", rows)
    answers = [{"question_id": r["index"], "text": r["answer"]} for r in rows]
    answers[-1]["text"] = "B" if rows[-1]["answer"] == "A" else "A"
    jsonl(root / "answers.jsonl", answers)
    return "evaluate.py", "--bench", "mmbench_en", "--data", root, "--score-only", root / "answers.jsonl", \
        "--out", root / "out"


def test_a_question_of_four_options_with_three_rotations_is_scored_by_those_that_the_file_has(tmp_path):
    done = call(*four_options(tmp_path))
    assert done.returncode == 0, done.stderr
    agrees(result(tmp_path)["metrics"],
           {"circular": 200 / 3, "vanilla": 100.0, "groups": 3, "dropped": 0})
    assert "warning: 1 questions with fewer rotations than options" in done.stdout


def test_rotations_are_counted_before_the_limit(tmp_path):
    done = call(*four_options(tmp_path), "--limit", 9)
    assert done.returncode == 0, done.stderr
    agrees(result(tmp_path)["metrics"],
           {"circular": 100.0, "vanilla": 100.0, "groups": 2, "dropped": 1})


def test_lmms_evals_chinese_prompt_allows_fewer_tokens(tmp_path):
    for lang, style, tokens in [("cn", "llava", 1024), ("cn", "lmms", 256), ("en", "lmms", 1024)]:
        folder = tmp_path / lang
        folder.mkdir(exist_ok=True)
        getattr(make_benchmarks, f"mmbench_{lang}")(folder)
        assert load_benchmark(f"mmbench_{lang}", folder, Reading(style=style)).max_new == tokens


@pytest.mark.parametrize("cells, answer, wanted", [
    (["none", "nan", "two", ""], "A", ["none", "nan", "two"]),
    (["one", "two", "None", ""], "C", ["one", "two", "None"]),
    (["one", "two", "nan", "nan"], "A", ["one", "two"]),
    (["one", "two", "three", "nan"], "D", ["one", "two", "three", "nan"])])
def test_options_that_read_none_or_nan_are_options_and_empty_cells_are_not(tmp_path, cells, answer, wanted):
    row = {"index": 1, "question": "How many?", "hint": "", **dict(zip("ABCD", cells)),
           "answer": answer, "image": b64(1), "l2-category": "x"}
    tsv(tmp_path / "mmbench_dev_20230712.tsv", [row])
    assert load_benchmark("mmbench_en", tmp_path).samples[0].options == wanted


def test_references_that_read_nan_or_a_question_mark_are_counted_aloud(tmp_path):
    jsonl(tmp_path / "mine.jsonl", [{"text": "a?", "answer": "nan"}, {"text": "b?", "answer": "?"},
                                    {"text": "c?", "answer": "nan."}, {"text": "d?"}])
    jsonl(tmp_path / "answers.jsonl", [{"question_id": n, "text": "nan"} for n in range(1, 5)])
    done = call("evaluate.py", "--data", tmp_path / "mine.jsonl", "--score-only",
                tmp_path / "answers.jsonl")
    assert done.returncode == 0, done.stderr
    assert "warning: 2 reference answers that read nan or ?" in done.stdout and "n_scored 1" in done.stdout


def test_the_ten_references_of_a_question_are_normalised_once_each(monkeypatch):
    metrics.vqa_norm.cache_clear()
    assert metrics.vqa_acc("Surfing!", ["surfing"] * 6 + ["surf"] * 4) == 1.0
    assert metrics.vqa_norm.cache_info().misses == 3


# --------------------------------------------------------------------------------- byte order marks
@pytest.mark.parametrize("make", ["pope", "sqa", "own", "mme", "mmbench_en"])
def test_files_that_begin_with_a_byte_order_mark_are_read(make, tmp_path):
    case = getattr(make_benchmarks, make)(tmp_path)
    answer(case, tmp_path)
    for path in tmp_path.glob("**/*.*"):
        if path.suffix in (".jsonl", ".json", ".tsv", ".txt"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    done = run(case, tmp_path, "--score-only", tmp_path / "answers.jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in written(tmp_path, "pred.jsonl").open()]
    assert [r["prompt"] for r in rows] == case.prompts
    agrees(result(tmp_path)["metrics"], case.expect)


def test_the_mmbench_server_gets_a_spreadsheet_with_llavas_columns(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    case = make_benchmarks.mmbench_test(tmp_path)
    done = run(case, tmp_path, "--score-only", answer(case, tmp_path))
    assert done.returncode == 0 and "for the benchmark's server: " in done.stdout
    rows = list(openpyxl.load_workbook(written(tmp_path, "submission.xlsx")).active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "split")
    assert rows[2] == (1000001, "Which?", "dog", "cow", "cat", None, "C. cat", "test")


def test_a_spreadsheet_keeps_texts_as_texts(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    write_xlsx(tmp_path / "t.xlsx",
               [{"index": 1, "question": "a < b &\nc\x07", "A": " 是 ", "B": "=1+1", "C": ["odd"]}])
    sheet = openpyxl.load_workbook(tmp_path / "t.xlsx").active
    assert list(sheet.values) == [("index", "question", "A", "B", "C"), (1, "a < b &\nc", " 是 ", "=1+1", "['odd']")]
    assert sheet["D2"].data_type == "s", "no formula"


def test_without_openpyxl_one_line_says_so_before_any_question_is_asked(tmp_path, monkeypatch, ckpt):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    case = make_benchmarks.mmbench_test(tmp_path)
    monkeypatch.setattr(evaluate.Assistant, "generate",
                        lambda *_: pytest.fail("a question was asked"))
    refuses(run(case, tmp_path, "--ckpt", ckpt), "needs openpyxl: pip install openpyxl")
    (tmp_path / "dev").mkdir()
    # answers are public: the score needs no spreadsheet
    case = make_benchmarks.mmbench_en(tmp_path / "dev")
    done = run(case, tmp_path / "dev", "--score-only", answer(case, tmp_path / "dev"))
    assert done.returncode == 0 and "warning: no spreadsheet" in done.stdout and "circular 50.00" in done.stdout


# ------------------------------------------------------------------------------------------- images
def test_a_tables_image_cell_may_name_another_row(tmp_path):
    make_benchmarks.mmbench_en(tmp_path)
    samples = load_benchmark("mmbench_en", tmp_path).samples
    assert len(samples[0].image) > 131072, "longer than the limit that csv has by default"
    assert samples[1].image is samples[2].image is samples[0].image, "rotations share one copy of an image in memory"
    assert samples[3].image == samples[4].image != samples[0].image
    assert decoded(samples[0].image).size == (21, 16)


def test_parquet_images_are_read_late_and_compared_by_their_bytes(tmp_path):
    pytest.importorskip("pyarrow")
    make_benchmarks.mmstar_lmms(tmp_path)
    samples = load_benchmark("mmstar", tmp_path).samples
    assert [decoded(s.image).size for s in samples] == [(20, 16), (21, 16), (22, 16), (20, 16)]
    assert len(group_by_image(samples)) == 4
    make_benchmarks.pope_lmms(tmp_path / "pope")
    assert group_by_image(load_benchmark("pope", tmp_path / "pope").samples) == [list(range(6))]


@pytest.mark.parametrize("make", ["ai2d", "realworldqa", "sqa_lmms", "pope_lmms", "refcoco"])
def test_shards_are_one_table_whose_rows_are_numbered_over_the_whole_split(make, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    case = getattr(make_benchmarks, make)(tmp_path)
    (path,) = tmp_path.glob("**/*.parquet")
    rows = pq.read_table(path)
    path.unlink()
    split = path.name.partition("-")[0]
    for n, part in enumerate([rows[:1], rows[1:]]):
        pq.write_table(part, path.with_name(f"{split}-0000{n}-of-00002.parquet"))
    done = run(case, tmp_path, "--score-only", answer(case, tmp_path))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["prompt"] for line in written(tmp_path, "pred.jsonl").open()] == case.prompts
    agrees(result(tmp_path)["metrics"], case.expect)


def test_scoring_reads_no_image_of_a_parquet_file(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    case, read, iterate = make_benchmarks.mmmu_lmms(tmp_path), [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, *a, **k: read.append(k)
                        or iterate(self, *a, **k))
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a,
                        **k: pytest.fail("an image was read"))
    done = run(case, tmp_path, "--score-only", answer(case, tmp_path))
    assert done.returncode == 0, done.stderr
    columns = [name for k in read for name in k["columns"]]
    assert "image_1.path" in columns and not any(name.endswith("bytes") for name in columns)


def test_one_rank_reads_the_images_to_group_questions_and_the_others_follow_it(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    make_benchmarks.pope_lmms(tmp_path)
    make_benchmarks.mmstar_lmms(tmp_path / "star")
    loaded = load_benchmark("pope", tmp_path)
    others = load_benchmark("mmstar", tmp_path / "star").samples
    samples, asked = loaded.samples + others, []
    for n, s in enumerate(samples):
        s.id = str(n)

    class Stub:
        def answer_batches(self, share, batch_size, max_new):
            asked.extend(share)
            return []

    q = Questions("pope", "pope", BENCHMARKS["pope"], loaded, samples, {"max_new_tokens": 1},
                  tmp_path)
    groups = group_by_image(samples)
    monkeypatch.setattr(answers, "group_by_image",
                        lambda samples: pytest.fail("this rank read the images too"))
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [groups, value])
    assert groups == [list(range(7)), [7], [8], [9]], "MMStar's first image is POPE's"
    answers.answer_share(Stub(), q, {"7": "done"}, 4,
                         Ranks(1, 2, torch.device("cpu"), torch.float32))
    assert [s.id for s in asked] == ["9"], "of four groups the second and fourth, less what is done"
    monkeypatch.undo()
    asked.clear()
    answers.answer_share(Stub(), q, {}, 4, Ranks(0, 1, torch.device("cpu"), torch.float32))
    assert len(asked) == 10 and len({s.image for s in asked}) == 4, "an image that several cells hold is encoded once"


def test_of_several_images_the_first_named_one_is_shown_and_such_questions_are_counted(tmp_path):
    pytest.importorskip("pyarrow")
    case = make_benchmarks.mmmu_lmms(tmp_path)
    loaded = load_benchmark("mmmu", tmp_path)
    samples = loaded.samples
    assert [decoded(s.image).size for s in samples] == [(22, 16), (21, 16)], "<image 2>; <image 1>"
    assert loaded.counts["samples of which only the first image is shown"] == 1
    done = run(case, tmp_path, "--score-only", answer(case, tmp_path))
    assert "warning: 1 samples of which only the first image is shown" in done.stdout


@pytest.mark.parametrize("region, at, colour",
                         [("bbox", (2, 3), (255, 0, 0)), ("seg", (9, 9), (255, 255, 255))])
def test_a_region_is_drawn_in_a_line_of_one_pixel(tmp_path, region, at, colour):
    pytest.importorskip("pyarrow")
    make_benchmarks.refcoco(tmp_path)
    samples = load_benchmark("refcoco", tmp_path, Reading(region=region)).samples
    plain, drawn = (decoded(samples[0].image, r) for r in (None, samples[0].region))
    assert drawn.getpixel(at) == colour != plain.getpixel(at)
    assert drawn.getpixel((6, 5 if region == "bbox" else 4)) == plain.convert("RGB").getpixel((6, 5)), "it was filled"


def test_without_pyarrow_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test-00000-of-00001.parquet").write_bytes(b"PAR1")
    refuses(call("evaluate.py", "--bench", "ai2d", "--data", tmp_path, "--score-only",
                 ROOT / "README.md"),
            "needs pyarrow", "pip install pyarrow", "JSONL")


# ---------------------------------------------------------------------------- files that do not fit
def spoil_pope_text(root):
    path = root / "coco/coco_pope_random.json"
    path.write_text(path.read_text().replace("dog", "dig"))


def spoil_pope_extra(root):
    path = root / "coco/coco_pope_popular.json"
    line = {"question_id": 3, "image": "x.jpg", "text": "?", "label": "no"}
    path.write_text(path.read_text() + json.dumps(line) + "\n")


def spoil_pope_twice(root):
    path = root / "coco/coco_pope_popular.json"
    first = json.loads(path.read_text().splitlines()[0])
    path.write_text(path.read_text() + json.dumps({**first, "label": "no"}) + "\n")


def spoil_rotation(root):
    path = root / "mmbench_dev_20230712.tsv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))


def spoil_tail(root):
    path = root / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text()[:-12])


def spoil_pointer(root):
    path = root / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\t1\ts\t", "\t3\ts\t"))


def spoil_mme(root):
    path = root / "MME_Benchmark_release_version/landmark/questions_answers_YN/1.txt"
    path.write_text(path.read_text().splitlines()[0])
    path = root / "llava_mme.jsonl"
    path.write_text("".join(x
                            for x in path.read_text().splitlines(keepends=True)
                            if "1 Bonn" not in x))


def spoil_column(root):
    path = root / "v2_OpenEnded_mscoco_val2014_questions.json"
    path.write_text(path.read_text().replace('"question":', '"query":'))


def spoil_split(root):
    path = root / "problems.json"
    path.write_text(path.read_text().replace('"test"', '"val"'))


def spoil_image(root):
    (root / "images/COCO_val2014_000000262148.jpg").unlink()


def spoil_id(root):
    path = root / "llava_test.jsonl"
    path.write_text(path.read_text().replace('"question_id": 1', '"question_id": 0'))


def spoil_labels(root):
    shutil.rmtree(root / "coco")


def spoil_names(root):
    (root / "val_v1.0.json").rename(root / "validation.json")


@pytest.mark.parametrize("make, spoil, says", [
    ("pope", spoil_pope_text,
     ["1 of 6 questions of llava_pope_test.jsonl have no label in coco_pope_adversarial.json",
                               "random · coco_val2014_000000310196.jpg · is there a dog",
                               "different releases"]),
    ("pope", spoil_pope_extra,
     ["1 labels of", "have no question in llava_pope_test.jsonl", "popular · x.jpg"]),
    ("pope", spoil_pope_twice, ["different labels for one question, popular", "is there a cup"]),
    ("pope", spoil_labels, ["holds no labels for llava_pope_test.jsonl", "coco_pope_*.json",
                            "--labels"]),
    ("mmbench_en", spoil_rotation,
     ["1 of 2 MMBench questions lack rotations", "question 1 has rows [1, 2000001]"]),
    ("mmbench_en", spoil_tail, ["row 5 has fewer cells than the header", "cut off"]),
    ("mmbench_en", spoil_pointer, ["row 2 has its image in row '3', which is not there"]),
    ("mme", spoil_mme, ["1 of 3 MME images do not have exactly 2 questions", "landmark/1.jpg"]),
    ("vqav2", spoil_column, ["row 1 has no column 'question'; its columns are", "query"]),
    ("sqa", spoil_split, ["3 of 3 questions of llava_test_CQM-A.json have no label in problems.json"]),
    ("vizwiz_test", spoil_id, ["question id 0 is there twice"]),
    ("docvqa", spoil_names, ["holds no file of docvqa: looked for val_v1.0*.json", "there is",
                             "validation.json"])])
def test_files_that_do_not_belong_together_end_in_one_line(make, spoil, says, tmp_path):
    case = getattr(make_benchmarks, make)(tmp_path)
    path = answer(case, tmp_path)
    spoil(tmp_path)
    refuses(run(case, tmp_path, "--score-only", path), *says)
    assert not list((tmp_path / "out").glob("**/results.json"))


def test_a_file_of_another_benchmark_or_split_is_refused_by_its_name_or_its_split_column(tmp_path):
    case = make_benchmarks.mmbench_cn(tmp_path)
    table = tmp_path / "mmbench_dev_cn_20231003.tsv"
    flags = "--score-only", answer(case, tmp_path)
    refuses(call("evaluate.py", "--bench", "mmbench_en", "--data", table, *flags),
            "is by its name of mmbench_cn, split dev, not of mmbench_en")
    refuses(call("evaluate.py", "--bench", "mmbench_cn", "--data", table, "--split", "test",
                 *flags),
            "is by its name of mmbench_cn, split dev, not of mmbench_cn, split test")
    shutil.copy(table, tmp_path / "mine.tsv")
    refuses(call("evaluate.py", "--bench", "mmbench_cn", "--data", tmp_path / "mine.tsv", "--split",
                 "test", *flags),
            "holds split dev, not test: --split dev?")


def test_of_two_releases_in_one_folder_the_user_must_choose(tmp_path):
    case = make_benchmarks.mmbench_en(tmp_path)
    shutil.copy(tmp_path / "mmbench_dev_20230712.tsv", tmp_path / "mmbench_dev_20231003.tsv")
    path = answer(case, tmp_path)
    refuses(run(case, tmp_path, "--score-only", path),
            "holds mmbench_dev_20230712.tsv, mmbench_dev_20231003.tsv: choose")
    done = call("evaluate.py", "--bench", case.bench, "--data",
                tmp_path / "mmbench_dev_20231003.tsv", "--score-only", path)
    assert done.returncode == 0, done.stderr


def test_a_question_that_is_asked_twice_gets_its_labels_in_order(tmp_path):
    case = make_benchmarks.textvqa(tmp_path)
    for name in ("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(re.sub("what year is it", "what is the brand", text,
                                            flags=re.I))
    samples = load_benchmark("textvqa", tmp_path, Reading(tmp_path / "images")).samples
    assert [s.answer[0] for s in samples] == ["nous", "1999", "poe"] and case.ids[0] == case.ids[1]


@pytest.mark.parametrize("lines, says", [
    ([{"question_id": 1, "text": "No"}, {"question_id": 1, "text": "Yes"}],
     "line 2: a second, different answer to question 1"),
    ([{"question_id": 1, "answer": "No"}], "line 1 has neither text nor prediction: it has "
                                           "question_id, answer"),
    ([{"text": "No"}], "line 1 has no question_id"), ([["x"]], "line 1 is not a JSON object"),
    ([{"question_id": 99, "text": "No"}], "answers none of the 6 questions")])
def test_answers_that_do_not_belong_to_the_questions_end_in_one_line(tmp_path, lines, says):
    case = make_benchmarks.pope(tmp_path)
    jsonl(tmp_path / "answers.jsonl", lines)
    refuses(run(case, tmp_path, "--score-only", tmp_path / "answers.jsonl"), says)


def test_a_cut_off_last_line_unknown_ids_and_repeats_are_counted(tmp_path):
    case = make_benchmarks.pope(tmp_path)
    path = answer(case, tmp_path)
    first, *rest = path.read_text().splitlines(keepends=True)
    unknown = json.dumps({"question_id": 99, "text": "No"}) + "\n"
    path.write_text("".join([first, first, unknown, *rest])[:-20])
    done = run(case, tmp_path, "--score-only", path)
    assert done.returncode == 0, done.stderr
    results = result(tmp_path)
    assert results["n_missing"] == 1 and "n_missing 1" in done.stdout
    assert {"1 answers to questions that are not asked", "1 answers given twice"} <= set(results["warnings"])
    assert any("6 questions; the released files have 9000 or 8910" in w
               for w in results["warnings"])


def test_a_limit_is_marked_and_drops_incomplete_groups(tmp_path):
    case = make_benchmarks.mmbench_en(tmp_path)
    done = run(case, tmp_path, "--score-only", answer(case, tmp_path), "--limit", 4)
    assert "PARTIAL: the first 4 questions" in done.stdout
    results = result(tmp_path)
    assert results["partial"] and results["metrics"]["dropped"] == 1 and results["metrics"]["circular"] == 100.0


@pytest.mark.parametrize("flags, says", [
    (["--bench", "pope"], ["--bench pope needs --data"]),
    (["--bench", "pope", "--data", "absent", "--score-only", "README.md"],
     ["--data absent does not exist"]),
    (["--bench", "pope", "--data", "tests", "--score-only", "."], ["--score-only . is not a file"]),
    (["--bench", "poppe"], ["--bench", "'poppe'"]),
    (["--bench", "pope", "--metric", "vqa"], ["--metric is for your own questions"]),
    (["--split", "val"], ["--split", "need --bench"]),
    (["--compare", "tests"], ["tests holds no results.json"])])
def test_a_wrong_benchmark_command_line_is_one_line(flags, says):
    refuses(call("evaluate.py", *flags), *says)


@pytest.mark.parametrize("make, column, value, says", [
    (make_benchmarks.sqa_lmms, "choices", None, "invalid options (None is no list)"),
    (make_benchmarks.ai2d, "options", True, "invalid options (True is no list)"),
    (make_benchmarks.vizwiz_lmms, "answers", [{"a": 1}], "one of several has no answer"),
    (make_benchmarks.mmbench_lmms, "index", 1e400, "invalid id (cannot convert float infinity"),
    (make_benchmarks.mmbench_lmms, "hint", 3, "invalid hint (3 is no text)")])
def test_a_column_of_another_kind_is_named(make, column, value, says, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow.parquet import read_table
    case = make(tmp_path)
    path = sorted(tmp_path.rglob("*.parquet"))[0]
    make_benchmarks.parquet(path, [{**row, column: value} for row in read_table(path).to_pylist()])
    refuses(run(case, tmp_path, "--score-only", answer(case, tmp_path)), str(path), says)


def test_a_category_may_be_missing_and_an_id_may_be_a_word(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow.parquet import read_table
    case = make_benchmarks.mmstar_lmms(tmp_path / "star")
    path, = tmp_path.rglob("*.parquet")
    make_benchmarks.parquet(path, [{**row, "category": None} for row in read_table(path).to_pylist()])
    done = run(case, tmp_path / "star", "--score-only", answer(case, tmp_path / "star"))
    assert done.returncode == 0, done.stderr
    case = make_benchmarks.docvqa_test(tmp_path / "doc")
    path = tmp_path / "doc/test_v1.0.json"
    path.write_text(path.read_text().replace("57344", '"q7"'))
    case.ids = ["q7"]
    done = run(case, tmp_path / "doc", "--score-only", answer(case, tmp_path / "doc"))
    assert done.returncode == 0, done.stderr
    sent = json.loads(written(tmp_path / "doc", "submission.json").read_text())
    assert sent == [{"questionId": "q7", "answer": "Paul"}]


def test_a_region_is_checked_if_it_is_drawn(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow.parquet import read_table
    case = make_benchmarks.refcoco(tmp_path)
    path = sorted(tmp_path.rglob("*.parquet"))[0]
    rows = [{**row, "segmentation": None} for row in read_table(path).to_pylist()]
    make_benchmarks.parquet(path, rows)
    answers = answer(case, tmp_path)
    assert run(case, tmp_path, "--score-only", answers).returncode == 0, "bbox is drawn: seg may be missing"
    refuses(run(case, tmp_path, "--score-only", answers, "--region", "seg", out="seg"), "has no region in seg: None")


def test_a_parquet_file_that_is_broken_inside_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    case = make_benchmarks.ai2d(tmp_path)
    path = sorted(tmp_path.rglob("*.parquet"))[0]
    good = path.read_bytes()
    path.write_bytes(b"PAR1" + bytes(len(good) // 2) + good[4 + len(good) // 2:])
    refuses(run(case, tmp_path, "--score-only", answer(case, tmp_path)), str(path), "download it again")


def test_a_list_of_vqav2s_questions_that_cannot_be_read_is_refused_before_any_is_asked(tmp_path, monkeypatch, ckpt):
    case = make_benchmarks.vqav2_test(tmp_path)
    path, = tmp_path.rglob("llava_vqav2_mscoco_test2015.jsonl")
    path.write_text('{"id": 1}\n')
    monkeypatch.setattr(evaluate.Assistant, "generate", lambda *_: pytest.fail("a question was asked"))
    refuses(run(case, tmp_path, "--ckpt", ckpt), "test2015.jsonl: row 1 has no column")


def test_ocr_and_style_must_be_possible(tmp_path):
    case = make_benchmarks.textvqa_json(tmp_path)
    path = answer(case, tmp_path)
    refuses(run(case, tmp_path, "--score-only", path, "--ocr"), "holds no OCR tokens")
    case = make_benchmarks.textvqa(tmp_path)
    refuses(run(case, tmp_path, "--score-only", path, "--style", "lmms"), "as LLaVA asks them")
    done = run(case, tmp_path, "--score-only", answer(case, tmp_path))
    assert result(tmp_path)["settings"]["ocr"] == "on" and "ocr on" in done.stdout
    case = make_benchmarks.okvqa(tmp_path / "ok")
    done = run(case, tmp_path / "ok", "--score-only", answer(case, tmp_path / "ok"), "--style",
               "lmms")
    row = json.loads(written(tmp_path / "ok", "pred.jsonl").read_text())
    assert "respond with 'Unanswerable'.\nAnswer the question" in row["prompt"]


def test_results_side_by_side_warn_of_settings_that_differ(tmp_path):
    case = make_benchmarks.textvqa(tmp_path / "a")
    path = answer(case, tmp_path / "a")
    run(case, tmp_path / "a", "--score-only", path, out="one/textvqa")
    run(case, tmp_path / "a", "--score-only", path, "--no-ocr", out="two/textvqa")
    done = call("evaluate.py", "--compare", tmp_path / "a/one", tmp_path / "a/two")
    assert done.returncode == 0, done.stderr
    assert "textvqa accuracy" in done.stdout and done.stdout.count("66.7") == 2
    assert "warning: textvqa's ocr differs: on in " in done.stdout


# ------------------------------------------------------------------------------------- with a model
@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A whole checkpoint: the toy's backbones and an untrained projector. It answers something."""
    torch.manual_seed(0)
    clip, llm = ROOT / "toy/clip", ROOT / "toy/llm"
    vision, decoder = load_vision(clip, torch.float32), load_llm(llm, torch.float32)
    model = Llava(vision, Projector(vision.config.hidden_size, decoder.config.hidden_size), decoder)
    folder = tmp_path_factory.mktemp("run") / "finetune-1"
    config = {"stage": "finetune", "step": 1, "steps": 1, "template": "v1", "pad": True,
              "after_special": "4.31", "vision": str(clip), "llm": str(llm)}
    save_checkpoint(folder, model, {n for n, _ in model.named_parameters()}, config, {})
    return folder


ASK = "Is there a circle?", "What colour is the circle?", "How many objects are there?", "Which row has the circle?"


@pytest.fixture
def world(tmp_path):
    """Questions of different lengths about three images or none, those about one image not in a row."""
    rows = []
    for n in range(14):
        image = {} if n % 5 == 4 else {"image": f"{n % 3}.png"}
        rows.append({"question_id": n, "text": ASK[n % 4] + " Really?" * (n % 3), "answer": "Yes",
                     **image})
    jsonl(tmp_path / "mine.jsonl", rows)
    for n in range(3):
        picture(tmp_path / f"images/{n}.png", n)
    return tmp_path


def ask(root, ckpt, *flags):
    return call("evaluate.py", "--ckpt", ckpt, "--bench", "own", "--data", root / "mine.jsonl",
                "--images", root / "images", "--out", root / "out", "--max-new-tokens", 5,
                "--dtype", "float32", *flags)


def predictions(root, out="out/mine"):
    return [json.loads(line)["prediction"] for line in (root / out / "pred.jsonl").open()]


def test_answers_do_not_depend_on_batches_and_a_batch_encodes_each_image_once(world, ckpt, monkeypatch):
    encoded, embed = [], Llava.embed_images
    monkeypatch.setattr(Llava, "embed_images", lambda self, x: encoded.append(len(x))
                        or embed(self, x))
    assert ask(world, ckpt, "--batch-size", 1).returncode == 0
    one = predictions(world)
    encoded.clear()
    done = ask(world, ckpt, "--overwrite", "--batch-size", 64)
    assert done.returncode == 0, done.stderr
    assert predictions(world) == one and len(set(one)) > 1
    assert encoded in ([3], [4]), "three images in a batch of fourteen questions, and a zero image for text alone"
    assert result(world, "out/mine")["settings"]["batch_size"] == [64]


def test_a_stopped_evaluation_resumes_whatever_the_number_of_ranks(world, ckpt, monkeypatch):
    assert ask(world, ckpt).returncode == 0
    whole_run, folder = predictions(world), world / "out/mine"
    lines = (folder / "pred.rank0of1.jsonl").read_text().splitlines(keepends=True)
    (folder / "pred.rank0of1.jsonl").unlink()
    # What three killed ranks leave: two have answered a part, one was writing a line.
    (folder / "pred.rank0of3.jsonl").write_text("".join(lines[:4]))
    (folder / "pred.rank2of3.jsonl").write_text("".join([lines[0], *lines[6:9]]) + lines[9][:-9])
    asked, prepare = [], evaluate.Assistant.prepare

    def count(self, samples):
        asked.extend(samples)
        return prepare(self, samples)
    monkeypatch.setattr(evaluate.Assistant, "prepare", count)
    done = ask(world, ckpt, "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    assert len(asked) == 14 - 3 - 3 and predictions(world) == whole_run
    assert sorted(result(world, "out/mine")["settings"]["batch_size"]) == [2, 64]
    asked.clear()
    assert ask(world, ckpt).returncode == 0 and not asked and predictions(world) == whole_run


def test_a_line_that_was_cut_off_is_removed_before_more_is_appended(world, ckpt):
    assert ask(world, ckpt).returncode == 0
    path, before = world / "out/mine/pred.rank0of1.jsonl", predictions(world)
    text = path.read_text()
    for cut in (1, 12):                               # only the newline is missing; the line is cut
        path.write_text(text[:-cut])
        assert ask(world, ckpt).returncode == 0 and predictions(world) == before


@pytest.mark.parametrize("change", ["question", "answer length", "weights", "template"])
def test_another_checkpoint_question_or_setting_is_refused_unless_overwritten(world, ckpt, change, tmp_path):
    assert ask(world, ckpt).returncode == 0
    flags, other = [], ckpt
    if change == "question":
        path = world / "mine.jsonl"
        path.write_text(path.read_text().replace("circle?", "square?", 1))
    elif change == "answer length":
        flags = ["--max-new-tokens", 6]
    elif change == "template":
        flags = ["--template", "mistral"]
    else:
        other = shutil.copytree(ckpt, tmp_path / "other/finetune-1")
        data = bytearray((other / "model.safetensors").read_bytes())
        data[-2] ^= 1
        (other / "model.safetensors").write_bytes(data)
        (other / "digests.json").unlink(missing_ok=True)
    says = {"question": "questions", "answer length": "max_new_tokens", "weights": "checkpoint"}.get(change, change)
    refuses(ask(world, other, *flags), f"was made with another {says}: --overwrite, or "
                                       "another --out")
    assert ask(world, other, *flags, "--overwrite").returncode == 0


def test_the_digest_of_weights_reads_blocks_all_over_the_file(tmp_path):
    data = bytearray(8 << 20)
    for n, at in enumerate((None, 0, 4 << 20, len(data) - 1)):
        if at is not None:
            data[at:at + 200_000] = bytes([n]) * len(data[at:at + 200_000])
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "model.safetensors").write_bytes(data)
    assert len({files_digest([tmp_path / str(n) / "model.safetensors"]) for n in range(4)}) == 4


def test_two_ranks_resume_what_one_process_left_print_once_and_equal_it(world, ckpt):
    """As a user asks own questions: no --bench."""
    own = "evaluate.py", "--ckpt", ckpt, "--data", world / "mine.jsonl", "--images", world / "images", \
        "--max-new-tokens", 5, "--dtype", "float32"
    alone = call(*own, "--out", world / "out")
    assert alone.returncode == 0, alone.stderr
    lines = (world / "out/mine/pred.rank0of1.jsonl").read_text().splitlines(keepends=True)
    (world / "two/mine").mkdir(parents=True)
    # the settings and three answers
    (world / "two/mine/pred.rank0of1.jsonl").write_text("".join(lines[:4]))
    done = launch(*own, "--out", world / "two", "--batch-size", 3, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout.replace(str(world / "out"), str(world / "two")), "one process prints, the same"
    assert predictions(world, "two/mine") == predictions(world)
    shares = [(world / f"two/mine/pred.rank{r}of2.jsonl").read_text().count('"id"') for r in (0, 1)]
    assert sum(shares) == 14 - 3 and min(shares) >= 2
    side = call("evaluate.py", "--compare", world / "out", world / "two")
    rows = [line.split()[-1] for line in side.stdout.splitlines()]
    assert "mine accuracy" in side.stdout and rows[1] == rows[2] == f"{result(world, 'two')['metrics']['accuracy']:.1f}"


def test_a_benchmark_runs_with_a_model_and_its_pictures(ckpt, tmp_path):
    case = make_benchmarks.mmt(tmp_path)
    flags = "--ckpt", ckpt, "--max-new-tokens", 3
    done = run(case, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    settings = result(tmp_path, "out/mmt")["settings"]
    assert settings["dtype"] and settings["template"] == "v1" and settings["max_new_tokens"] == 3
    pope = make_benchmarks.pope(tmp_path / "pope")
    assert run(pope, tmp_path / "pope", *flags).returncode == 0
    (tmp_path / "pope/images/COCO_val2014_000000310196.jpg").write_bytes(b"nothing")
    done = run(pope, tmp_path / "pope", *flags, "--overwrite")
    assert done.returncode == 2 and done.stderr.endswith("COCO_val2014_000000310196.jpg: not "
                                                         "an image\n")
    (tmp_path / "pope/images/COCO_val2014_000000310196.jpg").unlink()
    refuses(run(pope, tmp_path / "pope", *flags), "1 of 1 images are not there, such as",
            "is --images the folder")


def test_the_image_comes_first_unless_the_prompt_says_where(ckpt, tmp_path):
    picture(tmp_path / "a.png")
    assistant = evaluate.Assistant.from_checkpoint(ckpt, device="cpu")
    image, n = tmp_path / "a.png", assistant.model.vision_tower.config.image_tokens

    def text(prompt, image=image):
        ids, masks, _, _ = assistant.prepare([Sample("1", prompt, image)])
        kept = [int(i) for i, m in zip(ids[0], masks[0]) if not m]
        at = int(masks[0].int().argmax())
        assert int(masks[0].sum()) == (n if image else 0)
        return assistant.tokenizer.decode(kept[:at]).strip(), assistant.tokenizer.decode(kept[at:])
    before, after = text("Is it?" + SHORT)
    assert before.endswith("USER:") and "Is it?" in after
    before, after = text("Question: <image>\nIs it?" + LETTER)
    assert before.endswith("USER: Question:") and "Is it?" in after
    assert "<image>" not in text("Is <image> it?", None)[1]


def test_a_checkpoint_that_has_learned_captions_alone_is_refused(ckpt, world, tmp_path):
    other = shutil.copytree(ckpt, tmp_path / "other/pretrain-1")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "template": "plain"}))
    refuses(ask(world, other), "template plain", "--template v1")
    one = "evaluate.py", "--ckpt", other, "--prompt", "What is this?"
    refuses(call(*one), "template plain", "--template v1")
    assert call(*one, "--template", "v1", "--max-new-tokens", 2).returncode == 0
    assert ask(world, other, "--template", "v1").returncode == 0


@pytest.mark.parametrize("metric, by_hand",
                         [("exact", [100, 0]), ("contains", [100, 100]), ("choice", [0, 0]),
                                             ("anls", [100, 0]), ("vqa", [0, 0]), ("none", None)])
def test_own_questions_are_scored_by_the_metric(tmp_path, metric, by_hand):
    jsonl(tmp_path / "mine.jsonl",
          [{"text": "a?", "answer": "B"}, {"text": "b?", "answer": ["C", "D"]}])
    jsonl(tmp_path / "answers.jsonl",
          [{"question_id": 1, "text": "b" if metric != "choice" else "so so"},
                                       {"question_id": 2, "text": "abcde and f"}])
    done = call("evaluate.py", "--metric", metric, "--data", tmp_path / "mine.jsonl",
                "--score-only", tmp_path / "answers.jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(x) for x in (tmp_path / "answers.scored/mine/pred.jsonl").open()]
    assert [None if r["score"] is None else 100 * r["score"] for r in rows] == (by_hand or [None, None])


def test_what_is_not_a_table_of_questions_is_named(tmp_path):
    for name, text, says in [("mine.jsonl", '{"question_id": 1}\n',
                              "row 1 has no column 'text'; its columns are question_id"),
                             ("mine.jsonl", '{"text": 5}\n', "row 1 has an invalid prompt (5 is no text)"),
                             ("mine.jsonl", "", "is empty"),
                             ("mine.jsonl", "[1]\n", "row 1 is not a set of named values")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=re.escape(says)):
            load_benchmark("own", tmp_path / name)
    whole(tmp_path / "val.json", {"a": 1})
    with pytest.raises(UserError, match="no column 'image'"):
        load_benchmark("vizwiz", tmp_path / "val.json")
