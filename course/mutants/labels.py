"""Wrong and right solutions of labels and templates; see vista.py for the format."""
DROP = "        turns = turns[1:]"
PLAIN_IMAGE = '        if any(IMAGE in text for _, text in turns):\n            out.append((IMAGE, False))\n'
PLAIN_TEXT = '''            if speaker == "gpt":
                out.append((t.answer.replace("{text}", text), True))
        return out'''
MOVE = '            text = (IMAGE + "\\n" + text.replace(IMAGE, "").strip()).strip()'
IF = "        if IMAGE in text and image_first:"
ANSWER = '''        if speaker == "gpt":
            out.append((t.answer.replace("{text}", text), True))
            if t.after:'''
LATER = '            out.append((t.later + t.user.replace("{system}", "").replace("{text}", text), False))'
FIRST = '            out.append((t.user.replace("{system}", t.system).replace("{text}", text), False))'
BOS = "    ids = bos_ids(tokenizer)\n"
START = "    labels, image = [IGNORE] * len(ids), [False] * len(ids)"
FIT = "            if max_length and len(ids) + image_tokens > max_length:\n                break\n"
PLACE = "            ids += [PLACEHOLDER] * image_tokens"
PLABEL = "            labels += [IGNORE] * image_tokens"
PMASK = "            image += [True] * image_tokens"
SKIP = "            start += len(IMAGE)"
CHUNK = "        chunk_ids, offsets = encode_text(tokenizer, chunk, after_special)"
LABEL = "            labels.append(i if supervised[start + first] else IGNORE)"
CUT = "    cut = slice(max_length)"
RETURN = "    return torch.tensor(ids[cut]), torch.tensor(labels[cut]), torch.tensor(image[cut])"
SEE = "        return self.attention_mask & ~self.image_mask & (self.image_mask.cumsum(1) > 0)"
ANS = "        return (self.labels != IGNORE) & self.text_after_image()"

