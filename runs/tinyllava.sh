#!/usr/bin/env bash
# TinyLLaVA-3B, 2402.14289: SigLIP so400m and Phi-2, with LLaVA-1.5's data and settings, 728 image tokens as released.
#     runs/tinyllava.sh ce                       any objective; flags after it go to both stages
# Needs: weights/siglip-so400m-patch14-384, weights/phi-2, and LLaVA-1.5's data (see runs/llava.sh).
# Makes: out/tinyllava-LOSS/1 and /2.
# Expected, estimated by bench/memory.py: 14 GiB a GPU in stage 1, 13 in stage 2 on 8 GPUs; about half the hours of 7b.
set -euo pipefail
cd "$(dirname "$0")/.."
loss=$1; shift
VISION=weights/siglip-so400m-patch14-384 LLM=weights/phi-2 OUT=${OUT:-out/tinyllava-$loss} \
    runs/llava.sh phi-2 "$loss" --drop-first-patch "$@"
