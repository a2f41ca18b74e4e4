"""torch.compile without graph breaks and without a new graph per step (Dynamo only: what it traces, not what it generates)."""

import pytest
import torch
from families import FAMILIES
from tiny_models import IMAGE, image_sums, inputs, llava, relative_error, valid_rows
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

import ras_fast
from ras_fast.patching.cache_values import cache_name, returned_cache
from ras_fast.regions import RegionMap

slow = pytest.mark.slow  # tracing takes tens of seconds


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


# Before torch 2.12 the unpatched LLaVA breaks, too: on how it puts image features in their places.
forward_compiles = pytest.mark.skipif(torch.__version__ < "2.12", reason="the unpatched LLaVA is not one graph either")


@slow
@forward_compiles
def test_forward_is_one_graph():
    model, batch, counter = llava(layers=2), inputs(["tItt", "tIttt"]), CompileCounter()
    with torch.no_grad():
        expected = model(**batch).logits
        with ras_fast.patch(model):
            compiled = torch.compile(model, fullgraph=True, backend=counter)
            for _ in range(2):
                got = compiled(**batch, use_cache=False).logits
    assert counter.frame_count == 1
    assert relative_error(got[valid_rows(batch)], expected[valid_rows(batch)]) < 1e-5


@pytest.mark.parametrize("name", [name if name == "paligemma" else pytest.param(name, marks=slow) for name in FAMILIES])
def test_forward_of_a_family_is_one_graph(name):
    """Where the unpatched model's is."""
    family = FAMILIES[name]
    model = family.model(name)
    batch = family.inputs(model, ["tItt", "tIttt"] if family.pixels else ["tttt", "ttttt"])
    del batch["regions"]

    def compiled():
        torch._dynamo.reset()
        counter = CompileCounter()
        logits = torch.compile(model, fullgraph=True, backend=counter)(**batch, use_cache=False).logits[valid_rows(batch)]
        return logits, counter.frame_count

    with torch.no_grad():
        try:
            expected, graphs = compiled()
        except RuntimeError as error:
            pytest.skip(f"nor is the unpatched model's: {str(error).splitlines()[0]}")
        with ras_fast.patch(model):
            got, patched_graphs = compiled()
    assert (graphs, patched_graphs) == (1, 1)
    assert relative_error(got, expected) < 1e-5


@slow
@forward_compiles
def test_steering_and_reading_where_no_norm_follows_are_in_the_graph():
    model, dots, counter = FAMILIES["exaone4_5"].model("exaone4_5"), [], CompileCounter()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), ras_fast.patch(model, regions=False) as patched:
        patched.set_steering(0, torch.ones(1, 64))
        patched.steering.set_rows(torch.zeros(1, dtype=torch.int32), torch.ones(1))
        patched.set_probe(0, torch.ones(1, 64), dots.append)
        expected = model(input_ids=ids, use_cache=False).logits
        got = torch.compile(model, fullgraph=True, backend=counter)(input_ids=ids, use_cache=False).logits
    assert counter.frame_count == 1
    assert relative_error(got, expected) < 1e-5
    assert relative_error(dots[1], dots[0]) < 1e-5


@slow
@pytest.mark.parametrize("given", [False, True], ids=["makes a cache", "is given one"])
def test_a_given_map_and_a_cache_are_one_graph(given):
    """Later steps go by the map that was set: a graph does not keep it on the cache."""
    model, batch = llava(layers=2), inputs(["tItt"])
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    ids = torch.where(batch["input_ids"] == IMAGE, 0, -1).to(torch.int32)
    options = {cache_name(model): DynamicCache(config=model.config.text_config)} if given else {}
    with torch.no_grad(), ras_fast.patch(model) as patched:
        patched.region_map = RegionMap(ids, 1)
        expected = model(inputs_embeds=embeddings, output_attentions=True).attentions
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        output = compiled(inputs_embeds=embeddings, output_attentions=True, **options)
        past = {cache_name(model): returned_cache(output)}
        step = model(input_ids=torch.tensor([[5]]), output_attentions=True, **past).attentions
    for a, b in zip(output.attentions, expected, strict=True):
        assert (a - b).abs().max() < 1e-5
    assert step[0].shape == (1, 6, 1, 1)


@slow
@forward_compiles
def test_statistics_of_a_given_map():
    """Finding images waits for the device, so a graph takes the map that it is given."""
    model, batch = llava(layers=2), inputs(["tItt", "tIttt"])
    with torch.no_grad(), ras_fast.patch(model) as patched:
        expected = model(**batch, output_attentions=True).attentions
        patched.region_map = patched.region_map
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        got = compiled(**batch, use_cache=False, output_attentions=True).attentions
    for a, b in zip(got, expected, strict=True):
        assert (a - b).transpose(1, 2)[valid_rows(batch)].abs().max() < 1e-5


@slow
def test_static_decode_is_one_graph():
    model, batch = llava(layers=2), inputs(["tItt", "tIttt"])
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    config._compile_all_devices = True
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, **options)
    with ras_fast.patch(model):
        got = model.generate(**batch, **options, cache_implementation="static", compile_config=config)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(got, expected)


@slow
def test_static_decode_with_statistics():
    model, batch = llava(layers=2), inputs(["tItt", "tIttt"])
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    config._compile_all_devices = True
    options = {"max_new_tokens": 5, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    model.set_attn_implementation({"text_config": "eager"})
    expected = model.generate(**batch, **options)
    model.set_attn_implementation({"text_config": "sdpa"})
    with ras_fast.patch(model) as patched:
        got = model.generate(**batch, **options, cache_implementation="static", compile_config=config)
        ids = patched.region_map.keys(64)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        for layer in range(2):
            assert (a[layer] - image_sums(b[layer], ids, 1))[:, :, -1].abs().max() < 1e-5


@slow
def test_statistics_without_a_map_say_why():
    model, batch = llava(layers=2), inputs(["tItt"])
    with torch.no_grad(), ras_fast.patch(model):
        model(**batch, output_attentions=True)  # which finds images, but keeps no map for a graph
        with pytest.raises(ValueError, match="or is compiled: set patch"):
            torch.compile(model, backend="eager")(**batch, use_cache=False, output_attentions=True)
