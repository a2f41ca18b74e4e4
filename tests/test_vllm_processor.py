"""The logits processor under both of vLLM's interfaces, with vLLM's own types. Needs vLLM: docs/vllm.md says how to run it."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_vllm_steering import EOS, STEPS, VOCABULARY, make_profile, make_steering, same_bits, weight

pytest.importorskip("vllm.v1", reason="vLLM is not installed")
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdateBuilder, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

from ras_fast.vllm import processor
from ras_fast.vllm.options import Draw, Marks
from ras_fast.vllm.processor import RasLogitsProcessor
from ras_fast.vllm.steering import drawn

CPU = torch.device("cpu")


@pytest.fixture
def config(monkeypatch):
    """Of an engine; its steering is that of random weights."""
    monkeypatch.setattr(processor, "load_steering", lambda config, path, slots, device: make_steering(slots=slots))
    return SimpleNamespace(
        speculative_config=None,
        lora_config=None,
        parallel_config=SimpleNamespace(enable_batch_sharded_sampling=False),
        model_config=SimpleNamespace(model="m", tokenizer="m", enable_sleep_mode=False),
        additional_config={"ras_fast": {"profile": "p", "queries": 8}},
        instance_id="test",
    )


def params(**extra_args) -> SamplingParams:
    return SamplingParams(extra_args=extra_args or None)


class Batch:
    """Requests as vLLM's older runner keeps them: in rows, told to the processor by a BatchUpdateBuilder."""

    def __init__(self):
        self.rows, self.builder = [], BatchUpdateBuilder()

    def add(self, request) -> None:
        row = self.builder.pop_removed() if self.builder.has_removed() else len(self.rows)
        self.rows[row : row + 1] = [request]
        self.builder.added.append((row, request.params, None, request.output))

    def remove(self, row: int) -> None:
        self.rows[row] = None
        self.builder.removed_append(row)

    def condense(self) -> None:
        """Fills holes from the end, as the runner does."""
        while (hole := self.builder.peek_removed()) is not None and hole < len(self.rows):
            last = max((i for i, request in enumerate(self.rows) if request is not None), default=-1)
            if last < hole:
                break
            self.builder.pop_removed()
            self.builder.moved.append((last, hole, MoveDirectionality.UNIDIRECTIONAL))
            self.rows[hole], self.rows[last] = self.rows[last], None
        while self.rows and self.rows[-1] is None:
            self.rows.pop()

    def swap(self, a: int, b: int) -> None:
        self.builder.moved.append((a, b, MoveDirectionality.SWAP))
        self.rows[a], self.rows[b] = self.rows[b], self.rows[a]

    def update(self):
        return self.builder.get_and_reset(len(self.rows))


@pytest.mark.parametrize("seed", range(20))
def test_each_row_keeps_its_own_risk(config, seed):
    """Random arrivals, ends, moves and swaps: every row is steered by its own request's risk and step, or not at all."""
    rng, batch = random.Random(seed), Batch()
    steered = RasLogitsProcessor(config, CPU, False)
    for _ in range(30):
        for row in range(len(batch.rows)):
            if rng.random() < 0.3:
                batch.remove(row)
        for _ in range(rng.randrange(4)):
            risk = rng.choice([None, rng.random(), 1.0])
            extra = {} if risk is None else {"ras_risk": risk}
            output = [7] * rng.choice([0, 0, 0, 2])  # some come back after they were preempted
            batch.add(SimpleNamespace(risk=risk, params=params(**extra), output=output))
        batch.condense()
        if len(batch.rows) > 2 and rng.random() < 0.4:
            batch.swap(*rng.sample(range(len(batch.rows)), 2))
        steered.update_state(batch.update())
        logits = torch.randn(len(batch.rows), VOCABULARY)
        after = steered.apply(logits.clone())
        for row, request in enumerate(batch.rows):
            step = len(request.output)
            if request.risk is None or step >= STEPS:
                assert same_bits(after[row], logits[row])
            else:
                table, risk = steered.steering.table[step], torch.tensor(request.risk)
                assert torch.allclose(after[row], (1 - risk) * logits[row] + risk * table, atol=1e-5)
            request.output.append(7)


