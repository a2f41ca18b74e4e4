"""MoRAS (arXiv 2510.13698) on logits, for an engine that shows no hidden states. Knows torch, not vLLM.

With a bias-free head W the third stage's (1 − r) h_n + r μ_n is (1 − r) W h_n + r W μ_n in logits, and the second stage's
q_n = softmax(W h_n) is the softmax of the logits as they come. `docs/vllm.md` has the whole story.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ras_fast.methods.moras import Moras
from ras_fast.profile import RasProfile
from ras_fast.vllm.options import Marks


class Steering:
    """The static tables of one profile, and the logits that are kept until a risk is known.

    head: maps states [N, d] fp32 to logits [N, V] fp32, without a bias.
    slots: how many requests' first N logits can be kept at a time: [slots, N, V] fp32 on ``device``.
    eos: the token that ends an answer, None if there is none.

    Raises ValueError for profiles that need more than logits: of other methods, "moras+attention", with a region_bias.
    """

    def __init__(self, profile: RasProfile, head: Callable[[Tensor], Tensor], slots: int, eos: int | None, device):
        if profile.config.get("risk", "moras") != "moras" or "region_bias" in profile.tensors:
            raise ValueError("profile reads or changes attention, which vLLM does not show; calibrate plain MoRAS for it")
        self.moras = Moras(profile, lambda hidden: head(hidden).to(device), device, torch.float32)
        self.steps = self.moras.steps
        self.table = head(self.moras.prototypes.cpu()).float().to(device)  # [N, V]: W μ_n
        if not torch.isfinite(self.table).all():
            raise ValueError("profile prototypes give logits that are not finite; calibrate again")
        self.kept = torch.zeros(slots, *self.table.shape, device=device)
        self.kept_steps = [0] * slots
        self.counters: Counter = Counter()
        self._pinned = self.table.is_cuda
        self._only_end = None
        if eos is not None:
            self._only_end = torch.full_like(self.table[0], -torch.inf)
            self._only_end[eos] = 0

    def apply(self, logits: Tensor, rows: Iterable[tuple[int, int, Marks]]) -> Tensor:
        """Logits [rows, V] of one step, steered in place where requests ask for it. No host sync.

        rows: (row, step of that row's answer, marks). Steps outside 0..N−1 and rows that are not named stay as they are.
        """
        rows = [(row, step, marks) for row, step, marks in rows if 0 <= step < self.steps]
        # Of a slot that is not there nothing is kept, and to be judged by it is an error.
        slots = len(self.kept_steps)
        kept = [(row, marks.slot, step) for row, step, marks in rows if marks.slot is not None and marks.slot < slots]
        steered = [(row, step, marks.risk) for row, step, marks in rows if marks.risk is not None]
        if kept:
            row, slot, step = self._to_device(zip(*kept, strict=True), torch.long)
            self.kept[slot, step] = logits[row].float()
            for _, kept_slot, kept_step in kept:
                self.kept_steps[kept_slot] = kept_step + 1
        if steered:
            row, step = self._to_device(([r for r, _, _ in steered], [s for _, s, _ in steered]), torch.long)
            risk = self._to_device([r for _, _, r in steered], torch.float32)
            logits[row] = self.mixed(logits[row], self.table[step], risk).to(logits.dtype)
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
        broken = ~(logits.amax(-1, keepdim=True) < torch.inf)
        return torch.where(broken & ~full, self._only_end, mixed)

    def judge(self, queries: Sequence[tuple[int, int, int, int, bool]]) -> list[tuple[float, float, bool, list[int]]]:
        """The risk of queries, and what steering by it makes of their drafts.

        queries: (slot of the risk stage, steps it made, slot of the draft, steps it made, whether S is to be NaN); of the
            steps at most N count.
        Returns (S, r, failed closed, the steered tokens of the draft's first steps) of each.
        Raises RuntimeError when logits of a slot are missing.
        """
        risk_slots, risk_steps, draft_slots, draft_steps, spoilt = map(list, zip(*queries, strict=True))
        risk_steps, draft_steps = ([min(n, self.steps) for n in steps] for steps in (risk_steps, draft_steps))
        self._check_kept(risk_slots + draft_slots, risk_steps + draft_steps)
        device = self.table.device
        made = torch.tensor(risk_steps, dtype=torch.int32, device=device)
        similarity = self.moras.similarity(self.kept[risk_slots], made)
        similarity = similarity.masked_fill(torch.tensor(spoilt, device=device), torch.nan)
        risk, failed = self.moras.risk(similarity)
        drafts = self.kept[draft_slots]
        steered = self.mixed(drafts, self.table, risk[:, None].expand(-1, self.steps)).argmax(-1)
        tokens = [row[:count] for row, count in zip(steered.tolist(), draft_steps, strict=True)]
        return list(zip(similarity.tolist(), risk.tolist(), failed.tolist(), tokens, strict=True))

    def _check_kept(self, slots: list[int], steps: list[int]) -> None:
        for slot, count in zip(slots, steps, strict=True):
            if not 1 <= count <= self.kept_steps[slot]:
                raise RuntimeError(f"slot {slot} holds {self.kept_steps[slot]} steps of logits; {count} were produced")

    def _to_device(self, values, dtype: torch.dtype) -> Tensor:
        host = torch.tensor(list(values), dtype=dtype, pin_memory=self._pinned)  # pinned: its way waits for nothing
        return host.to(self.table.device, non_blocking=True)
