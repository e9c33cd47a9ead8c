"""evaluation/metrics.py: every rule by hand. Where a case looks odd, so is the scorer of the published numbers."""
import functools
import math
import random
import re

import numpy as np
import pytest

from evaluation import metrics
from evaluation.metrics import (
    CONTRACTIONS,
    anls,
    cider,
    circular,
    exact,
    levenshtein,
    mme,
    mme_parse,
    mmmu_open,
    ocrbench,
    pick_choice,
    pope,
    pope_parse,
    ptb_tokenize,
    realworldqa,
    vqa_acc,
    vqa_norm,
)

# R1


def test_R1_the_contraction_table_has_the_official_120_entries():
    assert len(CONTRACTIONS) == 120
    assert {"dont": "don't", "oclock": "o'clock", "twas": "'twas", "maam": "ma'am", "yall": "y'all"}.items() \
        <= CONTRACTIONS.items(), "(a) a word is known by its spelling without the apostrophe"
    assert {"hed've": "he'd've", "he'dve": "he'd've", "somebody'dve": "somebody'd've",
            "couldnt've": "couldn't've", "couldn'tve": "couldn't've", "'ow'sat": "'ow's'at",
            "y'allll": "y'all'll", "y'alld've": "y'all'd've"}.items() \
        <= CONTRACTIONS.items(), "(b) a double contraction, by its spellings with one apostrophe lost"
    assert "hedve" not in CONTRACTIONS, "never with both lost"
    assert {k for k, v in CONTRACTIONS.items() if k.replace("'", "") == k} >= {"Im", "Ive", "wont", "youve"}
    assert {k: v for k, v in CONTRACTIONS.items() if v.count("'") != k.count("'") + 1} == {
        "let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}, "(c) the three oddities"
    assert not {"its", "well", "were", "hell", "shell", "id", "ill", "lets", "shes"} & set(CONTRACTIONS), "words"


@pytest.mark.parametrize("text, normal", [
    ("none", "0"), ("Zero", "0"), ("one", "1"), ("two", "2"), ("seven", "7"), ("TEN", "10"),
    ("eleven", "eleven"),
    ("twos", "twos"), ("two-tone", "2 tone"), ("two dogs", "2 dogs"),
    ("no one", "no 1"),  # number words
    ("a dog", "dog"), ("The Dog", "dog"), ("an", ""), ("the", ""), (".", ""),
    ("cat and a the hat", "cat and hat"),
    ("dont", "don't"), ("DONT know", "don't know"), ("youll", "you'll"),
    ("shouldntve", "shouldntve"),
    ("shouldnt've", "shouldn't've"), ("Im", "im"), ("Ive", "ive"), ("its", "its"),
    ("somebody'd", "somebodyd"),
    ("red/blue", "red blue"), ("x;/y/z", "x y z"), ("x-\nb-c", "x bc"),
    ("red /blue/green", "red bluegreen"), ("a - b", "b"), ("t-shirt", "t shirt"),
    ("-5", "5"), ("(left)", "left"), ("e_mail@home", "e mail home"), ("`x`", "x"), ("a+b=c", "b c"),
    ("<b>[c]{d}", "b c d"),
    ("\"hi\"", "hi"), ("back\\slash", "back slash"), ("wow!", "wow"),
    ("a;b", "b"),  # all 21 characters
    ("5.", "5"), ("5.5", "5.5"), (".5", ".5"), ("u.s.a", "usa"), ("v1.x", "v1x"), ("1.5.", "1.5"),
    ("x" + "." * 40, "x" + "." * 8),
    ("x" + "." * 32, "x"),  # at most 32 full stops: the official bug
    ("10:30", "10:30"), ("50%", "50%"), ("$5 & up", "$5 & up"), ("#1*", "#1*"),
    ("it’s – ok", "it’s – ok"),
    ("new\nyork\tcity", "new york city"), ("  yes \n", "yes"), ("", ""),
])
def test_R1_normalisation_common_to_both_variants(text, normal):
    assert vqa_norm(text) == normal
    assert vqa_norm(text, m4c=False) == normal


@pytest.mark.parametrize("text, m4c, vqav2", [
    ("red,blue", "redblue", "red blue"), ("red, blue", "red blue", "red blue"),
    ("1,000", "1000", "1000"),
    ("1,000-2,000", "1000 2000",
     "10002000"),  # a comma between digits left in deletes all punctuation
    ("1,000 a-b", "1000 b", "1000 ab"), ("1,a-b", "1a b", "1 b"), ("why?not", "whynot", "why not"),
    ("man's hat", "man 's hat", "man's hat"), ("she's", "she 's", "she's"),
    ("Let's", "let 's", "let's"),
    ("he's,ok", "he 'sok", "he's ok")])
def test_R1_the_variants_differ_on_commas_question_marks_and_possessives(text, m4c, vqav2):
    assert (vqa_norm(text), vqa_norm(text, m4c=False)) == (m4c, vqav2)


@pytest.mark.parametrize("m, expected",
                         [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (10, 1)])
def test_R1_ten_references_are_a_leave_one_out_average(m, expected):
    assert vqa_acc("Two.", ["2"] * m + ["three"] * (10 - m)) == expected


@pytest.mark.parametrize("m, n, expected",
                         [(1, 1, 0), (2, 2, 1 / 3), (3, 3, 2 / 3), (4, 4, 1), (3, 5, 0.8),
    (1, 4, 1 / 4)])
def test_R1_any_number_of_references_is_accepted(m, n, expected):
    assert vqa_acc("red", ["red"] * m + ["x"] * (n - m)) == pytest.approx(expected, abs=1e-15)
    others = [["red"] * m + ["x"] * (n - m) for _ in range(n)]
    for i, rest in enumerate(others):
        del rest[i]
    assert expected == pytest.approx(sum(min(1, rest.count("red") / 3) for rest in others) / n)


def test_R1_an_empty_answer_matches_what_normalises_to_nothing():
    assert vqa_acc("", ["the"] * 10) == vqa_acc(".", ["a"] * 10) == 1
    assert vqa_acc("man's", ["man s"] * 10) == 0
    assert vqa_acc("a,b", ["b"] * 10) == 0 and vqa_acc("a,b", ["b"] * 10, m4c=False) == 1
    assert vqa_acc("b", ["a,b"] * 10) == 0 and vqa_acc("b", ["a,b"] * 10, m4c=False) == 1
    assert vqa_acc("Yes", ["yes"] * 10) == 1, "the official script gives 0 here, and is not followed"
    with pytest.raises(ValueError, match="without a reference"):
        vqa_acc("yes", [])


# R2


@pytest.mark.parametrize("prediction, reference, hit", [
    ("red", "red", True), ("Red.", "red", True), (" red\n", "red", True),
    ("red-ish", "redish", True),
    ("yes!", "Yes", True),
    ("dark red", "red", False), ("a red", "red", False), ("", "red", False), ("2", "two", False),
    ("", "", True),
    ("red .", "red", False), ("it’s", "its", False)])
def test_R2_exact_match_ignores_case_ascii_punctuation_and_outer_space_and_nothing_else(prediction, reference, hit):
    assert exact(prediction, reference) is hit


# R3


@pytest.mark.parametrize("text, parsed", [
    ("yes", "yes"), ("no", "no"), ("No", "no"), ("not", "no"), ("No, there is none", "no"),
    ("There is no dog.", "no"),
    ("I do not see it", "no"), ("no,", "no"), ("n,o", "no"), ("well no", "no"),
    ("", "yes"), ("NO", "yes"), ("Nope", "yes"), ("Not", "yes"), ("It isn't", "yes"),
    ("no!", "yes"), ("\nno", "yes"),
    ("Yes. There is no dog", "yes"), (".no", "yes"), ("No. Yes", "no"), ("yes no", "no"),
    ("nothing", "yes")])
def test_R3_no_needs_the_word_before_the_first_full_stop(text, parsed):
    assert pope_parse(text) == parsed
    assert pope_parse(parsed) == parsed, "parsed answers may be parsed again"


def test_R3_yes_is_the_positive_class_and_the_yes_ratio_is_the_predictions():
    assert pope(["Yes", "yes, it is", "NO", "There is no dog."], ["yes", "yes", "no", "no"]) == {
        "acc": 0.75, "precision": 2 / 3, "recall": 1.0, "f1": 0.8, "yes_ratio": 0.75, "n": 4}
    assert pope(["no", "no", "yes", "no"], ["yes", "yes", "yes", "no"]) == {
        "acc": 0.5, "precision": 1.0, "recall": 1 / 3, "f1": 0.5, "yes_ratio": 0.25, "n": 4}


def test_R3_nothing_over_nothing_is_nothing():
    assert pope(["no", "no"], ["no", "yes"]) == {
        "acc": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0, "n": 2}
    assert pope([], [])["acc"] == 0


def test_R3_labels_that_are_no_labels_or_too_few_are_refused():
    with pytest.raises(ValueError, match="'Yes'"):
        pope(["yes"], ["Yes"])
    with pytest.raises(ValueError, match="1 labels, and there are 2 answers"):
        pope(["yes", "no"], ["yes"])


# R4


@pytest.mark.parametrize("text, parsed", [
    ("Yes", "yes"), ("no.", "no"), (" YES. ", "yes"), ("y", "yes"), ("N.", "no"), ("x", "other"),
    ("1", "other"),
    ("", "other"), ("...", "other"), ("y.e.s", "yes"), ("yes, it is", "yes"), ("not", "no"),
    ("know", "no"),
    ("Nope", "no"),
    ("a no", "no"), ("is no", "other"), (" yes", "yes"), ("ayes no", "yes"), ("noyes", "no"),
    ("maybe", "other"),
    ("nay", "other"),
    ("ye", "other"), ("it is yes", "other")])
def test_R4_longer_answers_are_judged_by_four_characters(text, parsed):
    assert mme_parse(text) == parsed


def test_R4_a_score_is_the_right_answers_plus_the_images_with_both_right():
    rows = [("existence", "1.jpg", "Yes", "Yes"),
            ("existence", "1.jpg", "no", "No"),  # both right
            ("existence", "2.jpg", "yes", "Yes"),
            ("existence", "2.jpg", "yes", "No"),  # one
            ("OCR", "1.jpg", "maybe", "Yes"),
            ("OCR", "1.jpg", "x", "No"),  # none
            ("code_reasoning", "1.jpg", "Yes", "Yes"), ("code_reasoning", "1.jpg", "No", "No")]
    expected = {"existence": 75 + 50, "OCR": 0, "code_reasoning": 200, "perception": 125,
                "cognition": 200}
    assert mme(rows) == expected
    assert mme(rows[::2] + rows[1::2]) == expected, "pairs are made by image, not by position"


def test_R4_all_right_is_2000_and_800():
    names = ("existence count position color posters celebrity scene landmark artwork OCR "
             "commonsense_reasoning numerical_calculation text_translation code_reasoning").split()
    scores = mme([(name, i, "yes", "Yes") for name in names for i in range(3) for _ in range(2)])
    assert (scores["perception"], scores["cognition"], len(scores)) == (2000, 800, 16)


def test_R4_an_image_without_its_second_question_is_refused_or_dropped_when_told():
    rows = [("count", "1", "yes", "Yes"), ("count", "1", "yes", "Yes"), ("count", "2", "no", "Yes")]
    with pytest.raises(ValueError,
                       match=r"1 of 2 MME images do not have exactly 2 questions.* 2 \(count\)"):
        mme(rows)
    assert mme(rows, drop_incomplete=True) == {"count": 200, "perception": 200, "cognition": 0,
                                               "dropped": 1}
    with pytest.raises(ValueError, match="exactly 2"):
        mme(rows[:2] * 2, drop_incomplete=True)


@pytest.mark.parametrize("row", [("ocr", "1", "yes", "Yes"), ("OCR", "1", "yes", "maybe")])
def test_R4_a_category_or_an_answer_that_mme_does_not_have_is_refused(row):
    with pytest.raises(ValueError, match="MME has no category"):
        mme([row, row])


# R5


M = 10 ** 6


def test_R5_a_question_counts_if_all_its_rotations_are_right():
    rows = [(7, True), (7 + M,
                        True),  # two options
            (8, True), (8 + M, True), (8 + 2 * M, False),                               # three
            ("9", True), (f"{9 + M}", True), (9 + 2 * M, True),
            (9 + 3 * M, True),  # four; an index may be a string
            (0, False), (M, True)]
    expected = {"circular": 0.5, "vanilla": 0.75, "hits": 2, "groups": 4, "dropped": 0}
    assert circular(rows) == expected
    assert circular(rows[::-1]) == expected
    assert circular(rows, sizes={7: 2, 8: 3, 9: 4, 0: 2}) == expected


@pytest.mark.parametrize("missing, seen",
                         [(9, True), (9 + M, True), (9 + 2 * M, True), (9 + 3 * M, False)])
def test_R5_a_missing_rotation_is_refused_or_its_question_dropped_when_told(missing, seen):
    rows = [(i, True) for i in (3, 3 + M, 9, 9 + M, 9 + 2 * M, 9 + 3 * M) if i != missing]
    with pytest.raises(ValueError, match="1 of 2 MMBench questions lack rotations: question "
                                         "9 has rows"):
        circular(rows, sizes={3: 2, 9: 4})
    left = circular(rows, sizes={3: 2, 9: 4}, drop_incomplete=True)
    assert left == {"circular": 1, "vanilla": 1, "hits": 1, "groups": 1, "dropped": 1}
    if seen:        # the last one's absence shows only against the number of options
        with pytest.raises(ValueError, match="lack rotations"):
            circular(rows)
    else:
        assert circular(rows)["groups"] == 2


def test_R5_rows_below_a_million_alone_are_no_circular_evaluation():
    with pytest.raises(ValueError, match="2 of 2"):
        circular([(1, True), (2, False)])
    assert circular([(1, True), (2, False)], drop_incomplete=True) == {
        "circular": 0, "vanilla": 0.5, "hits": 0, "groups": 0, "dropped": 2}


def test_R5_an_index_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="1000001 comes twice"):
        circular([(1, True), (1 + M, True), ("1000001", True)])


