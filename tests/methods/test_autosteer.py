"""AutoSteer: the prober, the head, the gate in every kind of decoding, and that nothing waits for the device."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from tiny_random import endless_llava, random_image, random_words
from torch.utils._python_dispatch import TorchDispatchMode

import ras_fast
from ras_fast.batching import batches, left_padded
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import encode, make_queries
from ras_fast.methods import autosteer, refusal_head
from ras_fast.methods.autosteer import AutoSteer
from ras_fast.methods.prober import _standard, assess, choose_layer, gate_threshold, safety_awareness, split, train_prober
from ras_fast.profile import RasProfile

D, LAYERS, LAYER, STRENGTH = 32, 3, 1, 8.0
EPSILON = 0.1 * STRENGTH
QUERIES = [(random_words(1, 3), random_image(0)), (random_words(2, 9), None), (random_words(3, 5), random_image(1))]


@pytest.fixture(scope="module")
def model(processor):
    return endless_llava(processor, LAYERS)


@pytest.fixture(scope="module")
def batch(model, processor):
    """Three prompts of different lengths, one without an image, padded on the left."""
    return left_padded(rows(processor), processor.tokenizer.pad_token_id)


def rows(processor):
    queries = make_queries([text for text, _ in QUERIES], [image for _, image in QUERIES], processor)
    return [encode(processor, query, "cpu", torch.float32)[0] for query in queries]


def profile(model, processor, bias=0.0, rank=None, **config):
    """A random prober, whose first output is lowered by `bias`, and a random head."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    tensors = {"prober_in.weight": 4 * random(8, D), "prober_in.bias": random(8), "prober_out.weight": 4 * random(2, 8)}
    tensors["prober_out.bias"] = torch.tensor([-bias, 0.0])
    if rank is None:
        tensors["refusal"] = 3 * random(D, D)
    else:
        tensors |= {"refusal": 3 * random(D, rank), "refusal_right": random(rank, D)}
    settings = {"layer": LAYER, "strength": STRENGTH, "threshold": 0.5} | config
    return RasProfile("autosteer", settings, tensors, fingerprint(model, processor))


@pytest.fixture(scope="module")
def mixed(model, processor, batch):
    """A profile under which the first and the last prompt are off and the second is on, or the other way round."""
    risks = []
    for bias in torch.linspace(-3, 3, 61).tolist():
        made = profile(model, processor, bias)
        with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, made) as steer, torch.no_grad():
            model(**batch)
            risks = steer.risk.tolist()
        if 0 < sum(risk > 0.5 for risk in risks) < len(risks):
            return made
    pytest.fail(f"no bias separates the prompts: {risks}")


@contextmanager
def by_hooks(model, made, on):
    """h + ε M h of the rows `on` by a hook on the unpatched model's last norm."""
    m = made.tensors["refusal"] @ made.tensors.get("refusal_right", torch.eye(D))
    gate = EPSILON * torch.tensor(on).float()[:, None, None]

    def steer(module, args, output):
        repeats = output.shape[0] // len(on)
        return output + gate.repeat_interleave(repeats, 0) * (output @ m.T)

    handle = model.model.language_model.norm.register_forward_hook(steer)
    try:
        yield
    finally:
        handle.remove()


def decide(model, made, batch):
    """What the prober says about each prompt, computed from `output_hidden_states`."""
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[made.config["layer"]][:, -1]
    prober = {name.removeprefix("prober_"): tensor for name, tensor in made.tensors.items() if name.startswith("prober_")}
    inner = (hidden @ prober["in.weight"].T + prober["in.bias"]).clamp(min=0)
    return (inner @ prober["out.weight"].T + prober["out.bias"]).softmax(-1)[:, 1]


def step_after(batch):
    """One more token for each row."""
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    return {"input_ids": torch.full((mask.shape[0], 1), 20), "attention_mask": mask}


