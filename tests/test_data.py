"""data.py: text → ids and labels, images → pixels, samples → batches, the order of samples."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models

from common.flags import UserError
from common.templates import LLAMA_2_SYSTEM, SYSTEM, TEMPLATES
from data import Format, ImageProcessor, Order, Samples, collate, encode, eos_id, pieces
from hub.check import image_problem
from hub.configs import load_processor
from hub.samples import read_samples

IMG = -200                                             # LLaVA's own mark of an image position
SYSTEM_IDS = [1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450,
              20255, 4076, 8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915,
              29879, 5155, 29889]


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def ids_of(conversations, tokenizer, template="v1", image_tokens=1, **options):
    """Return (ids with −200 at image positions, supervised ids, labels)."""
    ids, labels, mask = encode(conversations, tokenizer, template, image_tokens, **options)
    assert len(ids) == len(labels) == len(mask)
    shown = torch.where(mask, IMG, ids)
    assert ((labels == -100) | (labels == ids)).all(), "a label differs from the id at its own position"
    assert (labels[mask] == -100).all(), "an image position is supervised"
    return shown.tolist(), labels[labels != -100].tolist(), labels.tolist()


# ----------------------------------------------------------------------------------- ids and labels
def test_one_round_gives_llavas_ids_and_supervises_the_answer_and_its_end_token(llama_tokenizer):
    ids, supervised, labels = ids_of([human("<image>\nWhat is this?"), gpt("A cat.")],
                                     llama_tokenizer)
    assert ids == SYSTEM_IDS + [3148, 1001, 29901, 29871, IMG, 29871, 13, 5618, 338, 445, 29973,
                                319, 1799, 9047, 13566, 29901, 319, 6635, 29889, 2]
    assert len(ids) == 51
    assert [i for i, label in enumerate(labels) if label != -100] == [47, 48, 49, 50]
    assert supervised == [319, 6635, 29889, 2]


@pytest.mark.parametrize("rule, user",
                         [("4.31", [3308, 1001]), ("4.37", [11889]), ("legacy", [3148, 1001])])
def test_later_rounds_follow_the_version_of_transformers(llama_tokenizer, rule, user):
    ids, supervised, _ = ids_of([human("<image>\nWhat is this?"), gpt("A cat."), human("Why?"),
                                 gpt("Because."), human("What is this?"), gpt("A mat")],
                                 llama_tokenizer, after_special=rule)
    middle = [29901, 3750, 29973, 319, 1799, 9047, 13566, 29901, 7311, 29889, 2]
    after_first_end = ids[ids.index(2) + 1:]
    assert after_first_end[:2 * len(user) + len(middle)] == user + middle + user
    assert supervised == [319, 6635, 29889, 2, 7311, 29889, 2, 319, 1775, 2]


def test_plain_template_is_the_image_and_the_caption_with_its_newline_and_no_end_token(llama_tokenizer):
    ids, supervised, labels = ids_of([human("Describe.\n<image>"), gpt("a cat on a mat")],
                                     llama_tokenizer, "plain")
    assert ids == [1, IMG, 263, 6635, 373, 263, 1775, 13]
    assert labels == [-100, -100, 263, 6635, 373, 263, 1775, 13]


@pytest.mark.parametrize("text",
                         ["<image>\nWhat is this?", "What is this?\n<image>",
                          "What <image>is this?"])
def test_the_image_mark_moves_to_the_front_of_its_turn(llama_tokenizer, text):
    first = ids_of([human("<image>\nWhat is this?"), gpt("A cat.")], llama_tokenizer)
    assert ids_of([human(text), gpt("A cat.")], llama_tokenizer) == first


def test_an_image_may_come_in_a_later_turn(llama_tokenizer):
    ids, supervised, _ = ids_of([human("Why?"), gpt("Because."), human("What is this?\n<image>"),
                                 gpt("A cat.")],
                                llama_tokenizer, image_tokens=3)
    assert ids.count(IMG) == 3 and ids.index(IMG) > ids.index(2)
    assert supervised == [7311, 29889, 2, 319, 6635, 29889, 2]


def test_text_alone_has_no_image_position(llama_tokenizer):
    ids, supervised, _ = ids_of([human("Why?"), gpt("Because.")], llama_tokenizer)
    assert ids == SYSTEM_IDS + [3148, 1001, 29901, 3750, 29973, 319, 1799, 9047, 13566, 29901, 7311,
                                29889, 2]
    assert supervised == [7311, 29889, 2]


def test_an_empty_answer_still_teaches_to_end(llama_tokenizer):
    _, supervised, _ = ids_of([human("Why?"), gpt("")], llama_tokenizer)
    assert supervised == [29871, 2]                    # the space before the answer, and its end


def test_an_answer_may_contain_the_end_token(llama_tokenizer):
    """LLaVA's own code loses this sample to "tokenization mismatch"."""
    _, supervised, _ = ids_of([human("Why?"), gpt("Because.</s> A cat."), human("Why?"), gpt("A mat")], llama_tokenizer)
    assert supervised == [7311, 29889, 2, 29871, 319, 6635, 29889, 2, 319, 1775, 2]


