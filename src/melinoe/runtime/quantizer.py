"""The plug-in by which transformers opens a store: a registered HfQuantizer named "melinoe".

`from_pretrained` builds the model's skeleton on the meta device and asks us before it reads weights. We
take the expert parameters away, so that it neither expects nor allocates them, and attach the pager
afterwards. Imported through melinoe._plugin; it must stay light, because it runs inside transformers'
own import.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from melinoe.runtime.settings import LoadSettings

if TYPE_CHECKING:
    from melinoe.store.manifest import Store

METHOD = "melinoe"


@register_quantization_config(METHOD)
class MelinoeConfig(QuantizationConfigMixin):
    """What a store's config.json says under `quantization_config`, and what `melinoe.load` adds to it.

    Args:
        quant_method: by which transformers finds this class.
        store: the store, where it has been opened already.
        settings: of `LoadSettings`; the memory may come from the environment.
    """

    def __init__(self, quant_method: str = METHOD, store: Store | None = None, **settings: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.settings = LoadSettings.from_dict(settings).with_environment()
        self.store = store

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, **self.settings.to_dict()}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def quantization_config(settings: LoadSettings, store: Store | None = None) -> dict[str, Any]:
    """What to put into a model's config so that it is opened with these settings."""
    return {"quant_method": METHOD, "store": store, **settings.to_dict()}


@register_quantizer(METHOD)
class MelinoeQuantizer(HfQuantizer):
    """Takes the experts out before the weights are read and attaches the pager after."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from melinoe.runtime import attach
        from melinoe.store.manifest import open_store

        assert checkpoint_files, "a store has a model.safetensors"
        folder, store = Path(checkpoint_files[0]).parent, self.quantization_config.store
        self.quantization_config.store = None  # the config outlives this load, and may be copied
        if store is None or store.folder.resolve() != folder.resolve():
            store = open_store(folder)
        attach.check_fit(model, store, self.quantization_config.settings.any_dtype)
        self.store = store
        attach.strip(model)
        if store.shards:  # the checkpoint's own files hold the experts too: they are not to be read
            names = {re.escape(layer.experts_name) + r"\." for layer in store.layers}
            model._keys_to_ignore_on_load_unexpected = {
                *(model._keys_to_ignore_on_load_unexpected or ()),
                *names,
            }

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from melinoe.runtime import attach

        attach.unmap(model)  # before the reader checks, as it opens them, that the shards are still the same
        if self.store.fingerprint:  # none yet while a store is being written
            attach.check_weights(model, self.store)
        attach.attach(model, self.store, self.quantization_config.settings)
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
