"""Checkpoint folders ⇄ modules: strict, and with one copy of the weights in memory.

Modules are built on the meta device (no memory), then each tensor is read from its file, checked, cast and put in its
place. Nothing is skipped silently: a tensor missing, left over or of another shape stops with the file's name.

    python weights.py inspect DIR        what is in a folder
    python weights.py export CKPT OUT    a trained checkpoint → a llava-hf folder, for transformers

A checkpoint of ours is a folder: config.json (everything needed to rebuild it), model.safetensors (what was trained in
stage 1; everything after stage 2), state.pt (to resume), tokenizer.json and preprocessor_config.json.
"""
import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from config import UserError, parse, read_json, run
from data import FAMILY_TEMPLATE, ImageProcessor, begin, end
from model import ACTIVATIONS, Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT
from parallel import placed, whole
from tokenizer import load_tokenizer

PARTS = {"vision_tower": "vision encoder", "multi_modal_projector": "projector", "language_model": "language model"}
CODE_VERSION = 1

# Names in released files → names in `Llava`: every rule is tried once, in this order. A name that becomes "" is known
# and not needed. vision_tower.… is CLIP's or SigLIP's own tree, language_model.… LLaMA's.
RENAMES = [(re.compile(pattern), new) for pattern, new in [
    (r".*(rotary_emb\.inv_freq|position_ids|logit_scale|logit_bias|(visual|text)_projection\.weight)$", ""),
    (r"^text_model\..*", ""),
    (r"^(model\.)?vision_tower\.(_?vision_tower\.)?(vision_model\.)?", "vision_tower."),     # LLaVA, TinyLLaVA
    (r"^vision_model\.|^(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.|head\.)", "vision_tower."),
    (r"^vision_tower\.head\..*", ""),                                                        # SigLIP's pooling
    (r"^(model\.)?(multi_modal_projector\.|mm_projector\.|connector\._connector\.)", "multi_modal_projector."),
    (r"^multi_modal_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^multi_modal_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^(?=model\.(embed_tokens|layers|norm|final_layernorm)\.|lm_head\.)", "language_model."),
    (r"^language_model\.model\.layers\.(\d+)\.modality_layernorm\.scale$", r"language_model.moca.\1.u"),     # MoCa
    (r"^language_model\.model\.layers\.(\d+)\.modality_layernorm\.shift$", r"language_model.moca.\1.v"),
    (r"^(language_model\..*)\.self_attn\.dense\.", r"\1.self_attn.o_proj."),                 # Phi-2
    (r"^(language_model\..*)\.mlp\.fc1\.", r"\1.mlp.up_proj."),
    (r"^(language_model\..*)\.mlp\.fc2\.", r"\1.mlp.down_proj."),
    (r"^language_model\.model\.final_layernorm\.", "language_model.model.norm."),
]]
OTHER_LAYOUTS = ("tok_embeddings.", "layers.", "transformer.", "lm_head.ln.", "gpt_neox.")   # Meta's, old Phi-2's, …


# ------------------------------------------------------------------------------------------------ files
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


def rename(key: str) -> str:
    """A released file's name for a tensor → ours; "" if it is known and not needed, as it is if it is unknown."""
    for pattern, new in RENAMES:
        key = pattern.sub(new, key, count=1)
    return key


def find_tensors(folder: Path) -> dict[str, tuple[Path, str]]:
    """Every tensor of a folder under the name it has in `Llava`: name → (file, name in the file)."""
    found = {}
    for path in weight_files(folder):
        with open_tensors(path) as f:
            for key in f.keys():
                name = rename(key)
                if name in found:
                    raise UserError(f"{path} holds {key}, which {found[name][0].name} holds too ({found[name][1]})")
                if name:
                    found[name] = path, key
    unknown = [n for n in found if n.split(".")[0] not in PARTS]
    if unknown:
        other = ": these are names of another layout; get the Hugging Face form of this model"
        raise UserError(f"{folder}: {len(unknown)} tensors belong to no part of the model, such as {unknown[0]}"
                        + other * any(n.startswith(OTHER_LAYOUTS) for n in unknown))
    return found


