"""The ways in which users run a model: quantised, on several devices, in batches that grow and shrink, while it trains."""

import copy

import pytest
import torch
from families import FAMILIES, SIZE, VOCABULARY
from tiny_models import image_sums, inputs, llava, relative_error, valid_rows
from transformers import BitsAndBytesConfig, ContinuousBatchingConfig, GenerationConfig, LlavaForConditionalGeneration

import ras_fast
from ras_fast.fingerprint import fingerprint
from ras_fast.patching.structure import find_decoder

ROWS = ["ttItttt", "tItt", "tttt", "tIItItt"]


def agree(model, batch, fused_norms=6):
    """Logits of the patched model, with and without statistics, against the unpatched one's; returns the masses."""
    valid = valid_rows(batch)
    with torch.no_grad():
        expected = model(**batch).logits[valid]
        with ras_fast.patch(model) as patched:
            assert patched.report().fused_norms == fused_norms
            assert relative_error(model(**batch).logits[valid], expected) < 1e-5
            output = model(**batch, output_attentions=True)
            assert relative_error(output.logits[valid], expected) < 1e-5
        assert torch.equal(model(**batch).logits[valid], expected)
    return output.attentions


# Quantised linears


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_bitsandbytes(tmp_path, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    llava().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{bits: True})
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    for module in model.modules():  # its kernel for CPUs with bf16 instructions rounds to bf16, and wants wider layers
        module.support_avx512bf16_for_cpu = False
    projection = model.model.language_model.layers[0].self_attn.q_proj
    assert isinstance(projection, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
    agree(model, inputs(["ttItttt", "tItt"], dtype=model.dtype))


def test_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    model = llava()
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.language_model.layers[0].self_attn.q_proj.weight).__module__.startswith("torchao")
    agree(model, inputs(ROWS))


# Several devices


def test_device_map_over_two_devices(tmp_path):
    """The last layer's weights are on the meta device between its calls; what is on the CPU is fused."""
    accelerate = pytest.importorskip("accelerate")
    model = llava()
    names = {"model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens", "lm_head"}
    names |= {"model.language_model.rotary_emb", "model.language_model.norm"}
    layers = [f"model.language_model.layers.{index}" for index in range(3)]
    placed = dict.fromkeys([*names, *layers[:2]], "cpu") | {layers[2]: "disk"}
    model = accelerate.dispatch_model(model, placed, main_device="cpu", offload_dir=tmp_path)
    assert next(model.model.language_model.layers[2].parameters()).is_meta
    # Two layers' adds, but for the last: the norm after it is not here.
    agree(model, inputs(ROWS), fused_norms=3)
    with ras_fast.patch(model) as patched:
        assert "offloaded" in patched.report().unfused["layers.2.input_layernorm"]


@pytest.mark.parametrize("name", ["mllama", "gemma3"])
@pytest.mark.parametrize("when", ["before the patch", "after it"])
def test_offloaded_layers_that_hold_weights_themselves(name, when):
    """Mllama's gates are there for the layer's own call alone."""
    accelerate = pytest.importorskip("accelerate")
    family = FAMILIES[name]
    model = family.model(name)
    batch = family.inputs(model, ["ttIt", "tt", "ItIt"])
    batch.pop("regions")
    valid, layer, vectors = batch["attention_mask"].bool(), find_decoder(model)[2][1], torch.ones(1, SIZE)
    rows = torch.zeros(3, dtype=torch.int32), torch.ones(3)
    with torch.no_grad():
        expected = model(**batch).logits[valid]
        with layer.register_forward_hook(lambda module, args, output: output + 1):
            steered = model(**batch).logits[valid]
        if when == "before the patch":
            accelerate.cpu_offload(layer, "cpu", offload_buffers=True)
        with ras_fast.patch(model) as patched:
            if when == "after it":
                accelerate.cpu_offload(layer, "cpu", offload_buffers=True)
            assert relative_error(model(**batch).logits[valid], expected) < 1e-5
            patched.set_steering(1, vectors)
            patched.steering.set_rows(*rows)
            assert relative_error(model(**batch).logits[valid], steered) < 1e-5


# Rows of the cache that move


def test_a_prompt_may_be_read_where_there_are_no_values():
    """As some tools do to find shapes; where its images are cannot be known."""
    family = FAMILIES["gemma3"]
    model = family.model("gemma3")
    batch = family.inputs(model, ["tttt", "tt"])
    del batch["regions"]
    with torch.no_grad(), ras_fast.patch(model):
        shape = model.to("meta")(**{name: value.to("meta") for name, value in batch.items()}).logits.shape
    assert shape == (2, 4, VOCABULARY)


def test_the_region_map_follows_returned_sequences():
    model = llava()
    batch = inputs(["tIItt", "tItttt"])
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 4, "num_return_sequences": 3}
    options |= {"output_attentions": True, "return_dict_in_generate": True}
    model.set_attn_implementation({"text_config": "eager"})
    expected = model.generate(**batch, **options)
    model.set_attn_implementation({"text_config": "sdpa"})
    with ras_fast.patch(model) as patched:
        got = model.generate(**batch, **options)
        ids = patched.region_map.keys(64)
    assert got.sequences.shape[0] == 6
    assert torch.equal(got.sequences, expected.sequences)
    assert ids.shape[0] == 8
    assert (ids[:4, 1:17] == 0).all()
    assert (ids[4:, 15:31] == 0).all()
    for masses, probabilities in zip(got.attentions, expected.attentions, strict=True):
        for mass, whole in zip(masses, probabilities, strict=True):
            assert (mass - image_sums(whole, ids, 2))[:, :, -1].abs().max() < 1e-5