# R6


@pytest.mark.parametrize("pred, letter", [
    # a: the whole answer
    ("B", "B"), ("b", "B"), ("(c)", "C"), (" D. ", "D"), ("**A**", "A"), ("Ｂ", "B"), ('"a"', "A"),
    ("E", None),
    ("AB", None),
    # b: after answer, option, choice
    ("The answer is C", "C"), ("ANSWER: (B) since A is wrong", "B"),
    ("answer A? No, the answer is B. C", "B"),
    ("Option [D] not A", "D"), ("choice is **C**, A", "C"), ("The answer is Apple", None),
    ("The answer is A's", None),
    ("the answer is b", None),
    # c: at the start, before . : ) newline or *
    ("A. the red one, not B", "A"), ("C: not B", "C"), ("D) or B", "D"), ("C\n\nnot B", "C"),
    ("C\nnot B", "B"),
    ("**B** A", "B"), ("A.x B", "B"), ("so B: not C", "C"),
    # d: in parentheses
    ("It is (A) or (C), not B", "C"), ("it is (a)", None),
    # e: a capital of its own
    ("I think B", "B"), ("both A and B", "B"), ("A dog", None), ("A Dog", "A"), ("B, then C", "C"),
    ("vitamin-C", None),
    ("DNA", None), ("Banana", None), ("C's", None), ("it is .C", None), ("x_B", None),
    ("B_1", None), ("选B", "B"),
    ("", None)])
