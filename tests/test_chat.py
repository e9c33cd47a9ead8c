"""Qwen2, Llama-3, SmolLM2: which template a folder asks for, and ids that are those of the published template."""
import json
import shutil

import pytest
from chat import MODEL_TYPES, chat_template, write_chat_folder
from tokenizers import Tokenizer

from common.flags import UserError
from common.text import bos_ids
from data import encode, eos_id, pieces
from hub.tokenizer import family_template, load_tokenizer

NAMES = list(MODEL_TYPES)
TURNS = [("human", "Is there a red circle?\nAnswer with one word, 12 345."),
         ("gpt", "Yes, it's 1234.\n\nReally"),
         ("human", "héllo e\u0301 漢字"), ("gpt", "No.")]
LLAVA = [{"from": who, "value": text} for who, text in TURNS]
MESSAGES = [{"role": {"human": "user", "gpt": "assistant"}[who], "content": text}
            for who, text in TURNS]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return write_chat_folder(tmp_path_factory.mktemp(name), name)


def test_a_folder_is_known_by_its_tokens_and_its_chat_template(name, folder, tmp_path):
    assert family_template(folder) == name
    bare = tmp_path / "bare"                                # a base model has no chat template
    shutil.copytree(folder, bare)
    (bare / "tokenizer_config.json").unlink()
    assert family_template(bare) == {"qwen2_5": "qwen2", "llama_3_1": "llama_3"}.get(name, name)
    # where transformers 5 keeps it
    (bare / "chat_template.jinja").write_text(chat_template(name))
    assert family_template(bare) == name


def test_a_text_begins_with_what_the_family_begins_with_and_ends_with_its_end(name, folder):
    tokenizer = load_tokenizer(folder)
    begin = ["<|begin_of_text|>"] if name.startswith("llama") else []
    assert [tokenizer.id_to_token(i) for i in bos_ids(tokenizer)] == begin
    assert tokenizer.id_to_token(eos_id(tokenizer, name)) == ("<|eot_id|>" if begin
                                                              else "<|im_end|>")


def test_ids_are_those_of_the_text_encoded_as_it_is_published_and_answers_alone_are_labelled(name, folder):
    tokenizer = load_tokenizer(folder)
    ids, labels, _ = encode(LLAVA, tokenizer, name, 2)
    text = "".join(piece for piece, _ in pieces(LLAVA, name))
    assert ids.tolist() == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    said = tokenizer.decode(labels[labels != -100].tolist(), skip_special_tokens=False)
    end = "<|eot_id|>" if name.startswith("llama") else "<|im_end|>"
    assert said == f"Yes, it's 1234.\n\nReally{end}No.{end}"


def test_two_files_of_gpt2_do_not_make_a_tokenizer_of_qwen2_or_smollm2(tmp_path):
    for file, content in [("vocab.json", {"a": 0}), ("config.json", {"model_type": "qwen2"})]:
        (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="copy tokenizer.json"):
        load_tokenizer(tmp_path)


def test_transformers_writes_and_encodes_the_same_conversation(name, folder):
    hf = pytest.importorskip("transformers")
    theirs, ours = hf.PreTrainedTokenizerFast.from_pretrained(folder), load_tokenizer(folder)
    for n in (1, 3, 4):
        asked = n < 4
        ids = theirs.apply_chat_template(MESSAGES[:n], add_generation_prompt=asked,
                                         return_dict=False)
        assert encode(LLAVA[:n], ours, name, 2)[0].tolist() == ids
