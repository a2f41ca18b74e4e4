"""AutoSteer's gates in an engine's steps, without vLLM: on a model whose layers and head are called as vLLM's are."""

import copy
import math
from functools import partial

import pytest
import torch
from test_vllm_steering import same_bits
from torch import nn

from ras_fast.methods.prober import assess
from ras_fast.profile import RasProfile
from ras_fast.vllm import gate as module
from ras_fast.vllm.gate import GateSteering, adds_residual, can_be_judged, check_known, known_questions
from ras_fast.vllm.options import Marks

HIDDEN, VOCABULARY, EOS, LAYERS, TOKENS = 24, 37, 5, 3, 50  # odd sizes on purpose


class Layer(nn.Module):
    """Passes on what is still to be added apart, as vLLM's layers do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, positions, hidden_states, residual, **others):
        residual = hidden_states if residual is None else hidden_states + residual
        return self.linear(residual), residual


class Adding(Layer):
    """Adds up for itself, and passes on what it began with as though that were still to be added, as Cohere's layers do."""

    def forward(self, positions, hidden_states, residual):
        residual = hidden_states
        hidden_states = self.linear(hidden_states) + residual
        return hidden_states, residual


class Head(nn.Module):
    def forward(self, lm_head, hidden_states, embedding_bias=None):
        return hidden_states @ lm_head.T


class Model(nn.Module):
    layer = Layer

    def __init__(self, by_name: bool):
        super().__init__()
        self.layers = nn.ModuleList(self.layer() for _ in range(LAYERS))
        self.logits_processor, self.weight = Head(), nn.Parameter(torch.randn(VOCABULARY, HIDDEN))
        self.by_name = by_name

    def forward(self, hidden):
        residual = None
        for layer in self.layers:
            if self.by_name:
                hidden, residual = layer(positions=None, hidden_states=hidden, residual=residual)
            else:
                hidden, residual = layer(None, hidden, residual)
        return hidden + residual if self.layer is Layer else hidden

    def compute_logits(self, hidden):
        return self.logits_processor(self.weight, hidden).float()

    def entering(self, hidden, layer):
        for before in self.layers[:layer]:
            hidden = hidden + before.linear(hidden)
        return hidden


def make_profile(layer=1, threshold=0.5, strength=3.0, rank=None) -> RasProfile:
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    prober = {"in.weight": 2 * random(16, HIDDEN), "in.bias": random(16), "out.weight": 3 * random(2, 16)}
    tensors = {f"prober_{name}": tensor for name, tensor in prober.items()} | {"prober_out.bias": random(2)}
    tensors |= {"refusal": random(HIDDEN, rank or HIDDEN)} | ({"refusal_right": random(rank, HIDDEN)} if rank else {})
    return RasProfile("autosteer", {"layer": layer, "threshold": threshold, "strength": strength}, tensors)


class AddingModel(Model):
    layer = Adding


class Engine:
    """One step after another, as vLLM's runners do them. chosen: the tokens whose rows are drawn from."""

    def __init__(self, profile=None, dtype=torch.float32, eos=EOS, by_name=False, kind=Model):
        torch.manual_seed(0)
        self.model = kind(by_name).to(dtype).requires_grad_(False)
        self.exact = copy.deepcopy(self.model).float()
        self.profile = profile or make_profile()
        self.agreed = []
        self.steering = GateSteering(
            self.profile, lambda states: states @ self.model.weight.float().T, TOKENS, eos, "cpu", dtype, self._agree
        )
        self.steering.attach(self.model, self.model.layers, [self.model.logits_processor], run_layer)

    def _agree(self, risks):
        self.agreed.append(risks)
        return risks

    def step(self, hidden, chosen, rows):
        """(logits as they come, as they are steered) of the chosen tokens."""
        logits = self.model.compute_logits(self.model(hidden)[chosen])
        return logits.clone(), self.steering.apply(logits, rows)

    def wanted(self, hidden, chosen):
        """(t, logits, steered logits) of what the model makes of the chosen tokens, in fp32 and fp64."""
        entering = self.exact.entering(hidden.float(), self.profile.config["layer"])
        prober = {name.removeprefix("prober_"): t for name, t in self.profile.tensors.items() if name.startswith("prober_")}
        risk, _ = assess(prober, entering[chosen])
        final = self.exact.entering(hidden.float(), LAYERS)[chosen].double()
        refusal = self.profile.tensors["refusal"].double()
        if "refusal_right" in self.profile.tensors:
            refusal = refusal @ self.profile.tensors["refusal_right"].double()
        steered = final + 0.1 * self.profile.config["strength"] * final @ refusal.T
        weight = self.exact.weight.double()
        return risk, final @ weight.T, steered @ weight.T