def test_a_leading_answer_is_dropped_and_a_trailing_question_is_left_open(llama_tokenizer):
    ids, supervised, _ = ids_of([gpt("A mat"), human("Why?"), gpt("Because."), human("What is this?")], llama_tokenizer)
    assert supervised == [7311, 29889, 2]
    assert ids[-5:] == [319, 1799, 9047, 13566, 29901], "a prompt must end in ASSISTANT:, where the answer starts"


def test_long_conversations_are_cut_in_their_text(llama_tokenizer):
    turns = [human("<image>\nWhat is this?"), gpt("A cat.")] + [human("Why?"), gpt("a cat on a mat " * 25)] * 60
    whole = ids_of(turns, llama_tokenizer, image_tokens=576)
    assert len(whole[0]) > 5000
    cut = ids_of(turns, llama_tokenizer, image_tokens=576, max_length=2048)
    assert cut[0] == whole[0][:2048] and cut[2] == whole[2][:2048]
    assert cut[0].count(IMG) == 576


def test_an_image_is_kept_whole_or_left_out(llama_tokenizer):
    """An image that does not fit is left out with all that follows it. The text before it remains."""
    turns = [human("Why?"), gpt("a cat on a mat " * 100), human("<image>\nWhat is this?"),
             gpt("A cat.")]
    at = ids_of(turns, llama_tokenizer, image_tokens=576)[0].index(IMG)
    for limit in (at - 1, at, at + 1, at + 575):
        ids, supervised, _ = ids_of(turns, llama_tokenizer, image_tokens=576, max_length=limit)
        assert ids.count(IMG) == 0 and len(ids) == min(limit, at) and supervised
    assert ids_of(turns, llama_tokenizer, image_tokens=576, max_length=at + 576)[0].count(IMG) == 576


