"""Nothing is lost and nothing is wrong in silence: the promises of docs/errors.md about files, data and weights."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, STEPS, call, command, launch, losses_of, same, start, tensors_of
from PIL import Image
from safetensors.torch import load_file, save_file
from test_errors import refuses

from common.files import LOCK, lock, locked, new_folder, write_text
from common.flags import UserError
from common.images import open_image, with_8_bits
from common.parallel import Ranks
from evaluation.files import picture
from hub.checkpoint import load_model
from hub.samples import SampleFile, make_index, write_index
from hub.tensors import DIGESTS, digest, is_finite
from hub.tokenizer import load_tokenizer
from training import setup
from training.folder import make_folder
from training.settings import START, TrainConfig


# ------------------------------------------------------------------------------ files of the user's
@pytest.mark.parametrize("words", [
    ["hub", "check", "FILE", "--out", "FILE"], ["mir.py", "--ckpt", "CKPT", "--out", "FILE"],
    ["look", "--run", "RUN", "--out", "FILE"],
    ["look", "--run", "RUN", "--out", "NEW", "--json", "FILE"],
    ["course", "make", "vista", "--out", "FILE"], ["course", "make", "--all", "--out", "FILE"],
    ["course", "gradescope", "vista", "--out", "FILE"],
    ["course", "grade", "vista", "RUN", "--out", "FILE.csv"],
    ["hub", "export", "CKPT", "FILE"], ["train.py", "--out", "FILE"]], ids=" ".join)
def test_no_command_writes_over_a_file_of_the_users(words, trained, tmp_path):
    run = trained["finetune"]
    names = {"FILE": tmp_path / "mine", "NEW": tmp_path / "new.html", "RUN": run,
             "CKPT": run / f"finetune-{STEPS}", "FILE.csv": tmp_path / "mine.csv"}
    for name in ("FILE", "FILE.csv"):
        names[name].write_text('[{"conversations": []}]')
    done = call(words[0], *(names.get(word, word) for word in words[1:]))
    refuses(done, "mine")
    assert all(names[n].read_text() == '[{"conversations": []}]' for n in ("FILE", "FILE.csv"))
    assert not names["NEW"].exists(), "something was written before the refusal"


def test_a_page_of_look_is_replaced_and_grades_spare_a_folder_of_their_name(trained, tmp_path):
    page = "look", "--run", trained["finetune"], "--out", tmp_path / "page.html"
    assert call(*page).returncode == 0 and call(*page).returncode == 0
    (tmp_path / "class").mkdir()
    refuses(call("course", "grade", "vista", trained["finetune"], "--out", tmp_path / "class.csv"),
            "class exists")
    assert not list((tmp_path / "class").iterdir())


def test_mir_replaces_its_file_with_overwrite_alone(trained, small_world, tmp_path):
    words = ["mir.py", "--ckpt", trained["finetune"], "--data", small_world / "val.jsonl",
             "--images", small_world / "images", "--n", 8, "--out", tmp_path / "mir.json"]
    (tmp_path / "mir.json").write_text("{}")
    refuses(call(*words), "mir.json exists already")
    assert call(*words, "--overwrite").returncode == 0
    assert json.loads((tmp_path / "mir.json").read_text())["mir"]


def test_an_evaluation_spares_results_of_others(trained, small_world, tmp_path):
    """results.json of a run, of more questions, and answers that no evaluation wrote."""
    words = ["evaluate.py", "--ckpt", trained["finetune"], "--data", small_world / "test.jsonl",
             "--images", small_world / "images", "--max-new-tokens", 2, "--out", tmp_path]
    folder = tmp_path / "test"
    folder.mkdir()
    for name in ("results.json", "pred.jsonl"):
        (folder / name).write_text('{"mir": 1}')
        refuses(call(*words), name, "is no evaluation's", "--overwrite")
        assert (folder / name).read_text() == '{"mir": 1}'
        (folder / name).unlink()
    assert call(*words, "--limit", 4).returncode == 0
    # more questions: the four answers are kept
    assert call(*words).returncode == 0
    whole = (folder / "results.json").read_bytes()
    refuses(call(*words, "--limit", 4), "results.json is of 36 questions, this is of 4",
            "--overwrite")
    assert (folder / "results.json").read_bytes() == whole
    answers = tmp_path / "answers.jsonl"
    shutil.copy(folder / "pred.jsonl", answers)
    score = ["evaluate.py", "--data", small_world / "test.jsonl", "--score-only", answers, "--out",
             tmp_path / "scored"]
    assert call(*score).returncode == 0
    answers.write_text(answers.read_text().replace("prediction\": \"", "prediction\": \"x"))
    refuses(call(*score), "another answers_crc")


def test_an_evaluation_of_stage_1_is_of_the_language_model_it_was_asked_with(trained, small_world, tmp_path):
    words = ["evaluate.py", "--ckpt", trained["pretrain"], "--data", small_world / "test.jsonl",
             "--images", small_world / "images", "--template", "v1", "--max-new-tokens", 2, "--out",
             tmp_path, "--limit", 6]
    llm = changed_llm(tmp_path)
    assert call(*words).returncode == 0
    refuses(call(*words, "--llm", llm), "another checkpoint")


def changed_llm(folder: Path) -> Path:
    """A copy of the toy's language model with one weight changed."""
    llm = shutil.copytree(ROOT / "toy" / "llm", folder / "llm")
    tensors = load_file(llm / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, llm / "model.safetensors", {"format": "pt"})
    return llm


