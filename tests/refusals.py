"""Spoil one file or one flag of a good world, and check the line that each command ends with.

    python tests/refusals.py          every row with its command and its line, about half a minute

Each row runs in a forked process, within 60 s and 1
GiB (fuzz.py). `python tests/faults.py` runs them too.
"""
import base64
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import fuzz
import torch
from fuzz import ASK, BENCH, CHECK, FINETUNE, LOOK, MIR, OWN, PRETRAIN, RESUME, SHOW_DATA
from safetensors.torch import save_file


def put(name, content):
    """Return a function that writes this into a file of the world."""
    def spoil(case: Path) -> None:
        (case / name).unlink()
        (case / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return spoil


def change(name, **values):
    """Return a function that changes fields of a JSON file."""
    def spoil(case: Path) -> None:
        value = json.loads((case / name).read_text())
        put(name, json.dumps({**value, **values}))(case)
    return spoil


def become(name, make):
    def spoil(case: Path) -> None:
        (case / name).unlink()
        make(case / name)
    return spoil


def packed(case: Path) -> None:
    """A .bin file of 64 KB that unpacks to 64 MB."""
    out = io.BytesIO()
    with zipfile.ZipFile(case / "bin/pytorch_model.bin") as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + bytes(1 << 26 if name.endswith("data.pkl") else 0))
    put("bin/pytorch_model.bin", out.getvalue())(case)


def odd_keys(case: Path) -> None:
    (case / "bin/pytorch_model.bin").unlink()
    torch.save({3: torch.ones(2)}, case / "bin/pytorch_model.bin")


def larger(case: Path) -> None:
    """A tokenizer with one token more than the embedding table."""
    tokenizer = json.loads((case / "llm/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["new"] = len(tokenizer["model"]["vocab"])
    put("llm/tokenizer.json", json.dumps(tokenizer))(case)


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def samples(**values) -> str:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]
    return json.dumps([{"id": "a", "conversations": turns, **values}])


WIDE = fuzz.make_png(70_000, 1, 1)
SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
CELLS = "index\tquestion\thint\tA\tB\tanswer\tcategory\tl2-category\timage\tsplit\n0\tW?\tnan\ta\tb\tA\tx\ty\t{}\tdev\n"
MARKED = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "<image>"}]
FLAGS = [("train --workers 999999", "--workers must be"), ("train --lr inf", "--lr must be"), (
    "train --seed " + str(2**70), "--seed must be"), ("train --timeout 1e15", "--timeout must be"),
    ("evaluate --limit -1", "--limit must be"), ("mir --n -1", "--n must be"),
    ("hub check data.json --show nan", "invalid int")]