def run_layer(layer, hidden, residual):
    return torch.cat(layer(None, hidden, residual), dim=-1)


def prompts(count: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", [Model, AddingModel])
def test_rows_above_the_threshold_are_steered_and_no_others(layer, rank, by_name, kind):
    engine = Engine(make_profile(layer, rank=rank), by_name=by_name, kind=kind)
    hidden, chosen = prompts(30), torch.tensor([3, 4, 9, 17, 18, 22, 29])
    risk, plain, steered = engine.wanted(hidden, chosen)
    above = risk > 0.5
    assert 1 <= above.sum() <= 6
    before, after = engine.step(hidden, chosen, [(n, 0, Marks(record=100 + n)) for n in range(7)])
    assert torch.allclose(before.double(), plain, atol=1e-5)
    assert torch.allclose(after[above].double(), steered[above], atol=1e-5)
    assert same_bits(after[~above], before[~above])
    assert not torch.allclose(after[above], before[above], atol=1e-2)
    found = engine.steering.judge([100 + n for n in range(7)])
    assert [t for t, _ in found] == pytest.approx(risk.tolist(), abs=1e-6)
    assert not any(failed for _, failed in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_risks_are_not_rounded_on_their_way(dtype):
    """They travel beside the hidden states in half precision, and the threshold may lie anywhere."""
    engine = Engine(dtype=dtype)
    hidden, chosen = prompts(TOKENS, dtype), torch.arange(TOKENS)
    engine.model(hidden)
    judged = []
    engine.model.layers[2].register_forward_pre_hook(
        lambda module, args: judged.append(engine.model.layers[1].ras_judge.risks.clone())
    )
    _, after = engine.step(hidden, chosen, [(n, 0, Marks(record=n)) for n in range(TOKENS)])
    found = torch.tensor([t for t, _ in engine.steering.judge(range(TOKENS))])
    assert same_bits(found, judged[0])
    assert not torch.equal(found.to(dtype).float(), found)
    risk, _, steered = engine.wanted(hidden, chosen)
    assert torch.allclose(found, risk, atol=0.05)
    above = found > 0.5
    assert torch.allclose(after[above].double(), steered[above], atol=0.4)


def test_a_gate_stays_as_the_prompt_was_judged():
    engine = Engine()
    hidden, chosen = prompts(12), torch.arange(12)
    risk, *_ = engine.wanted(hidden, chosen)
    toxic, safe = risk.argmax().item(), risk.argmin().item()
    engine.step(hidden, chosen, [(toxic, 0, Marks(record=1)), (safe, 0, Marks(record=2))])
    assert len(engine.agreed) == 1
    swapped = [(safe, 1, Marks(record=1)), (toxic, 1, Marks(record=2))]  # what the tokens of the answer look like is no matter
    before, after = engine.step(hidden, chosen, swapped)
    *_, steered = engine.wanted(hidden, chosen)
    assert torch.allclose(after[safe].double(), steered[safe], atol=1e-5)
    others = [row for row in range(12) if row != safe]
    assert same_bits(after[others], before[others])
    assert len(engine.agreed) == 1  # no prompt has ended: nothing is read from the device


def test_a_prompt_that_is_read_in_pieces_is_judged_at_its_last():
    engine = Engine()
    hidden, chosen = prompts(12), torch.arange(12)
    risk, *_ = engine.wanted(hidden, chosen)
    toxic, safe = risk.argmax().item(), risk.argmin().item()
    engine.step(hidden, chosen, [(toxic, 0, Marks(record=1)), (safe, 0, Marks(record=2))])
    engine.step(hidden, chosen, [(safe, 0, Marks(record=1)), (toxic, 0, Marks(record=2))])
    assert [t for t, _ in engine.steering.judge([1, 2])] == pytest.approx([risk[safe].item(), risk[toxic].item()], abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_as_toxic_and_ends(value):
    engine = Engine()
    hidden, chosen = prompts(6), torch.arange(6)
    hidden[2, 3] = value
    _, after = engine.step(hidden, chosen, [(n, 0, Marks(record=n)) for n in range(6)])
    assert engine.steering.judge([2]) == [(1.0, True)]
    assert after[2].argmax() == EOS
    assert after[2].isneginf().sum() == VOCABULARY - 1
    assert after[[0, 1, 3, 4, 5]].isfinite().all()


def test_without_an_end_a_broken_row_stays_so():
    engine = Engine(eos=None)
    hidden = prompts(1)
    hidden[0, 3] = math.nan
    _, after = engine.step(hidden, torch.tensor([0]), [(0, 0, Marks(record=1))])
    assert after.isnan().all()


def test_what_others_forbid_stays_forbidden():
    engine = Engine()
    logits = engine.model.compute_logits(engine.model(prompts(3)))
    logits[:, ::2] = -math.inf
    after = engine.steering.apply(logits.clone(), [(n, 0, Marks(risk=1.0)) for n in range(3)])
    assert torch.equal(after.isneginf(), logits.isneginf())
    assert not torch.equal(after, logits)


def test_a_risk_that_a_request_brings_counts_by_itself_and_in_place_of_its_own():
    engine = Engine()
    hidden, chosen = prompts(12), torch.arange(12)
    risk, *_ = engine.wanted(hidden, chosen)
    toxic, safe = risk.argmax().item(), risk.argmin().item()
    rows = [(toxic, 0, Marks(risk=0.5)), (safe, 0, Marks(risk=0.51, record=1))]
    before, after = engine.step(hidden, chosen, rows)
    assert [row for row in range(12) if not torch.equal(before[row], after[row])] == [safe]
    assert engine.steering.judge([1]) == [(0.51, False)]


def test_a_risk_at_the_threshold_is_not_above_it():
    """In fp32, as `AutoSteer` compares them: a threshold in double may lie a little below the risk that it rounds to."""
    hidden, chosen = prompts(4), torch.arange(4)
    risk, *_ = Engine().wanted(hidden, chosen)
    row = risk.argsort()[1].item()
    engine = Engine()
    engine.step(hidden, chosen, [(row, 0, Marks(record=1))])
    ((exact, _),) = engine.steering.judge([1])
    for threshold, steered in ((exact - 1e-12, False), (exact, False), (exact * (1 - 1e-6), True)):
        before, after = Engine(make_profile(threshold=threshold)).step(hidden, chosen, [(row, 0, Marks(record=1))])
        assert torch.equal(before[row], after[row]) is not steered


def test_a_request_whose_gate_was_lost_is_steered(monkeypatch):
    monkeypatch.setattr(module, "RECORDS", 2)
    engine = Engine(make_profile(threshold=0.999999))
    hidden, chosen = prompts(4), torch.arange(4)
    risk, *_ = engine.wanted(hidden, chosen)
    assert risk.max() < 0.999999
    for n in range(3):
        before, after = engine.step(hidden, chosen, [(n, 0, Marks(record=n))])
        assert same_bits(after, before)
    assert engine.steering.judge([0, 1, 2])[0] is None  # the oldest gives way
    before, after = engine.step(hidden, chosen, [(n, 1, Marks(record=n)) for n in range(3)])
    assert [row for row in range(4) if not torch.equal(before[row], after[row])] == [0]
    engine.steering.forget([1, None, 77])
    before, after = engine.step(hidden, chosen, [(1, 2, Marks(record=1))])
    assert not torch.equal(after[1], before[1])


def test_a_request_that_only_brings_noise_is_not_steered():
    """`ras_noise` says nothing of a risk; vLLM lets it through."""
    engine = Engine()
    before, after = engine.step(prompts(2), torch.arange(2), [(0, 0, Marks()), (1, 3, Marks())])
    assert same_bits(after, before)


def test_requests_that_share_a_number_are_steered():
    """The one's gate would be the other's."""
    engine = Engine(make_profile(threshold=0.999999))
    hidden, chosen = prompts(2), torch.arange(2)
    before, after = engine.step(hidden, chosen, [(0, 0, Marks(record=1))])
    assert same_bits(after, before)
    for rows in ([(0, 1, Marks(record=1)), (1, 0, Marks(record=1))], [(0, 2, Marks(record=1))]):
        before, after = engine.step(hidden, chosen, rows)
        assert not any(torch.equal(before[row], after[row]) for row, _, _ in rows)
    assert engine.steering.judge([1]) == [None]


def test_what_a_forward_leaves_out_counts_as_toxic():
    engine = Engine()
    hidden, chosen = prompts(4), torch.arange(4)
    risk, *_ = engine.wanted(hidden, chosen)
    safe = risk.argmin().item()
    assert risk[safe] < 0.5
    engine.step(hidden, chosen, [])
    layers = engine.model.layers
    engine.model.layers = nn.ModuleList([layers[0], layers[2]])
    engine.step(hidden, chosen, [(safe, 0, Marks(record=1))])
    assert engine.steering.judge([1]) == [(1.0, True)]


def test_rows_of_another_forward_are_an_error():
    engine = Engine()
    logits = engine.model.compute_logits(engine.model(prompts(3)))
    with pytest.raises(RuntimeError, match="2 rows of logits, and the hidden states of 3"):
        engine.steering.apply(logits[:2], [(0, 0, Marks(record=1))])
    assert engine.steering.apply(logits[:2], []) is not None  # nobody asks for anything
    head = torch.randn(VOCABULARY, HIDDEN)
    unattached = GateSteering(
        make_profile(), lambda states: states @ head.T, TOKENS, EOS, "cpu", torch.float32, lambda risks: risks
    )
    with pytest.raises(RuntimeError, match="the hidden states of 0"):
        unattached.apply(logits, [(0, 0, Marks(record=1))])


@pytest.mark.parametrize("size", [1, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 5])
def test_heads_that_are_refused(rank, dtype, size):
    """By logits as large as those of answers, however small the refusal head's matrix is."""
    profile = make_profile(rank=rank)
    profile.tensors |= {name: size * tensor for name, tensor in profile.tensors.items() if name.startswith("refusal")}
    engine = Engine(profile, dtype)
    engine.steering.prove(engine.model.compute_logits, dtype)
    engine.steering.prove(lambda states: None, torch.float32)  # of a worker that makes no logits
    for head in (
        lambda states: engine.model.compute_logits(states) + 10,
        lambda states: 30 * torch.tanh(engine.model.compute_logits(states) / 30),
        lambda states: 1.1 * engine.model.compute_logits(states),
    ):
        with pytest.raises(ValueError, match="differ from its checkpoint's LM head"):
            engine.steering.prove(head, dtype)


@pytest.mark.parametrize("logit", [0.0, math.inf, math.nan])
def test_a_refusal_that_gives_no_logits_to_know_a_head_by_is_refused(logit):
    def head(states):
        return torch.full((len(states), VOCABULARY), logit)

    with pytest.raises(ValueError, match=f"profile refusal gives logits of up to {logit}; they need to be finite"):
        GateSteering(make_profile(), head, TOKENS, EOS, "cpu", torch.float32, lambda risks: risks)


def test_a_profile_that_changes_attention_is_refused():
    profile = make_profile()
    profile.tensors["region_bias"] = torch.zeros(1)
    with pytest.raises(ValueError, match="region_bias"):
        Engine(profile)


def test_layers_that_are_refused():
    steering = Engine(make_profile(layer=2)).steering
    model = Model(False)
    with pytest.raises(ValueError, match=r"for layer 2; the model has layers 0\.\.1"):
        steering.attach(model, model.layers[:2], [], run_layer)
    assert can_be_judged(model.layers[0])
    assert not can_be_judged(model.layers[0].linear)
    for run in (
        lambda layer, hidden, residual: run_layer(layer, hidden, 2 * residual),
        lambda layer, hidden, residual: torch.cat([layer.linear(hidden), residual], dim=-1),  # passes it on as it was
        lambda layer, hidden, residual: torch.zeros_like(hidden),
        lambda layer, hidden, residual: torch.full_like(hidden, torch.nan),
    ):
        with pytest.raises(ValueError, match="neither adds its residual"):
            steering.attach(model, model.layers, [], run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whether_a_layer_adds_its_residual_is_tried_out(dtype):
    states = torch.randn(3, 8, HIDDEN).to(dtype)
    for layer, adds in ((Layer(), True), (Adding(), False)):
        assert adds_residual(partial(run_layer, layer.to(dtype).requires_grad_(False)), states) is adds
    # One that attends and no more: as it is tried out, attention gives zeros.
    assert adds_residual(lambda hidden, residual: torch.cat([0 * hidden, hidden + residual], dim=-1), states)


def test_known_risks():
    config = {"known": {"safe": 1e-3, "toxic": 1.0, "between": 0.5}}
    assert known_questions(config) == list(config["known"])
    check_known(config, [4e-3, 1 - 4e-7, 0.8])
    check_known({"known": {"safe": 1e-20}}, [0.0])  # both as good as none
    for risks in ([6e-3, 1, 0.5], [1e-4, 1, 0.5], [1e-3, 1, 0.85], [1e-3, 1 - 1e-5, 0.5], [1e-3, math.nan, 0.5]):
        with pytest.raises(ValueError, match="calibration found"):
            check_known(config, risks)
    for known in (None, {}, ["safe"]):
        with pytest.raises(ValueError, match="'known' is"):
            known_questions({"known": known})
    with pytest.raises(ValueError, match="'safe' is 'low'"):
        check_known({"known": {"safe": "low"}}, [0.1])


def test_a_compiled_forward_judges_too():
    engine = Engine()
    hidden, chosen = prompts(9), torch.arange(9)
    risk, *_ = engine.wanted(hidden, chosen)
    layer = engine.model.layers[1]
    compiled = torch.compile(lambda *args: layer(*args), backend="eager", fullgraph=True)
    compiled(None, engine.model.entering(hidden, 1), None)
    assert torch.allclose(layer.ras_judge.risks[:9], risk, atol=1e-6)
    assert layer.ras_judge.risks[9:].isnan().all()
