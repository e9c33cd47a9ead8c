"""Write tests/fixtures/models: tiny checkpoints of every family with the values that transformers computes from them.

Run by hand, where transformers 5.23 is installed: python tests/make_fixtures.py (the tests do not
need transformers). A folder holds what `save_pretrained` writes, in float32, and
golden.safetensors: inputs, logits, and every hidden state as transformers counts them (0:
embeddings; a decoder's last one: after its final norm). Attention is "sdpa". The tensor
"attention", each layer's mean over heads, comes from "eager", whose logits must agree; "greedy", of
the newer families, is what `generate` appends. defaults.json holds the defaults of each config
class of transformers. Nothing here imports the code under test.

Weights are 0.3 N(0,1) and norms 1 + 0.3 N(0,1) (Gemma's norms add 1 themselves: 0.3 N(0,1)).
transformers initialises norms to 1 and biases to 0, which would hide errors. Some inputs are small,
so that an epsilon matters.
"""
import copy
import json
import shutil
import sys
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parent / "fixtures" / "models"
IMAGE_ID = 60
SMALL = {"hidden_size": 16, "intermediate_size": 24}
TEXT = {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {**SMALL, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}
TEXT_TOWER = {**TEXT, "num_hidden_layers": 1, "vocab_size": 8,
              "max_position_embeddings": 4}  # must be ignored
CLIP = {**VISION, "image_size": 16}
LLAMA = {**TEXT, "rms_norm_eps": 1e-5}

DECODERS = {  # family: model, its config, factor on the embeddings
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA), 0.1),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(
        **TEXT, num_key_value_heads=2, sliding_window=5, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}), 0.3),
    "phi": (hf.PhiForCausalLM,
            hf.PhiConfig(  # 4 of 10 dimensions are rotated
        **TEXT | {"hidden_size": 20, "num_attention_heads": 2}, layer_norm_eps=1e-4,
        resid_pdrop=0.0, rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}), 0.1),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config(
        **TEXT, num_key_value_heads=2, sliding_window=11, rms_norm_eps=1e-5), 0.1),
    "gemma": (hf.GemmaForCausalLM,
              hf.GemmaConfig(  # sqrt(20) is rounded in bfloat16
        **TEXT | {"hidden_size": 20}, num_key_value_heads=1, head_dim=8), 0.1)}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
NEWER = {  # P = 24: of the pairs one is kept, two are between, one is slowed down
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(
        **TEXT | {"tie_word_embeddings": True}, num_key_value_heads=2, sliding_window=5,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1000.0}), 0.1),
    "llama3": (hf.LlamaForCausalLM, hf.LlamaConfig(
        **LLAMA | {"head_dim": 8}, num_key_value_heads=2, rope_parameters=LLAMA3), 0.1)}
DEFAULTS = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config, "mistral": hf.MistralConfig,
            "phi": hf.PhiConfig, "phi3": hf.Phi3Config, "gemma": hf.GemmaConfig,
            "clip_vision_model": hf.CLIPVisionConfig, "siglip_vision_model": hf.SiglipVisionConfig}
