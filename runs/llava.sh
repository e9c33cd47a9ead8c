#!/usr/bin/env bash
# LLaVA-1.5 at the paper's settings, with any objective, both stages. Flags after the first two words go to both stages.
#     runs/llava.sh 7b ce                        LLaVA-1.5, 2310.03744
#     runs/llava.sh 13b vdep                     VDEP, 2502.09093, at 13b, which is ours (stage 1 is twice as long)
#     runs/llava.sh 7b vista                     VISTA, 2505.10917
#     runs/llava.sh 7b basic                     BASIC, 2508.06895
#     runs/llava.sh 7b ce --moca                 MoCa, 2410.07167
#     FINETUNE="--unlock-llm lora" runs/llava.sh 7b ce          stage 2 by LLaVA's LoRA recipe: r 128, α 256, lr 2e-4
# Needs: weights/clip-vit-large-patch14-336 and weights/vicuna-{7b,13b}-v1.5; data/blip_laion_cc_sbu_558k.json with its
# images in data/558k; data/llava_v1_5_mix665k.json with coco, gqa, ocr_vqa, textvqa and vg in data.
# Makes: out/llava-SIZE-LOSS/1 and /2 (or OUT/1 and /2), 80 GB of disk for 7b.
# Expected on 8 × A100 (80 GB): stage 1 3.5 h (7b), 5.5 h (13b), stage 2 10 h, 20 h. These are LLaVA's hours for its own
# code; ours are not measured. GiB a GPU, estimated by bench/memory.py: stage 1 23, 38; stage 2 23, 39 at micro-batch 16
# and 832 tokens. On 40 GB cards add --micro-batch 8 (13b: 4); the global batches stay 256 and 128.
set -euo pipefail
cd "$(dirname "$0")/.."
size=$1 loss=$2; shift 2
out=${OUT:-out/llava-$size-$loss}
run="torchrun --nproc_per_node=${GPUS:-8} train.py --vision ${VISION:-weights/clip-vit-large-patch14-336} --llm ${LLM:-weights/vicuna-$size-v1.5} --loss $loss"
# shellcheck disable=SC2086
$run --stage pretrain --data data/blip_laion_cc_sbu_558k.json --images data/558k --out "$out/1" "$@" ${PRETRAIN:-}
# shellcheck disable=SC2086
$run --stage finetune --projector "$out/1" --data data/llava_v1_5_mix665k.json --images data --out "$out/2" "$@" ${FINETUNE:-}
