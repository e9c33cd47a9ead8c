"""Rows → samples: what is asked about which image, and the reference answer."""
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from common.flags import UserError
from evaluation.benchmarks import BENCHMARKS, INSTRUCTIONS, OCR, YES_OR_NO, Benchmark, Source
from evaluation.files import Cell, missing, outline, read_rows

# Name of a column → its kind, and the kind of a list's elements.
KINDS = {"id": (str | int | float, None), "text": (str, None), "prompt": (str, None), "question": (str, None),
         "hint": (str, None), "options": (list, object), "ocr": (list, str)}


@dataclass
class Sample:
    """One question about one image."""
    id: str                                     # question_id; question_id#2 where a file repeats it
    prompt: str                                 # as asked; <image> is left out where it comes first
    image: Path | str | Cell | None = None      # a file, base64 text or a cell of a parquet file
    region: tuple | None = None                 # drawn on the image: see `picture`
    answer: str | list[str] | None = None       # None: not public
    category: str | None = None
    options: list[str] = field(default_factory=list)
    record: dict = field(default_factory=dict)  # what else scorers and submissions need


@dataclass
class Reading:
    """How to read a benchmark's files."""
    images: Path | None = None                  # the folder of the images
    labels: Path | None = None                  # their file or folder; None: beside the questions
    split: str | None = None                    # None: that of the first files found
    style: str | None = None                    # "llava"'s or "lmms"'s; None: by the kind of file
    ocr: bool | None = None                     # TextVQA's OCR line; None: as the style has it
    region: str = "bbox"                        # drawn for RefCOCO, or "seg"


@dataclass
class Loaded:
    """A benchmark as it was read."""
    samples: list[Sample]                       # in the file's order
    settings: dict                              # what of Reading changes the score
    files: list[str]
    counts: dict[str, int]                      # what a reader should know → how often
    max_new: int                                # tokens of an answer


@dataclass
class Questions:
    """One set of questions to a checkpoint, and where its results go."""
    name: str                   # "pope"; of own questions the file's stem; ", images shuffled"
    bench: str                  # key of BENCHMARKS
    benchmark: Benchmark
    loaded: Loaded
    samples: list[Sample]       # the first --limit of loaded.samples, their images shuffled or not
    settings: dict              # what the results depend on
    out: Path


def load_benchmark(name: str, data: Path, reading: Reading | None = None) -> Loaded:
    """Read a benchmark. data: its file, or the folder that holds it. Raises UserError."""
    benchmark, reading = BENCHMARKS[name], replace(reading or Reading())
    source, files = choose_source(name, data, reading.split)
    reading.split = reading.split or source.split
    if reading.style is None:
        reading.style = "lmms" if files[0].suffix == ".parquet" else "llava"
    found, names, counts = records(source, files), [str(p) for p in files], {}
    written = "text" in source.columns or ("prompt" in source.columns and name != "own")
    if reading.style == "lmms" and written:
        raise UserError(f"--style lmms: {files[0].name} holds questions as LLaVA asks them; "
                        "give raw ones")
    if source.labels is not None:
        labels = find_labels(source, reading, files[0], data)
        names += [str(p) for p in labels]
        left = join_labels(found, source, files, labels, reading.split)
        counts["labels without a question"] = left

    # Which rows are asked, and what a reader should know about them.
    of_split = [r for r in found if r.get("split") in (None, "", reading.split)]
    if not of_split:
        other = found[0]["split"]
        raise UserError(f"{files[0]} holds split {other}, not {reading.split}: --split {other}?")
    kept = [r for r in of_split if benchmark.keep(r)]
    several = [r for r in kept if isinstance(r.get("image"), list) and len(r["image"]) > 1]
    unclear = [r for r in kept if r.get("answer") in ("nan", "?")]
    counts["questions of another kind left out"] = len(found) - len(kept)
    counts["samples of which only the first image is shown"] = len(several)
    counts["reference answers that read nan or ?: taken for not public"] = len(unclear)

    # The questions, and what their numbers depend on.
    set_ocr(name, kept, reading, files[0])
    samples = make_samples(benchmark, kept, reading, files[0])
    settings = {"split": reading.split, "style": reading.style}
    if benchmark.summary == "circular":
        counts["questions with fewer rotations than options"] = count_rotations(samples)
    if name == "textvqa":
        lines = sum(OCR in s.prompt for s in samples)
        settings["ocr"] = f"on for {lines} of {len(kept)}"
        if lines in (0, len(kept)):
            settings["ocr"] = "on" if lines else "off"
    if name.startswith("refcoco"):
        settings["region"] = reading.region
    longest = benchmark.max_new
    if callable(longest):
        longest = longest(reading.style)
    return Loaded(samples, settings, names, counts, longest)


