"""Tokenizers: the ids of sentencepiece, spaces after special tokens, offsets, which file is read, what is refused.

make_tokenizer_fixtures.py made the models and the expected
ids in fixtures/tokenizers with sentencepiece itself."""
import json
import shutil
import struct
import time

import make_tokenizer_fixtures as fixtures
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from common.flags import UserError
from common.text import encode_text
from hub.tokenizer import load_tokenizer, read_message


@pytest.mark.parametrize("text, ids", [
    ("US", [3148]),                                    # SentencePiece puts a space in front
    ("</s>US", [2, 3308]),                             # and transformers 4.31 takes it off again after a special token
    ("</s>\n", [2, 13]), ("</s></s>US", [2, 2, 3308]), ("US</s>", [3148, 2]), ("", []), ("</s>", [2]),
    ("</s> A", [2, 29871, 319]),                       # a real space stays, and so does the one put in front of it
    ("</s>猫", [2, 234, 143, 174]),                    # bytes of a character that the vocabulary lacks
])
def test_a_space_in_front_is_cut_off_after_a_special_token_only(llama_tokenizer, text, ids):
    assert encode_text(llama_tokenizer, text)[0] == ids


@pytest.mark.parametrize("text",
                         ["US</s>US: What", "猫 </s>猫s a cat", " A  A\n</s>\n\nWhat</s></s>s"])
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


# ------------------------------------------------------------------------------------ SentencePiece
def pieces_of(name: str) -> list[str]:
    """Return the pieces of a fixture's model that stand for text."""
    data = (fixtures.FOLDER / name / "tokenizer.model").read_bytes()
    pieces = [{3: 1, **dict(read_message(value))}
              for number, value in read_message(data) if number == 1]
    return [p[1].decode() for p in pieces if p[3] in (1, 4)]


@pytest.mark.parametrize("name", fixtures.STRINGS)
def test_ids_and_decoding_are_those_of_sentencepiece(name):
    tokenizer, stored = load_tokenizer(fixtures.FOLDER / name), fixtures.load(name)
    strings = fixtures.fuzz_strings(fixtures.STRINGS[name], 3, pieces_of(name))
    assert fixtures.checksum(strings) == stored["crc"], "these are not the strings that the fixture was made from"
    ids = [e.ids for e in tokenizer.encode_batch(strings, add_special_tokens=False)]
    wrong = [s for s, ours, theirs in zip(strings, ids, fixtures.rows(stored), strict=True)
             if ours != theirs]
    assert not wrong, f"{len(wrong)} of {len(strings)}, such as {wrong[0][:80]!r}"
    decodes = np.unpackbits(stored["decodes"])[:len(strings)].astype(bool)
    assert [tokenizer.decode(i) == s for i, s in zip(ids, strings)] == decodes.tolist()
    assert decodes.mean() > .95                            # all but those with a literal "▁"


@pytest.mark.parametrize("rule", ["4.31", "4.37", "legacy"])
def test_each_rule_after_special_tokens_is_that_of_the_slow_tokenizers(rule):
    tokenizer, stored = load_tokenizer(fixtures.FOLDER / "llama"), fixtures.load("llama")
    strings = fixtures.special_strings(fixtures.SPECIAL_STRINGS, 4, pieces_of("llama"))
    assert fixtures.checksum(strings) == stored["special_crc"]
    for text, expected in zip(strings, fixtures.rows(stored, rule), strict=True):
        ids, offsets = encode_text(tokenizer, text, rule)
        assert ids == expected, repr(text)
        assert len(ids) == len(offsets)
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(offsets, offsets[1:])), repr(text)
        assert {c for start, end in offsets for c in range(start, end)} == set(range(len(text))), repr(text)


def test_the_rules_differ_where_they_should():
    stored = fixtures.load("llama")
    old, new, legacy = (fixtures.rows(stored, rule) for rule in ("4.31", "4.37", "legacy"))
    assert min(sum(a != b for a, b in zip(*pair)) for pair in ((old, new), (old, legacy), (new, legacy))) > 300