def unfuse(here: dict[str, tuple[Path, str]], c: DecoderConfig | None) -> dict[str, tuple]:
    """Phi-3 keeps q, k, v as rows of one tensor, and gate, up of another: name → (file, name there, None or (first row,
    end, rows in all))."""
    if c is None:
        return {name: (*place, None) for name, place in here.items()}
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    fused = {"qkv_proj": [("q_proj", q), ("k_proj", k), ("v_proj", k)],
             "gate_up_proj": [("gate_proj", c.intermediate_size), ("up_proj", c.intermediate_size)]}
    out = {}
    for name, place in here.items():
        part = name.split(".")[-2] if "." in name else name
        start, total = 0, sum(rows for _, rows in fused.get(part, []))
        for new, rows in fused.get(part, []):
            out[name.replace(part, new)] = *place, (start, start + rows, total)
            start += rows
        if part not in fused:
            out[name] = *place, None
    return out


def fill(module: nn.Module, prefix: str, found: dict[str, tuple[Path, str]], source, dtype=None, device="cpu",
         new=lambda name, shape: None) -> None:
    """Puts the tensors under `prefix` into a module built on the meta device, each copied (a mapped file may change or
    vanish later) and cast on its way. dtype: of all, or a function of a name; None: as stored. Of a parameter that is
    cut over ranks only this rank's rows are copied. new(name, shape) makes a tensor that no file holds yet (LoRA's), or
    says None. Raises UserError on any difference."""
    wanted = dict(module.named_parameters())
    here = {name[len(prefix) + 1:]: place for name, place in found.items() if name.startswith(prefix + ".")}
    tied = isinstance(module, Decoder) and module.config.tie_word_embeddings
    here = unfuse(here, module.config if isinstance(module, Decoder) else None)
    if tied:
        here.pop("lm_head.weight", None)
    what = PARTS.get(prefix, prefix)
    if not here:
        raise UserError(f"{source} has no {what}: give the folder of one")
    made = {n: t for n in wanted if n not in here and (t := new(n, wanted[n].shape)) is not None}
    for problem, names in [("are missing", [n for n in wanted if n not in here and n not in made]),
                           ("are left over", [n for n in here if n not in wanted])]:
        if names:
            raise UserError(f"{source}: {len(names)} tensors of the {what} {problem} ({', '.join(sorted(names)[:3])}"
                            f"{', …' if len(names) > 3 else ''}); its config.json describes another model")

    def put(name: str, tensor: torch.Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        to = dtype(name) if callable(dtype) else dtype or tensor.dtype
        own = placed(tensor, wanted[name], device, to)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(own, wanted[name].requires_grad))
    for name, tensor in made.items():
        put(name, tensor)
    by_file = {}
    for name, (path, key, rows) in here.items():
        by_file.setdefault(path, []).append((name, key, rows))
    for path, items in by_file.items():
        # What was read of a mapped file counts as memory in use until the file is closed: a few tensors at a time.
        size = 8 if is_mapped(path) else len(items)
        for some in (items[i:i + size] for i in range(0, len(items), size)):
            with open_tensors(path) as f:
                for name, key, rows in some:
                    tensor = f.get_tensor(key)
                    whole = tensor.shape
                    tensor = tensor[slice(*rows[:2])] if rows else tensor
                    if tensor.shape != wanted[name].shape or rows and whole[0] != rows[2]:
                        made = (rows[2], *wanted[name].shape[1:]) if rows else tuple(wanted[name].shape)
                        raise UserError(f"{path}: {key} has shape {tuple(whole)}, but the config makes it {made}")
                    put(name, tensor)
                    del tensor
    if tied:
        module.lm_head.weight = module.model["embed_tokens"].weight


