"""Tokenizers: a folder's files → `tokenizers.Tokenizer`.

Files of three kinds are read: SentencePiece's tokenizer.model (converted here, without that package), tokenizer.json,
and GPT-2's vocab.json + merges.txt.
"""
import struct
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from common.files import read_json
from common.flags import UserError
from common.text import SPACE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4       # SentencePiece's types of pieces


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises UserError if it is missing or cannot be read.

    Llama's family is read from tokenizer.model if there is one: what its tokenizer.json says about spaces depends on
    the version of transformers that wrote it. Others are read from tokenizer.json if there is one."""
    folder = Path(folder)
    names = "tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt"
    model, fast, vocab, merges = [folder / name if (folder / name).is_file() else None for name in names]
    for path in filter(None, (model, fast, vocab, merges)):
        with open(path, "rb") as f:
            if f.read(100).startswith(b"version https://git-lfs"):
                raise UserError(f"{path} is a git-lfs pointer, not a tokenizer: run git lfs pull")
    c = read_json(folder / "config.json") if (folder / "config.json").is_file() else {"model_type": "llama"}
    family = (c.get("text_config") or c).get("model_type") or c.get("model_type") or ""
    if model and (not fast or family.startswith(("llama", "mistral", "llava", "nanoalign"))):
        tokenizer = read_sentencepiece(model)
        add_extra_tokens(tokenizer, folder)
    elif fast or vocab and merges:
        try:
            tokenizer = (Tokenizer.from_file(str(fast)) if fast else
                         Tokenizer(models.BPE.from_file(str(vocab), str(merges))))
        except Exception as e:                # the library raises bare Exception
            what = fast or f"{vocab} with merges.txt"
            raise UserError(f"{what} is not a tokenizer ({e}): download it again") from None
        if not fast:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            if tokenizer.token_to_id("<|endoftext|>") is not None:      # in vocab.json, but never a piece of a text
                tokenizer.add_special_tokens(["<|endoftext|>"])
            add_extra_tokens(tokenizer, folder)
    else:
        raise UserError(f"{folder} has no tokenizer.json, tokenizer.model or vocab.json with merges.txt: copy it there "
                        "from where the weights came from")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def add_extra_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Adds the tokens that added_tokens.json and tokenizer_config.json put behind a vocabulary, in order of their ids.
    As in transformers' slow tokenizers, they are found in a text as it is written, before anything is done to it."""
    plain, config = [read_json(path) if path.is_file() else {}
                     for path in (folder / "added_tokens.json", folder / "tokenizer_config.json")]
    extra = {i: AddedToken(token, normalized=False) for token, i in plain.items()}
    for i, t in config.get("added_tokens_decoder", {}).items():
        flags = {k: t.get(k, False) for k in ("lstrip", "rstrip", "single_word", "special")}
        extra[int(i)] = AddedToken(t["content"], normalized=False, **flags)
    known = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    for i, token in sorted(extra.items()):
        if token.content not in known:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != i:
            raise UserError(f"{folder}: added token {token.content!r} has number {i}, but with this vocabulary it "
                            f"would be {tokenizer.token_to_id(token.content)}: download the files of one tokenizer")


# ------------------------------------------------------------------------------------------------ SentencePiece
def fields(data: bytes):
    """(number, value) of each field of a protobuf message: an int, or bytes. Raises IndexError where it is cut off."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
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


def read_sentencepiece(path: Path) -> Tokenizer:
    """A SentencePiece BPE model as a Tokenizer that gives the same ids. Raises UserError for what it cannot convert."""
    pieces, trainer, normalizer = [], {}, {}
    data = path.read_bytes()
    try:
        for number, value in fields(data):
            if number == 1:
                piece = {2: bytes(4), 3: NORMAL, **dict(fields(value))}
                pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]))
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(fields(value))
    except IndexError:
        normalizer = {}                                                 # cut off, see below
    except (KeyError, TypeError, ValueError, struct.error):
        pieces = []
    unknown, user = [[p for p, _, kind in pieces if kind == k] for k in (UNKNOWN, USER_DEFINED)]
    if not unknown:
        raise UserError(f"{path} is not a SentencePiece model; it starts with {data[:40]!r}: download it again")
    if not (trainer and normalizer):                                    # they follow the pieces, in this order
        raise UserError(f"{path} is cut off ({len(data)} bytes): download it again")
    prefix = bool(normalizer.get(3, True))
    for refused, what in [(trainer.get(3) != 2, "is not a BPE model (but unigram, word or char)"),
                          (normalizer.get(2), "changes characters by a table (charsmap)"),
                          (normalizer.get(4, True), "removes extra spaces"),
                          (not normalizer.get(5, True) or trainer.get(24), "writes spaces in another way than Llama's"),
                          (prefix and user, "has both user-defined symbols and a space put in front of a text")]:
        if refused:
            raise UserError(f"{path} {what}, which is not supported: use the model's tokenizer.json in its place")

    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = []
    for piece, score, kind in pieces:
        for n in range(1, len(piece)) if kind == NORMAL else ():
            if piece[:n] in vocab and piece[n:] in vocab:
                # Llama's runs of spaces all score the same: there SentencePiece prefers the longer left half
                merges.append((-score, -n, n - len(piece), piece[:n], piece[n:]))
    merges = [m[3:] for m in sorted(merges, key=lambda m: m[:3])]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown[0], fuse_unk=True,
                                     byte_fallback=bool(trainer.get(35))))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *[decoders.Strip(" ", 1, 0)][:bool(prefix)]])
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p, _, kind in pieces
                                  if kind in (UNKNOWN, CONTROL)])
    tokenizer.add_tokens([AddedToken(p, normalized=True, special=False) for p in user])
    return tokenizer
