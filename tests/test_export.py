"""python -m hub inspect and export: a report says what is in a folder; an export is the same model to transformers.

The last section needs transformers, and is skipped without it.
"""
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import chat
import numpy as np
import pytest
import torch
from conftest import ROOT, call
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hub.tensors
from common.images import open_image
from data import IMAGE, TEMPLATES, encode, pieces
from evaluate import Assistant
from evaluation.generate import generate
from hub.checkpoint import checkpoint_folder, load_model, save_checkpoint
from hub.configs import load_processor
from hub.export import chat_template, export
from hub.inspect import inspect
from hub.released import PARTS
from hub.samples import read_questions
from hub.tensors import save_tensors
from hub.tokenizer import load_tokenizer
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT

MODELS = ROOT / "tests" / "fixtures" / "models"
TEXT = dict(vocab_size=547, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4)
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             image_size=48, patch_size=16)
SIGLIP = dict(TOWER, class_token=False, hidden_act="gelu_tanh", layer_norm_eps=1e-3)
MISTRAL = dict(TEXT, num_key_value_heads=2, rope_theta=50.0, sliding_window=7, rms_norm_eps=1e-3)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}
# each with something that transformers must be told in config.json
MADE = {
    "mistral": (TOWER, MISTRAL, "mistral"),
    "siglip": (SIGLIP, dict(TEXT, head_dim=6), "v1"),
    "first patch dropped": (dict(SIGLIP, drop_first_patch=True),
                            dict(TEXT, tie_word_embeddings=True), "llama_2"),
    "qwen2": (TOWER, dict(TEXT, qkv_bias=True, num_key_value_heads=2, tie_word_embeddings=True),
              "qwen2"),
    "qwen2 with a window": (TOWER, dict(TEXT, qkv_bias=True, sliding_window=7, rope_theta=1e6),
                            "qwen2_5"),
    "smollm2": (TOWER, dict(TEXT, num_key_value_heads=1, tie_word_embeddings=True), "smollm2"),
    "llama 3.1": (TOWER, dict(TEXT, rope_theta=50.0, rope_scaling=LLAMA3), "llama_3_1"),
    "gemma": (TOWER, dict(TEXT, norm_plus_one=True, embed_scale=32 ** 0.5, hidden_act="gelu_tanh",
                          head_dim=10, tie_word_embeddings=True), "v1"),
    "an earlier layer": (dict(TOWER, hidden_act="gelu"), dict(TEXT, vocab_size=640), "v1"),
}