# ------------------------------------------------------------------------------------------------ configurations
# Fields that a released config.json leaves out, because they are its class's defaults; then what every model has.
DECODERS = {
    "llama": dict(),
    "mistral": dict(num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072,
                    sliding_window=4096),
    "phi": dict(vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, rms_norm_eps=1e-5,
                partial_rotary_factor=0.5, hidden_act="gelu_tanh", norm="layer", gated=False, bias=True, head_bias=True,
                parallel=True),
    "phi3": dict(vocab_size=32064, hidden_size=3072, intermediate_size=8192, rms_norm_eps=1e-5,
                 max_position_embeddings=4096),
    "gemma": dict(vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
                  num_attention_heads=16, num_key_value_heads=16, head_dim=256, max_position_embeddings=8192,
                  tie_word_embeddings=True, hidden_act="gelu_tanh", norm_plus_one=True),
}
VISION = {"clip_vision_model": dict(), "siglip_vision_model": dict(patch_size=16, layer_norm_eps=1e-6,
                                                                   hidden_act="gelu_tanh", class_token=False)}
ACTS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
LLAVA_HF, LLAVA_L, TINY = "llava", "llava_llama", "tinyllava"


def from_fields(cls, defaults: dict, fields: dict, keep=()):
    """A config dataclass from a config.json's fields that it knows; `keep` are not the file's to say."""
    known = {f.name for f in dataclasses.fields(cls)} - set(keep)
    given = {k: v for k, v in fields.items() if k in known and (v is not None or k == "sliding_window")}
    return cls(**defaults | given)                                          # a window of null is a word: none


def vision_config(folder: str | Path) -> VisionConfig:
    """Of a CLIP or SigLIP folder (the whole model or the tower), of a llava-hf or TinyLLaVA one, or of ours."""
    path = Path(folder) / "config.json"
    c = read_json(path)
    if c.get("model_type") == "nanoalign":
        return VisionConfig(**c["vision_config"])
    kind = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}.get(c.get("model_type"), c.get("model_type"))
    if "vision_config" in c:
        nested = c["vision_config"]
        kind = nested.get("model_type") or (kind if kind in VISION else "clip_vision_model")
        c = {**nested}
    if kind not in VISION:
        raise UserError(f"{path} has model_type {kind!r}; a CLIP or SigLIP vision encoder is supported")
    act = c.get("hidden_act", VISION[kind].get("hidden_act", "quick_gelu"))
    act = ACTS.get(act, act)
    if act not in ("quick_gelu", "gelu", "gelu_tanh"):
        raise UserError(f"{path} has hidden_act {act!r}, which is not supported")
    return from_fields(VisionConfig, VISION[kind], {**c, "hidden_act": act}, ("class_token", "drop_first_patch"))


def decoder_config(folder: str | Path) -> DecoderConfig:
    """Of a LLaMA, Mistral, Phi-2, Phi-3 or Gemma folder, of a LLaVA one, or of ours."""
    path = Path(folder) / "config.json"
    c = top = read_json(path)
    if c.get("model_type") == "nanoalign":
        return DecoderConfig(**c["text_config"])
    if c.get("model_type") in (LLAVA_HF, TINY) and "text_config" in c:
        c = {"model_type": "llama", **c["text_config"]}
    kind = {LLAVA_L: "llama", LLAVA_HF: "llama"}.get(c.get("model_type"), c.get("model_type"))
    if kind not in DECODERS:
        raise UserError(f"{path} has model_type {kind!r}; supported are {', '.join(DECODERS)}")
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    act = c.get("hidden_activation") or c.get("hidden_act") or DECODERS[kind].get("hidden_act", "silu")
    act = "gelu_tanh" if kind == "gemma" else ACTS.get(act, act)            # Gemma's files say gelu, and mean tanh
    for field, value, ok in [("rope scaling", scaling, scaling == "default"), ("hidden_act", act, act in ACTIVATIONS),
                             ("attention_bias", True, not c.get("attention_bias")),
                             ("mlp_bias", True, not c.get("mlp_bias")),
                             ("qk_layernorm", True, not c.get("qk_layernorm")),
                             ("quantization_config", "…", "quantization_config" not in {**c, **top})]:
        if not ok:
            raise UserError(f"{path} asks for {field} {value!r}, which is not supported")
    fields = {**c, "hidden_act": act}
    for name in ("rope_theta", "partial_rotary_factor"):                    # transformers 5 keeps them in there
        fields[name] = rope.get(name, c.get(name))
    fields["rms_norm_eps"] = c.get("layer_norm_eps" if kind == "phi" else "rms_norm_eps")
    fields["moca"] = bool(top.get("use_moca"))
    keep = ("norm", "norm_plus_one", "gated", "bias", "head_bias", "parallel", "embed_scale")
    if kind not in ("mistral", "phi3"):
        keep += ("sliding_window",)
    config = from_fields(DecoderConfig, DECODERS[kind], fields, keep)
    return dataclasses.replace(config, embed_scale=config.hidden_size ** 0.5) if kind == "gemma" else config


