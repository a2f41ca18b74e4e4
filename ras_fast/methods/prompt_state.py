"""What a method decides about each sequence when `generate` reads its prompt, and finds again at each decode step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ras_fast.model_checks import check_mode, check_positions, positions_of
from ras_fast.model_lock import lock_of
from ras_fast.patching import Patch
from ras_fast.patching.attention import has_own_ranges, is_range, sees_itself
from ras_fast.patching.cache_values import PerSequence, Rows, cache_name, given_cache, keep, kept, lacks_rows, returned_cache
from ras_fast.patching.structure import find_decoder, find_head
from ras_fast.patching.tracking import text_shape
from ras_fast.patching.undo import undone
from ras_fast.profile import RasProfile
from ras_fast.weights import modules_of, weights_of

_BLOCK_ENDED = "the block of the method that defends this generate has ended"
_NAMES: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # of the states that watch a text model


class ModelCheck:
    """Compares a method's profile with a model, again only when the model's weights or adapters have changed: the comparison
    reads a row of every weight, which for a large model is as long as a few tokens of an answer."""

    def __init__(self, profile: RasProfile) -> None:
        self.profile = profile
        self._passed: tuple[list, tuple] = [], ()  # `weights_of` the model that was compared last

    def __call__(self, model: nn.Module) -> None:
        """Raises ValueError where the profile is not this model's, and where a part of the model is in training mode."""
        check_mode(model)
        weights = weights_of([*modules_of(model)])
        if weights[1] != self._passed[1]:
            self.profile.check(model)
            self._passed = weights


