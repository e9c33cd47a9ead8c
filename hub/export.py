"""python -m hub export CKPT OUT: a checkpoint → a folder in llava-hf's layout, for transformers.

The first round of a conversation, which is all that benchmarks ask, has the same ids there. Later
ones differ in one point: transformers encodes "</s>USER" by the `legacy` rule of common/text.py;
LLaVA-1.5 was trained without that space.
"""
import json
import math
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from common.files import new_folder, write_json, write_text
from common.flags import UserError, option
from common.text import bos_ids
from data import IMAGE, TEMPLATES, ImageProcessor, eos_id
from hub.checkpoint import load_model
from hub.configs import ACTIVATION_NAMES, load_processor
from hub.connectors import name_of
from hub.tensors import save_tensors
from hub.tokenizer import load_tokenizer
from hub.usage import Usage, model_folder, read_usage
from methods.lora import merge
from model import DecoderConfig, Llava, VisionConfig

PAD = "<pad>"
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
# The chat template in Jinja. chat_template fills in the words in capitals.
MESSAGES = """\
{%- for message in messages %}
    {%- if message['role'] not in ('user', 'assistant') %}
        {{- raise_exception('messages have the roles user and assistant, not ' ~ message['role']) }}
    {%- endif %}
    {%- set ns = namespace(text='', image=false) %}
    {%- if message['content'] is string %}
        {%- set ns.text = message['content'] %}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}{% set ns.image = true %}{% endif %}
            {%- if part['type'] == 'text' %}{% set ns.text = ns.text ~ part['text'] %}{% endif %}
        {%- endfor %}
    {%- endif %}
    {%- if ns.image or '<image>' in ns.text %}
        {%- set ns.text = ('<image>\\n' ~ (ns.text | replace('<image>', '') | trim)) | trim %}
    {%- endif %}
    {%- set ns.text = TRIM %}
    {%- if message['role'] == 'user' %}
        {{- FIRST if loop.first else LATER }}
        {{- ns.text }}
        {%- if add_generation_prompt or not loop.last %}
            {{- ASK }}
        {%- endif %}
    {%- else %}
        {{- BEFORE ~ ns.text ~ AFTER }}
    {%- endif %}
{%- endfor %}
"""


@dataclass
class ExportFlags:
    """Write CKPT (a checkpoint, run or released LLaVA) to a new folder OUT in llava-hf's layout."""
    vision: str | None = option(None, "the vision encoder of a stage-1 checkpoint, or of a LLaVA "
                                      "that holds none", "parts that lie elsewhere")
    llm: str | None = option(None, "where its language model is now")


# --------------------------------------------------------------------------------------------- text
def chat_template(name: str) -> str:
    """Return one of data.TEMPLATES in Jinja. A message's content is a string, which may hold
    <image>, or a list of parts as transformers has them: {type: image}, {type: text, text: …}."""
    if name == "plain":
        return "{{ '<image>' }}"                # the request is thrown away
    t = TEMPLATES[name]
    start, ask = t.user.split("{text}")
    before, after = t.answer.split("{text}")
    first, later = start.replace("{system}", t.system), t.later + start.replace("{system}", "")
    words = {"FIRST": first, "LATER": later, "ASK": ask, "BEFORE": before, "AFTER": after + t.after}
    out = MESSAGES.replace("TRIM", "ns.text | trim" if t.strip else "ns.text")
    for word, text in words.items():
        out = out.replace(word, json.dumps(text))       # a JSON string is a Jinja string too
    return out


def extend_tokenizer(tokenizer: Tokenizer) -> None:
    """Add <image> and <pad> after the vocabulary, and put the family's BOS, if it has one, in front
    of every text: transformers adds none itself."""
    for token in (IMAGE, PAD):
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    for i in bos_ids(tokenizer):
        bos = tokenizer.id_to_token(i)
        tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                                      special_tokens=[(bos, i)])


