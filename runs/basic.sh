#!/usr/bin/env bash
# BASIC and CE with several language models and vision encoders, on LLaVA-1.5's data and settings. The pairs under `paper`
# are combinations of table 3's encoders and Vicuna models. Those under `ours` are further models that this repository
# reads: no number of the paper belongs to them.
#     runs/basic.sh                              all pairs, one after another; pairs with a folder in out/basic are skipped
# Needs: the folders listed below in weights, and LLaVA-1.5's data (see runs/llava.sh).
# Makes: out/basic/VISION+LLM/LOSS/1 and /2.
# Expected: the hours of runs/llava.sh for each run (7b 13.5, 13b 25.5 on 8 × A100, as LLaVA reports for its own code);
# for the others in proportion to their size. BASIC takes 5 % longer than CE, estimated from small models by
# bench/losses.py.
set -euo pipefail
cd "$(dirname "$0")/.."
paper=(
    "clip-vit-large-patch14-336 vicuna-7b-v1.5" "clip-vit-large-patch14-336 vicuna-13b-v1.5"
    "siglip-so400m-patch14-384 vicuna-7b-v1.5" "siglip-so400m-patch14-384 vicuna-13b-v1.5"
)
ours=(
    "clip-vit-large-patch14 vicuna-7b-v1.5" "clip-vit-large-patch14-336 Llama-2-7b-chat-hf"
    "clip-vit-large-patch14-336 Mistral-7B-Instruct-v0.1" "clip-vit-large-patch14-336 phi-2"
    "clip-vit-large-patch14-336 Phi-3-mini-4k-instruct" "clip-vit-large-patch14-336 gemma-2b"
)
for pair in "${paper[@]}" "${ours[@]}"; do
    read -r vision llm <<< "$pair"
    for loss in ce basic; do
        out=out/basic/$vision+$llm/$loss
        [ -d "$out" ] || VISION=weights/$vision LLM=weights/$llm OUT=$out runs/llava.sh "$llm" $loss "$@"
    done
done