DECODING = [
    {},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"cache_implementation": "static"},
    {"use_cache": True, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("options", DECODING, ids=str)
def test_generate_is_the_hooked_model(model, mixed, batch, options):
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    risk = decide(model, mixed, batch)
    plain = model.generate(**batch, **options)
    with by_hooks(model, mixed, (risk > 0.5).tolist()):
        expected = model.generate(**batch, **options)
    with ras_fast.patch(model) as patch:
        with ras_fast.methods.attach(patch, mixed) as steer:
            got = model.generate(**batch, **options)
        assert torch.equal(model.generate(**batch, **options), plain)  # nothing is left behind
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)
    beams = options.get("num_beams", 1)
    torch.testing.assert_close(steer.risk, risk.repeat_interleave(beams), atol=1e-5, rtol=1e-4)
    assert not steer.failed.any()


def test_two_profiles_at_once(model, processor, mixed, batch):
    """One that is off for all prompts does not put out the other's gate."""
    never = profile(model, processor, bias=-100.0)
    with ras_fast.patch(model) as patch:
        with ras_fast.methods.attach(patch, mixed):
            expected = model.generate(**batch, max_new_tokens=6, do_sample=False)
        for outer, inner in ((mixed, never), (never, mixed)):
            with ras_fast.methods.attach(patch, outer), ras_fast.methods.attach(patch, inner):
                assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), expected)


def test_rows_that_are_off_are_bit_identical_and_rows_do_not_mix(model, processor, mixed, batch):
    on = decide(model, mixed, batch) > 0.5
    with ras_fast.patch(model) as patch, torch.no_grad():
        plain = model(**batch).logits[:, -1]
        with ras_fast.methods.attach(patch, mixed):
            got = model(**batch).logits[:, -1]
            alone = [model(**row).logits[0, -1] for row in rows(processor)]
    assert torch.equal(got[~on], plain[~on])
    assert (got[on] != plain[on]).any(-1).all()
    torch.testing.assert_close(torch.stack(alone), got, atol=1e-4, rtol=1e-4)


def test_only_the_last_position_of_a_prompt_is_turned(model, processor, batch):
    always = profile(model, processor, bias=100.0)
    with ras_fast.patch(model) as patch, torch.no_grad():
        plain = model(**batch).logits
        with ras_fast.methods.attach(patch, always) as steer:
            got = model(**batch).logits
    assert (steer.risk > 0.5).all()
    assert torch.equal(got[:, :-1], plain[:, :-1])
    assert (got[:, -1] != plain[:, -1]).any(-1).all()


@pytest.mark.parametrize("rank", [1, 5])
def test_low_rank_head(model, processor, batch, rank):
    made = profile(model, processor, bias=100.0, rank=rank)
    options = {"max_new_tokens": 5, "do_sample": False}
    with by_hooks(model, made, [True] * 3):
        expected = model.generate(**batch, **options)
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, made):
        assert torch.equal(model.generate(**batch, **options), expected)


def test_a_gate_that_is_on_stays_on_for_the_cache(model, mixed, batch):
    """Every further piece of a prompt is judged, too; none can switch a gate off."""
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, mixed) as steer, torch.no_grad():
        past = model(**batch, use_cache=True).past_key_values
        first = steer.risk > 0.5
        more = {"input_ids": torch.randint(10, 60, (3, 4))}
        more["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
        model(**more, past_key_values=past)
        gate = ras_fast.patching.cache_values.kept(past, mixed.digest()).tensor
        assert torch.equal(gate > 0, first | (steer.risk > 0.5))
        before = steer.risk
        model(**step_after(more), past_key_values=past)
        assert steer.risk is before  # a decode step judges nothing


# Failing closed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_switches_its_own_row_on(model, processor, batch, value):
    never = profile(model, processor, bias=-100.0)

    def poison(module, args, output):
        output = output.clone()
        output[1, -1, 3] = value
        return output

    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, never) as steer, torch.no_grad():
        handle = patch.layers[LAYER - 1].register_forward_hook(poison)
        past = model(**batch, use_cache=True).past_key_values
        handle.remove()
    assert steer.failed.tolist() == [False, True, False]
    assert steer.risk[1] == 1
    assert (steer.risk[[0, 2]] < 0.01).all()
    gate = ras_fast.patching.cache_values.kept(past, never.digest()).tensor
    assert gate.tolist() == pytest.approx([0, EPSILON, 0])


