"""A file of samples and its index: the same samples as json.load gives, and never those of another file."""
import base64
import copy
import io
import itertools
import json
import os
import pickle
import re
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from programs import ROOT, call

from common.flags import UserError
from data import Format, ImageProcessor, Order, Samples, loader
from hub import check
from hub.check import image_problem, image_problems
from hub.configs import load_processor
from hub.samples import SampleFile, elements, image_key, read_samples


def sample(i, text="What is this?", answer="noise", **more):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": f"s{i}", **more, "conversations": turns}


NASTY = ['"', "\\", "\\\\\"", "}]", "[{", ", ", "\n\r\t", "é", "漢字", "😀", "\u2028", "\x7f",
         "\\u0041", "/", ""]
SAMPLES = [sample(i, a + "x" + b, b + a, score=[1, -0.5, 1e9, None, True, {"a": {}}])
           for i, (a, b) in
           enumerate((a, b) for a in NASTY for b in NASTY[::3])]
FORMS = {"compact": dict(separators=(",", ":")), "plain": {}, "pretty": dict(indent=2),
         "tabs": dict(indent="\t"), "not escaped": dict(ensure_ascii=False),
         "not escaped, pretty": dict(ensure_ascii=False, indent=1)}


def place_of(path):
    return path.with_name(f".{path.name}.index")


def found_in(raw: bytes, block: int) -> list:
    """Return the values that `elements` finds. Each must be what its bytes alone say."""
    out = []
    with io.FileIO(os.memfd_create("json"), "w+") as f:
        f.write(raw)
        f.seek(0)
        for start, size, value in elements(f, Path("x.json"), block):
            assert json.loads(raw[start:start + size]) == value
            out.append(value)
    return out


# ------------------------------------------------------------------------------------------ reading
@pytest.mark.parametrize("form", FORMS)
def test_every_sample_is_the_one_that_json_load_gives(form, tmp_path):
    path = tmp_path / "data.json"
    for raw in [(text := json.dumps(SAMPLES, **FORMS[form])).encode(),
                text.replace("\n", "\r\n").encode(), b"\xef\xbb\xbf" + text.encode(),
                f" \n\t{text}\r\n ".encode()]:
        path.write_bytes(raw)
        samples, without = read_samples(path)
        assert [samples[i] for i in range(len(samples))] == json.loads(raw.decode("utf-8-sig")) and without == 0


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_it_does_not_matter_where_a_block_ends(block):
    for form in FORMS.values():
        some = SAMPLES[::9] + [1.5e+300, -0.25, 1e-7, 10, True, None, "a", [], {}]
        assert found_in(json.dumps(some, **form).encode(), block) == some
    assert found_in(b" [ ] ", block) == []


@pytest.mark.parametrize("text, byte", [
    ("[1,]", 3), ("[,1]", 1), ("[1 2]", 3), ("[1]]", 3), ("[1] x", 4), ("[1,,2]", 3), ('["a\nb"]', 3), ('["\\x"]', 2),
    ("[tru]", 1), ("['a']", 1), ('[{"a" 1}]', 6), ("[{a:1}]", 2), ('["é", nul]', 7), ("[01]", 2),
    ('["é\\ud"]', 5), ("", 0), (" ", 1), ("[", 1), ('["a', 1), ("[1", 2), ("[1,", 3), ("nul", 0)])
def test_what_is_not_json_is_refused_with_its_byte(text, byte):
    with pytest.raises(ValueError):
        json.loads(text)
    for block in (1, 3, 4096):
        with pytest.raises(UserError,
                           match=rf"^x\.json is not JSON \(.*: byte {byte} of {len(text.encode())}\)"):
            found_in(text.encode(), block)


def test_a_file_that_is_cut_off_anywhere_is_refused():
    raw = json.dumps(SAMPLES[100:103], ensure_ascii=False).encode()
    for end in range(len(raw)):
        with pytest.raises(UserError, match="not JSON"):
            found_in(raw[:end], 64)


def test_bytes_that_are_not_utf8_are_refused_with_their_place():
    for block in (1, 3, 4096):
        with pytest.raises(UserError, match="not UTF-8, .*: byte 7 of 10"):
            found_in('["é",'.encode() + b'"\xff"]', block)


