"""Files of weights: safetensors and .bin, whole or in shards. Checked before they are read; never unpickled."""
import contextlib
import json
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open

from common.files import check_download, parse_json, read_json, write_json
from common.flags import UserError
from common.parallel import whole

CODE_VERSION = 1                    # of our checkpoints
DIGESTS = "digests.json"            # beside a checkpoint's weights: name of a tensor → its digest
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ITEM_BYTES = dict(BOOL=1, U8=1, I8=1, F8_E4M3=1, F8_E5M2=1, I16=2, U16=2, F16=2, BF16=2, I32=4,
                  U32=4, F32=4, I64=8, U64=8, F64=8, C64=8)
MAX_HEADER = 100_000_000            # bytes; the library refuses a longer one too


def check_safetensors(path: Path) -> None:
    """Raise UserError unless a file is as long as its header says. (The library names no cause.)"""
    check_download(path)
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]              # of the header, which follows
        if length <= MAX_HEADER and size < 8 + length:
            raise UserError(f"{path} is cut off in its header ({size} bytes): download it again")
        header = f.read(length) if length <= MAX_HEADER else b""
    try:
        problem = header_problem(parse_json(header), size - 8 - length, 8 + length)
    except ValueError:
        problem = "is not a safetensors file (unreadable header)"
    if problem:
        raise UserError(f"{path} {problem}: download it again")


def header_problem(header, size: int, start: int) -> str | None:
    """Return what is wrong with the header of a safetensors file, or None. Tensors must fill the
    `size` bytes after it, from `start`, one after the other, each with what its shape takes."""
    spans = []
    for name, t in header.items() if isinstance(header, dict) else [("", {})]:
        if name == "__metadata__":
            continue
        fields = t if isinstance(t, dict) else {}
        dtype, shape, offsets = (fields.get(k) for k in ("dtype", "shape", "data_offsets"))
        if not (isinstance(dtype, str) and is_sizes(shape) and is_sizes(offsets)):
            return f"is not a safetensors file (unreadable header, at {name[:60]!r})"
        if dtype not in ITEM_BYTES:
            return f"holds {name[:60]} in {dtype[:20]!r}, a dtype that is not known"
        spans.append((offsets, math.prod(shape) * ITEM_BYTES[dtype], name))
    end = 0
    for offsets, wanted, name in sorted(spans):
        if len(offsets) != 2 or offsets[0] != end or offsets[1] - end != wanted:
            return f"has a header that is wrong about {name[:60]}: it lies at {offsets} and has {wanted} bytes"
        end = offsets[1]
    if size != end:
        problem = "cut off" if size < end else "too long"
        return f"is {problem}: {start + size} bytes, but its header says {start + end}"
    return None


def is_sizes(value) -> bool:
    """True for a list of numbers that sizes and offsets can have."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def is_mapped(path: Path) -> bool:
    """True if tensors are read on access. A .bin from before PyTorch 1.6 is no zip: read whole."""
    with open(path, "rb") as f:
        return path.suffix == ".safetensors" or f.read(2) == b"PK"


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .bin file. Raises UserError for anything but a dict of tensors."""
    value = unpickle(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a dict of tensors but a {type(value).__name__}")
    for key, t in value.items():
        if not isinstance(key, str) or not isinstance(t, torch.Tensor):
            hint = " (save what is under that key)" if isinstance(t, dict) else ""
            raise UserError(f"{path} does not hold a dict of tensors: {key!r} is a {type(t).__name__}{hint}")
        if t.is_quantized or t.layout != torch.strided or t.device.type != "cpu":
            raise UserError(f"{path}: {key} is a quantised, sparse or empty tensor: save it as "
                            "plain numbers")
    return value


def unpickle(path: Path):
    """Return what torch.save wrote, mapped into memory where its format allows; no code in it is
    run. Raises UserError for any other file, and for a packed one, which could fill the memory."""
    check_download(path)
    size, unpacked, zipped = path.stat().st_size, 0, is_mapped(path)
    if zipped and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut off ({size} bytes): download it again")
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked <= size:
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds Python objects other than tensors, and loading those can "
                        "run code: re-save it as safetensors on a machine you trust") from None
    except Exception as e:                                      # a spoiled pickle raises anything
        reason = (str(e).splitlines() or [type(e).__name__])[0][:80]
        raise UserError(f"{path} cannot be read ({reason}): download it again") from None
    raise UserError(f"{path} unpacks to {unpacked:,} bytes, but torch.save packs nothing")


