#!/usr/bin/env bash
# The objectives side by side on the toy: 5 methods × 3 seeds × both stages at the papers' coefficients, then variants.
# Expected: about 3 minutes a run on 2 cores (VDEP 4: its stage 1 is twice as long); prints LOG.md's table. Two runs at a
# time, a thread each. What is done already is kept: run it again after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/compare}
runs=(
    "ce" "vdep --loss vdep" "vista --loss vista" "basic --loss basic" "moca --moca"
    "vdep-a.01 --loss vdep --vdep-alpha 0.01" "vdep-a.1 --loss vdep --vdep-alpha 0.1"
    "basic-.01 --loss basic --basic-das 0.01" "vista-cosine --loss vista --vista-distance cosine"
)
one() {
    out=$1; seed=$2; name=${3%% *}; flags=${3#"$name"}
    folder=$out/$name-$seed
    [ -f "$folder/results.json" ] && return
    export OMP_NUM_THREADS=1
    # shellcheck disable=SC2086
    python train.py --seed "$seed" --out "$folder" --resume $flags > "$out/$name-$seed.log" 2>&1 || echo "$name $seed failed: $out/$name-$seed.log"
}
export -f one
mkdir -p "$out"
for run in "${runs[@]}"; do for seed in 1 2 3; do printf '%s\0%s\0%s\0' "$out" $seed "$run"; done; done |
    xargs -0 -n 3 -P "${JOBS:-2}" bash -c 'one "$@"' _
python runs/compare.py "$out"
