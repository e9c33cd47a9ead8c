"""The checks of MIR's paper (§2.2, table 6, figures 4, 7, 8) on runs of the toy, for runs/mir.sh.

    python -m runs.mir out/toy-seed1 out/toy-seed2 …

Prints tables and writes every number to out/mir-study.json. With three runs or more it ends with
rank correlations of MIR, |V| and the loss after stage 1 with accuracy.
"""
import random
import statistics
import sys
import tempfile
from pathlib import Path

from common import flags
from common.files import read_jsonl, write_json
from hub.checkpoint import checkpoints, load_model
from hub.pairs import pair_batches, read_pairs, sample
from mir import measure
from runs.compare import read_results
from toy import world

STAGES = ("pretrain", "finetune")
NS, SEEDS = (10, 20, 50, 100, 200), range(10)              # ten sets of each size, as in the paper


# -------------------------------------------------------------------------------------------- pairs
def new_pictures(split: str, n: int, folder: Path) -> list[dict]:
    """n pairs of new pictures of a split, written to `folder`, and their captions."""
    rng, pairs = random.Random(f"mir {split}"), []
    for i in range(n):
        scene = world.draw_from(split, rng)
        world.render(scene, rng).save(folder / f"{split}_{i}.png")
        pairs.append(sample(f"{split}_{i}.png", world.caption(scene, rng)))
    return pairs


def shifted(pairs: list[dict]) -> list[dict]:
    """Every image with the next one's text."""
    texts = [p["conversations"] for p in pairs]
    texts = texts[1:] + texts[:1]
    return [{**p, "conversations": text} for p, text in zip(pairs, texts)]


# ---------------------------------------------------------------------------------------- measuring
def study_stage(run: Path, stage: str, unseen: dict[str, list[dict]], folder: Path) -> dict:
    """All measurements of a stage's last checkpoint, by name; "samples": MIR by number of pairs."""
    data, images = run / "data", run / "data" / "images"
    ckpt = checkpoints(run, stage)[-1]
    model = load_model(ckpt)

    def on(pairs: list[dict], where: Path, template: str = "v1", as_released: bool = False, **options) -> dict:
        return measure(model, pair_batches(ckpt, pairs, where, template, as_released=as_released),
                       **options)

    questions = read_pairs(data / "val.jsonl", images, 100)
    seen = []                                              # captions alone, as the unseen ones are
    for s in read_pairs(data / "pretrain.json", images, 100, seed=0):
        seen.append(sample(s["image"], s["conversations"][1]["value"]))
    results = {
        "questions": on(questions, images),
        "drop": on(questions, images, outliers="drop"),
        "released": on(questions, images, mode="released"),
        "newton-schulz": on(questions, images, mode="newton-schulz"),
        "no normalisation": on(questions, images, normalise=False),
        "questions, plain": on(questions, images, "plain"),
        "questions, inputs as released": on(questions, images, as_released=True),
        "captions, seen": on(seen, images),
        "captions, unseen": on(unseen["val"], folder),
        "captions, unseen, plain": on(unseen["val"], folder, "plain"),
        "captions, unseen, inputs as released": on(unseen["val"], folder, as_released=True),
        "captions of other pictures": on(shifted(unseen["val"]), folder),
        "captions, unseen pairs": on(unseen["composition"], folder),
        "samples": {},
    }
    for n in NS:
        drawn = [read_pairs(data / "val.jsonl", images, n, seed) for seed in SEEDS]
        results["samples"][n] = [on(pairs, images)["mir"] for pairs in drawn]
    return results


# ------------------------------------------------------------------------------------------- tables
def show(run: Path, results: dict) -> None:
    """Print one run: a row a measurement, its layers, its curve."""
    print(f"\n{run}{'':30}after stage 1        after stage 2")
    for name in results["pretrain"]:
        if name == "samples":
            continue
        cells = ""
        for stage in STAGES:
            m = results[stage][name]
            cells += f"{m['mir']:8.3f} (CE {m['answer_ce']:5.2f})"
        print(f"  {name:38}" + cells)
    for n in NS:
        cells = ""
        for stage in STAGES:
            drawn = results[stage]["samples"][n]
            cells += f"{statistics.mean(drawn):8.3f} {min(drawn):.3f}..{max(drawn):.3f}"
        print(f"  {n:4} questions, {len(SEEDS)} seeds               " + cells)
    for title, name, digits in (("by layer", "questions", 2), ("without α", "no normalisation", 0)):
        for stage in STAGES:
            layers = " ".join(f"{d:.{digits}f}" for d in results[stage][name]["layers"])
            print(f"  {title:10} {stage}: {layers}")
    for line in results["curve"]:
        print(f"  {line['stage']:9} step {line['step']:5}  MIR {line['mir']:.3f}  "
              f"CE {line['answer_ce']:.3f}  |V| {line['V_norm']:6.1f}  |h| {line['h_norm']:.1f}")


def ranks(values) -> list[int]:
    order = sorted(values)
    return [order.index(v) for v in values]


def correlate(table: list[list[float]]) -> None:
    """Print rank correlations. table: a row a run, as `main` prints it."""
    columns = list(zip(*table))
    for name, column in zip(("MIR", "|V|", "CE"), columns):
        for kind, wanted in (("test", columns[-2]), ("unseen pairs", columns[-1])):
            if len(set(column)) > 1 and len(set(wanted)) > 1:
                rho = statistics.correlation(ranks(column), ranks(wanted))
                print(f"rank correlation of {name} after stage 1 with accuracy on {kind}: "
                      f"{rho:+.2f} (n = {len(table)})")


def main() -> None:
    runs, results, table = [Path(a) for a in sys.argv[1:]], {}, []
    if not runs:
        raise flags.UserError("give the --out folders of runs of the toy: python -m runs.mir out/toy-seed1 …")
    finished = {run: read_results(run / "results.json") for run in runs}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        unseen = {split: new_pictures(split, 100, folder) for split in ("val", "composition")}
        for run in runs:
            found = {stage: study_stage(run, stage, unseen, folder) for stage in STAGES}
            log = read_jsonl(run / "metrics.jsonl")
            found["curve"] = [line for line in log if line.get("kind") == "mir"]
            found["accuracy"] = finished[run]["accuracy"]
            results[str(run)] = found
            show(run, found)
    print("\nrun: MIR, |V|, CE on questions after stage 1; the same after stage 2; accuracy on "
          "test, on unseen pairs")
    for run, found in results.items():
        row = []
        for stage in STAGES:
            row += [found[stage]["questions"][key] for key in ("mir", "V_norm", "answer_ce")]
        row += [found["accuracy"][name]["mean"] for name in ("test", "composition")]
        table.append(row)
        print(f"{run}: " + "  ".join(f"{v:.3f}" for v in row))
    if len(runs) > 2:
        correlate(table)
    Path("out").mkdir(exist_ok=True)
    write_json(Path("out/mir-study.json"), results)


if __name__ == "__main__":
    flags.run(main)
