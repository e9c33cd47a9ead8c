"""Spoiled, swollen and strange files: each is refused in one line, before it takes memory or time."""
import base64
import errno
import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import time
import zipfile
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from conftest import ROOT, call, command, launch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_errors import refuses
from tokenizers import Regex, Tokenizer, pre_tokenizers

import mir
from common.files import parse_log_line, read_json, read_jsonl
from common.flags import UserError, explain, parse, run
from common.images import MAX_SIDE, open_image
from common.text import HIDDEN
from data import Format, ImageProcessor, Samples, encode
from evaluate import Config as EvaluateConfig
from evaluation.benchmarks import BENCHMARKS
from evaluation.files import picture, read_rows
from evaluation.questions import Sample
from evaluation.scores import compare, score
from hub.check import CheckFlags, image_problem
from hub.configs import decoder_config, load_processor, read_config, vision_config
from hub.pairs import read_pairs, read_text
from hub.samples import SampleFile, read_questions, read_samples, sample_problem
from hub.tensors import check_safetensors, read_bin, unpickle
from hub.tokenizer import load_tokenizer, read_model
from look.__main__ import LookConfig
from training.folder import Log
from training.settings import TrainConfig

LLM, CLIP = ROOT / "toy" / "llm", ROOT / "toy" / "clip"


def write(path, content):
    """Write text, bytes or a JSON value; return the path."""
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def changed(folder, source, name="config.json", **values):
    """Copy a folder of weights with other values in one of its JSON files."""
    shutil.copytree(source, folder)
    value = json.loads((folder / name).read_text())
    part = value.get("vision_config", value) if name == "config.json" else value
    part.update(values)
    write(folder / name, value)
    return folder


# --------------------------------------------------------------------------------------------- JSON
@pytest.mark.parametrize("text, says", [
    ("[]", "is not a JSON object but a list"), ("null", "but null"), ("3", "but a whole number"), ('"x"', "but a text"),
    ('{"a": ' * 100_000, "nested too deeply"), ('{"a": "\\ud800"}', "half a character"),
    (b"\xff\xfe{}", "not JSON"),
    ("{", "is not JSON"), ("1" * 5000, "is not JSON"), (b"\0" * 64, "is not JSON")])
def test_json_of_another_kind_is_named(text, says, tmp_path):
    with pytest.raises(UserError, match=says):
        read_json(write(tmp_path / "a.json", text), dict)


@pytest.mark.parametrize("bad", ["[" * 100_000, '{"a": "\\ud800"}', "{"])
def test_a_line_that_is_not_json_is_named(bad, tmp_path):
    with pytest.raises(UserError, match="a.jsonl line 2: not JSON"):
        read_jsonl(write(tmp_path / "a.jsonl", f"{{}}\n{bad}\n"))


