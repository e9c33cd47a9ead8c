"""Files of benchmarks → rows: JSONL, JSON, TSV, parquet, MME's folder. Images are decoded later."""
import ast
import base64
import binascii
import csv
import hashlib
import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw

from common.files import parse_json, read_jsonl, refuse_device, write_text
from common.flags import UserError
from common.images import open_image


# ------------------------------------------------------------------------------------------- images
@dataclass(frozen=True, order=True)
class Cell:
    """Where an image is in a parquet file. Sorted, cells are read a row group at a time."""
    path: str
    group: int                                  # row group
    column: str
    row: int                                    # row in the group
    n: int | None                               # place in the list, in a column of lists

    @property
    def name(self) -> str:
        return f"{Path(self.path).name} {self.group} {self.column} {self.row} {self.n}"


@lru_cache(maxsize=1)
def row_group(path: str, group: int, column: str):
    """Read one column of a row group. The last one is kept: neighbouring images share it."""
    from pyarrow.lib import ArrowException
    from pyarrow.parquet import ParquetFile
    try:
        return ParquetFile(path).read_row_group(group, columns=[column]).column(0)
    except (ArrowException, OSError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{path}: an image cannot be read ({reason}): download it again") from None


def image_bytes(cell: Cell) -> bytes | None:
    """Read the file of an image from a parquet file."""
    value = row_group(cell.path, cell.group, cell.column)[cell.row].as_py()
    return (value if cell.n is None else value[cell.n])["bytes"]


def picture(image: Path | str | Cell, region: tuple | None = None) -> Image.Image:
    """Decode an image: a file, base64 text or a parquet cell. Raises ValueError with a reason.

    region, drawn as lmms-eval does: ("bbox", (x,y,w,h)) in red, ("seg", (x,y,x,y,…)) in white."""
    data = image
    try:
        if isinstance(image, Cell):
            data = image_bytes(image)
        elif isinstance(image, str):
            data = base64.b64decode(image, validate=True)
    except (OSError, binascii.Error, TypeError) as e:
        raise ValueError(f"not an image ({type(e).__name__})") from None
    decoded = open_image(data)
    if region is None:
        return decoded

    decoded = decoded.convert("RGB")
    pen = ImageDraw.Draw(decoded)
    kind, xy = region
    if kind == "bbox":
        x, y, w, h = xy
        pen.rectangle([x, y, x + w, y + h], outline="red")
    else:
        pen.polygon(list(xy))
    return decoded


def group_by_image(samples: list) -> list[list[int]]:
    """Group samples by the image they show. Returns their numbers, a list a group. Cells of parquet
    files are compared by their bytes, which are read here, each row group once."""
    cells = sorted({s.image for s in samples if isinstance(s.image, Cell)})
    shown = {cell: hashlib.sha1(image_bytes(cell) or b"").digest() for cell in cells}
    groups = {}
    for i, s in enumerate(samples):
        key = s.id if s.image is None else (shown.get(s.image, s.image), s.region)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def outline(record: dict, kind: str) -> tuple | None:
    """Return the region that `picture` draws for a record, None if its benchmark has none. Raises
    UserError for a record without numbers."""
    if kind not in record:
        return None
    xy = record[kind]
    if isinstance(xy, list) and xy and isinstance(xy[0], list):     # several polygons
        xy = xy[0]
    if not isinstance(xy, list) or not all(isinstance(v, int | float) for v in xy):
        raise UserError(f"question {record['id']} has no region in {kind}: {str(xy)[:60]}")
    return kind, tuple(xy)


# ------------------------------------------------------------------------------------- files → rows
def read_rows(path: Path) -> list[dict]:
    """Read a file by its suffix, or MME's folder. Adds to each row _file, the file's stem."""
    refuse_device(path)
    if path.is_dir():
        rows = read_mme(path)
    elif path.suffix in READERS:
        rows = READERS[path.suffix](path)
    else:
        raise UserError(f"{path} cannot be read: files end in {', '.join(READERS)}")
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {n} is not a set of named values: {str(row)[:60]}")
        row["_file"] = path.stem
    if not rows:
        raise UserError(f"{path} is empty: it holds no row")
    return rows


def write_jsonl(path: Path, rows: list) -> None:
    """Write one JSON value a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_rows(path: Path) -> list:
    """Return the rows of a JSON file: a list; an object with a list in questions, annotations or
    data; an object of objects (their keys become _key); or JSON lines, as POPE's labels are."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError:
        return read_jsonl(path)
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    for name in ("questions", "annotations", "data"):
        if isinstance(value.get(name), list):
            return value[name]
    if value and all(isinstance(v, dict) for v in value.values()):
        return [{**v, "_key": k} for k, v in value.items()]
    return [value]                              # JSON lines of a single line


def missing(value) -> bool:
    """True if a table's cell is empty: "", "nan", "none" and NaN all occur."""
    if value is None or value != value:
        return True
    return isinstance(value, str) and value.strip().lower() in ("", "nan", "none")


def literal(value):
    """Return the list that a text writes in Python, as MMMU's and MMBench's do; else the value."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    return value


def read_tsv(path: Path) -> list[dict]:
    """Read a table with a base64 image a row. A short image cell is the index of the row that holds
    the image (VLMEvalKit's convention)."""
    csv.field_size_limit(sys.maxsize)           # images are far longer than csv's default of 131072
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = list(csv.DictReader(f, delimiter="\t"))
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} is not a table in UTF-8 ({e}): download it again") from None
    for n, row in enumerate(rows, 1):
        if None in row or None in row.values():
            count = "more" if None in row else "fewer"
            raise UserError(f"{path}: row {n} has {count} cells than the header: "
                            "is the file cut off?")
    if not rows or "image" not in rows[0]:
        return rows
    cells = {row.get("index"): row["image"] for row in rows}
    first = {}                                  # one copy of each image
    for n, row in enumerate(rows, 1):
        cell, seen = row["image"], set()
        while len(cell) <= 64:
            if cell not in cells or cell in seen:
                where = f"row {cell!r}, which is not there"
                raise UserError(f"{path}: row {n} has its image in {where}")
            seen.add(cell)
            cell = cells[cell]
        row["image"] = first.setdefault(cell, cell)
        if cell.startswith("["):
            images = row["image"] = literal(cell)
            if not isinstance(images, list) or not all(isinstance(v, str) for v in images):
                raise UserError(f"{path}: row {n} has no image, nor a list of images: {cell[:60]}")
    return rows


def read_parquet(path: Path) -> list[dict]:
    """Read rows without the bytes of images. An image becomes a Cell, which says where it is."""
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path.name} is parquet, which needs pyarrow: pip install pyarrow, or "
                        "give the benchmark's JSONL, JSON or TSV files") from None
    try:
        return rows_of_parquet(path, ParquetFile(path))
    except (ArrowException, OSError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{path} is not parquet ({reason}): download it again") from None


def rows_of_parquet(path: Path, file) -> list[dict]:
    # An image is {bytes, path}: all but its bytes is read.
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    columns = [leaf for leaf in leaves if not leaf.endswith(".bytes")]

    def cell(value, n=None):                    # of the row and column that the loop below is at
        is_image = isinstance(value, dict) and value.keys() == {"path"}
        return Cell(str(path), group, column, number, n) if is_image else value

    rows = []
    for group in range(file.num_row_groups):
        number = 0                              # of the row in its group
        for batch in file.iter_batches(row_groups=[group], columns=columns):
            for row in batch.to_pylist():
                for column, value in row.items():
                    row[column] = cell(value)
                    if isinstance(value, list):
                        row[column] = [cell(v, n) for n, v in enumerate(value)]
                rows.append(row)
                number += 1
    return rows


def read_mme(folder: Path) -> list[dict]:
    """Read MME's release: <category>/{*.jpg,*.txt} or <category>/{images,questions_answers_YN}.
    A line of a text file is a question, a tab, and Yes or No."""
    rows = []
    for path in sorted([*folder.glob("*/*.txt"), *folder.glob("*/questions_answers_YN/*.txt")]):
        refuse_device(path)
        category = folder / path.relative_to(folder).parts[0]
        image = category / f"{path.stem}.jpg"   # unless another file is there
        for place in (category / "images", category):
            for file in sorted(place.glob(f"{path.stem}.*")):
                if file.suffix.lower() in (".jpg", ".jpeg", ".png"):
                    image = file
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if not line.strip():
                continue
            question, tab, answer = line.rstrip().rpartition("\t")
            if not tab:
                raise UserError(f"{path}: no tab between question and answer in {line[:60]!r}")
            rows.append({"category": category.name, "stem": path.stem, "image": image,
                         "question_id": f"{category.name}/{image.name}", "question": question,
                         "answer": answer})
    return rows


READERS = {".jsonl": read_jsonl, ".json": read_json_rows, ".tsv": read_tsv,
           ".parquet": read_parquet}
