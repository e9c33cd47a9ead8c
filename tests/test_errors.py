"""Bad input, as typed by a user: one clear line, exit code 2, no traceback, nothing written over."""
import io
import json
import shutil
import sys

import pytest
from conftest import ROOT, call, launch, shell
from PIL import Image

from common.flags import run


def refuses(done, *says):
    """Check that a program ended with exit code 2 and one line, which says all of this."""
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for text in says:
        assert text in lines[0]


@pytest.mark.parametrize("script, arguments, says", [
    ("train.py", "--los ce", ["unrecognized arguments: --los", "did you mean --loss?"]),
    ("train.py", "--loss vosta", ["--loss", "'vosta'", "ce"]),
    ("train.py", "--max-steps many", ["--max-steps", "invalid int value: 'many'"]),
    ("train.py", "--global-batch 7 --micro-batch 2", ["7 is not divisible by 1 ranks × --micro-batch 2"]),
    ("train.py", "--lr 0.1", ["--lr, --epochs and --unlock-… belong to one stage"]),
    ("train.py", "--data x.json", ["--data belongs to one stage"]),
    ("train.py", "--stage pretrain --data absent.json", ["absent.json does not exist"]),
    ("train.py", "--vision absent", ["there is no folder absent"]),
    ("train.py", "--vision openai/clip-vit-large-patch14-336", ["nothing is downloaded", "huggingface-cli download"]),
    ("train.py", "--llm toy/clip", ["toy/clip/config.json", "supported are llama"]),
    ("train.py", "--vision tests", ["tests/config.json does not exist; the folder holds: adapters.py"]),
    ("train.py", "--stage pretrain --projector x", ["--projector is the start of --stage finetune"]),
    ("train.py", "--stage finetune --projector absent", ["absent does not exist"]),
    ("train.py", "--stage finetune", ["give --projector", "--projector random"]),
    ("train.py", "--resume --overwrite", ["give one of the two"]),
    ("train.py", "--out tests", ["tests is not empty", "adapters.py", "another --out"]),
    ("train.py", "--out tests --resume", ["tests holds no run"]),
    ("train.py", "--device cuda", ["no CUDA device here"]),
    ("evaluate.py", "--ckpt absent", ["absent does not exist"]),
    ("evaluate.py", "--ckpt toy/llm", ["toy/llm is not a checkpoint of a run"]),
    ("evaluate.py", "--image absent.png --prompt x", ["absent.png does not exist"]),
    ("train.py", "--llm=", ["--llm is empty"]),
    ("mir.py", "--ckpt=", ["--ckpt is empty"]),
    ("evaluate.py", "--batch-size 0", ["--batch-size must be 1 or more"]),
    ("mir.py", "--ckpt absent", ["absent does not exist"]),
    ("mir.py", "--cpkt x", ["did you mean --ckpt?"]),
])
def test_a_wrong_command_line_is_one_line(script, arguments, says, tmp_path):
    out = [] if "--out" in arguments or script != "train.py" else ["--out", str(tmp_path / "run")]
    refuses(call(script, *arguments.split(), *out), *says)
    assert not (tmp_path / "run").exists(), "something was written before the command line was understood"