# -------------------------------------------------------------------------------------- which files
def patterns(source: Source, split: str | None) -> list[str]:
    """Return the file names of a source, as patterns, with the split filled in."""
    split = split or source.split
    return source.files.replace("{split}", split).replace("{SPLIT}", split.upper()).split()


def find_files(source: Source, folder: Path, split: str | None) -> list[Path]:
    """Return the files in a folder that match the first pattern that any matches; or the path
    itself, if it matches. Raises UserError for several files that are not shards of one."""
    for pattern in patterns(source, split):
        hits = [folder] if fnmatch(folder.name, pattern) else sorted(folder.glob(pattern))
        if len(hits) > 1 and not source.shards:
            names = ", ".join(p.name for p in hits)
            raise UserError(f"{folder} holds {names}: choose one with --data FILE")
        if hits:
            return hits
    return []


def choose_source(name: str, data: Path, split: str | None) -> tuple[Source, list[Path]]:
    """Return the first source of a benchmark whose files are there, and these files."""
    if not data.exists():
        raise UserError(f"--data {data} does not exist")
    # A split that no source is named after may be part of a file's name: RefCOCO's testA.
    sources = [s for s in BENCHMARKS[name].sources if split in (None, s.split)]
    sources = sources or [s for s in BENCHMARKS[name].sources if "{split}" in s.files]
    for s in sources:
        files = find_files(s, data, split)
        if files:
            return s, files
    asked = f"{name}, split {split}" if split else name
    if data.is_file():
        # The name tells nothing: refuse a file of another benchmark, then go by the suffix.
        for other, benchmark in BENCHMARKS.items():
            for s in benchmark.sources:
                if name != "own" and ".parquet" not in s.files and find_files(s, data, None):
                    theirs = f"{other}, split {s.split}"
                    raise UserError(f"{data} is by its name of {theirs}, not of {asked}")
        for s in sources:
            if Path(s.files.split()[0]).suffix == data.suffix:
                return s, [data]
    wanted = ", ".join(dict.fromkeys(p for s in sources for p in patterns(s, split)))
    there = sorted(p.name for p in data.iterdir())[:8] if data.is_dir() else [data.name]
    there = ", ".join(there) or "nothing"
    raise UserError(f"{data} holds no file of {asked}: looked for {wanted}; there is {there}")


# ---------------------------------------------------------------------------------- rows and labels
def records(source: Source, files: list[Path]) -> list[dict]:
    """Read rows and give their columns our names. Raises UserError for a missing column."""
    found = []
    for path in files:
        for n, row in enumerate(read_rows(path), 1):
            row["_n"], record = len(found), {}              # over all files: shards are one table
            for name, column in source.columns.items():
                try:
                    record[name] = value_of(row, column)
                    check_kind(name, record[name], column)
                except (KeyError, ValueError, IndexError, TypeError, AttributeError, ArithmeticError) as e:
                    what = f"an invalid {name} ({e})"
                    if isinstance(e, KeyError):
                        what = f"no column {e}"
                    columns = ", ".join(k for k in row if not k.startswith("_"))
                    where = f"{path}: row {n}"
                    raise UserError(f"{where} has {what}; its columns are {columns}") from None
            if "text" in record:
                record["question"] = bare(record["text"])
            found.append(record)
    return found