@pytest.fixture(scope="module")
def run(small_world, tmp_path_factory):
    """The folder of a run with a finetune checkpoint of 30 steps."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = call("train.py", "--stage", "finetune", "--projector", "random", "--data",
                small_world / "finetune.json", "--images", small_world / "images", "--out", out,
                "--global-batch", 8, "--max-steps", 30, "--lr", 2e-3, "--workers", 0)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    done = call("hub", "export", run, out)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "from 547 to 576 rows, <image> is 547, <pad> is 548" in done.stdout
    return out


def made(folder: Path, tower: dict, text: dict, template: str, layer: int = -2) -> Path:
    """Make a checkpoint of random weights, with the toy's tokenizer and the tower's preprocessing."""
    torch.manual_seed(0)
    vit, llm = ViT(VisionConfig(**tower)), Decoder(DecoderConfig(**text))
    model = Llava(vit, Projector(tower["hidden_size"], text["hidden_size"]), llm, layer)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    base = folder / "vision"
    base.mkdir(parents=True)
    edges = {"height": 48, "width": 48}
    pre = json.loads((ROOT / "toy/clip/preprocessor_config.json").read_text())
    if not vit.config.class_token:
        pre = {"size": edges, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
               "resample": 2}  # SigLIP2's
    (base / "preprocessor_config.json").write_text(json.dumps(pre))
    chats = template in chat.MODEL_TYPES
    llm = chat.write_chat_folder(folder / "llm", template) if chats else ROOT / "toy/llm"
    config = {"stage": "finetune", "step": 1, "steps": 1, "template": template,
              "pad": template == "v1", "after_special": "4.31", "vision": str(base),
              "llm": str(llm)}
    save_checkpoint(folder / "finetune-1", model, {n for n, _ in model.named_parameters()}, config,
                    {})
    if chats:
        return folder / "finetune-1"
    # as one converted from tokenizer.model: it adds no BOS
    path = folder / "finetune-1" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    return folder / "finetune-1"


def refuses(done, *says):
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ") and all(text in done.stderr for text in says), done.stderr


# ------------------------------------------------------------------------------------------- export
def test_every_tensor_is_there_again_bitwise(run, exported):
    before = dict(load_model(run).named_parameters())
    after = dict(load_model(exported).named_parameters())
    assert list(before) == list(after)
    for name, p in before.items():
        assert p.dtype == after[name].dtype and torch.equal(p, after[name][:len(p)]), name
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            new = after[name][len(p):]
            assert len(new) == 576 - 547 and torch.allclose(new, p.mean(0).expand_as(new),
                                                            atol=1e-6)
        else:
            assert p.shape == after[name].shape
    with safe_open(exported / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
        prefixes = {re.match(r"(vision_tower\.vision_model|multi_modal_projector\.linear_[12]|"
                             r"language_model\.(model|lm_head))\.", key)[1] for key in f.keys()}
    assert len(prefixes) == 5
    assert not list(exported.parent.glob(".*")), "nothing is left under a temporary name"


def test_our_code_answers_with_an_export_as_with_its_checkpoint(small_world, run, exported):
    ours = Assistant.from_checkpoint(run, device="cpu")
    theirs = replace(ours, model=load_model(exported).eval(), tokenizer=load_tokenizer(exported),
                     processor=load_processor(exported))
    assert theirs.processor == ours.processor
    rows = read_questions(small_world / "test.jsonl", small_world / "images")
    questions = [(r["text"], small_world / "images" / r["image"]) for r in rows]
    answers = [a.answer(questions, 12) for a in (ours, theirs)]
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


def test_a_large_model_is_written_in_shards(run, exported, tmp_path, monkeypatch):
    monkeypatch.setattr("hub.export.save_tensors", partial(save_tensors, limit=300_000))
    out = tmp_path / "new" / "out"
    export(run, out)
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(shards) > 10 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    whole, parts = load_file(exported / "model.safetensors"), [load_file(s) for s in shards]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert all(sum(t.nbytes for t in part.values()) <= 300_000 or len(part) == 1 for part in parts)
    for shard, part in zip(shards, parts):
        for name, t in part.items():
            assert torch.equal(t, whole.pop(name)) and index["weight_map"][name] == shard.name
    assert not whole
    assert load_model(out).language_model.config.vocab_size == 576


def test_parts_stored_in_different_dtypes_keep_their_values(run, tmp_path):
    folder = tmp_path / "ckpt"
    shutil.copytree(checkpoint_folder(run), folder)
    (folder / "digests.json").unlink()                        # of the tensors as they were
    tensors = load_file(folder / "model.safetensors")
    halves = {torch.float16: "language_model.", torch.bfloat16: "vision_tower."}
    for some, stored in [(halves, "float32"), ({torch.float16: ""}, "float16")]:
        cast = dict(tensors)
        for dtype, prefix in some.items():
            cast |= {n: t.to(dtype) for n, t in tensors.items() if n.startswith(prefix)}
        save_file(cast, folder / "model.safetensors")
        export(folder, tmp_path / stored)
        config = json.loads((tmp_path / stored / "config.json").read_text())
        assert config["torch_dtype"] == stored
        for name, p in load_model(tmp_path / stored).named_parameters():
            old = cast[name]
            assert str(p.dtype) == f"torch.{stored}" and torch.equal(p[:len(old)].to(old.dtype), old)


def test_a_pretrain_checkpoint_is_exported_with_its_base_folders(small_world, tmp_path):
    for name in ("clip", "llm"):
        shutil.copytree(ROOT / "toy" / name, tmp_path / name)
    done = call("train.py", "--stage", "pretrain", "--data", small_world / "pretrain.json",
                "--images",
                  small_world / "images", "--vision", tmp_path / "clip", "--llm", tmp_path / "llm",
                  "--out", tmp_path / "run", "--global-batch", 8, "--max-steps", 1, "--workers", 0)
    assert done.returncode == 0, done.stderr
    assert call("hub", "export", tmp_path / "run", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ '<image>' }}"
    preprocessing = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert preprocessing["do_pad"] is False and preprocessing["do_center_crop"] is True
    shutil.move(tmp_path / "llm", tmp_path / "moved")
    refuses(call("hub", "export", tmp_path / "run", tmp_path / "2"), "which is not there now",
            "--llm")
    assert "problem " in inspect(tmp_path / "run")
    done = call("hub", "export", tmp_path / "run", tmp_path / "2", "--llm", tmp_path / "moved")
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "2"))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_what_cannot_be_exported_is_refused_in_one_line(run, exported, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "out"
    refuses(call("hub", "export", run, tmp_path / "taken"), "exists and is not an empty folder")
    refuses(call("hub", "export", run, tmp_path / "file"), "exists and is not an empty folder")
    refuses(call("hub", "export", run), "say python -m hub export CKPT OUT")
    refuses(call("hub"), "say python -m hub inspect DIR, check FILE --images DIR, or "
                         "export CKPT OUT")
    refuses(call("hub", "exprot", run, out), "say python -m hub inspect DIR")
    refuses(call("hub", "export", run, out, "--dtype", "float16"),
            "unrecognized arguments: --dtype")
    refuses(call("hub", "export", "toy/llm", out), "toy/llm is not a checkpoint of a run")
    refuses(call("hub", "export", "absent", out), "absent does not exist")
    moca = made(tmp_path / "moca", TOWER, dict(TEXT, moca=True), "v1")
    refuses(call("hub", "export", moca, out), "has MoCa", "no place for it")
    gemma = dict(TEXT, norm_plus_one=True, embed_scale=1.0, hidden_act="gelu_tanh")
    phi = dict(TEXT, norm="layer", bias=True, head_bias=True, parallel=True, gated=False)
    refuses(call("hub", "export", made(tmp_path / "phi", TOWER, phi, "v1"), out),
            "Phi-2, whose head has a bias")
    for name, text, template in [("gemma", gemma, "v1"), ("phi3", TEXT, "phi3"),
                                 ("rotary", dict(TEXT, partial_rotary_factor=0.5), "v1")]:
        ckpt = made(tmp_path / name, TOWER, text, template)
        refuses(call("hub", "export", ckpt, out), "built on Phi-3, or on no family")
    small = made(tmp_path / "small", TOWER, dict(TEXT, vocab_size=500), "v1")
    refuses(call("hub", "export", small, out), "as 546, but the model embeds 500 tokens")
    assert not out.exists() and not list(tmp_path.glob(".*")), "something was written before it was refused"
    assert (tmp_path / "taken" / "x").read_text() == "mine"
    out.mkdir()
    assert call("hub", "export", run, out).returncode == 0, "an empty folder is as good as none"


# ------------------------------------------------------------------------------------------ inspect
def facts(folder) -> dict[str, list[str]]:
    done = call("hub", "inspect", folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    out = {}
    for line in done.stdout.splitlines()[1:]:
        name, text = re.fullmatch(r"  (\w+(?: on)?) +(.*)", line).groups()
        out.setdefault(name, []).append(text)
    return out


def test_inspect_reads_headers_of_weights_alone(run, monkeypatch):
    def read(tensor):
        raise AssertionError("a tensor was read: 7B would take half a minute")
    monkeypatch.setattr(hub.tensors, "digest", read)
    monkeypatch.setattr(hub.tensors, "is_finite", read)
    for folder in (run, "toy/llm", "toy/clip"):
        assert facts(folder)["problems"] == ["none"]


def test_inspect_says_what_the_toy_and_its_checkpoints_are(run, exported):
    f = facts("toy/clip")
    assert f["kind"] == ["CLIP"] and f["problems"] == ["none"] and "tokenizer" not in f and "template" not in f
    assert f["vision"] == ["3 layers, width 96, 4 heads, 48 px in patches of 16: 9 image tokens"]
    assert f["stored"] == ["vision encoder, 0.41 M parameters, float16"]
    assert f["images"][0].startswith("shortest edge to 48, centre 48 × 48")
    f = facts("toy/llm")
    assert f["kind"] == ["LLaMA"] and f["problems"] == ["none"] and "vision" not in f and "images" not in f
    assert f["language"] == ["4 layers, width 96, 4 heads, vocabulary 547, 256 positions"]
    assert f["stored"] == ["language model, 0.55 M parameters, float16"]
    assert f["files"] == ["model.safetensors, 0.001 GB"] and f["template"][0].startswith("v1,")
    assert f["tokenizer"] == ["BPE, 547 tokens, a text begins with <s>"]
    for folder in (run, run / "finetune-30"):
        f = facts(folder)
        assert f["kind"] == ["nanoalign checkpoint: stage finetune, step 30 of 30, loss ce"]
        assert f["template"] == ["v1"] and f["problems"] == ["none"]
        assert [s.split(", ")[::2] for s in f["stored"]] == [[part, "float32"]
                                                             for part in PARTS.values()]
        assert "toy/clip, " in f["built on"][0]
    f = facts(exported)
    assert f["kind"] == ["LLaVA, llava-hf's layout"] and f["problems"] == ["none"] and "549 tokens" in f["tokenizer"][0]


@pytest.mark.parametrize("name, kind, says, template", [
    ("clip", "CLIP", "16 px in patches of 8: 4 image tokens", None),
    ("siglip", "SigLIP", "18 px", None),
    ("llama", "LLaMA", "vocabulary 64", "v1"),
    ("mistral", "Mistral", "4 heads (2 of keys)", "mistral"),
    ("qwen2", "Qwen2", "4 heads (2 of keys)", "v1"),
    ("llama3", "LLaMA", "4 heads (2 of keys)", "v1"),
    ("clip_h", "CLIP", "24 px in patches of 8: 9 image tokens", None),
    ("siglip2", "SigLIP", "24 px", None),
    ("phi", "Phi-2", "2 layers, width 20, 2 heads", "phi"), ("phi3", "Phi-3", "window 11", "phi3"),
    ("gemma", "Gemma", "4 heads (1 of keys)", "gemma"),
    ("llava", "LLaVA, llava-hf's layout", "vocabulary 64", "v1")])
def test_inspect_knows_every_family(name, kind, says, template):
    f = facts(MODELS / name)
    assert f["kind"] == [kind] and says in str(f["vision"] if template is None else f["language"])
    assert f["stored"][0].endswith("float32")
    missing = ["preprocessor_config.json does not exist"] * (name == "llava" or template is None)
    missing = ["has no tokenizer.json"] * (template is not None) + missing
    assert len(f["problem"]) == len(missing) and all(m in p for m, p in zip(missing, f["problem"]))
    assert template is None or f["template"][0].split(",")[0] == template


def test_inspect_says_what_is_wrong_and_continues(run, tmp_path):
    def broken(change, base=ROOT / "toy/llm"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(base, folder)
        change(folder)
        return facts(folder)

    def configure(**fields):
        def change(folder):
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return change

    def cut(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-1000])
    f = broken(cut)
    assert "is cut off" in f["problem"][0] and "547 tokens" in f["tokenizer"][0] and "stored" not in f
    f = broken(lambda d: (d / "model.safetensors").write_text("version https://git-lfs\nsize "
                                                              "5000000000"))
    assert "git-lfs pointer" in f["problem"][0]
    f = broken(lambda d: (d / "model.safetensors").unlink())
    assert "has no model.safetensors" in f["problem"][0] and len(f["problem"]) == 1
    f = broken(configure(num_hidden_layers=3))
    assert "9 tensors of the language model are left over" in f["problem"][0] and "0.55 M" in f["stored"][0]
    f = broken(configure(vocab_size=500))
    assert ".weight has shape (547, 96), but the config makes it (500, 96)" in f["problem"][0]
    f = broken(configure(num_attention_heads="four"))
    assert "num_attention_heads is 'four', which no model has" in f["problem"][0]
    f = broken(lambda d: (d / "tokenizer.json").write_text("{"))
    assert "is not a tokenizer" in f["problem"][0] and "language" in f
    f = broken(configure(template="phi"), checkpoint_folder(run))
    assert "the tokenizer has no '<|endoftext|>', which template phi needs" in f["problem"][0]

    def liuhaotian(folder):                                 # no tower inside
        tensors = load_file(folder / "model.safetensors")
        renamed = {n.removeprefix("language_model.").replace("multi_modal_projector.linear_1",
                                                             "model.mm_projector.0")
                    .replace("multi_modal_projector.linear_2", "model.mm_projector.2"): t
                    for n, t in tensors.items()}
        save_file({n: t for n, t in renamed.items() if "vision" not in n},
                  folder / "model.safetensors")
        text = json.loads((folder / "config.json").read_text())["text_config"]
        (folder / "config.json").write_text(json.dumps(text
                                                       | {"model_type": "llava_llama",
                                                          "mm_hidden_size": 16}))
    f = broken(liuhaotian, MODELS / "llava")
    assert f["kind"] == ["LLaVA, liuhaotian's layout"] and "vocabulary 64" in f["language"][0] and "vision" not in f
    assert "has no vision tower: give the folder of its CLIP too (--vision)" in f["problem"][0]


def test_inspect_refuses_what_is_no_model(tmp_path):
    refuses(call("hub", "inspect", "absent"), "absent/config.json does not exist: there is no "
                                              "folder absent")
    refuses(call("hub", "inspect", "tests"), "tests/config.json does not exist; the folder holds")
    for content, says in [("{", "is not JSON"), ("[]", "is not a JSON object"),
                          ("{}", "has model_type None"),
                          ('{"model_type": "bert"}', "has model_type 'bert'; known are clip")]:
        (tmp_path / "config.json").write_text(content)
        refuses(call("hub", "inspect", tmp_path), says)


# ------------------------------------------------------------------------------------- transformers
@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


def load_hf(hf, folder):
    """Load transformers' model in float32, and its processor. Every key must be in its place."""
    load = hf.LlavaForConditionalGeneration.from_pretrained
    model, info = load(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return model.eval(), hf.AutoProcessor.from_pretrained(folder)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(48, 48), (70, 41), (33, 90), (200, 7)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@torch.no_grad()
def compare(hf, ckpt: Path, out: Path) -> float:
    """Assert that transformers gives the same prompt, ids and pixels. Returns the largest
    difference of logits as a share of the largest logit (float32 rounds in proportion to it)."""
    model, processor = load_hf(hf, out)
    config = json.loads((checkpoint_folder(ckpt) / "config.json").read_text())
    ours, tokenizer = load_model(ckpt, dtype=torch.float32).eval(), load_tokenizer(checkpoint_folder(ckpt))
    prepare = load_processor(checkpoint_folder(ckpt))
    assert type(processor).__name__ == "LlavaProcessor" and type(processor.image_processor).__name__.endswith("Pil")
    worst = 0.0
    for picture in pictures():
        question = "Is there a circle?\nAnswer with one word."
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}],
                                             add_generation_prompt=True)
        turns = [{"from": "human", "value": IMAGE + "\n" + question}]
        assert text == "".join(piece for piece, _ in pieces(turns, config["template"]))
        theirs = processor(images=picture, text=text, return_tensors="pt")
        tokens = ours.vision_tower.config.image_tokens
        ids, _, mask = encode(turns, tokenizer, config["template"], tokens)
        assert mask.sum() == tokens
        assert theirs["input_ids"][0].tolist() == ids.masked_fill(mask, model.config.image_token_id).tolist()
        pixels = prepare(picture, config["pad"])[None]
        assert (pixels - theirs["pixel_values"]).abs().max() <= 1e-6
        merged = ours.merge(ours.language_model.embed(ids[None]), ours.embed_images(pixels),
                            mask[None])
        logits = ours.language_model.lm_head(ours.language_model(merged))
        difference = model(**theirs).logits[..., :logits.shape[-1]] - logits
        worst = max(worst, (difference.abs().max() / logits.abs().max()).item())
    return worst