# --------------------------------------------------------------------------------------------- data
@pytest.fixture
def data(tmp_path):
    """A good data set of three samples, for tests to spoil."""
    samples = []
    for i in range(3):
        Image.effect_noise((40, 40), 90 + i).convert("RGB").save(tmp_path / f"{i}.png")
        samples.append({"id": f"s{i}", "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "noise"}]})
    return samples, tmp_path


def train(samples, folder, *options, out="run"):
    (folder / "data.json").write_text(samples if isinstance(samples, str) else json.dumps(samples))
    return call("train.py", "--stage", "pretrain", "--data", folder / "data.json", "--images",
                folder, "--out",
                  folder / out, "--global-batch", "2", "--max-steps", "2", "--workers", "0",
                  *options)


def test_data_that_cannot_be_used_is_one_line(data):
    samples, folder = data
    refuses(train("{", folder), "data.json is not JSON")
    refuses(train([], folder, out="2"), "non-empty list")
    refuses(train([{"id": "a"}], folder, out="3"), "sample 0 (id a) lacks conversations")
    only_questions = [{"conversations": s["conversations"][:1], "image": s["image"]}
                      for s in samples]
    refuses(train(only_questions, folder, out="4"), "no samples left")
    # A run that was refused leaves nothing that would stop the next one.
    done = train(samples, folder)
    assert done.returncode == 0, done.stderr


def test_bad_images_are_listed_with_a_count_or_left_out_and_logged(data):
    samples, folder = data
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[:len(whole) // 2])
    (folder / "2.png").unlink()
    refuses(train(samples, folder), "2 images cannot be used", "1.png: ", "truncated",
            "2.png: missing", "--skip-bad-images")
    done = train(samples, folder, "--skip-bad-images")
    assert done.returncode == 0, done.stderr
    assert "2 left out for 2 bad images" in done.stdout
    listed = (folder / "run" / "bad_images.txt").read_text().splitlines()
    assert len(listed) == 2 and "1.png" in listed[0] and "2.png" in listed[1]
    (folder / "0.png").write_bytes(b"")
    refuses(train(samples, folder, "--skip-bad-images", out="2"), "no samples left")


def test_an_image_that_is_broken_inside_is_named_when_it_is_decoded(data):
    """Its two ends are whole, so the check before training does not find it."""
    samples, folder = data
    whole = bytearray((folder / "1.png").read_bytes())
    whole[len(whole) // 2:len(whole) // 2 + 40] = b"\0" * 40
    (folder / "1.png").write_bytes(whole)
    done = train(samples, folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "1.png" in done.stderr.splitlines()[-1]
    done = train(samples, folder, "--skip-bad-images", out="2")
    assert done.returncode == 0 and "1.png" in (folder / "2" / "bad_images.txt").read_text()


def test_check_counts_the_samples_that_a_run_cannot_use(data):
    samples, folder = data
    (folder / "data.json").write_text(json.dumps(samples))
    done = call("hub", "check", folder / "data.json", "--images", folder, "--out",
                folder / "bad.txt")
    assert done.returncode == 0 and not done.stderr and (folder / "bad.txt").read_text() == ""
    text = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:700])
    (folder / "folder").mkdir()
    spoiled = [*samples, *(dict(samples[0], image=n)
                           for n in ("no.png", "no.png", "cut.png", "folder")),
               {"conversations": text}, {"id": "x"}, {"conversations": text[:1]},
               dict(samples[0], image=["a", "b"]),
               {"conversations": [{"from": "human", "value": "Why? " * 90}, text[1]]}]
    (folder / "data.json").write_text(json.dumps(spoiled))
    check = ["hub", "check", folder / "data.json", "--images", folder]
    done = call(*check, "--llm", ROOT / "toy" / "llm", "--template", "v1", "--max-length", "300",
                "--image-tokens", "9", "--out", folder / "list.txt")
    refuses(done, "8 of 12 samples of", "the first is sample 3, which has image no.png: missing",
            "list.txt lists them")
    rows = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
    assert {k: int(v) for k, v in rows.items()} == {
        "samples": 12, "with an image": 7, "text alone": 3, "malformed": 2, "without an answer": 1,
        "image missing": 2, "image corrupt": 1, "image unreadable": 1,
        "no answer within 300 positions": 1, "usable": 4}
    listed = (folder / "list.txt").read_text().splitlines()
    assert [int(line.split()[1]) for line in listed] == [3, 4, 5, 6, 8, 9, 10, 11]
    assert listed[4] == "sample 8 lacks conversations, a list of {from, value} turns"
    (folder / "no.png").write_bytes((folder / "0.png").read_bytes())
    # images are checked anew each time
    refuses(call(*check), "5 of 12 samples", "--out FILE lists them")


def test_a_wrong_command_line_of_check_is_one_line(data):
    samples, folder = data
    (folder / "data.json").write_text(json.dumps(samples))
    good = [folder / "data.json", "--images", folder]
    for arguments, says in [([], "say python -m hub check FILE"),
                            ([folder / "x.json"], "x.json cannot be read"),
                            (["--images", folder, folder / "data.json"], "unrecognized arguments"),
                            (good[:1], "names images: say with --images"),
                            ([*good[:2], folder / "x"], "x is not a folder"),
                            ([*good, "--out", folder / "x" / "y"],
                             "x is no folder, or is read-only"),
                            ([*good, "--llm", ROOT / "toy" / "llm", "--template", "gemma"],
                             "which template gemma needs")]:
        refuses(call("hub", "check", *arguments), says)


def test_a_broken_file_ends_a_run_of_several_ranks_with_one_reason(data):
    samples, folder = data
    (folder / "data.json").write_text(json.dumps(samples)[:-9])
    done = launch("train.py", "--stage", "pretrain", "--data", folder / "data.json", "--images",
                  folder, "--out", folder / "run", "--global-batch", "2", ranks=2)
    said = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode and said and all("data.json is not JSON" in line for line in said[:1]), done.stderr
    assert not (folder / "run").exists()


def test_a_run_is_never_written_over(data):
    samples, folder = data
    assert train(samples, folder).returncode == 0
    before = {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()}
    refuses(train(samples, folder), "is not empty", "--resume continues", "--overwrite")
    refuses(train(samples, folder, "--resume", "--seed", "2"), "was started with --seed 1 (now 2)")
    assert before == {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()}


def test_a_run_that_saved_nothing_can_be_replaced_and_one_with_a_checkpoint_cannot(data):
    samples, folder = data
    assert train(samples, folder).returncode == 0
    refuses(train(samples, folder, "--overwrite"), "--overwrite replaces a run that has saved no "
                                                   "checkpoint")
    # what a crash before the first checkpoint leaves
    shutil.rmtree(folder / "run" / "pretrain-2")
    done = train(samples, folder, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_a_global_batch_larger_than_the_data_is_a_warning_that_counts_the_fillers(data):
    samples, folder = data
    done = train(samples, folder, "--global-batch", "8")
    assert done.returncode == 0 and "5 of its 8 places hold fillers" in done.stdout, done.stdout


def test_a_checkpoint_of_another_stage_or_cut_off_is_refused(data):
    samples, folder = data
    assert train(samples, folder).returncode == 0
    done = train(samples, folder, "--stage", "finetune", "--projector", folder / "run", out="2")
    assert done.returncode == 0, done.stderr
    refuses(train(samples, folder, "--stage", "finetune", "--projector", folder / "2", out="3"),
            "finetune-2 is a finetune checkpoint; --projector takes a pretrain checkpoint")
    path = folder / "2" / "finetune-2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refuses(call("evaluate.py", "--ckpt", folder / "2", "--image", folder / "0.png", "--prompt",
                 "What?"),
            "model.safetensors is cut off")


def test_a_cut_off_state_and_a_vision_folder_of_two_models_are_named(data):
    samples, folder = data
    assert train(samples, folder, "--save-every", "1").returncode == 0
    ckpt = folder / "run" / "pretrain-2"
    config = json.loads((ckpt / "config.json").read_text())
    (ckpt / "config.json").write_text(json.dumps({**config,
                                                  "steps": 4}))  # as if killed half-way
    state = ckpt / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:500])
    refuses(train(samples, folder, "--save-every", "1", "--resume"),
            "pretrain-2/optimizer.safetensors is cut off", "no older checkpoint")
    vision = folder / "vision"
    shutil.copytree(ROOT / "toy" / "clip", vision)
    processor = json.loads((vision / "preprocessor_config.json").read_text())
    (vision / "preprocessor_config.json").write_text(json.dumps({**processor, "crop_size": 32}))
    refuses(train(samples, folder, "--vision", vision, out="2"),
            "images of 32 pixels, but config.json wants 48")
    del processor["size"]
    (vision / "preprocessor_config.json").write_text(json.dumps(processor))
    refuses(train(samples, folder, "--vision", vision, out="2"),
            "preprocessor_config.json lacks size")


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "mir.py"])
def test_help_lists_every_flag_and_its_meaning(script):
    done = call(script, "--help")
    assert done.returncode == 0 and "--device" in done.stdout and not done.stderr
    assert "None" not in done.stdout, "a help text shows a default of None: say what unset means"


