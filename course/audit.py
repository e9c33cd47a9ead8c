"""Grade the grader: what does it say of known wrong solutions, and of known right ones?"""
import time

from course.grade import Key, agree, right, run_all, wrong
from course.hidden import rubric

FLOOR = 0.95            # of the wrong solutions lose the points of the item they break, and
OTHERS = 3              # at most so many other items


def lost(results: list, key: Key) -> list[str]:
    """Names of the items whose points these results do not earn."""
    names = []
    for (got, _), want, item in zip(results, key.want, rubric(key.name)):
        if got is None or not agree(got, want, item):
            names.append(item.__name__)
    return names


def audit(name: str, seed: int) -> dict:
    """{"wrong", "killed", "others", "right", "full", "seconds", "missed": lines, "false_alarms": lines}"""
    began = time.perf_counter()
    key = Key(name, seed, mistakes=False)
    bad, good = wrong(name), right(name)
    results = run_all(name, [sources for *_, sources in bad + good], seed)
    missed, false_alarms, others = [], [], 0
    for (mistake, item, _), row in zip(bad, results):
        names = lost(row, key)
        if item == "everything":                    # a made-up answer: no item may be left
            caught = len(names) == len(row)
        else:
            caught = item in names and len(names) <= 1 + OTHERS
            others += len(set(names) - {item})
        if not caught:
            missed.append(f"{item}: {mistake} → {', '.join(names) or 'nothing lost'}")
    for (way, _), row in zip(good, results[len(bad):]):
        names = lost(row, key)
        if names:
            false_alarms.append(f"{way} → {', '.join(names)}: {[why for _, why in row if why]}")
    return {"assignment": name, "items": len(rubric(name)), "wrong": len(bad), "killed": len(bad) - len(missed),
            "others": others / max(1, len(bad)), "right": len(good), "full": len(good) - len(false_alarms),
            "seconds": time.perf_counter() - began, "missed": missed, "false_alarms": false_alarms}


def passes(row: dict) -> bool:
    return row["killed"] >= FLOOR * row["wrong"] and not row["false_alarms"]


def table(rows: list[dict]) -> str:
    lines = ["| assignment | rubric items | wrong solutions | caught | other items lost, mean | right solutions | "
             "full marks |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['assignment']} | {r['items']} | {r['wrong']} | {r['killed']} | {r['others']:.2f} | "
                     f"{r['right']} | {r['full']} |")
    return "\n".join(lines)
