#!/usr/bin/env bash
# The papers' figures on the toy: trains CE, VDEP, VISTA and BASIC, three seeds each, then asks every model about the
# same 200 pictures. Expected: the tables and pictures of docs/figures.md, after about 50 minutes on 2 idle cores.
#     runs/figures.sh [OUT]            STEPS=400 SEEDS=1 runs/figures.sh: shorter runs, one seed
# What is done already is kept: run it again after an interruption.
#
# figure                what is computed                                                              where
# VDEP 1, 4             attention of the question's last token: the share of the object asked for     figures.py
# VISTA 2, 3            cosine of the word "circle", and of the prompt, with the circle's patch       figures.py
# BASIC 2, 5, 7, 8, 10  nearest words of the patches by layer: whole words, the object's own words    figures.py
# BASIC 3, 9            answers when every patch is replaced by its nearest word                      figures.py
# MIR 1, 7              Fréchet distance by layer, with α and without                                 figures.py
# MIR 2                 both modalities in two dimensions                                             pages below
# MIR 4, 5              MIR against steps (--mir-every)                                               runs.html
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/figures}
steps=${STEPS:-}
mkdir -p "$out"
for seed in ${SEEDS:-1 2 3}; do
    for loss in ce vdep vista basic; do
        folder=$out/$loss-$seed
        [ -f "$folder/results.json" ] && continue
        python train.py --loss "$loss" --seed "$seed" --out "$folder" --resume --mir-every 100 ${steps:+--max-steps "$steps"}
    done
done
python -m runs.figures --run "$out"/*-[0-9] --out "$out"
python -m look --run "$out"/*-[0-9] --out "$out/runs.html"
first=${SEEDS:-1}
first=${first%% *}
python -m look --ckpt "$out"/{ce,vdep,vista,basic}-"$first" --image "$out/picture.png" \
    --prompt "What colour is the circle?" --out "$out/inside.html" --json "$out/inside.json"
