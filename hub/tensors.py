"""Files of weights: safetensors and .bin, whole or in shards. Checked before they are read; never unpickled."""
import contextlib
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.files import read_json
from common.flags import UserError
from common.parallel import whole


def check_start(path: Path) -> None:
    """Raises UserError for what is downloaded instead of weights when a download goes wrong."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(400)
    if head.startswith(b"version https://git-lfs"):
        real = re.search(rb"size (\d+)", head)
        real = f" ({int(real[1]) / 1e9:.2f} GB)" if real else ""
        raise UserError(f"{path} is a git-lfs pointer ({size} bytes), not the weights{real}: run git lfs pull")
    if size < 8:
        raise UserError(f"{path} is cut off: it has {size} bytes; download it again")
    if re.match(rb"\s*<(!doctype|html)|Access to model|Entry not found|\s*\{\"error", head, re.I):
        start = " ".join(head[:60].decode(errors="replace").split())
        raise UserError(f"{path} is a web page or an error message, not weights; it starts with {start!r}. Gated "
                        "repositories need an accepted licence and a token")


def check_safetensors(path: Path) -> None:
    """Raises UserError unless the file is whole; the library's own messages do not name the cause."""
    check_start(path)
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        if n > 100_000_000:
            raise UserError(f"{path} is not a safetensors file (unreadable header): download it again")
        if size < 8 + n:
            raise UserError(f"{path} is cut off in its header ({size} bytes): download it again")
        try:
            header = json.loads(f.read(n))
            end = 8 + n + max([t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"], default=0)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a safetensors file (unreadable header): download it again") from None
    if size != end:
        problem = "cut off" if size < end else "too long"
        raise UserError(f"{path} is {problem}: {size} bytes, but its header says {end}; download it again")


def is_mapped(path: Path) -> bool:
    """Are tensors read from the file where they are asked for? Not in a .bin of before PyTorch 1.6, which is no zip."""
    with open(path, "rb") as f:
        return path.suffix == ".safetensors" or f.read(2) == b"PK"


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin file, mapped into memory (a legacy one, of before PyTorch 1.6, is read)."""
    check_start(path)
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
    odd = [k for k, t in value.items() if not isinstance(t, torch.Tensor)]
    if odd:
        inner = " (a dict: save what is under that key)" if isinstance(value[odd[0]], dict) else ""
        kind = type(value[odd[0]]).__name__
        raise UserError(f"{path} does not hold a dict of tensors: {odd[0]!r} is a {kind}{inner}")
    return value


@contextlib.contextmanager
def open_tensors(path: Path):
    """Something with keys() and get_tensor(name)."""
    if path.suffix == ".safetensors":
        check_safetensors(path)
        with safe_open(path, "pt") as f:
            yield f
    else:
        tensors = read_bin(path)
        yield SimpleNamespace(keys=tensors.keys, get_tensor=tensors.__getitem__)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: safetensors before .bin. Never `*.bin`: optimizers end so too."""
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
    # TinyLLaVA Factory's own output keeps each part in a folder; LLaVA's stage 1 saves the projector alone.
    names = [f"{part}/pytorch_model.bin" for part in ("language_model", "vision_tower", "connector")]
    parts = [folder / name for name in [*names, "mm_projector.bin"] if (folder / name).is_file()]
    if parts:
        return parts
    holds = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "nothing: it does not exist"
    raise UserError(f"{folder} has no model.safetensors, pytorch_model.bin or index of shards; it holds {holds}")


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], write: bool = True, limit: float = 5e9) -> None:
    """model.safetensors, or shards of it with an index, as the hub cuts them: `limit` bytes each, and no more than that
    is in this process's memory at a time. Tensors that are cut over ranks are gathered one by one: then every rank must
    call, and write=False where nothing is to be written."""
    groups, size = [[]], 0
    for name, t in tensors.items():
        size += t.numel() * t.element_size()
        if size > limit and groups[-1]:
            groups, size = [*groups, []], t.numel() * t.element_size()
        groups[-1].append(name)
    files = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    for file, names in zip(files if len(files) > 1 else ["model.safetensors"], groups):
        part = {}
        for name in names:
            full = whole(tensors[name].detach())
            if write:
                part[name] = full.cpu().contiguous()
        if write:
            save_file(part, folder / file, metadata={"format": "pt"})
            os.chmod(folder / file, 0o644)                # the library makes it for its owner alone
    if write and len(files) > 1:
        places = {name: file for file, names in zip(files, groups) for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}, indent=1) + "\n")
