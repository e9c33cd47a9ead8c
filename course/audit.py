"""Grade the grader: what does it say of known wrong solutions, and of known right ones?"""
import importlib

from course.grade import Key, execute, solution

FLOOR = 0.95            # of the wrong solutions lose the points of the item they break, and
OTHERS = 3              # at most so many other items


def audit(name: str, seed: int) -> tuple[dict, list[str]]:
    """A row of the table, and lines about solutions that were not graded as they should be."""
    key, complaints, others = Key(name, seed), [], 0
    for mistake, item, results in key.mistakes:
        lost = key.judge(results)
        if item == "everything":                    # a made-up answer: no item may be left
            caught = len(lost) == len(key.items)
        else:
            caught = item in lost and len(lost) <= 1 + OTHERS
            others += len(lost.keys() - {item})
        if not caught:
            complaints.append(f"{name}: {mistake}: of {item} it loses {list(lost)}")
    wrong, missed, sources = len(key.mistakes), len(complaints), solution(name)
    known = importlib.import_module(f"course.mutants.{name}").RIGHT
    solutions = [sources | {m: f"{sources[m]}\n\n{code}"} for _, m, code in known]
    for (way, *_), row in zip(known, execute(solutions, key.items, seed)):
        if lost := key.judge(row):
            complaints.append(f"{name}: a right solution, {way}, loses {lost}")
    full = len(known) + missed - len(complaints)
    return {"assignment": name, "rubric items": len(key.items), "wrong solutions": wrong,
            "caught": wrong - missed, "other items lost, mean": f"{others / wrong:.2f}",
            "right solutions": len(known), "full marks": full}, complaints


def passes(row: dict) -> bool:
    caught, full = row["caught"] / row["wrong solutions"], row["full marks"]
    return caught >= FLOOR and full == row["right solutions"]


def table(rows: list[dict]) -> str:
    cells = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)
