"""Made-up layers that use what a forward on plain embeddings does not bring: the answers stay those of the original."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCABULARY, llava, relative_error, spread
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

import ras_fast
from ras_fast.patching import attention
from ras_fast.patching.attention import range_mask
from ras_fast.patching.cache_values import CACHE_NAMES
from ras_fast.patching.layers import FusedLayer
from ras_fast.patching.trace import Call, LayerTrace
from ras_fast.registration import register

SIZE = 32
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(LlamaAttention.forward).parameters)
IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(layer_class):
    config = LlamaConfig(hidden_size=SIZE, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=VOCABULARY)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.model.layers = torch.nn.ModuleList(layer_class(config, index) for index in range(2))
    return spread(model)


class AddsAnother(LlamaDecoderLayer):
    """Adds an optional argument to its output, as models of several streams do."""

    def forward(self, hidden_states, extra=None, **kwargs):
        hidden = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden if extra is None else hidden + extra


class NamesItsCache(LlamaAttention):
    def forward(self, hidden_states, states=None, **kwargs):
        return super().forward(hidden_states=hidden_states, **kwargs | {CACHE: states})


class RenamesTheCache(LlamaDecoderLayer):
    """Hands its cache on by another name, as Qwen3.5's layers of linear attention did."""

    def __init__(self, config, index):
        super().__init__(config, index)
        self.self_attn = NamesItsCache(config, index)

    def forward(self, hidden_states, **kwargs):
        kwargs["states"] = kwargs.pop(CACHE, None)
        hidden = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class TakesItsMaskByPosition(LlamaDecoderLayer):
    """And has no name for it; nor are its parts in an order that is known."""

    def __call__(self, hidden_states, attention_mask=None, **kwargs):
        return super().__call__(hidden_states, attention_mask, **kwargs)

    def forward(self, hidden_states, *args, **kwargs):
        normed = self.input_layernorm(hidden_states)
        hidden = hidden_states + self.self_attn(hidden_states=normed, attention_mask=args[0], **kwargs)[0]
        return hidden + self.mlp(self.post_attention_layernorm(self.post_attention_layernorm(hidden)))


class VisualMLP(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.visual = LlamaMLP(config)

    def forward(self, x, visual=None):
        return super().forward(x) if visual is None else torch.where(visual[..., None], self.visual(x), super().forward(x))


class VisualExperts(LlamaDecoderLayer):
    """Its MLP has experts of its own for image tokens, as ERNIE-4.5-VL's and CogVLM's have."""

    def __init__(self, config, index):
        super().__init__(config, index)
        self.mlp = VisualMLP(config)

    def forward(self, hidden_states, **kwargs):
        visual = kwargs.pop("visual", None)
        hidden = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden), visual)


def test_an_argument_that_the_trace_did_not_bring():
    model, extra = llama(AddsAnother), torch.randn(2, 9, SIZE)
    with torch.no_grad():
        expected, plain = model(IDS, extra=extra).logits, model(IDS).logits
        with ras_fast.patch(model) as patched:
            assert patched.report().fused_layers == 2
            assert relative_error(model(IDS, extra=extra).logits, expected) < 1e-5
            assert relative_error(model(IDS).logits, plain) < 1e-5


@pytest.mark.parametrize("given", [{}, {"extra": torch.randn(2, 9, SIZE)}], ids=["traced", "not traced"])
def test_steering_and_probes_do_not_depend_on_the_arguments(given):
    model, vector, dots = llama(AddsAnother), torch.randn(1, SIZE), []
    with torch.no_grad():
        handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output + 2 * vector)
        expected = model(IDS, output_hidden_states=True, **given)
        handle.remove()
        with ras_fast.patch(model) as patched:
            patched.set_steering(0, vector)
            patched.steering.set_rows(torch.zeros(2, dtype=torch.int32), torch.full((2,), 2.0))
            patched.set_probe(0, vector, dots.append)
            assert relative_error(model(IDS, **given).logits, expected.logits) < 1e-5
    assert relative_error(dots[0][..., 0], expected.hidden_states[1] @ vector[0]) < 1e-5


def test_what_a_layer_is_given_by_position_reaches_it():
    model, mask = llama(TakesItsMaskByPosition), torch.ones_like(IDS)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits[mask.bool()]
        assert relative_error(model(IDS).logits[mask.bool()], expected) > 0.1
        with ras_fast.patch(model) as patched:
            assert patched.report().fused_layers == 0
            assert patched.steers(0)
            assert relative_error(model(IDS, attention_mask=mask).logits[mask.bool()], expected) < 1e-5


