"""Rows → samples: what is asked about which image, and the reference answer."""
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from common.flags import UserError
from evaluation.benchmarks import BENCHMARKS, LETTER, OCR, SHORT, UNANSWERABLE, YES_OR_NO, Benchmark, Source
from evaluation.files import Cell, missing, outline, read


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


def load_benchmark(name: str, data: Path, images: Path | None = None, labels: Path | None = None, split: str | None = None,
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


def absent(samples: list[Sample]) -> None:
    """Raises UserError if image files are not there, with their number and the first."""
    files = dict.fromkeys(s.image for s in samples if isinstance(s.image, Path))
    lost = [f for f in files if not f.is_file()]
    if lost:
        raise UserError(f"{len(lost)} of {len(files)} images are not there, such as {lost[0]}: is --images the folder "
                        "that the names are relative to?")
