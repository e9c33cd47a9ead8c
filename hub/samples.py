"""A file of millions of LLaVA samples, opened without reading it: an index says where each one lies.

    data.json ─ elements (.jsonl: lines) ─→ samples ─ entry ─→ .data.json.index ─ mapped ─→ SampleFile

The index is made once, by reading the file from end to end, and is valid for its size and
modification time. It holds what a run needs of all samples at its start: lengths, images, which are
malformed. All processes of a machine map the same pages of it. A sample is read when it is used.
"""
import codecs
import contextlib
import hashlib
import json
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import file_crc, lock, read_jsonl, refuse_device
from common.flags import UserError
from data import IMAGE

SAMPLES = "a non-empty list of samples [{id, image, conversations}, …]"
BLOCK = 1 << 22                                                 # bytes read at a time
DECODE = json.JSONDecoder().raw_decode
WHITE_SPACE = re.compile(r"[ \t\r\n]*")                         # as JSON defines it
HEADER = struct.Struct("<8sqqII")   # VERSION, the data's size, mtime and crc, crc of the entries
VERSION = b"samples2"
ENTRY = np.dtype([("start", "<u8"), ("size", "<u4"),            # in bytes
                  ("image", "<u8"),                             # image_key; 0: text alone
                  ("characters", "<u4"),                        # of all its turns
                  ("answered", "?"), ("malformed", "?")])


# ------------------------------------------------------------------------------------- one sample
def sample_problem(s) -> str | None:
    """Return why `s` is not a LLaVA sample, or None."""
    if not isinstance(s, dict) or not isinstance(s.get("conversations"), list) or not s["conversations"]:
        return "lacks conversations, a list of {from, value} turns"
    image = s.get("image")
    if image is not None and not isinstance(image, str):
        return f"has image {str(image)[:60]}: one image a sample is supported, given as its file name"
    turns = s["conversations"]
    for t in turns:
        if not isinstance(t, dict) or not isinstance(t.get("value"), str):
            return "has a turn without a text value"
        if t.get("from") not in ("human", "gpt"):
            return f"has a turn from {t.get('from')!r}; human and gpt are known"
    if any(a["from"] == b["from"] for a, b in zip(turns, turns[1:])):
        return "has two turns in a row from the same side"
    if any(IMAGE in t["value"] for t in turns if t["from"] == "gpt"):
        return f"has an {IMAGE} mark in an answer: the image belongs to a question"
    count = sum(t["value"].count(IMAGE) for t in turns)
    if count > 1:
        return f"has {count} {IMAGE} marks: one image a sample is supported"
    if count != (image is not None):
        has = "no file in image but an" if count else "a file in image but no"
        return f"has {has} {IMAGE} mark in its text"
    try:
        "".join([image or "", *(t["value"] for t in turns)]).encode()
    except UnicodeEncodeError:
        return "has half a character in its text (a lone escape of \\ud800 to \\udfff), which no tokenizer takes"