def test_either_runner_draws_where_it_is_asked_to(config):
    """By the noise of a request, whatever its seed; not what vLLM decodes greedily, and not past the first N tokens."""
    given = [
        SamplingParams(temperature=0.8, top_p=0.9, extra_args={"ras_noise": 7, "ras_risk": 0.3}),
        SamplingParams(temperature=0.8, seed=7, extra_args={"ras_noise": 8}),
        SamplingParams(temperature=0, extra_args={"ras_noise": 7}),
        SamplingParams(temperature=0.8, extra_args={"ras_noise": 7}),
    ]
    older, batch = RasLogitsProcessor(config, CPU, False), Batch()
    newer = RasLogitsProcessor(config, slots_of([10] * 4))
    steps = [0, 1, 0, STEPS]
    for slot, (asked, step) in enumerate(zip(given, steps, strict=True)):
        batch.add(SimpleNamespace(params=asked, output=[7] * step))
        newer.add_request(slot, asked)
    older.update_state(batch.update())
    logits = torch.randn(4, VOCABULARY)
    after = older.apply(logits.clone())
    assert same_bits(after, newer.apply(logits.clone(), context([0, 1, 2, 3], [10 + step for step in steps])))
    steered = older.steering.mixed(logits[0], older.steering.table[0], torch.tensor(0.3))
    assert after[0].isfinite().nonzero().flatten().tolist() == drawn(steered, 0, Draw(7, 0.8, 0, 0.9, 0.0)).tolist()
    assert after[1].isfinite().nonzero().flatten().tolist() == drawn(logits[1], 1, Draw(8, 0.8, 0, 1.0, 0.0)).tolist()
    assert same_bits(after[2:], logits[2:])


def test_without_marks_nothing_is_done(config):
    steered, batch = RasLogitsProcessor(config, CPU, False), Batch()
    batch.add(SimpleNamespace(params=params(), output=[]))
    steered.update_state(batch.update())
    steered.update_state(None)
    logits = torch.randn(1, VOCABULARY)
    before = logits.clone()
    assert steered.apply(logits) is logits
    assert same_bits(logits, before)
    assert not steered.is_argmax_invariant()


def slots_of(prompt_lengths) -> SimpleNamespace:
    """Of the newer runner's requests, none of which has been preempted yet."""
    prompt_len, prefill_len = (SimpleNamespace(np=np.array(prompt_lengths, dtype=np.int32)) for _ in range(2))
    return SimpleNamespace(device=CPU, prompt_len=prompt_len, prefill_len=prefill_len)


def context(slots, lengths) -> LogitsContext:
    mapping, rows = np.array(slots, dtype=np.int32), torch.tensor(slots)
    return LogitsContext(
        expanded_idx_mapping=rows,
        idx_mapping=rows,
        idx_mapping_np=mapping,
        expanded_local_pos=torch.zeros_like(rows),
        input_ids=torch.zeros_like(rows),
        pos=torch.tensor(lengths) - 1,
        seq_lens_upper_bound_np=np.array(lengths, dtype=np.int32),
    )


def test_newer_runner(config):
    """Rows in any order; a slot used again; a prompt read in pieces; a step after the last steered one."""
    steered = RasLogitsProcessor(config, slots_of([10, 20, 30, 40, 50]))
    assert steered.add_request(0, params(ras_risk=0.9))
    assert not steered.add_request(0, params())  # the slot's next request carries nothing
    assert steered.add_request(1, params(ras_risk=0.25))
    assert steered.add_request(2, params(ras_risk=0.5))
    assert steered.add_request(3, params(ras_risk=0.5))
    assert steered.add_request(4, params(ras_record=2))
    slots, lengths = [3, 1, 0, 2, 4], [40 + STEPS, 20 + 1, 10, 16, 50]
    logits = torch.randn(5, VOCABULARY)
    after = steered.apply(logits.clone(), context(slots, lengths))
    assert torch.allclose(after[1], 0.75 * logits[1] + 0.25 * steered.steering.table[1], atol=1e-5)
    for row in (0, 2, 3, 4):
        assert same_bits(after[row], logits[row])
    assert torch.equal(steered.steering.kept[steered.steering.records[2].slot, 0], logits[4])