# ------------------------------------------------------------------------------------------------ loading
def choose_device(device: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where to compute, and in what: `auto` is the GPU if there is one, and bfloat16 where the GPU has it."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no CUDA device here: use --device cpu, or auto")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.device(device), getattr(torch, dtype)


def load_vision(folder: str | Path, dtype=None, device="cpu", config: VisionConfig | None = None,
                prepare=lambda module: None) -> ViT:
    """The vision encoder of a released or own folder, CLIP or SigLIP. None: dtype as stored, config as the folder's.
    prepare: see load_llm."""
    with torch.device("meta"):
        vit = ViT(config or vision_config(folder))
    prepare(vit)
    fill(vit, "vision_tower", find_tensors(Path(folder)), folder, dtype, device)
    return vit


def load_llm(folder: str | Path, dtype=None, device="cpu", config: DecoderConfig | None = None,
             prepare=lambda module: None, new=lambda name, shape: None) -> Decoder:
    """The decoder, with its head, of a released or own folder. None: dtype as stored, config as the folder's.
    prepare(decoder): is called before it is filled, on the meta device, where cutting it over ranks costs nothing;
    new: see fill."""
    with torch.device("meta"):
        llm = Decoder(config or decoder_config(folder))
    prepare(llm)
    fill(llm, "language_model", find_tensors(Path(folder)), folder, dtype, device, new)
    return llm


def load_projector(folder: str | Path, vision_size: int, hidden_size: int, dtype=None, device="cpu") -> Projector:
    """The projector of a checkpoint of ours, of a whole LLaVA, or LLaVA's mm_projector.bin alone."""
    with torch.device("meta"):
        projector = Projector(vision_size, hidden_size)
    fill(projector, "multi_modal_projector", find_tensors(Path(folder)), folder, dtype, device)
    return projector


def load_moca(folder: str | Path, llm: Decoder, dtype=None, device="cpu") -> None:
    """Gives `llm` the MoCa that a stage-1 checkpoint trained beside its projector; nothing if it trained none."""
    found = find_tensors(Path(folder))
    if any(name.startswith("language_model.moca.") for name in found):
        with torch.device("meta"):
            llm.add_moca()
        fill(llm.moca, "language_model.moca", found, folder, dtype, device)


