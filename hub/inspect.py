"""python -m hub inspect DIR: what a folder of weights holds, and what is wrong with it."""
from dataclasses import dataclass
from pathlib import Path

from common.flags import UserError, option
from common.text import bos_ids
from data import eos_id
from hub.checkpoint import checkpoints, is_whole, load_model
from hub.configs import DECODERS, LLAVA_HF, LLAVA_L, OURS, TINY, load_processor, read_config
from hub.connectors import Connector, configured, image_tokens, read_connector
from hub.released import PARTS, Place, find_tensors, load_llm, load_vision, read_tensors
from hub.tensors import weight_files
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
    """Return f(…), or None after an error, which is noted: the rest is still reported."""
    try:
        return f(*args, **options)
    except Exception as e:
        text = str(e) if isinstance(e, UserError) else f"{f.__name__} stops with {type(e).__name__}: {e}"
        problems.append(" ".join(text.split()))


def inspect(folder: str | Path, vision: str | None = None) -> str:
    """Return the report on a folder, of a run on its newest checkpoint. Reads only the headers of
    weights. Raises UserError for an unknown kind of model."""
    folder, problems = Path(folder), []
    if not (folder / "config.json").is_file() and checkpoints(folder):
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
        if p := attempt(problems, load_processor, folder, vision):
            text = f"{p.crop_size} × {p.crop_size}"
            if p.stretch:
                text = f"stretched to {text}"
            else:
                text = f"shortest edge to {p.size}, centre {text}; stage 2 pads first"
            lines.append(("images", text))
    lines += [("problem", text) for text in dict.fromkeys(problems)] or [("problems", "none")]
    return "\n".join([str(folder)] + [f"  {heading:11}{text}" for heading, text in lines])


def load_parts(problems: list[str], folder: Path, kind: str, found,
               vision: str | None) -> tuple[ViT | None, Decoder | None]:
    """Load a folder onto the meta device: checks every name and shape, and reads no weights."""
    if kind in TOWERS:
        return attempt(problems, load_vision, folder, device="meta", found=found), None
    if kind not in DECODERS:
        whole = attempt(problems, load_model, folder, vision, device="meta")
        if whole:
            return whole.vision_tower, whole.language_model
        if not is_whole(folder, found):
            return None, None
    # A language model alone, or in a LLaVA without its tower.
    return None, attempt(problems, load_llm, folder, device="meta", found=found)


def describe_kind(c: dict) -> list[tuple[str, str]]:
    text = KINDS[c["model_type"]]
    if c["model_type"] == OURS:
        text += f": stage {c.get('stage')}, step {c.get('step')} of {c.get('steps')}, loss {c.get('loss')}"
        return [("kind", text), ("built on", f"{c.get('vision')}, {c.get('llm')}")]
    return [("kind", f"{text}, with MoCa" if c.get("use_moca") else text)]


def describe_parts(v: VisionConfig | None, t: DecoderConfig | None) -> list[tuple[str, str]]:
    lines = []
    if v:
        text = (f"{v.num_hidden_layers} layers, width {v.hidden_size}, {v.num_attention_heads} heads, "
                f"{v.image_size} px in patches of {v.patch_size}: {v.image_tokens} image tokens")
        lines.append(("vision", text))
    if t:
        keys = f" ({t.num_key_value_heads} of keys)" if t.num_key_value_heads != t.num_attention_heads else ""
        text = (f"{t.num_hidden_layers} layers, width {t.hidden_size}, {t.num_attention_heads} heads{keys}, "
                f"vocabulary {t.vocab_size}, {t.max_position_embeddings} positions")
        if t.sliding_window:
            text += f", window {t.sliding_window}"
        lines.append(("language", f"{text}, MoCa" if t.moca else text))
    return lines


def describe_stored(found: dict[str, Place]) -> list[tuple[str, str]]:
    """Return a line for each part: the number of its parameters, and their dtypes as stored."""
    counts, dtypes = dict.fromkeys(PARTS, 0), {part: set() for part in PARTS}
    for name, tensor in read_tensors(found, check=False):       # mapped, not read
        part = name.split(".")[0]
        counts[part] += tensor.numel()
        dtypes[part].add(str(tensor.dtype).removeprefix("torch."))
    lines = []
    for part, count in counts.items():
        if count:
            names = ", ".join(sorted(dtypes[part]))
            lines.append(("stored", f"{PARTS[part]}, {count / 1e6:,.2f} M parameters, {names}"))
    return lines


def describe_tokenizer(problems: list[str], folder: Path, c: dict) -> list[tuple[str, str]]:
    lines, name = [], attempt(problems, family_template, folder) or "v1"
    if tokenizer := attempt(problems, load_tokenizer, folder):
        attempt(problems, eos_id, tokenizer, name)
        first = [tokenizer.id_to_token(i) for i in bos_ids(tokenizer)] or ["no token of its own"]
        kind, size = type(tokenizer.model).__name__, tokenizer.get_vocab_size()
        lines.append(("tokenizer", f"{kind}, {size} tokens, a text begins with {first[0]}"))
    note = "" if c["model_type"] == OURS else ", unless --template picks another"
    return [*lines, ("template", name + note)]
