"""A store's config.json: the model's own, marked so that nobody opens it without melinoe.

transformers alone would not find the experts, warn, and make them up at random. So the config of a store
names a type of model that only melinoe knows, and weights that only melinoe finds; what transformers says
then, when it refuses either, contains what to do. `StoreConfig` is registered for that type and gives the
model's own config, so that everything behind it sees an ordinary model.

Imported through melinoe._plugin inside transformers' own import; it must stay light.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from melinoe.config import STORE_METHOD
from melinoe.errors import MelinoeError

NOTICE = "melinoe store: run `import melinoe` before it is opened (pip install melinoe-moe)"
_MARK = "quantization_config"


def marked(config: dict[str, Any], weights: str, dtype: str) -> dict[str, Any]:
    """The config of a store.

    Args:
        config: the checkpoint's config.json.
        weights: name of the file in the store that holds, or lists, what is not an expert's.
        dtype: of the model, for a config that does not say it; torch's name.
    """
    own = {**config, "dtype": dtype}
    own.pop("torch_dtype", None)  # its older name
    if isinstance(own.get("text_config"), dict):
        own["text_config"] = {**own["text_config"], "dtype": dtype}
    # not called model_type: a config class takes a dictionary that names its own type for its whole config
    mark = {"quant_method": STORE_METHOD, "own_model_type": config.get("model_type"), "weights": weights}
    return {**own, "model_type": NOTICE, "transformers_weights": NOTICE, _MARK: mark}


class StoreConfig(PreTrainedConfig):
    """Stands for every store's config; opening one gives the model's own config instead."""

    model_type = NOTICE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **settings: Any) -> Any:
        """The model's own config, with the mark under `quantization_config`."""
        mark = config_dict.get(_MARK)
        own_type = mark.get("own_model_type") if isinstance(mark, dict) else None
        if not isinstance(own_type, str) or own_type not in CONFIG_MAPPING:
            raise MelinoeError(
                "the config.json of a melinoe store names no model that this transformers knows",
                got=own_type,
                next_step="convert again, or upgrade transformers",
            )
        own = {**config_dict, "model_type": own_type}
        own.pop("transformers_weights", None)
        return CONFIG_MAPPING[own_type].from_dict(own, **settings)


AutoConfig.register(NOTICE, StoreConfig, exist_ok=True)
