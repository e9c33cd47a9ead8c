"""Scorers of the benchmarks: pure functions of predictions and references.

    rule  functions            benchmarks                       gives the numbers of
    R1    vqa_norm, vqa_acc    VQAv2, OK-VQA, TextVQA, VizWiz   M4C (= EvalAI); m4c=False: lmms-eval
    R2    exact                GQA, own questions               lmms-eval's exact_match
    R3    pope_parse, pope     POPE                             the authors, as LLaVA runs it
    R4    mme_parse, mme       MME                              lmms-eval; authors: on real answers
    R5    circular             MMBench                          VLMEvalKit's circular evaluation
    R6    pick_choice          every multiple-choice benchmark  none: our own, which never guesses
    R7    mmmu_open            open questions of MMMU           the authors
    R8    ocrbench             OCRBench                         the authors
    R9    anls                 DocVQA                           lmms-eval's anls
    R10   ptb_tokenize, cider  RefCOCO, RefCOCO+, RefCOCOg      pycocoevalcap
    R11   realworldqa          RealWorldQA                      lmms-eval 0.7

One answer's score is a bool or a number in 0..1. Ratios (`pope`, `circular`) are in 0..1, and 0/0
is 0; `mme` and `cider` have scales of their own. The references of one question are a list, or a
single string. Functions raise ValueError for rows that the rule cannot score.
"""
import math
import re
import string
from collections import Counter
from functools import lru_cache
from unicodedata import normalize

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(NUMBERS)}}
APOSTROPHES = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's
    how'd how'll how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't
    not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd
    someone'll someone's something'd something'll that's there'd there're there's they'd they'll
    they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
    you'd you'll you're you've 'ow's'at y'all'll y'all'd've""".split()
WOULD_HAVE = "he I it she somebody someone something there they we who you".split()
APOSTROPHES += [f"{x}'d've" for x in WOULD_HAVE]
APOSTROPHES += [f"{x}n't've" for x in "could had might should would".split()]
# Each word is found by its spelling without one of its apostrophes. Then three oddities of the
# official table. Entries with a capital ("Im") have no effect: answers are compared in lower case.
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in APOSTROPHES
                for i, c in enumerate(word) if c == "'"}
CONTRACTIONS |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def listed(answers: str | list[str]) -> list[str]:
    """Return the references of one question as a list. Raises ValueError if there is none."""
    answers = [answers] if isinstance(answers, str) else list(answers)
    if not answers:
        raise ValueError("a question without a reference answer has no score")
    return answers


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@lru_cache(1 << 16)
def vqa_norm(text: str, m4c: bool = True) -> str:
    """R1: return an answer as VQA accuracy compares it. m4c=False skips the first step, as VQAv2
    does: commas and possessives differ. Results are kept, because references repeat."""
    if m4c:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    comma = re.search(r"(?<=\d),+(?=\d)", text)
    before = text
    for p in ";/[]\"{}()=+\\_-><@`,?!":
        if p in before:
            text = text.replace(p, "" if comma or p + " " in before or " " + p in before else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)          # the official scorer passes a flag here
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def vqa_acc(pred: str, answers: str | list[str], m4c: bool = True) -> float:
    """R1: mean over the references of min(1, matches among the others / 3): 0, .3, .6, .9, 1 for
    0..4 matches of 10. Fewer than 4 references cannot give 1, and a single one gives 0."""
    pred, answers = vqa_norm(pred, m4c), [vqa_norm(answer, m4c) for answer in listed(answers)]
    n, m = len(answers), answers.count(pred)
    return (m * min(3, m - 1) + (n - m) * min(3, m)) / (3 * n)


def exact(prediction: str, reference: str) -> bool:
    """R2: equal after strip, lower case and deletion of ASCII punctuation, on both sides."""
    a, b = (s.strip().lower().translate(NO_PUNCTUATION) for s in (prediction, reference))
    return a == b


def pope_parse(text: str) -> str:
    """R3: "no" if the first sentence has the word No, no or not; else "yes", even for NO and ""."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope(preds: list[str], labels: list[str]) -> dict[str, float]:
    """R3: return acc, precision, recall, f1, yes_ratio (of the predictions) and n. Labels: "yes",
    the positive class, or "no". LLaVA reports the mean f1 of three categories, one call each."""
    if len(preds) != len(labels):
        raise ValueError(f"POPE has {len(labels)} labels, and there are {len(preds)} answers")
    if odd := set(labels) - {"yes", "no"}:
        raise ValueError(f"a POPE label is yes or no, not {odd.pop()!r}")
    count = Counter(zip(map(pope_parse, preds), labels))
    tp, fp, fn, n = count["yes", "yes"], count["yes", "no"], count["no", "yes"], len(labels)
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {"acc": ratio(tp + count["no", "no"], n), "precision": precision, "recall": recall,
            "f1": ratio(2 * precision * recall, precision + recall), "yes_ratio": ratio(tp + fp, n),
            "n": n}


