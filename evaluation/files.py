"""Files of benchmarks → rows: JSONL, JSON, TSV, parquet, MME's folder. Images stay where they are until asked for."""
import ast
import base64
import binascii
import csv
import hashlib
import io
import json
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw

from common.files import read_jsonl
from common.flags import UserError
from data import open_image


# ------------------------------------------------------------------------------------------------ images
@dataclass(frozen=True)
class Cell:
    """An image inside a parquet file, read when it is needed. Two cells of the same bytes are the same image."""
    digest: str
    path: str = field(compare=False)
    group: int = field(compare=False)           # the row group, and the row in it
    row: int = field(compare=False)
    column: str = field(compare=False)
    n: int | None = field(compare=False)        # in a column of lists


@lru_cache(maxsize=1)
def row_group(path: str, group: int, column: str):
    from pyarrow.parquet import ParquetFile
    return ParquetFile(path).read_row_group(group, columns=[column]).column(0)


def picture(image: Path | str | Cell, region: tuple | None = None) -> Image.Image:
    """A decoded image: a file, base64 text or a parquet cell. region: ("bbox", (x,y,w,h)) or ("seg", (x,y,x,y,…)) is
    drawn on it, a line of one pixel in red or white, as lmms-eval does. Raises ValueError with a short reason."""
    if isinstance(image, Path):
        image = open_image(image)
    else:
        try:
            if isinstance(image, Cell):
                value = row_group(image.path, image.group, image.column)[image.row].as_py()
                data = (value if image.n is None else value[image.n])["bytes"]
            else:
                data = base64.b64decode(image, validate=True)
            image = Image.open(io.BytesIO(data))
            image.load()
        except (OSError, SyntaxError, binascii.Error, Image.DecompressionBombError) as e:
            raise ValueError(f"not an image ({type(e).__name__})") from None
    if region is not None:
        image = image.convert("RGB")
        kind, xy = region
        if kind == "bbox":
            x, y, w, h = xy
            ImageDraw.Draw(image).rectangle([x, y, x + w, y + h], outline="red")
        else:
            ImageDraw.Draw(image).polygon(list(xy))
    return image


def outline(r: dict, region: str) -> tuple | None:
    """What is to be drawn on the image: see `picture`."""
    if region not in r:
        return None
    xy = r[region]
    return region, tuple(xy[0] if xy and isinstance(xy[0], list) else xy)


# ------------------------------------------------------------------------------------------------ files → rows
def read(path: Path) -> list[dict]:
    """The rows of a file (or of MME's folder) by its kind, each with _n, its number, and _file, the file's stem."""
    kinds = {".jsonl": read_jsonl, ".json": read_json_rows, ".tsv": read_tsv, ".parquet": read_parquet}
    if not path.is_dir() and path.suffix not in kinds:
        raise UserError(f"{path} is of no kind that is read here: .jsonl, .json, .tsv, .parquet")
    rows = read_mme(path) if path.is_dir() else kinds[path.suffix](path)
    for n, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {n + 1} is not a set of named values: {str(row)[:60]}")
        row.update(_n=n, _file=path.stem)
    if not rows:
        raise UserError(f"{path} is empty: it holds no row")
    return rows


def read_json_rows(path: Path) -> list:
    """A list, the list in an object's questions, annotations or data, an object of objects (its keys become _key), or,
    as POPE's label files are, JSON lines named .json."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return read_jsonl(path)
    if isinstance(value, dict):
        for name in ("questions", "annotations", "data"):
            if isinstance(value.get(name), list):
                return value[name]
        if all(isinstance(v, dict) for v in value.values()):
            return [{**v, "_key": k} for k, v in value.items()]
        return [value]                                          # JSON lines, but only one
    return value


def missing(value) -> bool:
    """Is a table's cell empty? Empty, "nan", "none" and NaN all occur."""
    return value is None or value != value or isinstance(value, str) and value.strip().lower() in ("", "nan", "none")


def read_tsv(path: Path) -> list[dict]:
    """A table with a base64 image a row; a short image cell is the index of the row that has it (VLMEvalKit's way)."""
    csv.field_size_limit(sys.maxsize)                           # images are far above csv's default of 131072
    with open(path, encoding="utf-8-sig", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    for n, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(f"{path}: row {n} has {'more' if None in row else 'fewer'} cells than the header: "
                            "is the file cut off?")
    if not rows or "image" not in rows[0]:
        return rows
    cells, same = {row.get("index"): row["image"] for row in rows}, {}
    for n, row in enumerate(rows, 1):
        cell, seen = row["image"], set()
        while len(cell) <= 64:
            if cell not in cells or cell in seen:
                raise UserError(f"{path}: row {n} has its image in row {cell!r}, which is not there")
            seen.add(cell)
            cell = cells[cell]
        row["image"] = same.setdefault(cell, cell)              # one copy in memory of what rotations repeat
        if cell.startswith("["):
            row["image"] = ast.literal_eval(cell)
    return rows


def read_parquet(path: Path) -> list[dict]:
    """Rows without the images' bytes: in their place stands where they are."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path.name} is parquet, which needs pyarrow: pip install pyarrow, or give the benchmark's "
                        "JSONL, JSON or TSV files") from None
    try:
        file = ParquetFile(path)
    except Exception as e:                                      # pyarrow's errors have no common class but this
        raise UserError(f"{path} is not parquet ({str(e).splitlines()[0]}): download it again") from None

    def cell(value, group, row, column, n=None):
        if not isinstance(value, dict) or value.keys() != {"bytes", "path"}:
            return value
        if value["bytes"] is None:
            return value["path"]
        return Cell(hashlib.sha1(value["bytes"]).hexdigest(), str(path), group, row, column, n)
    rows = []
    for group in range(file.num_row_groups):
        first = len(rows)
        for batch in file.iter_batches(64, row_groups=[group]):
            for row in batch.to_pylist():
                at = group, len(rows) - first
                rows.append({c: [cell(v, *at, c, n) for n, v in enumerate(value)] if isinstance(value, list) else
                             cell(value, *at, c) for c, value in row.items()})
    return rows


def read_mme(folder: Path) -> list[dict]:
    """MME's release: <category>/{*.jpg,*.txt} or <category>/{images,questions_answers_YN}; lines of question, tab, Yes
    or No."""
    rows = []
    for path in sorted([*folder.glob("*/*.txt"), *folder.glob("*/questions_answers_YN/*.txt")]):
        category = folder / path.relative_to(folder).parts[0]
        pictures = [p for d in (path.parent, category, category / "images") for p in sorted(d.glob(f"{path.stem}.*"))
                    if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                question, tab, answer = line.rstrip().rpartition("\t")
                if not tab:
                    raise UserError(f"{path}: no tab between question and answer in {line[:60]!r}")
                rows.append({"category": category.name, "stem": path.stem, "question": question, "answer": answer,
                             "question_id": f"{category.name}/{pictures[0].name if pictures else path.stem}",
                             "image": pictures[0] if pictures else category / f"{path.stem}.jpg"})
    return rows