def test_R6_the_first_rule_that_fires_decides_by_its_last_hit(pred, letter):
    assert pick_choice(pred, "ABCD", []) == pick_choice(pred, "ABCD") == letter


@pytest.mark.parametrize("pred, letters, letter",
                         [("I think B", "ABCDEFGHI", "B"), ("I", "ABCDEFGHI", "I"),
                                                   ("H", "ABCDEFGHI", "H"), ("C", "AB", None),
                                                   ("A or C", "AB", None)])
def test_R6_only_the_questions_letters_are_valid(pred, letters, letter):
    assert pick_choice(pred, letters, []) == letter


@pytest.mark.parametrize("pred, options, letter", [
    ("Red.", ["red", "blue"], "A"), ("it is BLUE, surely", ["red", "blue"], "B"),
    ("red or blue", ["red", "blue"], None),
    ("10 cm. ", ["10", "10 cm"], "B"), ("about 10 cm", ["10", "10 cm"], None),
    ("reddish", ["red", "blue"], None),
    ("很red很", ["red", "blue"], "A"), ("ｒｅｄ", ["red", "blue"], "A"), ("red", ["ｒｅｄ", "blue"], "A"),
    ("2", ["1", "2"], "B"),
    ("x", ["x", "y"], None), ("the x", ["X", "y"], None), ("é", ["é", "y"], "A"),
    ("green", ["red", "blue"], None),
    ("The cat sat.", ["The cat sat.", "The cat"], "A"), ("red", ["red", "red"], None),
    ("so, red", ["", "red"], "B"),
    ("c++ (new)", ["c++", "java"], "A"), ("a red thing", ["red", "B"], "A"),
    ("abc x", ["a.c", "y z"], None)])