def test_overflowing_logits_fail_closed():
    prober = {"in.weight": torch.ones(1, 1), "in.bias": torch.zeros(1), "out.weight": torch.tensor([[3e38], [1.0]])}
    prober["out.bias"] = torch.zeros(2)
    risk, failed = assess(prober, torch.tensor([[1e-38], [100.0]]))
    assert failed.tolist() == [False, True]
    assert risk[1] == 1


def test_a_row_that_failed_is_turned_at_any_threshold(model, processor, batch):
    highest = profile(model, processor, threshold=1 - 2**-24)
    padded = batch | {"attention_mask": batch["attention_mask"].clone()}
    padded["attention_mask"][0, -1] = 0
    with ras_fast.patch(model) as patch, torch.no_grad():
        plain = model(**padded).logits[:, -1]
        with ras_fast.methods.attach(patch, highest) as steer:
            steer.threshold = 1.0  # as if its risk were not above it
            got = model(**padded).logits[:, -1]
    assert steer.failed.tolist() == [True, False, False]
    assert (got != plain).any(-1).tolist() == [True, False, False]


def test_the_default_dtype_does_not_matter(model, mixed, batch):
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, mixed), torch.no_grad():
        expected = model(**batch).logits
        torch.set_default_dtype(torch.float64)
        try:
            found = model(**batch).logits
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_the_prober_reads_in_full_precision_under_autocast(model, processor, batch):
    prober = AutoSteer(profile(model, processor)).prober
    hidden = torch.randn(4, D)
    risk, _ = assess(prober, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = assess(prober, hidden)
    assert found.dtype == torch.float32
    assert torch.equal(found, risk)


def test_assisted_decoding_is_refused(model, processor, mixed):
    _, text, _ = rows(processor)
    text = {"input_ids": text["input_ids"].repeat(1, 2)}  # so that there is something to look up
    with (
        ras_fast.patch(model) as patch,
        ras_fast.methods.attach(patch, mixed),
        pytest.raises(RuntimeError, match="assisted decoding"),
    ):
        model.generate(**text, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2)


def test_a_model_that_skips_the_judge_is_not_left_alone(model, processor, mixed, batch):
    with (
        ras_fast.patch(model) as patch,
        ras_fast.methods.attach(patch, mixed),
        torch.no_grad(),
        pytest.raises(RuntimeError, match="layer 1, where the prompt is judged"),
    ):
        patch.final_norm(torch.zeros(1, 1, D))


# No waiting for the device


class NoSync(TorchDispatchMode):
    """Refuses what reads a tensor's value on the host."""

    SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in self.SYNCS:
            raise AssertionError(f"{func.name()} waits for the device")
        return func(*args, **(kwargs or {}))


def test_no_sync_guard_sees_a_sync():
    with NoSync(), pytest.raises(AssertionError, match="waits"):
        bool(torch.ones(1) > 0)


def test_hooks_do_not_wait_for_the_device(model, mixed, batch):
    """The text model with the method attached, at a prompt and at a decode step; transformers' own mask code above it reads
    the attention mask on the host."""
    hidden = torch.randn(3, 7, D)
    with (
        ras_fast.patch(model, regions=False) as patch,
        ras_fast.methods.attach(patch, mixed) as steer,
        torch.no_grad(),
        NoSync(),
    ):
        past = patch.text_model(inputs_embeds=hidden, use_cache=True).past_key_values
        patch.text_model(inputs_embeds=hidden[:, :1], past_key_values=past)
    assert steer.risk.shape == (3,)


@pytest.mark.slow
def test_a_decode_step_is_one_graph(model, mixed, batch):
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, mixed), torch.no_grad():
        past = model(**batch, use_cache=True).past_key_values
        expected = model(**step_after(batch), past_key_values=copy.deepcopy(past)).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        got = compiled(**step_after(batch), past_key_values=past).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


