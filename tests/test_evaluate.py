"""evaluate.py: your own questions and the toy's, from a checkpoint's folder to files."""
import json
import shutil

import pytest
from conftest import call
from test_errors import refuses

from common.flags import UserError
from evaluate import Assistant
from evaluation.questions import Reading, Sample, load_benchmark, shuffle_images
from evaluation.scores import Scored, summary_own
from hub.samples import read_questions


@pytest.fixture(scope="module")
def run(small_world, tmp_path_factory):
    """A finetune checkpoint of five steps: it answers, if badly."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = call("train.py", "--stage", "finetune", "--projector", "random", "--data",
                small_world / "finetune.json", "--images", small_world / "images", "--out", out,
                "--global-batch", 8, "--max-steps", 5, "--lr", 1e-3, "--workers", 0)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def samples(small_world):
    return load_benchmark("own", small_world / "test.jsonl", Reading(small_world / "images")).samples


def lines(path):
    return [json.loads(line) for line in path.open()]


def test_answers_do_not_depend_on_the_batch(run, samples):
    assistant = Assistant.from_checkpoint(run)
    answers = [[a for _, batch in assistant.answer_batches(samples, size, 8) for a in batch]
               for size in (1, 7, 64)]
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == len(samples)


def test_a_prompt_that_the_model_has_no_room_for_is_refused_before_any_is_asked(small_world, run, tmp_path):
    # Its attention mask would be as long squared: 9,999 tokens are 1 GiB and more.
    questions = [{"question_id": "a", "image": "test_000000.png", "text": "Why?"},
                 {"question_id": "b", "image": "test_000000.png", "text": "Why? " * 2000}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    done = call("evaluate.py", "--ckpt", run, "--data", tmp_path / "q.jsonl", "--images", small_world / "images",
                "--batch-size", 1, "--out", tmp_path / "out")
    refuses(done, "prompt b 'Why? Why?", "the model room for 256: shorten it")
    answers = list((tmp_path / "out").rglob("pred*"))
    assert not any("prediction" in path.read_text() for path in answers), "the first question was asked all the same"


def test_shuffling_gives_every_question_another_image_once(samples):
    text_only = Sample("text", "Why?")
    shuffled = shuffle_images([*samples[:5], text_only, *samples[5:]])
    assert shuffled.pop(5).image is None
    assert [s.prompt for s in shuffled] == [s.prompt for s in samples], "the questions stay in their order"
    assert sorted(s.image for s in shuffled) == sorted(s.image for s in samples)
    assert sum(s.image != o.image for s, o in zip(shuffled, samples)) > len(samples) / 2


def test_accuracy_is_over_questions_and_the_mean_over_categories(samples):
    count = [s for s in samples if s.category == "count"][:4]
    colour = [s for s in samples if s.category == "colour"][:1]
    assert summary_own(Scored(count + colour, [""] * 5, [1.0, 1.0, 1.0, 0.0, 0.0], "accuracy", False)) == {
        "accuracy": 60.0, "mean": 37.5, "category": {"count": 75.0, "colour": 0.0}}


def test_own_questions_give_predictions_and_results_that_add_up(small_world, run, tmp_path):
    rows = [{"question_id": "a", "image": "test_000000.png", "text": "Is there a circle?",
             "answer": "Yes"},
            {"question_id": "b", "text": "Why?", "answer": "because", "category": "text"},
            {"question_id": "c", "image": "test_000001.png", "text": "How many?"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ("evaluate.py", "--ckpt", run, "--data", tmp_path / "mine.jsonl", "--images",
               small_world / "images", "--out", tmp_path / "eval", "--max-new-tokens", 8,
               "--shuffle-images")
    done = call(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["all", "text", "mean"]
    assert "mine, images shuffled" in done.stdout and "n 3  n_scored 2" in done.stdout
    written = lines(tmp_path / "eval/mine/pred.jsonl")
    assert [w["id"] for w in written] == ["a", "b", "c"] and written[2]["score"] is None
    results = json.loads((tmp_path / "eval/mine/results.json").read_text())
    assert results["n"] == 3 and results["n_scored"] == 2
    assert results["metrics"]["category"]["all"] == 100.0 * written[0]["score"]
    assert results["checkpoint"].endswith("finetune-5") and results["settings"]["max_new_tokens"] == 8
    shuffled = lines(tmp_path / "eval/mine-shuffled/pred.jsonl")
    assert {w["image"] for w in shuffled} == {w["image"] for w in written}


def test_the_same_command_again_asks_nothing_and_another_setting_is_refused(small_world, run, tmp_path, monkeypatch):
    command = ("evaluate.py", "--ckpt", run, "--data", small_world / "test.jsonl", "--images",
               small_world / "images", "--out", tmp_path / "eval", "--max-new-tokens", 4)
    first = call(*command)
    with monkeypatch.context() as m:
        m.setattr(Assistant, "from_checkpoint", lambda *_: pytest.fail("the model was loaded"))
        again = call(*command)
    assert first.returncode == again.returncode == 0 and first.stdout == again.stdout
    for flags, says in ((["--max-new-tokens", 5], "another max_new_tokens"),
                        (["--metric", "contains"], "metric")):
        other = call(*command, *flags)
        assert other.returncode == 2 and says in other.stderr and "--overwrite, or another --out" in other.stderr
        assert call(*command, *flags, "--overwrite").returncode == 0


def test_without_data_the_toys_questions_are_asked_with_right_and_with_shuffled_images(small_world, run, tmp_path):
    shutil.copytree(run, tmp_path / "toy")
    shutil.copytree(small_world, tmp_path / "toy/data")
    done = call("evaluate.py", "--ckpt", tmp_path / "toy", "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    names = ["test", "test, images shuffled", "composition", "composition, images shuffled"]
    table = done.stdout.splitlines()
    assert table[0].split() == ["existence", "adversarial", "count", "colour", "row", "column",
                                "mean"]
    for line, name in zip(table[1:5], names):
        assert line.startswith(name + "  ")
    assert table[5] == f"written to {tmp_path / 'toy/eval/finetune-5'}" and len(table) == 6
    folder = tmp_path / "toy/eval/finetune-5"
    assert sorted(p.name for p in folder.iterdir()) == ["composition", "composition-shuffled",
                                                        "test", "test-shuffled"]


def test_one_question_is_answered_on_the_terminal(small_world, run):
    image = small_world / "images" / "test_000000.png"
    done = call("evaluate.py", "--ckpt", run, "--image", image, "--prompt", "Is there a circle?")
    assert done.returncode == 0 and done.stdout.strip() and not done.stderr
    assert done.stdout.strip() == Assistant.from_checkpoint(run).answer([("Is there a circle?", image)])[0]


@pytest.mark.parametrize("content, says", [
    ("", "is empty"), ("{", "line 1: not JSON"), ('{"text": "a"}\n{"image": "b.png"}', "line 2 lacks a text"),
    ('{"text": "a", "question_id": 1}\n{"text": "b", "question_id": 1}',
     "question_id 1 is there twice"),
    ('{"text": "a", "image": "x.png"}',
     "1 of the images that .* names are not in .*, such as x.png")])
def test_a_question_file_that_cannot_be_used_is_refused_by_line(tmp_path, content, says):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(UserError, match=says):
        read_questions(tmp_path / "q.jsonl", tmp_path)
