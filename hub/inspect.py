"""python -m hub inspect DIR: what a folder of weights holds, and what is wrong with it."""
from dataclasses import dataclass
from pathlib import Path

from common.flags import UserError, option
from common.text import bos_ids
from data import eos_id
from hub.checkpoint import checkpoints, is_whole, load_model
from hub.configs import DECODERS, LLAVA_HF, LLAVA_L, OURS, TINY, load_processor, read_config
from hub.connectors import Connector, configured, image_tokens, read_connector
from hub.released import PARTS, Place, find_tensors, load_llm, load_vision
from hub.tensors import open_tensors, weight_files
from hub.tokenizer import family_template, load_tokenizer
from model import Decoder, DecoderConfig, VisionConfig, ViT

TOWERS = {"clip": "CLIP", "clip_vision_model": "CLIP", "siglip": "SigLIP",
          "siglip_vision_model": "SigLIP"}
KINDS = {**TOWERS, "llama": "LLaMA", "mistral": "Mistral", "qwen2": "Qwen2", "phi": "Phi-2",
         "phi3": "Phi-3", "gemma": "Gemma", LLAVA_HF: "LLaVA, llava-hf's layout",
         LLAVA_L: "LLaVA, liuhaotian's layout", TINY: "TinyLLaVA", OURS: "nanoalign checkpoint"}


@dataclass
class InspectFlags:
    """Print in about ten lines what DIR (weights, a checkpoint or a run) holds, and what is wrong with it."""
    vision: str | None = option(None, "folder of the vision encoder of a LLaVA that holds none",
                                "model")


def attempt(problems: list[str], f, *args, **options):
    """Return f(…), or None after an error of any kind, which is noted: the rest of a folder can
    still be reported."""
    try:
        return f(*args, **options)
    except Exception as e:
        text = str(e) if isinstance(e, UserError) else f"{f.__name__} stops with {type(e).__name__}: {e}"
        problems.append(" ".join(text.split()))


def inspect(folder: str | Path, vision: str | None = None) -> str:
    """Return the report on a folder. Reads only headers of weights. Raises UserError for an unknown
    kind of model."""
    folder, problems = Path(folder), []
    if not (folder / "config.json").is_file() and checkpoints(folder):
        # A run stands for its newest checkpoint.
        folder = checkpoints(folder)[-1]
    c = read_config(folder)
    kind = c.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{folder}/config.json has model_type {kind!r}; known are {', '.join(KINDS)}")
    lines = describe_kind(c)
    files = attempt(problems, weight_files, folder) or []
    found = files and attempt(problems, find_tensors, folder)
    vit, llm = load_parts(problems, folder, kind, found, vision) if found else (None, None)
    lines += describe_parts(vit and vit.config, llm and llm.config)
    name = configured(c)
    if vit and kind not in TOWERS and read_connector(name) != Connector(2):
        lines.append(("connector", f"{name}: {image_tokens(name, vit.config)} image tokens"))
    if found:
        lines += attempt(problems, describe_stored, found) or []
    if files:
        names = files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} …"
        lines.append(("files", f"{names}, {sum(f.stat().st_size for f in files) / 1e9:.3f} GB"))
    if kind not in TOWERS:
        lines += describe_tokenizer(problems, folder, c)
    if vit or (folder / "preprocessor_config.json").is_file():
        p = attempt(problems, load_processor, folder, vision)
        if p and p.stretch:
            lines.append(("images", f"stretched to {p.crop_size} × {p.crop_size}"))
        elif p:
            text = f"shortest edge to {p.size}, centre {p.crop_size} × {p.crop_size}; stage 2 pads first"
            lines.append(("images", text))
    lines += [("problem", text) for text in dict.fromkeys(problems)] or [("problems", "none")]
    return "\n".join([str(folder)] + [f"  {heading:11}{text}" for heading, text in lines])


def load_parts(problems: list[str], folder: Path, kind: str, found,
               vision: str | None) -> tuple[ViT | None, Decoder | None]:
    """Load what a folder holds onto the meta device: that checks every name and shape, and reads no
    weights."""
    if kind in TOWERS:
        return attempt(problems, load_vision, folder, device="meta", found=found), None
    if kind not in DECODERS:
        whole = attempt(problems, load_model, folder, vision, device="meta")
        if whole:
            return whole.vision_tower, whole.language_model
        if not is_whole(folder, found):
            return None, None
    # A language model alone, or in a LLaVA without its tower.
    llm = attempt(problems, load_llm, folder, device="meta", found=found)
    return None, llm


def describe_kind(c: dict) -> list[tuple[str, str]]:
    text = KINDS[c["model_type"]]
    if c["model_type"] == OURS:
        text += f": stage {c.get('stage')}, step {c.get('step')} of {c.get('steps')}, loss {c.get('loss')}"
        return [("kind", text), ("built on", f"{c.get('vision')}, {c.get('llm')}")]
    return [("kind", f"{text}, with MoCa" if c.get("use_moca") else text)]


def describe_parts(v: VisionConfig | None, t: DecoderConfig | None) -> list[tuple[str, str]]:
    lines = []
    if v:
        lines.append(("vision",
                      f"{v.num_hidden_layers} layers, width {v.hidden_size}, {v.num_attention_heads} heads, "
                                f"{v.image_size} px in patches of {v.patch_size}: {v.image_tokens} image tokens"))
    if t:
        keys = f" ({t.num_key_value_heads} of keys)" if t.num_key_value_heads != t.num_attention_heads else ""
        text = (f"{t.num_hidden_layers} layers, width {t.hidden_size}, {t.num_attention_heads} heads{keys}, "
                f"vocabulary {t.vocab_size}, {t.max_position_embeddings} positions")
        if t.sliding_window:
            text += f", window {t.sliding_window}"
        lines.append(("language", f"{text}, MoCa" if t.moca else text))
    return lines


def describe_stored(found: dict[str, Place]) -> list[tuple[str, str]]:
    """A line for each part: the number of its parameters, and their dtypes as stored."""
    counts, dtypes = dict.fromkeys(PARTS, 0), {part: set() for part in PARTS}
    for path in {place.path for place in found.values()}:
        with open_tensors(path, check=False) as f:
            for name, place in found.items():
                if place.path == path:
                    tensor, part = f.get_tensor(place.key), name.split(".")[0]  # mapped, not read
                    counts[part] += tensor.numel()
                    dtypes[part].add(str(tensor.dtype).removeprefix("torch."))
    return [("stored",
             f"{what}, {counts[part] / 1e6:,.2f} M parameters, {', '.join(sorted(dtypes[part]))}")
            for part, what in PARTS.items() if counts[part]]


def describe_tokenizer(problems: list[str], folder: Path, c: dict) -> list[tuple[str, str]]:
    name = attempt(problems, family_template, folder) or "v1"
    template = ("template", name if c["model_type"] == OURS
                else f"{name}, unless --template picks another")
    tokenizer = attempt(problems, load_tokenizer, folder)
    if not tokenizer:
        return [template]
    attempt(problems, eos_id, tokenizer, name)
    size = tokenizer.get_vocab_size()
    first = [tokenizer.id_to_token(i) for i in bos_ids(tokenizer)] or ["no token of its own"]
    return [("tokenizer", f"{type(tokenizer.model).__name__}, {size} tokens, a text begins with {first[0]}"), template]
