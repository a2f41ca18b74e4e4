"""SafeGenerator: defended answers by whatever plan the profile's method needs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from ras_fast.checks import check_counts, check_flags
from ras_fast.decoding import Decoding, check_streamer
from ras_fast.engine.answer import SafeOutput
from ras_fast.engine.batch import Batch
from ras_fast.engine.branch import ANSWER, SCRATCH
from ras_fast.engine.kv_cache import ByteBoundedCache
from ras_fast.engine.one_pass import OnePass
from ras_fast.engine.overlapped import Overlapped
from ras_fast.engine.runner import INSTEAD, Runner, close
from ras_fast.engine.watch import Watch
from ras_fast.engine.workspace import Workspace
from ras_fast.fingerprint import wording
from ras_fast.inputs import make_queries
from ras_fast.memory import is_out_of_memory, reraise_out_of_memory
from ras_fast.methods import ONE_PASS, refuse_attached
from ras_fast.model_checks import check_mode, check_parts
from ras_fast.model_lock import at_rest, lock_of
from ras_fast.patching import Patch, patch
from ras_fast.patching.cache_values import returned_cache
from ras_fast.patching.structure import only_records, transformers_model
from ras_fast.profile import RasProfile


def _without_wrapper(model):
    """The transformers model inside a PEFT one. Raises ValueError for soft prompts, which the wrapper puts before the prompt:
    the engine's forwards would lack them."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        kind = type(config).__name__
        raise ValueError(f"model has soft prompts ({kind}), which the engine cannot put before a prompt; use adapters")
    return transformers_model(model)