# The profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 0.0}, "strength is 0.0"),
        ({"strength": math.nan}, "'strength' is nan"),
        ({"threshold": 1.0}, "threshold 1.0"),
        ({"threshold": 0.9999999999}, "threshold 0.9999999999"),
        ({"strength": 1e-46}, "strength is 1e-46"),
        ({"strength": 1e300}, "strength is 1e"),
        ({"layer": True}, "layer is True"),
        ({"threshold": None}, "'threshold' is None; it needs to be a finite number"),
        ({"strength": "1"}, "'strength' is '1'"),
        ({"layer": "1"}, "layer is '1'; it needs to be the index"),
        ({"layer": LAYERS}, "the profile is for layer 3"),
    ],
)
def test_settings_are_checked(model, processor, change, message):
    with pytest.raises(ValueError, match=message), ras_fast.patch(model) as patch:
        ras_fast.methods.attach(patch, profile(model, processor, **change)).__enter__()


def test_tensors_are_checked(model, processor):
    made = profile(model, processor)
    with pytest.raises(ValueError, match=r"lacks the tensors \['refusal'\]"):
        RasProfile("autosteer", made.config, {k: v for k, v in made.tensors.items() if k != "refusal"})
    with pytest.raises(ValueError, match=r"refusal has shape \(32, 5\); it needs to be \(32, 32\)"):
        AutoSteer(RasProfile("autosteer", made.config, made.tensors | {"refusal": torch.zeros(D, 5)}))
    with pytest.raises(ValueError, match=r"prober_out\.weight has shape"):
        AutoSteer(RasProfile("autosteer", made.config, made.tensors | {"prober_out.weight": torch.zeros(3, 8)}))
    for rank in (None, 2):
        made = profile(model, processor, rank=rank)
        with pytest.raises(ValueError, match="refusal is 0; it needs to be another matrix"):
            AutoSteer(RasProfile("autosteer", made.config, made.tensors | {"refusal": 0 * made.tensors["refusal"]}))
    made = profile(model, processor)
    for name, tensor in (("prober_in.bias", torch.tensor(0.0)), ("refusal", torch.zeros(D)), ("refusal", torch.tensor(0.0))):
        with pytest.raises(ValueError, match="has shape"):
            AutoSteer(RasProfile("autosteer", made.config, made.tensors | {name: tensor}))
    factors = {"refusal": torch.zeros(D, 5), "refusal_right": torch.zeros(4, D)}
    with pytest.raises(ValueError, match=r"refusal has shape \(32, 5\); it needs to be \(32, 4\)"):
        AutoSteer(RasProfile("autosteer", made.config, made.tensors | factors))
    with pytest.raises(ValueError, match=r"lacks \['strength'\]"):
        AutoSteer(RasProfile("autosteer", {"layer": 0, "threshold": 0.5}, made.tensors))
    with pytest.raises(ValueError, match="method is 'projection'"):
        AutoSteer(RasProfile("projection", {}, {"vectors": torch.zeros(1, D)}))


# Calibration


def test_safety_awareness_is_the_mean_pairwise_cosine():
    torch.manual_seed(0)
    safe, toxic = torch.randn(9, 20) + 0.3, torch.randn(9, 20)
    units = torch.nn.functional.normalize((safe - toxic).double(), dim=-1)
    cosines = units @ units.T
    expected = cosines[torch.triu(torch.ones(9, 9, dtype=torch.bool), 1)].mean().item()
    assert safety_awareness(safe, toxic) == pytest.approx(expected, abs=1e-9)
    assert safety_awareness(safe, safe) == 0
    assert safety_awareness(safe + 1, safe) == pytest.approx(1)
    with pytest.raises(ValueError, match="n > 1"):
        safety_awareness(safe[:1], toxic[:1])