@pytest.mark.parametrize("rule, ids",
                         [("4.31", [2, 3308, 1001]), ("4.37", [2, 11889]),
                          ("legacy", [2, 3148, 1001])])
def test_the_next_round_of_llava_under_each_rule(llama_tokenizer, rule, ids):
    tokenizer = Tokenizer.from_str(llama_tokenizer.to_str())
    vocab = tokenizer.get_vocab()                          # with "USER" 11889 as Llama has it
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"] = {**{p: i for p, i in vocab.items() if i != 11889}, "USER": 11889}
    state["model"]["merges"].append(["US", "ER"])
    tokenizer = Tokenizer.from_str(json.dumps(state))
    assert encode_text(tokenizer, "</s>USER", rule)[0] == ids
    assert encode_text(tokenizer, "USER", rule)[0] == [3148, 1001]


@pytest.mark.parametrize("rule", ["4.31", "4.37", "legacy"])
def test_no_rule_touches_a_tokenizer_that_puts_no_space_in_front(rule):
    tokenizer = load_tokenizer(fixtures.FOLDER / "gemma")
    for text in ["<eos>US <eos> a", "a<eos>", "<eos><eos>ab  ra", ""]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        assert encode_text(tokenizer, text, rule) == (encoding.ids, encoding.offsets)


def test_a_token_behind_the_vocabulary_keeps_its_id_under_each_rule(tmp_path):
    folder = shutil.copytree(fixtures.FOLDER / "llama", tmp_path / "llm")
    (folder / "added_tokens.json").write_text('{"<pad>": 1413, "<image>": 1412}')
    tokenizer = load_tokenizer(folder)
    for rule in ("4.31", "4.37", "legacy"):
        ids = encode_text(tokenizer, "a</s>b<image>c<pad>", rule)[0]
        assert [i for i in ids if i in (2, 1412, 1413)] == [2, 1412, 1413]
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True},
        "1412": {"content": "<image>", "special": True, "rstrip": True}}}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<image>  <pad>").ids == [1412, 1413]
    assert tokenizer.decode([1412, 1413]) == "<pad>"
    (folder / "added_tokens.json").write_text('{"<pad>": 32000}')
    with pytest.raises(UserError,
                       match="added token '<pad>' has number 32000, but .* would be 1413"):
        load_tokenizer(folder)


