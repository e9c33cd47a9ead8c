#!/usr/bin/env bash
# The papers' figures on the toy: CE, VDEP, VISTA and BASIC, three seeds each, then the same 200 pictures for every run.
# Needs: nothing. Makes: out/figures/{figures.json,attention.png,similarity.png,inside.html,runs.html} and the runs.
# Expected: the table of docs/figures.md, after about 40 minutes on 2 cores. STEPS=400 makes shorter runs; SEEDS=1 one.
# What is done already is kept: run it again after an interruption.
#
# figure                what is computed                                                        where it shows
# VDEP 1, 4             attention of the question's last token to the object asked for          the table, attention.png
# VISTA 2, 3            cosine of the shape's word with its patch; of the prompt with all       the table, similarity.png
# BASIC 2, 5, 7, 8, 10  nearest words of the patches by layer: whole words, the object's own    the table, inside.html
# BASIC 3, 9            answers when every patch is replaced by its nearest word                the table, inside.html
# MIR 1, 7              Fréchet distance by layer, with α and without                           the table, runs.html
# MIR 2                 both modalities in two dimensions, layer by layer                       inside.html
# MIR 4, 5              MIR against steps                                                       runs.html
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/figures}
for seed in ${SEEDS:-1 2 3}; do
    for loss in ce vdep vista basic; do
        folder=$out/$loss-$seed
        [ -f "$folder/results.json" ] && continue
        python train.py --loss "$loss" --seed "$seed" --out "$folder" --resume --mir-every 100 \
            ${STEPS:+--max-steps "$STEPS"}
    done
done
python -m runs.figures --run "$out"/*-[0-9] --out "$out"
