"""JSON in and out: one reader, one writer, errors that name the file."""
import json
import os
from pathlib import Path

from common.flags import UserError


def read_json(path: Path):
    """The value in a JSON file. Raises UserError if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        holds = ", ".join(sorted(p.name for p in path.parent.iterdir())[:6]) if path.parent.is_dir() else ""
        raise UserError(f"{path} does not exist" + (f"; the folder holds: {holds}" if holds else
                        f": there is no folder {path.parent}" if not path.parent.is_dir() else "; the folder is empty")
                        ) from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path} is not JSON ({e}): download it again") from None


def read_jsonl(path: Path) -> list:
    """A value a line. Raises UserError with the line's number."""
    out = []
    try:
        with open(path, encoding="utf-8") as f:
            for n, line in enumerate(f, 1):            # noqa: B007, for the message below
                if line.strip():
                    out.append(json.loads(line))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path} line {n}: not JSON ({e})") from None
    return out


def read_lines(path: Path) -> tuple[list[dict], dict | None]:
    """The objects of a file of predictions, a line each, and what stands behind the last newline: an object, or None
    where there is nothing, or what a stopped run has cut off. Raises UserError naming another line that is none."""
    found = []
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for n, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(f"{path} line {n} is not a JSON object: {line[:60]}") from None
    try:
        return found, dict(json.loads(last))
    except (ValueError, TypeError):
        return found, None


def write_json(path: Path, value) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
