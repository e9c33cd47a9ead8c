"""Files of weights: safetensors and .bin, whole or in shards. Checked before they are read; never unpickled."""
import contextlib
import json
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.files import read_json, write_json
from common.flags import UserError
from common.parallel import whole

CODE_VERSION = 1                    # of our checkpoints
DIGESTS = "digests.json"            # beside a checkpoint's weights: the name of a tensor → its digest
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
MAX_HEADER = 100_000_000            # bytes; the library refuses a longer one too


def check_download(path: Path, what: str = "the weights", least: int = 8) -> None:
    """Raise UserError for what a failed download leaves: a git-lfs pointer, a web page, fewer than `least` bytes."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(400)
    if head.startswith(b"version https://git-lfs"):
        real = re.search(rb"size (\d{8,})", head)
        real = f" ({int(real[1]) / 1e9:.2f} GB)" if real else ""
        raise UserError(f"{path} is a git-lfs pointer ({size} bytes), not {what}{real}: run git lfs pull")
    if re.match(rb"\s*<(!doctype|html)|Access to model|Entry not found|\s*\{\"error", head, re.I):
        start = " ".join(head[:60].decode(errors="replace").split())
        raise UserError(f"{path} is a web page or an error message, not {what}; it starts with {start!r}. Gated "
                        "repositories need an accepted licence and a token")
    if size < least:
        raise UserError(f"{path} is cut off: it has {size} bytes; download it again")


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
        digests = path.parent / DIGESTS
        wanted = read_json(digests) if digests.is_file() else {}
        with safe_open(path, "pt") as f:
            def get_tensor(name: str) -> torch.Tensor:
                tensor = f.get_tensor(name)
                if wanted.get(name, "") not in ("", digest(tensor)):
                    raise UserError(f"{path}: {name} is not what was saved, by its digest in {DIGESTS}: take another "
                                    f"checkpoint, or remove {DIGESTS} if you changed the tensor yourself")
                return tensor
            yield SimpleNamespace(keys=f.keys, get_tensor=get_tensor)
    else:
        tensors = read_bin(path)
        yield SimpleNamespace(keys=tensors.keys, get_tensor=tensors.__getitem__)


def digest(tensor: torch.Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes: it shows a single changed bit, and reads 5 GB a second."""
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy()):08x}"


def is_finite(tensor: torch.Tensor) -> bool:
    """True if no number of a tensor is NaN or infinite. One pass without a copy: NaN is both least and greatest."""
    return tensor.numel() == 0 or all(math.isfinite(bound) for bound in tensor.aminmax())


def check_weight(path: Path, key: str, tensor: torch.Tensor) -> None:
    """Raise UserError for a stored tensor that is no weight: it is not of floats, or not finite."""
    if tensor.dtype not in FLOATS:
        raise UserError(f"{path}: {key} is stored as {str(tensor.dtype).removeprefix('torch.')}; weights of 16, 32 and "
                        "64-bit floats are read: get this model in one of them")
    if not is_finite(tensor):
        raise UserError(f"{path}: {key} holds numbers that are not finite: take an earlier checkpoint, or download it "
                        "again")


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
                 limit: float = 5e9) -> dict[str, str]:
    """Write model.safetensors, or shards of at most `limit` bytes with an index, as the Hugging Face hub has them.

    dtype: cast to it; None: as they are. One file's tensors at a time are copied. Tensors sharded over ranks are
    gathered one by one: every rank must call, with write=False on all but the one that writes. Returns the digest of
    each tensor written."""
    shards, size, total, digests = [[]], 0, 0, {}
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
                digests[name] = digest(part[name])
        if write:
            save_file(part, folder / file, metadata={"format": "pt"})
            os.chmod(folder / file, 0o644)                # the library makes it readable for its owner alone
        places |= dict.fromkeys(names, file)
    if write and len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return digests