def mme_parse(text: str) -> str:
    """R4: yes, no or other, by the first four characters: "not", "know" and "nope" are no."""
    text = text.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    if "yes" in text[:4]:
        return "yes"
    return "no" if "no" in text[:4] else "other"


def mme(rows: list[tuple[str, str, str, str]], drop_incomplete: bool = False) -> dict[str, float]:
    """R4: rows of (category, question_id, prediction, answer), two an image → {category: score,
    perception, cognition}.

    A category's score is the percentage of right answers plus that of images with both right: at
    most 200. The sums are over the categories present. drop_incomplete: leave out images with one
    question and count them (dropped), instead of raising ValueError."""
    images = {}
    for category, question_id, prediction, answer in rows:
        label = answer.strip().lower()
        if category not in PERCEPTION + COGNITION or label not in ("yes", "no"):
            what = f"category {category!r} with answer {answer!r}"
            raise ValueError(f"MME has no {what} (image {question_id})")
        hits = images.setdefault((category, question_id), [])
        hits.append(mme_parse(prediction) == label)
    allowed = (1, 2) if drop_incomplete else (2,)
    odd = [image for image, hits in images.items() if len(hits) not in allowed]
    if odd:
        category, question_id = odd[0]
        raise ValueError(f"{len(odd)} of {len(images)} MME images do not have exactly 2 questions, "
                         f"the first of them {question_id} ({category})")
    scores = {}
    for name in PERCEPTION + COGNITION:
        pairs = [hits for image, hits in images.items() if image[0] == name and len(hits) == 2]
        if pairs:
            scores[name] = 100 * (sum(map(sum, pairs)) / 2 + sum(map(all, pairs))) / len(pairs)
    result = {**scores, "perception": sum(scores.get(name, 0.0) for name in PERCEPTION),
              "cognition": sum(scores.get(name, 0.0) for name in COGNITION)}
    if drop_incomplete:
        result["dropped"] = sum(len(hits) == 1 for hits in images.values())
    return result


def circular(rows: list[tuple[int | str, bool]], sizes: dict[int, int] | None = None,
             drop_incomplete: bool = False) -> dict[str, float]:
    """R5: rows of (index, hit); rotation k of question i has index i + k·10⁶. Returns circular =
    hits / groups (a group is a hit if all its rows are), vanilla = accuracy of the rows below 10⁶,
    hits, groups, dropped.

    sizes: {i: rows of question i in the file}; None: a group must hold two rotations or more, from
    0 without a gap. drop_incomplete: leave incomplete groups out and count them, no ValueError."""
    groups = {}
    for index, hit in rows:
        rotation, question = divmod(int(index), 10 ** 6)
        if rotation in groups.setdefault(question, {}):
            raise ValueError(f"MMBench index {index} comes twice")
        groups[question][rotation] = bool(hit)
    whole, dropped = {}, []
    for question, group in groups.items():
        size = sizes[question] if sizes else max(2, len(group))
        if set(group) == set(range(size)):
            whole[question] = all(group.values())
        else:
            dropped.append(question)
    if dropped and not drop_incomplete:
        rows = sorted(dropped[0] + k * 10 ** 6 for k in groups[dropped[0]])
        raise ValueError(f"{len(dropped)} of {len(groups)} MMBench questions lack rotations: "
                         f"question {dropped[0]} has rows {rows}")
    hits, vanilla = sum(whole.values()), [g[0] for g in groups.values() if 0 in g]
    return {"circular": ratio(hits, len(whole)), "vanilla": ratio(sum(vanilla), len(vanilla)),
            "hits": hits, "groups": len(whole), "dropped": len(dropped)}


