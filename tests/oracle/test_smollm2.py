"""examples/smollm2.py: what it writes is the model that transformers reads, in the layout of a real checkpoint."""

import json
import os
import pathlib

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = pathlib.Path(os.environ["PRISMAQUANT_SMOLLM2"])
TEXT = pathlib.Path(os.environ["PRISMAQUANT_SOURCE_DIR"], "examples/tiny-qwen3_5/heldout.txt").read_text()


def test_tensors_are_bf16_and_the_tied_head_is_stored_once():
    with safe_open(FOLDER / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert len(names) == 272
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config


def test_digits_are_tokens_of_their_own():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("in  1984", add_special_tokens=False).input_ids)
    assert pieces == ["in", "ĠĠ", "1", "9", "8", "4"]


def test_perplexity_of_held_out_text():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False).input_ids[:512])
    with torch.no_grad():
        log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
    perplexity = torch.exp(-log_probs.gather(1, ids[1:, None]).mean()).item()
    assert 10 < perplexity < 40
