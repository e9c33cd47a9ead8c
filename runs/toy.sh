#!/usr/bin/env bash
# The toy, three seeds: the numbers of README's first table.
# Expected: about 2.5 minutes a seed on 2 cores, under 1 GiB.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
    python train.py --seed $seed --out out/toy-seed$seed
done
python - <<'PYTHON'
import json
import statistics
runs = [json.load(open(f"out/toy-seed{seed}/results.json")) for seed in (1, 2, 3)]
rows = {"test": ("accuracy", "test"), "unseen pairs": ("accuracy", "composition"), "test, images shuffled": ("shuffled", "test")}
for name, (kind, split) in rows.items():
    print(f"{name:22}", *(f"{c} {statistics.mean(v):.1f}±{statistics.stdev(v):.1f}" for c in runs[0][kind][split]
                          for v in [[r[kind][split][c] for r in runs]]), sep="  ")
for stage in runs[0]["mir"]:
    v = [r["mir"][stage] for r in runs]
    print(f"MIR after {stage}: {statistics.mean(v):.3f}±{statistics.stdev(v):.3f}")
PYTHON
