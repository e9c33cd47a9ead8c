#!/usr/bin/env bash
# The checks of MIR's paper (§2.2, table 6, figures 4, 7 and 8) on runs of the toy:
#     runs/mir.sh out/toy-seed1 out/toy-seed2 …        (unset: out/toy)
# Make the runs first: python train.py --mir-every 25 --out out/toy gives the curve too.
# Expected: about half a minute a run on one idle core; prints tables, writes every number to out/mir-study.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python - "${@:-out/toy}" <<'PYTHON'
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

import mir
import weights
from data import read_jsonl
from pairing import read_pairs, sample
from toy import world

NS, SEEDS = (10, 20, 50, 100, 200), range(10)            # the paper draws ten sets of each size, too


def fresh(split, n, folder):
    """n pairs of new pictures of a split and their captions."""
    rng, out = random.Random(f"mir {split}"), []
    for i in range(n):
        scene = world.draw_from(split, rng)
        world.render(scene, rng).save(folder / f"{split}_{i}.png")
        out.append(sample(f"{split}_{i}.png", world.inventory(scene, rng)))
    return out


def moved(samples):
    """Every image with the next one's text."""
    texts = [s["conversations"] for s in samples]
    return [{**s, "conversations": t} for s, t in zip(samples, texts[1:] + texts[:1])]


def study(run, unseen, folder):
    """All numbers of one run, by stage."""
    data, images, out = run / "data", run / "data" / "images", {}
    for stage in ("pretrain", "finetune"):
        ckpt = weights.checkpoints(run, stage)[-1]
        model = weights.load(ckpt)

        def measure(samples, images, template="v1", **options):
            return mir.measure(model, list(mir.batches_of(ckpt, samples, images, template, 20)), **options)
        first = read_pairs(data / "val.jsonl", images, 100)
        seen = read_pairs(data / "pretrain.json", images, 100, seed=0)
        seen = [sample(s["image"], s["conversations"][1]["value"]) for s in seen]      # the caption alone, as in unseen
        out[stage] = {
            "questions": measure(first, images),
            "drop": measure(first, images, outliers="drop"),
            "released": measure(first, images, mode="released"),
            "newton-schulz": measure(first, images, mode="newton-schulz"),
            "no normalisation": measure(first, images, normalise=False),
            "questions, plain": measure(first, images, "plain"),
            "captions, seen": measure(seen, images),
            "captions, unseen": measure(unseen["val"], folder),
            "captions, unseen, plain": measure(unseen["val"], folder, "plain"),
            "captions of other pictures": measure(moved(unseen["val"]), folder),
            "captions, unseen pairs": measure(unseen["composition"], folder),
        }
        out[stage]["samples"] = {n: [measure(read_pairs(data / "val.jsonl", images, n, seed), images)["mir"]
                                     for seed in SEEDS] for n in NS}
    return out


def ranks(values):
    return [sorted(values).index(v) for v in values]


unseen_folder = tempfile.TemporaryDirectory()
folder = Path(unseen_folder.name)
unseen = {split: fresh(split, 100, folder) for split in ("val", "composition")}
runs = [Path(a) for a in sys.argv[1:]]
results = {}
for run in runs:
    results[str(run)] = r = study(run, unseen, folder)
    print(f"\n{run}{'':30}after stage 1        after stage 2")
    for name in r["pretrain"]:
        if name != "samples":
            row = [r[s][name] for s in ("pretrain", "finetune")]
            print(f"  {name:30}" + "".join(f"{m['mir']:8.3f} (CE {m['answer_ce']:5.2f})" for m in row))
    for n in NS:
        cells = (r[s]["samples"][n] for s in ("pretrain", "finetune"))
        print(f"  {n:4} questions, {len(SEEDS)} seeds       " + "".join(
            f"{statistics.mean(v):8.3f} {min(v):.3f}..{max(v):.3f}" for v in cells))
    print("  by layer      " + "  ".join(f"{s}: " + " ".join(f"{d:.2f}" for d in r[s]["questions"]["layers"]) for s in r))
    print("  without α     " + "  ".join(f"{s}: " + " ".join(f"{d:.0f}" for d in r[s]["no normalisation"]["layers"])
                                         for s in r))
    r["curve"] = [line for line in read_jsonl(run / "metrics.jsonl") if line.get("kind") == "mir"]
    for line in r["curve"]:
        print(f"  {line['stage']:9} step {line['step']:5}  MIR {line['mir']:.3f}  CE {line['answer_ce']:.3f}  "
              f"|V| {line['V_norm']:6.1f}  |h| {line['h_norm']:.1f}")

print("\nrun: MIR, |V|, CE on questions after stage 1; the same after stage 2; accuracy on test, on unseen pairs")
table = []
for run in runs:
    accuracy = json.loads((run / "results.json").read_text())["accuracy"]
    row = [results[str(run)][s]["questions"][k] for s in ("pretrain", "finetune") for k in ("mir", "V_norm", "answer_ce")]
    table.append([*row, *(accuracy[name]["mean"] for name in ("test", "composition"))])
    print(f"{run}: " + "  ".join(f"{v:.3f}" for v in table[-1]))
results["accuracy"] = dict(zip(map(str, runs), (row[-2:] for row in table)))
if len(runs) > 2:
    columns = list(zip(*table))
    for name, column in zip(("MIR", "|V|", "CE"), columns):
        for kind, wanted in (("test", columns[-2]), ("unseen pairs", columns[-1])):
            if len(set(column)) > 1 and len(set(wanted)) > 1:
                rho = statistics.correlation(ranks(column), ranks(wanted))
                print(f"rank correlation of {name} after stage 1 with accuracy on {kind}: {rho:+.2f} (n = {len(runs)})")
Path("out").mkdir(exist_ok=True)
Path("out/mir-study.json").write_text(json.dumps(results, indent=1) + "\n")
PYTHON