def test_R6_without_a_letter_exactly_one_option_text_must_be_said(pred, options, letter):
    assert pick_choice(pred, "AB", options) == letter


def test_R6_a_letter_comes_before_an_options_text():
    assert pick_choice("Answer: B, red", "AB", ["red", "blue"]) == "B"


# R7


@pytest.mark.parametrize("pred, gold, hit", [
    ("The answer is 5.", "5", True), ("5", "5.0", True), ("It is 5.004", "5", True),
    ("It is 5.006", "5", False),
    ("1,234", "1234", True), ("it is 1,234 km", "1234", True), ("about 1e3 m", "1000", True),
    ("-2", "-2", True),
    ("7 cats", "7", True), ("17 cats", "7", False), ("17", "7", False), ("it is .5 m", "0.5", True),
    ("12,5 m", "12", False),
    ("RED.", "red", True), ("so the answer is dark red", "red", True), ("red", "dark red", False),
    ("red, so the answer is blue", "red",
     False),  # only the tail counts, the shortest of them
    ("it is red\nit is blue", "red", True),                         # of each line
    ("x = 3\nso 7", "3", False), ("so 7\nx=3", "3", True),           # "=" counts in the last line
    ("red\nso blue", "red", False), ("the answer is :", "the answer", True),
    ("Thus it could be x", "x", True),
    ("cat", "a", False), ("plan a", "a", True),
    ("a", "a", True),  # one character counts beside a space only
    ("open 24/7", ["24/7", "3.429"], True), ("it is 3.43", ["24/7", "3.429"], True),
    ("24", ["24/7", "3.429"], False),
    ("5", [4, 5], True), ("it is [0, 1)", "[0, 1)", True), ("[red, blue]", "[red, blue]", True),
    ("it is red and is blue", "red", False), ("b", ["a", "b"], True), ("c", ["a", "b"], False),
    ("5 is yes =", "5", True), ("", "x", False)])
