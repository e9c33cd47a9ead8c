"""python -m hub inspect DIR: what a folder of weights holds, and what is wrong with it."""
from dataclasses import dataclass, field
from pathlib import Path

from common.flags import UserError
from data import FAMILY_TEMPLATE, ImageProcessor, bos_ids, eos_id
from hub.checkpoint import checkpoints, holds_llm, load_model
from hub.configs import DECODERS, LLAVA_HF, LLAVA_L, OURS, TINY, read_config
from hub.released import PARTS, Place, find_tensors, load_llm, load_vision
from hub.tensors import open_tensors, weight_files
from hub.tokenizer import load_tokenizer
from model import Decoder, ViT

TOWERS = {"clip": "CLIP", "clip_vision_model": "CLIP", "siglip": "SigLIP", "siglip_vision_model": "SigLIP"}
KINDS = {**TOWERS, "llama": "LLaMA", "mistral": "Mistral", "phi": "Phi-2", "phi3": "Phi-3", "gemma": "Gemma",
         LLAVA_HF: "LLaVA, llava-hf's layout", LLAVA_L: "LLaVA, liuhaotian's layout", TINY: "TinyLLaVA",
         OURS: "nanoalign checkpoint"}


@dataclass
class InspectFlags:
    """Print in about ten lines what a folder holds (weights of a model, a checkpoint or a run) and what is wrong with it.
    Only headers of the weights are read."""


@dataclass
class Report:
    """Lines to print, and the problems met on the way."""
    lines: list[tuple[str, str]] = field(default_factory=list)      # (heading, text)
    problems: list[str] = field(default_factory=list)

    def add(self, heading: str, text: str) -> None:
        self.lines.append((heading, text))

    def attempt(self, f, *args, **options):
        """Return f(…), or None after an error of any kind: the rest of the folder can still be reported."""
        try:
            return f(*args, **options)
        except Exception as e:
            text = str(e) if isinstance(e, UserError) else f"{f.__name__} stops with {type(e).__name__}: {e}"
            self.problems.append(" ".join(text.split()))


def inspect(folder: str | Path) -> str:
    """Return the report on a folder. Raises UserError if it holds no model of a known kind."""
    folder = Path(folder)
    if not (folder / "config.json").is_file() and checkpoints(folder):
        folder = checkpoints(folder)[-1]                            # of a run, its newest checkpoint
    c = read_config(folder)
    kind = c.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{folder}/config.json has model_type {kind!r}; known are {', '.join(KINDS)}")
    report = Report()
    report_kind(report, c)
    files = report.attempt(weight_files, folder) or []
    found = report.attempt(find_tensors, folder) if files else None
    vit, llm = load_parts(report, folder, kind, found or {})
    report_parts(report, vit, llm)
    if found:
        report.attempt(report_stored, report, found)
    if files:
        names = files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} …"
        report.add("files", f"{names}, {sum(f.stat().st_size for f in files) / 1e9:.3f} GB")
    if kind not in TOWERS:
        report_text(report, folder, c, llm)
    if vit or (folder / "preprocessor_config.json").is_file():
        report_images(report, folder)
    for problem in dict.fromkeys(report.problems):
        report.add("problem", problem)
    if not report.problems:
        report.add("problems", "none")
    return "\n".join([str(folder)] + [f"  {heading:11}{text}" for heading, text in report.lines])


def report_kind(report: Report, c: dict) -> None:
    text = KINDS[c["model_type"]]
    if c["model_type"] == OURS:
        text += f": stage {c.get('stage')}, step {c.get('step')} of {c.get('steps')}, loss {c.get('loss')}"
    if c.get("use_moca"):
        text += ", with MoCa"
    report.add("kind", text)
    if c["model_type"] == OURS:
        report.add("built on", f"{c.get('vision')}, {c.get('llm')}")


def load_parts(report: Report, folder: Path, kind: str, found: dict[str, Place]) -> tuple[ViT | None, Decoder | None]:
    """Load the parts that a folder holds onto the meta device: that checks every name and shape."""
    if not found:
        return None, None
    if kind in TOWERS:
        return report.attempt(load_vision, folder, device="meta", found=found), None
    if kind in DECODERS:
        return None, report.attempt(load_llm, folder, device="meta", found=found)
    whole = report.attempt(load_model, folder, device="meta")
    if whole:
        return whole.vision_tower, whole.language_model
    if holds_llm(found):                                            # a LLaVA without its tower, say
        return None, report.attempt(load_llm, folder, device="meta", found=found)
    return None, None


def report_parts(report: Report, vit: ViT | None, llm: Decoder | None) -> None:
    if vit:
        v = vit.config
        report.add("vision", f"{v.num_hidden_layers} layers, width {v.hidden_size}, {v.num_attention_heads} heads, "
                             f"{v.image_size} px in patches of {v.patch_size}: {v.image_tokens} image tokens")
    if llm:
        t = llm.config
        heads = f"{t.num_attention_heads} heads"
        if t.num_key_value_heads != t.num_attention_heads:
            heads += f" ({t.num_key_value_heads} of keys)"
        text = (f"{t.num_hidden_layers} layers, width {t.hidden_size}, {heads}, vocabulary {t.vocab_size}, "
                f"{t.max_position_embeddings} positions")
        if t.sliding_window:
            text += f", window {t.sliding_window}"
        if t.moca:
            text += ", MoCa"
        report.add("language", text)


def report_stored(report: Report, found: dict[str, Place]) -> None:
    """Add a line for each part: how many parameters of which dtypes are stored. The data stays on the disk."""
    counts, dtypes = dict.fromkeys(PARTS, 0), {part: set() for part in PARTS}
    for path in {place.path for place in found.values()}:
        with open_tensors(path) as f:
            for name, place in found.items():
                if place.path == path:
                    tensor, part = f.get_tensor(place.key), name.split(".")[0]
                    counts[part] += tensor.numel()
                    dtypes[part].add(str(tensor.dtype).removeprefix("torch."))
    for part, what in PARTS.items():
        if counts[part]:
            report.add("stored", f"{what}, {counts[part] / 1e6:,.2f} M parameters, {', '.join(sorted(dtypes[part]))}")


def report_text(report: Report, folder: Path, c: dict, llm: Decoder | None) -> None:
    tokenizer = report.attempt(load_tokenizer, folder)
    template = c.get("template") or FAMILY_TEMPLATE.get((c.get("text_config") or c).get("model_type"), "v1")
    if tokenizer:
        size = tokenizer.get_vocab_size()
        first = [tokenizer.id_to_token(i) for i in bos_ids(tokenizer)] or ["no token of its own"]
        report.add("tokenizer", f"{type(tokenizer.model).__name__}, {size} tokens, a text begins with {first[0]}")
        if llm and size > llm.config.vocab_size:
            report.problems.append(f"the tokenizer has {size} tokens, the model {llm.config.vocab_size}: they are not of "
                                   "one model")
        report.attempt(eos_id, tokenizer, template)
    report.add("template", template if c["model_type"] == OURS else f"{template}, unless --template picks another")


def report_images(report: Report, folder: Path) -> None:
    p = report.attempt(ImageProcessor.from_folder, folder)
    if p and p.stretch:
        report.add("images", f"stretched to {p.crop_size} × {p.crop_size}")
    elif p:
        report.add("images", f"shortest edge to {p.size}, centre {p.crop_size} × {p.crop_size}; stage 2 pads first")
