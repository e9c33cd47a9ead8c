"""What a folder of weights holds, and what is wrong with it."""
from pathlib import Path

from common.files import read_json
from common.flags import UserError
from data import FAMILY_TEMPLATE, ImageProcessor, bos_ids, eos_id
from hub.checkpoint import checkpoints, load_model
from hub.configs import DECODERS, LLAVA_HF, LLAVA_L, TINY, VISION
from hub.released import PARTS, find_tensors, load_llm, load_vision
from hub.tensors import open_tensors, weight_files
from hub.tokenizer import load_tokenizer

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
        whole = attempt(load_model, folder, device="meta")
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
        first, size = [tokenizer.id_to_token(i) for i in bos_ids(tokenizer)], tokenizer.get_vocab_size()
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
            attempt(eos_id, tokenizer, name)
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
