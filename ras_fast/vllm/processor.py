"""The logits processor: which row of a batch is which step of which request, in either of vLLM's model runners."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakSet

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, ParallelConfig, VllmConfig
from vllm.distributed import get_tp_group
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as BatchProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotProcessor

from ras_fast.fingerprint import HEAD_ROWS, fingerprint_of_parts
from ras_fast.profile import RasProfile
from ras_fast.vllm.checkpoint import CheckpointHead, load_processor
from ras_fast.vllm.gate import GateSteering
from ras_fast.vllm.options import RISK, Marks, check_marks, read_marks, read_settings
from ras_fast.vllm.steering import LogitSteering

_PROCESSORS: WeakSet[RasLogitsProcessor] = WeakSet()  # of this process


class RasLogitsProcessor(BatchProcessor, SlotProcessor):
    """Steers and records the first N steps of requests that ask for it in their ``extra_args``.

    ``ras_risk``: steer by this risk in [0, 1]; one that is not finite is 1, and counted.
    ``ras_record``: keep the raw logits under this number, for `LogitSteering.judge`.
    ``ras_noise``: draw a sampled answer's tokens here, by the noise of this number.
    Other requests' logits are not touched.

    vLLM has two model runners, each with its own interface for logits processors; this class implements both. The older one
    reports which batch rows were added, removed and moved, and makes the processor with (config, device, pinned memory). The
    newer one passes the slot of each row to `apply`, and makes the processor with (config, state of the slots).

    Raises ValueError when the engine has no profile in its additional_config, for speculative decoding, for LoRA adapters,
    sampling that ranks share out, sleep mode and another model's tokenizer, and when the profile or the model's head cannot be
    used (`LogitSteering`, `CheckpointHead`, `RasProfile.check`).
    """

    def __init__(self, vllm_config: VllmConfig, where, is_pin_memory: bool | None = None):
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative_config is set; steering needs one row of logits for each step of a request")
        if vllm_config.lora_config is not None:
            raise ValueError("lora_config is set; a profile is of one model: merge the adapter into it and calibrate on that")
        if vllm_config.parallel_config.enable_batch_sharded_sampling:
            raise ValueError("enable_batch_sharded_sampling is set; a query's logits need to be on one rank: leave it out")
        model = vllm_config.model_config
        if model.enable_sleep_mode:
            raise ValueError("enable_sleep_mode is set; a sleep of level 2 forgets the profile's tables: leave it out")
        if model.tokenizer != model.model:
            raise ValueError(f"tokenizer is {model.tokenizer!r}; the profile was calibrated with that of {model.model!r}")
        path, queries = read_settings(vllm_config.additional_config)
        self._slots = where if is_pin_memory is None else None
        device = where if self._slots is None else where.device
        self.steering = load_steering(vllm_config, path, 2 * queries, device)
        # Older runner: batch row -> marks and the request's live list of output tokens. Newer runner: slot -> marks.
        self._rows: dict[int, tuple[Marks, list[int]]] = {}
        self._marks: dict[int, Marks] = {}
        self._config = vllm_config
        _PROCESSORS.add(self)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError for ``extra_args`` that mean nothing."""
        check_marks(sampling_params.extra_args, sampling_params.n)

    def apply(self, logits: torch.Tensor, ctx=None) -> torch.Tensor:
        """Logits [rows, V] fp32 of one step; ctx: the newer runner's layout of the batch."""
        rows = self._batch_rows() if ctx is None else self._slot_rows(ctx)
        return self.steering.apply(logits, rows)

    # The older runner

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, output_ids in batch_update.added:
            self._rows.pop(row, None)
            marks = self._read(params)
            if marks is not None:
                self._rows[row] = (marks, output_ids)
        for source, target, direction in batch_update.moved:
            moving, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moving is not None:
                self._rows[target] = moving
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def _batch_rows(self) -> Iterator[tuple[int, int, Marks]]:
        # A prompt that is read in pieces has a row, too, before its last piece: that is step 0 again and again, and what
        # was kept of it is overwritten.
        return ((row, len(output_ids), marks) for row, (marks, output_ids) in self._rows.items())

    # The newer runner

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self._marks.pop(req_idx, None)
        marks = self._read(sampling_params)
        if marks is not None:
            self._marks[req_idx] = marks
        return marks is not None

    def _slot_rows(self, ctx) -> Iterator[tuple[int, int, Marks]]:
        # Without speculative decoding there is one row for each request, and this bound is exact. What is read in pieces, after
        # a preemption the answer's tokens, too, makes none before the last: by these a record would fall back to earlier steps.
        lengths = ctx.seq_lens_upper_bound_np.tolist()
        for row, (slot, length) in enumerate(zip(ctx.idx_mapping_np.tolist(), lengths, strict=True)):
            if slot in self._marks and length >= self._slots.prefill_len.np[slot]:
                yield row, length - int(self._slots.prompt_len.np[slot]), self._marks[slot]

    def _read(self, params: SamplingParams) -> Marks | None:
        marks = read_marks(params)
        if marks is not None and marks.risk is not None and marks.risk != params.extra_args[RISK]:
            self.steering.counters["failed_closed"] += 1
        return marks


