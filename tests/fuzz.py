"""Give every command spoiled files, and check how it ends: exit code 0, or 2 with one line that says why.

    python tests/fuzz.py --n 2000          every kind of file and every command, 4 to 6 minutes on 2 cores
    python tests/fuzz.py --only 137        one case again; --keep DIR leaves its files there

Case i is a function of (seed, i) alone: which file is spoiled, how, and which command reads it. A
case runs in a forked process that may take 60 s (longer on a machine with more to do than it has
cores) and 1 GiB more than what is loaded at its start.
"""
import argparse
import base64
import collections
import ctypes
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
               "OMP_NUM_THREADS": "1"}

import make_benchmarks  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load, load_file, save, save_file  # noqa: E402

import evaluate  # noqa: E402
import hub.__main__  # noqa: E402
import look.__main__  # noqa: E402
import mir  # noqa: E402
import toy.report  # noqa: E402, F401, train.py imports it late
import train  # noqa: E402
from common.flags import run  # noqa: E402

warnings.filterwarnings("ignore", "torch.quantize_per_tensor")
SECONDS, MEMORY = 60, 1 << 30
QUANTIZED = torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8)
PROGRAMS = {"train": train, "evaluate": evaluate, "mir": mir, "hub": hub.__main__,
            "look": look.__main__}


# ----------------------------------------------------------------------------------- spoiled values
def odd_value(rng: random.Random):
    """Return a JSON value that is likely to be wrong wherever it stands."""
    return rng.choice([None, [], {}, "", "x", 0, -1, 1, 2, 7, 10**9, 2**70, -2**63, 0.5, 1e-320,
                       1e400, float("nan"), True, False, "\ud800", "</s>", "<image>",
                       "<image> <image>", "\0", "../x", "/dev/zero", "9" * 30, "[" * 50, "(a+)+$",
                       "a" * 100_000, [None], [[1, [2]]], {"a": {"b": 1}}, ["<image>"] * 3, "llama",
                       "gemma", "lora", "F8_E4M3", "1e9", "NaN", 3.0, -2.5, [1, 2, 3], [10**9] * 3,
                       "ｎ０", 10**400])


