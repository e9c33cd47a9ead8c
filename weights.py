"""Checkpoint folders ⇄ modules: strict, and with one copy of the weights in memory.

Modules are built on the meta device (no memory), then each tensor is read from its file, checked, cast and put in its
place. Nothing is skipped silently: a tensor missing, left over or of another shape stops with the file's name.

A checkpoint of ours is a folder: config.json (everything needed to rebuild it), model.safetensors (what was trained in
stage 1; everything after stage 2), state.pt (to resume), and copies of the tokenizer and of preprocessor_config.json.
"""
import dataclasses
import json
import os
import re
import shutil
import struct
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from config import UserError, read_json
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT

PARTS = {"vision_tower": "vision encoder", "multi_modal_projector": "projector", "language_model": "language model"}
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json")
CODE_VERSION = 1

# Names in released files → names in `Llava`. First match wins; None: known, and not needed.
RENAMES = [(re.compile(pattern), new) for pattern, new in [
    (r".*(rotary_emb\.inv_freq|position_ids)$", None),
    (r"(text_model\..*|logit_scale|(visual|text)_projection\.weight)$", None),
    (r"vision_model\.(.*)", r"vision_tower.\1"),
    (r"((embeddings|encoder|pre_layrnorm|post_layernorm)\..*)", r"vision_tower.\1"),
    (r"((model\.(embed_tokens|layers|norm)|lm_head)\..*)", r"language_model.\1"),
    (r"((vision_tower|multi_modal_projector|language_model)\..*)", r"\1"),
]]


# ------------------------------------------------------------------------------------------------ files
def check_safetensors(path: Path) -> None:
    """Raises UserError unless the file is whole; the library's own messages do not name the cause."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(200)
        if head.startswith(b"version https://git-lfs"):
            real = re.search(rb"size (\d+)", head)
            real = f" ({int(real[1]) / 1e9:.2f} GB)" if real else ""
            raise UserError(f"{path} is a git-lfs pointer ({size} bytes), not the weights{real}: run git lfs pull")
        if size < 8:
            raise UserError(f"{path} is cut off: it has {size} bytes; download it again")
        n = struct.unpack("<Q", head[:8])[0]
        if n > 100_000_000:
            raise UserError(f"{path} is not a safetensors file; it starts with {head[:40]!r}: download it again")
        if size < 8 + n:
            raise UserError(f"{path} is cut off in its header ({size} bytes): download it again")
        f.seek(8)
        try:
            header = json.loads(f.read(n))
            end = 8 + n + max([t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"], default=0)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a safetensors file (unreadable header): download it again") from None
    if size != end:
        problem = "cut off" if size < end else "too long"
        raise UserError(f"{path} is {problem}: {size} bytes, but its header says {end}; download it again")


def weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file() and not single.is_file():
        shards = sorted(set(read_json(index)["weight_map"].values()))
        absent = [s for s in shards if not (folder / s).is_file()]
        if absent:
            raise UserError(f"{index} names {len(absent)} of {len(shards)} shards that are not there: "
                            f"{', '.join(absent[:3])}; download them too")
        return [folder / s for s in shards]
    if single.is_file():
        return [single]
    holds = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "nothing: it does not exist"
    raise UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json; it holds {holds}")


def rename(key: str) -> str | None:
    """A released file's name for a tensor → ours; None if it is known and not needed, as it is if it is unknown."""
    for pattern, new in RENAMES:
        if match := pattern.match(key):
            return new and match.expand(new)
    return key


def find_tensors(folder: Path) -> dict[str, tuple[Path, str]]:
    """Every tensor of a folder under the name it has in `Llava`: name → (file, name in the file)."""
    found = {}
    for path in weight_files(folder):
        check_safetensors(path)
        with safe_open(path, "pt") as f:
            for key in f.keys():
                name = rename(key)
                if name in found:
                    raise UserError(f"{path} holds {key}, which {found[name][0].name} holds too ({found[name][1]})")
                if name:
                    found[name] = path, key
    unknown = [n for n in found if n.split(".")[0] not in PARTS]
    if unknown:
        raise UserError(f"{folder}: {len(unknown)} tensors belong to no part of the model, such as {unknown[0]}")
    return found