def pick_choice(pred: str, letters: str, options: list[str] | None = None) -> str | None:
    """R6: return the letter that an answer chooses, or None: nothing is guessed. letters: the valid
    capitals; options: their texts. The first pattern that matches decides, by its last match."""
    text = normalize("NFKC", pred).strip()
    alone = re.sub(r"^\W+|\W+$", "", text).upper()
    if alone in list(letters):
        return alone
    one = f"([{re.escape(letters)}])"
    for pattern in (rf"(?i:answer(?: is)?|option(?: is)?|choice(?: is)?)\s*:?\s*[(\[*]*{one}(?![A-Za-z0-9'])",
                    rf"^\**{one}[.:)\n*](?![A-Za-z0-9])",
                    rf"\({one}\)",
                    rf"(?<![A-Za-z0-9'_.-])(?![AI] [a-z]){one}(?![A-Za-z0-9'_-])"):
        if hits := re.findall(pattern, text):
            return hits[-1]

    # No letter: the answer must be the text of exactly one option, or contain exactly one.
    text = text.lower()
    equal, inside = [], []
    for letter, option in zip(letters, options or []):
        option = normalize("NFKC", option).strip().lower()
        if option and not re.fullmatch("[a-z]", option):
            if option.rstrip(". ") == text.rstrip(". "):
                equal.append(letter)
            if re.search(rf"(?<![A-Za-z0-9]){re.escape(option)}(?![A-Za-z0-9])", text):
                inside.append(letter)
    for found in (equal, inside):
        if len(found) == 1:
            return found[0]
    return None


def mmmu_values(texts: list[str]) -> list[str | float]:
    """Return numbers rounded to two decimals, other texts in lower case; "a" as " a" and "a "."""
    values = []
    for text in texts:
        text = text.strip().lower()
        try:
            values.append(round(float(text.replace(",", "")), 2))
        except ValueError:
            values += [" " + text, text + " "] if len(text) == 1 else [text]
    return values


def mmmu_open(pred: str, gold: str | list[str]) -> bool:
    """R7: True if an answer gives one of the references. What counts is the shortest text after
    "is ", "answer " or the like in each line, else the whole answer; and the numbers in these."""
    whole = pred.strip().strip(".").lower()
    tails, lines = [], whole.split("\n")
    for line in lines:
        keys = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
        if line is lines[-1]:
            keys.append("=")
        tail = ""
        for key in keys:
            if key in line:
                after = line.split(key)[-1].strip()
                if not tail or len(after) < len(tail):          # "" too, as in the authors' scorer
                    tail = after
        if tail not in ("", *":,.!?;'"):
            tails.append(tail)
    texts = tails or [whole]
    for tail in list(texts):
        for pattern in (r"-?\b\d{1,3}(?:,\d{3})+\b",                                # 1,234
                        r"-?\d+(?:\.\d+)?e[+-]?\d+",                                # 1e3
                        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?!e[+-]?\d+)(?![,\d])"):       # 12, 3.4, .5
            texts += re.findall(pattern, tail)
    for value in mmmu_values(texts):
        for reference in mmmu_values([str(g) for g in listed(gold)]):
            both_text = isinstance(value, str) and isinstance(reference, str)
            if value == reference or (both_text and reference in value):
                return True
    return False


def ocrbench(pred: str, answers: str | list[str], dataset: str) -> bool:
    """R8: True if a reference is part of the answer. In HME100k case counts, spaces do not."""
    def plain(text):
        if dataset == "HME100k":
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.lower().strip().replace("\n", " ")
    return any(plain(answer) in plain(pred) for answer in listed(answers))


