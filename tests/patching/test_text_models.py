"""LLaVA around text models that are no plain stacks of attention and MLP: what can be proved is taken, the rest is refused."""

import pytest
import torch
from families import CLIP, IMAGE, TEXT, Family
from tiny_models import image_sums, relative_error, valid_rows
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import ras_fast

# The gated norm behind the delta rule divides rows near zero: under the usual epsilon of 1e-6, one rounding (1.2e-7) of the
# first layer's input moves the logits by up to 2e-5, whoever computes them.
LINEAR = {"rms_norm_eps": 1e-3, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "linear_num_key_heads": 2, "linear_num_value_heads": 4}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
          "qk_nope_head_dim": 8, "head_dim": None}  # fmt: skip
TEXTS = {
    "qwen3_next": LINEAR | EXPERTS | HYBRID,
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 16, "head_dim": None},
    "phi3": {"head_dim": None},
    "granite": {"residual_multiplier": 0.5, "head_dim": None},
    "hyperclovax": {"residual_multiplier": 0.5, "use_post_norm": True, "head_dim": None},
    "minicpm3": LATENT | {"scale_depth": 1.4},
    "gpt_neox": {},
    "granitemoehybrid": {"residual_multiplier": 0.5, "head_dim": None, "num_hidden_layers": 4, "num_local_experts": 0,
                         "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 64, "mamba_d_state": 8,
                         "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    "olmo": {"head_dim": None},
    "olmo2": {"head_dim": None},
    "olmo3": {"head_dim": None, "sliding_window": 8},
    "doge": {},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"], "num_local_experts": 4,
                           "num_experts_per_tok": 2, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4,
                           "index_topk_blocks": 2},
}  # fmt: skip


def around(text):
    """(model, batch) of a LLaVA with this text model."""
    if text not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {text}")
    config = {name: value for name, value in (TEXT | TEXTS[text]).items() if value is not None} | {"model_type": text}
    family = Family({"text_config": config, "vision_config": CLIP, "image_token_id": IMAGE, "vision_feature_layer": -1})
    model = family.model("llava")
    return model, family.inputs(model, ["ttItttt", "tIttItt"])


@pytest.mark.parametrize("text", ["qwen3_next", "lfm2"])
def test_a_hybrid_has_statistics_where_it_attends(text):
    model, batch = around(text)
    ids, valid = batch.pop("regions"), valid_rows(batch)
    with torch.no_grad():
        model.set_attn_implementation({"text_config": "eager"})
        eager = model(**batch, output_attentions=True)
        model.set_attn_implementation({"text_config": "sdpa"})
        with ras_fast.patch(model) as patched:
            report = patched.report()
            assert (report.regions, report.blind) == (None, [0, 2])
            assert "on, but for the layers 0, 2" in str(report)
            assert patched.head_counts == {1: 4, 3: 4}
            with patched.collect(rows=None) as statistics:
                got = model(**batch, output_attentions=True)
            with (
                pytest.raises(ValueError, match=r"layers is \[0\]; it must hold at least one index, of those in 1, 3"),
                patched.collect(layers=[0]),
            ):
                pass
            with pytest.raises(ValueError, match=r"bias is for layer 2; the model has layers 1, 3"):
                patched.set_region_bias({2: torch.zeros(4)})
    assert relative_error(got.logits[valid], eager.logits[valid]) < 1e-5
    assert sorted(statistics.mass) == [1, 3]
    for layer, probabilities, mass in zip((1, 3), eager.attentions, got.attentions, strict=True):
        sums = image_sums(probabilities, ids, 2)
        assert (statistics.mass[layer] - sums).transpose(1, 2)[valid].abs().max() < 1e-5
        assert torch.equal(mass, statistics.mass[layer])


def test_dropout_between_its_parts_does_not_hide_a_layer():
    model, batch = around("phi3")
    batch.pop("regions")
    with torch.no_grad():
        expected = model(**batch).logits
        with ras_fast.patch(model) as patched:
            assert patched.report().fused_layers == 3
            assert relative_error(model(**batch).logits, expected) < 1e-5


FUSED = dict.fromkeys(["olmo2", "olmo3", "granite", "hyperclovax", "minicpm3"], 3) | {"granitemoehybrid": 4}  # layers


@pytest.mark.parametrize("text", ["gpt_neox", "olmo", *FUSED])
def test_every_layer_can_be_steered_and_read(text):
    """OLMo's norms have no weights and GPT-NeoX's layers two norms of one tensor: they are not fused. Those of OLMo 2 and 3,
    which have norms before their adds alone, are, and those which scale what they add."""
    model, batch = around(text)
    batch.pop("regions")
    vector, dots = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), []

    def add(module, args, output):
        return (output[0] + 2 * vector, *output[1:]) if isinstance(output, tuple) else output + 2 * vector

    with torch.no_grad():
        handle = model.model.language_model.layers[1].register_forward_hook(add)
        expected = model(**batch, output_hidden_states=True)
        handle.remove()
        with ras_fast.patch(model) as patched:
            report = patched.report()
            renamed = sum("hands cache_params" in why for why in report.unfused.values())  # by transformers 5.17
            layers = FUSED.get(text, 0) - renamed
            assert (report.fused_layers, report.fused_norms) == (layers, 2 * layers)
            assert ("layers.1" in report.unfused) == (text not in FUSED)
            plain = model(**batch).logits
            patched.set_steering(1, vector)
            patched.steering.set_rows(torch.full((2,), -1), torch.full((2,), 2.0))
            assert torch.equal(model(**batch).logits, plain)
            patched.steering.set_rows(torch.zeros(2, dtype=torch.int32), torch.full((2,), 2.0))
            patched.set_probe(1, vector, dots.append)
            got = model(**batch, output_hidden_states=True)
            patched.clear_steering()
            patched.clear_probe(1)
            assert torch.equal(model(**batch).logits, plain)
    assert relative_error(got.logits, expected.logits) < 1e-5
    assert relative_error(got.hidden_states[2], expected.hidden_states[2]) < 1e-5
    assert relative_error(dots[0][..., 0], expected.hidden_states[2] @ vector[0]) < 1e-5


@pytest.mark.parametrize(("text", "why"), [
    ("doge", "the text model under this package's attention"),  # it adds to the mask that it gets
    ("minimax_m3_vl_text", "block_indices is given"),  # of the keys that each query sees
])  # fmt: skip
def test_an_attention_that_does_more_than_the_interface_says_is_left_alone(text, why):
    model, batch = around(text)
    batch.pop("regions")
    with torch.no_grad():
        expected = model(**batch).logits
        with ras_fast.patch(model) as patched:
            assert why in patched.report().regions
            assert model.config.text_config._attn_implementation == "sdpa"
            assert relative_error(model(**batch).logits, expected) < 1e-5
            with pytest.raises(RuntimeError, match="image statistics are off"):
                patched.set_region_bias(torch.zeros(4))


def test_a_residual_stream_that_stays_in_float32_where_a_patched_model_is_cast():
    config = CONFIG_MAPPING["mamba"](vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=8, time_step_rank=4)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(64, (2, 9))
    with torch.no_grad(), ras_fast.patch(model) as patch:
        assert patch.report().unfused == {f"layers.{i}": "keeps its residual stream in float32" for i in range(3)}
        states = model.bfloat16()(ids, output_hidden_states=True).hidden_states
        patch.unpatch()
        expected = model(ids, output_hidden_states=True).hidden_states
    assert [own.dtype for own in states] == [own.dtype for own in expected]
    for own, other in zip(states, expected, strict=True):
        torch.testing.assert_close(own, other)
