"""A released folder gives, through every command, what the checkpoint gives that it was made from.

The layouts are written here from a toy run: llava-hf's by export, liuhaotian's, MoCa's and
TinyLLaVA's by renaming.
"""
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, launch, tensors_of
from PIL import Image
from safetensors.torch import load_file, save_file
from test_export import SIGLIP, TEXT, made
from tokenizers import Tokenizer, models

from common.flags import UserError
from data import IMAGE, encode, eos_id
from evaluate import Assistant
from evaluation.chat import Chat, talk
from evaluation.generate import generate
from hub.checkpoint import checkpoint_folder, load_model
from hub.configs import load_processor, read_config, vision_config
from hub.tokenizer import load_tokenizer
from hub.usage import read_usage
from model import Llava, VisionConfig

CLIP = ROOT / "toy/clip"
LLAVA = [(r"language_model\.moca\.(\d+)\.u", r"model.layers.\1.modality_layernorm.scale"),
         (r"language_model\.moca\.(\d+)\.v", r"model.layers.\1.modality_layernorm.shift"),
         (r"language_model\.", ""), (r"multi_modal_projector\.linear_1", "model.mm_projector.0"),
         (r"multi_modal_projector\.linear_2", "model.mm_projector.2")]
TINY = [(r"vision_tower\.", "vision_tower._vision_tower.vision_model."),
        (r"multi_modal_projector\.linear_1", "connector._connector.0"),
        (r"multi_modal_projector\.linear_2", "connector._connector.2")]


def finetune(small_world, out, *more):
    done = call("train.py", "--stage", "finetune", "--projector", "random", "--data",
                small_world / "finetune.json", "--images", small_world / "images", "--out", out,
                "--global-batch", 8, "--max-steps", 45, "--lr", 2e-3, "--workers", 0, "--dtype",
                "float32", *more)
    assert done.returncode == 0, done.stderr
    return checkpoint_folder(out)


@pytest.fixture(scope="module")
def ckpt(small_world, tmp_path_factory):
    return finetune(small_world, tmp_path_factory.mktemp("ckpt") / "run")


@pytest.fixture(scope="module")
def moca(small_world, tmp_path_factory):
    return finetune(small_world, tmp_path_factory.mktemp("moca") / "run", "--moca", "--max-steps",
                    10, "--after-special", "4.37")


def renamed(tensors: dict, rules: list) -> dict:
    out = {}
    for name, t in tensors.items():
        for pattern, new in rules:
            name = re.sub("^" + pattern, new, name)
        out[name] = t
    return out


def text_config(ckpt: Path) -> dict:
    c = read_config(ckpt)["text_config"]
    return {"model_type": "llama", **{k: c[k] for k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta",
        "max_position_embeddings", "tie_word_embeddings")}}


def liuhaotian(ckpt: Path, folder: Path, **fields) -> Path:
    """Two .bin shards without the tower, tokenizer.json; no image settings."""
    folder.mkdir(parents=True)
    tensors = renamed({n: t for n, t in tensors_of(ckpt).items() if not n.startswith("vision_tower.")}, LLAVA)
    names, places = sorted(tensors), {}
    for n, part in enumerate((names[::2], names[1::2]), 1):
        torch.save({name: tensors[name] for name in part},
                   folder / f"pytorch_model-0000{n}-of-00002.bin")
        places |= dict.fromkeys(part, f"pytorch_model-0000{n}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({
        **text_config(ckpt), "model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 96, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad", "image_grid_pinpoints": None,
        "tokenizer_model_max_length": 2048, **fields}))
    shutil.copyfile(ckpt / "tokenizer.json", folder / "tokenizer.json")
    return folder


def tinyllava(ckpt: Path, folder: Path, **fields) -> Path:
    folder.mkdir(parents=True)
    save_file(renamed(tensors_of(ckpt), TINY), folder / "model.safetensors")
    tower = read_config(ckpt)["vision_config"]
    for ours in ("class_token", "drop_first_patch"):
        tower.pop(ours)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "tinyllava", "text_config": text_config(ckpt), "vision_config": {
            "model_type": "clip_vision_model", **tower}, "connector_type": "mlp2x_gelu",
            "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch", "image_aspect_ratio": "square", **fields}))
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copyfile(ckpt / name, folder / name)
    return folder