def levenshtein(a: str, b: str) -> int:
    """Return the number of edits from a to b. row[j]: from the part of a so far to b[:j]."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(pred: str, answers: str | list[str]) -> float:
    """R9: 1 − the least normalised edit distance to a reference, and 0 if that is below one half.
    Case and runs of white space are no edits, yet the lengths are those of the strings as given."""
    pred, distances = pred.strip(), []
    for answer in listed(answers):
        edits = levenshtein(" ".join(answer.lower().split()), " ".join(pred.lower().split()))
        distances.append(ratio(edits, max(len(answer.upper()), len(pred.upper()))))
    score = 1 - min(distances)
    return score if score >= 0.5 else 0.0


def realworldqa(pred: str, ref: str) -> bool:
    """R11: by R6 if the reference is A, B, C or D; else equal but for case and final full stops."""
    if ref in ("A", "B", "C", "D"):
        return pick_choice(pred, "ABCD", []) == ref
    return pred.lower().strip().rstrip(".") == ref.lower()


BRACKETS = str.maketrans({"(": " -lrb- ", "[": " -lsb- ", "{": " -lcb- ", ")": " -rrb- ",
                          "]": " -rsb- ", "}": " -rcb- ", "’": "'", "‘": "'",
                          **dict.fromkeys('`"“”–—…', " ")})
# A token, in lower case, after BRACKETS: the first alternative that fits.
TOKEN = re.compile(r"""
    -[lr][rsc]b- | https?://\S+ | www\.\S+ | [\w.]+@\w+\.\w+
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)    # can not, gon na
    | 't(?=(?:is|was)\b) | \w+?(?=n't\b) | n't\b | '(?:s|m|d|re|ve|ll)\b        # do n't, he 's
    | '\d0s\b | 'em\b | 'n' | [od]'\w+ | ma'am | y'(?=all\b)
    | (?:[a-z]\.)+(?![a-z]{2})[a-z]?                                            # u.s., p.m.
    | (?:mrs?|ms|dr|[js]r|st|mt|ft|lt|rt|ave|blvd|vs|etc|al|inc|co|corp|prof|gen|no(?=\.\ ?\d))\.
    | \d+(?:[.,:]\d+)+ | [-+]?\.?\d+(?:[.,:/]\d+)*(?![\w-])                     # 10:30 am, -1, 1/2
    | \w+(?:[-/.]\w+)*                                                          # t-shirt, a/b
    | [!?]{2,} | \*+ | \#(?:[a-z]\w*)? | \S""", re.X)


def ptb_tokenize(text: str) -> list[str]:
    """R10: split a sentence into words as pycocoevalcap does (Java's PTBTokenizer in lower case,
    without punctuation; -lrb-, -rrb- and runs like "!!" stay). The two differ on about 1 sentence
    in 300: smileys, rare abbreviations, a full stop after a single letter."""
    text = re.sub(r"--+|\.\.+", " ", text.lower().translate(BRACKETS))
    return [token for token in TOKEN.findall(text) if token not in tuple("'.?!,:-;")]


def cider(hyps: list[str], refs: list[str | list[str]]) -> tuple[float, list[float]]:
    """R10: return the mean CIDEr and the score of each case, in 0..10. hyps: a sentence each; refs:
    its references. Words weigh by their rarity in all cases, so half a split scores differently."""
    if len(hyps) != len(refs) or not refs:
        raise ValueError(f"{len(hyps)} sentences for {len(refs)} sets of references")

    def count(sentence):                                    # its n-grams, for n = 1, 2, 3, 4
        words = ptb_tokenize(sentence)
        return [Counter(zip(*(words[i:] for i in range(n)))) for n in (1, 2, 3, 4)]

    def tf_idf(grams):
        return {gram: tf * (math.log(len(refs)) - math.log(max(1, frequency[gram])))
                for gram, tf in grams.items()}

    def cosine(hyp_grams, ref_grams):
        h, r = tf_idf(hyp_grams), tf_idf(ref_grams)
        common = sum(min(weight, r[gram]) * r[gram] for gram, weight in h.items() if gram in r)
        return ratio(common, math.hypot(*h.values()) * math.hypot(*r.values()))

    ref_counts = [[count(ref) for ref in listed(group)] for group in refs]
    frequency = Counter()                                   # in how many cases a gram occurs
    for group in ref_counts:
        frequency.update({gram for ref in group for grams in ref for gram in grams})
    scores = []
    for hyp, group in zip(map(count, hyps), ref_counts):
        total = 0.0
        for ref in group:
            alike = sum(map(cosine, hyp, ref)) / 4
            longer = hyp[1].total() - ref[1].total()        # in bigrams, as the reference scorer
            total += alike * math.exp(-longer ** 2 / 72)
        scores.append(10 * total / len(group))
    return sum(scores) / len(scores), scores