def test_a_byte_order_mark_is_read_over_in_json_jsonl_and_config(tmp_path):
    bom = b"\xef\xbb\xbf"
    assert read_json(write(tmp_path / "a.json", bom + b"{}"), dict) == {}
    assert read_jsonl(write(tmp_path / "a.jsonl", bom + b'{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]
    assert read_rows(write(tmp_path / "b.json", bom + b'[{"a": 1}]'))[0]["a"] == 1
    shutil.copy(LLM / "config.json", tmp_path)
    (tmp_path / "config.json").write_bytes(bom + (tmp_path / "config.json").read_bytes())
    assert decoder_config(tmp_path) == decoder_config(LLM)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")],
                         ids=["fifo", "device"])
@pytest.mark.parametrize("read",
                         [read_json, read_jsonl, read_rows, SampleFile,
                          lambda p: read_questions(p, None),
                                  lambda p: read_pairs(p, None, 2), read_text,
                                  lambda p: Log(p, "pretrain", 0)])
def test_what_is_not_a_regular_file_is_refused_and_does_not_hang(read, make, tmp_path):
    make(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        read(tmp_path / "a.jsonl")


# -------------------------------------------------------------------------------------- config.json
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}


@pytest.mark.parametrize("values, says", [
    (dict(num_hidden_layers=10**9), "num_hidden_layers is '1000000000', which no model has"),
    (dict(hidden_size="96"), "hidden_size is '96'"), (dict(hidden_size=[96]), "hidden_size"),
    (dict(vocab_size=2**70), "vocab_size"),
    (dict(num_attention_heads=0), "num_attention_heads is '0'"),
    (dict(num_attention_heads=3, num_key_value_heads=2), "3 heads are not divisible by 2 "
                                                         "heads of keys"),
    (dict(rope_theta=float("nan")), "rope_theta is 'nan'"),
    (dict(rms_norm_eps=float("inf")), "rms_norm_eps is 'inf'"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings is 'no'"),
    (dict(head_dim=7), "7 of the 7 dimensions"),
    (dict(rope_scaling=[1]), "rope_scaling is '[1]', not a JSON object"),
    (dict(rope_scaling={**SCALED, "factor": "8"}), "rope_scaling is {'factor': '8'"),
    (dict(rope_scaling={**SCALED, "high_freq_factor": 1.0}), "low below high"),
    (dict(model_type=["llama"]), "model_type"), (dict(connector_type={"a": 1}), "connector_type"),
    (dict(max_window_layers="9"), "max_window_layers is '9', not a whole number"),
    (dict(hidden_act={"a": 1}), "hidden_act"), (dict(vocab_size=True), "vocab_size is 'True'")])
def test_a_language_model_that_cannot_be_is_refused_before_a_layer_is_built(values, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        decoder_config(changed(tmp_path / "llm", LLM, **values))


@pytest.mark.parametrize("values, says", [
    (dict(num_hidden_layers=10**9), "num_hidden_layers"), (dict(image_size=10**6), "image_size"),
    (dict(hidden_size=97), "hidden_size 97 is not divisible by 4 heads"),
    (dict(patch_size=49), "larger than image"),
    (dict(patch_size=0), "patch_size is '0'"),
    (dict(hidden_act=7), "hidden_act is '7', not a text")])
def test_a_vision_encoder_that_cannot_be_is_refused_before_a_layer_is_built(values, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        vision_config(changed(tmp_path / "clip", CLIP, **values))


@pytest.mark.parametrize("values, says", [
    (dict(image_std=[0.2, 0.2, 0]), "image_std"), (dict(image_mean="x"), "image_mean"),
    (dict(size=10**9), "size is"),
    (dict(crop_size={}), "crop_size is 'None'"),
    (dict(image_mean=[0.4, 0.4, float("nan")]), "image_mean"),
    (dict(size="48"), "size is '48'")])
def test_a_preprocessor_that_cannot_be_is_refused(values, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        load_processor(changed(tmp_path / "clip", CLIP, "preprocessor_config.json", **values))


@pytest.fixture
def ckpt(trained, tmp_path):
    """A copy of a finished stage-2 checkpoint, to be spoiled."""
    return shutil.copytree(trained["finetune"] / "finetune-12", tmp_path / "ckpt")


@pytest.mark.parametrize("name, value",
                         [("template", None), ("after_special", None), ("pad", None),
                          ("vision", None),
                                         ("text_config", None), ("template", "v9"), ("pad", "yes"), ("step", "12"),
                                         ("after_special", 4.31)])
def test_a_checkpoint_whose_config_lacks_a_field_or_has_another_type_is_one_line(name, value, ckpt, small_world):
    c = json.loads((ckpt / "config.json").read_text())
    del c[name]
    write(ckpt / "config.json", c if value is None else {**c, name: value})
    image = next((small_world / "images").iterdir())
    refuses(call("evaluate.py", "--ckpt", ckpt, "--image", image, "--prompt", "What?"),
            "config.json", name)


# ------------------------------------------------------------------------------------------ weights
def safetensors_file(header, body=bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape,
            "data_offsets": list(offsets)}


@pytest.mark.parametrize("header, says", [
    (b"null", "unreadable header"), (b"[]", "unreadable header"), (b"3", "unreadable header"),
    (b"[" * 50_000, "unreadable header"), ({"a": None}, "unreadable header, at 'a'"),
    ({"a": [1]}, "at 'a'"),
    ({"a": entry(offsets=(-8, 0))}, "at 'a'"), ({"a": entry(shape=(-2,))}, "at 'a'"),
    ({"a": entry(shape=2)}, "at 'a'"),
    ({"a": entry(dtype="F99")}, "'F99', a dtype that is not known"),
    ({"a": entry(dtype=None)}, "at 'a'"),
    ({"a": entry(), "b": entry(offsets=(4, 12))}, "wrong about b"),
    ({"a": entry(shape=(9,))}, "wrong about a"),
    ({"a": entry(shape=(2**40, 2**40))}, "wrong about a"),
    ({"a": entry(offsets=(8, 16))}, "wrong about a"),
    ({"a": entry()}, "too long: 70 bytes|too long"), (b'{"\\ud800": {}}', "unreadable header")])
def test_a_header_of_safetensors_that_cannot_be_is_named(header, says, tmp_path):
    with pytest.raises(UserError, match=says):
        check_safetensors(write(tmp_path / "model.safetensors", safetensors_file(header)))


def test_every_dtype_that_the_library_writes_is_known(tmp_path):
    tensors = {str(t): torch.zeros(3).to(t) for t in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
        torch.float8_e5m2, torch.bool, torch.complex64, torch.int8, torch.int16, torch.int32,
        torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)}
    save_file({**tensors, "empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0)},
              tmp_path / "a.safetensors", metadata={"format": "pt"})
    check_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value, says", [
    ({3: torch.ones(2)}, "3 is a Tensor"), ({"a": None}, "'a' is a NoneType"), ([], "but a list"),
    ({"a": torch.ones(2, 2).to_sparse()}, "a is a quantised, sparse"),
    ({"a": torch.ones(2, device="meta")}, "a is")])
def test_a_bin_file_with_odd_keys_or_tensors_is_named(value, says, tmp_path):
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=says):
        read_bin(tmp_path / "pytorch_model.bin")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_tensor_of_a_bin_file_is_named(tmp_path):
    torch.save({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
               tmp_path / "a.bin")
    with pytest.raises(UserError, match="a is a quantised"):
        read_bin(tmp_path / "a.bin")


@pytest.mark.parametrize("grown", ["data.pkl", "data/0"])
def test_a_bin_file_that_unpacks_to_more_than_itself_is_refused_before_it_is_unpacked(grown, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.bin")
    with zipfile.ZipFile(tmp_path / "good.bin") as old, zipfile.ZipFile(tmp_path / "bad.bin", "w", 8) as new:
        for name in old.namelist():
            with new.open(name, "w") as f:
                f.write(old.read(name))
                for _ in range(64 if name.endswith(grown) else 0):
                    f.write(bytes(1 << 20))
    assert (tmp_path / "bad.bin").stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="unpacks to 6"):
        unpickle(tmp_path / "bad.bin")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10           # KiB


# ----------------------------------------------------------------------------------------- pictures
def png(width, height) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(ran) (MARK) (w) file exch writestring\n"


def test_postscript_called_png_starts_no_ghostscript(tmp_path, monkeypatch):
    """A stand-in for gs notes that it was started."""
    mark = tmp_path / "started"
    gs = write(tmp_path / "gs", f"#!/bin/sh\ntouch {mark}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = write(tmp_path / "cat.png", SCRIPT)
    cell = base64.b64encode(SCRIPT).decode()
    for read in (lambda: open_image(path), lambda: picture(path), lambda: picture(cell)):
        with pytest.raises(ValueError, match="not an image"):
            read()
    assert image_problem(path) == "not an image"
    assert not mark.exists()


@pytest.mark.parametrize("size",
                         [(70_000, 1), (1, 70_000), (MAX_SIDE + 1, 200), (5000, 20),
                          (10_000, 9_000)])
def test_a_picture_that_would_swell_is_refused_by_every_reader_before_it_is_decoded(size, tmp_path, monkeypatch):
    data = png(*size)
    path, cell = write(tmp_path / "a.png", data), base64.b64encode(data).decode()
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    for read in (lambda: open_image(path), lambda: open_image(data), lambda: picture(path),
                 lambda: picture(cell)):
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels"):
            read()
    assert f"{size[0]} x {size[1]} pixels" in image_problem(path)


@pytest.mark.parametrize("size", [(10_000, 50), (60, 9_000), (3, 500), (1, 1)])
def test_a_long_picture_is_still_read_in_both_stages(size):
    processor = ImageProcessor(size=336, crop_size=336)
    for pad in (True, False):
        assert processor(open_image(png(*size)), pad).shape == (3, 336, 336)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_the_named_formats_are_read_from_files_and_cells(kind, tmp_path):
    Image.new("RGB", (5, 4), (200, 10, 10)).save(tmp_path / "a", kind)
    assert open_image(tmp_path / "a").size == picture(base64.b64encode((tmp_path / "a").read_bytes()).decode()).size


@pytest.mark.parametrize("make, says",
                         [(os.mkfifo, "not a file"),
                          (lambda p: p.symlink_to("/dev/zero"), "not a file"),
                                        (lambda p: p.symlink_to("gone"), "missing"),
                                        (os.mkdir, "not a file")])
def test_a_picture_that_is_no_regular_file_is_named_and_does_not_hang(make, says, tmp_path):
    make(tmp_path / "a.png")
    assert image_problem(tmp_path / "a.png") == says


# ------------------------------------------------------------------------------ tokenizers and text
def test_a_number_without_an_end_in_a_tokenizer_model_is_refused_at_once(tmp_path):
    path = write(tmp_path / "tokenizer.model", b"\x80" * 3_000_000)
    began = time.perf_counter()
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        read_model(path)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("name, content", [
    ("added_tokens.json", {"<pad>": "x"}), ("added_tokens.json", {"<pad>": None}), ("added_tokens.json", {"<pad>": []}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<pad>"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": "<pad>"}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": 3}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]})])
def test_added_tokens_of_another_kind_are_named(name, content, tmp_path):
    shutil.copy(ROOT / "tests/fixtures/tokenizers/llama/tokenizer.model", tmp_path)
    write(tmp_path / name, content)
    with pytest.raises(UserError, match="does not list tokens"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_marks_words_is_refused_since_its_places_in_the_text_would_be_wrong(tmp_path):
    tokenizer = json.loads((LLM / "tokenizer.json").read_text())
    tokenizer["model"]["end_of_word_suffix"] = "</w>"
    write(tmp_path / "tokenizer.json", tokenizer)
    with pytest.raises(UserError, match="marks words by end_of_word_suffix"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("regex, says",
                         [("(a+)+$", "repeats a group"), ("(a|aa)*b", "repeats a group"),
                                         (r"\s+(?!\S)|\p{L}+|(?i:'s|'t)?\d{1,3}|\)+", None)])
def test_a_tokenizer_whose_regex_may_explode_is_refused(regex, says, tmp_path):
    tokenizer = Tokenizer.from_file(str(LLM / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(regex), "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if says:
        with pytest.raises(UserError, match=says):
            load_tokenizer(tmp_path)
    else:
        load_tokenizer(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_table_is_named_at_the_start_of_training(small_world, tmp_path):
    llm = changed(tmp_path / "llm", LLM, vocab_size=540)
    weights = load_file(llm / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:540].contiguous()
    save_file(weights, llm / "model.safetensors")
    done = call(*command(small_world, tmp_path / "run", steps=1, llm=llm))
    refuses(done, "as 546, but the model embeds 540 tokens")
    assert not (tmp_path / "run").exists()


def turns(n, text="What is the colour of it now?") -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i in range(n)]


@pytest.mark.parametrize("rule", ["4.31", "4.37"])
@pytest.mark.parametrize("plain", [False, True])
def test_four_times_the_turns_take_about_four_times_as_long(rule, plain):
    tokenizer = load_tokenizer(LLM, plain)

    def seconds(n):
        times = []
        for _ in range(3):
            began = time.process_time()
            encode(turns(n), tokenizer, image_tokens=9, after_special=rule)
            times.append(time.process_time() - began)
        return min(times)
    assert seconds(4000) < 10 * seconds(1000)               # 16 times as long if it were quadratic


def test_of_a_text_of_ten_megabytes_only_what_is_kept_is_encoded():
    tokenizer, text = load_tokenizer(LLM), "a word and the colour of it " * 400_000
    began = time.perf_counter()
    ids, _, _ = encode([turns(1)[0], {"from": "gpt", "value": text}], tokenizer, image_tokens=9,
                       max_length=300)
    short, _, _ = encode([turns(1)[0], {"from": "gpt", "value": text[:50_000]}], tokenizer,
                         image_tokens=9, max_length=300)
    assert torch.equal(ids, short) and len(ids) == 300
    assert time.perf_counter() - began < 10


# ----------------------------------------------------------------------------------- control tokens
CONVERSATION = [{"from": "human", "value": "<image>\nIs </s> or <s> it?"},
                {"from": "gpt", "value": "The </s> is red."},
                {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "<unk>"}]


@pytest.mark.parametrize("rule", ["4.31", "4.37", "legacy"])
@pytest.mark.parametrize("template", ["v1", "llama_2", "plain"])
def test_control_tokens_in_a_text_are_control_tokens_unless_plain_specials(rule, template):
    """Plain: the template's own </s> stay; of the text every character is encoded as text."""
    counts, texts = [], []
    for plain in (False, True):
        tokenizer = load_tokenizer(LLM, plain)
        ids, labels, _ = encode(CONVERSATION, tokenizer, template, 3, None, rule)
        counts.append((ids == 2).sum().item())
        texts.append(tokenizer.decode([i for i in labels.tolist() if i >= 0],
                                      skip_special_tokens=False))
    own = {"v1": 2, "llama_2": 2, "plain": 0}[template]      # answers end in </s>
    # a caption alone: the question is dropped
    inside = 2 if template != "plain" else 1
    assert counts == [own + inside, own]
    assert "The </s> is red." in texts[1] and HIDDEN not in texts[1]


@pytest.mark.parametrize("rule", ["4.31", "4.37", "legacy"])
def test_plain_specials_change_nothing_where_a_text_has_none(rule):
    conversation = [{"from": "human", "value": "<image>\nWhat < is this? </ s>"}, *turns(4)[1:]]
    a, b = (encode(conversation, load_tokenizer(LLM, plain), "v1", 3, None, rule)
            for plain in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_a_text_in_plain_specials_is_encoded_as_if_no_token_were_a_control_token():
    bare = Tokenizer.from_file(str(LLM / "tokenizer.json"))
    bare.encode_special_tokens = True
    ids, labels, _ = encode([{"from": "human", "value": ""},
                             {"from": "gpt", "value": "a </s> b<s>"}],
                            load_tokenizer(LLM, True), "v1")
    wanted = bare.encode("a </s> b<s>", add_special_tokens=False).ids
    answer = [i for i in labels.tolist() if i >= 0]
    assert answer[-1 - len(wanted):] == [*wanted, 2]


def test_train_stores_plain_specials_and_evaluate_follows_it(small_world, tmp_path):
    assert call(*command(small_world, tmp_path / "run", steps=1), "--plain-specials").returncode == 0
    ckpt = tmp_path / "run" / "finetune-1"
    assert read_config(ckpt)["plain_specials"] is True
    assert load_tokenizer(ckpt).encode_special_tokens and not load_tokenizer(ckpt, False).encode_special_tokens
    ask = ["evaluate.py", "--ckpt", ckpt, "--prompt", "a </s> b", "--max-new-tokens", "1"]
    for flag in ("--plain-specials", "--no-plain-specials"):
        assert call(*ask, flag).returncode == 0


def test_plain_specials_reach_a_process_that_prepares_batches():
    samples = Samples([{"conversations": CONVERSATION[:2]}], ".", load_tokenizer(LLM, True),
                      ImageProcessor(), Format("v1", 3))
    copy = pickle.loads(pickle.dumps(samples))               # what spawning a worker does
    assert torch.equal(copy[0].input_ids, samples[0].input_ids)
    assert (copy[0].input_ids == 2).sum() == 1


# ------------------------------------------------------------------------------- samples, questions
def test_an_image_mark_in_an_answer_is_refused(tmp_path):
    s = {"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "What?"},
                                                        {"from": "gpt", "value": "<image> it is"}]}
    assert "mark in an answer" in sample_problem(s)
    with pytest.raises(UserError, match="sample 0 .id a. has an <image> mark in an answer"):
        read_samples(write(tmp_path / "a.json", [s]))


@pytest.mark.parametrize("row, says", [
    ({"question_id": 1, "text": "a", "image": 7}, "has image 7"),
    ({"text": "a", "image": ["b"]}, "has image"),
    ({"text": "a", "image": {"b": 1}}, "has image"), ({"text": ["a"]}, "text")])
def test_questions_with_images_or_texts_of_another_type_are_named(row, says, tmp_path, trained):
    path = write(tmp_path / "q.jsonl", json.dumps(row) + "\n")
    with pytest.raises(UserError, match=says):
        read_questions(path, tmp_path)
    done = call("evaluate.py", "--ckpt", trained["finetune"], "--data", path, "--images", tmp_path,
                "--out", tmp_path / "e")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_question_ids_of_any_type_are_compared_as_text(tmp_path):
    rows = [{"question_id": i, "text": "a"} for i in ([1], {"a": 1}, 1.5, None)]
    path = write(tmp_path / "q.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert len(read_questions(path, None)) == 4
    with pytest.raises(UserError, match="is there twice"):
        read_questions(write(path, path.read_text() + json.dumps(rows[0]) + "\n"), None)


@pytest.mark.parametrize("cell", ["[1, 2", "['a'", "[" * 9999, "[1, 2]", "[None]", "[" + "9" * 80])
def test_a_list_of_images_that_is_none_is_named_with_its_row(cell, tmp_path):
    path = write(tmp_path / "mmbench_dev_1.tsv",
                 f"index\tquestion\timage\n0\ta\t{cell.ljust(70)}\n")
    with pytest.raises(UserError, match="row 1 has"):
        read_rows(path)


@pytest.mark.parametrize("rule, answer",
                         [("pope", ["yes"]), ("mme", ["Yes"]), ("exact", [3]), ("anls", [None])])
def test_a_reference_of_another_kind_is_named_with_its_question(rule, answer):
    with pytest.raises(UserError, match="question 7 has the reference"):
        score(replace(BENCHMARKS["own"], score=rule), [Sample("7", "a", answer=answer)], {"7": "b"})


def test_results_without_a_name_settings_or_numbers_are_not_compared(tmp_path):
    good = {"benchmark": "own", "name": "q", "n": 1, "partial": False, "settings": {},
            "headline": {"accuracy": 1.0}}
    for change in ({"name": []}, {"settings": None}, {"headline": {"accuracy": "x"}}, {"n": None}):
        write(tmp_path / "results.json", good | change)
        with pytest.raises(UserError, match="holds a results.json without"):
            compare([tmp_path])


@pytest.mark.parametrize("spoil",
                         [lambda text: text.encode("utf-16"), lambda text: b"\xff" + text.encode()])
def test_a_table_that_is_not_utf_8_is_named(spoil, tmp_path):
    path = write(tmp_path / "mmbench_dev_1.tsv", spoil("index\tquestion\timage\n0\ta\tb\n"))
    with pytest.raises(UserError, match="mmbench_dev_1.tsv is not a table in UTF-8"):
        read_rows(path)


# ----------------------------------------------------------------------------------------- resuming
def resumable(small_world, out):
    """A stage-1 run that was stopped after its third step of four."""
    words = command(small_world, out, "pretrain", 4, **{"save-every": 1, "keep-last": 3})
    assert call(*words).returncode == 0
    shutil.rmtree(out / "pretrain-4")
    return words


def test_a_log_with_garbage_or_nuls_after_a_power_cut_resumes(small_world, tmp_path):
    words = resumable(small_world, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]) + b"\0" * 4096 + b"\n[1]\nnull\n\xff\n" + b"[" * 99_999
                    + b'\n{"stage": "pre')
    done = call(*words, "--resume")
    assert done.returncode == 0 and "5 unreadable lines are left out" in done.stdout, done.stderr
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_log_line_has_a_stage_a_step_and_numbers():
    good = {"stage": "pretrain", "step": 1, "ce": 0.5}
    assert parse_log_line(json.dumps(good)) == good
    for bad in ([], {"stage": 1, "step": 1}, {"stage": "pretrain"}, {**good, "ce": "x"},
                {**good, "ce": [1]}):
        with pytest.raises(ValueError):
            parse_log_line(json.dumps(bad))


def test_the_state_of_another_model_is_named(small_world, tmp_path):
    words = resumable(small_world, tmp_path / "run")
    folder = tmp_path / "run" / "pretrain-3"
    (folder / "digests.json").unlink()                      # they would notice any change
    good = load_file(folder / "optimizer.safetensors")
    for bad in ({}, {"99.step": torch.zeros(())}, {**good, "0.exp_avg": torch.zeros(3)},
                {"exp_avg": good["0.exp_avg"]}):
        save_file(bad, folder / "optimizer.safetensors")
        refuses(call(*words, "--resume"),
                "optimizer.safetensors is not the state of this model's optimizer")


# -------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize("cls",
                         [TrainConfig, EvaluateConfig, mir.MIRConfig, LookConfig, CheckFlags])
@pytest.mark.parametrize("value", ["-1", str(2**70), "1e15", "inf", "nan", "-inf", "-0.5"])
def test_no_number_flag_takes_what_no_number_can_be(cls, value):
    for f in fields(cls):
        if value in ("1e15", str(2**70)) and float in (f.type, *get_args(f.type)) and f.name != "timeout":
            continue                                        # a weight or a rate may be as large
        if type(f.default) in (int, float) or f.type in (int | None, float | None):
            with pytest.raises(UserError, match=f"--?{f.name.replace('_', '-')}"):
                parse(cls, [f"--{f.name.replace('_', '-')}={value}"])


@pytest.mark.parametrize("words", [["train.py", "--workers", "100000"],
                                   ["train.py", "--global-batch", str(2**30)],
                                   ["evaluate.py", "--max-new-tokens", str(2**30), "--prompt", "x"],
                                   ["hub", "check", "x.json", "--image-tokens", str(2**30)]])
def test_a_flag_that_would_take_all_memory_is_refused(words):
    refuses(call(*words), "must be from", f"not {2**30}" if str(2**30) in words else "not 100000")


# ----------------------------------------------------------------------------- the end of a command
def end_of(error) -> str:
    """Return what `run` prints of an error, and check the exit code."""
    def fail():
        raise error
    out, before = io.StringIO(), sys.stderr
    sys.stderr = out
    try:
        with pytest.raises(SystemExit) as e:
            run(fail)
    finally:
        sys.stderr = before
    assert e.value.code == 2
    return out.getvalue()


@pytest.mark.parametrize("error, says", [
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device"),
    (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system"),
    (UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid"), "not UTF-8"),
    (MemoryError("9 GB"), "not enough memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "not enough memory"),
    (RecursionError("x"), "nested too"),
    (UserError("two\nlines"), "two lines")])
def test_errors_of_the_machine_end_in_one_line(error, says):
    said = end_of(error)
    assert said.startswith("error: ") and says in said and said.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    assert explain(RuntimeError("shape mismatch")) is None
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def close_output():
    """Make the process print into a pipe that nobody reads."""
    read, written = os.pipe()
    os.close(read)
    os.dup2(written, 1)


def test_a_closed_pipe_ends_a_program_silently():
    done = launch("-m", "hub", "inspect", LLM, set_up=close_output)
    assert done.returncode == 141 and not done.stderr