def transformers_5(ckpt: Path, folder: Path) -> Path:
    """The export as transformers 5.23 saves it again: image
    settings in processor_config.json, rope_parameters."""
    assert call("hub", "export", ckpt, folder).returncode == 0
    processor = json.loads((folder / "processor_config.json").read_text())
    images = json.loads((folder / "preprocessor_config.json").read_text())
    images.pop("processor_class")
    (folder / "processor_config.json").write_text(json.dumps(processor
                                                             | {"image_processor": images}))
    (folder / "preprocessor_config.json").unlink()
    c = json.loads((folder / "config.json").read_text())
    c["text_config"]["rope_parameters"] = {"rope_theta": c["text_config"].pop("rope_theta"),
                                           "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(c | {"quantization_config": None}))
    return folder


@pytest.fixture(scope="module",
                params=["llava-hf", *(pytest.param(layout, marks=pytest.mark.slow)
                                      for layout in ("TinyLLaVA", "liuhaotian", "transformers 5", "MoCa"))])
def pair(request, tmp_path_factory):
    """(checkpoint, the same model in a released layout, flags that it needs)."""
    folder, vision = tmp_path_factory.mktemp("released") / "model", ["--vision", CLIP]
    source = request.getfixturevalue("moca" if request.param == "MoCa" else "ckpt")
    if request.param == "MoCa":
        return source, liuhaotian(source, folder, use_moca=True, moca_std=0.02), vision
    if request.param == "liuhaotian":
        return source, liuhaotian(source, folder), vision
    if request.param == "TinyLLaVA":
        # Trained on images as they are, with transformers 4.40; this toy was not.
        return source, tinyllava(source, folder), ["--pad", "--after-special", "4.31"]
    if request.param == "transformers 5":
        return source, transformers_5(source, folder), []
    assert call("hub", "export", source, folder).returncode == 0
    return source, folder, []


def printed(*words):
    done = call(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parts(flags):
    """The flags that every command takes."""
    return flags if "--vision" in flags else []


def predictions(folder: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in (folder / "pred.jsonl").open()]


# ------------------------------------------------------------------------------------ every command
def test_a_question_and_own_questions_are_answered_as_by_the_checkpoint(pair, small_world, tmp_path):
    ckpt, folder, flags = pair
    image = small_world / "images/test_000001.png"
    one = ["--image", image, "--prompt", "What colour is the circle?"]
    assert printed("evaluate.py", "--ckpt", folder, *flags, *one) == printed("evaluate.py", "--ckpt", ckpt, *one)
    own = ["--data", small_world / "test.jsonl", "--images", small_world / "images",
           "--max-new-tokens", 8]
    for name, source, more in (("ours", ckpt, []), ("theirs", folder, flags)):
        printed("evaluate.py", "--ckpt", source, *more, *own, "--out", tmp_path / name)
    ours, theirs = (predictions(tmp_path / name / "test") for name in ("ours", "theirs"))
    assert ours == theirs and len(set(ours)) > 1
    results = [json.loads((tmp_path / name / "test/results.json").read_text())
               for name in ("ours", "theirs")]
    settings = [r["settings"] for r in results]
    assert {k for k, v in settings[0].items() if settings[1][k] != v} == {"checkpoint"}


def test_flags_override_what_the_family_says(ckpt, tmp_path):
    folder = tinyllava(ckpt, tmp_path / "tiny")
    a = Assistant.from_checkpoint(folder)
    assert (a.template, a.after_special, a.pad) == ("v1", "4.37", False)
    a = Assistant.from_checkpoint(folder, template="llama_2", after_special="legacy", pad=True)
    assert (a.template, a.after_special, a.pad) == ("llama_2", "legacy", True)


def pope_like(root: Path, small_world: Path) -> None:
    """720 questions in POPE's files: 24 pictures, 10 questions about each in each category."""
    pictures = sorted(p.name for p in (small_world / "images").glob("*.png"))[:24]
    things = [f"{colour} {shape}" for colour in ("red", "green", "blue", "yellow")
              for shape in ("circle", "square",
                                                                                              "cross")][:10]
    (root / "coco").mkdir(parents=True)
    rows = []
    for c, name in enumerate(("random", "popular", "adversarial")):
        labels = [{"question_id": 10 * p + t + 1, "image": picture,
                   "label": ("yes", "no")[(p + t + c) % 2],
                   "text": f"Is there a {thing} in the {('image', 'picture', 'scene')[c]}?"}
                  for p, picture in enumerate(pictures) for t, thing in enumerate(things)]
        (root / f"coco/coco_pope_{name}.json").write_text("".join(json.dumps(x) + "\n" for x in labels))
        rows += [{"question_id": x["question_id"] + c * 10 ** 7, "image": x["image"],
                  "category": name, "text": x["text"] + "\nAnswer the question using a single "
                                                        "word or phrase."} for x in labels]
    (root / "llava_pope_test.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))


def test_720_questions_of_pope_are_answered_as_by_the_checkpoint(pair, small_world, tmp_path):
    ckpt, folder, flags = pair
    pope_like(tmp_path / "pope", small_world)
    bench = ["--bench", "pope", "--data", tmp_path / "pope", "--images", small_world / "images",
             "--max-new-tokens", 3]
    for name, source, more in (("ours", ckpt, []), ("theirs", folder, flags)):
        printed("evaluate.py", "--ckpt", source, *more, *bench, "--out", tmp_path / name)
    ours, theirs = (predictions(tmp_path / name / "pope") for name in ("ours", "theirs"))
    assert ours == theirs and len(ours) == 720 and len(set(ours)) > 1
    results = [json.loads((tmp_path / name / "pope/results.json").read_text())
               for name in ("ours", "theirs")]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_a_conversation_of_three_turns_is_that_of_the_checkpoint(pair, small_world, monkeypatch):
    ckpt, folder, flags = pair
    said = "What colour is the circle?\nWhich row has it?\nHow many objects are there?\n"
    words = ["--image", small_world / "images/test_000001.png", "--max-new-tokens", 12]
    talks = []
    for source, more in ((ckpt, []), (folder, flags)):
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        talks.append(printed("evaluate.py", "--ckpt", source, *more, *words))
    assert talks[0] == talks[1] and len(talks[0].splitlines()) == 1 + 3 + 1


def test_mir_look_inspect_and_export_take_it_as_they_take_the_checkpoint(pair, small_world, tmp_path, moca):
    ckpt, folder, flags = pair
    data = ["--data", small_world / "val.jsonl", "--images", small_world / "images", "-n", 8,
            "--dtype", "float32"]
    for name, source, more in (("ours", ckpt, []), ("theirs", folder, parts(flags))):
        printed("mir.py", "--ckpt", source, *more, *data, "--out", tmp_path / f"{name}.json")
        one = ["--image", small_world / "images/test_000001.png", "--prompt", "How many?"]
        look = printed("look", "--ckpt", source, *more, *one, "--out", tmp_path / f"{name}.html")
        (tmp_path / f"{name}.txt").write_text(look.splitlines()[0].removeprefix(str(source)))
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text())
                    for name in ("ours", "theirs"))
    assert theirs["layers"] == pytest.approx(ours["layers"], rel=1e-6) and theirs["settings"]["template"] == "v1"
    if "--pad" not in flags:                                # look has no such flag
        assert (tmp_path / "ours.txt").read_text() == (tmp_path / "theirs.txt").read_text()
    assert "problems   none" in printed("hub", "inspect", folder, *parts(flags))
    done = call("hub", "export", folder, tmp_path / "out", *parts(flags))
    if ckpt == moca:
        assert done.returncode == 2 and "has MoCa" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    before, after = (dict(load_model(f).named_parameters()) for f in (ckpt, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(p, after[n][:len(p)])
                                                 for n, p in before.items())
    assert read_usage(tmp_path / "out").template == "v1"


def test_stage_2_starts_from_all_of_it(pair, small_world, tmp_path, monkeypatch):
    """At a rate of nothing the trained checkpoint is
    what it started from, image settings and MoCa too."""
    ckpt, folder, flags = pair
    done = call("train.py", "--stage", "finetune", "--projector", folder, *parts(flags), "--data",
                small_world / "finetune.json", "--images", small_world / "images", "--out",
                tmp_path / "run", "--global-batch", 2, "--max-steps", 1, "--lr", 1e-12, "--workers",
                0, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    after = checkpoint_folder(tmp_path / "run")
    old, new = tensors_of(ckpt), tensors_of(after)
    assert old.keys() == new.keys()
    for name, t in old.items():
        assert torch.allclose(t, new[name][:len(t)], atol=1e-9), name
    assert load_processor(after) == load_processor(ckpt)
    c = read_config(after)
    later = read_config(folder).get("use_moca") or read_config(folder)["model_type"] == "tinyllava"
    assert c["template"] == "v1" and c["after_special"] == ("4.37" if later else "4.31")


# --------------------------------------------------------------------------------- where results go
def test_results_of_a_released_model_go_to_out_and_its_folder_stays_as_it_is(pair, small_world, tmp_path):
    _, folder, flags = pair
    before = {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*")}
    done = launch(ROOT / "evaluate.py", "--ckpt", folder, *flags, "--data",
                  small_world / "test.jsonl", "--images", small_world / "images", "--limit", 2,
                  "--max-new-tokens", 2, cwd=tmp_path)
    assert done.returncode == 0 and "written to out/eval/model" in done.stdout, done.stderr + done.stdout
    assert (tmp_path / "out/eval/model/test/results.json").is_file()
    assert {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*")} == before


def test_other_bin_weights_or_another_tower_are_another_checkpoint(ckpt, small_world, tmp_path):
    folder, tower = liuhaotian(ckpt, tmp_path / "model"), tmp_path / "clip"
    shutil.copytree(CLIP, tower)
    command = ["evaluate.py", "--ckpt", folder, "--vision", tower, "--data",
               small_world / "test.jsonl", "--images", small_world / "images", "--limit", 2,
               "--max-new-tokens", 2, "--out", tmp_path / "eval"]
    printed(*command)
    tensors = load_file(tower / "model.safetensors")
    save_file({n: t * 2 for n, t in tensors.items()}, tower / "model.safetensors")
    done = call(*command)
    assert done.returncode == 2 and "another checkpoint" in done.stderr, "another tower was not noticed"
    save_file(tensors, tower / "model.safetensors")
    shard = folder / "pytorch_model-00002-of-00002.bin"
    torch.save({n: t * 2 for n, t in torch.load(shard).items()}, shard)
    done = call(*command)
    assert done.returncode == 2 and "another checkpoint" in done.stderr, "another .bin was not noticed"


# --------------------------------------------------------------------------------- the conversation
@pytest.fixture(scope="module")
def assistant(ckpt):
    return Assistant.from_checkpoint(ckpt)


def plain_answer(a: Assistant, turns: list[tuple[str, str]], image: Path, room: int) -> str:
    """The answer to a whole conversation, computed anew."""
    said = [{"from": who, "value": text} for who, text in turns]
    ids, _, mask = encode(said, a.tokenizer, a.template, a.model.vision_tower.config.image_tokens,
                          after_special=a.after_special)
    pixels = a.processor(Image.open(image), a.pad)[None]
    [out] = generate(a.model, [ids], pixels, room, [mask], eos_id(a.tokenizer, a.template))
    return a.tokenizer.decode(out).strip()


def test_each_answer_is_that_to_the_whole_conversation_computed_anew(assistant, small_world):
    image, turns = small_world / "images/test_000001.png", []
    chat = Chat(assistant, image, 12)
    for n, question in enumerate(["What colour is the circle?", "Which row has it?",
                                  "How many objects are there?"]):
        turns.append(("human", question if n else f"{IMAGE}\n{question}"))
        pieces = list(chat.ask(question))
        assert "".join(pieces) == plain_answer(assistant, turns, image, 12) != ""
        turns.append(("gpt", "".join(pieces)))
    assert [(t["from"], t["value"]) for t in chat.turns] == turns


def test_a_later_turn_computes_what_is_new_and_encodes_the_image_once(assistant, small_world, monkeypatch):
    encoded, lengths = [], []
    embed, run_layers = Llava.embed_images, type(assistant.model.language_model).run_layers
    monkeypatch.setattr(Llava, "embed_images", lambda self, x: encoded.append(1) or embed(self, x))
    monkeypatch.setattr(type(assistant.model.language_model), "run_layers",
                        lambda self, h, *a, **k: lengths.append(h.shape[1])
                        or run_layers(self, h, *a, **k))
    chat = Chat(assistant, small_world / "images/test_000001.png", 4)
    list(chat.ask("What colour is the circle?"))
    first = lengths[0]
    lengths.clear()
    list(chat.ask("Which row?"))
    assert len(encoded) == 1 and lengths[0] < first / 2 and set(lengths[1:]) <= {1}


def test_commands_start_again_and_take_another_image(assistant, small_world, tmp_path, monkeypatch,
                                                     capsys):
    a, b = (small_world / f"images/test_00000{n}.png" for n in (1, 2))
    (tmp_path / "broken.png").write_text("nothing")
    question = "What colour is the circle?"
    lines = [question, "/reset", question, "", f"/image {b}", question, "/image absent.png",
             f"/image {tmp_path}/broken.png", "/help", question]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    talk(assistant, a, 8)
    out = capsys.readouterr().out.splitlines()
    first, other = (plain_answer(assistant, [("human", f"{IMAGE}\n{question}")], image, 8)
                    for image in (a, b))
    assert out[1:4] == [first, first, other] and out[4].startswith("error: absent.png: ")
    assert out[5].startswith("error: ") and "broken.png" in out[5] and out[6] == out[0]
    second = [("human", f"{IMAGE}\n{question}"), ("gpt", other), ("human", question)]
    assert out[7] == plain_answer(assistant, second, b, 8), "a file that cannot be read changes nothing"


def test_ctrl_c_and_the_end_of_the_input_end_it_quietly(assistant, small_world, monkeypatch,
                                                        capsys):
    for end in (KeyboardInterrupt, EOFError):
        monkeypatch.setattr("builtins.input", lambda _, end=end: (_ for _ in ()).throw(end))
        talk(assistant, small_world / "images/test_000001.png", 8)
        assert capsys.readouterr().out.splitlines()[1:] == [""]


def test_a_conversation_that_grows_too_long_says_so(assistant, small_world):
    chat = Chat(assistant, small_world / "images/test_000001.png", 8)
    with pytest.raises(UserError, match="room for 256: /reset"):
        list(chat.ask("Why? " * 200))
    assert "".join(chat.ask("Is there a circle?")) and len(chat.turns) == 2


def test_characters_of_several_tokens_are_shown_whole(assistant, small_world, monkeypatch):
    ids = [i for i in assistant.tokenizer.encode("a é 漢 b", add_special_tokens=False).ids]
    monkeypatch.setattr(Chat, "tokens", lambda self, *_: iter(ids))
    pieces = list(Chat(assistant, small_world / "images/test_000001.png", 8).ask("Say it."))
    assert "".join(pieces) == assistant.tokenizer.decode(ids).strip() and not any("\ufffd" in p for p in pieces[:-1])


# --------------------------------------------------------------------------------- what folders say
def test_template_rule_and_padding_are_those_of_the_family(ckpt, tmp_path):
    def usage(folder, vision=None):
        use = read_usage(folder, vision)
        return use.template, use.after_special, use.pad
    assert usage(liuhaotian(ckpt, tmp_path / "a"), CLIP) == ("v1", "4.31", True)
    assert usage(liuhaotian(ckpt, tmp_path / "b", image_aspect_ratio="square"), CLIP) == ("v1", "4.31", False)
    assert usage(liuhaotian(ckpt, tmp_path / "c", use_moca=True), CLIP) == ("v1", "4.37", True)
    for n, (family, template) in enumerate([("phi", "phi"), ("gemma", "gemma"), ("llama", "v1")]):
        text = text_config(ckpt) | {"model_type": family}
        assert usage(tinyllava(ckpt, tmp_path / f"t{n}", text_config=text)) == (template, "4.37", False)
    with pytest.raises(UserError, match=r"has no vision tower: .* \(--vision\)"):
        read_usage(tmp_path / "a")
    (tmp_path / "t0/preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="say with --vision where"):
        read_usage(tmp_path / "t0")
    assert read_usage(tmp_path / "t0", CLIP).pad is False


def test_tinyllava_of_siglip_has_one_image_token_less_in_every_command(small_world, tmp_path):
    """TinyLLaVA drops the first patch of SigLIP as if it were a class token."""
    source = made(tmp_path / "made", dict(SIGLIP, drop_first_patch=True), TEXT, "v1")
    folder = tinyllava(source, tmp_path / "tiny")
    c = read_config(folder)
    change(folder, vision_config=c["vision_config"] | {"model_type": "siglip_vision_model"})
    assert read_usage(folder).image_tokens == 8
    data = ["--data", small_world / "val.jsonl", "--images", small_world / "images", "-n", 6,
            "--dtype", "float32"]
    for name, path in (("ours", source), ("theirs", folder)):
        printed("mir.py", "--ckpt", path, *data, "--out", tmp_path / f"{name}.json")
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text())["layers"]
                    for name in ("ours", "theirs"))
    assert theirs == pytest.approx(ours, rel=1e-6)
    printed("train.py", "--stage", "finetune", "--projector", folder, "--data",
            small_world / "finetune.json", "--images", small_world / "images", "--out",
            tmp_path / "run", "--global-batch", 2, "--max-steps", 1, "--workers", 0)
    assert read_config(checkpoint_folder(tmp_path / "run"))["vision_config"]["drop_first_patch"] is True


def test_an_export_remembers_template_rule_and_padding(ckpt, tmp_path):
    shutil.copytree(ckpt, tmp_path / "finetune-1")
    c = read_config(ckpt) | {"template": "llama_2", "after_special": "legacy", "pad": False}
    (tmp_path / "finetune-1/config.json").write_text(json.dumps(c))
    assert call("hub", "export", tmp_path / "finetune-1", tmp_path / "hf").returncode == 0
    use = read_usage(tmp_path / "hf")
    assert (use.template, use.after_special, use.pad, use.layer) == ("llama_2", "legacy", False, -2)
    assert vision_config(tmp_path / "hf") == VisionConfig(**c["vision_config"])


def change(folder: Path, **fields) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_a_folder_that_transformers_5_saved_keeps_its_images_settings(ckpt, tmp_path):
    folder = transformers_5(ckpt, tmp_path / "hf")
    assert load_processor(folder) == load_processor(ckpt) and read_usage(folder).pad
    c = json.loads((folder / "processor_config.json").read_text())
    c["image_processor"] |= {"size": {"shortest_edge": 60}, "image_mean": [0.1, 0.2, 0.3],
                             "do_pad": False}
    (folder / "processor_config.json").write_text("\ufeff" + json.dumps(c))
    p = load_processor(folder)
    assert p.size == 60 and p.crop_size == 48 and p.image_mean == (0.1, 0.2, 0.3) and not read_usage(folder).pad


def test_what_transformers_itself_saves_loads_as_it_was(ckpt, tmp_path, small_world):
    hf = pytest.importorskip("transformers")
    assert call("hub", "export", ckpt, tmp_path / "out").returncode == 0
    model = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "out")
    for tied in (False, True):
        folder = tmp_path / str(tied)
        model.config.tie_word_embeddings = tied
        model.tie_weights()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        assert not (folder / "preprocessor_config.json").exists(), "transformers 5 writes processor_config.json"
        c = read_config(folder)
        assert c["tie_word_embeddings"] is tied and c["text_config"]["tie_word_embeddings"] is False
        assert load_processor(folder) == load_processor(ckpt) and read_usage(folder) == read_usage(tmp_path / "out")
        before, after = (dict(load_model(f).named_parameters()) for f in (tmp_path / "out", folder))
        names = before.keys() - {"language_model.lm_head.weight"} if tied else before.keys()
        assert after.keys() == names and all(torch.equal(before[n], after[n]) for n in names)
    rows = [("Is there a circle?", small_world / "images/test_000001.png")]
    ours, theirs = (Assistant.from_checkpoint(f).answer(rows, 8)
                    for f in (ckpt, tmp_path / "False"))
    assert ours == theirs


def test_a_head_tied_at_the_top_level_alone_is_tied(ckpt, tmp_path):
    folder = transformers_5(ckpt, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("language_model.lm_head.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="1 tensors of the language model are missing"):
        load_model(folder)
    change(folder, tie_word_embeddings=True)
    lm = load_model(folder).language_model
    assert lm.lm_head.weight is lm.model["embed_tokens"].weight


def test_a_byte_order_mark_and_null_in_place_of_a_field_change_nothing(ckpt, tmp_path):
    folder = liuhaotian(ckpt, tmp_path / "model", quantization_config=None)
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin.index.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert load_tokenizer(folder).get_vocab_size() == load_tokenizer(ckpt).get_vocab_size()
    before, after = (dict(load_model(f, CLIP, dtype=torch.float32).named_parameters())
                     for f in (ckpt, folder))
    assert all(torch.equal(p, after[name]) for name, p in before.items())


def test_tinyllavas_gemma_scales_image_tokens_as_it_was_trained(ckpt, tmp_path):
    """transformers 4.40 multiplied inputs_embeds, image tokens too, by sqrt(hidden size)."""
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    plain = tinyllava(ckpt, tmp_path / "plain")
    text = text_config(ckpt) | {"model_type": "gemma", "head_dim": 24, "tie_word_embeddings": False}
    gemma = load_model(tinyllava(ckpt, tmp_path / "gemma", text_config=text))
    h = gemma.language_model.config.hidden_size
    with torch.no_grad():
        image = gemma.embed_images(pixels)
        assert torch.allclose(image, h ** 0.5 * load_model(plain).embed_images(pixels), rtol=1e-4,
                              atol=1e-4)
    words = gemma.language_model.embed(torch.tensor([[5]]))[0, 0]
    assert torch.allclose(words, h ** 0.5 * gemma.language_model.model["embed_tokens"].weight[5])


# ---------------------------------------------------------------------------------- what is refused
def quantized(dtype):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        name = "language_model.model.layers.0.mlp.up_proj.weight"
        save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
    return spoil


def write(name: str, text: str):
    def spoil(folder):
        (folder / name).write_text(text)
    return spoil


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000000000\n"


@pytest.mark.parametrize("spoil, says", [
    (lambda d: change(d, model_type="llava_next"), "any-resolution tiles are not supported"),
    (lambda d: change(d, model_type="llava_onevision"), "any-resolution tiles are not supported"),
    (lambda d: change(d, model_type="llava_qwen", image_aspect_ratio="anyres_max_9"),
     "any-resolution tiles are not"),
    (lambda d: change(d, quantization_config={"quant_method": "fp8"}),
     "quantization_config {'quant_method': 'fp8'}"),
    (quantized(torch.float8_e4m3fn), "up_proj.weight is stored in float8_e4m3fn: 8-bit weights "
                                     "are not supported"),
    (quantized(torch.int8), "up_proj.weight is stored in int8: 8-bit weights are not supported"),
    (lambda d: change(d, vision_feature_layer=-9),
     "asks for features of vision layer -9, which is not supported"),
    (lambda d: change(d, vision_feature_layer=4), "asks for features of vision layer 4, which is "
                                                  "not supported"),
    (lambda d: change(d, text_config=read_config(d)["text_config"]
                      | {"rope_scaling": {"factor": 2.0}}),
     "rope_scaling without a type, {'factor': 2.0}"),
    (lambda d: Tokenizer(models.WordLevel({f"w{i}": i for i in range(600)}, "w0")).save(str(d / "tokenizer.json")),
     "the tokenizer has 'w599' as 599, but the model embeds 576 tokens: they are not of one model"),
    (lambda d: Tokenizer(models.WordLevel({f"w{i}": i for i in range(500)}, "w0")).save(str(d / "tokenizer.json")),
     "the tokenizer has no '</s>', which template v1 needs"),
    (write("model.safetensors", LFS), "is a git-lfs pointer"),
    (write("tokenizer.json", LFS), "is a git-lfs pointer"),
    (write("config.json", LFS), "is a git-lfs pointer"),
    (write("model.safetensors", "Invalid username or password."),
     "is a web page or an error message"),
    (write("config.json", "Invalid username or password."), "is a web page or an error message"),
    (write("tokenizer.json", "Invalid username or password."),
     "is a web page or an error message")])
def test_what_cannot_be_right_is_refused_by_name(ckpt, tmp_path, spoil, says, small_world):
    folder = tmp_path / "hf"
    assert call("hub", "export", ckpt, folder).returncode == 0
    spoil(folder)
    done = call("evaluate.py", "--ckpt", folder, "--image", small_world / "images/test_000001.png",
                "--prompt", "Why?")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert says in done.stderr, done.stderr


def test_inspect_and_training_name_tiles_too(ckpt, small_world, tmp_path):
    folder = tmp_path / "hf"
    assert call("hub", "export", ckpt, folder).returncode == 0
    change(folder, model_type="llava_next")
    for words in (["hub", "inspect", folder],
                  ["train.py", "--stage", "finetune", "--projector", folder, "--data",
                                               small_world / "finetune.json", "--out",
                                               tmp_path / "run"]):
        done = call(*words)
        assert done.returncode == 2 and "any-resolution tiles are not supported" in done.stderr, done.stderr
