"""The worker of an engine that is defended: vLLM's own, whose model gets the profile's hooks before it is compiled, and which
answers what `SafeLLM` and `SafeChat` ask by ``collective_rpc``. Values are plain: nothing is pickled."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
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
        # vLLM finds compiled graphs again by its config, and a prober is in them.
        prober = {"prober": _prober(RasProfile.from_pretrained(profile))}
        config.additional_config = config.additional_config | {"ras_fast": config.additional_config["ras_fast"] | prober}
        super().load_model(**options)
        steering = self._ras_steering()
        if isinstance(steering, GateSteering):
            model = self.get_model()
            heads = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
            layers = layers_of(model, config.model_config.hf_text_config.num_hidden_layers)
            steering.attach(model, layers, heads, partial(_run, config))

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


def _prober(profile: RasProfile) -> list | None:
    """The layer that it stands before, and the shape of its first weight; None for a profile without one."""
    weight = profile.tensors.get("prober_in.weight")
    return None if weight is None else [profile.config["layer"], *weight.shape]


def _run(config: VllmConfig, layer: nn.Module, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The outputs [rows, n d] of a layer whose attention gives zeros. Raises ValueError where it cannot be run by itself."""
    positions = torch.arange(len(hidden), device=hidden.device)
    positions = positions.expand(3, -1) if config.model_config.uses_mrope else positions
    given = {"positions": positions, "hidden_states": hidden, "residual": residual}
    taken = inspect.signature(layer.forward).parameters
    others = {name: None for name, p in taken.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    try:
        with torch.inference_mode(), set_forward_context(None, config), ExitStack() as hooks:  # as in vLLM's own first run
            for module in layer.modules():
                if isinstance(module, AttentionLayerBase):  # on a CPU it gives whatever is in memory
                    hooks.enter_context(module.register_forward_hook(_zeros))
            outputs = layer(**others | {name: value for name, value in given.items() if name in taken})
        return torch.cat([output for output in outputs if isinstance(output, torch.Tensor)], dim=-1)
    except Exception as error:  # of whatever type
        raise ValueError(f"{type(layer).__name__} takes {list(taken)} and cannot be tried out: {error!r}") from error


def _zeros(module: nn.Module, args: tuple, output):
    return torch.zeros_like(output) if isinstance(output, torch.Tensor) else output


def layers_of(model: nn.Module, count: int) -> nn.ModuleList:
    """The decoder layers of the language model in one of vLLM's. Raises ValueError when they cannot be told."""
    language = model.get_language_model() if hasattr(model, "get_language_model") else model
    lists = [module for module in language.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    found = [layers for layers in lists if all(map(can_be_judged, layers))]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of {count} layers that take a residual; AutoSteer needs one"
        )
    return found[0]