def test_prober_learns_a_direction_whatever_the_scale():
    torch.manual_seed(0)
    direction = torch.randn(24)
    noise = torch.randn(2, 200, 24)
    safe, toxic = 1000 * (noise[0] - direction / 3) + 500, 1000 * (noise[1] + direction / 3) + 500
    training, validation = torch.arange(150), torch.arange(150, 200)
    prober, facts = train_prober(safe, toxic, training, validation)
    again, _ = train_prober(safe, toxic, training, validation)
    assert all(torch.equal(prober[name], again[name]) for name in prober)
    risk, failed = assess(prober, torch.cat([safe[150:], toxic[150:]]))
    correct = (risk > 0.5) == torch.tensor([False] * 50 + [True] * 50)
    assert correct.float().mean().item() == pytest.approx(facts["accuracy"])
    assert facts["accuracy"] > 0.9
    assert not failed.any()


def test_a_value_that_does_not_vary_in_calibration_does_not_decide():
    """One rounding step of bfloat16 more or less in it is no event."""
    torch.manual_seed(0)
    direction = torch.randn(64)
    safe, toxic = torch.randn(2, 200, 64) + torch.stack([-direction, direction])[:, None]
    safe[:, 7] = toxic[:, 7] = 300
    prober, _ = train_prober(safe, toxic, torch.arange(150), torch.arange(150, 200))
    for step in (-2.0, 0.0, 2.0):
        for states, harmful in ((safe[150:], False), (toxic[150:], True)):
            states = states.clone()
            states[:, 7] = 300 + step
            assert ((assess(prober, states)[0] > 0.5) == harmful).float().mean() > 0.95
    nearly = torch.tensor([[300.0, 1.0], [300.0, -1.0], [300.01, 0.0]])
    assert _standard(nearly)[1].tolist() == pytest.approx([300 / 128, 1.0], rel=1e-3)


def test_equal_pairs_are_on_one_side_of_the_split():
    training, validation = split(torch.arange(12).repeat(10), 0)
    assert len(training) + len(validation) == 120
    assert not set((training % 12).tolist()) & set((validation % 12).tolist())
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    training, validation = split(torch.arange(20), 3)
    assert torch.equal(torch.cat([validation, training]), order)
    assert len(validation) == 4


def test_the_epoch_is_chosen_on_validation_pairs_only():
    """Labels that are noise in training and in validation: a loss that never falls keeps an early epoch."""
    torch.manual_seed(0)
    safe, toxic = torch.randn(2, 60, 16)
    _, facts = train_prober(safe, toxic, torch.arange(40), torch.arange(40, 60))
    assert facts["epoch"] < 10


UNSAFE = random_words(7, 9)  # with which unsafe questions end, so that a prober has something to find
PAIRS = [(random_image(i), f"{random_words(i, 2)} {UNSAFE}", random_words(40 + i, 4)) for i in range(10)]
PAIRS += [(None, f"{random_words(80 + i, 2)} {UNSAFE}", random_words(90 + i, 5), random_image(20 + i)) for i in range(4)]


@pytest.fixture
def few_epochs(monkeypatch):
    """At a rate at which they are enough."""
    monkeypatch.setattr(refusal_head, "EPOCHS", 3)
    monkeypatch.setattr(refusal_head, "RATE", 160)


def calibrate(model, processor, pairs=PAIRS, **options):
    return autosteer.calibrate(model, processor, pairs=pairs, refusal="w1 w2 w3", progress=False, **options)


