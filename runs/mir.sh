#!/usr/bin/env bash
# The checks of MIR's paper (§2.2, table 6, figures 4, 7 and 8) on runs of the toy:
#     runs/mir.sh out/toy-seed1 out/toy-seed2 …        (unset: out/toy)
# Make the runs first: python train.py --mir-every 25 --out out/toy gives the curve too.
# Expected: about half a minute a run on one idle core; prints tables, writes every number to out/mir-study.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m runs.mir "${@:-out/toy}"
