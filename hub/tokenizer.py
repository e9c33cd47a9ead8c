"""Tokenizers: a folder's files → `tokenizers.Tokenizer`.

Three kinds of files: SentencePiece's tokenizer.model (converted here, without that package),
tokenizer.json, and GPT-2's vocab.json with merges.txt.
"""
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from common.files import check_download, read_json
from common.flags import UserError
from common.templates import FAMILY_TEMPLATE, TOKEN_TEMPLATES
from common.text import SPACE
from hub.configs import read_config

# Numbers in sentencepiece_model.proto: types of pieces, fields of trainer and normalizer.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
MODEL_TYPE, SPACE_BEHIND, BYTE_FALLBACK = 3, 24, 35
CHARSMAP, PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 2, 3, 4, 5


def load_tokenizer(folder: str | Path, plain_specials: bool | None = None, fits: bool = True) -> Tokenizer:
    """Return the tokenizer of a folder. Raises UserError if it is missing, cannot be read, or
    (fits) has ids that the model does not embed.

    plain_specials: <s>, </s> and their like in a user's text are text, else control tokens as in
    LLaVA-1.5; None: as the checkpoint was trained. Llama's family prefers tokenizer.model: what
    its tokenizer.json says about spaces depends on the version of transformers that wrote it."""
    folder = Path(folder)
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (model, fast, vocab, merges):
        if path.is_file():
            check_download(path, "a tokenizer", least=0)
    c = language_config(folder)
    family = c.get("model_type") or ""
    llama = family.startswith(("llama", "mistral", "llava", "nanoalign"))
    if model.is_file() and (llama or not fast.is_file()):
        tokenizer = read_sentencepiece(model)
        add_extra_tokens(tokenizer, folder)
    elif fast.is_file():
        try:
            tokenizer = Tokenizer.from_str(fast.read_text(encoding="utf-8-sig"))
        except Exception as e:                                  # the library raises bare Exception
            raise UserError(f"{fast} is not a tokenizer ({e}): download it again") from None
        check_patterns(tokenizer, fast)
    elif vocab.is_file() and merges.is_file():
        if family in ("qwen2", "llama") and (folder / "config.json").is_file():
            raise UserError(f"{folder} has vocab.json with merges.txt, which do not say how the "
                            f"tokenizers of {family} split a text: copy tokenizer.json there too")
        tokenizer = read_gpt2(vocab, merges)
        add_extra_tokens(tokenizer, folder)
    else:
        raise UserError(f"{folder} has no tokenizer.json, tokenizer.model or vocab.json with "
                        "merges.txt: copy it there from where the weights came from")
    # Settings that a file may leave as it likes, and whether its ids fit the embedding table.
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None          # random merges: the same text would get other ids
    if plain_specials is None:
        plain_specials = bool(c.get("plain_specials"))
    tokenizer.encode_special_tokens = plain_specials
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rows, vocabulary = c.get("vocab_size"), tokenizer.get_vocab()
    last = max(vocabulary, key=vocabulary.get, default="")
    if fits and isinstance(rows, int) and vocabulary and vocabulary[last] >= rows:
        raise UserError(f"{folder}: the tokenizer has {last[:40]!r} as {vocabulary[last]}, but the "
                        f"model embeds {rows} tokens: they are not of one model")
    return tokenizer



def language_config(folder: Path) -> dict:
    """Return the language model's part of a folder's config.json; LLaMA's if there is no file."""
    c = read_config(folder) if (folder / "config.json").is_file() else {"model_type": "llama"}
    top = {name: c.get(name) for name in ("model_type", "template", "plain_specials")}
    return {**top, **(c.get("text_config") or c)}


def family_template(folder: str | Path) -> str:
    """Return the template of config.json, else the one the language model was tuned with, or v1."""
    folder = Path(folder)
    c = language_config(folder)
    if c.get("template"):
        return c["template"]
    family = c.get("model_type")
    if family in FAMILY_TEMPLATE:
        return FAMILY_TEMPLATE[family]
    tokenizer = load_tokenizer(folder)
    files = [folder / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    chat = "".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
    for token, phrase, name in TOKEN_TEMPLATES:
        if tokenizer.token_to_id(token) is not None and phrase in chat:
            return "qwen2" if name == "smollm2" and family == "qwen2" else name
    return "v1"


def check_patterns(tokenizer: Tokenizer, path: Path) -> None:
    """Raise UserError if a text is split by a regular expression that repeats a group, such as
    (a+)+: the time that one takes can double with every character. And if words get marks, as
    CLIP's and BERT's do: tokens would have wrong places in the text."""
    for mark in ("end_of_word_suffix", "continuing_subword_prefix"):
        if getattr(tokenizer.model, mark, None):
            raise UserError(f"{path} marks words by {mark}, which no supported family does")
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer):
        state = part.__getstate__().decode() if part else ""
        for regex in re.findall(r'"Regex":"((?:[^"\\]|\\.)*)"', state):
            if re.search(r"(?<!\\)\)[*+{]", json.loads(f'"{regex}"')):
                raise UserError(f"{path} splits text by {regex[:60]}, which repeats a group and "
                                "may take for ever: it belongs to none of the supported families")