def fill(module: nn.Module, prefix: str, found: dict[str, tuple[Path, str]], source, dtype=None, device="cpu") -> None:
    """Puts the tensors under `prefix` into a module built on the meta device, each copied (a mapped file may change or
    vanish later) and cast on its way. dtype None: as stored. Raises UserError on any difference."""
    wanted = dict(module.named_parameters())
    tied = module.config.tie_word_embeddings if isinstance(module, Decoder) else False
    here = {name[len(prefix) + 1:]: place for name, place in found.items() if name.startswith(prefix + ".")}
    if tied:
        here.pop("lm_head.weight", None)
    what = PARTS[prefix]
    if not here:
        raise UserError(f"{source} has no {what}: give the folder of one")
    for problem, names in [("are missing", [n for n in wanted if n not in here]),
                           ("are left over", [n for n in here if n not in wanted])]:
        if names:
            raise UserError(f"{source}: {len(names)} tensors of the {what} {problem} ({', '.join(sorted(names)[:3])}"
                            f"{', …' if len(names) > 3 else ''}); its config.json describes another model")
    by_file = {}
    for name, (path, key) in here.items():
        by_file.setdefault(path, []).append((name, key))
    for path, items in by_file.items():
        with safe_open(path, "pt") as f:
            for name, key in items:
                tensor = f.get_tensor(key)
                if tensor.shape != wanted[name].shape:
                    raise UserError(f"{path}: {key} has shape {tuple(tensor.shape)}, but the config makes it "
                                    f"{tuple(wanted[name].shape)}")
                owner, _, leaf = name.rpartition(".")
                parameter = nn.Parameter(tensor.to(device, dtype or tensor.dtype, copy=True))
                setattr(module.get_submodule(owner), leaf, parameter)
    if tied:
        module.lm_head.weight = module.model["embed_tokens"].weight


# ------------------------------------------------------------------------------------------------ configurations
def pick(cls, fields: dict, required: tuple[str, ...], where: Path):
    """A config dataclass from the fields of a config.json that it knows."""
    absent = [r for r in required if r not in fields]
    if absent:
        raise UserError(f"{where} lacks {', '.join(absent)}: it is not the config of a {cls.__name__[:-6]}")
    return cls(**{f.name: fields[f.name] for f in dataclasses.fields(cls) if fields.get(f.name) is not None})


def vision_config(folder: str | Path) -> VisionConfig:
    path = Path(folder) / "config.json"
    c = read_json(path)
    c = {"model_type": "clip_vision_model", **c["vision_config"]} if "vision_config" in c else c
    if c.get("model_type") != "clip_vision_model":
        raise UserError(f"{path} has model_type {c.get('model_type')!r}; a CLIP vision encoder is supported")
    if c.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise UserError(f"{path} has hidden_act {c['hidden_act']!r}; CLIP's quick_gelu is supported")
    return pick(VisionConfig, c, (), path)


def decoder_config(folder: str | Path) -> DecoderConfig:
    path = Path(folder) / "config.json"
    c = read_json(path)
    if c.get("model_type") in ("nanoalign", "llava"):
        c = {"model_type": "llama", **c["text_config"]}
    if c.get("model_type") != "llama":
        raise UserError(f"{path} has model_type {c.get('model_type')!r}; llama is supported")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    for field, value, ok in [("rope scaling", kind, kind == "default"),
                             ("hidden_act", c.get("hidden_act", "silu"), c.get("hidden_act", "silu") == "silu"),
                             ("attention_bias", c.get("attention_bias"), not c.get("attention_bias")),
                             ("mlp_bias", c.get("mlp_bias"), not c.get("mlp_bias")),
                             ("quantization_config", "…", "quantization_config" not in c)]:
        if not ok:
            raise UserError(f"{path} asks for {field} {value!r}, which is not supported")
    if "rope_theta" in rope:                                              # transformers 5 keeps it here
        c = {**c, "rope_theta": rope["rope_theta"]}
    return pick(DecoderConfig, c, (), path)


# ------------------------------------------------------------------------------------------------ loading
def choose_device(device: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where to compute, and in what: `auto` is the GPU if there is one, and bfloat16 where the GPU has it."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no CUDA device here: use --device cpu, or auto")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.device(device), getattr(torch, dtype)