def test_calibration_makes_a_profile_that_applies(model, processor, batch, few_epochs, tmp_path):
    with torch.device("meta"):  # whatever torch.set_default_device says
        made = calibrate(model, processor)
    assert made.config["layer"] == max(range(1, LAYERS), key=lambda i: made.config["sas"][str(i)])
    assert made.config["pairs"] == 14
    assert len(made.config["known"]) == autosteer.KNOWN
    made.save_pretrained(tmp_path)
    loaded = RasProfile.from_pretrained(tmp_path)
    loaded.check(model, processor)
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, loaded) as steer:
        model.generate(**batch, max_new_tokens=2)
    assert steer.risk.shape == (3,)
    assert not model.lm_head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_risks_that_a_profile_knows(model, processor):
    """Of the safest and the most toxic question, and of those between that the prober is least sure of."""
    made = profile(model, processor)
    questions = [random_words(i, 2 + i % 5) for i in range(9)]
    risks = {}
    with ras_fast.patch(model) as patch, AutoSteer(made).attach(patch) as steer:
        for query, question in zip(make_queries(questions, None, processor), questions, strict=True):
            model.generate(**encode(processor, query, "cpu", torch.float32)[0], max_new_tokens=1)
            risks[question] = steer.risk.item()
    known = autosteer.known_risks(made, model, processor, [*questions, ""])
    safest, *between, toxic = sorted(risks, key=risks.get)
    between.sort(key=lambda question: abs(risks[question] - 0.5))
    assert known == pytest.approx({question: risks[question] for question in (safest, toxic, *between[:2])}, abs=1e-6)
    assert known == autosteer.known_risks(made, model, processor, known)
    one = autosteer.known_risks(made, model, processor, questions[:1])
    assert one == pytest.approx({questions[0]: risks[questions[0]]}, abs=1e-6)
    assert autosteer.known_risks(made, model, processor, []) == {}
    too_long = random_words(1, autosteer.KNOWN_TOKENS)
    assert autosteer.known_risks(made, model, processor, [too_long]) == {}
    assert autosteer.known_risks(made, model, processor, [too_long, *questions]) == known


def test_known_risks_leave_out_what_cannot_be_judged(model, processor):
    made = profile(model, processor)
    made.tensors["prober_out.weight"] = torch.full((2, 8), torch.inf)
    assert autosteer.known_risks(made, model, processor, ["w1"]) == {}


def test_models_that_cannot_be_defended_as_they_are_have_known_risks(processor):
    """Calibration takes a text model that was compiled by itself; `attach` does not, and says so."""
    model = endless_llava(processor, LAYERS)
    made, questions = profile(model, processor), ["w1 w2", "w3"]
    expected = autosteer.known_risks(made, model, processor, questions)
    model.model.language_model.compile(backend="eager")
    assert autosteer.known_risks(made, model, processor, questions) == pytest.approx(expected, abs=1e-6)


def test_a_layer_of_images_alone_knows_no_questions(processor):
    model = FAMILIES["mllama"].model("mllama")
    d = model.config.get_text_config().hidden_size
    tensors = {"prober_in.weight": torch.ones(8, d), "prober_in.bias": torch.ones(8), "prober_out.weight": torch.ones(2, 8)}
    tensors |= {"prober_out.bias": torch.ones(2), "refusal": torch.eye(d)}
    layer = model.config.get_text_config().cross_attention_layers[0]
    made = RasProfile("autosteer", {"layer": layer, "strength": 1.0, "threshold": 0.5}, tensors, fingerprint(model))
    assert autosteer.known_risks(made, model, processor, ["w1"]) == {}
    made.config["layer"] = layer - 1
    assert autosteer.known_risks(made, model, processor, ["w1"]) == {"w1": 0.5}


