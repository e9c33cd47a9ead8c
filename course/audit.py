"""Grade the grader: what does it say of known wrong solutions, and of known right ones?"""
import time

from course.grade import Key, execute, right

FLOOR = 0.95            # of the wrong solutions lose the points of the item they break, and
OTHERS = 3              # at most so many other items
TABLE = ["| assignment | rubric items | wrong solutions | caught | other items lost, mean "
         "| right solutions | full marks |", "|---|---|---|---|---|---|---|"]


def audit(name: str, seed: int) -> dict:
    """Numbers of one assignment for a row of TABLE, and lines that say what went wrong."""
    began = time.perf_counter()
    key, good = Key(name, seed), right(name)
    missed, false_alarms, others = [], [], 0
    for mistake, item, row in key.mistakes:
        lost = key.lost(row)
        if item == "everything":                    # a made-up answer: no item may be left
            caught = len(lost) == len(row)
        else:
            caught = item in lost and len(lost) <= 1 + OTHERS
            others += len(set(lost) - {item})
        if not caught:
            missed.append(f"{item}: {mistake} → {', '.join(lost) or 'nothing lost'}")
    for (way, _), row in zip(good, execute([sources for _, sources in good], key.items, seed)):
        lost = key.lost(row)
        if lost:
            false_alarms.append(f"{way} → {', '.join(lost)}: {[why for _, why in row if why]}")
    wrong = len(key.mistakes)
    columns = [name, len(key.items), wrong, wrong - len(missed), f"{others / wrong:.2f}", len(good),
               len(good) - len(false_alarms)]
    return {"row": "| " + " | ".join(map(str, columns)) + " |", "wrong": wrong, "right": len(good),
            "passes": len(missed) <= (1 - FLOOR) * wrong and not false_alarms, "missed": missed,
            "false_alarms": false_alarms, "seconds": time.perf_counter() - began}
