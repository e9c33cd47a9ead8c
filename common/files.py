"""JSON in and out: one reader and one writer, with errors that name the file and the line."""
import json
import os
from pathlib import Path

from common.flags import UserError


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
