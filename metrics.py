"""Scorers: pure functions of strings, standard library only."""
import string

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(prediction: str, reference: str) -> bool:
    """GQA's exact match: equal after strip, lower case and deletion of ASCII punctuation, on both sides."""
    a, b = (s.strip().lower().translate(NO_PUNCTUATION) for s in (prediction, reference))
    return a == b


def accuracy(rows: list[tuple[str, str, str]]) -> dict[str, float]:
    """Percent of exact matches per category, and their mean: rows of (category, prediction, reference)."""
    hits = {}
    for category, prediction, reference in rows:
        hits.setdefault(category, []).append(exact(prediction, reference))
    result = {category: 100 * sum(h) / len(h) for category, h in hits.items()}
    return {**result, "mean": sum(result.values()) / len(result)} if result else {}
