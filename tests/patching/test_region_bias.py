"""Region biases of a patched model, against eager attention with the bias written into its mask."""

import pytest
import torch
from tiny_models import image_sums, inputs, llava, relative_error
from torch._dynamo.utils import counters
from transformers import CompileConfig

import ras_fast

BATCH = inputs(["tItt", "ttI", "tItIt", "ttt"])
HEADS, LAYERS, IMAGES = 6, 3, 2


@pytest.fixture
def model():
    return llava()


@pytest.fixture
def region_ids(model):
    with torch.no_grad(), ras_fast.patch(model, norms=False) as patched:
        model(**BATCH)
        return patched.region_map.ids


def biases(*shape, layers=range(LAYERS), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {layer: 2 * torch.randn(*shape, generator=generator) for layer in layers}


class Biased:
    """The unpatched model with eager attention, whose layers add a bias [Hq, R] to the scores of the image tokens."""

    def __init__(self, model, bias, region_ids):
        self.model, self.bias, self.ids = model, bias, region_ids

    def __enter__(self):
        self.model.set_attn_implementation({"text_config": "eager"})
        layers = enumerate(self.model.model.language_model.layers)
        self.handles = [
            layer.self_attn.register_forward_pre_hook(self.adds(self.bias[i]), with_kwargs=True)
            for i, layer in layers
            if i in self.bias
        ]
        return self.model

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        self.model.set_attn_implementation({"text_config": "sdpa"})

    def adds(self, bias):
        bias = bias if bias.dim() == 2 else bias[:, None].expand(-1, IMAGES)
        bias = torch.nn.functional.pad(bias, (0, IMAGES - bias.shape[1]))

        def hook(module, args, kwargs):
            mask = kwargs["attention_mask"]
            ids = torch.nn.functional.pad(self.ids, (0, mask.shape[-1] - self.ids.shape[1]), value=-1)
            added = torch.stack([torch.where(ids == r, bias[:, r, None, None], 0) for r in range(IMAGES)]).sum(0)
            return args, kwargs | {"attention_mask": mask + added.transpose(0, 1)[:, :, None]}

        return hook


@pytest.mark.parametrize("bias", [biases(HEADS), biases(HEADS, IMAGES), biases(HEADS, 1), biases(HEADS, layers=[1])])
def test_forward(model, region_ids, bias):
    """With and without statistics, which are then those of the biased attention."""
    with torch.no_grad():
        plain = model(**BATCH).logits
        with Biased(model, bias, region_ids):
            expected = model(**BATCH, output_attentions=True)
        with ras_fast.patch(model) as patched:
            patched.set_region_bias(bias)
            got = model(**BATCH).logits
            observed = model(**BATCH, output_attentions=True)
    valid = BATCH["attention_mask"].bool()
    assert relative_error(got[valid], expected.logits[valid]) < 1e-5
    assert relative_error(observed.logits[valid], expected.logits[valid]) < 1e-5
    for mass, probabilities in zip(observed.attentions, expected.attentions, strict=True):
        sums = image_sums(probabilities, region_ids, IMAGES)
        assert (mass - sums).transpose(1, 2)[valid].abs().max() < 1e-5
    assert relative_error(got[0, -1], plain[0, -1]) > 1e-2
    assert relative_error(got[3][valid[3]], plain[3][valid[3]]) < 1e-5  # no image, no bias


def test_heat_map(model, region_ids):
    bias = biases(HEADS)
    with torch.no_grad():
        with Biased(model, bias, region_ids):
            expected = model(**BATCH, output_attentions=True).attentions
        with ras_fast.patch(model) as patched:
            patched.set_region_bias(bias)
            with patched.collect(rows=2, scores=True) as statistics:
                model(**BATCH)
    assert sorted(statistics.scores) == list(range(len(expected)))
    for layer, scores in statistics.scores.items():
        assert (scores - expected[layer][:, :, -2:].mean(2)).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_generation(model, region_ids, options):
    """Decode steps are biased, too: the image tokens are in the cache then."""
    bias, options = biases(HEADS), {"max_new_tokens": 6, "do_sample": False, **options}
    with torch.no_grad():
        plain = model.generate(**BATCH, **options)
        beams = region_ids.repeat_interleave(options.get("num_beams", 1), 0)
        with Biased(model, bias, beams):
            expected = model.generate(**BATCH, **options)
        with ras_fast.patch(model) as patched:
            patched.set_region_bias(bias)
            got = model.generate(**BATCH, **options)
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("hole", [False, True])
def test_under_a_full_mask(model, region_ids, hole):
    """Right padding leaves each query a range of its own, a hole leaves none: the explicit attention adds the bias then."""
    batch = inputs(["tIttt", "tI"], side="right")
    if hole:
        batch["attention_mask"][0, -2] = 0
    bias = biases(HEADS, 1)
    with torch.no_grad():
        with ras_fast.patch(model, norms=False) as patched:
            model(**batch)
            ids = patched.region_map.ids
        with Biased(model, bias, ids):
            expected = model(**batch).logits
        with ras_fast.patch(model) as patched:
            patched.set_region_bias(bias)
            got = model(**batch).logits
    valid = batch["attention_mask"].bool()
    assert relative_error(got[valid], expected[valid]) < 1e-5


def test_a_head_looks_where_it_is_told(model):
    """One head of one layer sees nothing but the image, the others what they saw."""
    bias = torch.zeros(HEADS)
    bias[2] = 30
    with torch.no_grad(), ras_fast.patch(model) as patched:
        before = model(**BATCH, output_attentions=True).attentions[0]
        patched.set_region_bias({0: bias})
        after = model(**BATCH, output_attentions=True).attentions[0]
    assert (after[:3, 2, -1].sum(-1) > 0.999).all()
    others = [0, 1, 3, 4, 5]
    assert torch.allclose(after[:, others], before[:, others], atol=1e-6)


def test_cleared_is_bit_identical(model):
    with torch.no_grad(), ras_fast.patch(model) as patched:
        before = model(**BATCH).logits
        patched.set_region_bias(torch.ones(HEADS))
        assert not torch.equal(model(**BATCH).logits, before)
        patched.clear_region_bias()
        assert torch.equal(model(**BATCH).logits, before)
        patched.set_region_bias({1: torch.ones(HEADS)})
        patched.set_region_bias({})
        assert torch.equal(model(**BATCH).logits, before)


def test_the_callers_tensor_is_copied(model):
    bias = torch.zeros(HEADS)
    with torch.no_grad(), ras_fast.patch(model) as patched:
        patched.set_region_bias(bias)
        before = model(**BATCH).logits
        bias += 1
        assert torch.equal(model(**BATCH).logits, before)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(HEADS - 1), "Hq = 6"),
        (torch.zeros(HEADS, 1, 1), "Hq = 6"),
        (torch.zeros(HEADS, dtype=torch.int32), "must be floating"),
        (torch.full((HEADS,), torch.nan), "layer 0 holds NaN"),
        (torch.full((HEADS,), -torch.inf), "layer 0 holds NaN or infinite"),
        (torch.full((HEADS,), 1e39, dtype=torch.float64), "layer 0 holds NaN or infinite"),
        ({LAYERS: torch.zeros(HEADS)}, r"layer 3; the model has layers 0\.\.2"),
        ({"0": torch.zeros(HEADS)}, "layer '0'"),
    ],
)
def test_errors(model, bias, message):
    with torch.no_grad(), ras_fast.patch(model) as patched:
        before = model(**BATCH).logits
        with pytest.raises(ValueError, match=message):
            patched.set_region_bias(bias)
        assert torch.equal(model(**BATCH).logits, before)


def test_needs_statistics_and_a_map(model):
    with ras_fast.patch(model, regions=False) as patched, pytest.raises(RuntimeError, match="not asked for"):
        patched.set_region_bias(torch.zeros(HEADS))
    with torch.no_grad(), ras_fast.patch(model) as patched:
        patched.set_region_bias(torch.ones(HEADS))
        embeddings = model.get_input_embeddings()(torch.randint(0, 90, (1, 5)))
        with pytest.raises(ValueError, match="region biases need to know where the image tokens are"):
            model(inputs_embeds=embeddings)


@pytest.mark.slow
def test_compiled_decoding_is_one_graph(model):
    batch, bias = inputs(["tItt", "tIttt"]), biases(HEADS)
    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    config._compile_all_devices = True
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad(), ras_fast.patch(model) as patched:
        patched.set_region_bias(bias)
        expected = model.generate(**batch, **options)
        got = model.generate(**batch, **options, cache_implementation="static", compile_config=config)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(got, expected)