def field(number: int, value: bytes) -> bytes:
    """Return a protobuf field of bytes."""
    size = len(value)
    return bytes([8 * number + 2]) + (bytes([size]) if size < 128 else bytes([size % 128 + 128, size // 128])) + value


def small_model(texts: list[str], normalizer: bytes = b"\x18\x01\x20\0") -> bytes:
    """Return a BPE model of <unk> and these pieces, best first, without byte pieces. The default
    normalizer puts a space in front and removes none."""
    pieces = [b"\x0a\x05<unk>\x15\0\0\0\0\x18\x02"] + [
        fixtures.message(1, t.encode()) + b"\x15" + struct.pack("<f", -i)
        for i, t in enumerate(texts)]
    return b"".join(field(1, p) for p in pieces) + field(2, b"\x18\x02") + field(3, normalizer)


def test_characters_in_a_row_that_no_piece_has_are_one_unknown_piece(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(small_model(["a", "b", "▁", "ab", "▁a"]))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("猫猫a猫 ab").ids == [3, 0, 1, 0, 3, 4]          # as sentencepiece
    assert encode_text(tokenizer, "猫猫a猫 ab", "4.37") == encode_text(tokenizer, "猫猫a猫 ab", "legacy")


def test_special_pieces_are_left_out_of_decoded_text_and_user_defined_ones_are_not():
    tokenizer = load_tokenizer(fixtures.FOLDER / "gemma")
    assert tokenizer.decode(tokenizer.encode("<bos>sea<eos> a<table>").ids) == "sea a<table>"


def test_a_token_that_is_looked_for_in_normalized_text_is_found_after_a_special_token(llama_tokenizer):
    tokenizer = Tokenizer.from_str(llama_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("猫s", normalized=True)])
    ids, offsets = encode_text(tokenizer, "s</s>s猫s", "4.37")
    assert (ids[-1], offsets[-1]) == (tokenizer.token_to_id("猫s"), (6, 8))


def test_a_vocabulary_as_large_as_llamas_is_converted_in_a_second(tmp_path):
    chance, texts = fixtures.Chance(5), dict.fromkeys("abcdefghijklmnopqrstuvwxyz▁")
    letters = list(texts)
    while len(texts) < 31999:
        grown = list(texts)
        new = (chance.pick(grown) + chance.pick(letters if chance.below(2) else grown)
               for _ in range(4000))
        texts.update(dict.fromkeys(t for t in new if len(t) <= 12))
    (tmp_path / "tokenizer.model").write_bytes(small_model(list(texts)[:31999]))
    start = time.perf_counter()
    tokenizer = load_tokenizer(tmp_path)
    seconds = time.perf_counter() - start
    print(f"32,000 pieces, {len(json.loads(tokenizer.to_str())['model']['merges'])} merges: {seconds:.2f} s")
    assert tokenizer.get_vocab_size() == 32000
    assert seconds < 3


# -------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("config, expected", [
    (None, "model"), ({"model_type": "llama"}, "model"), ({"model_type": "mistral"}, "model"),
    ({"model_type": "llava"}, "model"), ({"model_type": "nanoalign"}, "model"),
    ({"model_type": "gemma"}, "json"),
    ({"model_type": "phi3"}, "json"),
    ({"model_type": "llava", "text_config": {"model_type": "gemma"}}, "json"),
    ({"model_type": "nanoalign", "text_config": {"model_type": "llama"}}, "model"), ({}, "json")])
def test_llamas_family_prefers_tokenizer_model(tmp_path, config, expected):
    shutil.copy(fixtures.FOLDER / "llama" / "tokenizer.model", tmp_path)
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).get_vocab_size() == {"model": 1412, "json": 1}[expected]
    # what there is is read, whatever the model
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).get_vocab_size() == 1412


def test_what_is_loaded_can_be_saved_as_tokenizer_json(tmp_path):
    for name in fixtures.STRINGS:
        tokenizer = load_tokenizer(fixtures.FOLDER / name)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        again = load_tokenizer(tmp_path)
        for text in fixtures.fuzz_strings(200, 6, ["▁a", "th"]) + ["a</s>b<eos>c"]:
            assert again.encode(text).ids == tokenizer.encode(text).ids
            assert encode_text(again, text, "4.37") == encode_text(tokenizer, text, "4.37")


