"""Released files → modules: strict, and with one copy of the weights in memory.

Modules are built on the meta device, which takes no memory. Each tensor is then read from its file,
checked, cast and put in place. One that is missing, left over or of another shape is an error.
"""
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.flags import UserError
from common.parallel import placed
from hub.configs import TINY, decoder_config, read_config, vision_config
from hub.connectors import configured, make_connector
from hub.tensors import check_weight, is_mapped, open_tensors, weight_files
from model import Decoder, DecoderConfig, VisionConfig, ViT

PARTS = {"vision_tower": "vision encoder", "multi_modal_projector": "projector",
         "language_model": "language model"}
# Names in released files → names in `Llava`: below vision_tower. CLIP's, below language_model.
# LLaMA's. Each rule is applied once, in this order. What becomes "" is known and not needed.
RENAMES = [(re.compile(pattern), new) for pattern, new in [
    (r".*(rotary_emb\.inv_freq|position_ids|logit_scale|logit_bias|(visual|text)_projection\.weight)$", ""),
    (r"^text_model\..*", ""),
    (r"^(model\.)?vision_tower\.(_?vision_tower\.)?(vision_model\.)?", "vision_tower."),     # LLaVA, TinyLLaVA
    (r"^vision_model\.|^(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.|head\.)", "vision_tower."),
    (r"^vision_tower\.head\..*", ""),                                           # SigLIP's pooling
    (r"^(model\.)?(multi_modal_projector\.|mm_projector\.|(connector\.)?_connector\.)", "multi_modal_projector."),
    (r"^multi_modal_projector\.(?=weight$|bias$)", "multi_modal_projector.linear_1."),      # one linear map
    (r"^multi_modal_projector\.(\d+)\.", lambda m: f"multi_modal_projector.linear_{int(m[1]) // 2 + 1}."),
    (r"^(multi_modal_projector\.mm_mlp|language_projection)\.", "multi_modal_projector.projector."),     # Q-Formers
    (r"^query_tokens$", "multi_modal_projector.query_tokens"),                  # BLIP-2
    (r"^qformer\.(?=layernorm\.)", "multi_modal_projector.bert.embeddings."),
    (r"^qformer\.", "multi_modal_projector.bert."),
    (r"^(multi_modal_projector\.bert\.embeddings)\.layernorm\.", r"\1.LayerNorm."),
    (r"^(multi_modal_projector\..*attention)\.attention\.", r"\1.self."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^(?=model\.(embed_tokens|layers|norm|final_layernorm)\.|lm_head\.)", "language_model."),
    (r"^language_model\.model\.layers\.(\d+)\.modality_layernorm\.scale$", r"language_model.moca.\1.u"),     # MoCa
    (r"^language_model\.model\.layers\.(\d+)\.modality_layernorm\.shift$", r"language_model.moca.\1.v"),
    (r"^(language_model\..*)\.self_attn\.dense\.", r"\1.self_attn.o_proj."),                 # Phi-2
    (r"^(language_model\..*)\.mlp\.fc1\.", r"\1.mlp.up_proj."),
    (r"^(language_model\..*)\.mlp\.fc2\.", r"\1.mlp.down_proj."),
    (r"^language_model\.model\.final_layernorm\.", "language_model.model.norm."),
]]
# Maps between a Q-Former and its neighbours; how names begin in Meta's, old Phi-2's, … layouts.
BETWEEN = re.compile(r"multi_modal_projector\.(bert\..*\.crossattention\.self\.(key|value)\.weight|projector\.)")
OTHER_LAYOUTS = ("tok_embeddings.", "layers.", "transformer.", "lm_head.ln.", "gpt_neox.")


# -------------------------------------------------------------------------------------------- names
class Place(NamedTuple):
    """Where a tensor is stored. rows: its first, its end, and how many are stored; None: all."""
    path: Path
    key: str                                        # the stored tensor's name
    rows: tuple[int, int, int] | None = None


def rename(key: str) -> str:
    """Return our name for a released tensor: "" if it is not needed, the same if it is unknown."""
    for pattern, new in RENAMES:
        key = pattern.sub(new, key, count=1)
    return key


def find_tensors(folder: str | Path) -> dict[str, Place]:
    """Return the tensors of a folder by their name in `Llava`. Opens every file, so list a folder
    once and pass the result on as `found`. Raises UserError for names of no part."""
    found = {}
    for path in weight_files(Path(folder)):
        with open_tensors(path) as f:
            for key in f.keys():
                name = rename(key)
                if name in found:
                    raise UserError(f"{path} holds {key}, which {found[name].path.name} holds too ({found[name].key})")
                if name:
                    found[name] = Place(path, key)
    unknown = [n for n in found if n.split(".")[0] not in PARTS]
    if unknown:
        known = any(n.startswith(OTHER_LAYOUTS) for n in unknown)
        hint = ": these are names of another layout; get the Hugging Face form of this model" if known else ""
        raise UserError(f"{folder}: {len(unknown)} tensors belong to no part of the model, such as {unknown[0]}{hint}")
    return found


def unfuse(here: dict[str, Place], c: DecoderConfig) -> dict[str, Place]:
    """Split Phi-3's fused tensors: the rows of one are q, k and v, those of another gate and up."""
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    fused = {"qkv_proj": [("q_proj", q), ("k_proj", k), ("v_proj", k)],
             "gate_up_proj": [("gate_proj", c.intermediate_size), ("up_proj", c.intermediate_size)]}
    out = {}
    for name, place in here.items():
        part = name.split(".")[-2:][0]
        if part not in fused:
            out[name] = place
            continue
        start, total = 0, sum(rows for _, rows in fused[part])
        for new, rows in fused[part]:
            out[name.replace(part, new)] = place._replace(rows=(start, start + rows, total))
            start += rows
    return out


# ------------------------------------------------------------------------------------------ tensors
def read_tensors(places: dict[str, Place], check: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, stored tensor), file by file. check: see open_tensors. Do not keep a tensor: it
    may be a view of the file. What was read of a mapped file counts as memory in use until it is
    closed, so a file is opened anew for every 8 tensors."""
    by_file = {}
    for name, place in places.items():
        by_file.setdefault(place.path, []).append(name)
    for path, names in by_file.items():
        size = 8 if is_mapped(path) else len(names)
        for i in range(0, len(names), size):
            with open_tensors(path, check) as f:
                for name in names[i:i + size]:
                    yield name, f.get_tensor(places[name].key)


def fill(module: nn.Module, prefix: str, found: dict[str, Place], source, dtype=None, device="cpu",
         new=lambda name, shape: None) -> None:
    """Load the tensors under `prefix` into a module built on the meta device. Each is copied, since
    its file may change later, and cast; of a sharded parameter only this rank's rows.

    dtype: of all parameters, or a function of a parameter's name; None: as stored. new(name, shape):
    makes a tensor that no file holds yet (LoRA's). Raises UserError if names or shapes differ."""
    what = PARTS.get(prefix, prefix)
    wanted = dict(module.named_parameters())
    here = {name.removeprefix(prefix + "."): place
            for name, place in found.items() if name.startswith(prefix + ".")}
    if not here:
        raise UserError(f"{source} has no {what}: give the folder of one")
    tied = False
    if isinstance(module, Decoder):
        here, tied = unfuse(here, module.config), module.config.tie_word_embeddings
    if tied:
        here.pop("lm_head.weight", None)            # some files repeat the embedding table
    made = {name: new(name, p.shape) for name, p in wanted.items() if name not in here}
    made = {name: tensor for name, tensor in made.items() if tensor is not None}
    there = here.keys() | made.keys()
    for problem, names in [("are missing", wanted.keys() - there), ("are left over", there - wanted.keys())]:
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise UserError(f"{source}: {len(names)} tensors of the {what} {problem} ({listed}); its config.json "
                            "describes another model")

    def put(name: str, tensor: Tensor) -> None:
        to = dtype(name) if callable(dtype) else dtype or tensor.dtype
        own = placed(tensor, wanted[name], device, to)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(own, wanted[name].requires_grad))

    for name, tensor in made.items():
        put(name, tensor)
    read = str(device) != "meta"                    # else names, shapes and dtypes are all that is asked for
    for name, tensor in read_tensors(here, check=read):
        path, key, rows = here[name]
        stored, shape = tensor.shape, wanted[name].shape
        if rows:
            first, end, total = rows
            tensor, shape = tensor[first:end], (total, *shape[1:])
        if tuple(stored) != tuple(shape):
            raise UserError(f"{path}: {key} has shape {tuple(stored)}, but the config makes it {tuple(shape)}")
        check_weight(path, key, tensor, read)
        put(name, tensor)
        del tensor                                  # else the file stays mapped
    if tied:
        module.lm_head.weight = module.model["embed_tokens"].weight


# -------------------------------------------------------------------------------------------- parts
# dtype None: as stored. config None: the folder's. found: see find_tensors; None: call it now.
def load_vision(folder: str | Path, dtype=None, device="cpu", config: VisionConfig | None = None,
                prepare=lambda module: None, found=None) -> ViT:
    """Load a CLIP's, SigLIP's, LLaVA's or checkpoint's vision encoder. prepare: see load_llm."""
    with torch.device("meta"):
        vit = ViT(config or vision_config(folder))
    prepare(vit)
    fill(vit, "vision_tower", found or find_tensors(folder), folder, dtype, device)
    return vit


def load_llm(folder: str | Path, dtype=None, device="cpu", config: DecoderConfig | None = None,
             prepare=lambda module: None, new=lambda name, shape: None, found=None) -> Decoder:
    """Load the decoder with its head. prepare(decoder) is called before it is filled: on the meta
    device it can be sharded over ranks at no cost. new: see fill."""
    with torch.device("meta"):
        llm = Decoder(config or decoder_config(folder))
    prepare(llm)
    fill(llm, "language_model", found or find_tensors(folder), folder, dtype, device, new)
    return llm


def load_projector(folder: str | Path, vision_size: int, hidden_size: int, dtype=None, device="cpu",
                   found=None) -> nn.Module:
    """Load the connector of a checkpoint, a whole LLaVA, or LLaVA's mm_projector.bin alone."""
    found = found or find_tensors(folder)
    c = read_config(folder) if (Path(folder) / "config.json").is_file() else {}
    name = configured(c)
    if "multi_modal_projector.bert.embeddings.word_embeddings.weight" in found:
        raise UserError(f"{folder} has a Q-Former that reads the text too (MIR's), which is not "
                        "supported; a new one can start from it: "
                        f"--connector {name} --projector {folder}")
    with torch.device("meta"):
        projector = make_connector(name, vision_size, hidden_size)
    fill(projector, "multi_modal_projector", found, folder, dtype, device, unit_norm)
    if c.get("model_type") == TINY and c.get("text_config", {}).get("model_type") == "gemma":
        # TinyLLaVA's Gemma (transformers 4.40) multiplied image tokens by sqrt(hidden size) too.
        # Our decoder, as transformers 5, does so with words alone: the last map takes over.
        for p in list(projector.children())[-1].parameters():
            p.data *= hidden_size ** 0.5
    return projector


def unit_norm(name: str, shape: torch.Size) -> Tensor | None:
    """Return weights that change nothing, for the norm that a TinyLLaVA's Q-Former lacks."""
    if name.startswith("bert.embeddings.LayerNorm."):
        return torch.full(shape, float(name.endswith("weight")))


def start_qformer(qformer: nn.Module, folder: str | Path) -> list[str]:
    """Fill a new Q-Former from that of a BLIP-2, LLaVA or checkpoint; what reads text there is left
    out. Returns the maps from another vision encoder or to another language model, which stay new.
    Raises UserError for any other difference."""
    prefix, own = "multi_modal_projector.", dict(qformer.named_parameters())
    found = {name: place for name, place in find_tensors(folder).items()
             if name.removeprefix(prefix) in own}
    for name, tensor in read_tensors(dict(found), check=False):
        if BETWEEN.match(name) and tensor.shape != own[name.removeprefix(prefix)].shape:
            del found[name]
    left = [name for name in own if BETWEEN.match(prefix + name) and prefix + name not in found]
    fill(qformer, "multi_modal_projector", found, folder,
         new=lambda name, shape: own[name].data if name in left else unit_norm(name, shape))
    return left


def load_moca(folder: str | Path, llm: Decoder, dtype=None, device="cpu", found=None) -> None:
    """Add to `llm` the MoCa layers that a stage-1 checkpoint may store beside its projector."""
    found = found or find_tensors(folder)
    if any(name.startswith("language_model.moca.") for name in found):
        with torch.device("meta"):
            llm.add_moca()
        fill(llm.moca, "language_model.moca", found, folder, dtype, device)
