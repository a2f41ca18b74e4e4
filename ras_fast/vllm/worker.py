"""What `SafeLLM` and `SafeChat` ask of the workers, by ``collective_rpc``. Values are plain: nothing is pickled."""

from __future__ import annotations

import torch

from ras_fast.vllm.processor import processor_of
from ras_fast.vllm.steering import Judgement, LogitSteering


class RasWorkerExtension:
    """Methods that vLLM adds to its workers (``worker_extension_cls``)."""

    def ras_prove(self, config: dict) -> None:
        """Raises ValueError unless the engine's own head is linear and gives the steered table, and its profile has the
        settings ``config``.

        The table was read from the checkpoint by the names in it; whatever the model does after that matrix shows here. So do
        other weights that were loaded since. Who asks has read the profile later than the engine, and may have found another.
        """
        steering = self._ras_steering()
        if config != steering.config:
            raise ValueError("the profile has other settings than when the engine read it: start the engine anew")
        model, dtype = self.get_model(), self.vllm_config.model_config.dtype
        hidden = steering.moras.prototypes.to(dtype)
        inputs = torch.cat([hidden, 2 * hidden, torch.zeros_like(hidden[:1])])
        with torch.inference_mode():
            found = model.compute_logits(inputs)
        if found is None:  # a worker that makes no logits
            return
        found, table = found.float(), steering.table
        wanted = torch.cat([table, 2 * table, torch.zeros_like(table[:1])])
        tolerance = 1e-4 if dtype == torch.float32 else 0.03
        if found.shape != wanted.shape or not (found - wanted).abs().max() <= tolerance * wanted.abs().max():
            raise ValueError("the engine's logits of the prototypes differ from its checkpoint's LM head: it cannot be steered")

    def ras_judge(self, queries: list) -> list[Judgement | None] | None:
        """`LogitSteering.judge`; None from a worker that has seen no logits."""
        steering = self._ras_steering()
        with torch.inference_mode():
            return steering.judge(queries) if steering.records else None

    def ras_forget(self, records: list[int]) -> None:
        """`LogitSteering.forget`."""
        self._ras_steering().forget(records)

    def ras_counters(self) -> dict[str, int]:
        """How often a request's risk was not finite, or not a risk, and counted as 1: "failed_closed"."""
        return dict(self._ras_steering().counters)

    def _ras_steering(self) -> LogitSteering:
        return processor_of(self.vllm_config).steering
