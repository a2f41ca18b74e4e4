"""The worker of an engine that is defended: vLLM's own, whose model gets the profile's hooks before it is compiled, and which
answers what `SafeLLM` and `SafeChat` ask by ``collective_rpc``. Values are plain: nothing is pickled."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.platforms import current_platform

from ras_fast.profile import RasProfile
from ras_fast.vllm.gate import GateSteering, Verdict, can_be_judged
from ras_fast.vllm.options import read_settings
from ras_fast.vllm.processor import processor_of
from ras_fast.vllm.steering import Judgement, LogitSteering

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class RasWorker(PlatformWorker):
    """vLLM's worker (``worker_cls``) with a profile at work in its model."""

    def load_model(self, **options) -> None:
        config = self.vllm_config
        profile, _ = read_settings(config.additional_config)
        # vLLM finds compiled graphs again by its config, and the hook at this layer is in them.
        layer = {"layer": RasProfile.from_pretrained(profile).config.get("layer")}
        config.additional_config = config.additional_config | {"ras_fast": config.additional_config["ras_fast"] | layer}
        super().load_model(**options)
        steering = self._ras_steering()
        if isinstance(steering, GateSteering):
            model = self.get_model()
            heads = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
            steering.attach(model, _layers(model, config.model_config.hf_text_config.num_hidden_layers), heads)

    def ras_prove(self, config: dict) -> None:
        """The steering's `prove`. Raises ValueError, too, when the profile has other settings than ``config``: whoever asks has
        read it later than the engine, and may have found another."""
        steering = self._ras_steering()
        if config != steering.config:
            raise ValueError("the profile has other settings than when the engine read it: start the engine anew")
        with torch.inference_mode():
            steering.prove(self.get_model().compute_logits, self.vllm_config.model_config.dtype)

    def ras_judge(self, queries: list) -> list[Judgement | Verdict | None] | None:
        """The steering's `judge`; None from a worker that has seen no logits."""
        steering = self._ras_steering()
        with torch.inference_mode():
            return steering.judge(queries) if steering.records else None

    def ras_forget(self, records: list[int]) -> None:
        """The steering's `forget`."""
        self._ras_steering().forget(records)

    def ras_counters(self) -> dict[str, int]:
        """How often a request's risk was not finite, or not a risk, and counted as 1: "failed_closed"."""
        return dict(self._ras_steering().counters)

    def _ras_steering(self) -> LogitSteering | GateSteering:
        return processor_of(self.vllm_config).steering


def _layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The decoder layers of the language model in one of vLLM's. Raises ValueError when they cannot be told."""
    language = model.get_language_model() if hasattr(model, "get_language_model") else model
    lists = [module for module in language.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    found = [layers for layers in lists if all(map(can_be_judged, layers))]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of {count} layers that take a residual; AutoSteer needs one"
        )
    return found[0]
