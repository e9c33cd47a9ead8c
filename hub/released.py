"""Released files → modules: strict, and with one copy of the weights in memory.

Modules are built on the meta device (no memory). Each tensor is then read from its file, checked, cast and put in its
place. Nothing is skipped silently: a tensor that is missing, left over or of another shape is an error.
"""
import re
from pathlib import Path

import torch
from torch import nn

from common.flags import UserError
from common.parallel import placed
from hub.configs import decoder_config, vision_config
from hub.tensors import is_mapped, open_tensors, weight_files
from model import Decoder, DecoderConfig, Projector, VisionConfig, ViT

PARTS = {"vision_tower": "vision encoder", "multi_modal_projector": "projector", "language_model": "language model"}
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


# ------------------------------------------------------------------------------------------------ names
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


# ------------------------------------------------------------------------------------------------ parts
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
