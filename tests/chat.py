"""Tokenizers built as those of Qwen2, Llama-3 and SmolLM2 are, with a small vocabulary, and their published templates.

The regexes, normalizers, special tokens and templates are the published ones; the vocabulary is
learned from a few lines, so that nothing has to be downloaded.
"""
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>"]
SYSTEMS = {"qwen2": "You are a helpful assistant.",
           "qwen2_5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
           "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
MODEL_TYPES = {"qwen2": "qwen2", "qwen2_5": "qwen2", "smollm2": "llama", "llama_3": "llama",
               "llama_3_1": "llama"}
TEXT = ["Is there a red circle? Answer with one word.", "You are a helpful assistant. system user "
                                                        "assistant",
        "A chat between a curious user, what's 12 and 2026?\n\n", "The quick brown fox. Yes. No.\n"]
JINJA_CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
    "'<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + "
    "'\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt "
    "%}{{ '<|im_start|>assistant\n' }}{% endif %}")
JINJA_LLAMA_3 = (
    "{{ bos_token }}DATE{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
DATE = ("{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December "
        "2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>' }}")


def chat_template(name: str) -> str:
    """Return the Jinja template that is published with a family's tokenizer."""
    if name in SYSTEMS:
        return JINJA_CHATML.replace("SYSTEM", SYSTEMS[name])
    return JINJA_LLAMA_3.replace("DATE", DATE if name == "llama_3_1" else "")


def chat_tokenizer(name: str) -> Tokenizer:
    llama = name.startswith("llama")
    tokenizer = Tokenizer(models.BPE(ignore_merges=llama))
    if name == "smollm2":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        regex = WORDS.replace("{1,DIGITS}", "{1,3}" if llama else "")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if name.startswith("qwen2"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT * 9, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False)
                                  for t in (HEADERS if llama else CHATML)])
    if llama:
        bos = tokenizer.token_to_id("<|begin_of_text|>")
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), (
            processors.TemplateProcessing(single="<|begin_of_text|> $A",
                                          special_tokens=[("<|begin_of_text|>", bos)]))])
    return tokenizer


def write_chat_folder(folder: Path, name: str) -> Path:
    """Write the files beside the weights of a released language model."""
    folder.mkdir(parents=True, exist_ok=True)
    chat_tokenizer(name).save(str(folder / "tokenizer.json"))
    llama = name.startswith("llama")
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"} if llama else {"eos_token": "<|im_end|>"}
    if name == "smollm2":
        tokens["bos_token"] = "<|im_start|>"                # named, never put in front
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat_template(name),
         **tokens}))
    (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES[name]}))
    return folder
