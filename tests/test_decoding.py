import math
import re
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from tiny_random import tiny_llava, tiny_processor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

from ras_fast.decoding import BROKEN, Decoding, EndWhenNotFinite, GumbelNoise, eos_ids, holds_stop, next_tokens
from ras_fast.inputs import encode, make_queries
from ras_fast.model_checks import TooLong, check_length
from ras_fast.output_head import output_head
from ras_fast.reference import reference_generate

EOS = 3


def test_greedy_changes_nothing():
    scores = torch.randn(2, 9)
    assert torch.equal(Decoding().processors(0, 4, [EOS])(None, scores), scores)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.2}, {"min_p": 0.0}, {"min_p": 0.2, "top_p": 0.8},
        {"top_k": 6, "top_p": 0.7, "min_p": 0.15, "temperature": 1.4},
    ],
    ids=str,
)  # fmt: skip
def test_scores_are_those_of_transformers_generate(settings):
    model = tiny_llava(tiny_processor())
    config = GenerationConfig(do_sample=True, **settings)
    model._prepare_special_tokens(config, device="cpu")
    chain = model._get_logits_processor(config, input_ids_seq_length=4, device="cpu")
    own = Decoding(do_sample=True, **settings).processors(0, 4, [EOS])
    ids, scores = torch.zeros(40, 4, dtype=torch.long), 2 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    found = LogitsProcessorList(own[:-1])(ids, scores.clone())  # but for the noise
    assert torch.equal(found, chain(ids, scores.clone()))
    assert torch.equal(found, scores) == (settings == {"min_p": 0.0})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_can_only_end(value):
    scores = torch.randn(3, 9)
    broken = scores.clone()
    broken[1, 5] = value
    out = EndWhenNotFinite([EOS])(None, broken)
    assert out[1].argmax() == EOS
    assert out[1].isfinite().sum() == 1
    assert torch.equal(out[[0, 2]], scores[[0, 2]])


def test_minus_infinity_is_a_token_that_was_ruled_out():
    scores = torch.randn(1, 9)
    scores[0, 2] = -math.inf
    assert torch.equal(EndWhenNotFinite([EOS])(None, scores), scores)


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_has_no_token(settings, value):
    scores, ids = torch.randn(3, 9), torch.zeros(3, 4, dtype=torch.long)
    broken = scores.clone()
    broken[1, 5] = value
    wanted, found, ended, forbidden = (
        next_tokens(Decoding(**settings, **more).processors(0, 4, eos), ids, logits).tolist()
        for eos, logits, more in (
            ([], scores, {}),
            ([], broken, {}),
            ([EOS], broken, {}),
            ([EOS], broken, {"logits_processors": SuppressTokensLogitsProcessor([EOS])}),
        )
    )
    assert found == ended == [wanted[0], BROKEN, wanted[2]]
    assert forbidden[1] == BROKEN


@pytest.mark.parametrize("eos", [[], [EOS]])
def test_whether_a_row_is_finite_is_not_asked_of_the_device(eos):
    """The meta device refuses to hand out values."""
    tokens = next_tokens(Decoding().processors(0, 4, eos), None, torch.empty(3, 9, device="meta"))
    assert (tokens.shape, tokens.device.type) == ((3,), "meta")


def test_noise_is_a_function_of_seed_query_and_step_alone():
    def noise(seed, query, step, dtype=torch.float32):
        ids = torch.zeros(1, 4 + step, dtype=torch.long)
        return GumbelNoise(seed, query, 4)(ids, torch.zeros(1, 50, dtype=dtype))

    assert torch.equal(noise(1, 2, 3), noise(1, 2, 3))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.equal(noise(1, 2, 3), noise(*other))
    torch.rand(7)
    assert torch.equal(noise(1, 2, 3), noise(1, 2, 3))


def test_noise_is_gumbel():
    draws = torch.cat([GumbelNoise(0, query, 0)(torch.zeros(1, 0), torch.zeros(1, 10_000)).flatten() for query in range(20)])
    assert draws.isfinite().all()
    # Mean: Euler's constant; variance: π²/6. Four standard errors.
    assert draws.mean().item() == pytest.approx(0.5772, abs=4 * 1.28 / draws.numel() ** 0.5)
    assert draws.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_argmax_of_noisy_scores_samples_their_softmax():
    scores = torch.tensor([[0.0, 1.0, 2.0, -math.inf]])
    tokens = [GumbelNoise(0, query, 0)(torch.zeros(1, 0), scores).argmax().item() for query in range(4000)]
    found = torch.bincount(torch.tensor(tokens), minlength=4) / 4000
    assert (found - scores[0].softmax(-1)).abs().max() < 4 * 0.5 / 4000**0.5
    assert found[3] == 0