def test_a_jsonl_file_may_have_blank_lines_and_any_line_ends(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [json.dumps(s, ensure_ascii=i % 2 == 0) for i, s in enumerate(SAMPLES)]
    for text in ["\n".join(rows), "\n\n".join(rows) + "\n\n", "\r\n".join(rows),
                 "\ufeff" + "\n".join(rows)]:
        path.write_bytes(text.encode())
        samples, _ = read_samples(path)
        assert [samples[i] for i in range(len(samples))] == SAMPLES
    path.write_text("\n".join([*rows[:3], "", rows[3][:-1]]))
    with pytest.raises(UserError, match="data.jsonl line 5: not JSON"):
        read_samples(path)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="non-empty list"):
        read_samples(path)


def test_half_a_character_is_refused(tmp_path):
    """No tokenizer takes it. Without this check, the run
    would end in the step that reaches this sample."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample(0, "😀"), sample(1, "a \ud83d b")]))
    with pytest.raises(UserError, match=r"sample 1 \(id s1\) has half a character"):
        read_samples(path)


# ---------------------------------------------------------------------------------------- the index
def test_the_index_knows_lengths_images_and_answers_of_all_samples(tmp_path):
    path = tmp_path / "data.json"
    samples = [sample(0, "<image>\nWhy?", image="a/é.jpg"), sample(1, "漢字"),
               {**sample(2), "conversations": [
        {"from": "gpt", "value": "So."}, {"from": "human", "value": "Why?"}]}, sample(3, "", ""),
        sample(4, "<image>", image="a/é.jpg"), sample(5, "<image>", image="b.jpg")]
    path.write_text(json.dumps(samples))
    file, without = read_samples(path)
    assert without == 1 and file.numbers.tolist() == [0, 1, 3, 4, 5], "sample 2 has a question at its end, no answer"
    assert file.lengths().tolist() == [17, -7, -1, 12, 12], "characters; text alone is negative, also without any"
    assert file.column("image").tolist() == [*map(image_key, ["a/é.jpg"]), 0, 0,
                                             *map(image_key, ["a/é.jpg", "b.jpg"])]
    assert file.with_image(["a/é.jpg", "c.jpg"]).tolist() == [True, False, False, True, False]
    assert not file.with_image([]).any()
    file.keep(~file.with_image(["a/é.jpg"]))
    assert [file[i]["id"] for i in range(len(file))] == ["s1", "s3", "s5"], "numbers are those of the samples kept"


def test_an_index_is_made_once_and_anew_when_the_file_changes(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(SAMPLES[:9]))
    read_samples(path)
    first = place_of(path).stat()
    read_samples(path)
    assert place_of(path).stat() == first, "the file was read again although it is as it was"
    path.write_text(json.dumps(SAMPLES[8::-1]))                  # as many bytes
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert read_samples(path)[0][0] == SAMPLES[8]
    before = path.stat().st_mtime_ns
    path.write_text(json.dumps(SAMPLES[20:30]))                  # another size, the same time
    os.utime(path, ns=(before, before))
    assert read_samples(path)[0][0] == SAMPLES[20]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".data.json.index", "data.json"], "something was left behind"


@pytest.mark.parametrize("spoil", [
    lambda raw: raw[:-1], lambda raw: raw[:20], lambda raw: b"", lambda raw: raw + b"\0" * 8,
    lambda raw: b"{}" * 500, lambda raw: b"samples0" + raw[8:],
    lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:], lambda raw: raw[:28]])
def test_a_damaged_index_or_one_of_another_version_is_replaced(spoil, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(SAMPLES))
    read_samples(path)
    good = place_of(path).read_bytes()
    place_of(path).write_bytes(spoil(good))
    samples, _ = read_samples(path)
    assert [samples[i] for i in range(len(samples))] == SAMPLES
    assert place_of(path).read_bytes() == good


def test_a_file_that_is_refused_leaves_nothing(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(SAMPLES)[:-5])
    with pytest.raises(UserError):
        read_samples(path)
    assert [p.name for p in tmp_path.iterdir()] == ["data.json"]


def test_the_index_of_a_folder_that_cannot_be_written_is_in_the_cache(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(SAMPLES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with open(path) as f:
        # nobody, not even root, can write beside it
        locked = Path(f"/proc/self/fd/{f.fileno()}")
        for _ in range(2):
            assert read_samples(locked)[0][7] == SAMPLES[7]
        assert len(list((tmp_path / "cache" / "nanoalign").glob("*.index"))) == 1 and not place_of(path).exists()
        (tmp_path / "none").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
        with pytest.raises(UserError, match="neither beside it nor in .*none.*set XDG_CACHE_HOME"):
            read_samples(locked)


def test_a_file_that_changes_in_use_is_an_error(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(SAMPLES))
    samples, _ = read_samples(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="data.json changed after it was opened"):
        samples[3]


@pytest.mark.parametrize("name, says",
                         [("absent.json", "cannot be read: No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, says):
    with pytest.raises(UserError, match=says):
        read_samples(tmp_path / name)


def test_an_open_file_takes_few_bytes_a_sample(tmp_path):
    """A dict takes about 2,000. Few bytes let 8 ranks
    open 2 million samples (bench/data.py measures it)."""
    path, n = tmp_path / "data.json", 20_000
    path.write_text(json.dumps([sample(i) for i in range(n)]))
    read_samples(path)
    # do not count what NumPy loads on first use
    Order(8, 4, 1, 1, np.ones(8)).epoch(0)
    tracemalloc.start()
    samples, _ = read_samples(path)
    kept, opening = tracemalloc.get_traced_memory()
    Order(n, 128, 1, 1, samples.lengths()).epoch(0)
    sampling = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept < 8 * n and opening < 32 * n and sampling < 40 * n, [v / n for v in (kept, opening, sampling)]


# ------------------------------------------------------------------------------------------- in use
@pytest.fixture
def data(tmp_path, llama_tokenizer) -> Samples:
    samples = []
    for i in range(10):
        Image.effect_noise((20, 20), 90 + i).convert("RGB").save(tmp_path / f"{i}.png")
        samples.append(sample(i, "<image>\nWhat is this?", "a cat " * (i % 4 + 1),
                              image=f"{i}.png"))
    samples += [sample(i, "Why?", "a mat " * (i % 5 + 1)) for i in range(10, 17)]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    file, _ = read_samples(tmp_path / "data.json")
    file.keep(np.arange(17) != 4)
    return Samples(file, tmp_path, llama_tokenizer, ImageProcessor(16, 16),
                   Format("v1", 4, 2048, pad=True))


def batches(data, workers, n=12, start=None):
    made = loader(data, Order(len(data), 4, 2, 1, data.samples.lengths()), workers)
    made.multiprocessing_context = start if workers else None
    it = iter(made)
    return [next(it) for _ in range(n)]


@pytest.mark.parametrize("workers, start", [(2, "fork"), (1, "spawn")])
def test_workers_give_the_same_batches_as_none(data, workers, start):
    for a, b in zip(batches(data, 0), batches(data, workers, start=start)):
        assert a.ids == b.ids and "s4" not in a.ids
        assert all(torch.equal(vars(a)[k], vars(b)[k])
                   for k in vars(a) if torch.is_tensor(vars(a)[k]))


def test_a_copy_for_another_process_is_small_and_reads_the_same(data):
    raw = pickle.dumps(data.samples)
    assert len(raw) < 1000, "the index went with it instead of being mapped there"
    for other in (pickle.loads(raw), copy.copy(data.samples)):
        assert [other[i] for i in range(len(other))] == [data.samples[i] for i in range(len(data))]
        assert isinstance(other.entries, np.memmap)


def test_many_can_read_at_the_same_time(data):
    """Threads share a file's position, as forked processes do."""
    numbers = list(range(len(data))) * 60
    with ThreadPoolExecutor(8) as pool:
        for i, s in zip(numbers, pool.map(data.samples.__getitem__, numbers)):
            assert s["id"] == f"s{i + (i >= 4)}"