def test_captured_states_are_the_models_own(model, processor):
    """Whatever is batched together, padding and answers included."""
    unsafe, *_ = autosteer._queries(PAIRS, processor)
    answer = [7, 9, 11]
    toxic, final = autosteer._capture(model, processor, unsafe, [0, 2], answer, 4, "", False)
    for i, query in enumerate(unsafe):
        inputs, _ = encode(processor, query, "cpu", torch.float32)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        torch.testing.assert_close(toxic[:, i], torch.stack([states[0][0, -4], states[2][0, -4]]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(final[i], states[-1][0, -4:-1], atol=1e-4, rtol=1e-4)


def test_the_head_learns_the_refusal(model, processor, monkeypatch):
    monkeypatch.setattr(refusal_head, "EPOCHS", 60)
    made = calibrate(model, processor, layer=1)
    losses = made.config["head"]["losses"]
    assert losses[made.config["head"]["epoch"]] == min(losses) < 0.5 * losses[0]
    rates = made.config["strengths"]
    assert rates[str(made.config["strength"])] == max(rates.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calibration_where_gradients_are_off(model, processor, few_epochs, mode):
    expected = calibrate(model, processor)
    with mode():
        got = calibrate(model, processor)
    assert got.config == expected.config
    assert all(torch.equal(got.tensors[name], expected.tensors[name]) for name in expected.tensors)


def test_a_fixed_layer_and_validation(model, processor, few_epochs):
    assert calibrate(model, processor, layer=2).config["layer"] == 2
    assert calibrate(model, processor, layer="validation").config["layer"] in range(1, LAYERS)


@pytest.mark.parametrize("layer", ["sas", "validation"])
def test_a_layer_that_sees_no_difference_is_not_chosen(layer):
    """Layer 0 is entered by the embedding of the prompt's last token, its score is 0: more than that of the other one."""
    torch.manual_seed(0)
    noise = torch.randn(20, 8)
    safe, toxic = torch.stack([noise, noise]), torch.stack([noise, torch.randn(20, 8)])
    states, training = {"safe": safe, "toxic": toxic}, torch.arange(15)
    chosen, *_ = choose_layer(layer, {0: 0.0, 4: -0.1}, states, training, torch.arange(15, 20), 0)
    assert chosen == 4


def test_a_gate_that_tells_nothing_apart_is_refused(model, processor, monkeypatch):
    with pytest.raises(ValueError, match=r"layer is 0, but what enters layers \[0\] .* is the same"):
        calibrate(model, processor, layer=0)
    same = [(None, f"w1 w{i}", f"w1  w{i}", None) for i in range(10)]  # the same tokens
    with pytest.raises(ValueError, match=r"what enters layers \[0, 1, 2\] .* is the same"):
        calibrate(model, processor, same)
    monkeypatch.setattr(autosteer, "train_head", lambda *args: pytest.fail("the gate is known before the head"))
    shut = {"in.weight": torch.zeros(1, D), "in.bias": torch.zeros(1), "out.weight": torch.zeros(2, 1)}
    shut["out.bias"] = torch.tensor([1.0, 0.0])
    monkeypatch.setattr("ras_fast.methods.prober.train_prober", lambda *args, **options: (shut, {"loss": 0.5}))
    with pytest.raises(ValueError, match=r"layer 1, opens for 0% of the held-out unsafe questions .* no better than chance"):
        calibrate(model, processor, layer=1)


@pytest.mark.parametrize("options", [{"strength": 0.001}, {"rank": 1, "strength": 64.0}], ids=str)
def test_a_head_that_never_refuses_is_refused(model, processor, few_epochs, options):
    with pytest.raises(ValueError, match=f"at strength {options['strength']} none of the held-out answers is the refusal"):
        calibrate(model, processor, **options)


def test_the_threshold_keeps_to_what_may_be_refused():
    """A prober whose risk is σ(x) of a state's first value."""
    prober = {
        "in.weight": torch.tensor([[1.0, 0], [-1.0, 0]]), "in.bias": torch.zeros(2),
        "out.weight": torch.tensor([[0.0, 0], [1.0, -1]]), "out.bias": torch.zeros(2),
    }  # fmt: skip
    risks = torch.tensor([0.9, 0.4, 0.3, 0.2, 0.1])
    safe = torch.stack([risks.logit(), torch.zeros(5)], 1)
    expected = {None: (0.5, 0.2), 0.0: (0.5, 0.2), 0.2: (0.4, 0.2), 0.5: (0.3, 0.4), 1.0: (0.0, 1.0)}
    for over_refusal, (threshold, refused) in expected.items():
        got, facts = gate_threshold(prober, safe, safe[:3], over_refusal)
        assert got == pytest.approx(threshold, abs=1e-6)
        assert facts["refused_safe"] == pytest.approx(refused)
    assert facts["refused_toxic"] == 1


def test_full_rank_is_the_full_head_and_low_rank_says_what_it_keeps(model, processor, few_epochs):
    full, whole, half = (calibrate(model, processor, rank=rank) for rank in (None, D, 4))
    product = whole.tensors["refusal"] @ whole.tensors["refusal_right"]
    torch.testing.assert_close(product, full.tensors["refusal"], atol=1e-4, rtol=1e-4)
    assert whole.config["head"]["energy"] == pytest.approx(1, abs=1e-5)
    assert 0 < half.config["head"]["energy"] < 1
    assert half.tensors["refusal_right"].shape == (4, D)


def test_an_interrupted_calibration_resumes_where_it_was(model, processor, few_epochs, monkeypatch, tmp_path):
    expected = calibrate(model, processor)
    monkeypatch.setattr(refusal_head, "EPOCHS", 1)  # as if stopped after the first epoch; the shuffle is by (seed, epoch)
    with pytest.raises(ValueError, match="none of the held-out answers"):
        calibrate(model, processor, checkpoint=tmp_path)
    monkeypatch.setattr(refusal_head, "EPOCHS", 3)
    monkeypatch.setattr(autosteer, "_capture", lambda *args: pytest.fail("the states were saved"))
    resumed = calibrate(model, processor, checkpoint=tmp_path)
    assert resumed.config == expected.config
    assert all(torch.equal(resumed.tensors[name], expected.tensors[name]) for name in expected.tensors)
    assert set(load_file(tmp_path / "head.safetensors")) >= {"m", "best", "exp_avg"}
    with pytest.raises(ValueError, match="another calibration"):
        calibrate(model, processor, PAIRS[:-1], checkpoint=tmp_path)
    (tmp_path / "states.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        calibrate(model, processor, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": PAIRS[:9]}, "pairs holds 9"),
        ({"pairs": PAIRS[:9] * 2}, "pairs holds 9 different"),
        ({"pairs": [*PAIRS, (None, "w1")]}, r"pairs\[14\] has 2 entries"),
        ({"pairs": [*PAIRS, (torch.full((4, 4), torch.nan), "w1", "w2")]}, "NaN or infinite pixels"),
        ({"layer": 9}, "layer is 9"),
        ({"layer": "best"}, "layer is 'best'"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"layer": True}, "layer is True"),
        ({"over_refusal": 1.5}, "over_refusal is 1.5"),
        ({"over_refusal": "0.1"}, "over_refusal is '0.1'"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"strength": -1.0}, "strength is -1.0"),
        ({"strength": "1"}, "strength is '1'; it needs to be a positive, finite number"),
        ({"seed": 1.5}, "seed is 1.5; it needs to be an integer"),
        ({"checkpoint": __file__}, "checkpoint is .*, which is there and no folder"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_calibrate_checks_its_arguments(model, processor, changes, message):
    with pytest.raises(ValueError, match=message):
        calibrate(model, processor, **changes)


def test_a_refusal_that_is_no_text(model, processor):
    for refusal in ("w1 \udce4", None):
        with pytest.raises(ValueError, match="it needs to be a string of whole characters"):
            autosteer.calibrate(model, processor, pairs=PAIRS, refusal=refusal, progress=False)


def test_batches_join_only_what_fits(processor):
    encoded = rows(processor)
    grouped = list(batches(encoded, 2))
    assert [numbers for numbers, _ in grouped] == [[0, 2], [1]]
    joined = left_padded(grouped[0][1], 0, [5])
    assert joined["pixel_values"].shape[0] == 2
    assert joined["input_ids"][:, -1].tolist() == [5, 5]
    for row, one in zip(range(2), grouped[0][1], strict=True):
        real = joined["attention_mask"][row].bool()
        assert joined["input_ids"][row][real][:-1].tolist() == one["input_ids"][0].tolist()
