"""A patched model's decode step in a CUDA graph: the eager step's answers, and a new risk without a new graph."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, StaticCache

import ras_fast
from ras_fast.patching import range_mask

CUDA = ras_fast.backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA.available, reason=str(CUDA))]

IMAGE, SIZE, STEPS = 99, 256, 5


def tiny_llava():
    text = LlamaConfig(
        hidden_size=SIZE, intermediate_size=SIZE, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, max_position_embeddings=512,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config).eval().to("cuda", torch.bfloat16)


class Decoding:
    """A left-padded batch on a static cache; `step` reads and writes persistent tensors only."""

    def __init__(self, model, patched):
        rows = [[5, *[IMAGE] * 16, 6, 7], [8, *[IMAGE] * 16]]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device="cuda")
        valid = (ids != 0).long()
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
        self.model, self.patched = model, patched
        self.cache = StaticCache(config=model.config.text_config, max_cache_len=length + STEPS + 4)
        model(input_ids=ids, attention_mask=valid, pixel_values=pixels, past_key_values=self.cache)
        start = length - valid.sum(1)
        self.tokens = torch.zeros(2, 1, dtype=torch.long, device="cuda")
        self.positions = (length - start)[:, None].contiguous()
        self.mask = range_mask(start, torch.full_like(start, length + 1))
        self.before = [tensor.clone() for tensor in self._state()]

    def _state(self):
        parts = [value for layer in self.cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        return [*parts, self.positions, self.mask]

    def rewind(self):
        """Back to the end of the prompt, in place."""
        for tensor, value in zip(self._state(), self.before, strict=True):
            tensor.copy_(value)

    def step(self):
        """(logits, attention of the last layer on the image); moves on by one position."""
        with self.patched.collect() as statistics:
            logits = self.model(
                input_ids=self.tokens, attention_mask=self.mask, position_ids=self.positions, past_key_values=self.cache
            ).logits
        self.positions += 1
        self.mask[..., 1] += 1
        return logits, statistics.mass[2]


def test_a_captured_step_is_the_eager_step():
    torch.manual_seed(0)
    model = tiny_llava()
    with torch.no_grad(), ras_fast.patch(model) as patched:
        patched.set_steering(1, torch.randn(1, SIZE, device="cuda"))
        steering = patched.steering
        steering.set_rows(torch.zeros(2, dtype=torch.int32, device="cuda"), torch.zeros(2, device="cuda"))
        decoding = Decoding(model, patched)

        def decode(step, strength=1.0):
            """The results of STEPS steps; the second row is steered from the third step on."""
            results = []
            for index in range(STEPS):
                decoding.tokens.fill_(10 + index)
                steering.alpha.copy_(torch.tensor([0.0, strength * (index >= 2)]))
                results.append([result.clone() for result in step()])
            return results

        expected = decode(decoding.step)
        decoding.rewind()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up off the default stream, as capture wants
            for _ in range(2):
                decoding.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = decoding.step()
        decoding.rewind()

        def replay():
            graph.replay()
            return captured

        got = decode(replay)
        decoding.rewind()
        unsteered = decode(replay, 0.0)
    for (logits, mass), (logits_expected, mass_expected) in zip(got, expected, strict=True):
        torch.testing.assert_close(logits, logits_expected)
        torch.testing.assert_close(mass, mass_expected)
    for index in range(STEPS):
        same = [torch.equal(got[index][0][row], unsteered[index][0][row]) for row in range(2)]
        assert same == [True, index < 2]