def check_kind(name: str, value, column) -> None:
    """Raise TypeError if a value is of another kind than prompts and scores need under this name."""
    kind, of = KINDS.get(name, (object, object))
    if value is None and (name == "hint" or str(column).startswith("?")):
        return
    if not isinstance(value, kind):
        raise TypeError(f"{repr(value)[:60]} is no {'list' if kind is list else 'text'}")
    if kind is list and not all(isinstance(v, of) for v in value):
        raise TypeError(f"{repr(value)[:60]} holds values of another kind")
    if name == "answer" and isinstance(value, list):
        # VQA's: each of ten people has one.
        if any(isinstance(v, dict) and "answer" not in v for v in value):
            raise TypeError("one of several has no answer")


def value_of(row: dict, column):
    """Return a row's value for one of a source's columns. See `Source`."""
    if callable(column):
        return column(row)
    if column.startswith("?"):
        return row.get(column[1:])
    return column.format(**row) if "{" in column else row[column]


def bare(text: str) -> str:
    """Return the question of a text that LLaVA wrote: without OCR tokens and instructions."""
    lines = without_ocr(text).split("\n")
    return "\n".join(line for line in lines if "\n" + line not in INSTRUCTIONS)


def without_ocr(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not line.startswith(OCR.strip()))


def match_text(text) -> str:
    """Return what texts are matched by: no case, single spaces, without MME's last sentence."""
    return " ".join(str(text).split()).lower().removesuffix(YES_OR_NO.lower()).strip()


def find_labels(source: Source, reading: Reading, file: Path, data: Path) -> list[Path]:
    """Return the files of labels: --labels, or those beside the questions."""
    place = reading.labels or (data if data.is_dir() else data.parent)
    labels = [place] if place.is_file() else find_files(source.labels, place, reading.split)
    if not labels:
        wanted = ", ".join(patterns(source.labels, reading.split))
        raise UserError(f"{place} holds no labels for {file.name}: looked for {wanted} "
                        "(--labels says where they are)")
    return labels


def join_labels(questions: list[dict], source: Source, files: list[Path], labels: list[Path],
                split: str) -> int:
    """Give questions what their labels say. Returns the number of labels left over.

    A question that is asked twice with two labels gets them in order. Raises UserError for a
    question without a label, for different labels of one question, and for strict labels left."""
    def key_of(record):
        return tuple(match_text(record[name]) for name in source.join)

    names, label_names = [", ".join(p.name for p in group) for group in (files, labels)]
    by_key = {}
    for label in records(source.labels, labels):
        if label.pop("split", None) in (None, split):
            by_key.setdefault(key_of(label), []).append(label)
    keys = [key_of(q) for q in questions]
    lost = [key for key in keys if key not in by_key]
    if lost:
        raise UserError(f"{len(lost)} of {len(keys)} questions of {names} have no label in "
                        f"{label_names}, the first {' · '.join(lost[0])}: the two are of different "
                        "releases or splits")
    times, used = Counter(keys), Counter()
    for question, key in zip(questions, keys):
        same = all(label == by_key[key][0] for label in by_key[key])
        if not same and len(by_key[key]) != times[key]:
            raise UserError(f"{label_names}: different labels for one question, {' · '.join(key)}")
        label = by_key[key][0 if same else used[key]]
        used[key] += 1
        question.update({k: v for k, v in label.items() if k not in ("id", "question")})
    left = [key for key in by_key if key not in used]
    if left and source.labels.strict:
        raise UserError(f"{len(left)} labels of {label_names} have no question in {names}, the "
                        f"first {' · '.join(left[0])}: the two are of different releases")
    return len(left)


