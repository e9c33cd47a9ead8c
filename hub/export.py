"""A checkpoint of ours → a folder in the layout of llava-hf's repositories, for transformers and what builds on it.

    python py export CKPT OUT

What cannot come along: later rounds of a conversation. transformers writes "</s>USER" as encode_text's `legacy` rule
does, LLaVA-1.5 was trained without that space. First rounds, all that benchmarks ask, have the same ids.
"""
import json
import os
import shutil
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from common.files import read_json
from common.flags import UserError, option
from data import IMAGE, TEMPLATES, ImageProcessor, eos_id
from hub.checkpoint import checkpoint_folder, load_model
from hub.tokenizer import load_tokenizer
from methods.lora import merge
from model import DecoderConfig, Llava, VisionConfig

PAD = "<pad>"
SHARD = 5_000_000_000                                                       # bytes, at most
ACTS = {"gelu_tanh": "gelu_pytorch_tanh"}                                   # transformers' names, where others
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
class Bases:
    """Where the parts of a stage-1 checkpoint are now, if they moved since."""
    vision: str | None = option(None, "folder of the vision encoder")
    llm: str | None = option(None, "folder of the language model")


def chat_template(name: str) -> str:
    """One of our templates in Jinja. A message's content is a string, which may hold <image>, or parts as transformers
    has them: {type: image}, {type: text, text: …}."""
    if name == "plain":                                                     # the image alone: the request is dropped
        return "{{ '<image>' }}"
    t = TEMPLATES[name]
    (start, ask), (before, after) = t.user.split("{text}"), t.answer.split("{text}")
    first, later = start.replace("{system}", t.system), t.later + start.replace("{system}", "")
    out = MESSAGES
    for word, text in [("FIRST", first), ("LATER", later), ("ASK", ask), ("BEFORE", before), ("AFTER", after)]:
        out = out.replace(word, json.dumps(text))                           # a JSON string is one in Jinja too
    return out


def text_fields(c: DecoderConfig, vocab_size: int) -> dict:
    """`text_config` of llava-hf. Mistral's class is LLaMA's with a window."""
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings")
    out = {"model_type": "mistral" if c.sliding_window else "llama", "vocab_size": vocab_size,
           "hidden_act": ACTS.get(c.hidden_act, c.hidden_act), **{name: getattr(c, name) for name in fields}}
    return out | ({"sliding_window": c.sliding_window} if c.sliding_window else {})


def vision_fields(c: VisionConfig) -> dict:
    """`vision_config` of llava-hf."""
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
              "patch_size", "layer_norm_eps")
    kind = {"model_type": "clip_vision_model"} if c.class_token else {"model_type": "siglip_vision_model",
                                                                      "vision_use_head": False}
    return {**kind, "hidden_act": ACTS.get(c.hidden_act, c.hidden_act), **{name: getattr(c, name) for name in fields}}


def preprocessor_config(p: ImageProcessor, pad: bool) -> dict:
    """LlavaImageProcessor, for it can pad; CLIP's own always crops."""
    square = {"height": p.crop_size, "width": p.crop_size}
    return {"image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor", "do_convert_rgb": True,
            "do_pad": pad, "do_resize": True, "size": square if p.stretch else {"shortest_edge": p.size}, "resample": 3,
            "do_center_crop": not p.stretch, "crop_size": square, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(p.image_mean), "image_std": list(p.image_std)}


def check_exportable(folder: Path, model: Llava, template: str) -> None:
    """Raises UserError for a model that has no place in this layout."""
    c = model.language_model.config
    if c.moca:
        raise UserError(f"{folder} has MoCa, a map of image tokens after every layer: llava-hf's layout has no place "
                        "for it")
    llama = (c.norm, c.norm_plus_one, c.gated, c.bias, c.head_bias, c.parallel, c.partial_rotary_factor, c.embed_scale)
    if llama != ("rms", False, True, False, False, False, 1, 1) or template in ("phi", "phi3", "gemma"):
        raise UserError(f"{folder} is built on Phi-2, Phi-3 or Gemma: LLaMA's and Mistral's families can be exported")


