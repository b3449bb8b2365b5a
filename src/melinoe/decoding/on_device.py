"""transformers' own decoding loop on a GPU, with a captured step in it.

As in loop.py, `GenerationMixin._sample` is called as it stands with an object in the model's place. The cache
is a static one, kept from one generation to the next together with the step that was captured over it: the
tokens are those of `model.generate(cache_implementation="static")`.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from melinoe.decoding.captured import CapturedStep, place_of
from melinoe.decoding.decoder import Logits, hindrance
from melinoe.decoding.per_model import PerModel
from melinoe.decoding.processors import sample
from melinoe.decoding.state import state_of
from melinoe.experts.compiled import is_gated_silu
from melinoe.experts.forward import NAME
from melinoe.models.layers import experts_modules
from melinoe.native import gathered
from melinoe.paging.device_reader import DeviceReader
from melinoe.paging.expansion import slot_layout

_SHORTEST = 256  # tokens of a cache; longer ones are twice that, four times, ...
_TENSORS = ("input_ids", "position_ids")


class DeviceDecoder:
    """Runs the generations of one model, one at a time.

    captures: how many steps it has captured.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._busy = threading.Lock()
        self._cache: StaticCache | None = None
        self._step: CapturedStep | None = None
        self._state: Any = None
        self._refused = ""  # whatever it is given
        self._failed = ""  # it was tried: over the same kind of cache from then on, in the ordinary way
        self._cannot = ""  # in the last generation
        self.captures = 0

    @property
    def why_eager(self) -> str:
        """Why its steps are not captured, in words that follow "the model"; empty where they are."""
        return self._refused or self._failed or self._cannot

    def generate(
        self, model: Any, input_ids: torch.Tensor, streamer: Any, settings: dict[str, Any]
    ) -> torch.Tensor:
        """`model.generate` of one sequence by one of transformers' loops that choose token by token."""
        stock = partial(model.generate, input_ids, streamer=streamer, **settings)
        length = _longest(model, input_ids, settings)
        if not length:
            return stock()
        if not self._busy.acquire(blocking=False):
            # another thread's text is in the cache; one alike gives the same bits. It may just be finding out
            # whether the model is refused
            refused = self._refused or _refused(model)
            return stock() if refused else stock(past_key_values=_new_cache(model, length))
        try:
            with torch.cuda.device_of(input_ids):  # graphs, events and kernels are the current device's
                self._look_at(model)
                if self._refused:
                    return stock()
                cache = self._cache_for(model, length)
                return stock(past_key_values=cache, custom_generate=partial(_decode, self, streamer))
        finally:
            try:
                if self._step is not None:
                    self._step.finish()
            finally:
                self._busy.release()

    def _look_at(self, model: Any) -> None:
        """Forgets what was captured where the model has changed since."""
        paged = getattr(model, "melinoe_paged", None)
        sticky = getattr(model, "melinoe_sticky", None)
        in_place = paged is not None and getattr(paged.pager.reader, "in_place", False)
        state = state_of(model, {}, sticky), id(paged and paged.pager), in_place, _modes()
        if state != self._state:
            self._state, self._step, self._cache = state, None, None
            self._refused, self._failed = _refused(model), ""

    def _cache_for(self, model: Any, length: int) -> StaticCache:
        cache, new = self._cache, _new_cache(model, length)
        # how long a cache is may show in the last bit: a text's is as long whatever was generated before
        if cache is None or cache.layers[0].max_cache_len != new.layers[0].max_cache_len:
            self._step, self._cache = None, new  # which takes no memory yet
        assert self._cache is not None
        self._cache.reset()
        return self._cache

    def step_for(self, model: Any, inputs: dict[str, Any], masked: bool) -> CapturedStep | None:
        """The captured step, where there is one already.

        Args:
            inputs: of a generation's first step. masked: some of its tokens are none.
        """
        self._cannot = "is given a mask" if masked else hindrance(model, _without_mask(inputs))
        if self._cannot or self._step is None:
            return None
        self._step.begin()
        return self._step

    def capture(self, model: Any, inputs: dict[str, Any], logits: torch.Tensor) -> CapturedStep | None:
        """Captures the step that has just been computed; None where it cannot be.

        Args:
            inputs: it was given. logits: it gave.
        """
        if self.why_eager or self._cache is None:
            return None
        given = {name: inputs[name] for name in _TENSORS if inputs.get(name) is not None}
        step = CapturedStep(model, self._cache, given)
        try:
            if step.capture(logits):
                self._step = step
                self.captures += 1
                return step
            self._failed = "gives other bits when it is captured"
        except (RuntimeError, NotImplementedError) as error:  # something in it asks the host
            self._failed = f"cannot be captured: {str(error).splitlines()[0]}"
        step.take_back()
        model(**inputs)
        return None


