"""config.json of a folder of weights → VisionConfig, DecoderConfig."""
import math
import re
from pathlib import Path
from typing import get_args, get_type_hints

from common.files import KINDS, read_json
from common.flags import UserError
from common.templates import TEMPLATES
from common.text import RULES
from data import ImageProcessor
from hub.tensors import CODE_VERSION
from model import ACTIVATIONS, DecoderConfig, VisionConfig

# What a released config.json does not say: defaults of its class, and what holds for its family.
DECODERS = {
    "llama": dict(),
    "mistral": dict(num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072,
                    sliding_window=4096),
    "qwen2": dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
                  max_position_embeddings=32768, sliding_window=4096, qkv_bias=True),
    "phi": dict(vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
                rms_norm_eps=1e-5, partial_rotary_factor=0.5, hidden_act="gelu_tanh", norm="layer",
                gated=False, bias=True, head_bias=True, parallel=True),
    "phi3": dict(vocab_size=32064, hidden_size=3072, intermediate_size=8192, rms_norm_eps=1e-5,
                 max_position_embeddings=4096),
    "gemma": dict(vocab_size=256000, hidden_size=3072, intermediate_size=24576, head_dim=256,
                  num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=16,
                  max_position_embeddings=8192, tie_word_embeddings=True, hidden_act="gelu_tanh",
                  norm_plus_one=True)}