def test_each_image_is_checked_once_and_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    # more pixels than Pillow agrees to decode
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    names = ["good.png", "empty.png", "absent.png", "empty.png", "folder", "bomb.png", "a\0b.png"]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample(i, "<image>", image=n) for i, n in enumerate(names)]
                               + [sample(7)]))
    found = image_problems(SampleFile(path), tmp_path)
    assert list(found) == ["empty.png", "absent.png", "folder", "bomb.png", "a\0b.png"]
    assert found["absent.png"] == "missing" and found["empty.png"] == "empty file" and "null" in found["a\0b.png"]
    assert "decompression bomb" in found["bomb.png"] and found["folder"] == "not a file"


def test_images_on_a_slow_disk_are_checked_by_several_threads(tmp_path, monkeypatch):
    path, threads, clock = tmp_path / "data.json", set(), itertools.count(0, 10)
    path.write_text(json.dumps([sample(i, "<image>", image=f"{i}.png") for i in range(5000)]))

    def look(file):
        threads.add(threading.get_ident())
        return image_problem(file)
    monkeypatch.setattr(check, "image_problem", look)
    monkeypatch.setattr(check, "time", SimpleNamespace(perf_counter=lambda: next(clock)))       # 10 s for each part
    found = image_problems(SampleFile(path), tmp_path)
    assert list(found) == [f"{i}.png" for i in range(5000)] and set(found.values()) == {"missing"}
    assert len(threads) > 1, "the second part waits for one file at a time"


