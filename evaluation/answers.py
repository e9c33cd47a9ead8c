"""Files of answers: our own, which a stopped run leaves unfinished, and those of others."""
import hashlib
import json
from pathlib import Path

from common.files import read_json, read_lines
from common.flags import UserError
from evaluation.questions import Sample, bare, match_text


def checkpoint_digest(folder: Path) -> str:
    """Hash a checkpoint's weights: of each file its size and 64 blocks of 64 KiB spread over it. Training changes
    weights everywhere, so this shows any change; hashing all of 14 GB would take longer than loading them."""
    h = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        h.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for block in range(64):
                f.seek(block * max(0, size - 65536) // 63)
                h.update(f.read(65536))
    return h.hexdigest()[:16]


def questions_digest(samples: list[Sample]) -> str:
    """Hash ids, prompts and images (files by name)."""
    h = hashlib.sha256()
    for s in samples:
        image = s.image.name if isinstance(s.image, Path) else getattr(s.image, "digest", s.image)
        h.update(json.dumps([s.id, s.prompt, image, s.region]).encode())
    return h.hexdigest()[:16]


def read_predictions(out: Path, settings: dict) -> tuple[dict[str, str], list[int]]:
    """Return (predictions by id, batch sizes) of all runs so far. Raises UserError if other settings made them, or the
    results beside them."""
    done, sizes, headers = {}, set(), []
    for path in sorted(out.glob("pred.rank*.jsonl")):
        for line in read_lines(path)[0]:                    # without the half line of a stopped run
            if isinstance(line.get("settings"), dict) and isinstance(line.get("batch_size"), int):
                headers.append((path, line["settings"]))
                sizes.add(line["batch_size"])
            elif isinstance(line.get("id"), str) and isinstance(line.get("prediction"), str):
                done[line["id"]] = line["prediction"]
            else:
                raise UserError(f"{path}: {str(line)[:50]} is no answer: --overwrite, or another --out")
    if (out / "results.json").exists():
        headers.append((out / "results.json", read_json(out / "results.json", dict).get("settings")))
    for path, old in headers:
        if not isinstance(old, dict):
            raise UserError(f"{path} has no settings: --overwrite, or another --out")
        changed = [k for k in {**settings, **old} if settings.get(k) != old.get(k) and k not in ("batch_size", "limit")]
        if changed:
            raise UserError(f"{path} was made with another {', '.join(changed)}: --overwrite, or another --out")
    return done, sorted(sizes)


def read_answers(path: Path, samples: list[Sample], repeats: bool, counts: dict) -> dict[str, str]:
    """Return predictions by id from a file of answers: our pred.jsonl, or LLaVA's {question_id, text, prompt}.

    repeats: ids repeat (MME, TextVQA), so the prompt decides which question is meant. counts: unknown and repeated
    answers are added. Raises UserError, also for two different answers to one question."""
    if not path.is_file():
        raise UserError(f"--score-only {path} does not exist")
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
        number, text = line.get("id", line.get("question_id")), line.get("prediction", line.get("text"))
        if "prediction" not in line and "text" not in line:
            raise UserError(f"{path} line {n} has neither text nor prediction: it has {', '.join(line)}")
        if number is None or not (text is None or isinstance(text, str)):
            raise UserError(f"{path} line {n} has no question_id, or an invalid text: it has {', '.join(line)}")
        matches = by_id.get(str(number), [])
        if "id" in line:
            matches = [s for s in matches if s.id == line["id"]] or matches
        elif repeats and "prompt" in line:
            prompt = match_text(bare(str(line["prompt"])))
            matches = [s for s in matches if match_text(bare(s.prompt)) == prompt]
        if len(matches) > 1:
            raise UserError(f"{path} line {n}: {len(matches)} questions have the id {number}, and no prompt says which")
        if not matches:
            unknown += 1
        elif text is not None:
            answered += 1
            if found.setdefault(matches[0].id, text) != text:
                raise UserError(f"{path} line {n}: a second, different answer to question {number}")
    counts["answers to questions that are not asked"] = unknown
    counts["answers given twice"] = answered - len(found)
    if not found:
        raise UserError(f"{path} answers none of the {len(samples)} questions: is it of another benchmark or split?")
    return found
