"""tokenizer.py: spaces after special tokens, offsets, and what is refused."""
import pytest
from tokenizers import Tokenizer, models

from config import UserError
from tokenizer import encode_text, load_tokenizer, special_id


@pytest.mark.parametrize("text, ids", [
    ("US", [3148]),                                    # SentencePiece puts a space in front
    ("</s>US", [2, 3308]),                             # and transformers 4.31 takes it off again after a special token
    ("</s>\n", [2, 13]), ("</s></s>US", [2, 2, 3308]), ("US</s>", [3148, 2]), ("", []), ("</s>", [2]),
    ("</s> A", [2, 29871, 319]),                       # a real space stays, and so does the one put in front of it
    ("</s>猫", [2, 234, 143, 174]),                    # bytes of a character that the vocabulary lacks
])
def test_a_space_in_front_is_cut_off_after_a_special_token_only(llama_tokenizer, text, ids):
    assert encode_text(llama_tokenizer, text)[0] == ids


@pytest.mark.parametrize("text", ["US</s>US: What", "猫 </s>猫s a cat", " A  A\n</s>\n\nWhat</s></s>s"])
def test_offsets_cover_the_text_in_order(llama_tokenizer, text):
    ids, offsets = encode_text(llama_tokenizer, text)
    assert len(ids) == len(offsets)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(offsets, offsets[1:]))
    assert {c for start, end in offsets for c in range(start, end)} == set(range(len(text)))


def test_a_tokenizer_without_sentencepiece_is_left_alone():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "▁": 2}, []))
    tokenizer.add_special_tokens(["</s>"])
    assert encode_text(tokenizer, "a</s>b▁")[0] == [0, 3, 1, 2]


def test_missing_and_broken_tokenizers_are_named(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model')
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no '</s>', which the template needs"):
        special_id(Tokenizer(models.BPE({"a": 0}, [])), "</s>")