def image_key(name: str) -> int:
    """Return 64 bits that stand for an image's file name; never 0."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1


def entry(start: int, size: int, s) -> tuple:
    """Return the ENTRY of a sample that lies at these bytes."""
    if sample_problem(s):
        return start, size, 0, 0, False, True
    turns, image = s["conversations"], s.get("image")
    key = 0 if image is None else image_key(image)
    answered = any(t["from"] == "gpt" for t in turns[1:])       # an answer to a question before it
    return start, size, key, sum(len(t["value"]) for t in turns), answered, False


# --------------------------------------------------------------------------------------- one file
class Window:
    """The part of a UTF-8 file in memory: `text[at:]`, which begins at byte `start` of the file."""
    def __init__(self, file, block: int):
        self.file, self.block, self.start = file, block, file.tell()
        self.text, self.at, self.ended = "", 0, False
        self.decode = codecs.getincrementaldecoder("utf-8")().decode

    def byte(self, at: int) -> int:
        """Return the byte of the file at which character `at` of `text` begins."""
        return self.start + len(self.text[self.at:at].encode())

    def advance(self, at: int) -> None:
        self.start, self.at = self.byte(at), at

    def more(self, size: int) -> None:
        """Append `size` bytes of the file. Raises ValueError with the byte that is not UTF-8."""
        block = self.file.read(size)
        self.ended = not block
        try:
            self.text, self.at = self.text[self.at:] + self.decode(block, self.ended), 0
        except UnicodeDecodeError as e:
            raise ValueError(f"not UTF-8, {e.reason}: byte {self.byte(len(self.text)) + e.start}") from None

    def peek(self) -> str:
        """Skip white space and return the next character; "" at the end of the file."""
        while True:
            self.advance(WHITE_SPACE.match(self.text, self.at).end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at:self.at + 1]
            self.more(self.block)

    def value(self):
        """Read the JSON value that begins here. Raises ValueError with the byte that is invalid."""
        size = self.block
        while True:
            try:
                value, end = DECODE(self.text, self.at)
                if end + 2 < len(self.text) or self.ended:      # else it may go on: 1 of 1e+9
                    self.advance(end)
                    return value
            except json.JSONDecodeError as e:
                # Of a value that goes on after the window, the decoder rejects the last characters
                # (at most those of "-Infinity" or "\ud83d\ude00"), or a string without an end.
                # Anything else is invalid however the text goes on.
                cut = e.pos > len(self.text) - 16 or e.msg.startswith("Unterminated string")
                if self.ended or not cut:
                    raise ValueError(f"{e.msg}: byte {self.byte(e.pos)}") from None
            except RecursionError:
                raise ValueError(f"nested too deeply: byte {self.start}") from None
            self.more(size)
            size *= 2                                           # so a long value is retried rarely


def elements(file, path: Path, block: int = BLOCK) -> Iterator[tuple]:
    """Yield (first byte, bytes, value) of each element of a JSON list. Raises UserError."""
    window = Window(file, block)
    try:
        mark = window.peek()
        if mark != "[":
            window.value()
            raise UserError(f"{path} is not {SAMPLES}; a file with a sample a line is called .jsonl")
        while mark != "]":
            window.advance(window.at + 1)                       # past the mark
            if window.peek() == "]" and mark == "[":
                break                                           # an empty list
            start = window.start
            value = window.value()
            yield start, window.start - start, value
            mark = window.peek()
            if mark not in (",", "]"):
                raise ValueError(f"Expecting ',' or ']': byte {window.start}")
        window.advance(window.at + 1)
        if window.peek():
            raise ValueError(f"Extra data: byte {window.start}")
    except ValueError as e:
        size = os.fstat(file.fileno()).st_size
        raise UserError(f"{path} is not JSON ({e} of {size}): mend it, or download it again") from None


def lines(file, path: Path) -> Iterator[tuple]:
    """Yield the same of a JSONL file, a value a line. Raises UserError with the invalid line."""
    start = file.tell()
    for n, line in enumerate(file, 1):
        try:
            if line.strip():
                yield start, len(line), json.loads(line.decode())
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} line {n}: not JSON ({e})") from None
        start += len(line)


# --------------------------------------------------------------------------------------- its index
def make_index(path: Path) -> bytes:
    """Return the index of a file: HEADER and an ENTRY a sample. Raises UserError if it is empty."""
    parts = []
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        file.seek(len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0)
        found = lines(file, path) if path.suffix == ".jsonl" else elements(file, path)
        with tqdm(total=stat.st_size, desc=f"index of {path.name}", unit="B", unit_scale=True,
                  delay=2, leave=False) as bar:
            while rows := [entry(*f) for f in islice(found, 1 << 14)]:
                parts.append(np.array(rows, ENTRY).tobytes())
                bar.update(file.tell() - bar.n)
    if not parts:
        raise UserError(f"{path} is not {SAMPLES}")
    entries = b"".join(parts)
    return HEADER.pack(VERSION, stat.st_size, stat.st_mtime_ns, file_crc(path), zlib.crc32(entries)) + entries


def write_index(path: Path, place: Path, index: bytes) -> None:
    """Write an index whole or not at all: other processes may read and write there meanwhile."""
    place.parent.mkdir(parents=True, exist_ok=True)
    left = list(place.parent.glob(f"{place.name}.*.tmp"))
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f"{place.name}.", suffix=".tmp", delete=False) as out:
        lock(out)
        for other in left:
            with contextlib.suppress(OSError), open(other, "ab") as file:
                if lock(file):                                  # else its process still writes
                    other.unlink()
        try:
            out.write(index)
            out.flush()
            os.chmod(out.name, path.stat().st_mode & 0o666)     # as readable as the data
            os.replace(out.name, place)
        except BaseException:
            Path(out.name).unlink(missing_ok=True)
            raise


def read_index(path: Path, place: Path) -> tuple[np.ndarray, int] | None:
    """Map an index, see open_index; None if it is absent, damaged or of another state of a file."""
    stat = path.stat()
    try:
        with open(place, "rb") as f:
            head = HEADER.unpack(f.read(HEADER.size))
            entries = np.memmap(f, ENTRY, "r", HEADER.size)
    except (OSError, ValueError, struct.error):
        return None
    valid = head == (VERSION, stat.st_size, stat.st_mtime_ns, head[3], zlib.crc32(entries))
    return (entries, head[3]) if valid else None


def open_index(path: Path) -> tuple[np.ndarray, int]:
    """Map the index of a file: (samples,) of ENTRY, and the file's crc. The first use writes it,
    beside the file or else in the user's cache. Raises UserError if neither can be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoalign"
    name = hashlib.blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()
    places = [path.with_name(f".{path.name}.index"), cache / f"{name}.index"]
    for place in places:
        if (found := read_index(path, place)) is not None:
            return found
    index = make_index(path)
    for place in places:
        try:
            write_index(path, place, index)
        except OSError as e:
            why = e.strerror
            continue
        if (found := read_index(path, place)) is not None:
            return found
        raise UserError(f"{path} changed while it was read: start again when it is whole")
    raise UserError(f"the index of {path} can be written neither beside it nor in {cache} ({why}): set "
                    "XDG_CACHE_HOME to a folder with room")


