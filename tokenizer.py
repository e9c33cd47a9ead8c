"""Tokenizers: a folder's tokenizer.json → `tokenizers.Tokenizer`, and text → ids with LLaVA's rule about spaces."""
from pathlib import Path

from tokenizers import Tokenizer

from config import UserError

SPACE = "▁"       # how SentencePiece writes a space


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises UserError if it is missing or cannot be read."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json: copy it there from where the weights came from")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:                    # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer ({e}): download it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a special token that the template needs."""
    i = tokenizer.token_to_id(token)
    if i is None:
        raise UserError(f"the tokenizer has no {token!r}, which the template needs: it is another model's tokenizer")
    return i


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text, no BOS added, and the (start, end) characters of each.

    SentencePiece models put a space in front of a text ("USER" → "▁US" "ER"), and of each piece of it that follows a
    special token. There LLaVA-1.5 was trained with transformers 4.31, which cuts that space off the first token again:
    "</s>USER" → "</s>" "US" "ER", "</s>\\n" → "</s>" "\\n" (a real space stays). Without SentencePiece nothing changes.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids, offsets = [], []
    previous = None
    for i, piece, (start, end) in zip(encoding.ids, encoding.tokens, encoding.offsets):
        if previous in special and piece.startswith(SPACE) and text[start] not in (" ", SPACE):
            rest = piece[len(SPACE):]
            previous = i
            if rest == "":
                continue
            i = tokenizer.token_to_id(rest)
            if i is None:
                i = tokenizer.token_to_id("<unk>")
        ids.append(i)
        offsets.append((start, end))
        previous = i
    return ids, offsets