def test_integers_count_as_numbers():
    """Which transformers' processors refuse, some of them."""
    scores = torch.tensor([[0.0, 5.0, 4.9]])
    ids = torch.tensor([[1]])
    settings = {"repetition_penalty": 2}, {"do_sample": True, "temperature": 2, "top_p": 1, "min_p": 1}
    assert [Decoding(**own).processors(0, 1, [])(ids, scores).argmax().item() for own in settings] == [2, 1]


def test_sampling_processors_run_before_the_noise():
    decoding = Decoding(do_sample=True, top_k=1, temperature=0.5)
    scores = torch.tensor([[0.0, 5.0, 4.9]])
    assert decoding.processors(0, 0, [])(torch.zeros(1, 0, dtype=torch.long), scores).argmax() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7}, "temperature is 0.7; it needs to be given with do_sample=True"),
        ({"top_k": 5}, "top_k is 5; it needs to be given with do_sample=True"),
        ({"top_p": 0.9}, "top_p is 0.9; it needs to be given with do_sample=True"),
        ({"do_sample": True, "temperature": 0}, "temperature is 0; it needs to be a number above 0"),
        ({"do_sample": True, "temperature": None}, "temperature is None"),
        ({"do_sample": True, "temperature": math.inf}, "temperature is inf"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p is 1.5; it needs to be in \(0, 1\]"),
        ({"do_sample": True, "top_p": "0.9"}, "top_p is '0.9'"),
        ({"min_p": 0.1}, "min_p is 0.1; it needs to be given with do_sample=True"),
        ({"do_sample": True, "min_p": 1.5}, r"min_p is 1.5; it needs to be in \[0, 1\]"),
        ({"do_sample": True, "top_k": 2.5}, "top_k is 2.5; it needs to be an integer"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1; it needs to be an integer of at least 0"),
        ({"do_sample": True, "top_p": 0}, r"top_p is 0; it needs to be in \(0, 1\]"),
        ({"do_sample": True, "min_p": -0.1}, r"min_p is -0.1; it needs to be in \[0, 1\]"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"do_sample": True, "temperature": 10**400}, "it needs to be a number above 0 that a float holds"),
    ],
)
def test_numbers_that_cannot_be_used(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding.of(settings)


def test_neutral_settings_of_sampling_are_greedy():
    for settings in ({"temperature": 0}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}):
        assert len(Decoding.of(settings).processors(0, 4, [EOS])) == 1
    with pytest.raises(TypeError, match="generate takes no num_beams; how answers are decoded is set by max_new"):
        Decoding.of({"num_beams": 3})


def test_custom_processors_run():
    def ban_one(input_ids, scores):
        return scores.index_fill(1, torch.tensor([1]), -math.inf)

    for given in ((ban_one,), [ban_one], LogitsProcessorList([ban_one]), ban_one):
        chain = Decoding(logits_processors=given).processors(0, 0, [])
        assert chain(torch.zeros(1, 0, dtype=torch.long), torch.tensor([[0.0, 5.0, 4.9]])).argmax() == 2


@pytest.mark.parametrize("processors", [5, ["a"], iter([GumbelNoise(0, 0, 0)])])
def test_logits_processors_of_other_types(processors):
    with pytest.raises(ValueError, match="it needs to be a list of LogitsProcessors"):
        Decoding(logits_processors=processors)


@pytest.mark.parametrize("stops", [5, [""], ["a", None]])
def test_stop_strings_of_other_types(stops):
    with pytest.raises(ValueError, match="it needs to hold non-empty strings"):
        Decoding(stop_strings=stops)


def test_none_is_what_transformers_has_for_nothing():
    assert Decoding(stop_strings=None, logits_processors=None) == Decoding()


@pytest.mark.parametrize("setting", [
        {"do_sample": "no"}, {"do_sample": 1}, {"max_new_tokens": True}, {"seed": None}, {"seed": 1.5}, {"seed": [1, 2]},
    ], ids=str)  # fmt: skip
def test_settings_of_other_types(setting):
    with pytest.raises(ValueError, match=re.escape("{} is {!r}; it needs to be".format(*next(iter(setting.items()))))):
        Decoding(**setting)


