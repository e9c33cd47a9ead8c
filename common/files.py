"""JSON in and out: one reader and one writer, with errors that name the file and the line."""
import json
import os
import re
from pathlib import Path

from common.flags import UserError


def check_download(path: Path, what: str = "the weights", least: int = 8) -> None:
    """Raise UserError for what a failed download leaves: a git-lfs pointer, a web page, fewer than `least` bytes."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(400)
    if head.startswith(b"version https://git-lfs"):
        real = re.search(rb"size (\d{8,})", head)
        real = f" ({int(real[1]) / 1e9:.2f} GB)" if real else ""
        raise UserError(f"{path} is a git-lfs pointer ({size} bytes), not {what}{real}: run git lfs pull")
    pages = rb"\s*<(!doctype|html)|Access to model|Entry not found|Invalid username or password|\s*\{\"error"
    if re.match(pages, head, re.I):
        start = " ".join(head[:60].decode(errors="replace").split())
        raise UserError(f"{path} is a web page or an error message, not {what}; it starts with {start!r}. Gated "
                        "repositories need an accepted licence and a token")
    if size < least:
        raise UserError(f"{path} is cut off: it has {size} bytes; download it again")


def read_json(path: str | Path):
    """Return the value in a JSON file. Raises UserError if there is none; then it names what the folder holds."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))         # with or without a byte order mark
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UserError(f"{path} does not exist: there is no folder {path.parent}") from None
        holds = ", ".join(sorted(p.name for p in path.parent.iterdir())[:6])
        if not holds:
            raise UserError(f"{path} does not exist; the folder is empty") from None
        raise UserError(f"{path} does not exist; the folder holds: {holds}") from None
    except (ValueError, OSError) as e:
        if path.is_file():
            check_download(path, "JSON", least=0)
        raise UserError(f"{path} is not JSON ({e}): download it again") from None


def read_jsonl(path: str | Path) -> list:
    """Return the values of a JSONL file, one a line. Raises UserError with the number of an invalid line."""
    rows = []
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as f:
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
    *lines, end = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
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
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
