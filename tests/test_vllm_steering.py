"""MoRAS on logits, what requests carry and the LM head of a checkpoint: what the vLLM integration does without vLLM."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ras_fast.methods.moras import PRESETS, Moras
from ras_fast.profile import RasProfile
from ras_fast.vllm import steering as module
from ras_fast.vllm.checkpoint import CheckpointHead
from ras_fast.vllm.options import Draw, Marks, check_marks, engine_args, read_marks, read_settings
from ras_fast.vllm.steering import LogitSteering, drawn

STEPS, HIDDEN, VOCABULARY, EOS = 3, 24, 37, 5  # odd sizes on purpose


def make_profile(**config) -> RasProfile:
    generator = torch.Generator().manual_seed(3)
    settings = PRESETS["moras"] | {"s_base": 0.5, "k": 9.0} | config
    return RasProfile("moras", settings, {"prototypes": torch.randn(STEPS, HIDDEN, generator=generator)})


def weight() -> torch.Tensor:
    return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(4))


def make_steering(profile=None, slots=4, eos=EOS) -> LogitSteering:
    return LogitSteering(profile or make_profile(), lambda hidden: hidden @ weight().T, slots, eos, torch.device("cpu"))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("risk", [0.0, 1e-6, 0.3, 0.5, 0.99, 1.0])
def test_logits_are_those_of_steered_states(risk):
    """Against (1 − r) h + r μ before the head, in fp64."""
    profile, hidden = make_profile(), torch.randn(STEPS, HIDDEN)
    prototypes = profile.tensors["prototypes"].double()
    wanted = ((1 - risk) * hidden.double() + risk * prototypes) @ weight().double().T
    logits = hidden @ weight().T
    rows = [(n, n, Marks(risk=risk)) for n in range(STEPS)]
    found = make_steering(profile).apply(logits.clone(), rows)
    assert torch.allclose(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_are_refused(dtype):
    """Those of an engine that do more to a state than the checkpoint's matrix, or something else."""
    steering, own = make_steering(), weight().to(dtype)
    steering.prove(lambda states: states @ own.T, dtype)
    steering.prove(lambda states: None, dtype)  # of a worker that makes no logits
    for head in (
        lambda states: states @ own.T + 10,
        lambda states: 1.1 * states @ own.T,
        lambda states: 30 * torch.tanh(states @ own.T / 30),
        lambda states: (states @ own.T)[:, :-1],
        lambda states: torch.full((len(states), VOCABULARY), torch.nan),
    ):
        with pytest.raises(ValueError, match="differ from its checkpoint's LM head"):
            steering.prove(head, dtype)


def test_other_rows_and_later_steps_keep_their_bits():
    logits = torch.randn(6, VOCABULARY)
    logits[5] = torch.nan
    steering, before = make_steering(), logits.clone()
    rows = [(1, 0, Marks(risk=0.7)), (2, STEPS, Marks(risk=0.7, record=0)), (3, -1, Marks(risk=0.7)), (4, 2, Marks(record=1))]
    after = steering.apply(logits, rows)
    assert after is logits
    for row in (0, 2, 3, 4, 5):
        assert same_bits(after[row], before[row])
    assert not torch.equal(after[1], before[1])
    assert not steering.records  # neither has a first step


def test_full_risk_replaces_what_is_not_finite():
    steering = make_steering()
    logits = torch.full((2, VOCABULARY), torch.nan)
    after = steering.apply(logits, [(0, 1, Marks(risk=1.0)), (1, 1, Marks(risk=0.5))])
    assert torch.equal(after[0], steering.table[1])
    assert after[1].argmax().item() == EOS  # there is nothing to read out of it: it can only end
    assert after[1].isneginf().sum() == VOCABULARY - 1


def test_without_an_end_a_broken_row_stays_so():
    logits = torch.randn(1, VOCABULARY)
    logits[0, 3] = torch.nan
    assert make_steering(eos=None).apply(logits, [(0, 0, Marks(risk=0.5))])[0, 3].isnan()


def test_prototypes_that_give_no_finite_logits_are_refused():
    profile = make_profile()
    profile.tensors["prototypes"] *= 1e38
    with pytest.raises(ValueError, match="logits that are not finite"):
        make_steering(profile)