THREE = [human("<image>\nQ1"), gpt("A1"), human("Q2"), gpt("A2")]
S = SYSTEM
CHATML = [("qwen2", "You are a helpful assistant."),
          ("qwen2_5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
          ("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")]
LLAMA_3 = [("llama_3", ""),
           ("llama_3_1", "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
                             "December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>")]


@pytest.mark.parametrize("template, text, supervised", [
    ("plain", "<image>A1\nA2\n", ["A1\n", "A2\n"]),
    ("v1", f"{S} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
     [" A1</s>", " A2</s>"]),
    ("phi", f"{S} USER: <image>\nQ1 ASSISTANT: A1<|endoftext|>USER: Q2 ASSISTANT: A2<|endoftext|>",
     [" A1<|endoftext|>", " A2<|endoftext|>"]),
    ("gemma", f"{S} USER: <image>\nQ1 ASSISTANT: A1<eos>USER: Q2 ASSISTANT: A2<eos>",
     [" A1<eos>", " A2<eos>"]),
    ("llama_2", f"[INST] <<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s>"
     "<s>[INST] Q2 [/INST] A2 </s>",
     [" A1 </s>", " A2 </s>"]),
    ("mistral", "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST] A2 </s>",
     [" A1 </s>", " A2 </s>"]),
    ("phi3", "<|user|>\n<image>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>",
     ["A1<|end|>", "A2<|end|>"]),
    *[(name, f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<image>\nQ1<|im_end|>\n"
       "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
       ["A1<|im_end|>", "A2<|im_end|>"]) for name, system in CHATML],
    *[(name, f"{system}<|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|>"
       "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
       "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
       "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>",
       ["A1<|eot_id|>", "A2<|eot_id|>"]) for name, system in LLAMA_3],
])
def test_each_template_writes_a_conversation_as_its_family_does(template, text, supervised):
    parts = pieces(THREE, template)
    assert "".join(p for p, _ in parts) == text
    assert [p for p, target in parts if target] == supervised


def test_every_template_has_an_example():
    assert set(TEMPLATES) == {"plain", "v1", "phi", "gemma", "llama_2", "mistral", "phi3", "qwen2",
                              "qwen2_5", "smollm2", "llama_3", "llama_3_1"}


def test_llama_3_trims_a_turn_and_chatml_does_not():
    turns = [human(" Q\n"), gpt("\nA ")]
    assert [text.split("\n\n")[-1] for text, target in pieces(turns, "llama_3") if target] == ["A<|eot_id|>"]
    assert "user<|end_header_id|>\n\nQ<|eot_id|>" in pieces(turns, "llama_3")[0][0]
    assert pieces(turns, "qwen2")[1][0] == "\nA <|im_end|>" and "user\n Q\n<|im_end|>" in pieces(turns, "qwen2")[0][0]


def test_braces_in_a_text_stay_as_they_are(llama_tokenizer):
    (first, _), (second, _) = pieces([human("{system} {text}"), gpt("{text} {0}")], "v1")
    assert first == f"{S} USER: {{system}} {{text}} ASSISTANT:" and second == " {text} {0}</s>"


def test_a_template_of_another_family_is_refused(llama_tokenizer):
    assert eos_id(llama_tokenizer, "v1") == 2 and eos_id(llama_tokenizer, "plain") == 13
    with pytest.raises(UserError, match="no '<eos>', which template gemma needs"):
        eos_id(llama_tokenizer, "gemma")


def test_a_family_without_a_begin_token_gets_none():
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate("ab \n")}, []))
    ids, labels, mask = encode([human("<image>"), gpt("ab")], tokenizer, "plain", 2)
    assert ids.tolist() == [0, 0, 0, 1, 3] and mask.tolist() == [True, True, False, False, False]


# ------------------------------------------------------------------------------------------- images
def test_crop_keeps_the_centre_and_pad_keeps_everything():
    image = Image.new("RGB", (90, 30), (255, 0, 0))
    image.paste((0, 255, 0), (30, 0, 60, 30))          # a green square in the middle of a red strip
    processor = ImageProcessor(30, 30, False, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert torch.equal(processor(image, pad=False),
                       torch.tensor([0.0, 1, 0])[:, None, None].expand(3, 30, 30))
    padded = ImageProcessor(30, 30)(image, pad=True)
    assert padded.shape == (3, 30, 30)
    assert padded[:, :7].abs().max() < 0.02, "the padding is the mean colour, which normalises to about 0"
    assert padded[0, 15, 2] > 1.5 and padded[1, 15, 15] > 1.5


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (200, 7)])
def test_every_kind_of_image_becomes_finite_pixels(mode, size):
    for pad in (False, True):
        pixels = ImageProcessor(48, 48)(Image.new(mode, size), pad)
        assert pixels.shape == (3, 48, 48) and pixels.dtype == torch.float32 and pixels.isfinite().all()


