"""SafeLLM on tiny random models of other families, behind their real processors. Needs vLLM: docs/vllm.md."""

import os

import pytest
import torch

pytest.importorskip("vllm.v1", reason="vLLM is not installed")
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from families import MROPE
from processors import class_of, with_processor
from tiny_random import random_image
from vllm import LLM

from ras_fast.fingerprint import fingerprint
from ras_fast.methods.moras import PRESETS
from ras_fast.profile import RasProfile
from ras_fast.sequential import SequentialPipeline
from ras_fast.vllm import SafeLLM, engine_args

ROPE = MROPE | {"mrope_section": [4, 6, 6]}
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
QWEN_VIDEOS = ("qwen2_vl.Qwen2VLVideoProcessor", PATCHES)
# By family: its video processor, and what it needs in the text model's config.
CASES = {
    "qwen2_vl": (QWEN_VIDEOS, {"rope_parameters": ROPE}),
    "qwen2_5_vl": (QWEN_VIDEOS, {"rope_parameters": ROPE}),
    "qwen3_vl": (QWEN_VIDEOS, {"rope_parameters": ROPE | {"mrope_interleaved": True}}),
    "internvl": (("internvl.InternVLVideoProcessor", {"size": {"height": 16, "width": 16}}), {}),
}


def family(name, folder):
    """(model, processor, queries), saved as "model" in the folder."""
    (videos, options), text = CASES[name]
    # vLLM's attention on a CPU takes heads of 32 dimensions and more.
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model, processor = with_processor(name, class_of(videos)(**options), **text)
    model.config.architectures = [type(model).__name__]
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        config.eos_token_id = 3
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    pictures = [random_image(i, size) for i, size in enumerate([(20, 16), (64, 24), (16, 48), (33, 33)])]
    images = [pictures[0], pictures[1], None, pictures[2:], *pictures, None, *pictures[:3]]
    return model, processor, ([f"w{20 + i} w{40 - i}" for i in range(12)], images)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_exact(name, tmp_path):
    model, processor, queries = family(name, tmp_path)
    torch.manual_seed(7)
    config = PRESETS["moras"] | {
        "s_base": 0.1, "k": 3.0, "context_prompt": "w5 w6 w7", "safety_prompt": "w8 w9 w10 w11", "max_context_tokens": 6,
    }  # fmt: skip
    prototypes = model.get_output_embeddings().weight[4:7].detach() / 4
    profile = RasProfile("moras", config, {"prototypes": prototypes}, fingerprint(model, processor))
    profile.save_pretrained(tmp_path / "profile")
    expected = SequentialPipeline(model, processor, profile).generate(*queries, max_new_tokens=8)
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "block_size": 32, "disable_log_stats": True}
    engine |= {"limit_mm_per_prompt": {"image": 2}} | engine_args(tmp_path / "profile", queries=8)
    outputs = SafeLLM(LLM(str(tmp_path / "model"), **engine)).generate(*queries, max_tokens=8)
    found, wanted = ([(o.tokens, o.context, o.rejected_at) for o in some] for some in (outputs, expected))
    assert found == wanted
    assert [output.risk for output in outputs] == pytest.approx([output.risk for output in expected], abs=1e-4)
    assert len({output.rejected_at for output in outputs}) >= 2
