"""Write tests/fixtures/tokenizers. Run by hand: python
tests/make_tokenizer_fixtures.py (needs sentencepiece).

Two small SentencePiece models, trained on generated text, and the ids that sentencepiece gives to
generated strings:
llama: like Llama-2's (a space put in front, bytes for unknown characters, runs of spaces that all
score the same).
gemma: like Gemma's (no space in front, user-defined symbols). For text after special tokens, the
steps of transformers' slow tokenizers are repeated here on top of sentencepiece. On the same
strings, the real ones of 4.31.0 and 4.37.2 gave the same ids. The tests generate the same strings
from the same seed: random.random() is the same in every version of Python.
"""
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent / "fixtures" / "tokenizers"
STRINGS = {"llama": 6000, "gemma": 3000}
SPECIAL_STRINGS = 1500
USER_DEFINED = ["\n", "\n\n", "\n\n\n", "\t", "▁▁", "▁▁▁", "▁▁▁▁", "▁▁▁▁▁▁▁▁", "<table>",
                "</table>", "<start_of_turn>", "ab", "abra"]
ODD = [*(" " * n for n in (2, 3, 7, 16, 17, 31, 40)), "\t", "\t\t", "\n", "\n\n", "\n\n\n\n",
       "\r\n", "\r", "\0", "\x01", "\x1b[0m", "\x7f", "\x85", "\xa0", "\u200b", "\u200d", "\u2028",
       "\ufeff", "\u3000", "▁", "▁▁", "猫", "犬と猫", "漢字かな", "안녕", "😀", "👩\u200d👩\u200d👧", "🇩🇪", "👍🏽",
       "שלום", "مرحبا", "\u202eabc\u202c", "é", "e\u0301", "ﬁ", "Ａ", "½", "²", "ß", "İ", "नमस्ते",
       "\U0010ffff", "\ue000", "\ufffd", "0", "12", "1234567", "3.14", "-1", "<", ">", "unk",
       "<0x0A>", "<table>", "<tab", "</table>", "<start_of_turn>", "ababra", "abrab", "'s", "n't",
       "...", "!!!!!", "://", "A", "USER", "USER:", "ASSISTANT:", "a", "ab", "aaaa"]


class Chance:
    """What is needed of random.Random, from its random() alone."""
    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def pick(self, items):
        return items[self.below(len(items))]


def words(number: int = 700) -> list[str]:
    """Return words made of syllables. Many share a beginning or an end, so that pieces overlap."""
    chance = Chance(1)
    syllables = [a + b + c for a in ["", *"b d f g k l m n p r s t w ch sh th".split()]
                 for b in "a e i o u ea".split()
                 for c in ("", "", "n", "r", "s")]
    return ["".join(chance.pick(syllables) for _ in range(1 + chance.below(3)))
            for _ in range(number)]


def lines(number: int = 4000):
    """Yield text to train on: rare and frequent words, capitals, digits, punctuation, runs of
    spaces, other scripts."""
    chance, vocabulary = Chance(2), words()
    for _ in range(number):
        line = []
        for _ in range(4 + chance.below(12)):
            word = vocabulary[int(len(vocabulary) * chance.random() ** 3)]
            kind = chance.below(20)
            line.append({0: word.capitalize(), 1: word.upper(), 2: str(chance.below(5000)),
                         3: word + ",", 4: word + "'s", 5: " " * chance.below(5) + word, 6: "猫と犬",
                         7: "καλη", 8: "USER:", 9: "été"}.get(kind, word))
        yield " ".join(line) + chance.pick([".", "?", "!", ""])


def fuzz_strings(number: int, seed: int, pieces: list[str]) -> list[str]:
    """Return strings of words, overlapping parts of the
    model's `pieces`, odd characters and long runs."""
    chance, vocabulary = Chance(seed), words()
    pieces = [p.replace("▁", " ") for p in pieces]
    out = []
    for n in range(number):
        parts = []
        for _ in range(1 + chance.below(7)):
            kind = chance.below(10)
            if kind < 2:
                parts.append(chance.pick(vocabulary) + chance.pick(["", " "]))
            elif kind < 5:
                parts.append(chance.pick(ODD))
            # pieces joined and cut: their borders are ambiguous
            elif kind < 8:
                glued = chance.pick(pieces) + chance.pick(pieces)
                parts.append(glued[chance.below(2):len(glued) - chance.below(2)])
            elif kind == 8:
                parts.append(" " * chance.below(36))
            else:
                parts.append(chance.pick(pieces) * (1 + chance.below(3)))
        out.append("".join(parts) if n % 1000 else chance.pick([" ", "a", "ab", "猫", " a"]) * 3000)
    return out


def special_strings(number: int, seed: int, pieces: list[str]) -> list[str]:
    """Return such strings with </s> inside, sometimes at an end or twice in a row."""
    chance, parts = Chance(seed), fuzz_strings(2 * number, seed + 1, pieces)
    parts = [p if len(p) < 1000 else p[:40] for p in parts]
    out = []
    for n in range(number):
        marks = chance.pick(["</s>", "</s>", "</s></s>", "</s>\n", "</s> ", "</s>US", "</s>猫"])
        out.append(chance.pick([parts[n] + marks + parts[number + n], marks + parts[n],
                                parts[n] + marks]))
    return out