# --------------------------------------------------------------------------------------- one writer
def test_a_second_run_into_a_folder_is_refused_and_the_first_is_whole(small_world, trained, tmp_path):
    words = command(small_world, tmp_path / "run", **{"save-every": 2})
    first = start(*words).until(lambda: (tmp_path / "run" / "finetune-2").exists())
    first.send(signal.SIGSTOP)
    second = launch(*words, "--resume")
    first.send(signal.SIGCONT)
    assert first.wait().returncode == 0
    refuses(second, "run is in use: another process writes to it")
    assert losses_of(tmp_path / "run", "finetune") == losses_of(trained["finetune"], "finetune")


HOLD = """import os, sys, time
sys.path.insert(0, sys.argv[1])
from common.files import lock
file = open(sys.argv[2], "a")
assert lock(file)
child = os.fork()                               # as a process that prepares batches: it has the open file too
if child:
    print(child, flush=True)
time.sleep(60)
"""


def test_death_releases_a_lock_also_from_processes_that_outlive_it(tmp_path):
    path = tmp_path / LOCK
    hold = subprocess.Popen([sys.executable, "-c", HOLD, ROOT, path], stdout=subprocess.PIPE,
                            text=True)
    child = int(hold.stdout.readline())
    try:
        with open(path, "a") as file:
            assert not lock(file), "two processes have one lock"
            hold.kill()
            hold.wait()
            assert lock(file), "a child keeps the lock of a dead process"
    finally:
        hold.kill()
        os.kill(child, signal.SIGKILL)


def test_two_starts_of_a_new_run_at_once_leave_one_whole_run(small_world, tmp_path):
    words = command(small_world, tmp_path / "run", steps=6)
    both = [start(*words), start(*words)]
    codes = sorted(p.wait().returncode for p in both)
    assert codes == [0, 2] and len(losses_of(tmp_path / "run", "finetune")) == 6


def test_two_evaluations_of_the_same_questions_do_not_mix(trained, small_world, tmp_path):
    words = ["evaluate.py", "--ckpt", trained["finetune"], "--data", small_world / "test.jsonl",
             "--images", small_world / "images", "--max-new-tokens", 2, "--out", tmp_path]
    first = start(*words).until(lambda: (tmp_path / "test" / "pred.rank0of1.jsonl").exists()).send(signal.SIGSTOP)
    second = launch(*words)
    assert first.send(signal.SIGCONT).wait().returncode == 0
    refuses(second, "test is in use")


@pytest.mark.parametrize("left",
                         [".run.json.tmp", ".metrics.jsonl.tmp", ".data.tmp", ".finetune-2.tmp",
                          LOCK])
