"""Every family of models: the values of transformers, each flag of each family, each layout of released checkpoints.

The fixtures are tiny models with golden values, written by
tests/make_fixtures.py. transformers is not needed here.
"""
import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.flags import UserError
from hub.checkpoint import load_model
from hub.configs import decoder_config, vision_config
from hub.released import PARTS, fill, find_tensors, load_llm, load_vision
from model import Decoder, KVCache, Llava, Projector, ViT

MODELS = Path(__file__).resolve().parent / "fixtures" / "models"
LLMS = ["llama", "mistral", "phi", "phi3", "gemma", "qwen2", "llama3"]
TOWERS = ["clip", "siglip", "clip_h", "siglip2"]
MODEL_TYPES = [family for family in LLMS if family != "llama3"]
TOLERANCE = 1e-5
IMAGE_ID = 60
ACTIVATIONS = {"silu": "silu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh"}


@functools.cache
def golden(family):
    return load_file(MODELS / family / "golden.safetensors")


def gap(ours, theirs):
    """Return the largest difference: infinite for tensors of different shapes, or with a NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    return (ours - theirs).abs().nan_to_num(float("inf")).max().item()


@torch.no_grad()
def llm_gap(llm, family):
    g = golden(family)
    states = [llm.embed(g["input_ids"])]
    last = llm(states[0], watch=lambda i, h, attention: states.append(h))
    # transformers: the last one is after the norm
    states[-1] = last
    return max(gap(torch.stack(states), g["hidden_states"]), gap(llm.lm_head(last), g["logits"]))


@torch.no_grad()
def vit_gap(vit, family):
    g = golden(family)
    layers = range(vit.config.num_hidden_layers + 1)
    return gap(torch.stack([vit.hidden_state(g["pixel_values"], i) for i in layers]),
               g["hidden_states"])


@torch.no_grad()
def llava_gap(model):
    g = golden("llava")
    states = []
    batch = SimpleNamespace(input_ids=g["input_ids"], image_mask=g["input_ids"] == IMAGE_ID,
                            pixel_values=g["pixel_values"])
    out = model(batch, watch=lambda i, h, attention: states.append(h))
    states[-1] = out.hidden_states
    return max(gap(out.image_embeds, g["image_embeds"]),
               gap(torch.stack(states), g["hidden_states"][1:]),
               gap(model.language_model.lm_head(out.hidden_states), g["logits"]))


def load(family, folder=None):
    """Load a decoder or a tower, in the dtype it is stored in."""
    return (load_vision if family in TOWERS else load_llm)(folder or MODELS / family)


def build(family, **changes):
    """Load a family's checkpoint under a config with some fields changed."""
    folder = MODELS / family
    tower = family in TOWERS
    config = dataclasses.replace((vision_config if tower else decoder_config)(folder), **changes)
    with torch.device("meta"):
        module = (ViT if tower else Decoder)(config)
    fill(module, "vision_tower" if tower else "language_model", find_tensors(folder), folder)
    return module


def assert_same(a, b):
    """Assert that parameters have the same names and bits, and configs are equal."""
    a_parameters, b_parameters = dict(a.named_parameters()), dict(b.named_parameters())
    assert a_parameters.keys() == b_parameters.keys()
    for name, p in a_parameters.items():
        assert torch.equal(p, b_parameters[name]) and p.dtype == b_parameters[name].dtype, name
    for part_a, part_b in zip(a.modules(), b.modules()):
        assert getattr(part_a, "config", None) == getattr(part_b, "config", None)


# ------------------------------------------------------------------------------------ golden values
@pytest.mark.parametrize("family", LLMS)
def test_a_decoder_computes_what_transformers_computes(family):
    assert llm_gap(load(family), family) < TOLERANCE


@pytest.mark.parametrize("family", TOWERS)
def test_a_vision_tower_computes_what_transformers_computes(family):
    vit, g = load(family), golden(family)
    assert vit_gap(vit, family) < TOLERANCE
    states = g["hidden_states"]
    for layer in (-1, -2, -3):
        assert gap(vit.hidden_state(g["pixel_values"], layer), states[layer]) < TOLERANCE
    patches = states[-2][:, 1:] if family.startswith("clip") else states[-2]
    assert gap(vit(g["pixel_values"]), patches) < TOLERANCE, "the class token goes, a patch stays"