@pytest.mark.parametrize("risk", [0.4, 1.0])
def test_what_others_forbid_stays_forbidden(risk):
    logits = torch.randn(1, VOCABULARY)
    logits[0, ::2] = -torch.inf
    after = make_steering().apply(logits.clone(), [(0, 0, Marks(risk=risk))])
    assert torch.equal(after.isneginf(), logits.isneginf())


def keep(steering: LogitSteering, record: int, logits: torch.Tensor) -> None:
    for n, row in enumerate(logits):
        steering.apply(row[None].clone(), [(0, n, Marks(record=record))])


def test_judges_as_moras_does():
    steering, profile = make_steering(), make_profile()
    moras = Moras(profile, lambda hidden: hidden @ weight().T, "cpu", torch.float32)
    stage2, draft = torch.randn(2, STEPS, VOCABULARY) * 3
    stage2 += steering.table  # near a refusal
    keep(steering, 0, draft)
    keep(steering, 1, stage2)
    ((similarity, risk, failed, drafted, tokens),) = steering.judge([(1, 8, 0, 24, False)])
    assert similarity == pytest.approx(moras.similarity(stage2[None]).item(), abs=1e-6)
    assert risk == moras.risk(torch.tensor([similarity]))[0].item()
    assert not failed
    after = steering.apply(draft.clone(), [(n, n, Marks(risk=risk)) for n in range(STEPS)])
    assert tokens == after.argmax(-1).tolist()
    assert drafted == draft.argmax(-1).tolist()


# Sampling


def nucleus(probabilities: torch.Tensor, share: float) -> torch.Tensor:
    """The fewest tokens, most likely first, that hold ``share``."""
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    return torch.zeros_like(order, dtype=torch.bool).index_put((order,), before < share)


SETTINGS = {  # and which tokens they allow, of probabilities p
    "none": ({}, lambda p: p > 0),
    "temperature": ({"temperature": 2.5}, lambda p: p > 0),
    "top_k": ({"top_k": 4}, lambda p: p >= p.topk(4).values[-1]),
    "top_p": ({"top_p": 0.6}, lambda p: nucleus(p, 0.6)),
    "min_p": ({"min_p": 0.2}, lambda p: p >= 0.2 * p.max()),
    "both": ({"min_p": 0.2, "top_p": 0.7}, lambda p: nucleus(p * (p >= 0.2 * p.max()) / p[p >= 0.2 * p.max()].sum(), 0.7)),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_tokens_are_drawn_as_the_settings_say(case):
    options, allowed = SETTINGS[case]
    logits, count = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)), 4000
    found = torch.cat([drawn(logits, noise % STEPS, draw(noise=noise, **options)) for noise in range(count)])
    shares = found.bincount(minlength=VOCABULARY) / count
    probabilities = (logits / options.get("temperature", 1.0)).softmax(-1)
    wanted = probabilities * allowed(probabilities)
    assert (shares - wanted / wanted.sum()).abs().max() < 5 * 0.5 / math.sqrt(count)
    assert not shares[wanted == 0].any()


