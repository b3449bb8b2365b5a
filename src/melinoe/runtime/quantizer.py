"""The plug-in by which transformers opens a store: a registered HfQuantizer named "melinoe".

`from_pretrained` builds the model's skeleton on the meta device and asks us before it reads weights. We
take the expert parameters away, so that it neither expects nor allocates them, and attach the pager
afterwards. Imported through melinoe._plugin; it must stay light, because it runs inside transformers'
own import.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "melinoe"


@register_quantization_config(METHOD)
class MelinoeConfig(QuantizationConfigMixin):
    """What a store's config.json says under `quantization_config`, and what `melinoe.load` adds to it.

    Args:
        slots: records per layer. None: from `memory`.
        memory: bytes, or text such as "4GiB". None: from MELINOE_MEMORY, else what is free.
        policy: what decides who stays: decay, lru, lfu, static.
        predictor: path of a predictor, or None.
        slots_format: packed or expanded, for a store with packed records; None: the default.
        context: tokens of KV cache that the budget sets aside; None: the model's, at most
            budget.DEFAULT_CONTEXT.
        extra_bytes: memory that the budget must leave for something else, such as an adapter.
        any_dtype: the model may be opened in another dtype than the records have (tuning converts them at
            each use).
    """

    def __init__(
        self,
        slots: int | None = None,
        memory: int | str | None = None,
        policy: str = "decay",
        predictor: str | None = None,
        extra_bytes: int = 0,
        slots_format: str | None = None,
        context: int | None = None,
        any_dtype: bool = False,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.slots = slots
        self.memory = memory if memory is not None else os.environ.get("MELINOE_MEMORY")
        self.policy, self.predictor, self.extra_bytes = policy, predictor, extra_bytes
        self.slots_format, self.context, self.any_dtype = slots_format, context, any_dtype


@register_quantizer(METHOD)
class MelinoeQuantizer(HfQuantizer):
    """Takes the experts out before the weights are read and attaches the pager after."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from melinoe.runtime import attach

        assert checkpoint_files, "a store has a model.safetensors"
        self.store = attach.open_for(
            model, Path(checkpoint_files[0]).parent, self.quantization_config.any_dtype
        )
        attach.strip(model)
        if self.store.shards:  # the checkpoint's own files hold the experts too: they are not to be read
            names = {re.escape(layer.experts_name) + r"\." for layer in self.store.layers}
            model._keys_to_ignore_on_load_unexpected = {
                *(model._keys_to_ignore_on_load_unexpected or ()),
                *names,
            }

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from melinoe.runtime import attach

        attach.unmap(model)  # before the reader checks, as it opens them, that the shards are still the same
        if self.store.fingerprint:  # none yet while a store is being written
            attach.check_weights(model, self.store)
        attach.attach(model, self.store, self.quantization_config)
        # nothing is quantised: jamba's mamba layers would take another path, with another rounding
        for module in model.modules():
            if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized  # its presence counts, not its value
        return model

    def is_serializable(self) -> bool:
        return False  # save_pretrained would write a model without experts

    @property
    def is_trainable(self) -> bool:
        return False
