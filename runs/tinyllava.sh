#!/usr/bin/env bash
# TinyLLaVA-3B, 2402.14289: SigLIP so400m and Phi-2, LLaVA-1.5's data and settings, 728 image tokens as in its release.
#     runs/tinyllava.sh ce                       any objective; flags behind it go to both stages
# Needs weights/siglip-so400m-patch14-384, weights/phi-2, and LLaVA-1.5's data (runs/llava.sh).
# Expected, estimated (bench/memory.py): 14 GiB a GPU in stage 1, 13 in stage 2 on 8; about half of 7b's hours.
set -euo pipefail
cd "$(dirname "$0")/.."
loss=$1; shift
VISION=weights/siglip-so400m-patch14-384 LLM=weights/phi-2 OUT=${OUT:-out/tinyllava-$loss} \
    runs/llava.sh phi-2 "$loss" --drop-first-patch "$@"