def test_newer_runner_keeps_what_it_has_of_a_draft_that_is_read_again(config):
    """In pieces, after a preemption. One that ends at the prompt's end looked like the first step, and by that alone the draft
    was then judged; one that was judged already took a place for ever."""
    slots = slots_of([10, 10])
    steered = RasLogitsProcessor(config, slots)
    steering, made = steered.steering, torch.randn(STEPS + 2, 2, VOCABULARY)
    for slot in (0, 1):
        steered.add_request(slot, params(ras_record=slot))
    for step, logits in enumerate(made):
        steered.apply(logits.clone(), context([0, 1], [10 + step] * 2))
    steering.forget([1])
    slots.prefill_len.np[:] = 10 + len(made)
    for slot in (0, 1):
        steered.add_request(slot, params(ras_record=slot))
    for length in (7, 10, 11, 10 + len(made), 11 + len(made)):
        steered.apply(torch.randn(2, VOCABULARY), context([0, 1], [length] * 2))
    assert list(steering.records) == [0]
    (judgement,) = steering.judge([(0, STEPS, 0, STEPS, False)])
    assert judgement[3] == made[:STEPS, 0].argmax(-1).tolist()


def test_risks_that_are_no_numbers_are_one_and_counted(config):
    steered, batch = RasLogitsProcessor(config, CPU, False), Batch()
    for risk in (math.nan, math.inf, 1.0):
        request = params(ras_risk=risk)
        RasLogitsProcessor.validate_params(request)
        batch.add(SimpleNamespace(params=request, output=[]))
    steered.update_state(batch.update())
    after = steered.apply(torch.full((3, VOCABULARY), torch.nan))
    assert torch.equal(after, steered.steering.table[0].expand(3, -1))
    assert steered.steering.counters["failed_closed"] == 2


@pytest.mark.parametrize(("named", "end"), [({}, EOS), ({"eos_token_id": 9}, 9), ({"eos_token_id": [8, 9]}, 8)])
def test_a_broken_answer_ends_whatever_the_generation_config_names(monkeypatch, tmp_path, named, end):
    make_profile().save_pretrained(tmp_path)
    head = SimpleNamespace(rows=lambda count, dtype: None, logits=lambda hidden, dtype: hidden @ weight().T)
    tokenizer = SimpleNamespace(eos_token_id=EOS)
    monkeypatch.setattr(processor, "CheckpointHead", lambda *model: head)
    monkeypatch.setattr(processor, "fingerprint_of_parts", lambda *parts: {})
    monkeypatch.setattr(processor, "load_processor", lambda config: SimpleNamespace(tokenizer=tokenizer))
    hf_config = SimpleNamespace(architectures=["A"], get_text_config=lambda: None)
    model = SimpleNamespace(model="m", revision=None, dtype=torch.float32, hf_config=hf_config)
    model.try_get_generation_config = lambda: named
    steering = processor.load_steering(SimpleNamespace(model_config=model), str(tmp_path), 2, CPU)
    after = steering.apply(torch.full((1, VOCABULARY), torch.nan), [(0, 0, Marks(risk=0.5))])
    assert after.argmax().item() == end
    assert after.isneginf().sum() == VOCABULARY - 1


def test_parameters_and_engines_that_are_refused(config):
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        RasLogitsProcessor.validate_params(params(ras_risk=2.0))
    with pytest.raises(ValueError, match="n is 3"):
        RasLogitsProcessor.validate_params(SamplingParams(n=3, temperature=1, extra_args={"ras_record": 0}))
    config.speculative_config = object()
    with pytest.raises(ValueError, match="speculative"):
        RasLogitsProcessor(config, CPU, False)
    config.speculative_config, config.lora_config = None, object()
    with pytest.raises(ValueError, match="lora_config"):
        RasLogitsProcessor(config, CPU, False)
    config.lora_config, config.parallel_config.enable_batch_sharded_sampling = None, True
    with pytest.raises(ValueError, match="enable_batch_sharded_sampling"):
        RasLogitsProcessor(config, CPU, False)
    config.parallel_config.enable_batch_sharded_sampling, config.model_config.tokenizer = False, "another"
    with pytest.raises(ValueError, match="tokenizer is 'another'"):
        RasLogitsProcessor(config, CPU, False)
    config.model_config.tokenizer, config.model_config.enable_sleep_mode = "m", True
    with pytest.raises(ValueError, match="enable_sleep_mode"):
        RasLogitsProcessor(config, CPU, False)
    config.model_config.enable_sleep_mode, config.additional_config = False, {}
    with pytest.raises(ValueError, match="engine_args"):
        RasLogitsProcessor(config, CPU, False)
