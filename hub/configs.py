"""config.json of released checkpoints → VisionConfig, DecoderConfig."""
import dataclasses
from pathlib import Path

from common.files import read_json
from common.flags import UserError
from model import ACTIVATIONS, DecoderConfig, VisionConfig

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
