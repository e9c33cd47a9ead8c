"""Folders of weights load strictly, in one copy; a broken file is named with its cause."""
import json
import shutil

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from common.flags import UserError
from hub.checkpoint import checkpoint_folder, checkpoints, load_model, save_checkpoint
from hub.configs import decoder_config
from hub.inspect import inspect
from hub.released import load_llm, load_vision
from hub.tensors import weight_files
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT

LLM = {"model_type": "llama", "vocab_size": 547, "hidden_size": 16, "intermediate_size": 24,
       "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def random(module):
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    return module


@pytest.fixture
def llm(tmp_path):
    folder = tmp_path / "llm"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLM))
    config = DecoderConfig(**{k: v for k, v in LLM.items() if k != "model_type"})
    save_file(random(Decoder(config)).half().state_dict(), folder / "model.safetensors")
    shutil.copyfile(ROOT / "toy" / "llm" / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture
def clip(tmp_path):
    """Laid out as openai's repository: the tower nested
    in config.json, a text tower beside it in the file."""
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": CLIP,
                                                    "text_config": {}}))
    vit = random(ViT(VisionConfig(**{k: v for k, v in CLIP.items() if k != "model_type"})))
    tensors = {"vision_model." + n: t for n, t in vit.state_dict().items()}
    tensors |= {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 3),
                "logit_scale": torch.zeros(()), "visual_projection.weight": torch.zeros(3, 3),
                "text_projection.weight": torch.zeros(3, 3),
                "vision_model.embeddings.position_ids": torch.arange(5)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def rewrite(folder, change):
    """Save the folder's tensors again after change(tensors)."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t.clone() for n, t in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# --------------------------------------------------------------------------------------- what loads
def test_every_tensor_arrives_bitwise_in_the_dtype_asked_for(llm, clip):
    stored = load_file(llm / "model.safetensors")
    for dtype in (None, torch.float32, torch.bfloat16):
        model = load_llm(llm, dtype)
        for name, p in model.named_parameters():
            assert p.device.type == "cpu" and torch.equal(p,
                                                          stored[name].to(dtype or torch.float16))
    vit = load_vision(clip, torch.float32)
    stored = load_file(clip / "model.safetensors")
    for name, p in vit.named_parameters():
        assert torch.equal(p, stored["vision_model." + name])


def test_shards_load_as_one_file_does(llm):
    tensors = load_file(llm / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:7],
             "model-00002-of-00002.safetensors": names[7:]}
    whole = load_llm(llm)
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, llm / file)
    (llm / "model.safetensors").unlink()
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (llm / "model.safetensors.index.json").write_text(json.dumps(index))
    for (_, a), (_, b) in zip(whole.named_parameters(), load_llm(llm).named_parameters()):
        assert torch.equal(a, b)
    (llm / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="1 of 2 shards that are not there: model-00002"):
        load_llm(llm)


def test_weights_are_copied_so_that_the_file_may_change_under_them(llm):
    model = load_llm(llm)
    before = model.lm_head.weight.detach().clone()
    size = (llm / "model.safetensors").stat().st_size
    (llm / "model.safetensors").write_bytes(b"\0" * size)
    assert torch.equal(model.lm_head.weight, before)


def test_a_tied_head_loads_from_a_file_with_or_without_it(llm):
    configure(llm, tie_word_embeddings=True)
    assert load_llm(llm).lm_head.weight is not None
    rewrite(llm, lambda t: t.pop("lm_head.weight"))
    model = load_llm(llm)
    assert model.lm_head.weight is model.model["embed_tokens"].weight


def test_rope_theta_is_read_where_old_and_new_transformers_write_it(llm):
    configure(llm, rope_theta=5e5)
    assert decoder_config(llm).rope_theta == 5e5
    configure(llm, rope_parameters={"rope_theta": 7e5, "rope_type": "default"})
    assert decoder_config(llm).rope_theta == 7e5


@pytest.mark.parametrize("source", ["llava", "checkpoint"])
def test_a_whole_model_lists_the_tensors_of_its_files_once(source, llm, clip, tmp_path,
                                                           monkeypatch):
    folder = ROOT / "tests" / "fixtures" / "models" / "llava"
    if source == "checkpoint":
        folder = save(llm, clip, tmp_path / "run", "finetune")[1]
    listed = []
    monkeypatch.setattr("hub.released.weight_files", lambda f: listed.append(f) or weight_files(f))
    load_model(folder)
    assert listed == [folder]


# ---------------------------------------------------------------------------------- what is refused
def cut(n):
    def damage(path):
        path.write_bytes(path.read_bytes()[:n])
    return damage


@pytest.mark.parametrize("damage, says", [
    (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize "
                            "2110000000\n"),
     r"git-lfs pointer \(\d+ bytes\), not the weights \(2.11 GB\): run git lfs pull"),
    (lambda p: p.write_text("<!doctype html><title>404</title>" * 9),
     "web page or an error message, not the weights"),
    (cut(0), "cut off: it has 0 bytes"), (cut(5), "cut off"), (cut(100), "cut off in its header"),
    (cut(-100), r"cut off: \d+ bytes, but its header says \d+"),
    (lambda p: p.write_bytes(p.read_bytes() + b"more"), "too long"),
    (lambda p: p.unlink(), "has no model.safetensors, .* it holds config.json"),
])
def test_a_broken_file_is_named_with_its_cause(llm, damage, says):
    damage(llm / "model.safetensors")
    with pytest.raises(UserError, match=says) as e:
        load_llm(llm)
    assert str(llm) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
     r"1 tensors of the language model are missing \(model"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}), "left over"),
    (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(24, 16)}), "left over"),
    (lambda t: t.update({"transformer.wte.weight": torch.zeros(2)}),
     "belong to no part of the model, such as"),
    (lambda t: t.update({"layers.0.attention.wq.weight": torch.zeros(2)}),
     "names of another layout; get the"),
    (lambda t: t.update({"model.norm.weight": torch.ones(17)}),
     r"model.norm.weight has shape \(17,\), but .* \(16,\)"),
])
def test_a_tensor_missing_left_over_or_of_another_shape_is_named(llm, change, says):
    rewrite(llm, change)
    with pytest.raises(UserError, match=says):
        load_llm(llm)


@pytest.mark.parametrize("fields, says", [
    ({"model_type": "qwen3"}, "model_type 'qwen3'; supported are llama, mistral"),
    ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling 'linear'"),
    ({"attention_bias": True}, "attention_bias"),
    ({"quantization_config": {}}, "quantization_config"),
])
def test_an_unsupported_config_is_refused(llm, fields, says):
    configure(llm, **fields)
    with pytest.raises(UserError, match=says):
        load_llm(llm)


def test_the_wrong_folder_is_refused(llm, clip, tmp_path):
    with pytest.raises(UserError, match="vision encoder is supported"):
        load_vision(llm)
    with pytest.raises(UserError, match="supported are llama"):
        load_llm(clip)
    with pytest.raises(UserError, match="there is no folder"):
        load_llm(tmp_path / "absent")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("hello")
    with pytest.raises(UserError, match="config.json does not exist; the folder holds: README.md"):
        load_llm(tmp_path / "docs")
    with pytest.raises(UserError, match="not a checkpoint of a run"):
        load_model(llm)


@pytest.mark.parametrize("load", [
    load_vision, load_llm, load_model, checkpoint_folder, inspect,
    lambda name: load_model(ROOT / "tests/fixtures/models/llava", vision=name),
    lambda name: load_model(ROOT / "tests/fixtures/models/llava", llm=name)])
def test_a_hugging_face_id_in_place_of_a_folder_is_told_how_to_download_it(load, tmp_path, monkeypatch):
    name = "openai/clip-vit-large-patch14-336"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"nothing is downloaded here.* download {name} --local-dir") as e:
        load(name)
    assert "\n" not in str(e.value)


def test_an_absent_folder_beside_others_is_not_taken_for_a_hugging_face_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("weights/clip", "absent", "/a/b", "./weights/clip", "weights/a/b", "out/toy",
                 "toy/clip", "mine/clip"):
        with pytest.raises(UserError, match="there is no folder") as e:
            load_vision(name)
        assert "downloaded" not in str(e.value)


# ---------------------------------------------------------------------------------- our checkpoints
def save(llm, clip, run, stage, step=3):
    model = Llava(load_vision(clip), random(Projector(16, 16)), load_llm(llm))
    names = {n for n, _ in model.named_parameters() if stage == "finetune" or "projector" in n}
    folder = run / f"{stage}-{step}"
    config = {"stage": stage, "vision": str(clip), "llm": str(llm)}
    save_checkpoint(folder, model, names, config, {"0.step": torch.tensor(float(step))})
    return model, folder


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_checkpoint_gives_the_same_model_back_bitwise(llm, clip, tmp_path, stage):
    model, folder = save(llm, clip, tmp_path / "run", stage)
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name], "a temporary folder was left"
    again = load_model(folder)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name
    assert (folder / "preprocessor_config.json").exists()
    assert load_file(folder / "optimizer.safetensors") == {"0.step": torch.tensor(3.0)}
    assert len(load_file(folder / "model.safetensors")) == (4 if stage == "pretrain"
                                                            else len(list(model.parameters())))


def test_a_stage_2_checkpoint_needs_no_other_folder_and_a_stage_1_one_says_which(llm, clip, tmp_path):
    save(llm, clip, tmp_path / "run", "pretrain")
    _, finetuned = save(llm, clip, tmp_path / "run", "finetune")
    moved = shutil.move(llm, tmp_path / "elsewhere")
    load_model(finetuned)
    with pytest.raises(UserError, match="not there now: say where it is with --llm"):
        load_model(tmp_path / "run" / "pretrain-3")
    load_model(tmp_path / "run" / "pretrain-3", llm=moved)


def test_a_runs_folder_stands_for_its_newest_checkpoint(llm, clip, tmp_path):
    run = tmp_path / "run"
    for stage, step in [("finetune", 20), ("pretrain", 900), ("finetune", 100)]:
        save(llm, clip, run, stage, step)
    (run / ".finetune-200.tmp").mkdir()
    assert [p.name for p in checkpoints(run)] == ["pretrain-900", "finetune-20", "finetune-100"]
    assert checkpoint_folder(run).name == "finetune-100"


def test_a_checkpoint_cut_off_or_of_another_shape_is_refused(llm, clip, tmp_path):
    _, folder = save(llm, clip, tmp_path / "run", "pretrain")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(UserError, match="cut off"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "digests.json").unlink()
    rewrite(folder, lambda t: t.update({"multi_modal_projector.linear_1.weight": torch.zeros(16, 20)}))
    with pytest.raises(UserError, match=r"linear_1.weight has shape \(16, 20\)"):
        load_model(folder)