# ------------------------------------------------------------------------------------- its samples
class SampleFile:
    """file[i] → a sample, read on access. numbers (n,): which samples of the file these are."""
    def __init__(self, path: str | Path, numbers: np.ndarray | None = None):
        self.path = Path(path)
        refuse_device(path)
        try:
            self.file = open(self.path, "rb", buffering=0)
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror}") from None
        self.entries, self.crc = open_index(self.path)
        self.numbers = np.arange(len(self.entries), dtype=np.int32) if numbers is None else numbers

    def __reduce__(self):               # a copy in a spawned worker maps the same index again
        return SampleFile, (self.path, self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> dict:
        e = self.entries[self.numbers[i]]
        raw = os.pread(self.file.fileno(), int(e["size"]), int(e["start"]))      # keeps no position
        try:
            return json.loads(raw)
        except ValueError:
            raise UserError(f"{self.path} changed after it was opened: start again") from None

    def column(self, name: str) -> np.ndarray:
        """Return a field of ENTRY for each sample, (n,)."""
        return self.entries[name][self.numbers]

    def keep(self, mask: np.ndarray) -> None:
        """Keep only the samples for which mask (n,) bool is true."""
        self.numbers = self.numbers[mask]

    def fingerprint(self) -> str:
        """Return how many samples are used, and which; the file's size and crc. Reads all of it: a file rewritten
        with the size and time of before would be read by the old index. Raises UserError for one."""
        if file_crc(self.path) != self.crc:
            raise UserError(f"{self.path} was rewritten, but has the size and time of before: touch it, and "
                            "start again")
        which, size = zlib.crc32(self.numbers), self.path.stat().st_size
        return f"{len(self)} samples (crc {which:08x}) of {size} bytes (crc {self.crc:08x})"

    def with_image(self, names: list[str]) -> np.ndarray:
        """Return (n,) bool: true for samples whose image is one of these."""
        return np.isin(self.column("image"), np.array([image_key(n) for n in names], np.uint64))

    def lengths(self) -> np.ndarray:
        """Return (n,) int32: characters of each sample, negative for text alone, for data.Order."""
        size = np.maximum(self.column("characters"), 1).astype(np.int32)
        return np.where(self.column("image") != 0, size, -size)


def read_samples(path: str | Path) -> tuple[SampleFile, int]:
    """Return the samples of a LLaVA JSON or JSONL file that have an answer, and how many have none.
    Raises UserError with the number and id of the first malformed sample."""
    samples = SampleFile(path)
    malformed = np.flatnonzero(samples.column("malformed"))
    if len(malformed):
        s = samples[malformed[0]]
        name = f" (id {s['id']})" if isinstance(s, dict) and "id" in s else ""
        raise UserError(f"{path}: sample {malformed[0]}{name} {sample_problem(s)}")
    answered = samples.column("answered")
    samples.keep(answered)
    return samples, int((~answered).sum())


# -------------------------------------------------------------------------------------- questions
def read_questions(path: str | Path, images: str | Path | None) -> list[dict]:
    """Read JSONL of {question_id, image, text, answer, category}. All but `text` may be absent:
    then the line's number, no image, no answer, "all". Raises UserError with the invalid line."""
    rows, seen = [], set()
    for n, r in enumerate(read_jsonl(path), 1):
        where = f"{path} line {n}"
        if not isinstance(r, dict) or not isinstance(r.get("text"), str):
            raise UserError(f"{where} lacks a text, the question")
        r = {"question_id": n, "image": None, "answer": None, "category": "all", **r}
        if str(r["question_id"]) in seen:
            raise UserError(f"{where}: question_id {r['question_id']!r} is there twice")
        seen.add(str(r["question_id"]))
        if not isinstance(r["image"], str | None):
            raise UserError(f"{where} has image {str(r['image'])[:60]}: give the name of one file")
        if r["image"] is not None and images is None:
            raise UserError(f"{where} names an image: say with --images in which folder it is")
        rows.append(r)

    if not rows:
        raise UserError(f"{path} is empty: it holds no question")
    named = [r["image"] for r in rows if r["image"] is not None]
    missing = [name for name in named if not (Path(images) / name).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of the images that {path} names are not in {images}, such as {missing[0]}")
    return rows


def question_file(ckpt: Path, data: str | None, images: str | None, default: str) -> tuple[Path, Path | None]:
    """Return (question file, image folder): the given ones, or the toy's beside its checkpoint."""
    if data is not None:
        return Path(data), None if images is None else Path(images)
    toy = ckpt.parent / "data"
    if not (toy / default).is_file():
        raise UserError(f"say with --data FILE.jsonl --images DIR what to ask: {ckpt} has no toy "
                        "data beside it")
    return toy / default, toy / "images"
