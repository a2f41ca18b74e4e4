"""MoRAS (arXiv 2510.13698) on logits, for an engine that shows no hidden states. Knows torch, not vLLM.

With a bias-free head W the third stage's (1 − r) h_n + r μ_n is (1 − r) W h_n + r W μ_n in logits, and the second stage's
q_n = softmax(W h_n) is the softmax of the logits as they come. `docs/vllm.md` has the whole story.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ras_fast.decoding import add_gumbel_noise, broken_rows, warpers
from ras_fast.methods.moras import Moras
from ras_fast.profile import RasProfile
from ras_fast.vllm.options import Draw, Marks

# S, r, whether it failed closed, and of the draft's first steps, as many as are kept: its own tokens, and the steered ones.
Judgement = tuple[float, float, bool, list[int], list[int]]
Asked = tuple[int, int, int | None, int | None, bool]  # see `LogitSteering.judge`
Head = Callable[[Tensor], Tensor | None]  # an engine's: states [rows, d] -> logits [rows, V]; None where a worker makes none


@dataclass
class Record:
    """Where a request's first logits are kept, how tokens are drawn from them (None: greedily), and how many steps have been
    seen, up to one more than are kept. most: before it was read again, too, if that was more."""

    slot: int
    draw: Draw | None = None
    steps: int = 0
    most: int = 0


class LogitSteering:
    """The static tables of one profile, and the logits that are kept until a risk is known.

    head: maps states [N, d] fp32 to logits [N, V] fp32, without a bias.
    slots: how many requests' first N logits can be kept at a time: [slots, N, V] fp32 on ``device``. When all are taken, the
        oldest record gives way; to judge by it is then an error.
    eos: the token that ends an answer, None if there is none.

    Raises ValueError for profiles that need more than logits: of other methods, "moras+attention", with a region_bias.
    """

    def __init__(self, profile: RasProfile, head: Callable[[Tensor], Tensor], slots: int, eos: int | None, device):
        if profile.config.get("risk", "moras") != "moras" or "region_bias" in profile.tensors:
            raise ValueError("profile reads or changes attention, which vLLM does not show; calibrate plain MoRAS for it")
        self.config = profile.config
        self.moras = Moras(profile, lambda hidden: head(hidden).to(device), device, torch.float32)
        self.steps = self.moras.steps
        self.table = head(self.moras.prototypes.cpu()).float().to(device)  # [N, V]: W μ_n
        if not torch.isfinite(self.table).all():
            raise ValueError("profile prototypes give logits that are not finite; calibrate again")
        self.kept = torch.zeros(slots, *self.table.shape, device=device)
        self.tokens = torch.zeros(slots, self.steps, dtype=torch.long, device=device)  # the tokens, where they are drawn here
        self.records: dict[int, Record] = {}  # the oldest first
        self._free = list(range(slots))
        self.counters: Counter = Counter()
        self._only_end = only_end(self.table[0], eos)

    def prove(self, head: Head, dtype: torch.dtype) -> None:
        """Raises ValueError unless the engine's own head, in that dtype, is linear and gives the steered table."""
        check_head(head, self.moras.prototypes.to(dtype), self.table)

    def apply(self, logits: Tensor, rows: Iterable[tuple[int, int, Marks]]) -> Tensor:
        """Logits [rows, V] of one step, in place where requests ask for it: steered, and all −inf but at the token that is
        drawn from them. No host sync.

        rows: (row, step of that row's answer, marks). Steps outside 0..N−1 and rows that are not named stay as they are.
        """
        rows = [(row, step, marks) for row, step, marks in rows if 0 <= step <= self.steps]
        recorded = [(row, self._record(marks, step), step) for row, step, marks in rows if marks.record is not None]
        kept = [(row, slot, step) for row, slot, step in recorded if slot is not None and step < self.steps]
        steered = [(row, step, marks.risk) for row, step, marks in rows if marks.risk is not None and step < self.steps]
        if kept:
            row, slot, step = self._to_device(zip(*kept, strict=True), torch.long)
            self.kept[slot, step] = logits[row].float()
        if steered:
            row, step = self._to_device(([r for r, _, _ in steered], [s for _, s, _ in steered]), torch.long)
            risk = self._to_device([r for _, _, r in steered], torch.float32)
            logits[row] = self.mixed(logits[row], self.table[step], risk).to(logits.dtype)
        slots = {row: slot for row, slot, _ in kept}
        for row, step, marks in rows:
            if marks.draw is not None and step < self.steps:
                token = drawn(logits[row].float(), step, marks.draw)
                logits[row].fill_(-torch.inf).scatter_(0, token, 0)
                if row in slots:
                    self.tokens[slots[row], step] = token[0]
        return logits

    def mixed(self, logits: Tensor, target: Tensor, risk: Tensor) -> Tensor:
        """(1 − r) logits + r target in fp32, for logits and target [..., V] and risk [...].

        r = 1, and whatever is not below 1, replaces the logits, which may be the NaN that made the risk 1. What others have
        forbidden (−inf) stays so. A row of logits that holds NaN or +inf can only end.
        """
        logits, risk = logits.float(), risk[..., None]
        full = ~(risk < 1)
        mixed = torch.where(full, target, (1 - risk) * logits + risk * target)
        mixed = mixed.masked_fill(logits == -torch.inf, -torch.inf)
        if self._only_end is None:
            return mixed
        return torch.where(broken_rows(logits)[..., None] & ~full, self._only_end, mixed)

    def judge(self, queries: Sequence[Asked]) -> list[Judgement | None]:
        """The risk of queries, and what steering by it makes of their drafts. Forgets their records.

        queries: (record of the risk stage, steps it made, record of the draft or None, steps of it that have to be there,
            whether S is to be NaN); of the steps at most N count. Where nobody knows how many tokens the draft has, None for
            its steps: the one after the N has to be there, too, for what was seen last may be a piece of a prompt that is read
            again after a preemption.
        Returns None for a query whose draft has not come so far yet; its records stay.
        Raises RuntimeError when logits of a risk stage are missing.
        """
        found: list[Judgement | None] = [None] * len(queries)
        wanted = [self.steps + 1 if needed is None else min(needed, self.steps) for _, _, _, needed, _ in queries]
        ready = [i for i, (query, steps) in enumerate(zip(queries, wanted, strict=True)) if self._steps(query[2]) >= steps]
        if ready:
            for i, judgement in zip(ready, self._judge([queries[i] for i in ready]), strict=True):
                found[i] = judgement
        return found

    def _judge(self, queries: list[Asked]) -> list[Judgement]:
        risks, risk_steps, drafts, _, spoilt = map(list, zip(*queries, strict=True))
        risk_steps = [min(n, self.steps) for n in risk_steps]
        risk_slots = [self._slot_of(*kept) for kept in zip(risks, risk_steps, strict=True)]
        counts = [min(self._steps(draft), self.steps) for draft in drafts]
        # Where nothing is kept of a draft, the risk stage stands in for it, and none of its tokens are read.
        draft_slots = [self.records[d].slot if n else slot for d, n, slot in zip(drafts, counts, risk_slots, strict=True)]
        device = self.table.device
        made = torch.tensor(risk_steps, dtype=torch.int32, device=device)
        similarity = self.moras.similarity(self.kept[risk_slots], made)
        similarity = similarity.masked_fill(torch.tensor(spoilt, device=device), torch.nan)
        risk, failed = self.moras.risk(similarity)
        draws = [self.records[draft].draw if n else None for draft, n in zip(drafts, counts, strict=True)]
        logits = self.kept[draft_slots]
        steered = _tokens(self.mixed(logits, self.table, risk[:, None].expand(-1, self.steps)), draws)
        # Not drawn once more: on a GPU the sums that top_p goes by may round otherwise each time.
        sampled = torch.tensor([draw is not None for draw in draws], device=device)
        plain = torch.where(sampled[:, None], self.tokens[draft_slots], logits.argmax(-1)).tolist()
        self.forget([*risks, *drafts])
        rows = zip(similarity.tolist(), risk.tolist(), failed.tolist(), plain, steered, counts, strict=True)
        return [(s, r, f, own[:n], new[:n]) for s, r, f, own, new, n in rows]

    def forget(self, records: Iterable[int | None]) -> None:
        """Makes room: nothing can be judged by these records any more."""
        for name in records:
            if name in self.records:
                self._free.append(self.records.pop(name).slot)

    def _record(self, marks: Marks, step: int) -> int | None:
        """The slot for the logits of a record's step; None where those of the steps before were not kept."""
        name = marks.record
        if step == 0 and name not in self.records:
            if not self._free:
                self.forget([next(iter(self.records))])
            self.records[name] = Record(self._free.pop(), marks.draw)
        record = self.records.get(name)
        # One that was preempted is read again, and a piece of it may end at an earlier step; the steps up to the next one stay.
        if record is None or step > record.most:
            return None
        record.steps = step + 1
        record.most = max(record.most, record.steps)
        return record.slot

    def _steps(self, name: int | None) -> int:
        """How many steps have been seen of a record."""
        return self.records[name].steps if name in self.records else 0

    def _slot_of(self, name: int, count: int) -> int:
        """The slot of a record that holds at least ``count`` steps."""
        steps = self._steps(name)
        if not 1 <= count <= steps:
            raise RuntimeError(f"record {name} holds {steps} steps of logits; {count} were produced")
        return self.records[name].slot

    def _to_device(self, values, dtype: torch.dtype) -> Tensor:
        return to_device(values, dtype, self.table.device)


