"""JSON in and out, with errors that name the file and the line. Files and folders are written
whole or not at all, by one process at a time."""
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.flags import UserError

KINDS = {dict: "a JSON object", list: "a list", str: "a text", int: "a whole number",
         float: "a number", bool: "true or false", type(None): "null"}
LOCK = ".lock"                      # the file in a folder that says who writes there


def check_download(path: Path, what: str = "the weights", least: int = 8) -> None:
    """Raise UserError for a failed download: a git-lfs pointer, a web page, under `least` bytes."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(400)
    if head.startswith(b"version https://git-lfs"):
        real = re.search(rb"size (\d{8,})", head)
        real = f" ({int(real[1]) / 1e9:.2f} GB)" if real else ""
        raise UserError(f"{path} is a git-lfs pointer ({size} bytes), not {what}{real}: run "
                        "git lfs pull")
    pages = rb"\s*<(!doctype|html)|Access to model|Entry not found|Invalid username or password|\s*\{\"error"
    if re.match(pages, head, re.I):
        start = " ".join(head[:60].decode(errors="replace").split())
        raise UserError(f"{path} is a web page or an error message, not {what}; it starts with "
                        f"{start!r}. Gated repositories need an accepted licence and a token")
    if size < least:
        raise UserError(f"{path} is cut off: it has {size} bytes; download it again")


def refuse_device(path: str | Path) -> None:
    """Raise UserError for a FIFO or a device, which may be read for ever."""
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise UserError(f"{path} is not a file")


def parse_json(text: str | bytes):
    """Return the JSON value of a text, which may begin with a BOM. Raises ValueError with the
    reason: also for half a character, which no file can hold, and for too deep nesting."""
    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = json.loads(text.removeprefix("\ufeff"))
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character, a lone escape of \\ud800 to \\udfff") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def read_json(path: str | Path, kind: type | None = None):
    """Return the value in a JSON file. kind: the type it must have. Raises UserError, which names
    what the folder holds if the file does not exist."""
    path = Path(path)
    refuse_device(path)
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UserError(f"{path} does not exist: there is no folder {path.parent}") from None
        names = sorted(p.name for p in path.parent.iterdir())[:6]
        state = f"holds: {', '.join(names)}" if names else "is empty"
        raise UserError(f"{path} does not exist; the folder {state}") from None
    except ValueError as e:
        check_download(path, "JSON", least=0)
        raise UserError(f"{path} is not JSON ({e}): download it again") from None
    if kind is not None and not isinstance(value, kind):
        raise UserError(f"{path} is not {KINDS[kind]} but {KINDS[type(value)]}: download it again")
    return value


def read_jsonl(path: str | Path) -> list:
    """Return the values of a JSONL file. Raises UserError with the number of an invalid line."""
    refuse_device(path)
    if not Path(path).exists():
        raise UserError(f"{path} does not exist")
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                if line.strip():
                    rows.append(parse_json(line))
            except ValueError as e:
                raise UserError(f"{path} line {number}: not JSON ({e})") from None
    return rows


def read_lines(path: Path) -> tuple[list[dict], dict | None]:
    """Read a JSONL file of objects. Returns (rows, last): `last` follows the final newline; it is
    None if a stopped run left half a line. Raises UserError for any other invalid line."""
    refuse_device(path)
    rows, last = [], None
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and number < len(lines):
            rows.append(value)
        elif isinstance(value, dict):
            last = value
        elif line.strip() and number < len(lines):
            raise UserError(f"{path} line {number} is not a JSON object: {line[:60]}")
    return rows, last


def parse_log_line(line: str) -> dict:
    """Return a line of metrics.jsonl: stage, step, and numbers by name. Raises ValueError."""
    row = parse_json(line)
    if not isinstance(row, dict) or type(row.get("stage")) is not str or type(row.get("step")) is not int:
        raise ValueError("it has no stage and step")
    for name, value in row.items():
        if row["stage"] in ("pretrain", "finetune") and name not in ("stage", "kind", "layers"):
            if not isinstance(value, int | float):
                raise ValueError(f"{name} is no number")
    return row


def read_log(path: Path) -> list[dict]:
    """Return the whole lines of metrics.jsonl: a run may be writing the last. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: give the --out folder of a run")
    rows = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(keepends=True), 1):
        try:
            if line.endswith("\n"):
                rows.append(parse_log_line(line))
        except ValueError as e:
            raise UserError(f"{path} line {number} cannot be read ({e}): remove it") from None
    return rows


def write_json(path: Path, value, indent: int | None = 1) -> None:
    """Write a JSON file whole or not at all: under a temporary name, then renamed."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)                 # a full disk leaves a part of it
        e.filename = str(path)
        raise


def refuse_existing(path: str | Path | None, flag: str = "--out", ours: str | None = None) -> None:
    """Raise UserError if a file would be written over, except one that begins with `ours`."""
    if path is None or not os.path.lexists(path):
        return
    if ours and Path(path).is_file():
        with open(path, "rb") as f:
            if f.read(len(ours.encode())) == ours.encode():
                return
    raise UserError(f"{flag} {path} exists already and is not written over: give another name, or "
                    "move it away")


# ----------------------------------------------------------------------------- one writer at a time
def lock(file) -> bool:
    """Lock an open file until it is closed or this process dies. Returns False if another has it.

    Not flock: its locks pass to the processes that prepare batches, which outlive a kill."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as e:
        print(f"warning: {file.name} cannot be locked ({e.strerror}): start no second command there")
    return os.fstat(file.fileno()).st_nlink > 0           # 0: its owner has just deleted it


@contextlib.contextmanager
def locked(folder: Path, first: bool = True) -> Iterator[None]:
    """Be the only process that writes to `folder`, which is made, and removed if it stays empty.
    Raises UserError if another one writes there. first: of all ranks, the one that locks it."""
    if not first:
        yield
        return
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "ab") as file:
        if not lock(file):
            raise UserError(f"{folder} is in use: another process writes to it. Wait until it ends,"
                            " or give another --out")
        try:
            yield
        finally:
            if folder.is_dir() and os.listdir(folder) == [LOCK]:
                os.unlink(folder / LOCK)
                for path in made:
                    with contextlib.suppress(OSError):    # something else is in there by now
                        path.rmdir()


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Write a folder whole or not at all. Yields one with a temporary name, empty but for its lock:
    renamed to `out` at the end, removed after an error."""
    temporary = out.parent / f".{out.name}.tmp"
    with locked(temporary):
        remove([p for p in temporary.iterdir() if p.name != LOCK])  # what a killed process left
        try:
            yield temporary
            os.replace(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        os.unlink(out / LOCK)


def remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def file_crc(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def files_digest(paths: Iterator[Path]) -> str:
    """Hash name, size and 64 blocks of 64 KiB of each file. Training changes weights everywhere, so
    this shows it; hashing all of 14 GB would take longer than loading them."""
    h = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        h.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for block in range(64):
                f.seek(block * max(0, size - 65536) // 63)
                h.update(f.read(65536))
    return h.hexdigest()[:16]