# ------------------------------------------------------------------------------------------ configs
def shared_fields(c: VisionConfig | DecoderConfig, *names: str) -> dict:
    """Return fields of our config as transformers has them: the activation by its released name."""
    both = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    released = [name for name, ours in ACTIVATION_NAMES.items() if ours == c.hidden_act]
    act = released[0] if released else c.hidden_act
    return {"hidden_act": act, **{name: getattr(c, name) for name in both + names}}


def text_fields(c: DecoderConfig, vocab_size: int) -> dict:
    """Return `text_config` of llava-hf. Mistral is LLaMA with a window, Qwen2 with biases."""
    out = shared_fields(c, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
                        "max_position_embeddings", "tie_word_embeddings")
    out["vocab_size"] = vocab_size
    if c.rope_scaling:
        out["rope_scaling"] = {"rope_type": "llama3", **c.rope_scaling}
    if c.qkv_bias:
        first = 0 if c.sliding_window else c.num_hidden_layers  # layer with a window
        return {"model_type": "qwen2", **out, "use_sliding_window": bool(c.sliding_window),
                "sliding_window": c.sliding_window, "max_window_layers": first}
    if c.norm_plus_one:
        return {"model_type": "gemma", **out, "hidden_activation": out["hidden_act"]}
    if c.sliding_window:
        return {"model_type": "mistral", **out, "sliding_window": c.sliding_window}
    return {"model_type": "llama", **out}


def vision_fields(c: VisionConfig) -> dict:
    """Return `vision_config` of llava-hf."""
    out = shared_fields(c, "image_size", "patch_size", "layer_norm_eps")
    if c.class_token:
        return {"model_type": "clip_vision_model", **out}
    return {"model_type": "siglip_vision_model", "vision_use_head": False, **out}


def preprocessor_config(p: ImageProcessor, pad: bool) -> dict:
    """Return preprocessor_config.json. LlavaImageProcessor can pad to a square; CLIP's cannot."""
    square = {"height": p.crop_size, "width": p.crop_size}
    return {"image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor",
            "do_convert_rgb": True, "do_pad": pad, "do_resize": True, "resample": p.resample,
            "size": square if p.stretch else {"shortest_edge": p.size}, "crop_size": square,
            "do_center_crop": not p.stretch, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(p.image_mean), "image_std": list(p.image_std)}


def special_tokens(tokenizer: Tokenizer, template: str) -> dict:
    """Return the fields of tokenizer_config.json that name special tokens."""
    # A plain caption ends in a newline, no special token: the family's EOS stands in its place.
    ends = [t.eos for t in (TEMPLATES[template], *TEMPLATES.values()) if t.eos != "\n"]
    eos = next(eos for eos in ends if tokenizer.token_to_id(eos) is not None)
    names = {"eos_token": eos, "pad_token": PAD}
    for i in bos_ids(tokenizer):
        names["bos_token"] = tokenizer.id_to_token(i)
    if tokenizer.token_to_id("<unk>") is not None:
        names["unk_token"] = "<unk>"
    return names


def write_configs(folder: Path, use: Usage, model: Llava, tokenizer: Tokenizer, rows: int,
                  dtype: torch.dtype) -> None:
    """Write the JSON files of the layout. tokenizer: extended; rows: of the embedding table.
    transformers keeps template and after_special, which it does not know, for read_usage."""
    v, t = model.vision_tower.config, model.language_model.config
    strategy = "default" if v.class_token or v.drop_first_patch else "full"
    bos = bos_ids(tokenizer)
    ids = {"eos_token_id": eos_id(tokenizer, use.template),
           "bos_token_id": bos[0] if bos else None, "pad_token_id": tokenizer.token_to_id(PAD)}
    write_json(folder / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": tokenizer.token_to_id(IMAGE), "image_seq_length": v.image_tokens,
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "template": use.template,
        "after_special": use.after_special, "vision_feature_layer": model.vision_layer,
        "vision_feature_select_strategy": strategy, "tie_word_embeddings": t.tie_word_embeddings,
        "pad_token_id": ids["pad_token_id"], "torch_dtype": str(dtype).removeprefix("torch."),
        "vision_config": vision_fields(v), "text_config": text_fields(t, rows) | ids})
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": v.patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(v.class_token)})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor",
        **special_tokens(tokenizer, use.template), "model_max_length": t.max_position_embeddings,
        "padding_side": "left", "clean_up_tokenization_spaces": False})
    write_text(folder / "chat_template.jinja", chat_template(use.template))


