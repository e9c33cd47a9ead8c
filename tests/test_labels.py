"""From a conversation to ids, labels and masks: what a reader can check by eye, with the toy's tokenizer."""
from pathlib import Path

import torch
from tokenizers import Tokenizer

from data import Batch, encode, pieces

HERE = Path(__file__).resolve().parent
PLACES = (HERE / "tokenizer.json", HERE.parent / "toy/llm/tokenizer.json")
TOKENIZER = Tokenizer.from_file(str(next(p for p in PLACES if p.exists())))
SAID = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "Two."}]


def test_plain_is_the_image_and_the_caption():
    assert pieces(SAID, "plain") == [("<image>", False), ("Two.\n", True)]


def test_vicuna_asks_and_answers():
    text = "".join(piece for piece, _ in pieces(SAID, "v1"))
    assert text.startswith("A chat between") and text.endswith(" USER: <image>\nWhat is it? ASSISTANT: Two.</s>")
    assert [piece for piece, answer in pieces(SAID, "v1") if answer] == [" Two.</s>"]


def test_every_label_is_the_id_at_its_place_and_the_answer_with_its_end_is_labelled():
    ids, labels, mask = encode(SAID, TOKENIZER, "v1", 3)
    assert len(ids) == len(labels) == len(mask) and mask.sum() == 3
    supervised = labels != -100
    assert torch.equal(ids[supervised], labels[supervised]) and not (supervised & mask).any()
    assert TOKENIZER.decode(labels[supervised].tolist(), skip_special_tokens=False).replace(" ", "") == "Two.</s>"


def test_an_image_that_does_not_fit_is_left_out_whole():
    whole = encode(SAID, TOKENIZER, "plain", 3)[0]
    assert len(whole) > 4
    assert encode(SAID, TOKENIZER, "plain", 3, max_length=4)[2].tolist() == [False, True, True, True]
    assert encode(SAID, TOKENIZER, "plain", 3, max_length=3)[2].tolist() == [False]


def test_answers_see_the_image_only_after_it():
    image, label = torch.tensor([[0, 0, 1, 0, 0, 0]]).bool(), torch.tensor([[5, -100, -100, 5, -100, 5]])
    there = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    batch = Batch(label, label, image, there, torch.zeros(1), image[:, 2], image[:, 0])
    assert batch.text_after_image().tolist() == [[False, False, False, True, True, False]]
    assert batch.answer_tokens().tolist() == [[False, False, False, True, False, False]]
