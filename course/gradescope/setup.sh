#!/usr/bin/env bash
set -e
apt-get update && apt-get install -y python3-pip
pip3 install torch numpy safetensors tokenizers --extra-index-url https://download.pytorch.org/whl/cpu
