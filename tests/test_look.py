"""look/: each number on the page by a slow independent computation; the page in a real browser."""
import base64
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import ROOT, call
from PIL import Image
from test_mir import frechet_by_scipy
from tokenizers import AddedToken, Tokenizer, decoders, models

from data import ImageProcessor, collate
from evaluate import Assistant
from hub.tokenizer import load_tokenizer
from look.gather import answer, gather, is_word, show_token
from look.page import as_lists, overlay, write_page
from methods.basic import supervision_degree
from methods.vdep import reconstruction_loss
from methods.vista import alignment_loss
from model import Decoder, DecoderConfig, Llava, Projector, ViT, VisionConfig

ODD = ["<unk>", "<s>", "</s>", "▁cat", "▁tri", "at", "▁", "<0x0A>", "<0xE2>", "▁سلام", "▁🙂", "▁a", "▁" + "long" * 40]
