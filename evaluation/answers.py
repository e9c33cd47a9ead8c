"""Files of answers: our own, which a stopped run leaves unfinished, and those of others."""
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from common.files import read_json, read_lines
from common.flags import UserError
from common.parallel import Ranks
from evaluation.files import group_by_image
from evaluation.questions import Questions, Sample, bare, match_text

REDO = "--overwrite, or another --out"


def questions_digest(samples: list[Sample]) -> str:
    """Hash ids, prompts and images. No image is opened: a file or a cell counts by its name."""
    h = hashlib.sha256()
    for s in samples:
        image = getattr(s.image, "name", s.image)               # base64 has no name: its text
        h.update(json.dumps([s.id, s.prompt, image, s.region]).encode())
    return h.hexdigest()[:16]


def answer_share(assistant, q: Questions, done: dict, batch_size: int, ranks: Ranks) -> None:
    """Append this rank's answers to its file. Its share is every ranks.count-th image with all
    questions about it: known from the questions alone, so ranks need not agree on what is done."""
    groups = ranks.gather(group_by_image(q.samples) if ranks.first else None)[0]
    share = []
    for group in groups[ranks.rank::ranks.count]:
        # All that show one image of a parquet file get the same cell.
        image = q.samples[group[0]].image
        share += [replace(q.samples[i], image=image) for i in group if q.samples[i].id not in done]

    # A prompt that the model has no room for is refused now, not hours later: short ones fit all.
    for s in share:
        if len(s.prompt) > 500:
            assistant.encode(s)

    path = q.out / f"pred.rank{ranks.rank}of{ranks.count}.jsonl"
    if path.exists():                                           # cut the half line of a stopped run
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    hide = None if ranks.first else True                        # None: show on a terminal alone
    longest = q.settings["max_new_tokens"]
    with open(path, "a", encoding="utf-8") as f, \
            tqdm(total=len(share), desc=q.name, unit="q", leave=False, disable=hide) as bar:
        f.write(json.dumps({"settings": q.settings, "batch_size": batch_size}) + "\n")
        for batch, answers in assistant.answer_batches(share, batch_size, longest):
            for s, answer in zip(batch, answers):
                f.write(json.dumps({"id": s.id, "prediction": answer}, ensure_ascii=False) + "\n")
            f.flush()
            bar.update(len(batch))


def read_predictions(out: Path, settings: dict, n: int) -> tuple[dict[str, str], list[int]]:
    """Return (predictions by id, batch sizes) of all runs so far. Raises UserError if anything in
    `out` was made with other settings, by another program, or of more than the `n` questions."""
    done, sizes, headers = {}, set(), []
    for path in sorted(out.glob("pred.rank*.jsonl")):
        for line in read_lines(path)[0]:                    # without the half line of a stopped run
            if isinstance(line.get("settings"), dict) and isinstance(line.get("batch_size"), int):
                headers.append((path, line["settings"]))
                sizes.add(line["batch_size"])
            elif isinstance(line.get("id"), str) and isinstance(line.get("prediction"), str):
                done[line["id"]] = line["prediction"]
            else:
                raise UserError(f"{path}: {str(line)[:50]} is no answer: {REDO}")
    results = out / "results.json"
    if results.exists():
        found = read_json(results, dict)
        if isinstance(found.get("n"), int) and found["n"] > n:
            raise UserError(f"{results} is of {found['n']} questions, this is of {n}: {REDO}")
        headers.append((results, found.get("settings")))
    if not headers and (out / "pred.jsonl").exists():
        headers.append((out / "pred.jsonl", None))

    # All that answers depend on must be as it was; more questions, or another batch size, may come.
    for path, old in headers:
        if not isinstance(old, dict):
            raise UserError(f"{path} is no evaluation's: {REDO}")
        names = [k for k in {**settings, **old} if k not in ("batch_size", "limit")]
        changed = [k for k in names if settings.get(k) != old.get(k)]
        if changed:
            raise UserError(f"{path} was made with another {', '.join(changed)}: {REDO}")
    return done, sorted(sizes)


def read_answers(path: Path, samples: list[Sample], repeats: bool, counts: dict) -> dict[str, str]:
    """Return predictions by id from a file: our pred.jsonl, or LLaVA's {question_id, text, prompt}.

    repeats: ids repeat (MME, TextVQA), so the prompt says which question is meant. Adds unknown and
    repeated answers to `counts`. Raises UserError, also if two answers to a question differ."""
    by_id = {}
    for s in samples:
        for key in {s.id, str(s.record["id"])}:
            by_id.setdefault(key, []).append(s)
    lines, last = read_lines(path)
    if last is not None:
        lines.append(last)
    found, unknown, answered = {}, 0, 0
    for n, line in enumerate(lines, 1):
        if "settings" in line:                              # the header of a pred.rank file
            continue
        where, has = f"{path} line {n}", f"it has {', '.join(line)}"
        number = line.get("id", line.get("question_id"))
        text = line.get("prediction", line.get("text"))
        if "prediction" not in line and "text" not in line:
            raise UserError(f"{where} has neither text nor prediction: {has}")
        if number is None or not (text is None or isinstance(text, str)):
            raise UserError(f"{where} has no question_id, or an invalid text: {has}")

        # Which question: our ids tell them apart (id#2), LLaVA's files need the prompt.
        matches = by_id.get(str(number), [])
        if "id" in line:
            matches = [s for s in matches if s.id == line["id"]] or matches
        elif repeats and "prompt" in line:
            prompt = match_text(bare(str(line["prompt"])))
            matches = [s for s in matches if match_text(bare(s.prompt)) == prompt]
        if len(matches) > 1:
            several = f"{len(matches)} questions have the id {number}"
            raise UserError(f"{where}: {several}, and no prompt says which")
        if not matches:
            unknown += 1
        elif text is not None:
            answered += 1
            if found.setdefault(matches[0].id, text) != text:
                raise UserError(f"{where}: a second, different answer to question {number}")
    counts["answers to questions that are not asked"] = unknown
    counts["answers given twice"] = answered - len(found)
    if not found:
        raise UserError(f"{path} answers none of the {len(samples)} questions: "
                        "is it of another benchmark or split?")
    return found