def test_R7_open_answers_of_MMMU(pred, gold, hit):
    assert mmmu_open(pred, gold) is hit


# R8


@pytest.mark.parametrize("pred, answers, dataset, hit", [
    ("The sign says STOP.", "stop", "IIIT5K", True), ("stop", ["go", "Stop"], "IIIT5K", True),
    ("sto", ["stop"], "IIIT5K", False),
    ("new\nyork", "New York", "IIIT5K", True), ("newyork", "new york", "IIIT5K", False),
    (" stop ", "\nstop\n", "IIIT5K", True),
    ("x ^ 2", ["x^2"], "HME100k", True), ("X^2", ["x^2"], "HME100k", False),
    ("x\n^2", "x ^ 2", "HME100k", True),
    ("x ^ 2", ["x^2"], "IIIT5K", False), ("y=x^2", "x^2", "HME100k", True)])
def test_R8_a_reference_must_be_inside_the_answer(pred, answers, dataset, hit):
    assert ocrbench(pred, answers, dataset) is hit


# R9


@pytest.mark.parametrize("pred, answers, score", [
    ("abcd", ["abcd"], 1), ("ABCD", ["abcd"], 1), ("abcd", ["ABCD"], 1), ("abcx", ["abcd"], 0.75),
    ("ab", ["abcd"], 0.5), ("a", ["abc"], 0),
    ("abc", ["abcdefg"], 0),  # exactly one half is kept
    ("abcx", ["zzzz", "abcd"], 0.75), ("a b", ["a \n b"], 1),
    ("a c", ["a   b"], 0.8),                # the distance is 1 of "a b", the length 5 as written
    (" a     ", ["ab"], 0.5),               # but the prediction is stripped first
    ("a", ["ß"], 0.5),                      # and upper case has two letters for ß
    ("", [""], 1), ("", ["a"], 0), ("", ["a", ""], 1)])