def test_what_a_kill_or_a_full_disk_leaves_stops_no_run(small_world, tmp_path, left):
    out = tmp_path / "run"
    if left in (".data.tmp", ".finetune-2.tmp"):
        (out / left / "images").mkdir(parents=True)
    else:
        out.mkdir()
        (out / left).write_text("")
    done = call(*command(small_world, out, steps=1))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == [LOCK, "finetune-1", "metrics.jsonl",
                                                     "report.html", "run.json"]


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(OSError), new_folder(tmp_path / "a" / "new") as folder:
        (folder / "part").write_text("1")
        raise OSError("disk full")
    assert not list(tmp_path.rglob("new*")) and not list(tmp_path.rglob(".new*"))
    with pytest.raises(UserError), locked(tmp_path / "b" / "c"):
        raise UserError("refused")
    assert not (tmp_path / "b").exists(), "a refused run left its folder"
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        write_text(tmp_path / "x.json", "{}")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_export_replaces_what_a_killed_one_left(trained, tmp_path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "model-00001-of-00002.safetensors").write_text("half")
    done = call("hub", "export", trained["finetune"], tmp_path / "out")
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in names and not names & {LOCK, "model-00001-of-00002.safetensors"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_index_removes_what_killed_ones_left_but_not_one_being_written(tmp_path):
    path, place = tmp_path / "d.jsonl", tmp_path / ".d.jsonl.index"
    path.write_text('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n')
    dead, alive = (tmp_path / f".d.jsonl.index.{name}.tmp" for name in ("dead", "alive"))
    dead.write_text("half")
    hold = subprocess.Popen([sys.executable, "-c", HOLD, ROOT, alive], stdout=subprocess.PIPE,
                            text=True)
    child = int(hold.stdout.readline())
    try:
        write_index(path, place, make_index(path))
        assert not dead.exists() and alive.exists() and place.exists()
    finally:
        hold.kill()
        os.kill(child, signal.SIGKILL)


# ------------------------------------------------------------------------------------ the same data
@pytest.fixture
def stopped(small_world, tmp_path):
    """A run that was killed after its second checkpoint, on
    data and models of its own: (folder, command to resume)."""
    data = shutil.copytree(small_world, tmp_path / "data")
    for name in ("llm", "clip"):
        shutil.copytree(ROOT / "toy" / name, tmp_path / name)
    words = command(data, tmp_path / "run", steps=3, llm=tmp_path / "llm", vision=tmp_path / "clip",
                    **{"save-every": 1, "keep-last": 3})
    assert call(*words).returncode == 0
    shutil.rmtree(tmp_path / "run" / "finetune-3")
    return tmp_path, [*words, "--resume"]


def test_data_that_changed_since_the_start_is_refused_on_resume(stopped):
    folder, words = stopped
    path = folder / "data" / "finetune.json"
    before, text = (folder / "run" / "metrics.jsonl").read_bytes(), path.read_text()
    path.write_text(text.replace("Yes", "Not", 1))              # as many samples and bytes
    refuses(call(*words), "--resume: the --data of finetune has changed since",
            "put back what it was")
    path.write_text(json.dumps(json.loads(text)[:-1]))
    refuses(call(*words), "the --data of finetune has changed")
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before
    path.write_text(text)
    assert call(*words).returncode == 0


@pytest.mark.parametrize("flag, file",
                         [("--llm", "llm/model.safetensors"),
                          ("--vision", "clip/model.safetensors"),
                                        ("--llm", "llm/tokenizer.json"), ("--vision", "clip/config.json")])
def test_models_that_changed_since_the_start_are_refused_on_resume(stopped, flag, file):
    folder, words = stopped
    data = bytearray((folder / file).read_bytes())
    if file.endswith(".json"):
        data = data.rstrip() + b" \n\n"
    else:
        data[-1] ^= 1
    (folder / file).write_bytes(data)
    refuses(call(*words), f"--resume: {flag} has changed since")


def test_images_that_became_usable_are_other_data(stopped):
    folder, words = stopped
    image = next((folder / "data" / "images").glob("train_*.png"))
    image.write_bytes(b"")
    refuses(call(*words, "--skip-bad-images"), "was started with --skip-bad-images False")
    run_json = json.loads((folder / "run" / "run.json").read_text())
    (folder / "run" / "run.json").write_text(json.dumps({**run_json, "skip_bad_images": True}))
    for path in (folder / "run").glob("finetune-*/config.json"):
        path.write_text(path.read_text().replace('"skip_bad_images": false',
                                                 '"skip_bad_images": true'))
    refuses(call(*words, "--skip-bad-images"), "the --data of finetune has changed since")


def test_ranks_that_read_other_files_are_refused(tmp_path):
    class Two(Ranks):
        def gather(self, value):
            return [value, {"--llm": "b"}]
    ranks = Two(0, 1, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match=r"rank 1 reads another --llm than rank 0 \(b, not a\)"):
        make_folder(TrainConfig(), tmp_path, [], ranks, {"--llm": "a"})
    assert not list(tmp_path.iterdir())
    # of each checkpoint another one: between ranks alone
    for name in "ab":
        make_folder(TrainConfig(), tmp_path, [], Ranks(0, 1, None, None),
                    {"--llm": "a", START: name})
    assert json.loads((tmp_path / "run.json").read_text())["files"] == {"--llm": "a"}


def read_another_model_on_rank_1():
    if os.environ["RANK"] == "1":
        digest_of = setup.files_digest
        setup.files_digest = lambda files: digest_of(files)[::-1]


def test_a_run_of_ranks_that_read_other_files_ends_before_the_first_step(small_world, tmp_path):
    done = launch(*command(small_world, tmp_path / "run"), ranks=2,
                  set_up=read_another_model_on_rank_1)
    assert done.returncode == 2 and "reads another --vision than rank" in done.stderr, done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_index_of_another_state_of_the_data_is_not_used(tmp_path):
    path = tmp_path / "d.json"
    sample = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "Yes"}]}
    path.write_text(json.dumps([sample]))
    first = SampleFile(path).fingerprint()
    assert SampleFile(path).fingerprint() == first
    time.sleep(0.01)
    path.write_text(json.dumps([sample]).replace("Yes", "Not"))
    assert SampleFile(path).fingerprint() != first, "the text of a sample is not in the fingerprint"

    # Another text of the same length, and the time set back: the index cannot know.
    raw, stat = path.read_bytes(), path.stat()
    path.write_bytes(raw.replace(b"Not", b"Yes"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="was rewritten"):
        SampleFile(path).fingerprint()


# ------------------------------------------------------------------------------ damaged checkpoints
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_flipped_bit_is_noticed_and_an_older_checkpoint_taken(small_world, tmp_path, name):
    words = command(small_world, tmp_path / "run", steps=3, **{"save-every": 1, "keep-last": 3})
    assert call(*words).returncode == 0
    whole = losses_of(tmp_path / "run", "finetune")
    path = tmp_path / "run" / "finetune-3" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)
    if name == "model.safetensors":
        refuses(call("mir.py", "--ckpt", tmp_path / "run", "--data", small_world / "val.jsonl",
                     "--images", small_world / "images"), "finetune-3/model.safetensors: ",
                     "is not what was saved")
    done = call(*words, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"{name}: " in done.stdout and "is not what was saved" in done.stdout
    assert "finetune-3.broken; finetune continues from finetune-2" in done.stdout
    assert losses_of(tmp_path / "run", "finetune") == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_digest_is_of_the_bytes_and_finds_any_bit(dtype):
    t = torch.randn(3, 5).to(dtype)
    assert digest(t) == digest(t.clone()) == digest(t.T.contiguous().T)
    for byte in range(0, t.nbytes, 3):
        other = t.clone()
        other.view(torch.uint8).flatten()[byte] ^= 1
        assert digest(other) != digest(t)
    assert digest(torch.ones(())) and digest(torch.zeros(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite_is_found(bad, dtype):
    t = torch.randn(7, 9).to(dtype)
    assert is_finite(t) and is_finite(t[:0])
    t[3, 4] = bad
    assert not is_finite(t)


# --------------------------------------------------------------------------------- what is no model
def spoil(ckpt: Path, out: Path, change) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(ckpt, out)
    (out / DIGESTS).unlink()
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_a_checkpoint_of_nan_neither_answers_nor_exports(trained, tmp_path):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    ckpt = spoil(trained["finetune"] / f"finetune-{STEPS}", tmp_path / "finetune-1",
                 lambda tensors: tensors[name][0, 0].fill_(float("nan")))
    for words in (["evaluate.py", "--ckpt", ckpt, "--prompt", "What?"],
                  ["hub", "export", ckpt, tmp_path / "out"]):
        refuses(call(*words), name, "holds numbers that are not finite")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype",
                         [torch.int8, torch.int64, torch.bool, torch.complex64,
                          torch.float8_e4m3fn])
def test_a_tensor_that_is_not_of_floats_is_refused_by_name(trained, tmp_path, dtype):
    name = "multi_modal_projector.linear_1.weight"
    ckpt = spoil(trained["finetune"] / f"finetune-{STEPS}", tmp_path / "finetune-1",
                 lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UserError, match=f"{name} is stored in {str(dtype)[6:]}"):
        load_model(ckpt)


@pytest.mark.parametrize("change, says", [
    ({"vision_layer": 99}, "vision layer 99, which is not supported"),
    ({"vision_layer": -9}, "vision layer -9"),
    ({"vision_layer": True}, "vision_layer is 'True', not a whole number"),
    ({"vision_layer": "-2"}, "vision_layer is '-2', not a whole number"),
    ({"code_version": 2}, "has code_version 2, this nanoalign knows 1"),
    ({"code_version": "x"}, "code_version 'x'")])
def test_a_checkpoint_of_another_tower_or_of_a_newer_version_is_refused(trained, tmp_path, change, says):
    ckpt = shutil.copytree(trained["finetune"] / f"finetune-{STEPS}",
                           tmp_path / "run" / f"finetune-{STEPS}")
    config = json.loads((ckpt / "config.json").read_text())
    (ckpt / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=says):
        load_model(ckpt)


def test_a_newer_checkpoint_is_not_renamed_on_resume(small_world, tmp_path):
    words = command(small_world, tmp_path / "run", steps=2, **{"save-every": 1, "keep-last": 2})
    assert call(*words).returncode == 0
    path = tmp_path / "run" / "finetune-2" / "config.json"
    path.write_text(path.read_text().replace('"code_version": 1', '"code_version": 2'))
    refuses(call(*words, "--resume"), "finetune-2/config.json has code_version 2")
    assert path.exists()


def test_weights_that_are_not_finite_are_not_saved(small_world, tmp_path):
    refuses(call(*command(small_world, tmp_path / "run", steps=1, lr=1e39)), "step 1 of finetune",
            "holds numbers that are not finite, so it is not saved: lower --lr")
    assert not list((tmp_path / "run").glob("finetune-*"))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_length_that_leaves_no_answer_is_refused_before_the_first_step(small_world, tmp_path, stage):
    refuses(call(*command(small_world, tmp_path / "run", stage, **{"max-length": 1})),
            "--max-length 1 leaves no sample an answer to train on; an image takes")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_dropout_gives_the_same_ids_every_time(tmp_path):
    llm = shutil.copytree(ROOT / "toy" / "llm", tmp_path / "llm")
    wanted = load_tokenizer(llm).encode("Is there a red circle?").ids
    stored = json.loads((llm / "tokenizer.json").read_text())
    stored["model"]["dropout"] = 0.5
    (llm / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load_tokenizer(llm)
    assert all(tokenizer.encode("Is there a red circle?").ids == wanted for _ in range(20))
    assert json.loads(tokenizer.to_str())["model"]["dropout"] is None, "a checkpoint would store it"


# ---------------------------------------------------------------------------------- 16-bit pictures
@pytest.mark.parametrize("kind", ["png", "tif", "tif 32", "big endian"])
def test_a_16_bit_picture_keeps_its_upper_8_bits(tmp_path, kind):
    grey = (np.arange(48 * 48).reshape(48, 48) * 28).astype(np.uint16)
    pixels = {"tif 32": grey.astype(np.int32), "big endian": grey.astype(">u2")}.get(kind, grey)
    path = tmp_path / f"grey.{kind[:3] if kind != 'big endian' else 'tif'}"
    Image.fromarray(pixels).save(path)
    for image in (open_image(path), picture(path)):
        assert np.array_equal(np.asarray(image.convert("RGB")), np.stack([grey >> 8] * 3, axis=2))


def test_numbers_of_unknown_range_are_refused_and_8_bits_in_32_are_kept():
    small = np.full((4, 4), 200, np.int32)
    assert np.asarray(with_8_bits(Image.fromarray(small))).max() == 200
    for pixels, says in [(small * 1000, "more than 16 bits"), (-small, "more than 16 bits"),
                         (small.astype(np.float32), "floats of unknown range")]:
        with pytest.raises(ValueError, match=says):
            with_8_bits(Image.fromarray(pixels))


# -------------------------------------------------------------------------------------------- ranks
@pytest.mark.slow
def test_a_resumed_run_is_exact_on_the_same_ranks_and_equal_to_rounding_on_others(small_world, tmp_path):
    words = command(small_world, tmp_path / "run", steps=4, **{"save-every": 2, "keep-last": 2})
    assert launch(*words, ranks=2).returncode == 0
    whole, last = losses_of(tmp_path / "run", "finetune"), tensors_of(tmp_path / "run" / "finetune-4")
    for ranks in (2, 1):
        shutil.rmtree(tmp_path / "run" / "finetune-4")
        done = launch(*words, "--resume", ranks=ranks)
        assert done.returncode == 0, done.stderr
        now = losses_of(tmp_path / "run", "finetune")
        assert now[:2] == whole[:2], "a step before the checkpoint was run again"
        if ranks == 2:
            assert now == whole and same(tensors_of(tmp_path / "run" / "finetune-4"), last)
        else:
            assert max(abs(a - b) for a, b in zip(now, whole)) < 1e-5
