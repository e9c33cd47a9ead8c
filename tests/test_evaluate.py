"""evaluate.py: a user's own questions, from a checkpoint's folder to files."""
import json

import pytest
from conftest import call

from common.flags import UserError
from evaluate import Assistant, predict
from hub.samples import read_questions


@pytest.fixture(scope="module")
def run(small_world, tmp_path_factory):
    """A finetune checkpoint of five steps: it answers, if badly."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = call("train.py", "--stage", "finetune", "--data", small_world / "finetune.json", "--images",
                  small_world / "images", "--out", out, "--global-batch", 8, "--max-steps", 5, "--lr", 1e-3,
                "--workers", 0)
    assert done.returncode == 0, done.stderr
    return out


def test_answers_do_not_depend_on_the_batch(small_world, run):
    assistant = Assistant.from_checkpoint(run)
    rows = read_questions(small_world / "test.jsonl", small_world / "images")
    answers = [predict(assistant, rows, small_world / "images", size, 8) for size in (1, 7, 64)]
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == len(rows)


def test_shuffling_gives_every_question_another_image_once(small_world, run, monkeypatch):
    assistant = Assistant.from_checkpoint(run)
    rows = read_questions(small_world / "test.jsonl", small_world / "images")
    asked = []
    monkeypatch.setattr(assistant, "prepare", lambda questions: asked.extend(questions) or [questions])
    monkeypatch.setattr(assistant, "generate", lambda questions, new: [""] * len(questions))
    predict(assistant, rows, small_world / "images", 8, 4, shuffle=True)
    assert [text for text, _ in asked] == [r["text"] for r in rows], "the questions stay in their order"
    own = [small_world / "images" / r["image"] for r in rows]
    assert sorted(f for _, f in asked) == sorted(own)
    assert sum(f != o for (_, f), o in zip(asked, own)) > len(rows) / 2


def test_predictions_and_results_are_written_and_add_up(small_world, run, tmp_path):
    questions = tmp_path / "mine.jsonl"
    rows = [{"question_id": "a", "image": "test_000000.png", "text": "Is there a circle?", "answer": "Yes"},
            {"question_id": "b", "text": "Why?", "answer": "because", "category": "text"},
            {"question_id": "c", "image": "test_000001.png", "text": "How many?"}]
    questions.write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ("evaluate.py", "--ckpt", run, "--data", questions, "--images", small_world / "images", "--out",
               tmp_path / "eval", "--max-new-tokens", 8)
    done = call(*command)
    assert done.returncode == 0, done.stderr
    assert "all" in done.stdout and "images shuffled" in done.stdout
    written = [json.loads(line) for line in (tmp_path / "eval" / "mine.predictions.jsonl").open()]
    assert [w["question_id"] for w in written] == ["a", "b", "c"] and written[2]["correct"] is None
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["mine"]["n"] == 3 and results["mine"]["n_scored"] == 2
    assert results["mine"]["accuracy"]["all"] == 100.0 * written[0]["correct"]
    assert results["checkpoint"].endswith("finetune-5") and results["settings"]["max_new_tokens"] == 8
    again = call(*command)
    assert again.returncode == 2 and "holds predictions for mine already" in again.stderr
    assert call(*command, "--overwrite", "--limit", 1).returncode == 0


def test_one_question_is_answered_on_the_terminal(small_world, run):
    done = call("evaluate.py", "--ckpt", run, "--image", small_world / "images" / "test_000000.png", "--prompt",
                  "Is there a circle?")
    assert done.returncode == 0 and done.stdout.strip() and not done.stderr
    assistant = Assistant.from_checkpoint(run)
    answer = assistant.answer([("Is there a circle?", small_world / "images" / "test_000000.png")])
    assert done.stdout.strip() == answer[0]


@pytest.mark.parametrize("content, says", [
    ("", "is empty"), ("{", "line 1: not JSON"), ('{"text": "a"}\n{"image": "b.png"}', "line 2 lacks a text"),
    ('{"text": "a", "question_id": 1}\n{"text": "b", "question_id": 1}', "question_id 1 is there twice"),
    ('{"text": "a", "image": "x.png"}', "1 of the images that .* names are not in .*, such as x.png")])
def test_a_question_file_that_cannot_be_used_is_refused_by_line(tmp_path, content, says):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(UserError, match=says):
        read_questions(tmp_path / "q.jsonl", tmp_path)
