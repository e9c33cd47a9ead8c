#!/usr/bin/env bash
# The checks of MIR's paper (§2.2, table 6, figures 4, 7 and 8) on runs of the toy:
#     runs/mir.sh out/toy-seed1 out/toy-seed2 …        (unset: out/toy)
# Needs: toy runs. (python train.py --mir-every 25 --out out/toy also records the curve over steps.)
# Makes: tables on the terminal, and every number in out/mir-study.json.
# Expected: about half a minute a run on one idle core.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m runs.mir "${@:-out/toy}"