def test_a_cache_that_changes_its_name_is_not_lost():
    model = llama(RenamesTheCache)
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
    with ras_fast.patch(model) as patched:
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)
        assert "hands states to its attention" in patched.report().unfused["layers.0"]


class ScalesItsAttention(LlamaDecoderLayer):
    """Called in Llama's order, as Granite's."""

    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + 0.7 * attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_formula_is_seen_where_layers_add_little_to_what_they_pass_on(dtype):
    """As a trained model's later layers. In bf16 the difference is below the rounding of the hidden states."""
    model = llama(ScalesItsAttention)
    model.model.embed_tokens.weight.data *= 100
    model.to(dtype)
    with ras_fast.patch(model) as patched:
        report = patched.report()
        assert report.fused_layers == 0
        assert sorted(report.unfused) == ["layers.0", "layers.1"]  # by themselves, not for what becomes of the model


class ScalesWhatItAdds(LlamaDecoderLayer):
    """As Granite's."""

    def __init__(self, config, index):
        super().__init__(config, index)
        self.residual_multiplier = 0.3

    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended * self.residual_multiplier
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * self.residual_multiplier


class ScalesWhatItAddsBesideLayerNorms(ScalesWhatItAdds):
    """Whose kernel knows of no factor."""

    def __init__(self, config, index):
        super().__init__(config, index)
        self.input_layernorm, self.post_attention_layernorm = (torch.nn.LayerNorm(SIZE) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [ScalesWhatItAdds, ScalesWhatItAddsBesideLayerNorms])
@torch.no_grad()
def test_a_factor_of_what_is_added_is_the_layers_own(layer, dtype):
    """Also where it is set anew, and where autocast gives attention another dtype than the residual has."""
    model = llama(layer).to(dtype)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    with ras_fast.patch(model) as patched:
        assert patched.report().fused_layers == 2
        for factor in (0.3, -1.5, 1.0):
            for each in (*model.model.layers, *plain.model.layers, *exact.model.layers):
                each.residual_multiplier = factor
            expected = exact(IDS).logits
            for cast in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                    got, error = model(IDS).logits, relative_error(plain(IDS).logits, expected)
                assert relative_error(got, expected) <= 2 * error + 1e-6


def every_row_has_the_padding_of_the_first(query, key, value, mask, scaling):
    return query, key, value, range_mask(mask[:1, 0, 0, 0].expand(len(mask)), mask[:, 0, 0, 1]), scaling


def steps_see_the_keys_of_the_first_row(query, key, value, mask, scaling):
    return (query, key[:1].expand_as(key), value, mask, scaling) if query.shape[2] == 1 else (query, key, value, mask, scaling)


def steps_do_not_see_themselves(query, key, value, mask, scaling):
    shorter = range_mask(mask[:, 0, 0, 0], mask[:, 0, 0, 1] - 1)
    return query, key, value, shorter if query.shape[2] == 1 else mask, scaling


def the_scale_is_another_one(query, key, value, mask, scaling):
    return query, key, value, mask, 1.2 * scaling


