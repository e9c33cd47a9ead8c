#!/usr/bin/env bash
# The toy over three seeds: the table of results in README.
# Needs: nothing. Makes: out/toy-seed1 to 3, and prints mean ± standard deviation by category, and MIR.
# Expected: README's table, up to what it says of other machines; minutes a seed on 2 cores, under 1 GiB.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 1 2 3; do
    [ -f out/toy-seed$seed/results.json ] || python train.py --seed $seed --out out/toy-seed$seed --resume
done
python -m runs.compare --by-category out/toy-seed1 out/toy-seed2 out/toy-seed3
