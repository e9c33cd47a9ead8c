#!/usr/bin/env bash
# Unlock more than the projector in stage 1, as ShareGPT4V (2311.12793) and table 3 of MIR's paper (2410.07167) do.
#     runs/unlock.sh none|half|all none|half|all         of the vision encoder, of the language model; then flags
# Stage 1 starts from LLaVA-1.5's projector, with lr 2e-5 for all that is trained. Stage 2 trains projector and language
# model. half: ViT layers 13 to 24, LLM layers 1 to 16, as in MIR's released scripts (ShareGPT4V: half, all).
# Needs: the weights of runs/llava.sh; its stage-1 output in out/llava-7b-ce/1, or LLaVA's mm_projector.bin in a folder
# (PROJECTOR=folder); data/share-captioner_coco_lcs_sam_1246k_1107.json with its images in data; LLaVA-1.5's stage-2 data.
# Makes: out/unlock-VISION-LLM/1 and /2.
# Expected, estimated: 25 GiB a GPU on 8 GPUs (bench/memory.py); stage 1 20 h on 8 × A100 for 1.2 million long captions.
# Table 3 used about 1.9 million captions: ours is the share of them that is published as one file. Give the rest with a
# JSON of your own (CAPTIONS=FILE), and expect hours in proportion.
set -euo pipefail
cd "$(dirname "$0")/.."
vision=$1 llm=$2; shift 2
out=out/unlock-$vision-$llm
run="torchrun --nproc_per_node=${GPUS:-8} train.py"
base="--vision weights/clip-vit-large-patch14-336 --llm weights/vicuna-7b-v1.5"
# shellcheck disable=SC2086
$run --stage pretrain $base --projector "${PROJECTOR:-out/llava-7b-ce/1}" --unlock-vision "$vision" --unlock-llm "$llm" \
    --lr 2e-5 --data "${CAPTIONS:-data/share-captioner_coco_lcs_sam_1246k_1107.json}" --images data --out "$out/1" "$@"
first=$(echo "$out"/1/pretrain-*)                         # its checkpoint holds all that was trained
# shellcheck disable=SC2086
$run --stage finetune --vision "$first" --llm "$first" --projector "$first" --data data/llava_v1_5_mix665k.json \
    --images data --out "$out/2" "$@"