def grow(weight: Tensor, rows: int) -> Tensor:
    """More rows below, each the mean of those there: as logits they never are the largest."""
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def save_tensors(tensors: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Writes model.safetensors, or shards and their index. One shard at a time is copied."""
    shards, size = [[]], 0
    for name, t in tensors.items():
        bytes_ = t.numel() * dtype.itemsize
        if shards[-1] and size + bytes_ > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    files = {}
    for n, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{n:05}-of-{len(shards):05}.safetensors"
        # a copy even where the dtype is right: parameters may share memory, which safetensors refuses
        save_file({name: tensors[name].to(dtype, copy=True).contiguous() for name in names}, folder / file,
                  metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(t.numel() for t in tensors.values()) * dtype.itemsize
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def add_tokens(tokenizer: Tokenizer) -> None:
    """<image> and <pad> behind the vocabulary, and a BOS in front of every text: transformers adds none by itself."""
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (IMAGE, PAD)])
    bos = tokenizer.token_to_id("<s>")
    if bos is None:
        raise UserError("the tokenizer has no '<s>', which LLaMA's and Mistral's families begin a text with")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)])


@torch.no_grad()
def export(ckpt: str | Path, out: str | Path, vision: str | None = None, llm: str | None = None) -> str:
    """Writes the llava-hf folder `out` of a checkpoint's folder, or of a run's newest, and says what it wrote.

    Every tensor keeps its value: all are written in the dtype that holds them all, float32 after training. Raises
    UserError for what cannot be exported, before anything is written."""
    folder, out = checkpoint_folder(ckpt), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: give another one")
    c = read_json(folder / "config.json")
    model = load_model(folder, vision, llm)
    check_exportable(folder, model, c["template"])
    merge(model.language_model)
    tokenizer, processor = load_tokenizer(folder), ImageProcessor.from_folder(folder)
    v, t = model.vision_tower.config, model.language_model.config
    old = t.vocab_size
    if tokenizer.get_vocab_size() > old:
        raise UserError(f"{folder} has a tokenizer of {tokenizer.get_vocab_size()} tokens for a vocabulary of {old}")
    eos = eos_id(tokenizer, c["template"])
    add_tokens(tokenizer)
    image, pad = tokenizer.token_to_id(IMAGE), tokenizer.token_to_id(PAD)
    rows = -(-max(old, image + 1, pad + 1) // 64) * 64

    tensors = {n.replace("vision_tower.", "vision_tower.vision_model."): p for n, p in model.named_parameters()}
    dtype = reduce(torch.promote_types, {p.dtype for p in tensors.values()})
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors:                                                 # a tied head is not there
            tensors[name] = grow(tensors[name], rows)
    strategy = "default" if v.class_token or v.drop_first_patch else "full"
    # The token that ends a plain caption is a newline, which is no special token: the family's stands in for it.
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": PAD}
    ids = {"bos_token_id": tokenizer.token_to_id("<s>"), "eos_token_id": eos, "pad_token_id": pad}

    temporary = out.parent / f".{out.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_json(temporary / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": image,
        "image_seq_length": v.image_tokens, "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
        "vision_feature_layer": model.vision_layer, "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": t.tie_word_embeddings, "pad_token_id": pad, "torch_dtype": str(dtype).split(".")[1],
        "vision_config": vision_fields(v), "text_config": text_fields(t, rows) | ids})
    write_json(temporary / "generation_config.json", ids)
    write_json(temporary / "preprocessor_config.json", preprocessor_config(processor, c["pad"]))
    write_json(temporary / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": v.patch_size,
        "vision_feature_select_strategy": strategy, "num_additional_image_tokens": int(v.class_token)})
    write_json(temporary / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor", **names,
        "model_max_length": t.max_position_embeddings, "padding_side": "left", "clean_up_tokenization_spaces": False})
    (temporary / "chat_template.jinja").write_text(chat_template(c["template"]), encoding="utf-8")
    tokenizer.save(str(temporary / "tokenizer.json"))
    save_tensors(tensors, dtype, temporary)
    os.replace(temporary, out)
    size = sum(p.numel() for p in tensors.values()) * dtype.itemsize / 1e9
    return (f"{out}: {size:.2f} GB in {str(dtype).split('.')[1]}; the vocabulary grew from {old} to {rows} rows, "
            f"{IMAGE} is {image}, {PAD} is {pad}")