def test_statistics_while_assisted():
    model, assistant, batch = llava(), llava(layers=1), inputs(["ttItttt"])
    options = {"max_new_tokens": 8, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    model.set_attn_implementation({"text_config": "eager"})
    expected = model.generate(**batch, **options, assistant_model=assistant)
    model.set_attn_implementation({"text_config": "sdpa"})
    with ras_fast.patch(model) as patched, ras_fast.patch(assistant):
        got = model.generate(**batch, **options, assistant_model=assistant)
        ids = patched.region_map.keys(64)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.attentions) == len(expected.attentions)
    for masses, probabilities in zip(got.attentions, expected.attentions, strict=True):
        for mass, whole in zip(masses, probabilities, strict=True):
            if whole.shape[-1] > 0:
                assert (mass - image_sums(whole, ids, 1))[:, :, -1].abs().max() < 1e-5


# FSDP


def test_layers_that_are_sharded_after_the_patch():
    """FSDP2 has a norm's weight in one piece for its own layer's forward alone."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    model, batch = llava(), inputs(ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        with ras_fast.patch(model), torch.no_grad():
            for part in (*model.model.language_model.layers, model):
                fully_shard(part, mesh=mesh)
            with pytest.raises(ValueError, match="weights are split among processes"):  # of which each holds some
                fingerprint(model)
            assert relative_error(model(**batch).logits, expected) < 1e-5
        with pytest.raises(TypeError, match=r"call ras_fast\.patch before it"):
            ras_fast.patch(model)
    finally:
        distributed.destroy_process_group()


# Continuous batching

PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]


def batched(model):
    """{request: (tokens, error)} of two prompts through transformers' continuous batching, which `transformers serve` uses."""
    options = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    generation = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(PROMPTS, generation, options)
    return {name: (result.generated_tokens, result.error) for name, result in results.items()}


def test_continuous_batching():
    """Fused norms take part in it. The attention on images is refused, or right (where transformers gives it whole masks)."""
    model = FAMILIES["llava"].model("llava")
    expected = batched(model)
    with ras_fast.patch(model, regions=False) as patched:
        assert patched.report().fused_norms == 6
        assert batched(model) == expected
    with ras_fast.patch(model):
        got = batched(model)
    refused = all(tokens == [] and "regions=False" in error for tokens, error in got.values())
    assert refused or got == expected


@pytest.mark.parametrize(("layer", "slots"), [("final", [0]), (1, [0, -1]), (1, [0])])
def test_continuous_batching_of_a_steered_model(layer, slots):
    """All sequences are one row there, of which the last position may be anyone's: refused, but for what steers all alike."""
    model = FAMILIES["llava"].model("llava")
    vectors = torch.randn(1, model.config.text_config.hidden_size)
    with ras_fast.patch(model, regions=False) as patched:
        patched.set_steering(layer, vectors)
        patched.steering.set_rows(torch.tensor(slots), torch.ones(len(slots)))
        got = batched(model)
        if layer == "final" or len(slots) > 1:
            assert all(tokens == [] and "without rows, as in continuous batching" in error for tokens, error in got.values())
            return
        options = {"max_new_tokens": 4, "do_sample": False}
        steered = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]
    assert [tokens for tokens, _ in got.values()] == steered


# Training


def test_a_model_that_runs_under_autocast_alone_is_refused():
    """As those whose norms are float32 among weights of half precision."""
    model = llava().to(torch.bfloat16)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.float()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="cannot be traced on tokens alone and, with weights of 2 dtypes, without autocast"):
            ras_fast.patch(model)
        assert model(**inputs(ROWS, dtype=torch.bfloat16)).logits.isfinite().all()


def test_a_model_whose_cache_does_not_work_is_tried_behind_padding_without():
    """Two layers that write into the same place; and a copied layer has a config of its own, which `patch` does not change."""
    model = llava()
    layers = model.model.language_model.layers
    layers[1] = copy.deepcopy(layers[0])
    batch = inputs(ROWS)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        with ras_fast.patch(model) as patched:
            assert "does not run" in patched.report().regions
            assert relative_error(model(**batch, use_cache=False).logits, expected) < 1e-5


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_window_is_the_masks_not_the_layers(taken):
    """Without one layer, masks go by place, and what a layer passes to its attention by what it was made for."""
    model = FAMILIES["exaone4_5"].model("exaone4_5")
    text_model = model.model.language_model
    del text_model.layers[taken]
    text_model.config.num_hidden_layers = 2
    batch = FAMILIES["exaone4_5"].inputs(model, ["tI" + 20 * "t", 14 * "t"])
    del batch["regions"]
    valid = valid_rows(batch)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits[valid]
        with ras_fast.patch(model) as patched:
            assert patched.report().regions is None
            for attentions in (False, True):
                got = model(**batch, use_cache=False, output_attentions=attentions).logits[valid]
                assert relative_error(got, expected) < 1e-5


def test_gradient_checkpointing_is_for_training():
    """Switched on, it changes nothing in eval mode; training itself is refused."""
    model, batch = llava(), inputs(ROWS)
    model.gradient_checkpointing_enable()
    agree(model, batch)
    with ras_fast.patch(model):
        model.train()
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"training mode: call eval\(\)"):
            model(**batch)
        with pytest.raises(RuntimeError, match="training mode"):
            model.model.language_model.layers[0](torch.zeros(1, 2, 48))