def test_transformers_computes_the_same_logits(hf, run, exported):
    assert compare(hf, run, exported) <= 1e-5


@pytest.mark.parametrize("name", MADE)
def test_transformers_agrees_on_every_kind_of_model(hf, name, tmp_path):
    ckpt = made(tmp_path, *MADE[name], layer=-3 if name == "an earlier layer" else -2)
    export(ckpt, tmp_path / "out")
    assert compare(hf, ckpt, tmp_path / "out") <= 1e-5
    assert load_processor(tmp_path / "out") == load_processor(ckpt)
    before, after = (dict(load_model(folder).named_parameters())
                     for folder in (ckpt, tmp_path / "out"))
    assert list(before) == list(after) and all(torch.equal(p, after[n][:len(p)])
                                               for n, p in before.items())


@pytest.mark.parametrize("template",
                         [t for t in TEMPLATES if t not in ("plain", "phi", "phi3", "gemma")])
def test_transformers_renders_conversations_as_we_do(hf, exported, template, tmp_path):
    processor = hf.AutoProcessor.from_pretrained(exported)
    turns = [("human", "<image>\n What's \"this\"?\n"), ("gpt", "A cat."), ("human", " Why? "),
             ("gpt", "Because."),
             ("human", "Sure?")]
    for n, image in [(1, True), (3, True), (5, True), (5, False)]:
        said = [(who, text if image else text.replace(IMAGE, "")) for who, text in turns[:n]]
        want = "".join(p for p, _ in pieces([{"from": who, "value": text} for who, text in said],
                                            template))
        roles = {"human": "user", "gpt": "assistant"}
        # as lmms-eval writes them
        messages = [{"role": roles[who], "content": text} for who, text in said]
        text = processor.tokenizer.apply_chat_template(messages,
                                                       chat_template=chat_template(template),
                                                       tokenize=False, add_generation_prompt=True)
        assert text == want
    with pytest.raises(Exception, match="roles user and assistant"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}])