def test_llava_computes_what_transformers_computes():
    assert llava_gap(load_model(MODELS / "llava")) < TOLERANCE


@pytest.mark.parametrize("family", LLMS)
@torch.no_grad()
def test_a_decoder_computes_the_same_token_by_token_from_a_cache(family):
    llm, g = load(family), golden(family)
    cache = KVCache(llm.config, 2, 12, torch.float32, "cpu")
    h = llm.embed(g["input_ids"])
    parts = []
    for start, end in [(0, 7), *((t, t + 1) for t in range(7, 12))]:
        positions = torch.arange(start, end).expand(2, -1)
        parts.append(llm(h[:, start:end], cache=cache, positions=positions, end=end))
    assert gap(torch.cat(parts, dim=1), g["hidden_states"][-1]) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "llama3"])
@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(family):
    llm, g = load(family), golden(family)
    model = Llava(load("clip"), Projector(16, 16), llm)
    for ids, answer in zip(g["input_ids"], g["greedy"].tolist()):
        assert model.generate(ids, None, torch.zeros_like(ids, dtype=torch.bool), 8) == answer


@pytest.mark.parametrize("family", LLMS)
@torch.no_grad()
def test_attention_of_every_layer_is_that_of_transformers(family):
    llm, g = load(family), golden(family)
    everything = torch.arange(12).expand(2, -1)
    maps = []
    llm(llm.embed(g["input_ids"]), watch=lambda i, h, attention: maps.append(attention),
        attend=(everything, everything))
    assert gap(torch.stack(maps), g["attention"]) < TOLERANCE


@pytest.mark.parametrize("family", LLMS)
@torch.no_grad()
def test_embeddings_in_bfloat16_are_bitwise_those_of_transformers(family):
    # Gemma's scale is rounded to bfloat16
    llm = load_llm(MODELS / family, torch.bfloat16)
    assert torch.equal(llm.embed(golden(family)["input_ids"]), golden(family)["embeds_bfloat16"])


@pytest.mark.parametrize("family", LLMS)
@torch.no_grad()
def test_norms_in_bfloat16_cast_where_those_of_transformers_do(family):
    g = golden(family)
    norm = load_llm(MODELS / family, torch.bfloat16).model["layers"][0].input_layernorm
    different = norm(g["embeds_bfloat16"]) != g["normed_bfloat16"]
    # 0 here; another machine may sum the squares in another order
    assert different.float().mean() < 0.01


