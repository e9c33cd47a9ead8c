"""config.json of a folder of weights → VisionConfig, DecoderConfig."""
import dataclasses
import re
from pathlib import Path

from common.files import read_json
from common.flags import UserError
from data import ImageProcessor
from model import ACTIVATIONS, DecoderConfig, VisionConfig

# A released config.json may leave out what is the default of its class, and never says what holds for its whole family.
DECODERS = {
    "llama": dict(),
    "mistral": dict(num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072,
                    sliding_window=4096),
    "qwen2": dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
                  sliding_window=4096, qkv_bias=True),
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
# Names of activations in released files → in model.py. Export writes the first name of each.
ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
OURS, LLAVA_HF, LLAVA_L, TINY = "nanoalign", "llava", "llava_llama", "tinyllava"       # model_type of whole models
HUB_ID = re.compile(r"(?!(out|toy|data|weights)/)\w[\w.-]*/\w[\w.-]*")    # organization/name; not our own folders


def refuse_hub_id(folder: str | Path) -> None:
    """Raise UserError if `folder` is no folder but reads like a Hugging Face id."""
    name = str(folder)
    if HUB_ID.fullmatch(name) and not Path(name).parent.exists():
        raise UserError(f"there is no folder {name}, and nothing is downloaded here: if that is a Hugging Face id, run "
                        f"huggingface-cli download {name} --local-dir DIR, then give DIR")


def read_config(folder: str | Path) -> dict:
    """Return the config.json of a folder. Raises UserError if there is none."""
    refuse_hub_id(folder)
    path = Path(folder) / "config.json"
    c = read_json(path)
    if not isinstance(c, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return c


def check_supported(path: Path, fields: list[tuple[str, object, bool]]) -> None:
    """Raise UserError for the first of (field of the file, its value, is it supported) that is not supported."""
    for field, value, supported in fields:
        if not supported:
            raise UserError(f"{path} asks for {field} {value!r}, which is not supported")


def from_fields(cls, defaults: dict, c: dict, fixed=()):
    """Return a config dataclass: `defaults`, replaced by the fields of config.json `c` that `cls` has. The file cannot
    change the fields in `fixed`."""
    known = {f.name for f in dataclasses.fields(cls)} - set(fixed)
    # null means unset, except for sliding_window, where it means no window.
    given = {k: v for k, v in c.items() if k in known and (v is not None or k == "sliding_window")}
    return cls(**defaults | given)


def vision_config(folder: str | Path) -> VisionConfig:
    """Return the config of a vision encoder. Reads folders of CLIP or SigLIP (both towers, or the vision tower alone),
    llava-hf, TinyLLaVA, and our checkpoints. Raises UserError for any other."""
    path, c = Path(folder) / "config.json", read_config(folder)
    kind = c.get("model_type")
    if kind == OURS:
        return VisionConfig(**c["vision_config"])
    kind = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}.get(kind, kind)
    if "vision_config" in c:
        c = c["vision_config"]
        kind = c.get("model_type") or (kind if kind in VISION else "clip_vision_model")
    if kind not in VISION:
        raise UserError(f"{path} has model_type {kind!r}; a CLIP or SigLIP vision encoder is supported")

    act = c.get("hidden_act", VISION[kind].get("hidden_act", "quick_gelu"))
    act = ACTIVATION_NAMES.get(act, act)
    check_supported(path, [("hidden_act", act, act in ("quick_gelu", "gelu", "gelu_tanh"))])
    return from_fields(VisionConfig, VISION[kind], {**c, "hidden_act": act}, ("class_token", "drop_first_patch"))


def decoder_config(folder: str | Path) -> DecoderConfig:
    """Return the config of a language model. Reads folders of LLaMA, Mistral, Qwen2, Phi-2, Phi-3, Gemma, LLaVA, and
    our checkpoints. Raises UserError for any other, and for a variant that would compute something else."""
    path, top = Path(folder) / "config.json", read_config(folder)
    if top.get("model_type") == OURS:
        return DecoderConfig(**top["text_config"])
    c = top
    if c.get("model_type") in (LLAVA_HF, TINY) and "text_config" in c:
        c = {"model_type": "llama", **c["text_config"]}
    kind = c.get("model_type")
    if kind in (LLAVA_L, LLAVA_HF):
        kind = "llama"                                          # liuhaotian's: LLaMA's fields, not nested
    if kind not in DECODERS:
        raise UserError(f"{path} has model_type {kind!r}; supported are {', '.join(DECODERS)}")

    # transformers 5 keeps everything about rotary positions in rope_parameters, earlier ones in separate fields.
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    act = c.get("hidden_activation") or c.get("hidden_act") or DECODERS[kind].get("hidden_act", "silu")
    act = ACTIVATION_NAMES.get(act, act)
    if kind == "gemma":
        act = "gelu_tanh"                                       # its files say gelu, its code computes the tanh form
    quantized = "quantization_config" in c or "quantization_config" in top
    switches = [(field, True, not c.get(field)) for field in ("attention_bias", "mlp_bias", "qk_layernorm")]
    first_window = c.get("max_window_layers", 28)         # Qwen2's window acts from this layer on
    windows = kind == "qwen2" and c.get("use_sliding_window") and first_window < c.get("num_hidden_layers", 32)
    scaled = scaling == "llama3" and set(rope) >= set(LLAMA3)
    check_supported(path, [("rope scaling", scaling, scaling == "default" or scaled),
                           ("hidden_act", act, act in ACTIVATIONS), ("quantization_config", "…", not quantized),
                           ("max_window_layers", first_window, not windows or first_window == 0)] + switches)

    fields = {**c, "hidden_act": act, "moca": bool(top.get("use_moca"))}
    fields["rope_scaling"] = {name: rope[name] for name in LLAMA3} if scaled else None
    for name in ("rope_theta", "partial_rotary_factor"):
        fields[name] = rope.get(name, c.get(name))
    fields["rms_norm_eps"] = c.get("layer_norm_eps" if kind == "phi" else "rms_norm_eps")
    fixed = ["norm", "norm_plus_one", "gated", "bias", "head_bias", "parallel", "embed_scale", "qkv_bias"]
    if kind == "qwen2" and not windows:
        fields["sliding_window"] = None
    if kind not in ("mistral", "phi3", "qwen2"):
        fixed.append("sliding_window")                          # the other families ignore the field
    config = from_fields(DecoderConfig, DECODERS[kind], fields, fixed)
    if kind == "gemma":
        config.embed_scale = config.hidden_size ** 0.5
    return config


# ------------------------------------------------------------------------------------------------ images
def load_processor(folder: str | Path) -> ImageProcessor:
    """Read preprocessor_config.json. Raises UserError if it lacks a field or asks for another interpolation."""
    path = Path(folder) / "preprocessor_config.json"
    c = read_json(path)
    absent = [k for k in ("size", "image_mean", "image_std") if k not in c]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}: it belongs to another kind of model")
    if c.get("resample", 3) not in (2, 3):
        raise UserError(f"{path} resamples by {c['resample']}; 3, bicubic, and 2, bilinear, are supported")

    def edge(size) -> int:                                  # 336, {"shortest_edge": 336} or {"height": 336, …}
        return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
    stretch = "crop_size" not in c or c.get("do_center_crop") is False
    crop_size = c["size"] if stretch else c["crop_size"]
    return ImageProcessor(edge(c["size"]), edge(crop_size), stretch, tuple(c["image_mean"]), tuple(c["image_std"]),
                          c.get("resample", 3))
