"""Files of weights: safetensors and .bin, whole or in shards. Checked before they are read; never unpickled."""
import contextlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.files import check_download, read_json, write_json
from common.flags import UserError
from common.parallel import whole

MAX_HEADER = 100_000_000            # bytes; the library refuses a longer one too


def check_safetensors(path: Path) -> None:
    """Raise UserError unless the file is as long as its header says. (The library's own messages name no cause.)"""
    check_download(path)
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]                      # of the header, which follows
        if length <= MAX_HEADER and size < 8 + length:
            raise UserError(f"{path} is cut off in its header ({size} bytes): download it again")
        header = f.read(length) if length <= MAX_HEADER else b""
    try:
        ends = [t["data_offsets"][1] for name, t in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a safetensors file (unreadable header): download it again") from None
    end = 8 + length + max(ends, default=0)
    if size != end:
        problem = "cut off" if size < end else "too long"
        raise UserError(f"{path} is {problem}: {size} bytes, but its header says {end}; download it again")


def is_mapped(path: Path) -> bool:
    """True if tensors are read from the file on access. A .bin from before PyTorch 1.6 is no zip: it is read whole."""
    with open(path, "rb") as f:
        return path.suffix == ".safetensors" or f.read(2) == b"PK"


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .bin file, mapped into memory where its format allows. Raises UserError for anything but
    a dict of tensors; no code in the file is run."""
    check_download(path)
    zipped = is_mapped(path)
    if zipped and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut off ({path.stat().st_size} bytes): download it again")
    try:
        value = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds Python objects other than tensors, and loading those can run code: re-save it "
                        "as safetensors on a machine you trust") from None
    except (OSError, RuntimeError, EOFError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({str(e).splitlines()[0][:80]}): download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a dict of tensors but a {type(value).__name__}")
    for key, t in value.items():
        if not isinstance(t, torch.Tensor):
            hint = " (save what is under that key)" if isinstance(t, dict) else ""
            raise UserError(f"{path} does not hold a dict of tensors: {key!r} is a {type(t).__name__}{hint}")
    return value


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator:
    """Open a file of weights: an object with keys() and get_tensor(name). Raises UserError for a damaged file."""
    if path.suffix == ".safetensors":
        check_safetensors(path)
        with safe_open(path, "pt") as f:
            yield f
    else:
        tensors = read_bin(path)
        yield SimpleNamespace(keys=tensors.keys, get_tensor=tensors.__getitem__)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights; safetensors win over .bin. Raises UserError if there are none.
    Never matches *.bin: optimizer states end in .bin too."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / name, folder / f"{name}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            places = read_json(index)
            if not isinstance(places, dict) or not isinstance(places.get("weight_map"), dict):
                raise UserError(f"{index} has no weight_map: download it again")
            shards = sorted(set(places["weight_map"].values()))
            absent = [s for s in shards if not (folder / s).is_file()]
            if absent:
                raise UserError(f"{index} names {len(absent)} of {len(shards)} shards that are not there: "
                                f"{', '.join(absent[:3])}; download them too")
            return [folder / s for s in shards]
    # TinyLLaVA Factory keeps each part in a folder of its own; LLaVA's stage 1 saves the projector alone.
    names = [f"{part}/pytorch_model.bin" for part in ("language_model", "vision_tower", "connector")]
    parts = [folder / name for name in [*names, "mm_projector.bin"] if (folder / name).is_file()]
    if parts:
        return parts
    holds = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "nothing: it does not exist"
    raise UserError(f"{folder} has no model.safetensors, pytorch_model.bin or index of shards; it holds {holds}")


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None, write: bool = True,
                 limit: float = 5e9) -> None:
    """Write model.safetensors, or shards of at most `limit` bytes with an index, as the Hugging Face hub has them.

    dtype: cast to it; None: as they are. One file's tensors at a time are copied. Tensors sharded over ranks are
    gathered one by one: every rank must call, with write=False on all but the one that writes."""
    shards, size, total = [[]], 0, 0
    for name, t in tensors.items():
        bytes_ = t.numel() * (dtype or t.dtype).itemsize
        if shards[-1] and size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
        total += bytes_
    places = {}
    for n, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{n:05}-of-{len(shards):05}.safetensors"
        part = {}
        for name in names:
            full = whole(tensors[name].detach())
            if write:
                part[name] = full.to("cpu", dtype).contiguous()
        if write:
            save_file(part, folder / file, metadata={"format": "pt"})
            os.chmod(folder / file, 0o644)                # the library makes it readable for its owner alone
        places |= dict.fromkeys(names, file)
    if write and len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