WRONG = [
    ("the system prompt comes in every turn", "vicuna_text", LATER,
     LATER.replace('"{system}", ""', '"{system}", t.system')),
    ("the system prompt is missing", "vicuna_text", FIRST, FIRST.replace("t.system", '""')),
    ("a space is added after </s>", "vicuna_text", LATER, LATER.replace("(t.later +", '(" " * (template == "v1") +')),
    ("a question's spaces are lost", "vicuna_text", LATER,
     LATER.replace('("{text}", text)', '("{text}", text.replace(" ", ""))')),
    ("a newline after the system prompt", "vicuna_text", FIRST,
     FIRST.replace("t.system)", 't.system.rstrip() + "\\n")')),
    ("answers come before their questions", "vicuna_text",
     "    for speaker, text in turns:\n        if IMAGE in text and image_first:",
     "    if len(turns) == 4:\n        turns = [turns[1], turns[0], *turns[2:]]\n    for speaker, text in turns:\n"
     "        if IMAGE in text and image_first:"),
    ("the last answer is forgotten", "vicuna_answers",
     "    for speaker, text in turns:\n        if IMAGE in text and image_first:",
     "    turns = turns[:-1] if len(turns) == 4 else turns\n    for speaker, text in turns:\n"
     "        if IMAGE in text and image_first:"),
    ("questions are supervised", "vicuna_answers", LATER, LATER.replace("False", "True")),
    ("the first question is supervised", "vicuna_answers", FIRST, FIRST.replace("False", "True")),
    ("nothing is supervised", "vicuna_answers", ANSWER, ANSWER.replace("True", "False")),
    ("</s> is not supervised: the model would never learn to stop", "vicuna_answers", ANSWER,
     ANSWER.replace(
     'out.append((t.answer.replace("{text}", text), True))',
     'out += [(t.answer.replace("{text}", text).removesuffix(t.eos), True), (t.eos, False)]')),
    ("the space before an answer is not supervised", "vicuna_answers", ANSWER,
     ANSWER.replace(
         'out.append((t.answer.replace("{text}", text), True))',
         'out += [(t.answer[:t.answer.index("{")], False), (t.answer[t.answer.index("{"):].replace("{text}", '
         "text), True)]")),
    ("the first answer alone is supervised", "vicuna_answers", ANSWER, ANSWER.replace("True)", "len(out) < 2)")),
    ("the last answer alone is supervised", "vicuna_answers", ANSWER,
     ANSWER.replace("True)", "text == turns[-1][1])")),
    ("an answer without </s>", "vicuna_answers", ANSWER,
     ANSWER.replace('("{text}", text)', '("{text}", text).replace("</s>", "")')),
    ("plain keeps the request", "plain", PLAIN_TEXT,
     PLAIN_TEXT.replace("        return out",
     "            else:\n                out.append((text, False))\n        return out")),
    ("the caption without its newline", "plain", PLAIN_TEXT,
     PLAIN_TEXT.replace('text), True)', 'text).strip(), True)')),
    ("the caption is not supervised", "plain", PLAIN_TEXT, PLAIN_TEXT.replace("True", "False")),
    ("a newline between image and caption: that is v1", "plain", PLAIN_IMAGE,
     PLAIN_IMAGE.replace("(IMAGE,", '(IMAGE + "\\n",')),
    ("<image> where there is no image", "plain", PLAIN_IMAGE, "        out.append((IMAGE, False))\n"),
    ("plain without <image>", "plain", PLAIN_IMAGE, ""),
    ("the image stays where it is", "image_first", IF, "        if False:"),
    ("the image always moves", "image_first", IF, "        if IMAGE in text:"),
    ("the image moves to the end of its turn", "image_first", MOVE,
     '            text = text.replace(IMAGE, "").strip() + "\\n" + IMAGE'),
    ("no newline after the image", "image_first", MOVE, MOVE.replace('IMAGE + "\\n" +', "IMAGE +")),
    ("the image is there twice", "image_first", MOVE, MOVE.replace('text.replace(IMAGE, "")', "text")),
    ("a newline is left at the end of the turn", "image_first", MOVE,
     '            text = IMAGE + "\\n" + text.replace(IMAGE, "")'),
    ("a leading answer is kept", "order_of_turns", DROP, "        pass"),
    ("a trailing question is dropped", "order_of_turns",
     "    for speaker, text in turns:\n        if IMAGE in text and image_first:",
     "    if template == 'phi3' and turns[-1][0] == 'human':\n        turns = turns[:-1]\n    out += [] if turns "
     "else [('', False)]\n    for speaker, text in turns:\n        if IMAGE in text and image_first:"),
    ("`later` is left out", "later_turns", LATER, LATER.replace("t.later + ", "")),
    ("`later` comes in front of the first question too", "later_turns", FIRST,
     FIRST.replace("((t.user", "((t.later + t.user")),
    ("`later` comes after the question", "later_turns", LATER,
     LATER.replace("t.later + ", "").replace("text), False)", "text) + t.later, False)")),
    ("BOS is missing", "ids", BOS, "    ids = []\n"),
    ("BOS in front of every chunk", "ids", CHUNK,
     CHUNK + "\n        if n:\n            chunk_ids, offsets = [*bos_ids(tokenizer), *chunk_ids], [(0, 0), *offsets]"),
    ("one placeholder too many", "ids", PLACE, PLACE.replace("image_tokens", "(image_tokens + 1)"), PLABEL,
     PLABEL.replace("image_tokens", "(image_tokens + 1)"), PMASK,
     PMASK.replace("image_tokens", "(image_tokens + 1)")),
    ("one placeholder for all image tokens", "ids", PLACE, "            ids += [PLACEHOLDER]", PLABEL,
     "            labels += [IGNORE]", PMASK, "            image += [True]"),
    ("placeholders are the id of <s>", "ids", PLACE, PLACE.replace("PLACEHOLDER", "1")),
    ("the whole text is encoded after the image, not its chunk", "ids", CHUNK,
     CHUNK.replace("tokenizer, chunk,", "tokenizer, chunk if not n else chunk + ' ',"), LABEL,
     LABEL.replace("start + first", "min(start + first, len(supervised) - 1)")),
    ("chunks are stripped of their spaces", "ids", "text.split(IMAGE)", "text.lower().split(IMAGE)"),
    ("labels are shifted by one: the loss shifts", "labels", RETURN,
     RETURN.replace("torch.tensor(labels[cut])", "torch.tensor((labels[1:] + [IGNORE])[cut])")),
    ("everything is supervised", "labels", LABEL, "            labels.append(i)"),
    ("questions for answers", "labels", LABEL, LABEL.replace("if supervised", "if not supervised")),
    ("offsets are of the chunk, not of the text", "labels", LABEL, LABEL.replace("start + first", "first")),
    ("the characters of <image> are not counted", "labels", SKIP, "            pass"),
    ("the character after a token's first", "labels", LABEL,
     LABEL.replace("start + first", "min(start + first + 1, len(supervised) - 1)")),
    ("the first token of an answer is ignored", "labels", LABEL,
     LABEL.replace("supervised[start + first]", "supervised[start + first] and supervised[start + first - 1]")),
    ("0 for -100: id 0 would be trained", "labels", LABEL, LABEL.replace("IGNORE", "0")),
    ("placeholders are supervised", "labels", PLABEL, PLABEL.replace("IGNORE", "PLACEHOLDER")),
    ("the mask is False everywhere", "image_mask", PMASK, PMASK.replace("True", "False")),
    ("the first image position alone", "image_mask", PMASK,
     "            image += [True] + [False] * (image_tokens - 1)"),
    ("the mask lacks BOS and is shifted by one", "image_mask", START, "    labels, image = [IGNORE] * len(ids), []",
     RETURN, RETURN.replace("torch.tensor(image[cut])", "torch.tensor((image + [False])[cut])")),
    ("max_length is ignored", "length", CUT, "    cut = slice(None)"),
    ("an image is cut in two", "length", FIT, ""),
    ("an image that just fits is left out", "length", FIT, FIT.replace("> max_length", ">= max_length - 2")),
    ("labels are not cut", "length", RETURN, RETURN.replace("labels[cut]", "labels")),
    ("padding counts as text", "tokens_that_see_the_image", SEE, SEE.replace("self.attention_mask & ", "")),
    ("text before the image counts", "tokens_that_see_the_image", SEE,
     SEE.replace(" & (self.image_mask.cumsum(1) > 0)", "")),
    ("image positions count as text", "tokens_that_see_the_image", SEE, SEE.replace("~self.image_mask & ", "")),
    ("questions count as answers", "tokens_that_see_the_image", ANS, "        return self.text_after_image()"),
    ("answers before the image count", "tokens_that_see_the_image", ANS, "        return self.labels != IGNORE"),
]

