"""Files of answers: our own, which a stopped run leaves unfinished, and those of others."""
import hashlib
import json
from pathlib import Path

from common.files import folder_digest, read_json, read_lines
from common.flags import UserError
from evaluation.questions import Sample, bare, match_text


def checkpoint_digest(folder: Path, *bases: str | Path) -> str:
    """Hash a checkpoint's weights, and those of the folders that a stage-1 checkpoint is used with: `folder_digest`."""
    return "-".join(folder_digest(part, "*.safetensors", "*.bin") for part in (folder, *bases))


def questions_digest(samples: list[Sample]) -> str:
    """Hash ids, prompts and images (files by name)."""
    h = hashlib.sha256()
    for s in samples:
        image = s.image.name if isinstance(s.image, Path) else getattr(s.image, "digest", s.image)
        h.update(json.dumps([s.id, s.prompt, image, s.region]).encode())
    return h.hexdigest()[:16]


def read_predictions(out: Path, settings: dict, n: int) -> tuple[dict[str, str], list[int]]:
    """Return (predictions by id, batch sizes) of all runs so far. n: questions that are asked now. Raises UserError if
    other settings made them, or the results beside them; if those are of more questions, or of another program."""
    done, sizes, headers = {}, set(), []
    for path in sorted(out.glob("pred.rank*.jsonl")):
        for line in read_lines(path)[0]:                    # without the half line of a stopped run
            if "settings" in line:
                headers.append((path, line["settings"]))
                sizes.add(line["batch_size"])
            else:
                done[line["id"]] = line["prediction"]
    results = out / "results.json"
    if results.exists():
        found = read_json(results)
        if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
            raise UserError(f"{results} is no evaluation's: --overwrite, or another --out")
        if found.get("n", 0) > n:
            raise UserError(f"{results} is of {found['n']} questions, this is of {n}: --overwrite, or another --out")
        headers.append((results, found["settings"]))
    if not headers and (out / "pred.jsonl").exists():
        raise UserError(f"{out / 'pred.jsonl'} is no evaluation's: --overwrite, or another --out")
    for path, old in headers:
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


def share_of(samples: list[Sample], rank: int, ranks: int) -> list[Sample]:
    """Return a rank's share: every ranks-th image with all questions about it."""
    groups = {}
    for s in samples:
        groups.setdefault((s.image, s.region) if s.image is not None else s.id, []).append(s)
    share = []
    for group in list(groups.values())[rank::ranks]:
        share += group
    return share