@contextlib.contextmanager
def open_tensors(path: Path, check: bool = True) -> Iterator:
    """Open a file of weights: an object with keys() and get_tensor(name). check: compare each tensor
    with its digest, which reads all of it. Raises UserError for a damaged file."""
    if path.suffix == ".safetensors":
        check_safetensors(path)
        digests = path.parent / DIGESTS
        wanted = read_json(digests, dict) if check and digests.is_file() else {}
        with safe_open(path, "pt") as f:
            def get_tensor(name: str) -> torch.Tensor:
                tensor = f.get_tensor(name)
                if name in wanted and wanted[name] != digest(tensor):
                    raise UserError(f"{path}: {name} is not what was saved, by its digest in "
                                    f"{DIGESTS}: take another checkpoint, or remove {DIGESTS} if "
                                    "you changed the tensor yourself")
                return tensor
            yield SimpleNamespace(keys=f.keys, get_tensor=get_tensor)
    else:
        tensors = read_bin(path)
        yield SimpleNamespace(keys=tensors.keys, get_tensor=tensors.__getitem__)


def digest(tensor: torch.Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes: shows a single changed bit, at 5 GB a second."""
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy()):08x}"


def is_finite(tensor: torch.Tensor) -> bool:
    """True if no number is NaN or infinite. One pass, no copy: NaN is both least and greatest."""
    return tensor.numel() == 0 or all(math.isfinite(bound) for bound in tensor.aminmax())


def check_weight(path: Path, key: str, tensor: torch.Tensor, read: bool) -> None:
    """Raise UserError unless a stored tensor is of floats and (checked only if `read`) finite."""
    if tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.itemsize == 1:
            kind += ": 8-bit weights are not supported"
        raise UserError(f"{path}: {key} is stored in {kind}; get the model in floats of 16, 32 "
                        "or 64 bits")
    if read and not is_finite(tensor):
        raise UserError(f"{path}: {key} holds numbers that are not finite: take an earlier "
                        "checkpoint, or download it again")


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder's weights; safetensors win over .bin. Raises UserError if there
    are none. Does not match *.bin: optimizer states end in .bin too."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / name, folder / f"{name}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            places = read_json(index, dict).get("weight_map")
            shards = list(places.values()) if isinstance(places, dict) else [None]
            if not all(isinstance(shard, str) for shard in shards):
                raise UserError(f"{index} has no weight_map of file names: download it again")
            shards = sorted(set(shards))
            absent = [s for s in shards if not (folder / s).is_file()]
            if absent:
                raise UserError(f"{index} names {len(absent)} of {len(shards)} shards that are not "
                                f"there: {', '.join(absent[:3])}; download them too")
            return [folder / s for s in shards]
    # TinyLLaVA Factory has a folder for each part; LLaVA's stage 1 saves the projector alone.
    names = ("language_model/pytorch_model.bin", "vision_tower/pytorch_model.bin",
             "connector/pytorch_model.bin", "mm_projector.bin")
    if parts := [folder / name for name in names if (folder / name).is_file()]:
        return parts
    holds = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "nothing: it does not exist"
    raise UserError(f"{folder} has no model.safetensors, pytorch_model.bin or index of shards; it holds {holds}")


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None,
                 write: bool = True, limit: float = 5e9) -> dict[str, str]:
    """Write model.safetensors, or shards of at most `limit` bytes with an index, as on the Hugging
    Face hub. dtype, write: see write_tensors. Returns the digest of each tensor written."""
    sizes = {name: t.numel() * (dtype or t.dtype).itemsize for name, t in tensors.items()}
    shards, size = [{}], 0
    for name, t in tensors.items():
        if shards[-1] and size + sizes[name] > limit:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += sizes[name]
    if len(shards) == 1:
        return write_tensors(folder / "model.safetensors", tensors, dtype, write)
    places, digests = {}, {}
    for n, shard in enumerate(shards, 1):
        file = f"model-{n:05}-of-{len(shards):05}.safetensors"
        digests |= write_tensors(folder / file, shard, dtype, write)
        places |= dict.fromkeys(shard, file)
    if write:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)
    return digests


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None,
                  write: bool = True) -> dict[str, str]:
    """Write a safetensors file tensor by tensor: no more than one is copied to the host at a time.

    dtype: cast to it; None: as they are. Tensors sharded over ranks are gathered one by one: every
    rank must call, with write=False on all but the one that writes. The bytes are those of the
    library's save_file. Returns the digest of each tensor written."""
    kinds = {name: dtype or t.dtype for name, t in tensors.items()}
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))   # so all are aligned
    digests = {}
    if not write:
        for name in order:
            whole(tensors[name].detach())
        return digests

    # The length of the header in 8 bytes, the header as JSON padded to 8 bytes, the tensors.
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * kinds[name].itemsize
        header[name] = {"dtype": DTYPES[kinds[name]], "shape": list(tensors[name].shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            full = whole(tensors[name].detach()).to("cpu", kinds[name]).contiguous()
            digests[name] = digest(full)
            f.write(full.reshape(-1).view(torch.uint8).numpy())
    return digests
