#!/usr/bin/env bash
# The objectives side by side on the toy: five methods, three seeds, both stages, at the papers' coefficients. Then BASIC
# with a smaller weight, and a control for VDEP. VDEP's stage 1 has twice the steps, so the control has as many steps of
# cross-entropy with half the batch.
#     runs/compare.sh [OUT]                      JOBS=1: one run at a time instead of two
# Needs: nothing. Makes: OUT (unset: out/compare) with a folder and a log per run, and prints the table.
# Expected: the comparison in docs/objectives.md, up to what it says of other machines; measured on one machine: about an
# hour on 2 cores with two runs at a time, a thread each, under 1 GiB a run. Start it again after an interruption: what
# is done is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/compare}
runs=(
    "ce" "vdep --loss vdep" "vista --loss vista" "basic --loss basic" "moca --moca"
    "basic.01 --loss basic --basic-das 0.01" "control --stage pretrain --global-batch 24"
)
one() {
    out=$1; seed=$2; name=${3%% *}; flags=${3#"$name"}
    folder=$out/$name-$seed
    [ -f "$folder/results.json" ] && return
    export OMP_NUM_THREADS=1
    # shellcheck disable=SC2086
    python train.py --seed "$seed" --out "$folder" --resume $flags > "$out/$name-$seed.log" 2>&1 \
        || echo "$name $seed failed: $out/$name-$seed.log says why"
}
export -f one
mkdir -p "$out"
for run in "${runs[@]}"; do for seed in 1 2 3; do printf '%s\0%s\0%s\0' "$out" $seed "$run"; done; done |
    xargs -0 -n 3 -P "${JOBS:-2}" bash -c 'one "$@"' _
python -m runs.compare "$out"