@pytest.mark.parametrize("resample", [3, 2])                # SigLIP: bicubic; SigLIP2: bilinear
def test_siglip_stretches_to_a_square_and_normalises_by_halves(resample, tmp_path):
    c = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
         "resample": resample, "image_processor_type": "SiglipImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(c))
    processor = load_processor(tmp_path)
    image = Image.effect_noise((70, 50), 80).convert("RGB")
    wanted = np.asarray(image.resize((24, 24), Image.Resampling(resample))) / 127.5 - 1
    np.testing.assert_allclose(processor(image, pad=False).permute(1, 2, 0).numpy(), wanted,
                               atol=2e-6)
    assert processor(Image.new("RGB", (30, 90)), pad=True)[:, 12, 0].abs().max() < 0.01, "padded with grey 127"


@pytest.mark.parametrize("form", [
    {"size": 336, "crop_size": 224},
    {"size": {"shortest_edge": 336}, "crop_size": {"height": 224, "width": 224}}])
def test_old_and_new_forms_of_a_preprocessor_config_are_read(form, tmp_path):
    c = {**form, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(c))
    assert load_processor(tmp_path) == ImageProcessor(336, 224, False, (0.1, 0.2, 0.3), (1, 2, 3))


def test_preprocessing_is_bicubic_on_bytes_then_normalised(tmp_path):
    """The reference is written from the description of CLIP's preprocessing."""
    image = Image.effect_noise((70, 50), 80).convert("RGB")
    small = np.asarray(image.resize((int(24 * 70 / 50), 24), Image.Resampling.BICUBIC))
    left = (small.shape[1] - 24) // 2
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    wanted = (small[:, left:left + 24] / 255 - mean) / std
    got = ImageProcessor(24, 24)(image, pad=False).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_broken_images_are_found_by_reading_their_ends(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    assert image_problem(path) is None
    whole = path.read_bytes()
    for name, content in {"cut": whole[:len(whole) // 2], "empty": b"",
                          "text": b"<html>not found</html>"}.items():
        path.write_bytes(content)
        assert image_problem(path), f"{name} passes as an image"
    assert image_problem(tmp_path / "absent.png") == "missing"


# ------------------------------------------------------------------------------------------ batches
def test_collate_pads_on_the_right_and_marks_everything(llama_tokenizer, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    samples = [{"id": "x", "image": "a.png",
                "conversations": [human("<image>\nWhy?"), gpt("A cat.")]},
               {"id": "y", "conversations": [human("Why?"), gpt("A cat.")]}]
    data = Samples(samples, tmp_path, llama_tokenizer, ImageProcessor(16, 16),
                   Format("v1", 4, 2048, pad=True))
    batch = collate([data[0], data[1], data[-1]], 16)
    lengths = [len(data[i].input_ids) for i in (0, 1, -1)]
    assert batch.attention_mask.sum(1).tolist() == lengths and batch.input_ids.shape == (3, max(lengths))
    assert (batch.labels[~batch.attention_mask] == -100).all()
    assert batch.has_image.tolist() == [True, False, False] and batch.image_mask.sum(1).tolist() == [4, 0, 0]
    assert batch.pixel_values[0].abs().sum() > 0 and batch.pixel_values[1:].abs().sum() == 0
    assert (batch.labels[2] == -100).all(), "a filler has a target"
    assert batch.ids == ["x", "y", "filler"] and batch.bad == []


def test_a_sample_whose_image_cannot_be_read_becomes_a_filler_and_is_named(llama_tokenizer, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    samples = [{"id": "x", "image": "a.png",
                "conversations": [human("<image>\nWhy?"), gpt("A cat.")]}]
    data = Samples(samples, tmp_path, llama_tokenizer, ImageProcessor(16, 16),
                   Format("v1", 4, 2048, pad=True))
    batch = collate([data[0]], 16)
    assert (batch.labels == -100).all() and batch.ids == ["x"]
    assert len(batch.bad) == 1 and "a.png" in batch.bad[0]


# -------------------------------------------------------------------------------------------- order
LENGTHS = np.random.default_rng(0).integers(5, 900, 103) * np.random.default_rng(1).choice([1, 1, -1], 103)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_an_epoch_shows_every_sample_once_on_any_number_of_ranks(ranks, lengths):
    orders = [Order(103, 12, 2, seed=3, lengths=lengths, rank=r, ranks=ranks) for r in range(ranks)]
    steps, each = orders[0].steps_per_epoch, 12 // 2 // ranks
    seen = [i for o in orders for i, batch in zip(range(steps * each), o) for i in batch]
    assert sorted(i for i in seen if i >= 0) == list(range(103))
    assert len(seen) == steps * 12, "the ranks get batches of different sizes"


def test_a_global_batch_holds_the_same_samples_however_it_is_cut():
    def step(ranks, micro, number):
        each = 12 // (ranks * micro)
        rows = []
        for r in range(ranks):
            it = iter(Order(103, 12, micro, 3, LENGTHS, r, ranks, start=number))
            rows += [i for _ in range(each) for i in next(it)]
        return sorted(rows)
    for number in (0, 5, 11, 40):                      # step 40 lies several epochs later
        assert step(1, 12, number) == step(2, 3, number) == step(6, 1, number) == step(1, 2, number)


def test_the_order_can_be_resumed_anywhere():
    whole = iter(Order(50, 8, 4, seed=1))
    batches = [next(whole) for _ in range(60)]
    for start in (1, 6, 7, 13):
        resumed = iter(Order(50, 8, 4, seed=1, start=start))
        assert [next(resumed) for _ in range(10)] == batches[2 * start:2 * start + 10]


def test_epochs_and_seeds_differ():
    assert (Order(50, 8, 1, 1).epoch(0) != Order(50, 8, 1, 1).epoch(1)).any()
    assert (Order(50, 8, 1, 1).epoch(0) != Order(50, 8, 1, 2).epoch(0)).any()


def test_batches_are_of_one_modality_and_sorted_by_length():
    batches = Order(103, 12, 1, 0, LENGTHS).epoch(0)
    mixed = 0
    for batch in batches:
        sizes = LENGTHS[batch[batch >= 0]]
        mixed += len(set(sizes > 0)) > 1
        assert (np.diff(np.abs(sizes)) <= 0).all()
    assert mixed <= 1, "only the remainders may share a batch"


# -------------------------------------------------------------------------------------------- files
GOOD = '{"id": 1, "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}'


@pytest.mark.parametrize("content, says", [
    ("", "not JSON"), ("[", "not JSON"), ("[]", "non-empty list"), ('{"a": 1}', "non-empty list"),
    ("[1]", "sample 0"),
    ('[{"id": "x"}]', "sample 0 (id x) lacks conversations"),
    (f'[{GOOD}, {{"conversations": [{{"from": "system", "value": ""}}]}}]',
     "sample 1 has a turn from 'system'"),
    ('[{"conversations": [{"from": "human"}]}]', "without a text value"),
    ('[{"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image>"}]}]',
     "one image a sample"),
    ('[{"image": "a", "conversations": [{"from": "human", "value": "<image><image>"}]}]',
     "has 2 <image> marks"),
    ('[{"image": "a", "conversations": [{"from": "human", "value": "What?"}]}]', "no <image> mark"),
    ('[{"conversations": [{"from": "human", "value": "<image>"}]}]', "no file in image"),
    ('[{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}]',
     "two turns in a row"),
])
def test_a_file_in_another_format_is_refused_with_its_first_bad_sample(tmp_path, content, says):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(UserError) as e:
        read_samples(path)
    assert says in str(e.value) and "data.json" in str(e.value) and "\n" not in str(e.value)


def test_samples_without_an_answer_are_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD + '\n{"conversations": [{"from": "human", "value": "Why?"}]}\n')
    samples, without = read_samples(path)
    assert len(samples) == 1 and without == 1