def test_end_tokens_and_stop_strings():
    processor = tiny_processor()
    model = tiny_llava(processor)
    assert eos_ids(model) == [processor.tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [3, 7]
    assert eos_ids(model) == [3, 7]
    model.generation_config.eos_token_id = None
    assert eos_ids(model) == []
    tokens = processor.tokenizer("w1 w2 w3")["input_ids"]
    assert holds_stop(("w2 w3",), processor.tokenizer, tokens)
    assert not holds_stop(("w3 w2",), processor.tokenizer, tokens)
    assert not holds_stop((), processor.tokenizer, tokens)
    assert not holds_stop((processor.tokenizer.eos_token,), processor.tokenizer, [*tokens, processor.tokenizer.eos_token_id])


def test_the_heads_soft_cap_is_obeyed_where_the_model_applies_it():
    """LLaVA does nothing with that of its text model, nor does PaliGemma in transformers 5.17."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    text = AutoConfig.for_model("gemma2", **sizes, head_dim=8, num_key_value_heads=4, final_logit_softcapping=0.1)
    model, hidden = AutoModelForCausalLM.from_config(text).eval(), torch.randn(2, 32)
    torch.testing.assert_close(output_head(model)(hidden), 0.1 * torch.tanh(model.lm_head(hidden) / 0.1))
    model = tiny_llava(tiny_processor())
    for cap in (None, 0.1):
        model.config.text_config.final_logit_softcapping = cap
        assert torch.equal(output_head(model)(hidden), model.lm_head(hidden))


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.0625})],
    ids=["divided", "multiplied"],
)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in llava"])
def test_the_heads_factor_is_obeyed_where_the_model_applies_it(kind, factor, inside):
    """Both families have it in the text model's config; LLaVA, whose text model may be either, does nothing with it."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    text = AutoConfig.for_model(kind, **sizes, **factor)
    if inside:
        config = tiny_llava(tiny_processor()).config
        config.text_config = text
        model = LlavaForConditionalGeneration(config).eval()
    else:
        model = AutoModelForCausalLM.from_config(text).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden, logits = model.base_model(input_ids=ids).last_hidden_state, model(input_ids=ids).logits
        torch.testing.assert_close(output_head(model)(hidden), logits)
        assert torch.allclose(model.get_output_embeddings()(hidden), logits) == inside


def test_tokens_that_the_model_rules_out_have_the_lowest_logits():
    """Chameleon's image tokens, but for those that begin and end an image."""
    model = FAMILIES["chameleon"].model("chameleon")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden, logits = model.base_model(input_ids=ids).last_hidden_state, model(input_ids=ids).logits
        assert torch.equal(output_head(model)(hidden), logits)
    assert (logits == torch.finfo(torch.float32).min).sum() == 3 * 8


def test_a_generate_that_leaves_out_logits_processors_is_refused(monkeypatch):
    """As Janus's."""
    processor = tiny_processor()
    model = tiny_llava(processor)
    own = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda *args, logits_processor, **kwargs: own(*args, **kwargs))
    inputs, _ = encode(processor, make_queries(["w1"], None, processor)[0], "cpu", torch.float32)
    with pytest.raises(ValueError, match="leaves out the `logits_processor` that it is given"):
        reference_generate(model, processor, inputs, Decoding(2))


_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "told", "rope", "positions"),
    [
        ("llama", 100, {"rope_type": "default"}, 100),
        ("llama", 100, {"rope_type": "dynamic", "factor": 2.0}, 200),
        ("llama", 800, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 100, **_LLAMA_3}, 800),
        ("llama", 400, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ("llama", 100, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ("gemma3_text", 800, {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}}, 800),
    ],
    ids=["plain", "dynamic", "llama 3", "yarn, scaled", "yarn, as trained", "by kind of layer"],
)
def test_positions_that_the_config_counts_as_scaled_are_not_scaled_again(kind, told, rope, positions):
    kinds = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    for part in kinds:
        part.setdefault("rope_type", "default")
        part.setdefault("rope_theta", 1e4)
    config = AutoConfig.for_model(kind, max_position_embeddings=told, rope_parameters=rope)
    model = SimpleNamespace(config=config, base_model=None)
    check_length(model, [5] * positions)
    with pytest.raises(TooLong, match=f"has {positions} positions"):
        check_length(model, [5] * (positions + 1))