def load(folder: str | Path, vision: str | Path | None = None, llm: str | Path | None = None,
         dtype: torch.dtype | None = None, device="cpu") -> Llava:
    """A whole model: a checkpoint of ours, llava-hf's, liuhaotian's (which has no tower: `vision` is CLIP's folder),
    MoCa's or TinyLLaVA's. A stage-1 checkpoint of ours holds the projector alone and names the folders of the rest;
    `vision` and `llm` say where those are now. Raises UserError if a part cannot be found."""
    if is_released(Path(folder)):
        return load_released(Path(folder), vision, dtype, device)
    folder = checkpoint_folder(folder)
    c = read_json(folder / "config.json")
    whole = is_whole(folder)
    vision, llm = (folder, folder) if whole else (vision or c["vision"], llm or c["llm"])
    for flag, base in [("--vision", vision), ("--llm", llm)]:
        if not Path(base).is_dir():
            raise UserError(f"{folder} was trained on {base}, which is not there now: say where it is with {flag}")
    vision, llm = load_vision(vision, dtype, device), load_llm(llm, dtype, device)
    projector = load_projector(folder, vision.config.hidden_size, llm.config.hidden_size, dtype, device)
    if not whole:
        load_moca(folder, llm, dtype, device)
    return Llava(vision, projector, llm, c["vision_layer"])


def is_released(folder: Path) -> bool:
    """Is this a multimodal checkpoint of somebody else's?"""
    if not (folder / "config.json").is_file():
        return False
    return read_json(folder / "config.json").get("model_type") in (LLAVA_HF, LLAVA_L, TINY)


