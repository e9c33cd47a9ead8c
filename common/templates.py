"""How conversations are written: one template for a family of language models."""
from dataclasses import dataclass

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
LLAMA_2_SYSTEM = ("You are a helpful language and vision assistant. You are able to understand "
                  "the visual content that the user provides, and assist the user with a variety "
                  "of tasks using natural language.")
QWEN2_SYSTEM = "You are a helpful assistant."
QWEN2_5_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LLAMA_3_DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


@dataclass(frozen=True)
class Template:
    """How a conversation is written. {system}: the system prompt, in the first turn; {text}: what a
    turn says. Answers are supervised from first to last character, questions are not."""
    user: str
    answer: str
    eos: str                    # the token that ends an answer
    system: str = ""
    later: str = ""             # in front of every question but the first
    after: str = ""             # behind every answer, not supervised
    strip: bool = False         # remove spaces and newlines around a turn's text


def vicuna(eos: str) -> Template:
    return Template("{system}USER: {text} ASSISTANT:", " {text}" + eos, eos, SYSTEM + " ")


def chatml(system: str) -> Template:
    return Template("{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
                    "{text}<|im_end|>", "<|im_end|>", f"<|im_start|>system\n{system}<|im_end|>\n",
                    after="\n")


def llama_3(system: str) -> Template:
    return Template("{system}<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
                    "<|start_header_id|>assistant<|end_header_id|>\n\n", "{text}<|eot_id|>",
                    "<|eot_id|>", system, strip=True)


TEMPLATES = {
    "plain": Template("", "{text}\n", "\n"),      # stage 1: <image> and the caption alone
    "v1": vicuna("</s>"),
    "phi": vicuna("<|endoftext|>"),
    "gemma": vicuna("<eos>"),
    "llama_2": Template("[INST] {system}{text} [/INST]", " {text} </s>", "</s>",
                        f"<<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n", "<s>"),
    "mistral": Template("[INST] {text} [/INST]", " {text} </s>", "</s>"),
    "phi3": Template("<|user|>\n{text}<|end|>\n<|assistant|>\n", "{text}<|end|>", "<|end|>",
                     later="\n"),
    "qwen2": chatml(QWEN2_SYSTEM),
    "qwen2_5": chatml(QWEN2_5_SYSTEM),
    "smollm2": chatml(SMOLLM2_SYSTEM),
    "llama_3": llama_3(""),
    "llama_3_1": llama_3(f"<|start_header_id|>system<|end_header_id|>\n\n{LLAMA_3_DATE}<|eot_id|>"),
}
FAMILY_TEMPLATE = {"mistral": "mistral", "phi": "phi", "phi3": "phi3", "gemma": "gemma"}
# Families that share a model_type are known by a token, then by a phrase of their chat template.
TOKEN_TEMPLATES = [("<|start_header_id|>", "Cutting Knowledge Date", "llama_3_1"),
                   ("<|start_header_id|>", "", "llama_3"),
                   ("<|im_start|>", QWEN2_5_SYSTEM, "qwen2_5"),
                   ("<|im_start|>", QWEN2_SYSTEM, "qwen2"),
                   ("<|im_start|>", "", "smollm2")]
