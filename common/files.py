"""JSON in and out: one reader and one writer, with errors that name the file and the line."""
import json
import os
from pathlib import Path

from common.flags import UserError

KINDS = {dict: "a JSON object", list: "a list", str: "a text", int: "a whole number",
         float: "a number", bool: "true or false", type(None): "null"}


def refuse_device(path: str | Path) -> None:
    """Raise UserError for a FIFO or a device, which may be read for ever."""
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise UserError(f"{path} is not a file")


def parse_json(text: str | bytes):
    """Return the JSON value of a text, which may begin with a BOM. Raises ValueError with the reason:
    also for half a character, which no file can hold, and for nesting deeper than Python's stack."""
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
    """Return the value in a JSON file. kind: the type that it must have; None: any.

    Raises UserError if there is none; then it names what the folder holds."""
    path = Path(path)
    refuse_device(path)
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UserError(f"{path} does not exist: there is no folder {path.parent}") from None
        holds = ", ".join(sorted(p.name for p in path.parent.iterdir())[:6])
        if not holds:
            raise UserError(f"{path} does not exist; the folder is empty") from None
        raise UserError(f"{path} does not exist; the folder holds: {holds}") from None
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}): download it again") from None
    if kind is not None and not isinstance(value, kind):
        raise UserError(f"{path} is not {KINDS[kind]} but {KINDS[type(value)]}: download it again")
    return value


def read_jsonl(path: str | Path) -> list:
    """Return the values of a JSONL file, one a line. Raises UserError with the number of an invalid line."""
    rows = []
    refuse_device(path)
    if not Path(path).exists():
        raise UserError(f"{path} does not exist")
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                if line.strip():
                    rows.append(parse_json(line))
            except ValueError as e:
                raise UserError(f"{path} line {number}: not JSON ({e})") from None
    return rows


def read_lines(path: Path) -> tuple[list[dict], dict | None]:
    """Read a JSONL file of objects. Returns (rows, last): `last` is the text after the final newline if it parses,
    else None (a stopped run may leave half a line). Raises UserError for any other invalid line."""
    def parse(line: str) -> dict | None:
        try:
            value = parse_json(line)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    refuse_device(path)
    rows = []
    *lines, end = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(parse(line))
            if rows[-1] is None:
                raise UserError(f"{path} line {number} is not a JSON object: {line[:60]}")
    return rows, parse(end)


def parse_log_line(line: str) -> dict:
    """Return a line of metrics.jsonl: its stage, its step, and numbers by name. Raises ValueError."""
    row = parse_json(line)
    if not isinstance(row, dict) or type(row.get("stage")) is not str or type(row.get("step")) is not int:
        raise ValueError("it has no stage and step")
    for name, value in row.items():
        if row["stage"] in ("pretrain", "finetune") and name not in ("stage", "kind", "layers"):
            if not isinstance(value, int | float):
                raise ValueError(f"{name} is no number")
    return row


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
