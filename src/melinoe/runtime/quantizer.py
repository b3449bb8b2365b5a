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

from melinoe.config import STORE_METHOD
from melinoe.errors import MelinoeError
from melinoe.models.pretrained import is_marked
from melinoe.runtime.settings import LoadSettings
from melinoe.store.manifest import RESIDENT, RESIDENT_INDEX

if TYPE_CHECKING:
    from melinoe.store.manifest import Store


@register_quantization_config(STORE_METHOD)
class MelinoeConfig(QuantizationConfigMixin):
    """What a store's config.json says under `quantization_config`, and what `melinoe.load` adds to it.

    Args:
        quant_method: by which transformers finds this class.
        own_model_type: of the model; the config says that it is a store's.
        weights: the file of the store that holds, or lists, what is not an expert's.
        store: the store, where it has been opened already.
        settings: of `LoadSettings`; the memory may come from the environment.
    """

    def __init__(
        self,
        quant_method: str = STORE_METHOD,
        own_model_type: str | None = None,
        weights: str | None = None,
        store: Store | None = None,
        **settings: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.own_model_type, self.weights = own_model_type, weights
        self.settings = LoadSettings.from_dict(settings).with_environment()
        self.store = store

    def to_dict(self) -> dict[str, Any]:
        mark = {name: getattr(self, name) for name in ("quant_method", "own_model_type", "weights")}
        return {**mark, **self.settings.to_dict()}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def set_settings(config: Any, settings: LoadSettings, store: Store | None = None) -> None:
    """Puts settings into the config of a store, so that its model is opened with them.

    Raises:
        MelinoeError: it is not the config of a store.
    """
    if not is_marked(config):
        raise MelinoeError(
            f"the config.json of the store {config.name_or_path} is not that of a store",
            next_step="convert again",
        )
    config.quantization_config = {**config.quantization_config, "store": store, **settings.to_dict()}


@register_quantizer(STORE_METHOD)
class MelinoeQuantizer(HfQuantizer):
    """Takes the experts out before the weights are read and attaches the pager after."""

    requires_calibration = False

    def update_device_map(self, device_map: Any) -> Any:
        from melinoe.runtime.arguments import one_device

        return None if device_map is None else {"": one_device(device_map)}

    def update_attn_implementation(self, config: Any) -> Any:
        """Takes the marks off a store's config; called before transformers looks for its weights.

        A config that was opened by its model's own class, and not by AutoConfig, still has them.
        """
        weights = self.quantization_config.weights
        if weights is None:
            raise MelinoeError(
                "this store is of an older format",
                next_step="open it once with melinoe.load or melinoe generate, which upgrade it",
            )
        if weights not in (RESIDENT, RESIDENT_INDEX):
            raise MelinoeError(
                "the config.json of a melinoe store names other weights than its own", got=weights
            )
        config.transformers_weights = weights
        vars(config).pop("model_type", None)  # what is left is the class's own
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from melinoe.runtime import attach
        from melinoe.store.manifest import open_store

        assert checkpoint_files, "a store has a model.safetensors"
        named, store = Path(model.config.name_or_path), self.quantization_config.store
        folder = named if named.is_dir() else Path(checkpoint_files[0]).parent  # of a Hub id: its snapshot
        self.quantization_config.store = None  # the config outlives this load, and may be copied
        if store is None or store.folder.resolve() != folder.resolve():
            store = open_store(folder)
        own = {RESIDENT, *(shard.file for shard in store.shards)}
        for file in map(Path, checkpoint_files):
            if file.parent != folder or file.name not in own:
                raise MelinoeError(f"the store {folder} names weights that are not its own", got=file)
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
        from melinoe.sticky.model import settle_stickiness

        attach.unmap(model)  # before the reader checks, as it opens them, that the shards are still the same
        if self.store.fingerprint:  # none yet while a store is being written
            attach.check_weights(model, self.store)
        attach.attach(model, self.store, self.quantization_config.settings)
        # as its config says: who opens a store without melinoe.load gets the same
        settle_stickiness(model, None)
        attach.print_predictor_notes(model)
        # nothing is quantised: jamba's mamba layers would take another path, with another rounding
        vars(model.config).pop("transformers_weights", None)
        for module in model.modules():
            if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized  # its presence counts, not its value
        return model

    def is_serializable(self) -> bool:
        return False  # save_pretrained would write a model without experts

    @property
    def is_trainable(self) -> bool:
        return False