SIGLIP = dict(patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu_tanh", class_token=False)
VISION = {"clip": {}, "clip_vision_model": {}, "siglip": SIGLIP, "siglip_vision_model": SIGLIP}
# Names of activations in released files → in model.py. Export writes the first name of each.
ACTIVATION_NAMES = dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# The model_type of whole models.
OURS, LLAVA_HF, LLAVA_L, TINY = "nanoalign", "llava", "llava_llama", "tinyllava"
RELEASED = (LLAVA_HF, LLAVA_L, TINY)
# Fields of config.json whose type is checked wherever they stand; null means unset.
FIELDS = {str: ("model_type", "hidden_act", "hidden_activation", "stage", "template",
                "after_special", "vision", "llm", "connector", "connector_type", "mm_projector_type",
                "projector_hidden_act", "vision_feature_select_strategy", "mm_vision_select_feature"),
          dict: ("rope_scaling", "rope_parameters", "vision_config", "text_config", "settings"),
          int: ("step", "steps", "max_length", "vision_layer", "max_window_layers", "num_hidden_layers",
                "tokenizer_model_max_length", "num_queries"), bool: ("pad", "plain_specials")}
MOST = {"num_hidden_layers": 1000, "image_size": 16384, "crop_size": 16384, "size": 16384}
MOST_ANYWHERE = 1 << 24             # of a model's other sizes: tables, widths, heads, positions
HUB_ID = re.compile(r"(?!(out|toy|data|weights)/)\w[\w.-]*/\w[\w.-]*")      # not our own folders


def refuse_hub_id(folder: str | Path) -> None:
    """Raise UserError if `folder` is no folder but reads like a Hugging Face id."""
    name = str(folder)
    if HUB_ID.fullmatch(name) and not Path(name).parent.exists():
        raise UserError(f"there is no folder {name}, and nothing is downloaded here: if that is a "
                        f"Hugging Face id, run huggingface-cli download {name} --local-dir DIR, "
                        "then give DIR")


def read_config(folder: str | Path, *needed: str) -> dict:
    """Return the config.json of a folder. Raises UserError if it is missing or lacks a `needed`
    field, for a field of another type, and for a LLaVA that cuts images into tiles."""
    refuse_hub_id(folder)
    path = Path(folder) / "config.json"
    c = read_json(path, dict)
    for part in (c, c.get("vision_config") or {}, c.get("text_config") or {}):
        for kind, names in FIELDS.items():
            for name in names:
                value = part.get(name)
                if value is not None and type(value) is not kind:
                    raise UserError(f"{path}: {name} is {str(value)[:60]!r}, not {KINDS[kind]}")
    for name in needed:
        if c.get(name) is None:
            raise UserError(f"{path} has no {name}: it was cut, or is of another kind of model")
    kind, aspect = c.get("model_type") or "", str(c.get("image_aspect_ratio"))
    if kind.startswith(("llava_next", "llava_onevision")) or aspect.startswith("anyres"):
        raise UserError(f"{path} is of LLaVA-NeXT or OneVision (model_type {kind}): "
                        "any-resolution tiles are not supported; take a LLaVA-1.5")
    if kind == OURS:
        version = c.get("code_version", 0)
        if type(version) is not int or not 0 <= version <= CODE_VERSION:
            raise UserError(f"{path} has code_version {version!r}, this nanoalign knows "
                            f"{CODE_VERSION} and older: use the version that wrote it")
        template, rule = c.get("template"), c.get("after_special")
        check_supported(path, [("template", template, template in [None, *TEMPLATES]),
                               ("after_special", rule, rule in [None, *RULES])])
    return c


def check_supported(path: Path, fields: list[tuple[str, object, bool]]) -> None:
    """Raise UserError for the first of (field of the file, its value, supported) that is not."""
    for field, value, supported in fields:
        if not supported:
            raise UserError(f"{path} asks for {field} {value!r}, which is not supported")


def from_fields(path: Path, cls, defaults: dict, c: dict, fixed=()):
    """Return a config dataclass: `defaults`, replaced by the fields of config.json `c` that `cls`
    has, except those in `fixed`. Raises UserError for a value that no model has."""
    given = {}
    for name, kind in get_type_hints(cls).items():
        # null means unset, except for sliding_window, where it means no window.
        if name in c and name not in fixed and (c[name] is not None or name == "sliding_window"):
            check_value(path, name, c[name], kind)
            given[name] = c[name]
    config = cls(**defaults | given)
    if problem := shape_problem(config):
        raise UserError(f"{path}: {problem}")
    return config


def check_value(path: Path, name: str, value, kind) -> None:
    """Raise UserError for a value of another type, or a number that no model has."""
    kinds = get_args(kind) or (kind,)
    if type(value) is int and float in kinds:
        value = float(value) if abs(value) < 1e15 else math.inf
    good = type(value) in kinds
    if good and type(value) is int:
        good = 0 < value <= MOST.get(name, MOST_ANYWHERE) or value == 0 and name == "lora_rank"
    elif good and type(value) is float:
        good = 0 <= value < 1e15 and (value > 0 or name != "rope_theta")
    if not good:
        raise UserError(f"{path}: {name} is {str(value)[:60]!r}, which no model has")


def shape_problem(c: VisionConfig | DecoderConfig) -> str | None:
    """Return which two sizes do not go together, or None."""
    if c.hidden_act not in ACTIVATIONS:
        return f"asks for hidden_act {c.hidden_act!r}, which is not supported"
    if isinstance(c, VisionConfig):
        if c.hidden_size % c.num_attention_heads:
            return f"hidden_size {c.hidden_size} is not divisible by {c.num_attention_heads} heads"
        if c.patch_size > c.image_size:
            return f"patch_size {c.patch_size} is larger than image_size {c.image_size}"
        return None
    if c.num_attention_heads % c.num_key_value_heads:
        return f"{c.num_attention_heads} heads are not divisible by {c.num_key_value_heads} heads of keys"
    rotated = int(c.head_dim * c.partial_rotary_factor)
    if rotated % 2 or not 0 < rotated <= c.head_dim:
        return f"{rotated} of the {c.head_dim} dimensions of a head are rotated; an even number of them must be"
    if c.rope_scaling is not None:
        numbers = [c.rope_scaling.get(name) for name in LLAMA3]
        positive = all(type(n) in (int, float) and 0 < n < 1e15 for n in numbers)
        if not positive or numbers[1] >= numbers[2]:
            return f"rope_scaling is {str(c.rope_scaling)[:80]}; it needs {', '.join(LLAMA3)}, low below high"
    return None


def vision_config(folder: str | Path) -> VisionConfig:
    """Return the config of a vision encoder: CLIP's or SigLIP's (with or without their text tower),
    llava-hf's, TinyLLaVA's or our checkpoints'. Raises UserError for any other."""
    path, c = Path(folder) / "config.json", read_config(folder)
    kind = c.get("model_type")
    if kind == OURS:
        own = read_config(folder, "vision_config")["vision_config"]
        return from_fields(path, VisionConfig, {}, own)
    if "vision_config" in c:
        c = c["vision_config"]
        kind = c.get("model_type") or (kind if kind in VISION else "clip")
    if kind not in VISION:
        raise UserError(f"{path} has model_type {kind!r}; a CLIP or SigLIP vision encoder is "
                        "supported")

    act = c.get("hidden_act", VISION[kind].get("hidden_act", "quick_gelu"))
    act = ACTIVATION_NAMES.get(act, act)
    check_supported(path, [("hidden_act", act, act in ("quick_gelu", "gelu", "gelu_tanh"))])
    fixed = ("class_token", "drop_first_patch")
    return from_fields(path, VisionConfig, VISION[kind], {**c, "hidden_act": act}, fixed)


def decoder_config(folder: str | Path) -> DecoderConfig:
    """Return the config of a language model: a family in DECODERS, a LLaVA's or our checkpoint's.
    Raises UserError for any other, and for variants that compute otherwise."""
    path, top = Path(folder) / "config.json", read_config(folder)
    if top.get("model_type") == OURS:
        return from_fields(path, DecoderConfig, {}, read_config(folder, "text_config")["text_config"])
    c = top
    if c.get("model_type") in (LLAVA_HF, TINY) and "text_config" in c:
        c = {"model_type": "llama", **c["text_config"]}
    kind = c.get("model_type")
    if kind in (LLAVA_L, LLAVA_HF):
        kind = "llama"                                    # liuhaotian's: LLaMA's fields, not nested
    if kind not in DECODERS:
        raise UserError(f"{path} has model_type {kind!r}; supported are {', '.join(DECODERS)}")

    # transformers 5 keeps all about rotary positions in rope_parameters, earlier ones in fields.
    scaled = c.get("rope_scaling") or {}
    rope = {**scaled, **(c.get("rope_parameters") or {})}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    typed = not scaled or "rope_type" in scaled or "type" in scaled
    llama3 = scaling == "llama3" and set(rope) >= set(LLAMA3)
    act = c.get("hidden_activation") or c.get("hidden_act") or DECODERS[kind].get("hidden_act", "silu")
    act = ACTIVATION_NAMES.get(act, act)
    if kind == "gemma":
        act = "gelu_tanh"                                 # its files say gelu, its code does this
    first_window = c.get("max_window_layers", 28)         # Qwen2's window acts from this layer on
    windows = kind == "qwen2" and c.get("use_sliding_window") and first_window < c.get("num_hidden_layers", 32)
    quantized = top.get("quantization_config", c.get("quantization_config"))
    unsupported = ("attention_bias", "mlp_bias", "qk_layernorm")
    check_supported(path, [("rope scaling", scaling, scaling == "default" or llama3),
                           ("rope_scaling without a type,", scaled, typed),
                           ("hidden_act", act, act in ACTIVATIONS),
                           ("quantization_config", quantized, quantized is None),
                           ("max_window_layers", first_window, not windows or first_window == 0),
                           *((field, True, not c.get(field)) for field in unsupported)])

    fields = {**c, "hidden_act": act, "moca": bool(top.get("use_moca"))}
    fields["rope_scaling"] = {name: rope[name] for name in LLAMA3} if llama3 else None
    if top.get("tie_word_embeddings") is True:            # transformers 5 may say so there alone
        fields["tie_word_embeddings"] = True
    for name in ("rope_theta", "partial_rotary_factor"):
        fields[name] = rope.get(name, c.get(name))
    fields["rms_norm_eps"] = c.get("layer_norm_eps" if kind == "phi" else "rms_norm_eps")
    if kind not in ("mistral", "phi3") and not windows:
        fields["sliding_window"] = None                   # the other families ignore the field
    fixed = ["norm", "norm_plus_one", "gated", "bias", "head_bias", "parallel", "embed_scale", "qkv_bias"]
    config = from_fields(path, DecoderConfig, DECODERS[kind], fields, fixed)
    if kind == "gemma":
        config.embed_scale = config.hidden_size ** 0.5
    return config


# ------------------------------------------------------------------------------------------- images
def image_settings(folder: str | Path, vision: str | Path | None = None) -> tuple[Path, dict]:
    """Return (file that says how images are prepared, what it says): preprocessor_config.json, or
    transformers 5's processor_config.json, in `folder`, else in `vision`. Raises UserError."""
    for place in (folder, vision or folder):
        older, newer = Path(place) / "preprocessor_config.json", Path(place) / "processor_config.json"
        if older.is_file():
            return older, read_json(older, dict)
        c = read_json(newer, dict) if newer.is_file() else {}
        if isinstance(c.get("image_processor"), dict):
            return newer, c["image_processor"]
    raise UserError(f"{older} does not exist: copy it there from where the weights came from, or "
                    "say with --vision where the vision encoder is")


def load_processor(folder: str | Path, vision: str | Path | None = None) -> ImageProcessor:
    """Read the image settings of a folder. Raises UserError if they are not supported."""
    path, c = image_settings(folder, vision)
    absent = [k for k in ("size", "image_mean", "image_std") if k not in c]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}: it belongs to another kind of model")
    resample = c.get("resample", 3)
    if resample not in (2, 3):
        raise UserError(f"{path} resamples by {resample}; 3, bicubic, and 2, bilinear, are "
                        "supported")
    for name in ("image_mean", "image_std"):
        good = isinstance(c[name], list) and len(c[name]) == 3
        good = good and all(type(x) in (int, float) and 0 <= x < 1000 for x in c[name])
        if not good or name == "image_std" and 0 in c[name]:
            raise UserError(f"{path}: {name} is {str(c[name])[:60]}, not three numbers as images "
                            "have them")

    def edge(name: str) -> int:
        size = c[name]                          # 336, {"shortest_edge": 336} or {"height": 336, …}
        if isinstance(size, dict):
            size = size.get("shortest_edge") or size.get("height")
        check_value(path, name, size, int)
        return size

    stretch = "crop_size" not in c or c.get("do_center_crop") is False
    size, crop_size = edge("size"), edge("size" if stretch else "crop_size")
    mean, std = tuple(c["image_mean"]), tuple(c["image_std"])
    return ImageProcessor(size, crop_size, stretch, mean, std, resample)