def load_released(folder: Path, vision: str | Path | None, dtype: torch.dtype | None, device) -> Llava:
    """A whole multimodal checkpoint in one of the layouts that RENAMES reads."""
    c = read_json(folder / "config.json")
    inside = any(name.startswith("vision_tower.") for name in find_tensors(folder))
    if not vision and not ("vision_config" in c and inside):
        raise UserError(f"{folder} has no vision tower" + ", or does not say of what shape" * inside
                        + ": give the folder of its CLIP too (--vision)")
    shape = folder if "vision_config" in c else vision
    siglip = not vision_config(shape).class_token
    strategy = c.get("vision_feature_select_strategy", c.get("mm_vision_select_feature", "patch"))
    layer = c.get("vision_feature_layer", c.get("mm_vision_select_layer", -2))
    projector = c.get("connector_type", c.get("mm_projector_type", "mlp2x_gelu")), c.get("projector_hidden_act", "gelu")
    for field, value, ok in [("image features", strategy, siglip or strategy in ("default", "patch")),
                             ("features of layers", layer, isinstance(layer, int)),
                             ("projector", projector, projector == ("mlp2x_gelu", "gelu"))]:
        if not ok:
            raise UserError(f"{folder}/config.json asks for {field} {value!r}, which is not supported")
    # A tower that was trained inside wins over the one it came from, which then only tells its shape.
    config = dataclasses.replace(vision_config(shape), drop_first_patch=siglip and strategy in ("default", "patch"))
    vit = load_vision(folder if inside else vision, dtype, device, config)
    llm = load_llm(folder, dtype, device)
    projector = load_projector(folder, vit.config.hidden_size, llm.config.hidden_size, dtype, device)
    return Llava(vit, projector, llm, layer)


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


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, or None: every file is looked at, at its ends."""
    try:
        read_json(folder / "config.json")
        for path in weight_files(folder):
            check_safetensors(path)
    except UserError as e:
        return str(e)
    state = folder / "state.pt"
    return None if state.is_file() and zipfile.is_zipfile(state) else f"{state} is missing or cut off"


def is_whole(folder: Path) -> bool:
    """Does a checkpoint of ours hold the whole model? Stage 1 stores the projector alone, unless more was trained."""
    return any(n.startswith("language_model.model.") for n in find_tensors(folder))


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


def save_checkpoint(folder: Path, model: Llava, trained: set[str], config: dict, state, write: bool = True) -> None:
    """Writes a checkpoint folder under a temporary name and renames it, so that a killed run leaves no half of one.

    trained: names of the parameters to store; config: goes into config.json with the shapes of the parts;
    state: tensors and plain values for `torch.load(weights_only=True)`. write=False: of a rank that only gives its
    share of what is cut. Raises UserError where the disk is full; what was saved before stays."""
    tensors = {n: p for n, p in model.named_parameters() if n in trained}
    if not write:
        save_tensors(folder, tensors, write=False)
        return
    temporary = folder.parent / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_checkpoint(temporary, model, tensors, config, state)
        os.replace(temporary, folder)
    except (OSError, RuntimeError, SafetensorError) as e:         # each library has its own word for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(e, RuntimeError) and "inline_container" not in str(e):
            raise                                                 # not torch.save's: a rank was lost while gathering
        reason = "writing failed" if isinstance(e, RuntimeError) else " ".join(str(e).split())[:160]
        raise UserError(f"{folder} could not be saved ({reason}; {shutil.disk_usage(folder.parent).free / 1e9:.1f} GB "
                        "are free there): what was saved before is as it was; make room, then --resume") from None


def write_checkpoint(temporary: Path, model: Llava, tensors: dict, config: dict, state) -> None:
    """The files of a checkpoint, all on the disk when this returns."""
    shutil.copyfile(Path(config["vision"]) / "preprocessor_config.json", temporary / "preprocessor_config.json")
    (temporary / "tokenizer.json").write_text(load_tokenizer(config["llm"]).to_str(pretty=True), encoding="utf-8")
    config = {"model_type": "nanoalign", "code_version": CODE_VERSION, **config, "vision_layer": model.vision_layer,
              "vision_config": dataclasses.asdict(model.vision_tower.config),
              "text_config": dataclasses.asdict(model.language_model.config)}
    (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_tensors(temporary, tensors)
    torch.save(state, temporary / "state.pt")
    for path in temporary.iterdir():
        with open(path, "rb") as f:
            os.fsync(f.fileno())                          # a rename must not overtake the data on its way to the disk


# ------------------------------------------------------------------------------------------------ what is in a folder
KINDS = {"clip": "CLIP", "clip_vision_model": "CLIP", "siglip": "SigLIP", "siglip_vision_model": "SigLIP",
         "llama": "LLaMA", "mistral": "Mistral", "phi": "Phi-2", "phi3": "Phi-3", "gemma": "Gemma",
         LLAVA_HF: "LLaVA, llava-hf's layout", LLAVA_L: "LLaVA, liuhaotian's layout", TINY: "TinyLLaVA"}


def inspect(folder: str | Path) -> str:
    """What a folder holds, in about ten lines, and what is wrong with it. Of the weights only headers are read: put in
    place on the meta device, their names and shapes are checked. Raises UserError if it is no model that we know."""
    folder, problems = Path(folder), []
    if not (folder / "config.json").is_file() and checkpoints(folder):
        folder = checkpoints(folder)[-1]                    # a run's folder
    c = read_json(folder / "config.json")
    kind = c.get("model_type") if isinstance(c, dict) else None
    ours, tower_alone = kind == "nanoalign", kind in ("clip", "siglip", *VISION)
    if not ours and kind not in KINDS:
        raise UserError(f"{folder}/config.json has model_type {kind!r}; known are {', '.join([*KINDS, 'nanoalign'])}")

    def attempt(f, *args, **options):
        """f(…), or None and a line on why not. Whatever it is: the rest of the folder can still be looked at."""
        try:
            return f(*args, **options)
        except Exception as e:
            text = str(e) if isinstance(e, UserError) else f"{f.__name__} stops with {type(e).__name__}: {e}"
            problems.append(" ".join(text.split()))

    if ours:
        lines = [("kind", f"nanoalign checkpoint: stage {c.get('stage')}, step {c.get('step')} of {c.get('steps')}, "
                          f"loss {c.get('loss')}"), ("built on", f"{c.get('vision')}, {c.get('llm')}")]
    else:
        lines = [("kind", KINDS[kind] + ", with MoCa" * bool(c.get("use_moca")))]
    files = attempt(weight_files, folder) or []
    found = attempt(find_tensors, folder) if files else {}
    vit = llm = None
    if found and tower_alone:
        vit = attempt(load_vision, folder, device="meta")
    elif found and kind in DECODERS:
        llm = attempt(load_llm, folder, device="meta")
    elif found:
        whole = attempt(load, folder, device="meta")
        vit, llm = (whole.vision_tower, whole.language_model) if whole else (None, None)
        if whole is None and any(n.startswith("language_model.model.") for n in found):
            llm = attempt(load_llm, folder, device="meta")  # of a LLaVA that lacks its tower, say
    if vit:
        v = vit.config
        lines.append(("vision", f"{v.num_hidden_layers} layers, width {v.hidden_size}, {v.num_attention_heads} heads, "
                                f"{v.image_size} px in patches of {v.patch_size}: {v.image_tokens} image tokens"))
    if llm:
        t = llm.config
        pairs = f" ({t.num_key_value_heads} of keys)" * (t.num_key_value_heads != t.num_attention_heads)
        lines.append(("language", f"{t.num_hidden_layers} layers, width {t.hidden_size}, {t.num_attention_heads} heads"
                                  f"{pairs}, vocabulary {t.vocab_size}, {t.max_position_embeddings} positions"
                                  + f", window {t.sliding_window}" * bool(t.sliding_window) + ", MoCa" * t.moca))
    stored = attempt(sizes, found) if found else {}
    for part, what in PARTS.items():
        here = [s for name, s in stored.items() if name.startswith(part + ".")] if stored else []
        if here:
            dtypes = sorted({dtype for _, dtype in here})
            lines.append(("stored", f"{what}, {sum(n for n, _ in here) / 1e6:,.2f} M parameters, {', '.join(dtypes)}"))
    if files:
        names = files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} …"
        lines.append(("files", f"{names}, {sum(f.stat().st_size for f in files) / 1e9:.3f} GB"))
    tokenizer = None if tower_alone else attempt(load_tokenizer, folder)
    if tokenizer:
        first, size = [tokenizer.id_to_token(i) for i in begin(tokenizer)], tokenizer.get_vocab_size()
        lines.append(("tokenizer", f"{type(tokenizer.model).__name__}, {size} tokens, a text begins with "
                                   f"{first[0] if first else 'no token of its own'}"))
        if llm and size > llm.config.vocab_size:
            problems.append(f"the tokenizer has {size} tokens, the model {llm.config.vocab_size}: not of one model")
    if (folder / "preprocessor_config.json").is_file() or vit:
        p = attempt(ImageProcessor.from_folder, folder)
        if p:
            lines.append(("images", f"stretched to {p.crop_size} × {p.crop_size}" if p.stretch else
                          f"shortest edge to {p.size}, centre {p.crop_size} × {p.crop_size}; stage 2 pads first"))
    if not tower_alone:
        name = c.get("template") or FAMILY_TEMPLATE.get((c.get("text_config") or c).get("model_type"), "v1")
        lines.append(("template", name + ", unless --template picks another" * (not ours)))
        if tokenizer:
            attempt(end, tokenizer, name)
    lines += [("problem", p) for p in dict.fromkeys(problems)] or [("problems", "none")]
    return "\n".join([str(folder)] + [f"  {name:11}{text}" for name, text in lines])


def sizes(found: dict[str, tuple[Path, str]]) -> dict[str, tuple[int, str]]:
    """Number of elements and dtype of each tensor that `find_tensors` found; the data itself stays on the disk."""
    out = {}
    for path in {path for path, _ in found.values()}:
        with open_tensors(path) as f:
            here = {name: f.get_tensor(key) for name, (place, key) in found.items() if place == path}
            out |= {name: (t.numel(), str(t.dtype).split(".")[1]) for name, t in here.items()}
    return out


def main() -> None:
    match sys.argv[1:]:
        case ["inspect", folder]:
            print(inspect(folder))
        case ["export", ckpt, out, *flags] if not out.startswith("-"):
            from export import Bases, export
            print(export(ckpt, out, **vars(parse(Bases, flags))))
        case ["-h" | "--help"]:
            print(__doc__)
        case _:
            raise UserError("say python weights.py inspect DIR, or python weights.py export CKPT OUT")


if __name__ == "__main__":
    run(main)