def _tokens(logits: Tensor, draws: Sequence[Draw | None]) -> list[list[int]]:
    """The tokens that logits [Q, N, V] of the first N steps of each query give."""
    tokens = logits.argmax(-1)
    for query, draw in enumerate(draws):
        if draw is not None:
            tokens[query] = torch.cat([drawn(row, step, draw) for step, row in enumerate(logits[query])])
    return tokens.tolist()


def drawn(logits: Tensor, step: int, draw: Draw) -> Tensor:
    """The token [1] of one step's logits [V] fp32: a sample of softmax(what vLLM makes of them), the same wherever logits, step
    and draw are. By itself, so that no other row of a batch changes its rounding. No host sync."""
    scores = warpers(draw.temperature, draw.top_k, draw.top_p, draw.min_p)(None, logits[None])
    return add_gumbel_noise(scores, draw.noise, 0, step).argmax(-1)


def only_end(logits: Tensor, eos: int | None) -> Tensor | None:
    """Logits [V] like these that only the token ``eos`` can be drawn from; None where there is none."""
    if eos is None:
        return None
    ending = torch.full_like(logits, -torch.inf)
    ending[eos] = 0
    return ending


def to_device(values: Iterable, dtype: torch.dtype, device: torch.device) -> Tensor:
    host = torch.tensor(list(values), dtype=dtype, pin_memory=device.type == "cuda")  # pinned: its way waits for nothing
    return host.to(device, non_blocking=True)


def check_head(head: Head, states: Tensor, logits: Tensor) -> None:
    """Raises ValueError unless a head is linear and gives these logits [rows, V] of states [rows, d].

    They were read from the checkpoint by the names in it; whatever the model does after that matrix shows here. So do other
    weights that were loaded since.
    """
    found = head(torch.cat([states, 2 * states, torch.zeros_like(states[:1])]))
    if found is None:
        return
    found, wanted = found.float(), torch.cat([logits, 2 * logits, torch.zeros_like(logits[:1])])
    tolerance = 1e-4 if states.dtype == torch.float32 else 0.03
    if found.shape != wanted.shape or not (found - wanted).abs().max() <= tolerance * wanted.abs().max():
        raise ValueError("the engine's logits of a profile's states differ from its checkpoint's LM head: it cannot be steered")
