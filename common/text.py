"""Text → ids, by the rules about spaces of released checkpoints; and ids → what people read."""
import copyreg
import re

from tokenizers import AddedToken, Tokenizer, normalizers

SPACE = "▁"                             # how SentencePiece writes a space
HIDDEN = "\ufdd0"                       # stands for the first character of a control token
RULES = ("4.31", "4.37", "legacy")      # versions of transformers, see encode_text


def bos_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the id a sequence begins with, as a list; empty for Phi-2, Qwen2 and SmolLM2."""
    for token in ("<s>", "<bos>", "<|begin_of_text|>"):
        if tokenizer.token_to_id(token) is not None:
            return [tokenizer.token_to_id(token)]
    return []


def hide_specials(tokenizer: Tokenizer, text: str, keep: str) -> str:
    """Return a text of the same length without control tokens: `encode_text` then encodes them as
    text. keep: the mark of the image, a control token of some tokenizers."""
    for token in special_tokens(tokenizer):
        if token != keep:
            text = text.replace(token, HIDDEN + token[1:])
    return text


def restore(text: str, plain: bool) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = plain
    return tokenizer


# The library's own pickling, for a spawned worker, forgets encode_special_tokens.
copyreg.pickle(Tokenizer, lambda t: (restore, (t.to_str(), t.encode_special_tokens)))


def special_tokens(tokenizer: Tokenizer) -> dict[str, AddedToken]:
    """Return the control tokens, longest first."""
    found = [token for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return {token.content: token for token in sorted(found, key=lambda token: -len(token.content))}


def encode_plain(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple], list[str]]:
    """Return ids, (start, end) characters and pieces of a text. Control tokens split it, but those
    that `hide_specials` has hidden are encoded as text."""
    specials, ids, offsets, pieces = special_tokens(tokenizer), [], [], []
    forms = []
    for content, token in specials.items():
        before = r"\s*" if token.lstrip else ""
        after = r"\s*" if token.rstrip else ""
        forms.append(before + re.escape(content) + after)
    start = 0
    for part in re.split(f"({'|'.join(forms)})", text):
        token = part.strip()
        if token in specials:
            found, places, words = [tokenizer.token_to_id(token)], [(0, len(part))], [token]
        else:
            encoding = tokenizer.encode(show_specials(tokenizer, part), add_special_tokens=False)
            found, places, words = encoding.ids, encoding.offsets, encoding.tokens
        ids += found
        offsets += [(start + first, start + end) for first, end in places]
        pieces += words
        start += len(part)
    return ids, offsets, pieces


def show_specials(tokenizer: Tokenizer, text: str) -> str:
    """Undo `hide_specials`."""
    for token in special_tokens(tokenizer):
        text = text.replace(HIDDEN + token[1:], token)
    return text


def encode_text(tokenizer: Tokenizer, text: str, after_special: str = "4.31") -> tuple[list[int], list[tuple]]:
    """Encode a text without BOS. Returns the ids and the (start, end) characters of each.

    SentencePiece models put a space in front of a text ("USER" → "▁US" "ER"). What happens to it
    after a special token depends on the model's version of transformers. "</s>USER" becomes
        4.31     "</s>" "US" "ER"     the space is cut off the first token again: LLaVA-1.5
        4.37     "</s>" "USER"        no space is added: LLaVA since February 2024
        legacy   "</s>" "▁US" "ER"    the space stays: legacy=True of either
    A real space stays in all three. Tokenizers that put no space in front are left alone. Control
    tokens are found wherever they stand, unless `hide_specials` has hidden them."""
    assert after_special in RULES
    plain = tokenizer.encode_special_tokens     # --plain-specials: those of a turn are hidden
    if plain:
        ids, offsets, words = encode_plain(tokenizer, text)
        text = show_specials(tokenizer, text)
    else:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, offsets, words = encoding.ids, encoding.offsets, encoding.tokens
    prefixed = "".join(tokenizer.encode("a", add_special_tokens=False).tokens).startswith(SPACE)
    if after_special == "legacy" or not prefixed:
        return ids, offsets

    # Tokens that split a text: those that are found before normalisation.
    tokens = list(zip(ids, offsets))
    added = tokenizer.get_added_tokens_decoder()
    splits = [n for n, (i, _) in enumerate(tokens) if i in added and not added[i].normalized]
    if splits and after_special == "4.37":
        bare = without_prefix(tokenizer)

    # Mend each stretch between two of them, the last one first: earlier tokens keep their numbers.
    stops = splits[1:] + [len(tokens)]
    for split, stop in reversed(list(zip(splits, stops))):
        if stop == split + 1:
            continue
        start = tokens[split][1][1]
        end = tokens[stop][1][0] if stop < len(tokens) else len(text)
        first = words[split + 1]
        if after_special == "4.37":
            again = bare.encode(text[start:end], add_special_tokens=False)
            places = [(start + a, start + b) for a, b in again.offsets]
            tokens[split + 1:stop] = zip(again.ids, places)
        elif first == SPACE and text[start] not in (" ", SPACE):
            del tokens[split + 1]
        elif first.startswith(SPACE) and text[start] not in (" ", SPACE):
            i = tokenizer.token_to_id(first[len(SPACE):])
            if i is None:
                i = tokenizer.token_to_id("<unk>")
            tokens[split + 1] = i, tokens[split + 1][1]
    return [i for i, _ in tokens], [offsets for _, offsets in tokens]


def without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer with the same vocabulary that puts no space in front of a text."""
    bare = Tokenizer(tokenizer.model)
    bare.normalizer = normalizers.Replace(" ", SPACE)
    bare.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
    bare.encode_special_tokens = tokenizer.encode_special_tokens
    return bare


def show_token(tokenizer: Tokenizer, i: int) -> str:
    """The text of a token and the space before it; if it cannot be shown, as in the vocabulary."""
    piece = tokenizer.id_to_token(i) or f"<{i}>"
    text = tokenizer.decode([i], skip_special_tokens=False)
    if text == "\n":
        return text
    if not text.strip() or not text.isprintable() or "\ufffd" in text:
        return piece
    return " " + text.strip() if piece.startswith(SPACE) else text


def is_word(piece: str | None) -> bool:
    """True if a piece is a space, as SentencePiece or byte-level BPE write it, then 2 letters or
    more: our proxy for BASIC's "meaningful" words. A person would not count "▁tri"."""
    return piece is not None and piece[:1] in (SPACE, "Ġ") and piece[1:].isalpha() and len(piece) > 2