def set_ocr(name: str, rows: list[dict], reading: Reading, file: Path) -> None:
    """Remove OCR tokens from records unless they are to be shown."""
    ocr = reading.ocr
    if ocr is not None and name != "textvqa":
        raise UserError(f"--ocr and --no-ocr are about textvqa's OCR line; {name} has none")
    if ocr and not any(r.get("ocr") is not None or OCR in r.get("text", "") for r in rows):
        raise UserError(f"--ocr: {file.name} holds no OCR tokens; "
                        "llava_textvqa_val_v051_ocr.jsonl and parquet do")
    if ocr or (ocr is None and reading.style == "llava"):
        return
    for r in rows:
        r["ocr"] = None
        if "text" in r:
            r["text"] = without_ocr(r["text"])


# ------------------------------------------------------------------------------------------ samples
def make_samples(benchmark: Benchmark, rows: list[dict], reading: Reading, file: Path) -> list:
    """Turn records into samples. A repeated id becomes id#2; UserError if it must not repeat."""
    samples, times = [], Counter()
    for r in rows:
        number = str(r["id"])
        times[number] += 1
        if times[number] > 1:
            if not benchmark.repeats:
                raise UserError(f"{file}: question id {number} is there twice")
            number = f"{number}#{times[number]}"
        image, category = r.get("image"), r.get("category")
        if isinstance(image, list):
            image = image[0] if image else None
        category = None if missing(category) or category == "default" else str(category)
        samples.append(Sample(
            id=number, prompt=prompt_of(benchmark, r, reading.style),
            image=locate(image, reading.images, file), region=outline(r, reading.region),
            answer=reference(r.get("answer")), category=category,
            options=[str(o) for o in r.get("options") or []], record=r))
    return samples


def count_rotations(samples: list[Sample]) -> int:
    """Note in each record of MMBench its question's rotations, of the whole file whatever --limit.
    Returns how many questions have fewer rotations than options (53 in release 20230712)."""
    questions = [int(s.id) % 10 ** 6 for s in samples]
    rotations, short = Counter(questions), set()
    for s, question in zip(samples, questions):
        s.record["rotations"] = rotations[question]
        if rotations[question] < len(s.options):
            short.add(question)
    return len(short)


def prompt_of(benchmark: Benchmark, r: dict, style: str) -> str:
    """Return a record's question with its suffix, once."""
    if "prompt" in r:
        return r["prompt"]
    text = r["text"] if "text" in r else benchmark.body(r, style)
    suffix = benchmark.suffix(r, style) if callable(benchmark.suffix) else benchmark.suffix
    return text if text.endswith(suffix) else text + suffix


def locate(image, images: Path | None, file: Path) -> Path | str | Cell | None:
    """Return a row's image: a file's path in --images, or what the file itself holds."""
    if missing(image):
        return None
    if isinstance(image, (Path, Cell)) or file.suffix == ".tsv":
        return image
    if not isinstance(image, str):
        raise UserError(f"{file} has image {str(image)[:60]}: give the name of one file")
    if images is None:
        raise UserError(f"{file} names images, such as {image}: "
                        "say with --images in which folder they are")
    return images / image


def reference(answer) -> str | list[str] | None:
    """Return a reference answer, or the list of them; None if it is not public."""
    if isinstance(answer, list):
        answers = [str(a["answer"] if isinstance(a, dict) else a) for a in answer]
        return answers if any(answers) else None
    return None if answer is None or answer != answer or answer in ("", "nan", "?") else str(answer)


def check_images_exist(samples: list[Sample]) -> None:
    """Raises UserError if image files are missing, with their number and the first of them."""
    files = dict.fromkeys(s.image for s in samples if isinstance(s.image, Path))
    lost = [file for file in files if not file.is_file()]
    if lost:
        raise UserError(f"{len(lost)} of {len(files)} images are not there, such as {lost[0]}: is "
                        "--images the folder that the names are relative to?")


def shuffle_images(samples: list[Sample]) -> list[Sample]:
    """Give each question another one's image, by a fixed permutation."""
    with_image = [s for s in samples if s.image is not None]
    others = iter(random.Random(0).sample(with_image, len(with_image)))
    shuffled = []
    for s in samples:
        other = s if s.image is None else next(others)
        shuffled.append(replace(s, image=other.image, region=other.region))
    return shuffled