device_decoder_of = PerModel(DeviceDecoder)  # the one decoder of a model on a GPU


def _refused(model: Any) -> str:
    """Why a model's steps are not captured, whatever it is given."""
    paged = getattr(model, "melinoe_paged", None)
    if paged is None:
        return "is not paged"
    reader, modules = paged.pager.reader, [module for _, module in experts_modules(model)]
    if not isinstance(reader, DeviceReader) or not reader.in_place:
        return "has records that are not held in host memory as they are computed"
    if not gathered.usable(reader.device):
        return "is on a machine without Triton"
    for module in modules:
        plain = is_gated_silu(module) and not hasattr(module, "low_rank")
        if not plain or "expert_forward" in vars(module) or "forward" in vars(module):
            return "has experts of another kind than silu(gate) * up"
        if module._is_expert_parallel or getattr(module, "weights_scale_input", False):
            return "has experts that are computed in another way"
        if module.config._experts_implementation != NAME:
            return "has another experts function"
    if not all(place_of(layer)[1].computed for layer in paged.pager.store.layers):
        return "has records that are packed in another form"
    dtypes = {field.dtype for layer in paged.pager.store.layers for field in slot_layout(layer, False).fields}
    if dtypes != {str(model.dtype).removeprefix("torch.")} or model.dtype not in gathered.DTYPES:
        return "has experts of another dtype"
    if paged.tuning:
        return "is being tuned"
    if any(type(layer) is not StaticLayer for layer in _new_cache(model, 1).layers):
        return "has attention that is not over all tokens"
    return ""


def _modes() -> tuple[Any, ...]:
    """What else of torch's settings a captured step has in it."""
    cuda = torch.backends.cuda
    return (
        torch.is_inference_mode_enabled(),  # tensors of one mode cannot be written to in the other
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        (cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        torch.are_deterministic_algorithms_enabled(),
        (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
    )


def _new_cache(model: Any, length: int) -> StaticCache:
    """For a text of at most so many tokens."""
    limits, room = model.melinoe_paged.limits, _SHORTEST
    while room < length:
        room *= 2
    if limits is not None:  # of which memory was set aside for so many tokens
        room = max(length, min(room, limits.context))
    return StaticCache(config=model.config.get_text_config(), max_cache_len=room)


def _longest(model: Any, input_ids: torch.Tensor, settings: dict[str, Any]) -> int:
    """Tokens of a text when it is as long as it may become.

    0: nobody says, the cache is the caller's affair, or memory was set aside for shorter ones: a cache that
    grows may do, as the text may end before.
    """
    config = model._prepare_generation_config(None, **settings)[0]
    chosen = config.cache_implementation or settings.get("past_key_values") is not None
    if chosen or not config.max_new_tokens:
        return 0
    length = int(input_ids.shape[1] + config.max_new_tokens)
    limits = getattr(getattr(model, "melinoe_paged", None), "limits", None)
    return 0 if limits is not None and length > limits.context else length


def _without_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def _decode(
    decoder: DeviceDecoder, streamer: Any, model: Any, input_ids: torch.Tensor, **arguments: Any
) -> Any:
    """What `generate` calls in place of `_sample`, with the same arguments, but for the streamer."""
    return sample(_InPlace(model, decoder), input_ids, streamer, arguments)


class _InPlace:
    """Stands in a model's place for one call of `_sample`. Prefill is the model's own."""

    def __init__(self, model: Any, decoder: DeviceDecoder) -> None:
        self._model, self._decoder = model, decoder
        self._begun = False
        self._step: CapturedStep | None = None
        self._position: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _valid_auto_compile_criteria(self, *_: Any, **__: Any) -> bool:
        return False  # a step is captured instead

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **arguments: Any) -> dict[str, Any]:
        """transformers' own, until there is a captured step: that makes its masks by itself."""
        if self._step is None:
            inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(input_ids, **arguments)
            if not self._begun:
                self._begun = True
                mask = arguments.get("attention_mask")
                masked = mask is not None and not (mask.dim() == 2 and bool(mask.all()))
                self._step = self._decoder.step_for(self._model, inputs, masked)
            self._position = inputs.get("position_ids")
            return inputs
        found = {"input_ids": input_ids[:, -1:]}
        if self._position is not None:
            self._position = found["position_ids"] = self._position + 1
        return found

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **arguments: Any
    ) -> dict[str, Any]:
        if self._step is None or not self._begun:
            return self._model._update_model_kwargs_for_generation(outputs, model_kwargs, **arguments)
        return model_kwargs

    def __call__(self, return_dict: bool = True, **inputs: Any) -> Any:
        if self._step is not None:
            given = {name: inputs[name] for name in _TENSORS if inputs.get(name) is not None}
            return Logits(self._step(given))
        output = self._model(**inputs, return_dict=True)
        self._step = self._decoder.capture(self._model, inputs, output.logits)
        return output