def load(name: str):
    """Return the stored arrays: "crc", "ids", "ids_lengths",
    "decodes"; for llama also the ids under each rule."""
    with np.load(FOLDER / f"{name}.npz") as f:
        return {k: f[k] for k in f.files}


def rows(stored: dict, name: str = "ids") -> list[list[int]]:
    """Return the lists of ids stored under `name`."""
    return [row.tolist() for row in np.split(stored[name],
                                             np.cumsum(stored[name + "_lengths"])[:-1])]


def checksum(strings: list[str]) -> int:
    return zlib.crc32("\ue001".join(strings).encode())


# ------------------------------------------------------------------------------------------ by hand
def message(number: int, value: bytes) -> bytes:
    """Return a protobuf field that holds fewer than 128 bytes."""
    return bytes([8 * number + 2, len(value)]) + value


def train(name: str) -> bytes:
    import sentencepiece
    out = io.BytesIO()
    options = {"llama": {"vocab_size": 1400},
               "gemma": {"vocab_size": 1100, "add_dummy_prefix": False,
                         "user_defined_symbols": USER_DEFINED, "pad_id": 0, "eos_id": 1,
                         "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>", "bos_piece": "<bos>"}}[name]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(), model_writer=out, model_type="bpe", byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=1.0, num_threads=1, minloglevel=2,
        **options)
    model = out.getvalue()
    # add the runs of spaces that Llama's model has
    if name == "llama":
        known, end = sentencepiece.SentencePieceProcessor(model_proto=model), 0
        while model[end] == 10:                             # over the pieces
            end += 2 + model[end + 1]
        runs = ["▁" * n for n in range(2, 17) if known.piece_to_id("▁" * n) == known.unk_id()]
        runs = [message(1, message(1, run.encode()) + b"\x15" + struct.pack("<f", -1e9))
                for run in runs]
        model = model[:end] + b"".join(runs) + model[end:]
    return model


def old_4_31(sp, segments: list[str]) -> list[int]:
    """Encode as transformers 4.31.0 with legacy=False:
    its _tokenize on the text between special tokens."""
    ids = []
    for n, text in enumerate(segments):
        if n:
            ids.append(sp.piece_to_id("</s>"))
        text = text.replace("▁", " ")
        pieces = sp.encode(text, out_type=str)
        if n and text and not text.startswith(" ") and pieces[0].startswith("▁"):
            pieces = ([pieces[0][1:]] if len(pieces[0]) > 1 else []) + pieces[1:]
        ids += [sp.piece_to_id(p) for p in pieces]
    return ids


def old_4_37(bare, segments: list[str]) -> list[int]:
    """Encode as transformers 4.37.2 with legacy=False: by a model that puts no space in front. The
    space is written into the text, behind a mark that is removed again. A text that begins with a
    special token gets no space."""
    ids, mark = [], len(bare.encode("<unk>"))
    for n, text in enumerate(segments):
        text = text.replace("▁", " ")
        if n:
            ids.append(bare.piece_to_id("</s>"))
        elif text:
            text = "▁" + text
        if text.startswith(("▁", " ")):
            ids += bare.encode("<unk>" + text)[mark:]
        elif text:
            ids += bare.encode(text)
    return ids


def legacy(sp, segments: list[str]) -> list[int]:
    """Encode as either version with legacy=True."""
    ids = []
    for n, text in enumerate(segments):
        ids += ([sp.piece_to_id("</s>")] if n else []) + sp.encode(text)
    return ids


def pack(name: str, ids: list[list[int]]) -> dict:
    return {name: np.array([i for row in ids for i in row], np.uint16),
            name + "_lengths": np.array([len(row) for row in ids], np.uint16)}


def main():
    import sentencepiece
    for name, number in STRINGS.items():
        model = train(name)
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        (FOLDER / name / "tokenizer.model").write_bytes(model)
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        pieces = [p for i, p in enumerate(pieces)
                  if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))]
        strings = fuzz_strings(number, 3, pieces)
        ids = [sp.encode(s) for s in strings]
        stored = {"crc": checksum(strings),
                  "decodes": np.packbits([sp.decode(i) == s for i, s in zip(ids, strings)]),
                  **pack("ids", ids)}
        if name == "llama":
            bare = sentencepiece.SentencePieceProcessor(model_proto=model
                                                        + message(3, b"\x18\0"))  # no space in front
            strings = special_strings(SPECIAL_STRINGS, 4, pieces)
            split = [s.split("</s>") for s in strings]
            stored |= {"special_crc": checksum(strings),
                       **pack("4.31", [old_4_31(sp, s) for s in split]),
                       **pack("4.37", [old_4_37(bare, s) for s in split]),
                       **pack("legacy", [legacy(sp, s) for s in split])}
        np.savez_compressed(FOLDER / f"{name}.npz", **stored)
        print(name, sp.vocab_size(), "pieces;", len(model), "bytes;", len(ids), "strings;",
              sum(map(len, ids)), "ids;",
              (FOLDER / f"{name}.npz").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
