"""Run by test_tensor_parallel.py under torchrun: argv[1] is a saved model."""

import sys

import torch
import torch.distributed as dist
from tiny_models import inputs, llava, relative_error, valid_rows
from transformers import AutoModelForImageTextToText

import ras_fast
from ras_fast.patching import gather_heads

dist.init_process_group("gloo")
batch = inputs(["tItt", "tt"])
valid = valid_rows(batch)
vectors = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))


def run(model):
    with torch.no_grad(), ras_fast.patch(model) as patched:
        assert patched.report().fused_norms == 6
        output = model(**batch, output_attentions=True)
        patched.set_steering(1, vectors)
        patched.steering.set_rows(torch.zeros(2, dtype=torch.int32), torch.full((2,), 0.5))
        steered = model(**batch).logits
        patched.clear_steering()
        tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)
    return output.logits[valid], steered[valid], tokens, output.attentions


logits, steered, tokens, attentions = run(llava())
parallel = AutoModelForImageTextToText.from_pretrained(sys.argv[1], tp_plan="auto").eval()
parallel.generation_config.pad_token_id = 0
local_logits, local_steered, local_tokens, local_attentions = run(parallel)
assert relative_error(local_logits, logits) < 1e-5
assert relative_error(local_steered, steered) < 1e-5  # steered once, not once a rank
assert torch.equal(local_tokens, tokens)
for whole, part in zip(attentions, local_attentions, strict=True):
    assert part.shape[1] == whole.shape[1] // 2  # this rank's heads
    assert (gather_heads(part) - whole).transpose(1, 2)[valid].abs().max() < 1e-5
dist.destroy_process_group()