# (what is wrong, how it comes about, the command, what its line says)
ROWS = [
    ("PostScript called a.png", put("images/a.png", SCRIPT), ASK, "not an image"),
    ("PostScript called a.png, checked", put("images/a.png", SCRIPT),
     CHECK.format("data.json", "llm"), "not an image"),
    ("a picture of 70,000 x 1", put("images/a.png", WIDE), ASK, "70000 x 1 pixels"),
    ("a picture of 70,000 x 1, checked", put("images/a.png", WIDE),
     CHECK.format("data.json", "llm"), "70000 x 1"),
    ("a picture of 70,000 x 1, trained on", put("images/a.png", WIDE), PRETRAIN, "70000 x 1"),
    ("a base64 cell of 70,000 x 1",
     put("mmbench_dev_20230712.tsv", CELLS.format(base64.b64encode(WIDE).decode())), BENCH,
     "70000 x 1 pixels"),
    ("a list of images that does not end", put("mmbench_dev_20230712.tsv", CELLS.format("[" * 99)),
     BENCH, "row 1 has no"),
    ("a FIFO for a picture", become("images/a.png", os.mkfifo), CHECK.format("data.json", "llm"),
     "not a file"),
    ("a FIFO for questions", become("q.jsonl", os.mkfifo), OWN, "q.jsonl"),
    ("/dev/zero for a config", become("llm/config.json", lambda p: p.symlink_to("/dev/zero")),
     PRETRAIN, "is not a file"),
    ("a .bin that unpacks to gigabytes", packed, PRETRAIN.replace("--llm llm", "--llm bin"),
     "unpacks to"),
    ("a .bin with odd keys", odd_keys, PRETRAIN.replace("--llm llm", "--llm bin"), "3 is a Tensor"),
    ("1e9 layers", change("llm/config.json", num_hidden_layers=10**9), PRETRAIN,
     "which no model has"),
    ("a list for a width", change("ckpt/config.json", vision_config={"hidden_size": [96]}), ASK,
     "hidden_size is '[96]'"),
    ("a config of null", put("llm/config.json", "null"), PRETRAIN, "is not a JSON object but null"),
    ("a config nested 100,000 deep", put("ckpt/config.json", "[" * 100_000), ASK,
     "nested too deeply"),
    ("a checkpoint's config without a field", change("ckpt/config.json", template=None), ASK,
     "has no template"),
    ("a varint without an end", put("sp/tokenizer.model", b"\x80" * 4_000_000),
     CHECK.format("data.json", "sp"), "is not a SentencePiece model"),
    ("a tokenizer larger than the embeddings", larger, PRETRAIN, "but the model embeds 547 tokens"),
    ("a header of null", put("llm/model.safetensors", header(b"null")), PRETRAIN,
     "unreadable header"),
    ("overlapping tensors", put("llm/model.safetensors", header(json.dumps({k: {
        "dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}).encode()) + bytes(4)),
        PRETRAIN,
     "wrong about"),
    ("half a character in a question", put("q.jsonl", '{"text": "\\ud800"}\n'), OWN,
     "half a character"),
    ("a question about image 7", put("q.jsonl", '{"text": "a", "image": 7}\n'), OWN, "has image 7"),
    ("the same, for MIR", put("q.jsonl", '{"text": "a", "image": 7}\n'), MIR.format("q.jsonl"),
     "has image 7"),
    ("a question longer than what the model reads", put("q.jsonl", json.dumps({"text": "[" * 9999}) + "\n"), OWN,
     "the model room for 256"),
    ("<image> in an answer", put("data.json", samples(image="a.png", conversations=MARKED)),
     FINETUNE, "in an answer"),
    ("the same, looked at", put("data.json", samples(image="a.png", conversations=MARKED)),
     SHOW_DATA, "in an answer"),
    ("a log of NULs", put("run/metrics.jsonl", b"\0" * 4096 + b"\n"), "look --run run",
     "line 1 cannot be read"),
    ("the state of another model",
     become("run/pretrain-1/optimizer.safetensors", lambda p: save_file({"0.exp_avg": torch.zeros(3)}, p)),
     RESUME, "is not what was saved"),
    *((f"{words}: a number that cannot be", None, words, says) for words, says in FLAGS),
]
# Commands that write, OUT being the place.
WRITERS = [PRETRAIN.replace("--out new", "--out OUT"), OWN.replace("--out new", "--out OUT"),
           MIR.format("data.json") + " --out OUT", "hub export ckpt OUT",
           CHECK.format("data.json", "llm") + " --out OUT",
           [*LOOK, "--out", "OUT"], [*LOOK, "--out", "new.html", "--json", "OUT"],
           "look --run run --out OUT"]
PLACES = {"inside a file": "data.json/x", "a name that is too long": "n" * 300, "a dangling link": "link/x",
          "a folder that is not there": "absent/a/x", "a folder": "images"}


def run(base: Path, what: str, spoil, command, limit: int | None = None) -> tuple[int, str]:
    """Run one row in a copy of the world. limit: bytes that a file may have, as on a full disk."""
    case = Path(tempfile.mkdtemp(dir=base.parent))
    shutil.copytree(base, case, copy_function=os.link, dirs_exist_ok=True)
    if spoil is not None:
        spoil(case)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    started = fuzz.start(command, case.with_suffix(".err"), case)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    code, said, seconds, _ = fuzz.wait(started)
    shown = command if isinstance(command, str) else " ".join(command)
    problem = fuzz.problem(code, said, seconds)
    assert problem is None, f"{what}: {shown}: {problem}\n{said}"
    print(f"{what}\n    {shown}\n    {said.strip() or 'exit code 0'}", flush=True)
    shutil.rmtree(case)
    return code, said


def put_out(command, place: str):
    words = command if isinstance(command, list) else command.split()
    return [place if word == "OUT" else word for word in words]


def every_row(base: Path) -> None:
    """Spoiled files, and numbers that cannot be."""
    for what, spoil, command, says in ROWS:
        code, said = run(base, what, spoil, command)
        assert says is None or (code == 2 and says in said), f"{what}: {said}"


def every_place(base: Path) -> None:
    """--out where nothing can be written, of every command; a file there is not touched."""
    before = (base / "data.json").read_bytes()
    for what, place in PLACES.items():
        for command in WRITERS:
            may = what == "a folder that is not there" or (what == "a folder" and command == WRITERS[1])
            code, _ = run(base, f"--out is {what}",
                          lambda case: (case / "link").symlink_to("gone"),
                          put_out(command, place))
            assert code == 2 or may, f"{command} wrote to {what}"
    assert (base / "data.json").read_bytes() == before


def read_only(base: Path) -> None:
    """--out in a read-only folder, of every command. Root may write everywhere: for it a disk is mounted so."""
    closed = base.parent / "closed"
    closed.mkdir(mode=0o555)
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=4k", "tmpfs", str(closed)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        if os.geteuid() == 0 and not mounted:
            print("read-only folders are not tried: root may write to them, and nothing can be mounted here")
            return
        for command in WRITERS:
            code, _ = run(base, "--out is in a read-only folder", None, put_out(command, str(closed / "x")))
            assert code == 2, f"{command} wrote to a read-only folder"
    finally:
        if mounted:
            subprocess.run(["umount", str(closed)], check=True)


def full_disk(base: Path) -> None:
    """No file may grow beyond 400 bytes."""
    for command in WRITERS:
        run(base, "a full disk", None, put_out(command, "place"), limit=400)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="refusals-"))
    try:
        fuzz.build(folder / "base")
        for rows in (every_row, every_place, read_only, full_disk):
            if not sys.argv[1:] or rows.__name__ in sys.argv[1:]:
                rows(folder / "base")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