# -------------------------------------------------------------------------------- each flag matters
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}
MUTANTS = [
    ("llama", dict(rms_norm_eps=1e-6)), ("llama", dict(rope_theta=10100.0)),
    ("llama", dict(partial_rotary_factor=0.5)),
    ("llama", dict(hidden_act="gelu_tanh")), ("llama", dict(norm="layer")),
    ("llama", dict(norm_plus_one=True)),
    ("llama", dict(gated=False)), ("llama", dict(bias=True)), ("llama", dict(head_bias=True)),
    ("llama", dict(parallel=True)), ("llama", dict(sliding_window=11)),
    ("llama", dict(embed_scale=4.0)),
    ("llama", dict(tie_word_embeddings=True)), ("llama", dict(num_key_value_heads=2)),
    ("llama", dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8)),
    ("llama", dict(num_hidden_layers=1)),
    ("llama", dict(num_hidden_layers=3)),
    ("mistral", dict(sliding_window=4)), ("mistral", dict(sliding_window=6)),
    ("mistral", dict(sliding_window=None)),
    ("mistral", dict(rope_theta=10000.0)), ("mistral", dict(rms_norm_eps=1e-6)),
    ("mistral", dict(num_key_value_heads=4)), ("mistral", dict(num_key_value_heads=1)),
    ("phi", dict(norm="rms")), ("phi", dict(rms_norm_eps=1e-5)),
    ("phi", dict(partial_rotary_factor=0.2)),
    ("phi", dict(partial_rotary_factor=1.0)), ("phi", dict(rope_theta=10100.0)),
    ("phi", dict(hidden_act="gelu")),
    ("phi", dict(hidden_act="silu")), ("phi", dict(gated=True)), ("phi", dict(bias=False)),
    ("phi", dict(head_bias=False)), ("phi", dict(parallel=False)),
    ("phi", dict(tie_word_embeddings=True)),
    ("phi3", dict(sliding_window=10)), ("phi3", dict(sliding_window=None)),
    ("phi3", dict(rms_norm_eps=1e-6)),
    ("phi3", dict(rope_theta=10100.0)), ("phi3", dict(partial_rotary_factor=0.5)),
    ("phi3", dict(hidden_act="gelu")),
    ("phi3", dict(num_key_value_heads=4)), ("phi3", dict(num_key_value_heads=1)),
    ("gemma", dict(norm_plus_one=False)), ("gemma", dict(embed_scale=1.0)),
    ("gemma", dict(hidden_act="gelu")),
    ("gemma", dict(hidden_act="silu")), ("gemma", dict(tie_word_embeddings=False)),
    ("gemma", dict(rms_norm_eps=1e-5)),
    ("gemma", dict(head_dim=4)),
    ("gemma", dict(num_attention_heads=8, num_key_value_heads=2, head_dim=4)),
    ("gemma", dict(rope_theta=10100.0)),
    ("qwen2", dict(qkv_bias=False)), ("qwen2", dict(bias=True)), ("qwen2", dict(sliding_window=5)),
    ("qwen2", dict(tie_word_embeddings=False)), ("qwen2", dict(rms_norm_eps=1e-6)),
    ("qwen2", dict(rope_theta=1010.0)),
    ("qwen2", dict(num_key_value_heads=4)), ("qwen2", dict(num_key_value_heads=1)),
    ("qwen2", dict(hidden_act="gelu")),
    ("qwen2", dict(norm_plus_one=True)),
    ("llama3", dict(rope_scaling=None)), ("llama3", dict(rope_scaling=LLAMA3 | {"factor": 4.0})),
    ("llama3", dict(rope_scaling=LLAMA3 | {"low_freq_factor": 1.5})), ("llama3", dict(head_dim=4)),
    ("llama3", dict(rope_scaling=LLAMA3 | {"high_freq_factor": 3.0})),
    ("llama3", dict(rope_theta=101.0)),
    ("llama3", dict(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 64})),
    ("llama3", dict(qkv_bias=True)),
    ("clip_h", dict(hidden_act="quick_gelu")), ("clip_h", dict(patch_size=12)),
    ("siglip2", dict(image_size=16)),
    ("siglip2", dict(hidden_act="gelu")),
    ("clip", dict(class_token=False)), ("clip", dict(hidden_act="gelu")),
    ("clip", dict(hidden_act="gelu_tanh")),
    ("clip", dict(layer_norm_eps=1e-6)), ("clip", dict(num_attention_heads=2)),
    ("clip", dict(image_size=24)),
    ("clip", dict(num_hidden_layers=2)),
    ("siglip", dict(class_token=True)), ("siglip", dict(hidden_act="gelu")),
    ("siglip", dict(hidden_act="quick_gelu")),
    ("siglip", dict(layer_norm_eps=1e-5)), ("siglip", dict(num_attention_heads=2)),
    ("siglip", dict(image_size=24)),
    ("siglip", dict(num_hidden_layers=2)),
]


@pytest.mark.parametrize("family, changes", MUTANTS,
                         ids=["-".join([f, *(f"{k}={v}" for k, v in c.items())])
                              for f, c in MUTANTS])
def test_a_flag_set_wrong_changes_the_values_or_is_refused(family, changes):
    compare = vit_gap if family in TOWERS else llm_gap
    assert compare(build(family), family) < TOLERANCE
    try:
        mutant = build(family, **changes)
    except UserError:
        return
    assert compare(mutant, family) > TOLERANCE


def test_phi3s_fused_tensors_must_split_without_a_rest():
    with pytest.raises(UserError, match="qkv_proj"):
        build("phi3", num_key_value_heads=1)


# -------------------------------------------------------------------------------------------- files
def tensors_of(family):
    return load_file(MODELS / family / "model.safetensors")


def config_of(family):
    return json.loads((MODELS / family / "config.json").read_text())