@pytest.mark.parametrize("script", ["model.py", "losses.py", "data.py"])
def test_a_file_that_is_no_program_says_where_to_go(script):
    done = launch(script)
    said = (done.stdout + done.stderr).splitlines()
    assert done.returncode != 0 and len(said) == 1, f"python {script} printed {said}, exit code {done.returncode}"
    assert "python " in said[0], f"python {script} names no command to run instead: {said[0]}"


def test_a_terminal_that_cannot_show_a_character_does_not_end_a_command(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    run(lambda: print("micro-batch 24 × up to 73 positions"))
    assert written.getvalue() == b"micro-batch 24 ? up to 73 positions\n"


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_stream_that_the_shell_closed_does_not_end_a_command(name, monkeypatch):
    monkeypatch.setattr(sys, name, None)                # as after >&-
    ran = []

    def main():
        print("a line")
        print("another", file=sys.stderr)
        ran.append(sys.stdin.read() if name == "stdin" else "")
    run(main)
    assert ran == [""]


def test_a_flag_that_is_not_utf8_is_refused_in_one_line():
    refuses(call("evaluate.py", "--prompt", "what \udcff"), "'what \\udcff' is not UTF-8 text")


def test_started_from_a_shell_it_is_the_same_line_and_exit_code():
    refuses(shell("train.py", "--loss", "vosta"), "'vosta'")


@pytest.mark.parametrize("command, flag",
                         [("inspect DIR", "--help"), ("check FILE", "--max-length"),
                                           ("export CKPT OUT", "--vision")])
def test_every_command_of_hub_explains_itself(command, flag):
    done = call("hub", command.split()[0], "--help")
    assert done.returncode == 0 and not done.stderr
    assert f"python -m hub {command} [flags]" in done.stdout and flag in done.stdout
    assert f"python -m hub {command.split()[0]}" in call("hub", "--help").stdout
