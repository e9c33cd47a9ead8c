"""The toy world and its two backbones, as they are in the repository."""
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from model import Decoder, DecoderConfig, VisionConfig, ViT
from toy import backbones, world

TOY = Path(world.__file__).parent
SPLITS = ("val", "test", "composition")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def config_of(cls, fields):
    return cls(**{k: v for k, v in fields.items() if k in cls.__dataclass_fields__})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a small data set, and the scenes it was drawn from by image name."""
    out, scenes, render = tmp_path_factory.mktemp("toy"), [], world.render
    world.render = lambda scene, rng: scenes.append(scene) or render(scene, rng)
    try:
        world.make(out, seed=7, images=200, conversations=2, scenes=120)
    finally:
        world.render = render
    names = [f"train_{i:06d}.png" for i in range(200)] + [f"{s}_{i:06d}.png" for s in SPLITS
                                                          for i in range(120)]
    return out, dict(zip(names, scenes, strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(TOY / "llm" / "tokenizer.json"))


def text_of(conversations):
    return [(q["value"].removeprefix("<image>\n"), a["value"])
            for q, a in zip(conversations[::2], conversations[1::2])]


def truth(scene, question):
    """Return the answer to a question. Reads its words alone, independently of toy/world.py."""
    words = question.rstrip("?").split()
    match = [thing for thing in scene if thing[3] == words[-1]]
    if words[0] == "How":
        return world.NUMBERS[len(scene) - 1]
    if words[0] == "Is":
        return "Yes" if any(thing[2] == words[-2] for thing in match) else "No"
    [(row, column, colour, _)] = match
    return {"row": row, "column": column, "colour": colour}[words[1]]


# -------------------------------------------------------------------------------------------- world
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        world.make(tmp_path / name, seed=seed, images=8, conversations=1, scenes=3)
    a, b, c = ({f.relative_to(folder): f.read_bytes() for f in folder.rglob("*.*")} for folder in
               (tmp_path / name for name in "abc"))
    assert a == b and len(a) == 8 + 3 * 3 + 5
    assert a.keys() == c.keys() and a != c


def test_no_test_scene_is_trained_on(data):
    _, scenes = data
    split = {s: {scene for name, scene in scenes.items() if name.startswith(s)}
             for s in ("train", *SPLITS)}
    for a in split:
        for b in split:
            assert a == b or not split[a] & split[b]


def test_held_out_pairs_are_never_trained_on_and_always_in_composition(data):
    out, scenes = data
    for name in ("pretrain", "finetune"):
        text = (out / f"{name}.json").read_text()
        assert not [pair for pair in world.HELD_OUT if " ".join(pair) in text]
    for name, scene in scenes.items():
        shows = any((colour, shape) in world.HELD_OUT for _, _, colour, shape in scene)
        assert shows == name.startswith("composition")


def test_every_answer_is_true(data):
    out, scenes = data
    asked = [(line["image"], line["text"], line["answer"]) for s in SPLITS
             for line in read_lines(out / f"{s}.jsonl")]
    for sample in json.loads((out / "finetune.json").read_text()):
        asked += [(sample["image"], q, a) for q, a in text_of(sample["conversations"])]
    assert len(asked) == 3 * 120 * 6 + 200 * 2 * 4
    assert [(q, a) for image, q, a in asked if truth(scenes[image], q) != a] == []


def test_every_caption_is_true(data):
    out, scenes = data
    for sample in json.loads((out / "pretrain.json").read_text()):
        scene = {(" ".join(thing)) for thing in scenes[sample["image"]]}
        things = sample["conversations"][1]["value"].replace(" and ", ", ").replace("a ", "").split(", ")
        assert len(things) == len(scene) and all(any(thing.endswith(t) for thing in scene)
                                                 for t in things)


def test_answers_are_balanced_in_every_category(data):
    out, _ = data
    for split in ("val", "test"):
        lines = read_lines(out / f"{split}.jsonl")
        assert {line["category"] for line in lines} == set(world.CATEGORIES)
        for category in world.CATEGORIES:
            counts = Counter(line["answer"] for line in lines if line["category"] == category)
            assert sum(counts.values()) == 120
            assert max(counts.values()) <= 1.2 * min(counts.values()) + 1, (split, category, counts)


def test_adversarial_denials_name_a_shape_that_is_there_in_a_neighbours_colour(data):
    out, scenes = data
    for line in read_lines(out / "test.jsonl"):
        if line["category"] == "adversarial" and line["answer"] == "No":
            pair, scene = tuple(line["text"].rstrip("?").split()[-2:]), scenes[line["image"]]
            shown = {thing[2:] for thing in scene}
            swapped = {(c, s) for c, _ in shown for _, s in shown} - shown - world.HELD_OUT
            assert pair in swapped or not swapped and pair[1] in {s for _, s in shown}


def test_files_have_llavas_form(data):
    out, _ = data
    for name in ("pretrain", "finetune"):
        for sample in json.loads((out / f"{name}.json").read_text()):
            turns = sample["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (1 if name == "pretrain" else 4)
            assert turns[0]["value"].startswith("<image>\n") and not any("<image>" in t["value"] for t in turns[1:])
            assert Image.open(out / "images" / sample["image"]).size == (world.SIZE, world.SIZE)


# ---------------------------------------------------------------------------------------- tokenizer
def test_every_word_is_one_token(data, tokenizer):
    out, _ = data
    words = {*world.ROWS, *world.COLUMNS, *world.COLOURS, *world.SHAPES, *world.NUMBERS, "Yes",
             "No"}
    for name in ("pretrain", "finetune"):
        for sample in json.loads((out / f"{name}.json").read_text()):
            for turn in sample["conversations"]:
                words |= {w.strip("?.,") for w in turn["value"].removeprefix("<image>\n").split()}
    assert [w for w in words if len(tokenizer.encode(w).ids) != 2] == []            # <s> and the word
    assert [w for w in ("USER", "Which", "What", "Is", "How") if tokenizer.token_to_id(w) is None] == []


def test_the_system_prompt_is_one_token_and_llavas_pieces_come_out(tokenizer):
    assert len(tokenizer.encode(backbones.SYSTEM).ids) == 2
    assert tokenizer.encode(backbones.SYSTEM + " USER: ").tokens[2:] == ["▁USER", ":", "▁"]
    assert tokenizer.encode("\nWhich row").tokens == ["<s>", "▁", "<0x0A>", "Which", "▁row"]


def test_the_tokenizer_has_llamas_ids_and_decodes_what_it_encodes(tokenizer):
    assert [tokenizer.id_to_token(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    for text in ("Is there a red circle?", "a b  c\n", "héllo 漢字", backbones.SYSTEM):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("a</s>b").ids[2] == 2


# ---------------------------------------------------------------------------------------- backbones
def test_the_backbones_are_small_and_laid_out_as_released_checkpoints():
    files = {"clip": {"config.json", "model.safetensors", "preprocessor_config.json"},
             "llm": {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "special_tokens_map.json"}}
    for name, expected in files.items():
        assert {f.name for f in (TOY / name).iterdir()} == expected
        with safe_open(TOY / name / "model.safetensors", "pt") as f:
            assert f.metadata() == {"format": "pt"}
            assert {f.get_tensor(k).dtype for k in f.keys()} == {torch.float16}
    assert sum(f.stat().st_size for name in files for f in (TOY / name).iterdir()) <= 3e6
    clip, llm = (json.loads((TOY / name / "config.json").read_text()) for name in ("clip", "llm"))
    assert (clip["model_type"], clip["architectures"]) == ("clip", ["CLIPModel"])
    assert (llm["model_type"], llm["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (clip["torch_dtype"], llm["torch_dtype"]) == ("float16", "float16")
    assert (clip["vision_config"]["image_size"], clip["vision_config"]["patch_size"]) == (world.SIZE, world.CELL)
    assert llm["num_hidden_layers"] >= 4 and (llm["bos_token_id"], llm["eos_token_id"]) == (1, 2)


def test_the_backbones_load_strictly_by_name(tokenizer):
    llm = json.loads((TOY / "llm" / "config.json").read_text())
    assert llm["vocab_size"] == tokenizer.get_vocab_size()
    Decoder(config_of(DecoderConfig, llm)).load_state_dict(load_file(TOY / "llm" / "model.safetensors"))
    vision = json.loads((TOY / "clip" / "config.json").read_text())["vision_config"]
    weights = load_file(TOY / "clip" / "model.safetensors")
    ViT(config_of(VisionConfig, vision)).load_state_dict(
        {k.removeprefix("vision_model."): v
         for k, v in weights.items() if k.startswith("vision_model.")})


def test_clip_matches_pictures_to_captions(tokenizer):
    clip = backbones.CLIP(json.loads((TOY / "clip" / "config.json").read_text()))
    clip.load_state_dict(load_file(TOY / "clip" / "model.safetensors"))
    rng = random.Random(0)
    scenes = list({world.draw_scene(rng): None for _ in range(128)})
    with torch.no_grad():
        images = clip.embed_images(backbones.pixels([world.render(s, rng) for s in scenes]))
        texts = clip.embed_texts(backbones.clip_ids(tokenizer,
                                                    [world.long_caption(s, rng) for s in scenes]))
    right = (images @ texts.T).argmax(1) == torch.arange(len(scenes))
    assert right.float().mean() > .5                                            # chance is 1/128


def test_the_llama_reads_a_scene_in_words_better_than_by_guessing(tokenizer):
    """It counts, and mostly knows what is there. Which thing is where is left to stage 2 to learn."""
    llama = Decoder(config_of(DecoderConfig,
                              json.loads((TOY / "llm" / "config.json").read_text()))).eval()
    llama.load_state_dict(load_file(TOY / "llm" / "model.safetensors"))
    right = backbones.reading(llama, tokenizer, number=100)
    assert right["count"] >= .9 and right["existence"] >= .65 and right["adversarial"] >= .55, right