# ------------------------------------------------------------------------------------------- export
def check_exportable(folder: Path, model: Llava, tokenizer: Tokenizer, template: str) -> None:
    """Raise UserError for a model that has no place in this layout."""
    c, tokens = model.language_model.config, tokenizer.get_vocab_size()
    if c.moca:
        raise UserError(f"{folder} has MoCa, a map of image tokens after every layer: llava-hf's "
                        "layout has no place for it")
    name = name_of(model.multi_modal_projector)
    if name != "mlp2x":
        raise UserError(f"{folder} has the connector {name}: llava-hf's layout holds mlp2x alone")
    if c.head_bias:
        raise UserError(f"{folder} is built on Phi-2, whose head has a bias: transformers' LLaVA "
                        "has none, and would drop it and compute other logits")
    scale = c.hidden_size ** 0.5 if c.norm_plus_one else 1      # Gemma's, all others'
    other = c.norm != "rms" or not c.gated or c.bias or c.parallel or c.partial_rotary_factor != 1
    mixed = c.norm_plus_one and c.qkv_bias                      # Gemma's norms, Qwen2's biases
    if other or mixed or c.embed_scale != scale or template == "phi3":
        raise UserError(f"{folder} is built on Phi-3, or on no family: those of LLaMA, Mistral, "
                        "Qwen2 and Gemma can be exported")
    if tokens > c.vocab_size:
        raise UserError(f"{folder} has a tokenizer of {tokens} tokens for a vocabulary of {c.vocab_size}")
    eos_id(tokenizer, template)         # raises if the template is another family's


def grow(weight: Tensor, rows: int) -> Tensor:
    """Append rows until there are `rows`: each the mean of all, so never the largest logit."""
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


@torch.no_grad()
def export(ckpt: str | Path, out: str | Path, vision: str | None = None, llm: str | None = None) -> str:
    """Write the llava-hf folder `out` of a checkpoint, or of a run's newest. Returns a summary.

    Every tensor keeps its value: all are written in the smallest dtype that holds them all, float32
    after training. Raises UserError for what cannot be exported, before anything is written."""
    folder, out = model_folder(ckpt), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: give another one")
    use, model = read_usage(folder, vision), load_model(folder, vision, llm)
    tokenizer, processor = load_tokenizer(folder), load_processor(folder, vision)
    old = model.language_model.config.vocab_size
    check_exportable(folder, model, tokenizer, use.template)
    merge(model.language_model)

    # The vocabulary: two more tokens, and rows in multiples of 64 as transformers pads them.
    extend_tokenizer(tokenizer)
    image, pad = tokenizer.token_to_id(IMAGE), tokenizer.token_to_id(PAD)
    rows = math.ceil(max(old, image + 1, pad + 1) / 64) * 64
    tensors = {}
    for name, p in model.named_parameters():
        new = name.replace("vision_tower.", "vision_tower.vision_model.")
        tensors[new] = grow(p, rows) if name in EMBEDDINGS else p
    dtype = reduce(torch.promote_types, {t.dtype for t in tensors.values()})

    with new_folder(out) as temporary:
        write_configs(temporary, use, model, tokenizer, rows, dtype)
        write_json(temporary / "preprocessor_config.json", preprocessor_config(processor, use.pad))
        write_text(temporary / "tokenizer.json", tokenizer.to_str(pretty=True))
        save_tensors(temporary, tensors, dtype)
    size = sum(t.numel() for t in tensors.values()) * dtype.itemsize / 1e9
    return (f"{out}: {size:.2f} GB in {str(dtype).removeprefix('torch.')}; the vocabulary grew from {old} to {rows} "
            f"rows, {IMAGE} is {image}, {PAD} is {pad}")