def load_vision(folder: str | Path, dtype: torch.dtype | None = None, device="cpu") -> ViT:
    """The vision encoder of a released or own folder. dtype None: as stored."""
    with torch.device("meta"):
        vit = ViT(vision_config(folder))
    fill(vit, "vision_tower", find_tensors(Path(folder)), folder, dtype, device)
    return vit


def load_llm(folder: str | Path, dtype: torch.dtype | None = None, device="cpu") -> Decoder:
    """The decoder, with its head, of a released or own folder. dtype None: as stored."""
    with torch.device("meta"):
        llm = Decoder(decoder_config(folder))
    fill(llm, "language_model", find_tensors(Path(folder)), folder, dtype, device)
    return llm


def load_projector(folder: str | Path, vision_size: int, hidden_size: int, dtype=None, device="cpu") -> Projector:
    """The projector of a checkpoint of ours."""
    with torch.device("meta"):
        projector = Projector(vision_size, hidden_size)
    fill(projector, "multi_modal_projector", find_tensors(Path(folder)), folder, dtype, device)
    return projector


def load(folder: str | Path, vision: str | Path | None = None, llm: str | Path | None = None,
         dtype: torch.dtype | None = None, device="cpu") -> Llava:
    """A whole model from a checkpoint of ours. A stage-1 checkpoint holds the projector alone and names the folders of
    the rest; `vision` and `llm` say where those are now. Raises UserError if a part cannot be found."""
    folder = checkpoint_folder(folder)
    c = read_json(folder / "config.json")
    whole = c["stage"] == "finetune"
    vision, llm = (folder, folder) if whole else (vision or c["vision"], llm or c["llm"])
    for flag, base in [("--vision", vision), ("--llm", llm)]:
        if not Path(base).is_dir():
            raise UserError(f"{folder} was trained on {base}, which is not there now: say where it is with {flag}")
    vision, llm = load_vision(vision, dtype, device), load_llm(llm, dtype, device)
    projector = load_projector(folder, vision.config.hidden_size, llm.config.hidden_size, dtype, device)
    return Llava(vision, projector, llm, c["vision_layer"])


# ------------------------------------------------------------------------------------------------ our checkpoints
def checkpoints(run: str | Path, stage: str = "*") -> list[Path]:
    """Complete checkpoints of a run's folder, oldest first: <stage>-<step>, stage 1 before stage 2."""
    found = [p for p in Path(run).glob(f"{stage}-*") if re.fullmatch(r"(pretrain|finetune)-\d+", p.name)]
    return sorted(found, key=lambda p: (p.name.startswith("finetune"), int(p.name.split("-")[1])))


def checkpoint_folder(path: str | Path) -> Path:
    """A checkpoint's folder, or the newest in a run's folder. Raises UserError if it is neither."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a checkpoint's folder, or the --out folder of a run")
    if not (path / "config.json").is_file() and checkpoints(path):
        return checkpoints(path)[-1]
    if read_json(path / "config.json").get("model_type") != "nanoalign":
        raise UserError(f"{path} is not a checkpoint of a run (its config.json has no model_type nanoalign)")
    return path


def save_checkpoint(folder: Path, model: Llava, trained: set[str], config: dict, state: dict) -> None:
    """Writes a checkpoint folder under a temporary name and renames it, so that a killed run leaves no half of one.

    trained: names of the parameters to store; config: goes into config.json with the shapes of the parts;
    state: tensors and plain values for `torch.load(weights_only=True)`."""
    temporary = folder.parent / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for base in (config["vision"], config["llm"]):
        for name in COPIED:
            if (Path(base) / name).is_file():
                shutil.copyfile(Path(base) / name, temporary / name)
    text_config = {"model_type": "llama", **dataclasses.asdict(model.language_model.config)}
    vision = {"model_type": "clip_vision_model", **dataclasses.asdict(model.vision_tower.config)}
    config = {"model_type": "nanoalign", "code_version": CODE_VERSION, **config,
              "vision_layer": model.vision_layer, "vision_config": vision, "text_config": text_config}
    (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if n in trained}
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    torch.save(state, temporary / "state.pt")
    for path in temporary.iterdir():
        with open(path, "rb") as f:
            os.fsync(f.fileno())                          # a rename must not overtake the data on its way to the disk
    os.replace(temporary, folder)