@torch.no_grad()
def test_transformers_answers_token_by_token_as_we_do(hf, small_world, run, exported):
    model, processor = load_hf(hf, exported)
    ours = Assistant.from_checkpoint(run, device="cpu")
    rows = [r for r in read_questions(small_world / "test.jsonl", small_world / "images") if r["image"]][:20]
    assert len(rows) == 20
    answers = ours.answer([(r["text"], small_world / "images" / r["image"]) for r in rows], 12)
    for row, answer in zip(rows, answers):
        messages = [{"role": "user", "content": IMAGE + "\n" + row["text"]}]
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False,
                                                       add_generation_prompt=True)
        inputs = processor(images=open_image(small_world / "images" / row["image"]), text=text,
                           return_tensors="pt")
        ids, _, mask = encode([{"from": "human", "value": messages[0]["content"]}], ours.tokenizer,
                              "v1", ours.model.vision_tower.config.image_tokens)
        pixels = ours.processor(open_image(small_world / "images" / row["image"]), True)[None]
        [ours_new] = generate(ours.model, [ids], pixels, 12, [mask], 2)
        new = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1]:].tolist()
        assert [i for i in new if i != 2] == ours_new
        assert processor.tokenizer.batch_decode([new], skip_special_tokens=True)[0].strip() == answer