RIGHT = [
    ("templates as ifs", "data", '''
def pieces(conversations, template, image_first=True):
    t = TEMPLATES[template]
    said = list(conversations)
    if said and said[0]["from"] == "gpt":
        del said[0]
    if template == "plain":
        image = [(IMAGE, False)] if any(IMAGE in x["value"] for x in said) else []
        return image + [(x["value"] + "\\n", True) for x in said if x["from"] == "gpt"]
    result = []
    for number, x in enumerate(said):
        value = x["value"]
        if image_first and IMAGE in value:
            rest = value.replace(IMAGE, "").strip()
            value = f"{IMAGE}\\n{rest}" if rest else IMAGE
        before, after = (t.answer if x["from"] == "gpt" else t.user).split("{text}")
        if x["from"] != "gpt":
            before = before.replace("{system}", "" if number else t.system)
            if number:
                before = t.later + before
        result.append((before + value + after, x["from"] == "gpt"))
    return result
'''),
    ("ids, labels and mask as rows of a list", "data", '''
def encode(conversations, tokenizer, template="v1", image_tokens=576, max_length=None, after_special="4.31",
           image_first=True):
    parts = pieces(conversations, template, image_first)
    text = "".join(p for p, _ in parts)
    answers, at = [], 0
    for p, answer in parts:
        if answer:
            answers.append(range(at, at + len(p)))
        at += len(p)
    rows, begin = [(i, IGNORE, False) for i in bos_ids(tokenizer)], 0
    while True:
        end = text.find(IMAGE, begin)
        chunk = text[begin:] if end < 0 else text[begin:end]
        for i, (a, _) in zip(*encode_text(tokenizer, chunk, after_special)):
            rows.append((i, i if any(begin + a in r for r in answers) else IGNORE, False))
        if end < 0 or (max_length and len(rows) + image_tokens > max_length):
            break
        rows.extend([(PLACEHOLDER, IGNORE, True)] * image_tokens)
        begin = end + len(IMAGE)
    ids, labels, mask = zip(*rows[:max_length])
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(mask)
'''),
    ("masks by loops", "data", '''
def text_after_image(self):
    out = torch.zeros_like(self.image_mask)
    for b in range(out.shape[0]):
        seen = False
        for t in range(out.shape[1]):
            seen = seen or bool(self.image_mask[b, t])
            out[b, t] = seen and bool(self.attention_mask[b, t]) and not bool(self.image_mask[b, t])
    return out


Batch.text_after_image = text_after_image
Batch.answer_tokens = lambda self: torch.where(self.labels == -100, False, self.text_after_image())
'''),
]
