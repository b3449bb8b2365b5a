"""Which types of model melinoe opens, and in one line why it does not open the others.

Nothing here lists what works: that is what transformers' AutoModelForCausalLM opens and what layers.py finds
experts and routers in. docs/families.md shows it for every type that transformers has, and a test of that
page fails when transformers gains one.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from melinoe.errors import MelinoeError

# {model type: why}: AutoModelForCausalLM opens them, but what they mix cannot be offloaded
REFUSED = {
    "doge": "their experts are single vectors, rows of embedding tables, too small to be read one by one",
    "jetmoe": "they keep one expert in several modules and have experts in the attention too, and"
    " transformers offers no place where another function could compute them",
    "longcat_flash": "their routers also choose experts that do not exist (they return their input), and"
    " transformers offers no place where another function could compute the others",
}
# {what opens other types: its table}, the most telling first
_OPENERS = {
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


def refusal(model_type: str) -> MelinoeError | None:
    """Why a model type is not opened; None: transformers opens it as a model that continues a text."""
    if model_type not in CONFIG_MAPPING_NAMES:
        return MelinoeError(
            "transformers does not know this type of model",
            got=f"{model_type} with transformers {transformers.__version__}",
            next_step="install a transformers that knows it; code that comes with a checkpoint is not run",
        )
    if model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if model_type not in REFUSED:
            return None
        reason = REFUSED[model_type]
    else:
        reason = f"{_opened_otherwise(model_type)}, and melinoe needs AutoModelForCausalLM"
    return MelinoeError(
        f"{model_type} models cannot be offloaded: {reason}",
        next_step="use transformers without melinoe, or another model (docs/families.md)",
    )


def _opened_otherwise(model_type: str) -> str:
    opener = next((name for name, types in _OPENERS.items() if model_type in types), None)
    if opener is None:
        return "transformers has them only as a part of other models"
    if opener == "AutoModelForSeq2SeqLM":
        return f"they are encoder-decoder models ({opener})"
    if CONFIG_MAPPING[model_type].sub_configs:
        return f"transformers opens their text only together with pictures or sounds ({opener})"
    return f"transformers opens them with {opener} alone"


def check_supported(config: dict[str, Any]) -> None:
    """Raises MelinoeError for the config.json of a type of model that melinoe does not open, by its name."""
    mark = config.get("quantization_config")  # a store's config has its model's type there
    own = mark.get("own_model_type") if isinstance(mark, dict) else None
    model_type = own or config.get("model_type")
    # doge without experts is a dense model like others
    refused = refusal(str(model_type)) if model_type and config.get("is_moe", True) else None
    if refused is not None:
        raise refused


def no_experts(config: Any) -> MelinoeError:
    """The error for a model in which no experts were found."""
    refused = refusal(config.model_type) if getattr(config, "is_moe", True) else None
    return refused or MelinoeError(
        f"not a mixture-of-experts model: this {config.model_type} has no experts that could be offloaded",
        allowed="one such as OLMoE, Mixtral, Qwen3-MoE or gpt-oss (docs/families.md)",
        next_step="a dense model is opened with transformers, without melinoe",
    )