def test_a_page_shows_samples_as_training_gets_them(small_world, tmp_path):
    page = tmp_path / "page.html"
    done = call("hub", "check", small_world / "pretrain.json", "--images", small_world / "images", "--vision",
                "toy/clip", "--llm", "toy/llm", "--template", "plain", "--show", "2", "--vdep", "--out", page)
    assert done.returncode == 0, done.stderr
    shown = page.read_text().split("<section")[1:]
    assert ["VDEP mode" in s for s in shown] == [False, True, False, True]
    samples = json.loads((small_world / "pretrain.json").read_text())
    caption = samples[0]["conversations"][1]["value"]
    supervised = re.findall(r'<bdi class="token answer">(.*?)</bdi>', shown[0])
    assert "".join(supervised).strip("↵ ") == caption, "the green boxes are the caption, its newline included"
    assert "9 image tokens" in shown[1] and "0 supervised" in shown[1] and "token answer" not in shown[1]

    # The picture is the file as preprocessing leaves it.
    uri = re.search(r"base64,([^\"]+)", shown[0])[1]
    seen = Image.open(io.BytesIO(base64.b64decode(uri)))
    processor = load_processor(ROOT / "toy/clip")
    with Image.open(small_world / "images" / samples[0]["image"]) as image:
        pixels = processor(image, pad=False)
    assert seen.size == (processor.crop_size, processor.crop_size)
    again = processor(seen, pad=False)
    assert (again - pixels).abs().max() < 0.01


def test_a_page_of_text_that_looks_like_html_shows_it_as_text(tmp_path):
    path, page = tmp_path / "data.json", tmp_path / "page.html"
    path.write_text(json.dumps([sample("<b>", "<script>alert(1)</script>", "</bdi>")]))
    done = call("hub", "check", path, "--vision", "toy/clip", "--llm", "toy/llm", "--show", "5", "--out", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "<script" not in text and "s&lt;b&gt;" in text
    assert call("hub", "check", path, "--show", "5").stderr.startswith("error: --show needs --llm DIR")


@pytest.mark.parametrize("runs", [[1], [3], [8], [8, 3, 1], [1, 3, 8]])
def test_an_epoch_shows_every_sample_once_also_when_it_goes_on_with_other_ranks(runs):
    n, batch, micro = 2003, 48, 2
    lengths = np.random.default_rng(0).integers(1, 99, n, np.int32) * np.random.default_rng(1).choice([1, -1], n)
    steps = -(-n // batch)
    assert steps == Order(n, batch, micro, 1, lengths).steps_per_epoch == len(Order(n, batch, 1, 1, lengths).epoch(0))
    cuts = [steps * k // len(runs) for k in range(len(runs) + 1)]
    seen = []
    for ranks, first, last in zip(runs, cuts, cuts[1:]):
        for rank in range(ranks):
            order = iter(Order(n, batch, micro, 1, lengths, rank, ranks, start=first))
            seen += [i for _ in range((last - first) * (batch // micro // ranks))
                     for i in next(order)]
    assert sorted(i for i in seen if i >= 0) == list(range(n)) and len(seen) == steps * batch