def draw(noise=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Draw:
    return Draw(noise, temperature, top_k, top_p, min_p)


@pytest.mark.parametrize("risk", [0.02, 0.4, 1.0])
def test_drafts_that_stand_are_samples_of_the_steered_model(risk):
    """A draft and the answer in its place draw by the same noise. The judgement knows both, the rate at which they differ is
    of the order of the risk, and what comes out has the distribution that steering gives."""
    steering, count = make_steering(slots=4), 1500
    logits = torch.randn(STEPS, VOCABULARY, generator=torch.Generator().manual_seed(2))
    steering.moras.risk = lambda similarity: (torch.full_like(similarity, risk), torch.zeros_like(similarity, dtype=torch.bool))
    firsts, fell = torch.zeros(VOCABULARY), 0
    for noise in range(count):
        draft, answer = (
            torch.cat([steering.apply(logits[n : n + 1].clone(), [(0, n, marks)]) for n in range(STEPS)])
            for marks in (Marks(record=0, draw=draw(noise)), Marks(risk=risk, draw=draw(noise)))
        )
        keep(steering, 1, logits)
        ((_, _, _, plain, steered),) = steering.judge([(1, STEPS, 0, STEPS, False)])
        for rows, tokens in ((draft, plain), (answer, steered)):
            assert rows.argmax(-1).tolist() == tokens
            assert (rows > -torch.inf).sum(-1).tolist() == [1] * STEPS
        fell += plain != steered
        firsts[plain[0] if plain == steered else steered[0]] += 1
    wanted = ((1 - risk) * logits[0] + risk * steering.table[0]).softmax(-1)
    assert (firsts / count - wanted).abs().max() < 5 * 0.5 / math.sqrt(count)
    assert 0 < fell < 10 * risk * count


def test_a_drafts_own_tokens_are_those_that_were_drawn(monkeypatch):
    """On a GPU top_p may go by other sums when a token is drawn once more: a draft stands by the tokens that it has."""
    steering, logits = make_steering(), torch.randn(STEPS, VOCABULARY)
    draft = [steering.apply(logits[n : n + 1].clone(), [(0, n, Marks(record=0, draw=draw()))]) for n in range(STEPS)]
    keep(steering, 1, logits)
    other = (draft[1].argmax() + 1) % VOCABULARY
    monkeypatch.setattr(module, "drawn", lambda *args: other[None])
    ((_, _, _, plain, steered),) = steering.judge([(1, STEPS, 0, STEPS, False)])
    assert plain == [row.argmax().item() for row in draft]
    assert steered == [other.item()] * STEPS


def test_noise_depends_on_step_and_number_alone():
    logits = torch.randn(VOCABULARY)
    tokens = [[drawn(logits, step, draw(noise)).item() for step in range(50)] for noise in (0, 0, 1)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len(set(tokens[0])) > 5


def test_what_is_forbidden_is_not_drawn_and_a_broken_answer_ends():
    steering, logits = make_steering(), torch.zeros(2, VOCABULARY)
    logits[0, 1:] = -torch.inf
    logits[1, 3] = torch.nan
    after = steering.apply(logits, [(row, 0, Marks(risk=0.5, draw=draw())) for row in (0, 1)])
    assert after.argmax(-1).tolist() == [0, EOS]


def test_judges_by_the_steps_that_were_made():
    """A stage that ended early leaves what an earlier run of it kept in its record, here NaN."""
    steering, logits = make_steering(), torch.randn(STEPS, VOCABULARY)
    keep(steering, 0, torch.full((STEPS, VOCABULARY), torch.nan))
    keep(steering, 1, torch.full((STEPS, VOCABULARY), torch.nan))
    keep(steering, 0, logits[:1])
    keep(steering, 1, logits[:2])
    ((similarity, _, failed, drafted, tokens),) = steering.judge([(1, 2, 0, 1, False)])
    made = torch.tensor([2], dtype=torch.int32)
    assert similarity == pytest.approx(steering.moras.similarity(logits[None].clone(), made).item(), abs=1e-6)
    assert not failed
    assert (len(drafted), len(tokens)) == (1, 1)


def test_one_query_without_a_risk_fails_closed_alone():
    steering, logits = make_steering(), torch.randn(STEPS, VOCABULARY)
    broken = logits.clone()
    broken[1, 3] = torch.nan
    for record, kept in enumerate((logits, logits, logits, broken)):
        keep(steering, record, kept)
    fine, failed, poisoned = steering.judge([(1, 3, 0, 3, False), (3, 3, 2, 3, False), (1, 3, 0, 3, True)])
    assert math.isfinite(fine[0])
    assert fine[1] < 1
    assert not fine[2]
    for similarity, risk, was_failed, _, tokens in (failed, poisoned):
        assert math.isnan(similarity)
        assert (risk, was_failed) == (1.0, True)
        assert tokens == steering.table.argmax(-1).tolist()


def test_a_query_without_a_draft_has_a_risk_alone():
    steering, logits = make_steering(), torch.randn(2, STEPS, VOCABULARY)
    keep(steering, 1, logits[0])
    keep(steering, 2, logits[1])
    alone, early, drafted = steering.judge([(1, 3, None, 0, False), (1, 3, 77, 0, False), (1, 3, 2, 3, False)])
    assert alone == early
    assert alone[:3] == drafted[:3]
    assert [len(tokens) for tokens in (*alone[3:], *drafted[3:])] == [0, 0, 3, 3]


def test_a_draft_that_is_late_is_waited_for():
    steering, logits = make_steering(), torch.randn(2, STEPS, VOCABULARY)
    keep(steering, 1, logits[0])
    keep(steering, 2, logits[1][:2])
    assert steering.judge([(1, 3, 2, 3, False), (1, 3, 77, 1, False)]) == [None, None]
    keep(steering, 2, logits[1])
    (found,) = steering.judge([(1, 3, 2, 24, False)])
    assert len(found[3]) == STEPS


@pytest.mark.parametrize("tokens", range(STEPS))
def test_a_piece_of_a_prompt_is_no_step_of_a_draft(tokens):
    """A draft that was preempted is read again with its tokens as part of its prompt, and in pieces, each with a row of logits
    that mean nothing and look like the draft's next step."""
    steering, (draft, risk, piece) = make_steering(), torch.randn(3, STEPS, VOCABULARY)
    keep(steering, 1, risk)
    keep(steering, 2, draft[:tokens])
    steering.apply(piece[:1].clone(), [(0, tokens, Marks(record=2))])
    assert steering.judge([(1, 3, 2, None, False)]) == [None]
    for n in range(tokens, STEPS):
        assert steering.judge([(1, 3, 2, None, False)]) == [None]
        steering.apply(draft[n][None].clone(), [(0, n, Marks(record=2))])
    logits = torch.randn(1, VOCABULARY)
    after = steering.apply(logits.clone(), [(0, STEPS, Marks(record=2))])  # which nothing is kept of
    assert same_bits(after, logits)
    ((*_, drafted, steered),) = steering.judge([(1, 3, 2, None, False)])
    assert drafted == draft.argmax(-1).tolist()
    assert len(steered) == STEPS


@pytest.mark.parametrize("again", range(STEPS - 1))
def test_what_is_read_again_keeps_all_its_steps(again):
    """The newer runner has a row for the step at which a piece of a preempted request ends, then one for its next step."""
    steering, (draft, risk) = make_steering(), torch.randn(2, STEPS, VOCABULARY)
    for record, logits in ((1, risk), (2, draft)):
        keep(steering, record, logits[:-1])
        for step in (again, STEPS - 1):
            steering.apply(logits[step][None].clone(), [(0, step, Marks(record=record))])
    ((*_, drafted, steered),) = steering.judge([(1, STEPS, 2, 0, False)])
    assert drafted == draft.argmax(-1).tolist()
    assert len(steered) == STEPS


def test_records_make_room_oldest_first_and_are_never_taken_for_others():
    steering, logits = make_steering(slots=2), torch.randn(4, STEPS, VOCABULARY)
    for record in range(3):
        keep(steering, record, logits[record])
    assert list(steering.records) == [1, 2]
    keep(steering, 0, logits[0][:1])  # begins again: its first step makes room once more
    steering.forget([2, 99])
    steering.apply(logits[2][:1].clone(), [(0, 1, Marks(record=2))])  # what a request that was given up still sends
    assert list(steering.records) == [0]
    with pytest.raises(RuntimeError, match="record 2 holds 0 steps"):
        steering.judge([(2, 3, None, 0, False)])
    steering.judge([(0, 1, None, 0, False)])
    with pytest.raises(RuntimeError, match="record 0 holds 0 steps"):  # it was judged
        steering.judge([(0, 1, None, 0, False)])


@pytest.mark.parametrize("query", [(1, 3, 0, 3, False), (0, 0, 1, 2, False), (9, 3, 0, 3, False)])
def test_does_not_judge_by_logits_that_were_not_kept(query):
    steering = make_steering()
    keep(steering, 0, torch.randn(STEPS, VOCABULARY))
    keep(steering, 1, torch.randn(2, VOCABULARY))
    with pytest.raises(RuntimeError, match="steps of logits"):
        steering.judge([query])


def test_profiles_that_need_attention_are_refused():
    biased = make_profile()
    biased.tensors["region_bias"] = torch.zeros(2, 2)
    for profile in (biased, make_profile(risk="moras+attention")):
        with pytest.raises(ValueError, match="attention"):
            make_steering(profile)


# What requests and engines carry


def test_marks():
    assert read_marks(params(None)) is None
    assert read_marks(params({"other": 1})) is None
    assert read_marks(params({"ras_risk": 1, "ras_record": 3})) == Marks(1.0, 3)
    assert read_marks(params({"ras_risk": 0})) == Marks(0.0)
    for value in (math.nan, math.inf, -math.inf, -0.1, 1.1, "0.2", None, True):
        assert read_marks(params({"ras_risk": value})).risk == 1.0
    assert read_marks(params({"ras_noise": 7})) == Marks(draw=Draw(7, 0.5, 9, 0.8, 0.1))
    assert read_marks(params({"ras_noise": 7}, temperature=0)) == Marks()


def params(extra_args, temperature=0.5) -> SimpleNamespace:
    return SimpleNamespace(extra_args=extra_args, temperature=temperature, top_k=9, top_p=0.8, min_p=0.1)


@pytest.mark.parametrize("value", [0, 0.3, 1, math.nan, math.inf])
def test_usable_risks(value):
    check_marks({"ras_risk": value, "other": "x"}, n=2)


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"ras_risk": 1.5}, "in \\[0, 1\\]"),
        ({"ras_risk": "high"}, "in \\[0, 1\\]"),
        ({"ras_risks": 0.5}, "ras_risks"),
        ({"ras_record": -1}, "non-negative"),
        ({"ras_record": 1.0}, "non-negative"),
        ({"ras_record": 1}, "n is 2"),
        ({"ras_noise": -1}, "non-negative"),
        ({"ras_noise": "7"}, "non-negative"),
        ({"ras_noise": 7}, "n is 2"),
    ],
)
def test_marks_that_mean_nothing(extra_args, message):
    with pytest.raises(ValueError, match=message):
        check_marks(extra_args, n=2)