def test_R9_anls_drops_below_one_half_and_takes_lengths_as_written(pred, answers, score):
    assert anls(pred, answers) == pytest.approx(score, abs=1e-15)


def test_R9_a_single_string_is_one_reference():
    assert anls("abcx", "abcd") == 0.75


def test_R9_levenshtein_is_the_fewest_edits():
    @functools.cache
    def naive(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(naive(a[1:], b) + 1, naive(a, b[1:]) + 1, naive(a[1:], b[1:]) + (a[0] != b[0]))
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choice("abc") for _ in range(rng.randint(0, 7))) for _ in range(2))
        assert levenshtein(a, b) == naive(a, b), (a, b)


# R10


@pytest.mark.parametrize("text, tokens",
                         [  # what the Java tokeniser makes of them, less the punctuation
    ("The man's T-shirt.", "the man 's t-shirt"),
    ("girls' hats, left/right", "girls hats left/right"),
    ("can't cannot won't DON'T", "ca n't can not wo n't do n't"), ("couldn't've", "could n't 've"),
    ("they'd've", "they 'd 've"),
    ("gonna wanna gotta gimme lemme", "gon na wan na got ta gim me lem me"),
    ("'tis o'clock ma'am", "'t is o'clock ma'am"),
    ("(left) [x] {y}", "-lrb- left -rrb- -lsb- x -rsb- -lcb- y -rcb-"),
    ("man(left)", "man -lrb- left -rrb-"),
    ("\"left\" man ``x'' 'y'", "left man x y"), ("“hat” man’s don’t", "hat man 's do n't"),
    ("#23 and #1, $5 50%", "# 23 and # 1 $ 5 50 %"),
    ("1,000 3.5 12:30 1/2 7-11 +1", "1,000 3.5 12:30 1/2 7-11 +1"),
    ("10:30am 2nd 6ft 80s '80s 80's", "10:30 am 2nd 6ft 80s '80s 80 's"),
    ("6'2\" tall", "6 2 tall"),
    ("in U.S. shirt 5 p.m. clock", "in u.s. shirt 5 p.m. clock"),
    ("Mr. X, St. Louis etc.", "mr. x st. louis etc."),
    ("no. 5", "no. 5"), ("yes no. maybe ok.", "yes no maybe ok"),
    ("hmm... wait -- a--b – c… left.. right", "hmm wait a b c left right"),
    ("wow! wow!! what?!", "wow wow !! what ?!"),
    ("w/ hat red/white/blue w/o", "w / hat red/white/blue w/o"),
    ("-left left- a-b-c", "left left a-b-c"), ("a+b = x&y **z**", "a + b = x & y ** z **"),
    ("a_b hat.shirt", "a_b hat.shirt"),
    ("y'all", "y' all"), ("é café", "é café"), ("; : , . ! ? -", ""), ("", "")])
def test_R10_tokens_are_those_of_the_Java_tokeniser(text, tokens):
    assert ptb_tokenize(text) == tokens.split()


def test_R10_cider_by_hand():
    refs = [["Red cat."], ["blue dog"], ["cat", "owl"], ["big fox"], ["the"]]
    mean, scores = cider(["red cat", "dog", "cat cat", "", "the"], refs)
    # Words and word pairs are weighted by ln 5 less ln of
    # the number of cases that have them; "cat" is in two.
    w, cat = math.log(5), math.log(5) - math.log(2)
    assert scores[0] == pytest.approx(10 * (1 + 1 + 0 + 0) / 4), "no three words: cosines of n = 3 and 4 are 0"
    one = w * w / (w * math.hypot(w, w)) / 4
    assert scores[1] == pytest.approx(10 * one * math.exp(-1 / 72)), "one bigram less than the reference"
    clipped = cat * cat / (2 * cat * cat) / 4
    assert scores[2] == pytest.approx(10 * clipped * math.exp(-1 / 72) / 2), "clipped, and the mean over two references"
    assert scores[3] == 0 and scores[4] == pytest.approx(2.5)
    assert mean == pytest.approx(sum(scores) / 5)