class PromptState:
    """A method's decision about each sequence, made when its prompt is read and found again at each decode step.

    check: of the method's profile; another model's is refused by `watch`, and by each `generate` inside its block.
    name: what values are kept under on a cache. To be another one wherever something else would be decided, or a cache that one
        profile judged would count as judged by the next.
    value: the decision that holds for the forward that runs. None: neither this forward nor an earlier one with the same cache
        has decided yet, so the forward reads a prompt. Without a cache every forward does.
    past: how many tokens the cache held before the forward that runs.
    prompt_length: how many positions of a prompt, or of a piece of one, the forward that runs reads; 0: it is a decode step.
    begun: [batch] bool while a prompt is read, else None: the rows of which more than left padding has come so far.
    prefills: whether `generate` is reading a prompt just now. A single token on a cache that has a value is then the last piece
        of the prompt, and not a decode step.
    generates: whether `generate` runs. ended: whether the block of `watch` has.
    refusing: the handle of a hook that stops a `generate` whose block has ended before it.
    """

    def __init__(self, check: ModelCheck, name: str) -> None:
        self.check, self.name = check, name
        self.value: Any = None
        self.past: int | Tensor = 0
        self.prompt_length = 0
        self.begun: Tensor | None = None
        self.prefills = self.generates = self.ended = False
        self.refusing: Any = None
        self._patch: Patch | None = None
        self._running: list[nn.Module | None] = []
        self._cache: Any = None
        self._mask: Any = None

    def decide(self, value: PerSequence) -> None:
        """Sets the value for this forward and for those to come with its cache. No host sync."""
        self.value = value
        if self._cache is not None:
            keep(self._cache, self.name, value)

    def note_prompt(self, batch: int, length: int, device: torch.device) -> bool:
        """Sets `prompt_length` and `begun` for this forward; returns whether it reads a prompt or a piece of one. No host
        sync."""
        reads = self.value is None or length > 1 or self.prefills
        self.prompt_length = length if reads else 0
        self.begun = self._has_begun(device).expand(batch) | self._had_begun(device) if reads else None
        return reads

    def ends_in_padding(self) -> Tensor:
        """[batch] bool: the rows that are padded on the right, so that their prompt cannot be judged at the last position.
        No host sync. A row of which only left padding has come so far is not among them."""
        return self.begun & ~self._sees_itself().to(self.begun.device)

    def _sees_itself(self) -> Tensor:
        """[batch or 1] bool: whether the last position of this forward sees itself; where that cannot be known, it does not."""
        mask, seen = self._one_mask(), self._seen()
        if is_range(mask):
            reaches = mask[:, 0, -1, 1] >= self._length if has_own_ranges(mask) else True  # that of padding ends before it
            return sees_itself(mask) & reaches
        if seen is None:
            return torch.full((1,), mask is None, device=self.begun.device)
        own, by_last, last = self._length - 1, seen[:, -1], seen.shape[2] - 1
        itself = by_last[:, min(own, last)] if isinstance(own, int) else by_last[:, own.clamp(max=last).reshape(1)][:, 0]
        return itself & (own <= last) if mask.dim() == 2 else itself  # what a padding mask does not reach is hidden

    def _has_begun(self, device: torch.device) -> Tensor:
        """[batch or 1] bool: the rows in which this forward's positions see anything. What a window has left behind they do
        not."""
        mask, seen = self._one_mask(), self._seen()
        if is_range(mask):
            return (mask[:, 0, :, 0] < mask[:, 0, :, 1]).any(1).to(device)
        return torch.ones(1, dtype=torch.bool, device=device) if seen is None else seen.flatten(1).any(1).to(device)

    def _had_begun(self, device: torch.device) -> Tensor:
        """[batch or 1] bool: the rows that had begun before this forward. Those of a cache that others have filled had."""
        before = kept(self._cache, self._begun_name)
        past = self.past.to(device) if isinstance(self.past, Tensor) else self.past  # a device map may have put it elsewhere
        filled = torch.zeros(1, dtype=torch.bool, device=device) | (past > 0)  # not when it was cut to nothing since
        return filled if before is None else filled & before.tensor.to(device)

    @property
    def _length(self) -> int | Tensor:
        """Of the sequences, this forward's positions included."""
        return self.past + self.prompt_length

    @property
    def _begun_name(self) -> str:
        return f"{self.name} begun"

    def _one_mask(self) -> Any:
        """The attention mask; of those by kind of layer the one that hides the least."""
        mask = self._mask
        return mask.get("full_attention", next(iter(mask.values()), None)) if isinstance(mask, dict) else mask

    def _seen(self) -> Tensor | None:
        """[batch or 1, positions or 1, keys] bool: what each position sees, by a mask that spells it out; None without one."""
        mask = self._one_mask()
        if not isinstance(mask, Tensor) or is_range(mask):
            return None
        if mask.dim() == 2:  # a static cache's may be as long as that, and speak of tokens to come
            mask = mask.to(self.past.device) if isinstance(self.past, Tensor) else mask
            so_far = torch.arange(mask.shape[1], device=mask.device) < self._length
            return ((mask != 0) & so_far)[:, None]
        seen = mask[:, 0]  # booleans, or scores to add
        return seen if seen.dtype == torch.bool else seen >= 0

    @contextmanager
    def watch(self, patch: Patch) -> Iterator[PromptState]:
        """Follows the forwards of a `Patch`'s model inside the block. Hooks that read `value` are to be registered in it.

        `generate` calls of other threads wait for each other inside the block. Raises ValueError for another model's profile,
        and for a text model that was compiled by itself.
        """
        self._patch = patch
        self.check(patch.model)
        self._running = _running(patch)
        _refuse_compiled(patch.model, patch.text_model)
        cache_name(patch.text_model)  # or what is decided could not be found again
        with (
            _own_name(patch.text_model, self.name) as self.name,
            undone() as hooks,
            replaced(patch.model, "_prefill", partial(_Prefill, self)),
            replaced(patch.model, "generate", partial(_Generate, self, patch.model)),
        ):
            hooks.hook_before(patch.text_model, self._before_text)
            hooks.hook_after(patch.text_model, self._after_text)
            try:
                yield self
            finally:
                self.ended = True
                if self.generates:  # by this thread, or Ctrl-C came while the block waited for another's
                    self.refusing = patch.text_model.register_forward_pre_hook(_refuse_the_rest)
                    _refuse_the_rest()

    def check_model(self) -> None:
        """Raises ValueError for a model that has become another one, and RuntimeError where modules that a method has hooks on
        were taken out of it: others of equal weights are the same model to a profile."""
        self.check(self._patch.model)
        if _running(self._patch) != self._running:
            _refuse_replaced("a layer, or its last norm,")

    def _before_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self._patch.applied:
            raise RuntimeError("the model was unpatched while a method defends it: its answer would not be steered")
        self._mask, self._cache = kwargs.get("attention_mask"), given_cache(kwargs)
        if lacks_rows(kwargs):
            raise RuntimeError(
                "the model is given a cache without rows, as in continuous batching, which puts all sequences into one; a "
                "method judges and steers each row by itself: use generate"
            )
        # A static cache's own tensor counts on while the layers run.
        self.past = 0 if self._cache is None else self._cache.get_seq_length() + 0
        self.value = kept(self._cache, self.name)
        self._check_length(kwargs)
        # Gemma 4's later layers would run for the last positions alone: methods count on all of them.
        return (args, kwargs | {"logits_to_keep": 0}) if kwargs.get("logits_to_keep") is not None else None

    def _check_length(self, kwargs: dict[str, Any]) -> None:
        """Raises TooLong for a prompt that takes more positions than the model has, as the engine does. No host sync but for
        one that may be so long."""
        shape = text_shape(kwargs)
        if shape is None or shape[1] == 1:
            return
        trained = positions_of(self._patch.model)
        taken = shape[1] + self._past_within(trained)
        if taken <= trained:
            return
        positions = kwargs.get("position_ids")
        if positions is not None:  # without padding; by M-RoPE, [channels, B, T], images take fewer in some channels
            taken = 1 + int(positions.flatten(1).amax(1).min() if positions.dim() == 3 else positions.max())
        check_positions(self._patch.model, taken)

    def _past_within(self, trained: float) -> int:
        """`past`. A static cache's is on the device, which is asked where the cache has room for more than so many tokens."""
        if isinstance(self.past, int):
            return self.past
        slides = all(self._cache.is_sliding)  # then its room says nothing
        return int(self.past) if slides or self._cache.get_max_length() > trained else 0

    def _after_text(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A cache that the model made itself gets the value, too."""
        cache = returned_cache(output)
        if cache is not None and kept(cache, self.name) is not self.value:
            keep(cache, self.name, self.value)
        if cache is not None and self.begun is not None:
            keep(cache, self._begun_name, Rows(self.begun))
        self._cache = self._mask = self.begun = None


class _Prefill:
    """Stands in for the part of `generate` that reads a prompt, in as many forwards as it likes."""

    def __init__(self, state: PromptState, read: Callable[..., Any]) -> None:
        self.state, self.read = state, read

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.state.prefills = True
        try:
            return self.read(*args, **kwargs)
        finally:
            self.state.prefills = False


class _Generate:
    """Stands in for `generate`: a method's state is that of the forward that runs, so threads take turns, also with those that
    answer by the engine or the reference. A model that has become another one is refused."""

    def __init__(self, state: PromptState, model: nn.Module, generate: Callable[..., Any]) -> None:
        self.state, self.model, self.generate = state, model, generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with lock_of(self.model):
            if self.state.ended:
                _refuse_to_begin()
            self.state.check_model()
            outer, self.state.generates = self.state.generates, True  # that of a whole may call a part's
            try:
                answer = self.generate(*args, **kwargs)
            finally:
                self.state.generates = outer
                if self.state.refusing is not None and not outer:
                    self.state.refusing.remove()
            if self.state.ended:
                _refuse_the_rest()
            return answer


def _refuse_to_begin() -> NoReturn:
    raise RuntimeError(f"{_BLOCK_ENDED} before it began: its answer would not be steered")


def _refuse_the_rest(*args: Any) -> NoReturn:
    raise RuntimeError(f"{_BLOCK_ENDED}, inside of it: the rest of its answer would not be steered")


def _running(patch: Patch) -> list[nn.Module | None]:
    """The modules that methods have hooks on. Raises RuntimeError where the model does not run what was patched."""
    _, text_model, layers = find_decoder(patch.model)
    if text_model is not patch.text_model:
        _refuse_replaced("the text model")
    return [patch.final_norm, *(getattr(layer, "_orig_mod", layer) for layer in layers)]


def _refuse_replaced(what: str) -> NoReturn:
    raise RuntimeError(f"{what} of the model that a method defends was replaced: its answer would not be steered")


def _refuse_compiled(model: nn.Module, text_model: nn.Module) -> None:
    """Dynamo does not look whether a module got hooks since it was traced: the answer would not be defended, without an error.
    Around and below the text model it does notice, or there is no hook to miss."""
    itself_or_around = [module for module in model.modules() if getattr(module, "_orig_mod", module) is text_model]
    if any(m._compiled_call_impl is not None or hasattr(m.forward, "_torchdynamo_orig_callable") for m in itself_or_around):
        raise ValueError(
            f"the text model ({type(text_model).__name__}) was compiled by itself, which does not see the hooks of a method; "
            "compile the whole model instead"
        )


@contextmanager
def _own_name(text_model: nn.Module, name: str) -> Iterator[str]:
    """A name that no other state of this model has: `name`, with a number where it is in use several times at once."""
    names = _NAMES.setdefault(text_model, set())
    own, number = name, 1
    while own in names:
        own, number = f"{name} {number + 1}", number + 1
    names.add(own)
    try:
        yield own
    finally:
        names.discard(own)


class _StandIn:
    """What is called in place of a model's method, as long as its block lasts."""

    def __init__(self, owner: nn.Module, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
        self.before, self.method, self.make = owner.__dict__.get(name), getattr(owner, name), make
        self.in_force = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.in_force:  # taken from the model inside the block, as the target of a thread is
            _refuse_to_begin()
        method = self.method
        while isinstance(method, _StandIn) and not method.in_force:  # whose block has ended before this one's
            method = method.method
        return self.make(method)(*args, **kwargs)


@contextmanager
def replaced(model: nn.Module, name: str, stand_in: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """Inside the block the method of this name, which `generate` calls, is replaced by `stand_in(method)`, in each part of the
    model that has one: the `generate` of a whole may call a part's, as InstructBLIP's does. Blocks may end in any order.

    Raises RuntimeError for a model that has `generate` but no such method: a defence that relies on it would not see prompts.
    """
    owners = [module for module in model.modules() if hasattr(type(module), name)]
    if not owners and any(hasattr(type(m), "generate") for m in model.modules()):
        raise RuntimeError(f"generate() of this version of transformers has no {name}, which this method relies on")
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(_replaced_in(owner, name, stand_in))
        yield


@contextmanager
def _replaced_in(owner: nn.Module, name: str, stand_in: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    own = _StandIn(owner, name, stand_in)
    try:  # with the assignment, after which Ctrl-C may come at once
        owner.__dict__[name] = own
        yield
    finally:
        own.in_force = False
        while isinstance(top := owner.__dict__.get(name), _StandIn) and not top.in_force:
            if top.before is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = top.before


@contextmanager
def last_logits_only(model: nn.Module, state: PromptState) -> Iterator[None]:
    """Refuses assisted decoding inside the block, for methods that judge a prompt at its last token.

    The first forward of assisted decoding ends in guessed tokens: the method would judge these, and the tokens that are
    accepted in that forward would leave unsteered.
    """

    def refuse(what: str) -> NoReturn:
        raise RuntimeError(
            f"{what} are wanted, as in assisted decoding; this method judges a prompt at its last position, and needs that to "
            "be the last of its forward"
        )

    def before_head(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if args[0].dim() == 3 and 1 < args[0].shape[1] < state.prompt_length:
            refuse(f"the logits of {args[0].shape[1]} positions of a prompt")

    def no_candidates(method: Callable[..., Any]) -> Callable[..., NoReturn]:
        return lambda *args, **kwargs: refuse("guessed tokens after a prompt")

    with undone() as hooks, replaced(model, "_get_candidate_generator", no_candidates):
        hooks.hook_before(find_head(model), before_head)
        yield