KEPT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps",
        "max_position_embeddings", "hidden_act", "tie_word_embeddings", "sliding_window",
        "rope_parameters", "image_size", "patch_size")


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw the weights from the seed and the sorted names, not
    from the order in which transformers builds modules."""
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            generator = torch.Generator().manual_seed(1000 * seed + i)
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            if "norm" in name and name.endswith("weight") and "gemma" not in type(model).__name__.lower():
                p.add_(1)
    return model.eval()


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def finish(family: str, model: hf.PreTrainedModel, golden: dict[str, torch.Tensor]) -> None:
    folder = OUT / family
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    save_file({name: t.detach().contiguous().clone() for name, t in golden.items()},
              folder / "golden.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)
    size = sum(p.stat().st_size for p in folder.iterdir())
    print(f"{family:8} {size / 1000:5.1f} KB", {n: tuple(t.shape) for n, t in golden.items()})


def decoder(family: str, seed: int) -> None:
    cls, config, factor = (DECODERS | NEWER)[family]
    model = randomize(cls._from_config(config, attn_implementation="sdpa"), seed)
    input_ids = torch.randint(3, 60, (2, 12), generator=numbers(seed))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(factor)
        out = model(input_ids, output_hidden_states=True, use_cache=False)
        eager = cls._from_config(config, attn_implementation="eager").eval()
        eager.load_state_dict(model.state_dict())
        attentions = eager(input_ids, output_attentions=True, use_cache=False)
        newer = {}
        if family in NEWER:
            new = model.generate(input_ids, attention_mask=torch.ones_like(input_ids),
                                 do_sample=False, max_new_tokens=8, min_new_tokens=8)
            newer = {"greedy": new[:, 12:]}
        half = copy.deepcopy(model.model).bfloat16()
        embeds = half.embed_tokens(input_ids)
    assert torch.allclose(attentions.logits, out.logits, rtol=0, atol=5e-6)
    finish(family, model, {"input_ids": input_ids, "hidden_states": torch.stack(out.hidden_states),
                           "logits": out.logits, "attention": torch.stack(attentions.attentions).mean(2),
                           "embeds_bfloat16": embeds,
                           "normed_bfloat16": half.layers[0].input_layernorm(embeds), **newer})


def encoder(family: str, seed: int) -> None:
    """Save the whole two-tower model, as it is released; run its vision tower only."""
    if family == "clip":
        config = hf.CLIPConfig(text_config=TEXT_TOWER, vision_config=CLIP, projection_dim=8)
        cls, scale = hf.CLIPModel, 1.0
    elif family == "clip_h":         # the larger CLIPs' activation and another grid
        config = hf.CLIPConfig(text_config=TEXT_TOWER, projection_dim=8, vision_config=CLIP | {
            "hidden_act": "gelu", "image_size": 24, "num_hidden_layers": 2})
        cls, scale = hf.CLIPModel, 1.0
    elif family == "siglip2":        # at a fixed resolution it is SigLIP's class
        config = hf.SiglipConfig(text_config=TEXT_TOWER | {"projection_size": 16},
                                 vision_config=VISION | {
            "image_size": 24, "num_hidden_layers": 2})
        cls, scale = hf.SiglipModel, 0.05
    else:                            # 18 pixels hold 2 patches of 8; dark pictures, so that the epsilon matters
        config = hf.SiglipConfig(text_config=TEXT_TOWER | {"projection_size": 16},
                                 vision_config=VISION | {"image_size": 18})
        cls, scale = hf.SiglipModel, 0.05
    model = randomize(cls._from_config(config, attn_implementation="sdpa"), seed)
    side = config.vision_config.image_size
    with torch.no_grad():
        if "siglip" in family:
            for p in model.vision_model.embeddings.parameters():
                p.mul_(scale)
        pixel_values = scale * torch.randn((2, 3, side, side), generator=numbers(seed))
        out = model.vision_model(pixel_values, output_hidden_states=True)
    finish(family, model, {"pixel_values": pixel_values,
                           "hidden_states": torch.stack(out.hidden_states)})


def llava(seed: int) -> None:
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**CLIP),
                            text_config=hf.LlamaConfig(**LLAMA), image_token_index=IMAGE_ID,
                            vision_feature_layer=-2, vision_feature_select_strategy="default")
    model = randomize(hf.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa"), seed)
    input_ids = torch.randint(3, 60, (2, 12), generator=numbers(seed))
    # 4 patches, at another place in each sample
    input_ids[0, 3:7] = IMAGE_ID
    input_ids[1, 1:5] = IMAGE_ID
    pixel_values = torch.randn((2, 3, 16, 16), generator=numbers(seed))
    with torch.no_grad():
        out = model(input_ids=input_ids, pixel_values=pixel_values, output_hidden_states=True,
                    use_cache=False)
    image_embeds = out.image_hidden_states
    finish("llava", model, {"input_ids": input_ids, "pixel_values": pixel_values, "image_embeds":
                            image_embeds.reshape(2, 4, -1),
                            "hidden_states": torch.stack(out.hidden_states), "logits": out.logits})


if __name__ == "__main__":
    torch.set_num_threads(1)
    known = ["clip", "siglip", *DECODERS, "llava", *NEWER, "clip_h", "siglip2"]
    families = sys.argv[1:] or known
    for seed, family in enumerate(known, start=1):
        if family not in families:
            continue
        if family == "llava":
            llava(seed)
        elif family in DECODERS | NEWER:
            decoder(family, seed)
        else:
            encoder(family, seed)
    defaults = {family: cls().to_dict() for family, cls in DEFAULTS.items()}
    defaults = {family: {k: v for k, v in fields.items() if k in KEPT}
                for family, fields in defaults.items()}
    (OUT / "defaults.json").write_text(json.dumps(defaults, indent=1) + "\n")
    total = sum(p.stat().st_size for p in OUT.rglob("*") if p.is_file())
    print(json.dumps({"transformers": hf.__version__, "torch": torch.__version__, "bytes": total}))