def store(folder, config, tensors, layout="safetensors"):
    """Write a checkpoint folder in one of the layouts that released ones have."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: t.contiguous().clone() for name, t in tensors.items()}
    stem, end = ("model", "safetensors") if "safetensors" in layout else ("pytorch_model", "bin")

    def save(part, path):
        if end == "safetensors":
            save_file(part, path)
        else:
            torch.save(part, path, _use_new_zipfile_serialization="legacy" not in layout)

    if "sharded" not in layout:
        save(tensors, folder / f"{stem}.{end}")
        return folder
    names = sorted(tensors)
    shards = {f"{stem}-0000{i + 1}-of-00003.{end}": names[i::3] for i in range(3)}
    for file, keys in shards.items():
        save({key: tensors[key] for key in keys}, folder / file)
    index = {"metadata": {"total_size": 0},
             "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    return folder


def renamed(tensors, *rules):
    """Rename each tensor by the first rule whose pattern its name begins with; None drops the tensor."""
    out = {}
    for name, t in tensors.items():
        for pattern, new in rules:
            if re.match(pattern, name):
                name = new if new is None else re.sub(f"^{pattern}", new, name)
                break
        if name is not None:
            out[name] = t
    return out


LAYOUTS = ["sharded safetensors", "bin", "legacy bin", "sharded bin", "sharded legacy bin"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", LLMS + TOWERS)
def test_every_layout_of_files_loads_the_same_tensors(family, layout, tmp_path):
    store(tmp_path, config_of(family), tensors_of(family), layout)
    assert_same(load(family, tmp_path), load(family))


@pytest.mark.parametrize("family", ["llama", "phi3", "clip"])
def test_safetensors_win_over_bin_and_other_files_are_left_alone(family, tmp_path):
    store(tmp_path, config_of(family), tensors_of(family), "sharded safetensors")
    store(tmp_path, config_of(family),
          {n: torch.zeros_like(t) for n, t in tensors_of(family).items()}, "sharded bin")
    for other in ("training_args.bin", "optimizer.bin", "mm_projector.bin",
                  "consolidated.safetensors"):
        (tmp_path / other).write_bytes(b"not weights of this model")
    assert_same(load(family, tmp_path), load(family))


@pytest.mark.parametrize("family, extra", [
    ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq",
               "model.layers.1.self_attn.rotary_emb.inv_freq"]),
    ("phi", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
    ("clip", ["vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"]),
    ("siglip", ["vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"])])
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_buffers_that_old_checkpoints_hold_are_ignored(family, extra, layout, tmp_path):
    store(tmp_path, config_of(family),
          {**tensors_of(family), **{n: torch.arange(3) for n in extra}}, layout)
    assert_same(load(family, tmp_path), load(family))


class Code:
    """Unpickling this would run a command."""
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("damage", [
    lambda p: p.write_bytes(p.read_bytes()[:-100]), lambda p: p.write_bytes(p.read_bytes()[:300]),
    lambda p: p.write_bytes(b""), lambda p: p.write_text("<!doctype html><title>404</title>" * 9),
    lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize "
                           "2110000000\n"),
    lambda p: torch.save([torch.zeros(2)], p),
    lambda p: torch.save({"model": tensors_of("llama")}, p), lambda p: torch.save({"a": Code()}, p),
], ids=["cut", "cut early", "empty", "web page", "git-lfs", "a list", "nested", "code"])
@pytest.mark.parametrize("layout", ["bin", "legacy bin"])
def test_a_broken_bin_is_refused_by_name_and_no_code_in_it_runs(damage, layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = store(tmp_path / "model", config_of("llama"), tensors_of("llama"), layout)
    damage(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin") as e:
        load_llm(folder)
    assert "\n" not in str(e.value) and not (tmp_path / "ran").exists()


def test_an_index_that_names_an_absent_bin_is_refused(tmp_path):
    store(tmp_path, config_of("llama"), tensors_of("llama"), "sharded bin")
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(UserError, match="pytorch_model-00002-of-00003.bin"):
        load_llm(tmp_path)


# ------------------------------------------------------------------------------------------ configs
def old_style(c):
    """Return the config as transformers 4 wrote it."""
    c = {k: old_style(v) if isinstance(v, dict)
         and k.endswith("_config") else v for k, v in c.items()}
    rope = c.pop("rope_parameters", None)
    if rope:
        outside = {k: rope.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in rope}
        c |= outside | {"rope_scaling": rope if rope.get("rope_type", "default") != "default"
                        else None}
    if "dtype" in c:
        c["torch_dtype"] = c.pop("dtype")
    return c


def defaults():
    return json.loads((MODELS / "defaults.json").read_text())


def terse(c):
    """Return the config without the fields that are the class's
    defaults, as transformers writes a nested config."""
    c = {k: terse(v) if isinstance(v, dict) and k.endswith("_config") else v for k, v in c.items()}
    known = defaults().get(c.get("model_type"), {})
    c = {k: v for k, v in c.items() if k not in known or v != known[k]}
    if c.get("num_key_value_heads") == c.get("num_attention_heads") and c.get("model_type") != "mistral":
        c.pop("num_key_value_heads", None)
    if c.get("head_dim") == c.get("hidden_size", 0) // c.get("num_attention_heads", 1):
        c.pop("head_dim")
    return c


@pytest.mark.parametrize("form",
                         [old_style, terse, lambda c: old_style(terse(c)), lambda c: terse(old_style(c))],
                         ids=["old", "terse", "terse then old", "old then terse"])
@pytest.mark.parametrize("family", LLMS + TOWERS)
def test_old_and_terse_configs_mean_the_same(family, form, tmp_path):
    store(tmp_path, form(config_of(family)), tensors_of(family))
    assert_same(load(family, tmp_path), load(family))


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_what_a_decoder_config_leaves_out_is_what_transformers_assumes(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    config, d = decoder_config(tmp_path), defaults()[family]
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                  "tie_word_embeddings"):
        assert getattr(config, field) == d[field], field
    assert config.head_dim == d.get("head_dim", d["hidden_size"] // d["num_attention_heads"])
    assert config.rms_norm_eps == d.get("rms_norm_eps", d.get("layer_norm_eps"))
    assert config.rope_theta == d["rope_parameters"]["rope_theta"]
    assert config.partial_rotary_factor == d["rope_parameters"].get("partial_rotary_factor", 1.0)
    assert config.sliding_window == d.get("sliding_window")
    assert config.hidden_act == ACTIVATIONS[d["hidden_act"]]


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("nested", [True, False])
def test_what_a_vision_config_leaves_out_is_what_transformers_assumes(family, nested, tmp_path):
    kind = f"{family}_vision_model"
    c = {"model_type": family, "vision_config": {}} if nested else {"model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(c))
    config, d = vision_config(tmp_path), defaults()[kind]
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "image_size", "patch_size", "layer_norm_eps"):
        assert getattr(config, field) == d[field], field
    assert config.hidden_act == ACTIVATIONS[d["hidden_act"]] and config.class_token == (family == "clip")


@pytest.mark.parametrize("fields",
                         [{"hidden_act": "gelu"}, {"hidden_act": "gelu", "hidden_activation": None},
                                    {"hidden_activation": "gelu_pytorch_tanh"}])
def test_gemma_takes_the_tanh_gelu_whatever_its_config_calls_it(fields, tmp_path):
    store(tmp_path, {**config_of("gemma"), **fields}, tensors_of("gemma"))
    assert llm_gap(load_llm(tmp_path), "gemma") < TOLERANCE


def test_mistral_without_a_window_reads_null_as_none(tmp_path):
    store(tmp_path, {**config_of("mistral"), "sliding_window": None}, tensors_of("mistral"))
    assert decoder_config(tmp_path).sliding_window is None


@pytest.mark.parametrize("fields, window", [
    ({}, None), ({"sliding_window": 5}, None),
    ({"sliding_window": 5, "use_sliding_window": True}, None),
    ({"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, 5)])
def test_qwen2_has_a_window_only_where_its_config_switches_it_on(fields, window, tmp_path):
    store(tmp_path, {**config_of("qwen2"), **fields}, tensors_of("qwen2"))
    assert decoder_config(tmp_path).sliding_window == window


@pytest.mark.parametrize("family, fields", [
    ("llama3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("phi", {"qk_layernorm": True}), ("gemma", {"attention_bias": True}),
    ("phi", {"hidden_act": "tanh"}), ("siglip", {"hidden_act": "tanh"}),
    ("mistral", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}})])
def test_a_variant_that_would_compute_something_else_is_refused(family, fields, tmp_path):
    c = config_of(family)
    (c["vision_config"] if "vision_config" in c else c).update(fields)
    if "rope_scaling" in fields:
        c.pop("rope_parameters")
    store(tmp_path, c, tensors_of(family))
    with pytest.raises(UserError):
        load(family, tmp_path)


# ------------------------------------------------------------------------------------------- towers
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
@pytest.mark.parametrize("family", TOWERS)
def test_a_bare_vision_tower_loads_as_the_one_in_a_full_repository(family, prefix, tmp_path):
    tensors = renamed(tensors_of(family), (r"vision_model\.", prefix), (r"", None))
    store(tmp_path, config_of(family)["vision_config"], tensors)
    assert_same(load(family, tmp_path), load(family))


# ------------------------------------------------------------------------------------- whole models
A = [(r"vision_tower\.", "vision_tower.vision_model.")]
C = [(r"language_model\.model\.", "model.language_model."),
     (r"language_model\.lm_head\.", "lm_head."),
     (r"multi_modal_projector\.", "model.multi_modal_projector.")]
L = [(r"language_model\.", ""), (r"multi_modal_projector\.linear_1", "model.mm_projector.0"),
     (r"multi_modal_projector\.linear_2", "model.mm_projector.2")]
T = [(r"vision_tower\.", "vision_tower._vision_tower.vision_model."),
     (r"multi_modal_projector\.linear_1", "connector._connector.0"),
     (r"multi_modal_projector\.linear_2", "connector._connector.2")]
PREFIXES = {
    "llava-hf": A, "transformers 5, saved": [], "transformers 4.52, in memory":
    C + [(r"vision_tower\.", "model.vision_tower.vision_model.")],
    "transformers 5, in memory": C + [(r"vision_tower\.", "model.vision_tower.")]}


def liuhaotian(model_type="llava_llama"):
    return {**old_style(config_of("llava")["text_config"]), "model_type": model_type,
            "architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": 16, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
            "mm_use_im_start_end": False, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "image_aspect_ratio": "pad", "use_mm_proj": True}


def tinyllava(text, vision):
    return {"model_type": "tinyllava", "architectures": ["TinyLlavaForConditionalGeneration"],
            "text_config": text, "vision_config": vision, "connector_type": "mlp2x_gelu",
            "vision_feature_layer": -2, "hidden_size": 16,
            "vision_feature_select_strategy": "patch", "image_aspect_ratio": "square",
            "image_token_index": -200, "vision_hidden_size": 16, "vocab_size": 64,
            "torch_dtype": "float32"}


@pytest.fixture
def tower(tmp_path):
    """The vision tower of the LLaVA fixture as a folder of its own."""
    tensors = renamed(tensors_of("llava"), (r"vision_tower\.", "vision_model."), (r"", None))
    return store(tmp_path / "tower", config_of("llava")["vision_config"], tensors)


@pytest.fixture
def whole():
    return load_model(MODELS / "llava")


@pytest.mark.parametrize("form", [dict, old_style, terse, lambda c: terse(old_style(c))],
                         ids=["new", "old", "terse", "old and terse"])
@pytest.mark.parametrize("name", PREFIXES)
def test_llava_loads_under_every_prefix_that_transformers_gave_it(name, form, whole, tmp_path):
    extra = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(3),
             "vision_tower.embeddings.position_ids": torch.arange(5)[None]}
    store(tmp_path, form(config_of("llava")),
          renamed({**tensors_of("llava"), **extra}, *PREFIXES[name]), "sharded safetensors")
    assert_same(load_model(tmp_path), whole)


@pytest.mark.parametrize("model_type", ["llava_llama", "llava"])
@pytest.mark.parametrize("inside", [False, True])
def test_the_original_llava_loads_with_the_folder_of_its_tower(model_type, inside, whole, tower, tmp_path):
    rules = [*L, (r"vision_tower\.",
                  "model.vision_tower.vision_tower.vision_model." if inside else None)]
    folder = store(tmp_path / "llava", liuhaotian(model_type), renamed(tensors_of("llava"), *rules),
                   "sharded bin")
    torch.save({"model.mm_projector.0.bias": torch.zeros(16)},
               folder / "mm_projector.bin")  # lies beside it
    model = load_model(folder, vision=tower)
    assert_same(model, whole)
    assert llava_gap(model) < TOLERANCE
    if not inside:
        with pytest.raises(UserError, match="vision"):
            load_model(folder)


def test_a_tower_trained_inside_the_original_llava_is_not_replaced_silently(whole, tmp_path):
    untrained = {name: torch.zeros_like(t) for name, t in tensors_of("llava").items()}
    tower = store(tmp_path / "tower", config_of("llava")["vision_config"],
                  renamed(untrained, (r"vision_tower\.", "vision_model."), (r"", None)))
    rules = [*L, (r"vision_tower\.", "model.vision_tower.vision_tower.vision_model.")]
    folder = store(tmp_path / "llava", liuhaotian(), renamed(tensors_of("llava"), *rules))
    try:
        model = load_model(folder, vision=tower)
    except UserError:
        return
    assert_same(model, whole)


def test_tinyllava_loads_as_llava_does(whole, tmp_path):
    c = config_of("llava")
    store(tmp_path, tinyllava(old_style(c["text_config"]), c["vision_config"]),
          renamed(tensors_of("llava"), *T))
    model = load_model(tmp_path)
    assert_same(model, whole)
    assert llava_gap(model) < TOLERANCE


def test_tinyllava_of_phi_and_siglip_loads_and_drops_the_first_patch_as_it_was_trained(tmp_path):
    tensors = {"language_model." + name: t for name, t in tensors_of("phi").items()}
    tensors |= renamed(tensors_of("siglip"),
                       (r"vision_model\.", "vision_tower._vision_tower.vision_model."),
                       (r"", None))
    for layer, shape in [(0, (20, 16)), (2, (20, 20))]:
        tensors[f"connector._connector.{layer}.weight"] = torch.ones(shape)
        tensors[f"connector._connector.{layer}.bias"] = torch.ones(20)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(3)
    vision = {**config_of("siglip")["vision_config"],
              "model_name_or_path": "google/siglip-so400m-patch14-384"}
    store(tmp_path, tinyllava(terse(old_style(config_of("phi"))), terse(vision)), tensors)
    model = load_model(tmp_path)
    assert llm_gap(model.language_model, "phi") < TOLERANCE
    assert vit_gap(model.vision_tower, "siglip") < TOLERANCE
    g = golden("siglip")
    with torch.no_grad():
        assert gap(model.vision_tower(g["pixel_values"]), g["hidden_states"][-2][:, 1:]) < TOLERANCE
        assert model.embed_images(g["pixel_values"]).shape == (2, 3, 20)
    assert load("siglip")(g["pixel_values"]).shape == (2, 4, 16), "alone, it keeps all of its patches"


def test_the_parts_of_llava_load_on_their_own(whole):
    assert_same(load_llm(MODELS / "llava"), whole.language_model)
    assert_same(load_vision(MODELS / "llava"), whole.vision_tower)


def test_the_layer_that_features_come_from_is_the_configs(tower, tmp_path):
    c = {**config_of("llava"), "vision_feature_layer": -1}
    hf = store(tmp_path / "hf", c, tensors_of("llava"))
    tiny = store(tmp_path / "tiny",
                 {**tinyllava(c["text_config"], c["vision_config"]), "vision_feature_layer": -1},
                 renamed(tensors_of("llava"), *T))
    original = store(tmp_path / "original", {**liuhaotian(), "mm_vision_select_layer": -1},
                     renamed(tensors_of("llava"), *L, (r"vision_tower\.", None)))
    for model in (load_model(hf), load_model(tiny), load_model(original, vision=tower)):
        assert model.vision_layer == -1 and llava_gap(model) > TOLERANCE


@pytest.mark.parametrize("fields",
                         [{"vision_feature_select_strategy": "full"},
                          {"vision_feature_layer": [-2, -5]},
                                    {"projector_hidden_act": "relu"}])
def test_a_llava_that_would_compute_something_else_is_refused(fields, tmp_path):
    store(tmp_path, {**config_of("llava"), **fields}, tensors_of("llava"))
    with pytest.raises(UserError):
        load_model(tmp_path)


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector", "language_model"])
def test_a_part_missing_from_llava_is_named(part, tmp_path):
    store(tmp_path, config_of("llava"), renamed(tensors_of("llava"), (part, None)))
    with pytest.raises(UserError, match="vision tower" if part == "vision_tower" else PARTS[part]):
        load_model(tmp_path)


def test_the_fixtures_stay_small():
    assert sum(p.stat().st_size for p in MODELS.rglob("*") if p.is_file()) < 700_000