def read_gpt2(vocab: Path, merges: Path) -> Tokenizer:
    """Return the byte-level BPE of GPT-2's two files (Phi-2), with or without BOM. Raises UserError."""
    lines = merges.read_text(encoding="utf-8-sig").split("\n")
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    try:
        tokenizer = Tokenizer(models.BPE(read_json(vocab, dict), pairs))
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{vocab} with merges.txt is not a tokenizer ({e}): download it again") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id("<|endoftext|>") is not None:
        tokenizer.add_special_tokens(["<|endoftext|>"])         # in vocab.json, never in a text
    return tokenizer


def add_extra_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Add the tokens that added_tokens.json and tokenizer_config.json put behind a vocabulary, in
    order of their ids. They are found in a text before it is normalized, as in transformers."""
    files, extra = [folder / "added_tokens.json", folder / "tokenizer_config.json"], {}
    plain, config = (read_json(path, dict) if path.is_file() else {} for path in files)
    try:
        for token, i in plain.items():
            extra[int(i)] = AddedToken(token, normalized=False)
        for i, t in (config.get("added_tokens_decoder") or {}).items():
            flags = {k: t.get(k, False) for k in ("lstrip", "rstrip", "single_word", "special")}
            extra[int(i)] = AddedToken(t["content"], normalized=False, **flags)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as e:
        raise UserError(f"{folder}: added_tokens.json or tokenizer_config.json does not list "
                        f"tokens as transformers does ({e}): download them again") from None
    known = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    for i, token in sorted(extra.items()):
        if token.content not in known:
            tokenizer.add_tokens([token])
        got = tokenizer.token_to_id(token.content)
        if got != i:
            raise UserError(f"{folder}: added token {token.content!r} has number {i}, but with "
                            f"this vocabulary it would be {got}: download the files of one "
                            "tokenizer")


# ---------------------------------------------------------------------------------- SentencePiece
def read_message(data: bytes) -> Iterator[tuple]:
    """Yield (number, int or bytes) of each field of a protobuf message; IndexError if cut off."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if shift > 70:
                raise ValueError                                # of 64 bits at most
            if data[at - 1] < 128:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(data):
            raise IndexError
        yield number, data[at:at + size]
        at += size


def read_model(path: Path) -> tuple[list[tuple[str, float, int]], dict, dict]:
    """Return pieces (text, score, type), and fields of trainer and normalizer. Raises UserError."""
    data = path.read_bytes()
    pieces, trainer, normalizer = [], {}, {}
    try:
        for number, value in read_message(data):
            if number == 1:
                piece = {2: bytes(4), 3: NORMAL, **dict(read_message(value))}
                pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]))
            elif number == 2:
                trainer.update(read_message(value))
            elif number == 3:
                normalizer.update(read_message(value))
    except IndexError:
        normalizer = {}                                         # cut off: reported below
    except (AttributeError, KeyError, TypeError, ValueError, struct.error):
        pieces = []                                             # another kind of file
    if not any(kind == UNKNOWN for _, _, kind in pieces):
        raise UserError(f"{path} is not a SentencePiece model; it starts with {data[:40]!r}: "
                        "download it again")
    if not (trainer and normalizer):                            # they follow the pieces
        raise UserError(f"{path} is cut off ({len(data)} bytes): download it again")
    return pieces, trainer, normalizer


def read_sentencepiece(path: Path) -> Tokenizer:
    """Convert a SentencePiece BPE model to a Tokenizer of the same ids. Raises UserError."""
    pieces, trainer, normalizer = read_model(path)
    special = [p for p, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    user = [p for p, _, kind in pieces if kind == USER_DEFINED]
    unknown = next(p for p, _, kind in pieces if kind == UNKNOWN)
    prefix = bool(normalizer.get(PREFIX, True))                 # a space is put in front of a text
    other_spaces = not normalizer.get(ESCAPE_SPACES, True) or trainer.get(SPACE_BEHIND)
    for refused, what in [
            (trainer.get(MODEL_TYPE) != 2, "is not a BPE model (but unigram, word or char)"),
            (normalizer.get(CHARSMAP), "changes characters by a table (charsmap)"),
            (normalizer.get(REMOVE_SPACES, True), "removes extra spaces"),
            (other_spaces, "writes spaces in another way than Llama's"),
            (prefix and user, "has both user-defined symbols and a space put in front of a text")]:
        if refused:
            raise UserError(f"{path} {what}, which is not supported: use the model's "
                            "tokenizer.json in its place")

    # SentencePiece merges the pair that gives the piece with the best score. Llama's runs of spaces
    # all have the same score: of those it prefers the longer left half.
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    ranked = []
    for piece, score, kind in pieces:
        for n in range(1, len(piece)):
            left, right = piece[:n], piece[n:]
            if kind == NORMAL and left in vocab and right in vocab:
                ranked.append((-score, -len(left), -len(right), left, right))
    ranked.sort(key=lambda m: m[:3])
    merges = [m[3:] for m in ranked]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True,
                                     byte_fallback=bool(trainer.get(BYTE_FALLBACK))))
    normalize = [normalizers.Replace(" ", SPACE)]
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        normalize.insert(0, normalizers.Prepend(SPACE))
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normalize)
    tokenizer.decoder = decoders.Sequence(decode)
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in special])
    tokenizer.add_tokens([AddedToken(p, normalized=True, special=False) for p in user])
    return tokenizer