FAULTS = [
    every_row_has_the_padding_of_the_first, steps_see_the_keys_of_the_first_row, steps_do_not_see_themselves,
    the_scale_is_another_one,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_attention_behind_padding_or_in_a_step_is_seen(fault, dtype, monkeypatch):
    """In one layer, and in one row of two. No layer's proof has padding or a cache."""
    model, own = llava(dtype=dtype), attention.attention

    def faulty(module, query, key, value, mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
        if module.layer_idx == 1 and attention.is_range(mask):
            query, key, value, mask, scaling = fault(query, key, value, mask, scaling)
        return own(module, query, key, value, mask, dropout, scaling, is_causal, **kwargs)

    monkeypatch.setattr(attention, "attention", faulty)
    try:
        with ras_fast.patch(model) as patched:
            assert "a token's attention differs from the original by" in patched.report().regions
    finally:
        monkeypatch.undo()
        register()
    with ras_fast.patch(model) as patched:
        assert patched.report().regions is None


def test_what_only_a_decode_step_shows_undoes_all_fusion(monkeypatch):
    """The proofs of single layers know no cache; the comparison of the whole text model does."""
    monkeypatch.setattr(FusedLayer, "renamed", lambda self, record: [])
    model = llama(RenamesTheCache)
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
    with ras_fast.patch(model) as patched:
        report = patched.report()
        assert (report.fused_layers, report.fused_norms) == (0, 0)
        assert "with fused layers it attends otherwise" in report.unfused["LlamaModel"]
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)
        with pytest.raises(ValueError, match=r"must be one of \[\]"):
            patched.set_steering("final", torch.zeros(1, SIZE))


def test_drafts_of_an_early_exit_do_without_the_layers_behind_it():
    model, options = llama(LlamaDecoderLayer), {"max_new_tokens": 6, "do_sample": False}
    with ras_fast.patch(model) as patched:
        patched.set_steering(1, torch.randn(1, SIZE))
        patched.steering.set_rows(torch.zeros(1, dtype=torch.int32), torch.ones(1))
        expected = model.generate(IDS[:1], **options)
        assert torch.equal(model.generate(IDS[:1], **options, assistant_early_exit=1), expected)


def test_an_mlp_with_a_second_argument_is_left_alone():
    model, visual = llama(VisualExperts), torch.arange(9) % 3 == 0
    with torch.no_grad():
        expected = model(IDS, visual=visual.expand(2, 9)).logits
        with ras_fast.patch(model) as patched:
            assert "calls its MLP with more than the hidden states" in str(patched.report())
            assert relative_error(model(IDS, visual=visual.expand(2, 9)).logits, expected) < 1e-5


class FlexibleNorm(LlamaRMSNorm):
    """May be called by keyword, or add a residual first and then return both."""

    def forward(self, x, residual=None):
        return super().forward(x) if residual is None else (super().forward(x + residual), x + residual)


class RowNorm(LlamaRMSNorm):
    """Wants [B, L, d]."""

    def forward(self, hidden_states):
        batch, length, size = hidden_states.shape
        return super().forward(hidden_states.view(batch * length, size)).view(batch, length, size)


class CallsNorms(LlamaDecoderLayer):
    """`way` is how it calls the norm after the attention."""

    way = "x"

    def __init__(self, config, index):
        super().__init__(config, index)
        self.input_layernorm = RowNorm(config.hidden_size)
        self.post_attention_layernorm = FlexibleNorm(config.hidden_size)

    def forward(self, hidden_states, **kwargs):
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        if self.way == "residual":
            normed, hidden = self.post_attention_layernorm(attended, hidden_states)
        else:
            hidden = attended + hidden_states
            normed = self.post_attention_layernorm(**{self.way: hidden})
        return hidden + self.mlp(normed)


@pytest.mark.parametrize("way", ["x", "residual"])
def test_norms_that_are_called_in_other_ways_are_left_alone(way, monkeypatch):
    monkeypatch.setattr(CallsNorms, "way", way)
    model = llama(CallsNorms)
    with torch.no_grad():
        expected = model(IDS).logits
        with ras_fast.patch(model) as patched:
            report = patched.report().unfused
            assert "does not run (ValueError" in report["layers.0.input_layernorm"]
            assert report["layers.0.post_attention_layernorm"] == "is not called with one positional tensor"
            assert relative_error(model(IDS).logits, expected) < 1e-5


def test_a_fused_norm_may_be_called_in_another_way():
    model, hidden = llama(LlamaDecoderLayer), torch.randn(2, 3, SIZE)
    with torch.no_grad(), ras_fast.patch(model) as patched:
        assert relative_error(model.model.norm(hidden_states=hidden), model.model.norm(hidden)) < 1e-5
        patched.set_steering("final", torch.randn(1, SIZE))
        patched.steering.set_rows(torch.zeros(2, dtype=torch.int32), torch.ones(2))
        with pytest.raises(RuntimeError, match=r"the norm is steered, but called with 0 arguments and \['hidden_states'\]"):
            model.model.norm(hidden_states=hidden)


def test_what_a_layer_returns_behind_its_states_is_to_be_its_attentions():
    states, chosen, other = torch.randn(3, 1, 2, 4).unbind()
    call = Call("self_attn", (), {}, (states, None, chosen))
    for output, returned in (
        (states, (False, ())), ((states,), (True, ())), ((states, chosen), (True, (2,))), ((states, other), None),
        ((states, None), None), ((states, chosen, other), None),
    ):  # fmt: skip
        layer = SimpleNamespace(names={"attention": "self_attn"})
        why = FusedLayer.note_output(layer, LayerTrace(torch.nn.Module(), output=output, calls=[call]))
        if returned is None:
            assert why == f"returns {len(output)} values"
        else:
            assert (why, (layer.returns_tuple, layer.returns_also)) == (None, returned)
