#!/usr/bin/env bash
# The papers' ablation tables that are flags alone, on the toy or on LLaVA-1.5's data.
#     runs/ablations.sh vdep-alpha|vdep-ratio|vdep-distance|vista-distance|basic-losses|basic-weights|basic-k|connectors [7b]
# vdep-…: VDEP's tables of α, of the ratio (joint: both losses on one sample) and of the distance. vista-distance:
# VISTA's. basic-losses and basic-weights: BASIC's tables 2 and 4; basic-k: its figure 6. The values of k, and the rows
# for reduce and shift, are ours: the papers name the quantity, not these rows. connectors: MIR's table 4.
# Needs: nothing for the toy. 7b: the weights and data of runs/llava.sh. SHARE=50000 takes the first 50,000 samples of
# both files, as BASIC's ablations use a share of the data (which share is ours).
# Makes: out/ablations/TABLE/ROW-SEED on the toy (seeds 1 to 3), and the table; out/ablations-7b/TABLE/ROW for 7b.
# Expected: on the toy about the time of runs/toy.sh for each row; docs/objectives.md has the table of connectors.
set -euo pipefail
cd "$(dirname "$0")/.."
case $1 in
    vdep-alpha) loss=vdep rows=("a.1 --vdep-alpha 0.1" "a.01 --vdep-alpha 0.01" "a.001 --vdep-alpha 0.001") ;;
    vdep-ratio) loss=vdep rows=("r.5 --vdep-ratio 0.5" "r.8 --vdep-ratio 0.8" "r1 --vdep-ratio 1.0" "joint --vdep-joint") ;;
    vdep-distance) loss=vdep rows=("l2 --vdep-distance l2" "inverse --vdep-distance inverse"
        "sigmoid --vdep-distance sigmoid" "sum --vdep-reduce sum" "same --vdep-shift 0") ;;
    vista-distance) loss=vista rows=("l2 --vista-distance l2" "cosine --vista-distance cosine"
        "t --vista-weighting t" "one --vista-weighting 1" "sum --vista-reduce sum") ;;
    basic-losses) loss=basic rows=("both --basic-das 1.0" "das --basic-sds 0" "sds --basic-das 0" "none --basic-das 0 --basic-sds 0") ;;
    basic-weights) loss=basic rows=("increasing --basic-weights increasing" "constant --basic-weights constant"
        "decreasing --basic-weights decreasing" "equal --basic-degree equal") ;;
    basic-k) loss=basic rows=("k1 --basic-k 1" "k2 --basic-k 2" "k3 --basic-k 3" "k4 --basic-k 4") ;;
    connectors) loss=ce rows=("linear --connector linear" "mlp2x --connector mlp2x" "mlp4x --connector mlp4x"
        "qformer --connector qformer") ;;
    *) echo "the tables are vdep-alpha, vdep-ratio, vdep-distance, vista-distance, basic-losses, basic-weights, basic-k," \
            "connectors" >&2
       exit 2 ;;
esac
for row in "${rows[@]}"; do
    name=${row%% *} flags=${row#* }
    if [ "${2:-toy}" = 7b ]; then
        if [ "$name" = qformer ]; then export PRETRAIN="--lr 1e-4"; fi                # MIR's scripts
        case $name in k1) flags="--basic-k 4" ;; k2) flags="--basic-k 8" ;; k3) flags="--basic-k 16" ;; k4) flags="--basic-k 32" ;; esac
        steps=""
        if [ -n "${SHARE:-}" ]; then steps="--max-steps $((SHARE / 256))"; fi
        # shellcheck disable=SC2086
        OUT=out/ablations-7b/$1/$name runs/llava.sh 7b $loss $flags $steps
    else
        for seed in 1 2 3; do
            folder=out/ablations/$1/$name-$seed
            [ -f "$folder/results.json" ] && continue
            if [ "$name" = qformer ]; then      # a tenth of the toy's rate in stage 1; at all of it the queries become equal
                first=out/ablations/$1/$name-stage1-$seed
                python train.py --stage pretrain --connector qformer --lr 1e-3 --seed $seed --out "$first" --resume
                flags="--stage finetune --projector $first"
            fi
            # shellcheck disable=SC2086
            python train.py --loss $loss $flags --seed $seed --out "$folder" --resume
        done
    fi
done
[ "${2:-toy}" = 7b ] || python -m runs.compare "out/ablations/$1"
