"""transformers' own decoding loop, with a recorded decode step in it.

`GenerationMixin._sample` has the rules: logits processors, how a token is drawn, when to stop. It is called
as it stands, with an object in the model's place that prepares a step's inputs and runs it with less work in
between. What the object cannot do is done by `model.generate`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from melinoe.decoding.decoder import Decoder, decoder_of
from melinoe.decoding.on_device import device_decoder_of
from melinoe.decoding.processors import sample

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def generate(model: Any, input_ids: torch.Tensor, *, streamer: Any = None, **settings: Any) -> torch.Tensor:
    """`model.generate`, with the same tokens: faster for one sequence whose tokens are chosen one by one.

    Args:
        input_ids: [1, T].
        settings: as for `model.generate`.

    Returns:
        [1, T + new].
    """
    if why_stock(model, input_ids, settings):
        return model.generate(input_ids, streamer=streamer, **settings)
    if model.device.type == "cuda":
        return device_decoder_of(model).generate(model, input_ids, streamer, settings)
    decode = partial(_decode, decoder_of(model), streamer)
    return model.generate(input_ids, streamer=streamer, custom_generate=decode, **settings)


def why_stock(model: Any, input_ids: torch.Tensor, settings: dict[str, Any]) -> str:
    """Why all of `generate` must be transformers' own; empty where it need not."""
    config: GenerationConfig = model._prepare_generation_config(None, **settings)[0]
    mode = config.get_generation_mode(settings.get("assistant_model"))
    if mode not in _MODES:
        return f"{mode.value.replace('_', ' ')} is another loop"
    if config.stop_strings:
        return "stop strings need the tokenizer, which generate hands to its own loops alone"
    if len(input_ids) != 1 or (config.num_return_sequences or 1) > 1:
        return "several sequences at once"
    if config.cache_implementation not in (None, "dynamic") or not config.use_cache:
        return "another kind of cache"
    if config.return_dict_in_generate or model.config.is_encoder_decoder:
        return "more than tokens is asked for"
    for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample"):
        if getattr(type(model), name) is not getattr(GenerationMixin, name):
            return f"{type(model).__name__} has a {name} of its own"
    return ""


def _decode(decoder: Decoder, streamer: Any, model: Any, input_ids: torch.Tensor, **arguments: Any) -> Any:
    """What `generate` calls in place of `_sample`, with the same arguments, but for the streamer."""
    return sample(_InPlace(model, decoder), input_ids, streamer, arguments)


class _InPlace:
    """Stands in a model's place for one call of `_sample`. Prefill is the model's own."""

    def __init__(self, model: Any, decoder: Decoder) -> None:
        self._model, self._decoder = model, decoder
        self._inputs: dict[str, Any] = {}  # of the step that is due
        self._step: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **arguments: Any) -> dict[str, Any]:
        """The first step's inputs are transformers'; those of each further step follow from them."""
        if self._step is None:
            self._inputs = self._model.prepare_inputs_for_generation(input_ids, **arguments)
            self._step = self._decoder.begin(self._inputs)
            return self._inputs
        self._inputs["input_ids"] = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
        if self._inputs.get("position_ids") is not None:
            self._inputs["position_ids"] = self._inputs["position_ids"] + 1
        return self._inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **arguments: Any
    ) -> dict[str, Any]:
        if self._step is None:  # behind prefill
            return self._model._update_model_kwargs_for_generation(outputs, model_kwargs, **arguments)
        return model_kwargs

    def __call__(self, return_dict: bool = True, **inputs: Any) -> Any:
        return self._step(inputs)
