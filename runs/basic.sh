#!/usr/bin/env bash
# BASIC beside CE over language models and vision encoders, LLaVA-1.5's data and settings: the pairs this repository reads.
#     runs/basic.sh                              all of them, one after another; done ones are kept (their folder is there)
# Needs the folders below in weights, and LLaVA-1.5's data (runs/llava.sh).
# Expected: as runs/llava.sh for each (7b and 13b: 13.5 and 25.5 h on 8 × A100, as LLaVA reports for its code); estimated
# for the others by size. BASIC costs 5 % more time than CE, estimated from small models (bench/losses.py).
set -euo pipefail
cd "$(dirname "$0")/.."
pairs=(
    "clip-vit-large-patch14-336 vicuna-7b-v1.5" "clip-vit-large-patch14-336 vicuna-13b-v1.5"
    "clip-vit-large-patch14 vicuna-7b-v1.5" "siglip-so400m-patch14-384 vicuna-7b-v1.5"
    "clip-vit-large-patch14-336 Llama-2-7b-chat-hf" "clip-vit-large-patch14-336 Mistral-7B-Instruct-v0.1"
    "clip-vit-large-patch14-336 phi-2" "clip-vit-large-patch14-336 Phi-3-mini-4k-instruct" "clip-vit-large-patch14-336 gemma-2b"
)
for pair in "${pairs[@]}"; do
    read -r vision llm <<< "$pair"
    for loss in ce basic; do
        out=out/basic/$vision+$llm/$loss
        [ -d "$out" ] || VISION=weights/$vision LLM=weights/$llm OUT=$out runs/llava.sh "$llm" $loss "$@"
    done
done
