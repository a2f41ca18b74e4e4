"""AutoSteer (arXiv 2507.13255) in vLLM. Knows torch, not vLLM.

vLLM shows its extensions no hidden states, but a worker of one's own may put torch's hooks on the modules of its model before
that is compiled. One judges every token where it enters the profile's layer, inside the compiled graph. These risks leave the
model beside the last hidden states, so that vLLM picks both for the rows that it draws tokens from; what makes logits is not
shown them. The head is linear: what a row whose gate is on becomes, W (h + ε M h), is its logits with W (ε M h) added.
`docs/vllm.md` has the whole story.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ras_fast.checks import as_float32, number
from ras_fast.decoding import broken_rows
from ras_fast.methods.autosteer import AutoSteer
from ras_fast.methods.prober import assess
from ras_fast.profile import RasProfile
from ras_fast.vllm.options import Marks
from ras_fast.vllm.steering import Head, check_head, only_end, to_device

SAMPLES, LOGITS = 8, 64  # states to know a head by, and about how large their logits are: a soft cap shows there
RECORDS = 1 << 16  # gates that are kept, each a few numbers on the host
ODDS = 5  # up to which factor the odds of a known risk may be others here, of kernels that round otherwise
LEAST_RISK = 1e-6  # known risks that are nearer to 0 or 1 count as this far from it: rounding moves their odds the most
Verdict = tuple[float, bool]  # t, and whether it could not be computed and is therefore 1


def known_questions(config: dict[str, Any]) -> list[str]:
    """The questions whose risks an AutoSteer profile knows (`autosteer.known_risks`). Raises ValueError for one without any."""
    known = config.get("known")
    if not isinstance(known, dict) or not known:
        raise ValueError(f"profile config 'known' is {known!r}; it needs the risks of some questions: calibrate it again")
    return list(known)


def check_known(config: dict[str, Any], risks: Sequence[float]) -> None:
    """Raises ValueError unless an engine found these risks, of `known_questions` in their order, as calibration did: weights
    may be other ones, and layers may scale what they are given."""
    known = config["known"]
    for question, risk in zip(known, risks, strict=True):
        wanted = number(known, question)
        if not abs(_log_odds(risk) - _log_odds(wanted)) <= math.log(ODDS):
            raise ValueError(
                f"{question!r:.200} has the risk {risk:.3g} in this engine; calibration found {wanted:.3g}. Its weights are "
                "not those of the profile's model, or what enters the prober's layer is computed otherwise"
            )


def _log_odds(risk: float) -> float:
    risk = min(max(risk, LEAST_RISK), 1 - LEAST_RISK)
    return math.log(risk / (1 - risk))


@dataclass
class Gate:
    """Whether a request is steered, and why: its risk, and whether that could not be computed and is therefore 1."""

    risk: float
    failed: bool
    on: bool


def can_be_judged(layer: nn.Module) -> bool:
    """Whether a layer is one of vLLM's decoders, called with ``hidden_states`` [tokens, d] and with the ``residual`` that is
    still to be added to them, or None."""
    return {"hidden_states", "residual"} <= set(inspect.signature(layer.forward).parameters)


def adds_residual(layer: Callable[[Tensor, Tensor], Tensor], states: Tensor) -> bool:
    """Whether a layer that `can_be_judged` adds the residual that it is called with. Some (EXAONE 4's, Cohere's, PhiMoE's) only
    take one because others do: what they are called with as ``hidden_states`` is all.

    layer: maps hidden states and a residual to its outputs side by side; may write into them. states: [3, rows, d], any.

    Raises ValueError for a layer that does something else with it.
    """
    hidden, residual, moved = states
    found, other = layer(hidden.clone(), residual.clone()), layer(hidden.clone(), residual + moved)
    if torch.equal(found, other) and not torch.equal(found, layer(hidden + moved, residual.clone())):
        return False
    error, effect = ((outputs - found).abs().max() for outputs in (layer(hidden + moved, residual - moved), other))
    if not (effect > 0 and error <= 0.2 * effect):
        raise ValueError("the prober's layer neither adds its residual to its hidden states nor leaves it alone")
    return True


class Judge(nn.Module):
    """The prober before a layer that `can_be_judged`.

    adds: whether the layer `adds_residual`.
    prober: by name, as `assess` takes it.
    tokens: the most of one forward. risks: [tokens] fp32, of the latest forward's; NaN where it could not be computed, and
    where there was none since they were last read.
    """

    def __init__(self, layer: nn.Module, adds: bool, prober: dict[str, Tensor], tokens: int, device):
        super().__init__()
        taken = list(inspect.signature(layer.forward).parameters)
        self.places = {name: taken.index(name) for name in ("hidden_states", "residual")}
        self.adds = adds
        self.names = {name: name.replace(".", "_") for name in prober}
        for name, tensor in prober.items():
            self.register_buffer(self.names[name], tensor, persistent=False)
        self.register_buffer("risks", torch.full((tokens,), torch.nan, device=device), persistent=False)

    def forward(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """The arguments of the layer's forward."""
        hidden, residual = (self._argument(name, args, kwargs) for name in ("hidden_states", "residual"))
        states = hidden + residual if self.adds and residual is not None else hidden
        risk, failed = assess({name: getattr(self, buffer) for name, buffer in self.names.items()}, states)
        self.risks[: states.shape[0]].copy_(risk.masked_fill(failed, torch.nan))

    def _argument(self, name: str, args: tuple, kwargs: dict[str, Any]):
        return kwargs[name] if name in kwargs else args[self.places[name]]


def _before_layer(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    # By its name in the layer: a compiled graph that is loaded again has to find it in another process.
    layer.ras_judge(args, kwargs)


class GateSteering:
    """One AutoSteer profile at work in an engine. Its model is to be given to `attach` before anything runs.

    head: maps states [N, d] fp32 to logits [N, V] fp32, without a bias.
    tokens: the most of one forward. eos: the token that ends an answer, None if there is none.
    agree: makes a tensor that of the first rank of tensor parallelism.

    Raises ValueError when the profile's settings and tensors do not fit together (`AutoSteer`), and for one with a region_bias.
    """

    def __init__(
        self, profile: RasProfile, head: Callable[[Tensor], Tensor], tokens: int, eos: int | None, device, dtype: torch.dtype,
        agree: Callable[[Tensor], Tensor],
    ):  # fmt: skip
        if "region_bias" in profile.tensors:
            raise ValueError("profile has a region_bias, which changes attention; vLLM's cannot be changed: leave it out")
        self.config, self.method = profile.config, AutoSteer(profile)
        self.prober, self.refusal, self.right = self.method.placed(device, dtype)
        self.threshold = as_float32(self.method.threshold)  # as t is
        self.tokens, self.device, self.agree = tokens, device, agree
        self.states, self.table = self._samples(head)
        self._only_end = only_end(self.table[0], eos)
        self.records: dict[int, Gate] = {}  # the oldest first
        self.counters: Counter = Counter()
        self._head: Head | None = None
        self._rows: tuple[Tensor, Tensor] | None = None  # states and risks of the rows that tokens are drawn from

    def _samples(self, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """States [rows, d], and their logits [rows, V] fp32. Raises ValueError where all of these are 0."""
        rows = self.refusal.T if self.right is None else self.right
        states = rows[rows.float().norm(dim=1).topk(min(SAMPLES, len(rows))).indices]
        table = head(states.float().cpu()).to(self.device)
        largest = table.abs().max().item()
        if not 0 < largest < math.inf:
            raise ValueError(f"profile refusal gives logits of up to {largest}; they need to be finite, and not all 0")
        scale = 2.0 ** round(math.log2(LOGITS / largest))  # by which no digit changes
        return states * scale, table * scale

    def attach(
        self, model: nn.Module, layers: Sequence[nn.Module], heads: Iterable[nn.Module],
        run: Callable[[nn.Module, Tensor, Tensor], Tensor],
    ) -> None:  # fmt: skip
        """Puts the profile's hooks on a model.

        model: vLLM's, whose forward gives [tokens, d]. layers: of its language model. heads: what makes logits, each called
        with the LM head and states [rows, d]. run: calls a layer with hidden states and a residual [rows, d], of any values,
        and returns all of its outputs side by side.

        Raises ValueError when the profile does not fit the layers, and for layers that cannot be judged (`adds_residual`).
        """
        index = self.method.layer
        if not 0 <= index < len(layers):
            raise ValueError(f"the profile is for layer {index}; the model has layers 0..{len(layers) - 1}")
        layer = layers[index]
        states = torch.randn(3, SAMPLES, len(self.refusal), generator=torch.Generator().manual_seed(0))
        adds = adds_residual(partial(run, layer), states.to(self.device, self.refusal.dtype))
        layer.ras_judge = Judge(layer, adds, self.prober, self.tokens, self.device)
        layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
        model.register_forward_hook(lambda module, args, states: self._widened(states, layer.ras_judge.risks))
        for head in heads:
            head.register_forward_pre_hook(lambda module, args: self._narrowed(args))
        self._head = model.compute_logits

    def _widened(self, states: Tensor, risks: Tensor) -> Tensor:
        """States [tokens, d] with each token's fp32 risk behind it, bit by bit. What a later forward leaves out counts as
        toxic: no risk is read twice."""
        wide = torch.cat([states, risks[: len(states), None].view(states.dtype)], dim=1)
        risks.fill_(torch.nan)
        return wide

    def _narrowed(self, args: tuple) -> tuple:
        """The arguments of what makes logits, whose states may be wider by a risk."""
        lm_head, states, *others = args
        d = len(self.refusal)
        if states.shape[-1] > d:
            risks = states[:, d:].contiguous().view(torch.float32)[:, 0]
            states = states[:, :d].contiguous()
            self._rows = (states, risks)
        return lm_head, states, *others

    def prove(self, head: Head, dtype: torch.dtype) -> None:
        """Raises ValueError unless the engine's head, in that dtype, is linear."""
        check_head(head, self.states.to(dtype), self.table)

    def apply(self, logits: Tensor, rows: Iterable[tuple[int, int, Marks]]) -> Tensor:
        """Logits [rows, V] of one step, in place where a request's gate is on. Waits for the device in steps in which a prompt
        ends, and in no other.

        rows: (row, step of that row's answer, marks). Rows that are not named stay as they are.

        Raises RuntimeError when the rows are not those of the latest forward.
        """
        rows = list(rows)
        if not rows:
            return logits
        states, risks = self._rows or ((), ())
        if len(states) != len(logits):
            raise RuntimeError(f"there are {len(logits)} rows of logits, and the hidden states of {len(states)}")
        self._decide([(row, marks) for row, step, marks in rows if step == 0 and marks.record is not None], risks)
        sharing = Counter(marks.record for _, _, marks in rows if marks.record is not None)
        self.forget(record for record, requests in sharing.items() if requests > 1)  # whose gate it is cannot be told: closed
        on = [row for row, _, marks in rows if self._is_on(marks)]
        if on:
            index = to_device(on, torch.long, logits.device)
            logits[index] = self._steered(logits[index], states[index])
        return logits

    def _decide(self, fresh: list[tuple[int, Marks]], risks: Tensor) -> None:
        """Gates of requests whose prompt ends here. One that is read in pieces is judged after each; the last counts."""
        if not fresh:
            return
        found = self.agree(risks).tolist()
        for row, marks in fresh:
            risk = found[row] if marks.risk is None else marks.risk
            failed = risk != risk  # NaN
            self.records[marks.record] = Gate(1.0 if failed else risk, failed, failed or risk > self.threshold)
        while len(self.records) > RECORDS:
            del self.records[next(iter(self.records))]

    def _is_on(self, marks: Marks) -> bool:
        if marks.record is None:
            return marks.risk is not None and marks.risk > self.threshold
        return marks.record not in self.records or self.records[marks.record].on  # one that was lost: closed

    def _steered(self, logits: Tensor, states: Tensor) -> Tensor:
        """Logits [rows, V] of states [rows, d], steered. A row that is not finite can only end."""
        inner = states if self.right is None else F.linear(states, self.right)
        moved = self.method.epsilon * F.linear(inner, self.refusal).float()
        steered = logits + self._head(moved.to(states.dtype))
        if self._only_end is None:
            return steered
        return torch.where(broken_rows(steered)[:, None], self._only_end, steered)

    def judge(self, records: Sequence[int]) -> list[Verdict | None]:
        """(t, whether it could not be computed) of requests by their records; None for one that was not judged."""
        gates = [self.records.get(record) for record in records]
        return [None if gate is None else (gate.risk, gate.failed) for gate in gates]

    def forget(self, records: Iterable[int | None]) -> None:
        """Of requests that have ended; what still comes of one of these is steered."""
        for record in records:
            self.records.pop(record, None)