class SafeGenerator:
    """Defended generation for a multimodal Hugging Face model.

    model: in eval mode; also a PEFT model with adapters.
    profile: a `RasProfile` calibrated on this model; another model's is refused. Its tensors are not to be changed meanwhile.
        The profile is compared with the model, or the processor's chat template and vocabulary, again whenever that was changed
        between two calls.
    batch_size: how many queries go through the stages together.
    fused: patch the model with `ras_fast.patch` from the first call on, unless it is patched; `close()` undoes it.
    region_mass: also report how much attention falls on each image (`SafeOutput.region_mass`), read from the forward over the
        user's prompt. Needs ``fused``.
    cache_bytes: keep image prefixes and contexts of seen images, least recently used out first. 0, the default, keeps
        nothing: what is kept would be the content of users' images. The cache belongs to this object alone, and is emptied
        when the model was changed: its weights, adapters, hooks, patch, steering or region bias. A change of a plain attribute
        or of the config is not seen: call `close()` after one.
    sync_every: steps that are made before the host looks at their tokens, which is when an end is noticed and a streamer is
        given something. None: 8 on CUDA, where a look waits for the device and steps are captured as graphs; else 1.

    The pools of keys and values of up to `ras_fast.engine.workspace.KEPT` batch sizes stay allocated between calls, zeroed, on
    CUDA with their captured graphs; `close()` frees them.

    One call runs at a time on a model: calls from other threads, also of other generators and of `SequentialPipeline`, wait for
    a lock. A forward of your own in another thread does not: it may be steered as the answer is. Ctrl-C leaves the model
    unpatched and usable.
    Counters of all calls are in ``counters``.

    Raises ValueError when an argument has the wrong type or value, the profile is of another model, the method needs the
    patched model and ``fused`` is False, or the engine cannot reproduce the model's own logits.
    """

    def __init__(
        self,
        model,
        processor,
        profile: RasProfile,
        *,
        batch_size: int = 8,
        fused: bool = True,
        region_mass: bool = False,
        cache_bytes: int = 0,
        sync_every: int | None = None,
    ):
        check_parts(model, processor, profile)
        check_counts(batch_size=batch_size, sync_every=1 if sync_every is None else sync_every)
        check_flags(fused=fused, region_mass=region_mass)
        model = _without_wrapper(model)
        profile.check(model, processor)
        self.model, self.processor, self.profile, self._wording = model, processor, profile, wording(processor)
        self.batch_size, self.cache = batch_size, ByteBoundedCache(cache_bytes)
        self.counters: Counter = Counter()
        self._lock = lock_of(model)
        self._fused, self._patch, self._watch = fused, None, Watch(model)
        with self._lock, self._undone_by_ctrl_c():
            refuse_attached(model)
            self._runner = Runner(model, sync_every)
            if profile.method in ONE_PASS:
                self.plan = OnePass(self._runner, processor, profile, self.counters, region_mass)
            else:
                self.plan = Overlapped(self._runner, processor, profile, self.cache, self.counters, region_mass)
            if self.plan.needs_patch and not fused:
                raise ValueError("fused=False, but this profile, or region_mass=True, needs the patched model: fused=True")
            self._prove()

    def generate(self, prompts, images=None, *, streamer=None, progress=None, **decoding) -> list[SafeOutput]:
        """Answers each prompt about its images.

        prompts, images: see `ras_fast.inputs.make_queries`. A chat that ends in an assistant message is for MoRAS and RAS.
        streamer: a transformers streamer, for a single prompt. It is given nothing before the risk is known, and is ended
            whatever happens.
        progress: show a progress bar; None: when there is more than one batch.
        decoding: fields of `ras_fast.decoding.Decoding` (max_new_tokens=64, do_sample, temperature, top_k, top_p, min_p,
            repetition_penalty, seed, stop_strings, logits_processors). The model's generation config gives the
            end-of-sequence tokens and nothing else. Stop strings end answers, not contexts, and stay in the text.

        Raises ValueError for input that cannot be used, TypeError for a setting that is no field, and RuntimeError where a
        logits processor runs this model. An exception in any stage leaves no answer behind: there is no way from an error to
        an unsteered answer.
        """
        check_streamer(streamer)
        try:
            with self._lock, self._undone_by_ctrl_c():
                decoding = Decoding.of(decoding).apart_from(self.model)
                self._wording = self.profile.check_again(self.model, self.processor, self._wording)
                queries = list(enumerate(make_queries(prompts, images, self.processor)))
                for number, query in queries:
                    self.plan.check(number, query)
                if streamer is not None and len(queries) != 1:
                    raise ValueError(f"a streamer takes one prompt, got {len(queries)}")
                check_mode(self.model)
                refuse_attached(self.model)
                return self._answers(queries, decoding, None if streamer is None else self._once(streamer), progress)
        finally:
            if streamer is not None:
                streamer.end()  # whatever happened, or the thread that reads it waits for ever

    def close(self) -> None:
        """Unpatches the model, forgets cached images and frees what is kept between calls. The generator can be used again."""
        with self._lock:
            self._unpatch_model()
            self._forget()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __reduce__(self):
        raise TypeError("a SafeGenerator is of one model in one process; make another, of the copy or in the other process")

    def explain(self) -> str:
        """The plan, the seconds of each stage in the latest batch, and the counters, as text."""
        counts, timings = self.counters, self.plan.last_timings
        lines = [
            self.profile.method,
            *self.plan.describe(),
            "seconds    " + (", ".join(f"{k} {v:.4f}" for k, v in timings.items()) or "nothing run yet"),
            f"queries {counts['queries']}, failed closed {counts['failed_closed']}, "
            f"batches split for memory {counts['memory_splits']}",
        ]
        return "\n".join(lines)

    # One call

    def _once(self, streamer) -> _Once:
        """It may ask this model between steps, unless that would meet what the method has put into it."""
        return _Once(streamer, partial(at_rest, self.model, streamer) if self.plan.attaches else nullcontext)

    def _answers(self, queries, decoding: Decoding, streamer, progress: bool | None) -> list[SafeOutput]:
        batches = [queries[i : i + self.batch_size] for i in range(0, len(queries), self.batch_size)]
        progress = len(batches) > 1 if progress is None else progress
        outputs: list[SafeOutput] = []
        self._patch_model()
        for batch in tqdm(batches, desc="batches", disable=not progress):
            outputs += self._answer_or_split(batch, decoding, streamer)
        return outputs

    def _answer_or_split(self, batch, decoding: Decoding, streamer) -> list[SafeOutput]:
        kept = len(self._runner.workspaces)  # before: an attempt leaves pools of its own there
        try:
            return self._answer(batch, decoding, streamer)
        except (RuntimeError, MemoryError) as error:
            its_own = streamer is not None and streamer.error is error  # the streamer's, not the model's
            if its_own or not is_out_of_memory(error) or (len(batch) == 1 and not kept):
                raise
        # Out of the except block, so that the failed attempt's tensors are free before the next one.
        self._runner.workspaces.clear()
        if kept:
            return self._answer_or_split(batch, decoding, streamer)
        half = len(batch) // 2
        self.counters["memory_splits"] += 1
        warnings.warn(f"out of memory with {len(batch)} queries in a batch: going on with {half}", stacklevel=4)
        return [o for part in (batch[:half], batch[half:]) for o in self._answer_or_split(part, decoding, streamer)]

    @torch.no_grad()
    def _answer(self, batch, decoding: Decoding, streamer) -> list[SafeOutput]:
        if streamer is not None:
            streamer.begin()
        if self._watch.changed():
            self._forget()
            self.profile.check(self.model)
            self.plan.renew()
            self._prove()
        outputs = self.plan.answer(batch, decoding, streamer)
        self._watch.note()
        return outputs

    def _forget(self) -> None:
        """Drops what is of the model as it was: prefixes, contexts, pools and graphs."""
        self.cache.clear()
        self._runner.workspaces.clear()
        self._watch.forget()

    # The model

    @contextmanager
    def _undone_by_ctrl_c(self) -> Iterator[None]:
        """An interruption inside the block leaves the model with no patch but the user's, and with no hook or stand-in for a
        method that came in it. What puts these there undoes them itself, but for an interruption on its very way."""
        before, first, own = Patch.of(self.model), RemovableHandle.next_id, set(vars(self.model))  # hooks are numbered
        theirs = None if before is self._patch else before
        try:
            yield
        except KeyboardInterrupt:
            left = Patch.of(self.model)
            if left is not None and left is not theirs:
                left.unpatch()
            self._patch = None
            for name in set(vars(self.model)) - own:
                del vars(self.model)[name]
            for module in self.model.modules():
                _remove_hooks(module, first)
            raise

    def _patch_model(self) -> None:
        if self._fused and Patch.of(self.model) is None:
            self._patch = patch(self.model)

    def _unpatch_model(self) -> None:
        if self._patch is not None:
            self._patch.unpatch()
            self._patch = None

    @torch.no_grad()
    def _prove(self) -> None:
        """Refuses a model on which branches of a shared prefix do not give the logits of the model's own forward."""
        name, counted = type(self.model).__name__, (self._runner.passes, self._runner.tokens)
        ids = [i for i in range(8) if i != self._runner.image_token][:6]
        tensor = torch.tensor([ids], device=self.model.device)
        try:
            wanted = self._own(tensor)
            found = self._branched(ids)
        except (AttributeError, TypeError, RuntimeError, ValueError) as error:  # the last from one that wants an image always
            reraise_out_of_memory(error)
            raise ValueError(f"{name}: the engine cannot run it ({error}); {INSTEAD}") from error
        self._runner.passes, self._runner.tokens = counted  # these are no answer's
        if not close(found, wanted, self.model):
            raise ValueError(f"{name}: the engine's logits differ from the model's own; {INSTEAD}")

    def _own(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [V] after ids [1, L], by the model's own forward of them in one piece. Where they would all see each other in
        it, which an answer's tokens do not: by one of the first half, and a step for each of the others."""
        if not self._runner.both_ways:
            return self.model(input_ids=ids, use_cache=False).logits[0, -1].float()
        cache = None
        for part in (ids[:, :3], *ids[:, 3:].split(1, dim=1)):
            output = self.model(input_ids=part, use_cache=True, **{self._runner.cache_name: cache})
            cache = returned_cache(output)
        return output.logits[0, -1].float()

    def _branched(self, ids: list[int]) -> torch.Tensor:
        """Logits [V] after these tokens: the first half by a prefill, the others in steps beside another branch."""
        batch = Batch(self._runner, Workspace(self._runner.layers, 1, 3, 3 + 6 + 1, self._runner.device))
        batch.prefill(0, [{"input_ids": torch.tensor([ids], device=self.model.device)}], [3], ANSWER)
        batch.clear_scratch(3, [True])
        other = batch.branch(SCRATCH, [None], [ids[4:]], [3])
        answer = batch.branch(ANSWER, [None], [ids[3:5]], [3])
        batch.forward([other, answer])
        for branch in (other, answer):
            branch.feed.ids[:] = ids[5]
        return self._runner.head(batch.forward([other, answer])[0, 1]).float()


class _Once:
    """A streamer that is shown nothing twice: an attempt after a failed one makes the same tokens again.

    around: gives the context in which it is called.
    error: what it has raised itself.
    """

    def __init__(self, streamer, around: Callable[[], AbstractContextManager]):
        self._streamer, self._around, self._shown, self._seen = streamer, around, 0, 0
        self.error: Exception | None = None

    def begin(self) -> None:
        """An attempt begins."""
        self._seen = 0

    def put(self, tokens: torch.Tensor) -> None:
        new = tokens[max(self._shown - self._seen, 0) :]
        self._seen += len(tokens)
        if len(new):
            self._shown = self._seen
            try:
                with self._around():
                    self._streamer.put(new)
            except Exception as error:
                self.error = error
                raise


def _remove_hooks(module: torch.nn.Module, first: int) -> None:
    """Those from number ``first`` on, but for transformers' own, which it puts there once and relies on."""
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(module, kind)
        for number, hook in list(hooks.items()):
            if number >= first and not only_records(hook):
                del hooks[number]
                getattr(module, f"{kind}_with_kwargs").pop(number, None)
