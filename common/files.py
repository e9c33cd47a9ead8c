"""JSON in and out: one reader and one writer, with errors that name the file and the line. Files and
folders that are written whole or not at all, by one process at a time."""
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.flags import UserError

LOCK = ".lock"                      # the file in a folder that says who writes there


def read_json(path: str | Path):
    """Return the value in a JSON file. Raises UserError if there is none; then it names what the folder holds."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UserError(f"{path} does not exist: there is no folder {path.parent}") from None
        holds = ", ".join(sorted(p.name for p in path.parent.iterdir())[:6])
        if not holds:
            raise UserError(f"{path} does not exist; the folder is empty") from None
        raise UserError(f"{path} does not exist; the folder holds: {holds}") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path} is not JSON ({e}): download it again") from None


def read_jsonl(path: str | Path) -> list:
    """Return the values of a JSONL file, one a line. Raises UserError with the number of an invalid line."""
    rows = []
    number = 0
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    rows.append(json.loads(line))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path} line {number}: not JSON ({e})") from None
    return rows


def read_lines(path: Path) -> tuple[list[dict], dict | None]:
    """Read a JSONL file of objects. Returns (rows, last): `last` is the text after the final newline if it parses,
    else None (a stopped run may leave half a line). Raises UserError for any other invalid line."""
    rows = []
    *lines, end = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(f"{path} line {number} is not a JSON object: {line[:60]}") from None
    try:
        return rows, dict(json.loads(end))
    except (ValueError, TypeError):
        return rows, None


def write_json(path: Path, value, indent: int | None = 1) -> None:
    """Write a JSON file whole or not at all: under a temporary name, then renamed."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)                 # a full disk leaves a part of it
        raise


def refuse_existing(path: str | Path | None, flag: str = "--out", ours: str | None = None) -> None:
    """Raise UserError if a file would be written over. ours: how one begins that may be replaced."""
    if path is None or not os.path.lexists(path):
        return
    if ours and Path(path).is_file():
        with open(path, "rb") as f:
            if f.read(len(ours.encode())) == ours.encode():
                return
    raise UserError(f"{flag} {path} exists already and is not written over: give another name, or "
                    "move it away")


# -------------------------------------------------------------------------------- one writer at a time
def lock(file) -> bool:
    """Lock an open file until it is closed or this process dies. Returns False if another has it.

    lockf, not flock, whose locks pass to the processes that prepare batches: they outlive a kill."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as e:
        print(f"warning: {file.name} cannot be locked ({e.strerror}): start no second command there")
    return os.fstat(file.fileno()).st_nlink > 0           # 0: its owner has just deleted it


@contextlib.contextmanager
def locked(folder: Path, first: bool = True) -> Iterator[None]:
    """Be the only process that writes to `folder`, which is made, and removed if nothing was written.
    first: False on all ranks but one, which holds the lock for them. Raises UserError if another
    process writes there."""
    if not first:
        yield
        return
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        if not lock(file):
            raise UserError(f"{folder} is in use: another process writes to it. Wait until it ends, "
                            "or give another --out")
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
    """Write a folder whole or not at all. Yields a folder with a temporary name, empty but for its
    lock. It is renamed to `out` at the end, and removed after an error."""
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
    crc = 0                                               # CRC-32 of its bytes
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def folder_digest(folder: str | Path, *patterns: str) -> str:
    """Hash the files of a folder whose names match: of each its size and 64 blocks of 64 KiB spread
    over it. Training changes weights everywhere, so this shows any change; hashing all of 14 GB would
    take longer than loading them."""
    h = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in Path(folder).glob(pattern)}):
        size = path.stat().st_size
        h.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for block in range(64):
                f.seek(block * max(0, size - 65536) // 63)
                h.update(f.read(65536))
    return h.hexdigest()[:16]