def processor_of(vllm_config: VllmConfig) -> RasLogitsProcessor:
    """An engine's processor in this process, by its very config: vLLM may give that another instance id on its way.

    Raises RuntimeError when there is none.
    """
    found = [processor for processor in _PROCESSORS if processor._config is vllm_config]
    if len(found) != 1:
        raise RuntimeError(
            "this engine has no RasLogitsProcessor; make it with LLM(model, **ras_fast.vllm.engine_args(PROFILE))"
        )
    return found[0]


def load_steering(vllm_config: VllmConfig, profile: str, slots: int, device) -> LogitSteering | GateSteering:
    """The profile made ready for the engine's model; raises ValueError when it was calibrated on another one, and where the
    engine is set up so that its method cannot work."""
    model = vllm_config.model_config
    text_config = model.hf_config.get_text_config()
    head = CheckpointHead(model.model, model.revision, model.hf_config, text_config)
    loaded = RasProfile.from_pretrained(profile)
    processor = load_processor(model)
    rows = head.rows(HEAD_ROWS, model.dtype)
    loaded.check_fingerprint(fingerprint_of_parts(model.hf_config.architectures[0], text_config, model.dtype, rows, processor))
    # vLLM ends answers at the tokenizer's, and at those of a generation config that need not name any.
    eos = model.try_get_generation_config().get("eos_token_id") or processor.tokenizer.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return head.logits(hidden.cpu(), model.dtype)

    if loaded.method == "autosteer":
        check_passes(vllm_config.parallel_config, vllm_config.cache_config)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        return GateSteering(loaded, logits, tokens, eos, device, model.dtype, _agree)
    return LogitSteering(loaded, logits, slots, eos, device)


def check_passes(parallel: ParallelConfig, cache: CacheConfig) -> None:
    """Raises ValueError where the layers of one forward do not run one after the other in each worker, each on all of its
    tokens, as AutoSteer needs."""
    if parallel.pipeline_parallel_size > 1:
        size = parallel.pipeline_parallel_size
        raise ValueError(f"pipeline_parallel_size is {size}; AutoSteer needs all layers in one worker: leave it out")
    if parallel.use_ubatching:
        raise ValueError("batches are run in halves that overlap (enable_dbo); AutoSteer judges one at a time: leave it out")
    if parallel.use_sequence_parallel_moe:
        raise ValueError(
            "expert parallelism beside tensor and data parallelism shares the tokens out among ranks; AutoSteer needs all of "
            "them in each: leave enable_expert_parallel out"
        )
    if cache.kv_sharing_fast_prefill:
        raise ValueError("kv_sharing_fast_prefill is set: some layers are given a few tokens of a prompt; leave it out")


def _agree(risks: torch.Tensor) -> torch.Tensor:
    """The risks of the first rank: others may have rounded a sum otherwise, and all are to open the same gates."""
    return get_tp_group().broadcast(risks)