def test_R10_words_of_every_case_weigh_nothing_and_a_case_alone_has_no_rare_words():
    assert cider(["the"], [["the"]]) == (0, [0])
    assert cider(["the", "the cat"], [["the dog"], ["the cat"]])[1] == [0, 5]
    assert cider(["x", "a"], [["a b", "a c"], ["z"]])[1] == [0, 0]


@pytest.mark.parametrize("extra", [0, 1, 2, 6])
def test_R10_the_length_of_a_sentence_is_its_number_of_bigrams_repeats_included(extra):
    """Ten repeats of one unknown word change nothing but the hypothesis's
    norm and length: here the unigram's cosine is w·w / (w·sqrt(w² +
    (extra·w)²)), and every word after the first adds one bigram."""
    _, (score, _) = cider(["cat" + " u" * extra, "q"], [["cat"], ["dog"]])
    assert score == pytest.approx(10 / math.hypot(1, extra) / 4 * math.exp(-extra ** 2 / 72))


def naive_cider(hyps, refs):
    """CIDEr over dense float64 vectors, from words that are split at spaces."""
    def grams(sentence, n):
        words = sentence.split()
        return [" ".join(words[i:i + n]) for i in range(len(words) - n + 1)]
    out = np.zeros((len(hyps), 4))
    for n in range(1, 5):
        vocabulary = sorted({g for s in [*hyps, *(r for group in refs for r in group)]
                             for g in grams(s, n)})
        seen = np.array([[any(g in grams(ref, n) for ref in group) for g in vocabulary]
                         for group in refs])
        idf = np.log(len(refs)) - np.log(np.maximum(1, seen.sum(0)))
        for i, (hyp, group) in enumerate(zip(hyps, refs)):
            for ref in group:
                h, r = (np.array([grams(s, n).count(g) for g in vocabulary]) * idf
                        for s in (hyp, ref))
                norm = np.linalg.norm(h) * np.linalg.norm(r)
                length = len(grams(hyp, 2)) - len(grams(ref, 2))
                out[i, n - 1] += (np.minimum(h, r) @ r / norm if norm else 0) * np.exp(-length ** 2 / 72) / len(group)
    return 10 * out.mean(1)


def test_R10_cider_equals_a_naive_loop_over_dense_vectors():
    rng = random.Random(0)

    def sentence():
        return " ".join(rng.choice(["red", "cat", "dog", "on", "left", "the", "man"])
                        for _ in range(rng.randint(0, 9)))
    refs = [[sentence() for _ in range(rng.randint(1, 4))] for _ in range(25)]
    hyps = [rng.choice([sentence(), group[0], group[0] + " " + group[-1]]) for group in refs]
    mean, scores = cider(hyps, refs)
    expected = naive_cider(hyps, refs)
    assert scores == pytest.approx(expected, abs=1e-12) and mean == pytest.approx(expected.mean(), abs=1e-12)
    assert max(scores) > 5 and len({round(s, 6) for s in scores}) > 15, "the cases must not be trivial"


def test_R10_sentences_without_references_are_refused():
    for hyps, refs in (([], []), (["a"], []), (["a"], [[]]), (["a"], [["a"], ["b"]])):
        with pytest.raises(ValueError):
            cider(hyps, refs)


# R11


@pytest.mark.parametrize("pred, ref, hit", [
    ("B", "B", True), ("The answer is B.", "B", True), ("Surely (D)", "D", True),
    ("b", "B", True), ("Banana", "B", False), ("A dog", "A", False),
    ("Yes.", "yes", True), (" two..", "Two", True), ("2", "two", False), ("two", "2", False),
    ("yes it is", "yes", False),
    ("E", "E", True), ("e", "E", True), ("The answer is E", "E", False)])
def test_R11_letters_by_R6_and_the_rest_as_written(pred, ref, hit):
    assert realworldqa(pred, ref) is hit


def test_every_rule_of_the_module_docstring_is_a_function_tested_here():
    rows = re.findall(r"^    (R\d+) +(.+?)  +", metrics.__doc__, re.M)
    assert [rule for rule, _ in rows] == [f"R{i}" for i in range(1, 12)]
    for rule, names in rows:
        assert all(name in globals() for name in names.split(", ")), (rule, names)