def spoil_tree(rng: random.Random, value):
    """Change one place of a JSON value, each of its levels alike."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice([odd_value(rng), [value], {"x": value}, str(value), [value, value]])
    value = value.copy()
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    action = rng.random()
    if action < 0.1:
        del value[key]
    elif action < 0.2 and isinstance(value, dict):
        value[str(odd_value(rng))[:50]] = value.pop(key)
    elif action < 0.25 and isinstance(value, list):
        value.insert(key, value[rng.randrange(len(value))])
    else:
        value[key] = spoil_tree(rng, value[key])
    return value


def spoil_json(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data = json.dumps(spoil_tree(rng, json.loads(data)), ensure_ascii=True).encode()
    return data


def spoil_jsonl(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = spoil_json(rng, lines[i])
    return b"\n".join(lines) + b"\n"


def spoil_text(rng: random.Random, data: bytes) -> bytes:
    """Spoil a text file as a whole, by what disks, editors and downloads do."""
    text, deep = data.decode(), rng.choice([1000, 100_000])
    return rng.choice([b"", b"null", b"[]", b"{}", b"3", b'"x"', b"NaN", b"[NaN]", b"\xff\xfe",
                       b"\0" * 4096, b"\n\n", b"\xef\xbb\xbf" + data, text.encode("utf-16"),
                       b"[" * deep, b'{"a":' * deep, data + data, data[:rng.randrange(len(data))],
                       data + b"\0" * 512, data.replace(b'"', b"'"), b"1" * 5000,
                       b"version https://git-lfs.github.com/spec/v1\nsize 123456789",
                       b"<!doctype html>", b"[[]]", b'{"a": "\\ud800"}',
                       data.replace(b":", b": [", 1), b"\xef\xbb\xbf", text.encode("latin-1",
                       "replace") + b"\xe9", data.replace(b"\n", b"\r\n"),
                       b"[" * deep + b"]" * deep])


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, delete, insert, repeat or cut bytes."""
    spoiled = bytearray(data)
    for _ in range(rng.choice([1, 1, 4, 30])):
        at = rng.randrange(len(spoiled)) if rng.random() < 0.5 else rng.randrange(min(len(spoiled), 200))
        action, size = rng.randrange(6), rng.choice([1, 2, 4, 8, 100])
        if action == 0:
            spoiled[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            spoiled[at:at + size] = rng.choice([b"\0", b"\xff", b"\x80"]) * size
        elif action == 2:
            del spoiled[at:at + size]
        elif action == 3:
            spoiled[at:at] = rng.randbytes(size)
        elif action == 4:
            spoiled[at:at] = spoiled[at:at + size]
        elif len(spoiled) > 400:
            del spoiled[rng.choice([at, at + size, len(spoiled) - size]):]
        spoiled = spoiled or bytearray(b"\0")
    return bytes(spoiled)


# ---------------------------------------------------------------------------------- spoiled formats
def spoil_header(rng: random.Random, data: bytes) -> bytes:
    """Spoil the header of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry, action = header[name], rng.randrange(9)
    if action == 0:
        entry["data_offsets"] = rng.choice([[-8, 8], [8, 0], [0, 2**63], [0, 2**70], [0],
                                            [0.5, 1.5], [0, len(body)]])
    elif action == 1:
        entry["dtype"] = rng.choice(["F99", "I32", "BOOL", "F8_E5M2", "C64", "U16", "f32", "", None,
                                     7])
    elif action == 2:
        entry["shape"] = rng.choice([[], [-1], [2**40, 2**40], [0], [1.5], ["2"], None,
                                     entry["shape"] + [1]])
    elif action == 3:
        header[rng.choice(["", "x", "é" * 300, "lm_head", "\ud800", "model.layers.99999999999.x"])] = header.pop(name)
    elif action == 4:
        entry["data_offsets"] = header[rng.choice([n for n in header if n != "__metadata__"])]["data_offsets"]
    else:
        header = spoil_tree(rng, header)
    text = rng.choice([json.dumps(header).encode()] * 8
                      + [b"null", b"[]", b"[" * 5000, b"{}", b"\xff" * 10, b"3"])
    length = rng.choice([len(text)] * 12 + [0, 2**63, 10**8, 2**64 - 1, len(text) - 1])
    return struct.pack("<Q", length) + text + body


def spoil_bin(rng: random.Random, data: bytes) -> bytes:
    """Write a .bin file with odd keys, odd tensors, or nothing of the kind."""
    tensors, out = torch.load(io.BytesIO(data), weights_only=True), io.BytesIO()
    name = rng.choice(list(tensors))
    t = tensors[name].float()
    odd = rng.choice(["key", "value", "whole", "zip", "bytes", "old"])
    if odd == "key":
        tensors[rng.choice([3, None, ("a", 1), 2.5, b"x", ""])] = tensors.pop(name)
    if odd == "value":
        tensors[name] = rng.choice([QUANTIZED, t.to_sparse(), t.int(), None,
                                    t.bool(), t.to(torch.complex64), t.to("meta"),
                                    t[:1].expand(10**6, *t.shape[1:]), 3, t.T, t[None],
                                    t * float("nan"), "x", [t], {"x": t}, torch.nn.Parameter(t)])
    value = rng.choice([[tensors], None, t, 7, {"state_dict": tensors}, set(), {}]) if odd == "whole" else tensors
    torch.save(value, out, _use_new_zipfile_serialization=odd != "old")
    data = out.getvalue()
    if odd == "zip":                            # a small file that unpacks to a large one
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
            grown = rng.choice(old.namelist())
            for entry in old.namelist():
                new.writestr(entry, old.read(entry) + bytes(1 << 26 if entry == grown else 0))
        data = out.getvalue()
    return spoil_bytes(rng, data) if odd in ("bytes", "old") else data


def spoil_state(rng: random.Random, data: bytes) -> bytes:
    """Write the optimizer's state of another model, or of another shape in one place."""
    tensors = load(data)
    name, action = rng.choice(list(tensors)), rng.randrange(4)
    if action == 0:
        del tensors[name]
    elif action == 1:
        tensors[f"100{name}"] = tensors.pop(name)
    elif action == 2:
        tensors[name] = torch.zeros(3)
    else:
        tensors = {"exp_avg": torch.zeros(3)}
    return save(tensors)


def make_png(width: int, height: int, rows: int) -> bytes:
    """A grey PNG that says it is of this size, and holds so many rows."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(bytes(width + 1)) for _ in range(rows)) + packer.flush()
    return (b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def spoil_image(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.5:
        image, out = Image.open(io.BytesIO(data)), io.BytesIO()
        mode, kind = rng.choice([("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("RGB", "BMP"),
                                 ("RGB", "WEBP"),
                                 ("CMYK", "JPEG"), ("RGB", "TIFF"), ("RGBA", "PNG"),
                                 ("I;16", "PNG"), ("LA", "PNG"),
                                 ("RGB", "PPM"), ("RGB", "JPEG"), ("P", "PNG"), ("F", "TIFF"),
                                 ("L", "ICO")])
        image.convert("L" if mode == "I;16" else "RGB").convert(mode).save(out, kind)
        return spoil_bytes(rng, out.getvalue())
    return rng.choice([lambda: make_png(70_000, 1, 1), lambda: make_png(1, 70_000, 70_000),
                       lambda: b"", lambda: make_png(60_000, 60_000, 1),
                       lambda: make_png(9_000, 9_000, 9_000), lambda: make_png(0, 5, 0),
                       lambda: make_png(2**31 - 1, 2**31 - 1, 1), lambda: data[:60],
                       lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
                       lambda: make_png(11_000, 100, 100), lambda: make_png(1, 1, 1),
                       lambda: b"P6 99999 99999 255 ",
                       lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"])()


def spoil_table(rng: random.Random, data: bytes) -> bytes:
    """Spoil a cell of a TSV with a base64 image a row."""
    rows = [line.split("\t") for line in data.decode().splitlines()]
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice([
        "", "[1, 2", "['a'", "[" * 9999, "[]", "['x', 3]", "[None]", "nan", "1", "99", "-1",
        "x" * 70, base64.b64encode(spoil_image(rng, PICTURE)).decode(), "{'a': 1}", "1e999",
        repr([base64.b64encode(PICTURE).decode()]), "=" * 100, "\0", "9" * 400,
        "[" + "9," * 50 + "]"])
    return "\n".join("\t".join(row) for row in rows).encode()


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, value) -> bytes:
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def make_sentencepiece(vocab: dict[str, int]) -> bytes:
    """A tokenizer.model of a tokenizer.json's vocabulary."""
    kinds, out = {"<unk>": 2, "<s>": 3, "</s>": 3}, b""
    for piece, i in sorted(vocab.items(), key=lambda entry: entry[1]):
        kind = kinds.get(piece, 6 if piece.startswith("<0x") else 1)
        out += field(1, field(1, piece.encode()) + varint(2 * 8 + 5) + struct.pack("<f", -i)
                     + field(3, kind))
    return out + field(2, field(3, 2) + field(35, 1)) + field(3,
                                                              field(3, 1) + field(4, 0)
                                                              + field(5, 1))


def spoil_pieces(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return data[:rng.randrange(len(data))] + rng.choice([b"\x80", b"\xff"]) * rng.choice([9, 20, 4_000_000])
    return spoil_bytes(rng, data)


# --------------------------------------------------------------------------------- a world to spoil
PICTURE = b""
TRAIN = ("train --stage {stage} --vision clip --llm llm --data {data} --images images --out new "
         "--global-batch 2 --max-steps 1 --workers 0 --device cpu{more}")
PRETRAIN = TRAIN.format(stage="pretrain", data="data.json", more="")
FINETUNE = TRAIN.format(stage="finetune", data="data.json", more=" --projector random")
RESUME = TRAIN.replace("--max-steps 1", "--max-steps 3 --save-every 1").replace("--out new", "--out run --resume")
RESUME = RESUME.format(stage="pretrain", data="data.json", more="")
ASK = ["evaluate", "--ckpt", "ckpt", "--image", "images/a.png", "--max-new-tokens", "2", "--prompt",
       "What?"]
OWN = "evaluate --ckpt ckpt --data q.jsonl --images images --out new --max-new-tokens 2 --batch-size 4"
BENCH = "evaluate --bench mmbench_en --data mmbench_dev_20230712.tsv --ckpt ckpt --out new --max-new-tokens 2"
POPE = "evaluate --bench pope --data pope --images images --ckpt ckpt --out new --max-new-tokens 2"
MIR = "mir --ckpt ckpt --data {} --images images --n 3"
LOOK = ["look", "--ckpt", "ckpt", "--image", "images/a.png", "--prompt", "What?",
        "--max-new-tokens", "2"]
SHOW_DATA = "hub check data.json --images images --llm llm --vision clip --show 2 --out page.html"
CHECK = "hub check {} --images images --llm {} --image-tokens 9"
EVERY_MODEL = [PRETRAIN, FINETUNE]
TEXT, DATA, BYTES = [spoil_json] * 4 + [spoil_text], [spoil_jsonl] * 4 + [spoil_text], [spoil_bytes]

# (file, how it may be spoiled, commands that read it); the first few are drawn most often.
TARGETS = [
    ("llm/config.json", TEXT, ["hub inspect llm", *EVERY_MODEL]),
    ("clip/config.json", TEXT, ["hub inspect clip", *EVERY_MODEL]),
    ("clip/preprocessor_config.json", TEXT, [PRETRAIN, "hub inspect clip", SHOW_DATA]),
    ("ckpt/config.json", TEXT,
     ["hub inspect ckpt", ASK, OWN, MIR.format("q.jsonl"), "hub export ckpt new", LOOK]),
    ("ckpt/preprocessor_config.json", TEXT, [ASK, "hub export ckpt new", MIR.format("data.json")]),
    ("data.json", TEXT, [CHECK.format("data.json", "llm"), PRETRAIN, FINETUNE,
                         MIR.format("data.json"), SHOW_DATA]),
    ("data.jsonl", DATA, [CHECK.format("data.jsonl", "llm"), FINETUNE.replace(".json", ".jsonl")]),
    ("q.jsonl", DATA, [OWN, MIR.format("q.jsonl"), OWN + " --score-only answers.jsonl"]),
    ("answers.jsonl", DATA, [OWN + " --score-only answers.jsonl"]),
    ("pope/llava_pope_test.jsonl", DATA, [POPE]),
    ("pope/coco_pope_random.json", DATA, [POPE]),
    ("mmbench_dev_20230712.tsv", [spoil_table] * 4 + [spoil_text], [BENCH]),
    ("texts.json", TEXT, ["mir --ckpt ckpt --images images --texts texts.json --n 3"]),
    ("ckpt/model.safetensors", [spoil_header] * 4 + BYTES, ["hub inspect ckpt", ASK]),
    ("llm/model.safetensors", [spoil_header] * 4 + BYTES, ["hub inspect llm", PRETRAIN]),
    ("clip/model.safetensors", [spoil_header] * 4 + BYTES, ["hub inspect clip", PRETRAIN]),
    ("shards/model.safetensors.index.json", TEXT, ["hub inspect shards"]),
    ("bin/pytorch_model.bin", [spoil_bin],
     ["hub inspect bin", PRETRAIN.replace("--llm llm", "--llm bin")]),
    ("llm/tokenizer.json", [spoil_json] * 6 + [spoil_text],
     [CHECK.format("data.json", "llm"), PRETRAIN]),
    ("ckpt/tokenizer.json", [spoil_json] * 6 + [spoil_text],
     [ASK, "hub inspect ckpt", "hub export ckpt new"]),
    ("sp/tokenizer.model", [spoil_pieces], [CHECK.format("data.json", "sp"), "hub inspect sp"]),
    ("sp/added_tokens.json", TEXT, [CHECK.format("data.json", "sp")]),
    ("sp/tokenizer_config.json", TEXT, [CHECK.format("data.json", "sp")]),
    ("phi/vocab.json", TEXT, [CHECK.format("data.json", "phi")]),
    ("phi/merges.txt", [spoil_text, spoil_bytes], [CHECK.format("data.json", "phi")]),
    ("images/a.png", [spoil_image],
     [ASK, CHECK.format("data.json", "llm"), PRETRAIN, OWN, FINETUNE, LOOK]),
    ("run/metrics.jsonl", DATA, [RESUME, "look --run run"]),
    ("run/run.json", TEXT, [RESUME, "look --run run"]),
    ("run/pretrain-1/config.json", TEXT,
     [RESUME, "hub inspect run", FINETUNE.replace("random", "run")]),
    ("run/pretrain-1/optimizer.safetensors", [spoil_bytes, spoil_state], [RESUME]),
    ("run/pretrain-1/model.safetensors", [spoil_header],
     [RESUME, FINETUNE.replace("random", "run")]),
    ("done/q/results.json", TEXT,
     ["evaluate --compare done", OWN.replace("--out new", "--out done")]),
    ("done/q/pred.rank0of1.jsonl", DATA, [OWN.replace("--out new", "--out done")]),
]


def build(base: Path) -> None:
    """Write good files of every kind, which every case spoils a copy of."""
    global PICTURE
    (base / "images").mkdir(parents=True)
    for n, name in enumerate(("a.png", "b.jpg", "c.png")):
        Image.effect_noise((50, 40), 90 + n).convert("RGB").save(base / "images" / name)
    PICTURE = (base / "images" / "a.png").read_bytes()
    samples, questions = [], []
    for n, name in enumerate(("a.png", "b.jpg", "c.png", None)):
        mark = "<image>\n" if name else ""
        samples.append({"id": f"s{n}", **({"image": name} if name else {}), "conversations": [
            {"from": "human", "value": f"{mark}What is the colour?"},
            {"from": "gpt", "value": "It is red."}]})
        questions.append({"question_id": n, "image": name, "text": "Is it red?", "answer": "Yes",
                          "category": "colour"})
    (base / "data.json").write_text(json.dumps(samples))
    (base / "data.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (base / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (base / "answers.jsonl").write_text("".join(json.dumps({"question_id": n, "text": "Yes"})
                                                + "\n" for n in range(4)))
    (base / "texts.json").write_text(json.dumps(["A text.", {"text": "Another."}, samples[0]]))
    (base / "pope").mkdir()
    rows = [{"question_id": n, "image": name, "text": "Is it red?", "category": "random",
             "label": "yes"}
            for n, name in enumerate(("a.png", "b.jpg"))]
    (base / "pope" / "llava_pope_test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (base / "pope" / "coco_pope_random.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
    cells = [["index", "question", "hint", "A", "B", "answer", "category", "l2-category", "image",
              "split"]]
    for n in range(3):
        image = base64.b64encode(PICTURE).decode() if n == 0 else "0"
        cells.append([str(n), "Which?", "nan", "one", "two", "A", "x", "y", image, "dev"])
    (base / "mmbench_dev_20230712.tsv").write_text("\n".join("\t".join(row) for row in cells)
                                                   + "\n")
    build_models(base)


def build_models(base: Path) -> None:
    for name in ("clip", "llm"):
        shutil.copytree(ROOT / "toy" / name, base / name)
    weights = load_file(base / "llm" / "model.safetensors")
    for name in ("bin", "shards", "sp", "phi"):
        (base / name).mkdir()
        for file in ("config.json", "tokenizer.json"):
            shutil.copy(base / "llm" / file, base / name / file)
    torch.save(weights, base / "bin" / "pytorch_model.bin")
    shutil.copy(base / "llm" / "model.safetensors", base / "shards" / "a.safetensors")
    places = {"metadata": {}, "weight_map": dict.fromkeys(weights, "a.safetensors")}
    (base / "shards" / "model.safetensors.index.json").write_text(json.dumps(places))
    save_file(weights, base / "sp" / "model.safetensors")
    model = json.loads((base / "llm" / "tokenizer.json").read_text())["model"]
    (base / "sp" / "tokenizer.model").write_bytes(make_sentencepiece(model["vocab"]))
    (base / "sp" / "added_tokens.json").write_text(json.dumps({"<pad>": len(model["vocab"])}))
    (base / "sp" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True}}}))
    config = json.loads((base / "sp" / "config.json").read_text())
    (base / "sp" / "config.json").write_text(json.dumps(config
                                                        | {"vocab_size": config["vocab_size"] + 1}))
    (base / "phi" / "tokenizer.json").unlink()
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (base / "phi" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (base / "phi" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")

    # A stage-2 checkpoint, a stage-1 run that stopped after its first step, and a finished evaluation.
    for words in (FINETUNE, "mv new/finetune-1 ckpt", "mv new whole",
                  RESUME.replace(" --resume", ""), OWN.replace("--out new", "--out done")):
        code, said = 0, ""
        if words.startswith("mv"):
            os.rename(*(base / word for word in words.split()[1:]))
        else:
            code, said, _, _ = wait(start(words, base / "log", base))
        assert code == 0, f"{words}: {said}"
    config = json.loads((base / "run" / "pretrain-3" / "config.json").read_text())
    (base / "run" / "pretrain-3").rename(base / "run" / "pretrain-1")
    (base / "run" / "pretrain-1" / "config.json").write_text(json.dumps({**config, "step": 1}))


def spoil_parquet(rng: random.Random, data: bytes) -> bytes:
    """Spoil a cell, a column or the bytes of a parquet file."""
    import pyarrow
    from pyarrow.parquet import read_table, write_table
    rows, out = read_table(io.BytesIO(data)).to_pylist(), io.BytesIO()
    column, action = rng.choice(list(rows[0])), rng.random()
    if action < 0.3:
        return spoil_bytes(rng, data)
    if action < 0.6:
        rows[0][column] = spoil_tree(rng, rows[0][column])
    else:
        odd = odd_value(rng)
        for row in rows:
            if action < 0.7:
                del row[column]
            else:
                row[column] = odd
    try:
        write_table(pyarrow.Table.from_pylist(rows), out)
    except (pyarrow.lib.ArrowException, OverflowError, TypeError, UnicodeError):
        return spoil_bytes(rng, data)                           # no column can hold this
    return out.getvalue()


def build_benchmarks(base: Path) -> list[tuple]:
    """Write every benchmark as make_benchmarks.py does. Returns rows like those of TARGETS."""
    targets, made = [], make_benchmarks.LLAVA + (make_benchmarks.LMMS if find_spec("pyarrow") else [])
    for make in made:
        root = base / "benches" / make.__name__
        root.mkdir(parents=True)
        try:
            case = make(root)
        except ImportError:                                     # realworldqa: parquet alone
            shutil.rmtree(root)
            continue
        ids = case.ids or range(1, len(case.prompts) + 1)
        make_benchmarks.jsonl(root / "answers.jsonl", [
            {"question_id": i, "prompt": p, "text": a} for i, p, a in zip(ids, case.prompts, case.answers)])
        place = str(root.relative_to(base))
        command = ["evaluate", "--bench", case.bench, "--data", place, "--out", "new", *map(str, case.flags)]
        if (root / "images").is_dir():
            command += ["--images", f"{place}/images"]
        commands = [[*command, "--score-only", f"{place}/answers.jsonl"]] * 2
        commands.append([*command, "--ckpt", "ckpt", "--max-new-tokens", "2", "--device", "cpu"])
        for path in sorted(root.rglob("*")):
            ways = {".json": TEXT, ".jsonl": DATA, ".tsv": [spoil_table] * 4 + [spoil_text],
                    ".parquet": [spoil_parquet], ".txt": [spoil_text, spoil_bytes]}.get(path.suffix)
            if path.suffix == ".json" and len(path.read_text().splitlines()) > 1:
                ways = DATA                                     # POPE's are JSON lines
            if path.is_file() and ways:
                targets.append((str(path.relative_to(base)), ways, commands))
    return targets


# ------------------------------------------------------------------------------------------- a case
def limit() -> float:
    """Return the seconds that a case may take: more if other programs want this machine's cores too."""
    return SECONDS * max(1.0, os.getloadavg()[0] / os.cpu_count())


def start(command: str | list[str], log: Path, cwd: Path) -> tuple[int, float, Path]:
    """Fork a process that runs a command. Returns its id, the time, and where its errors go."""
    words = command.split() if isinstance(command, str) else command
    pid = os.fork()
    if pid:
        return pid, time.time(), log
    # its group is killed at the end: gs, workers
    os.setsid()
    code = 1
    try:
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        before = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (before + MEMORY, before + MEMORY))
        sys.argv = words
        run(PROGRAMS[words[0]].main)
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def wait(started: tuple, block: bool = True):
    """Return (exit code, errors, seconds, peak memory in bytes);
    None while it runs, unless block. Too late: killed."""
    pid, began, log = started
    done, status, usage = os.wait4(pid, os.WNOHANG)
    while not done:
        if time.time() - began > limit():
            os.killpg(pid, signal.SIGKILL)
        elif not block:
            return None
        time.sleep(0.005)
        done, status, usage = os.wait4(pid, os.WNOHANG)
    text = log.read_text(errors="replace") if log.exists() else ""
    return os.waitstatus_to_exitcode(status), text, time.time() - began, usage.ru_maxrss * 1024


def problem(code: int, said: str, seconds: float) -> str | None:
    """Return how a case failed, or None."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if seconds > limit():
        return f"took {seconds:.0f} s"
    if "Traceback" in said or code not in (0, 2):
        return f"exit code {code}"
    if len(errors) != (code == 2):
        return f"exit code {code} with {len(errors)} error lines"
    if any("panicked" in line for line in lines):
        return "a panic"
    if errors and "memory" in errors[0]:
        return "took more than 1 GiB"
    return None


def prepare(base: Path, benchmarks: list[tuple], case: Path, seed: int, i: int):
    """Copy the files of a case and spoil one. Returns (what is spoiled, the command)."""
    rng = random.Random(f"{seed} {i}")
    name, ways, commands = rng.choice(benchmarks if rng.random() < 0.25 else TARGETS)
    parts = Path(name).parts

    def others(folder: str, names: list[str]) -> list[str]:
        """The benchmarks that this case does not read: they are not copied."""
        return [n for n in names if Path(folder).name == "benches" and n not in parts]
    shutil.copytree(base, case, copy_function=os.link, ignore=others)
    path, way = case / name, rng.choice(ways)
    good = path.read_bytes()
    path.unlink()
    if rng.random() < 0.04:                                 # not a regular file
        way = rng.choice([os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p),
                          lambda p: os.symlink("gone", p)])
        way(path)
    else:
        path.write_bytes(way(rng, good))
    return f"{name} ({way.__name__})", rng.choice(commands)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--keep", type=Path, help="keep the files of failed cases in this folder")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # M_ARENA_MAX: threads do not reserve address space each
    ctypes.CDLL(None).mallopt(-8, 2)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    build(folder / "base")
    benchmarks = build_benchmarks(folder / "base")
    todo = list(range(args.n) if args.only is None else [args.only])[::-1]
    running, codes, failed, slow, peak, began = [], collections.Counter(), [], (0.0, None), (0, None), time.time()
    while todo or running:
        if todo and len(running) < args.jobs:
            i = todo.pop()
            spoiled, command = prepare(folder / "base", benchmarks, folder / str(i), args.seed, i)
            running.append((i, spoiled, command,
                            start(command, folder / f"{i}.err", folder / str(i))))
            continue
        for entry in list(running):
            i, spoiled, command, started = entry
            result = wait(started, block=False)
            if result is None:
                continue
            running.remove(entry)
            code, said, seconds, memory = result
            codes[code] += 1
            slow, peak = max(slow, (seconds, i)), max(peak, (memory, i))
            if why := problem(code, said, seconds):
                failed.append(i)
                print(f"case {i}: {spoiled}, {' '.join(command) if isinstance(command, list) else command}: {why}\n"
                      + "".join(f"    {line[:200]}\n" for line in said.splitlines()[-4:]),
                      flush=True)
            elif args.only is not None:
                print(f"case {i}: {spoiled}, {command}: exit code {code}, {said.strip()}")
            if args.keep and (why or args.only is not None):
                shutil.copytree(folder / str(i), args.keep / str(i), symlinks=True,
                                dirs_exist_ok=True)
            shutil.rmtree(folder / str(i))
        time.sleep(0.002)
    shutil.rmtree(folder)
    ends = ", ".join(f"{codes[c]} with exit code {c}" for c in sorted(codes))
    print(f"{sum(codes.values())} cases in {time.time() - began:.0f} s: {ends}; slowest {slow[0]:.1f} s (case "
          f"{slow[1]}), most memory {peak[0] / 2**20:.0f} MiB (case {peak[1]}); failed: {failed or 'none'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
