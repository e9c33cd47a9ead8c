"""Grade the grader: what does it say of known wrong solutions, and of known right ones?"""
from course.grade import Key, execute, solution

FLOOR = 0.95            # of the wrong solutions lose the points of the item they break, and
OTHERS = 3              # at most so many other items


def audit(name: str, seed: int) -> tuple[bool, dict, list[str]]:
    """True if the grader is good enough, a row of the table, and what was graded wrongly."""
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
    solutions = [sources | {m: f"{sources[m]}\n\n{code}"} for _, m, code in key.known.RIGHT]
    for (way, *_), row in zip(key.known.RIGHT, execute(solutions, key.items, seed)):
        if lost := key.judge(row):
            complaints.append(f"{name}: a right solution, {way}, loses {lost}")
    refused = len(complaints) - missed
    row = {"assignment": name, "rubric items": len(key.items), "wrong solutions": wrong,
           "caught": wrong - missed, "other items lost, mean": f"{others / wrong:.2f}",
           "right solutions": len(solutions), "full marks": len(solutions) - refused}
    return wrong - missed >= FLOOR * wrong and not refused, row, complaints