def gpt2_folder(folder):
    """Write a small tokenizer in GPT-2's files: "Ġ" stands for a space."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "hell"), ("Ġ", "Ġ")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges),
              "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}),
                                       encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n",
                                       encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"\t\t": 263, "    ": 262}))
    return folder


def test_gpt2_files(tmp_path):
    tokenizer = load_tokenizer(gpt2_folder(tmp_path))
    assert tokenizer.get_vocab_size() == 264
    for text, tokens in [("hello hello", ["hell", "o", "Ġhell", "o"]), (" hell", ["Ġhell"]),
                         ("", []),
                         ("hell<|endoftext|>hell", ["hell", "<|endoftext|>", "hell"]), ("é", ["Ã", "©"]),
                         ("a     hell", ["a", "    ", "Ġhell"]), ("\t\t\n", ["\t\t", "Ċ"])]:
        for rule in ("4.31", "4.37", "legacy"):
            ids, offsets = encode_text(tokenizer, text, rule)
            assert [tokenizer.id_to_token(i) for i in ids] == tokens
            assert {c for start, end in offsets for c in range(start, end)} == set(range(len(text)))
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for name in ("vocab.json", "merges.txt"):               # a byte order mark changes nothing
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()
    (tmp_path / "merges.txt").write_text("#version: 0.2\nq z\n")
    with pytest.raises(UserError, match="vocab.json with merges.txt is not a tokenizer "
                                        ".*download it again"):
        load_tokenizer(tmp_path)


# what happens to the bytes of a whole model → the message
BREAKS = {
    "unigram": (lambda b: b + field(2, b"\x18\x01"), "is not a BPE model .*tokenizer.json in "
                                                     "its place"),
    "charsmap": (lambda b: b + field(3, b"\x12\x03abc"), "changes characters by a table "
                                                         ".*tokenizer.json in"),
    "nothing said of spaces": (lambda b: small_model(["a", "▁"], b"\x18\x01"),
                               "removes extra spaces"),
    "strips": (lambda b: b + field(3, b"\x20\x01"), "removes extra spaces"),
    "suffix": (lambda b: b + field(2, b"\xc0\x01\x01"), "writes spaces in another way"),
    "no escape": (lambda b: b + field(3, b"\x28\0"), "writes spaces in another way"),
    "user-defined": (lambda b: b + field(1, b"\x0a\x02zz\x18\x04"),
                     "both user-defined symbols and a space"),
    "cut in a piece": (lambda b: b[:len(b) // 2], r"is cut off \(\d+ bytes\): download it again"),
    "cut in a number": (lambda b: b[:next(i for i in range(5000, 6000) if b[i:i + 1] == b"\x0a") + 1], "is cut off"),
    "cut after a piece": (lambda b: b[:2 + b[1]], "is cut off"),
    "cut in what follows": (lambda b: b + b"\x2a\x64abc", "is cut off"),
    "damaged": (lambda b: b[:5000] + b"\xff" * 20 + b[5020:], "is not a SentencePiece "
                                                              "model|is cut off"),
    "a field of no known kind": (lambda b: b[:2 + b[1]] + b"\x0f" + b[2 + b[1]:],
                                 "is not a SentencePiece model"),
    "cut by one byte": (lambda b: b[:-1], "is cut off"),
    "lfs": (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n",
            "git lfs pull"),
    "html": (lambda b: b"<!DOCTYPE html><html><body>Access denied</body></html>",
             "is a web page .*, not a tok"),
    "empty": (lambda b: b"", "is not a SentencePiece model"),
    "tiktoken": (lambda b: b"IQ== 0\nIg== 1\n", "is not a SentencePiece model"),
    "zeros": (lambda b: bytes(1000), "is not a SentencePiece model"),
    "newlines": (lambda b: b"\n" * 1000, "is not a SentencePiece model"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_model_that_cannot_be_converted_is_refused(tmp_path, name):
    change, message = BREAKS[name]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(change((fixtures.FOLDER / "llama" / "tokenizer.model").read_bytes()))
    with pytest.raises(UserError, match=message) as e:
        load_tokenizer(tmp_path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_every_cut_of_a_model_is_refused(tmp_path):
    data = (fixtures.FOLDER / "llama" / "tokenizer.model").read_bytes()
    for size in [*range(0, len(data), 97), *range(len(data) - 40, len(data))]:
        (tmp_path / "tokenizer.model").write_bytes(data[:size])
        with pytest.raises(UserError, match="cut off|is not a SentencePiece model"):
            load_tokenizer(tmp_path)


def test_a_pointer_in_place_of_tokenizer_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid "
                                             "sha256:0\nsize 1842\n")
    with pytest.raises(UserError,
                       match=r"tokenizer.json is a git-lfs pointer \(\d+ bytes\), not a tokenizer: run git"):
        load_tokenizer(tmp_path)
