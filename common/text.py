"""Text → ids, with the rules about spaces that released checkpoints were trained with; and ids → what people read."""
from tokenizers import Tokenizer, normalizers

SPACE = "▁"                                               # how SentencePiece writes a space
RULES = ("4.31", "4.37", "legacy")                        # versions of transformers, see encode_text


def bos_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the id that a sequence begins with, as a list; empty for families without one (Phi-2, Qwen2, SmolLM2)."""
    for token in ("<s>", "<bos>", "<|begin_of_text|>"):
        if tokenizer.token_to_id(token) is not None:
            return [tokenizer.token_to_id(token)]
    return []


def encode_text(tokenizer: Tokenizer, text: str, after_special: str = "4.31") -> tuple[list[int], list[tuple]]:
    """Encode a text without BOS. Returns the ids and the (start, end) characters of each.

    SentencePiece models put a space in front of a text ("USER" → "▁US" "ER"). What happens to it in the text after a
    special token depends on the version of transformers that a model was trained with. "</s>USER" becomes
        4.31     "</s>" "US" "ER"     the space is cut off the first token again: LLaVA-1.5
        4.37     "</s>" "USER"        no space is added: LLaVA since February 2024
        legacy   "</s>" "▁US" "ER"    the space stays: legacy=True of either
    A real space stays in all three. Tokenizers that put no space in front are left alone."""
    assert after_special in RULES
    encoding = tokenizer.encode(text, add_special_tokens=False)
    prefixed = "".join(tokenizer.encode("a", add_special_tokens=False).tokens).startswith(SPACE)
    if after_special == "legacy" or not prefixed:
        return encoding.ids, encoding.offsets

    # Tokens that split a text: those that are found before normalisation.
    tokens = list(zip(encoding.ids, encoding.offsets))
    added = dict(sorted(tokenizer.get_added_tokens_decoder().items()))
    splits = [n for n, (i, _) in enumerate(tokens) if i in added and not added[i].normalized]
    if splits and after_special == "4.37":
        bare = Tokenizer(tokenizer.model)                       # shares the vocabulary, adds no space in front
        bare.normalizer = normalizers.Replace(" ", SPACE)
        bare.add_tokens(list(added.values()))

    # Mend each stretch between two of them, from the end: so the numbers of earlier tokens stay valid.
    words = encoding.tokens
    stops = splits[1:] + [len(tokens)]
    for split, stop in reversed(list(zip(splits, stops))):
        if stop == split + 1:
            continue
        start = tokens[split][1][1]
        end = tokens[stop][1][0] if stop < len(tokens) else len(text)
        first = words[split + 1]
        if after_special == "4.37":
            again = bare.encode(text[start:end], add_special_tokens=False)
            tokens[split + 1:stop] = [(i, (start + a, start + b)) for i, (a, b) in zip(again.ids, again.offsets)]
        elif first == SPACE and text[start] not in (" ", SPACE):
            del tokens[split + 1]
        elif first.startswith(SPACE) and text[start] not in (" ", SPACE):
            i = tokenizer.token_to_id(first[len(SPACE):])
            if i is None:
                i = tokenizer.token_to_id("<unk>")
            tokens[split + 1] = i, tokens[split + 1][1]
    return [i for i, _ in tokens], [offsets for _, offsets in tokens]


def show_token(tokenizer: Tokenizer, i: int) -> str:
    """The text of one token, with the space before it. What cannot be shown is spelled as in the vocabulary."""
    piece, text = tokenizer.id_to_token(i) or f"<{i}>", tokenizer.decode([i], skip_special_tokens=False)
    if text == "\n":
        return text
    if not text.strip() or not text.isprintable() or "\ufffd" in text:
        return piece
    return " " + text.strip() if piece.startswith(SPACE) else text


def is_word(piece: str | None) -> bool:
    """True if a piece of a vocabulary is a whole alphabetic word: a space, as SentencePiece or byte-level BPE write it,
    then letters, two at least. Our proxy for BASIC's "meaningful" words; a person would not count "▁tri"."""
    return piece is not None and piece[:1] in (SPACE, "Ġ") and piece[1:].isalpha() and len(piece) > 2