def test_settings(tmp_path):
    options = engine_args(tmp_path, queries=7)
    assert read_settings(options["additional_config"]) == (str(tmp_path), 7)
    with pytest.raises(ValueError, match="queries is 0"):
        engine_args(tmp_path, queries=0)
    for config in (None, {}, {"ras_fast": {}}, {"ras_fast": {"profile": 3}}):
        with pytest.raises(ValueError, match="engine_args"):
            read_settings(config)


# The LM head of a checkpoint


def head_of(folder, tensors, files=1, **config) -> CheckpointHead:
    """Of a checkpoint with these tensors in one file, or each in one of its own."""
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names = {name: f"part-{i}.safetensors" for i, name in enumerate(tensors)}
        for name, file in names.items():
            save_file({name: tensors[name]}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    text = SimpleNamespace(vocab_size=VOCABULARY, hidden_size=HIDDEN, **config)
    return CheckpointHead(str(folder), None, SimpleNamespace(), text)


@pytest.mark.parametrize("files", [1, 2])
def test_head(tmp_path, files, monkeypatch):
    monkeypatch.setattr("ras_fast.vllm.checkpoint.CHUNK", 16)
    stored = weight().bfloat16()
    tensors = {"language_model.lm_head.weight": stored, "model.embed_tokens.weight": torch.zeros(VOCABULARY, HIDDEN)}
    head, hidden = head_of(tmp_path, tensors, files, logit_scale=1.0, final_logit_softcapping=None), torch.randn(2, HIDDEN)
    assert torch.allclose(head.logits(hidden, torch.float32), hidden @ stored.float().T, atol=1e-5)
    assert torch.equal(head.rows(5, torch.bfloat16), stored[:5])


def test_tied_head(tmp_path):
    tensors = {"model.embed_tokens.weight": weight()}
    assert torch.equal(head_of(tmp_path, tensors, tie_word_embeddings=True).rows(4, torch.float32), weight()[:4])
    with pytest.raises(ValueError, match="cannot be told"):
        head_of(tmp_path, tensors, tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"lm_head.weight": weight(), "lm_head.bias": torch.zeros(VOCABULARY)}, {}, "bias"),
        ({"lm_head.weight": weight()}, {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"lm_head.weight": weight()}, {"logit_scale": 0.25}, "logit_scale = 0.25"),
        ({"lm_head.weight": weight()[:-1].clone()}, {}, r"\[37, 24\]"),
        ({"lm_head.weight": weight().to(torch.int8)}, {}, "int8"),
        ({"a.lm_head.weight": weight(), "b.lm_head.weight": weight()}, {}, "cannot be told"),
    ],
)
def test_heads_that_cannot_be_steered_in_logits(tmp_path, tensors, config, message):
    with pytest.raises(ValueError, match=message):
        head_of(tmp_path, tensors, **config)


def test_checkpoint_without_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="safetensors"):
        CheckpointHead(str(tmp_path), None, SimpleNamespace(), SimpleNamespace(vocab_size=2, hidden_size=2))
