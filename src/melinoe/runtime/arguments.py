"""What people pass to `from_pretrained`, passed to `melinoe.load`: accepted, or refused by name."""

from __future__ import annotations

from typing import Any

import torch

from melinoe.errors import MelinoeError

PASSED_ON = ("attn_implementation", "generation_config")  # to transformers, as they are
# {argument of from_pretrained: what to do instead}
REFUSED = {
    **dict.fromkeys(
        ("revision", "cache_dir", "token", "force_download", "local_files_only", "proxies", "subfolder"),
        "fetch the model with huggingface_hub.snapshot_download, and load its folder",
    ),
    **dict.fromkeys(("max_memory", "offload_folder", "offload_buffers"), "give memory=, or slots="),
    **dict.fromkeys(
        ("tp_plan", "tp_size", "device_mesh", "distributed_config"), "a model is offloaded on one device"
    ),
    "quantization_config": "convert with format='int8' or 'int4', or open a plain checkpoint",
    "experts_implementation": "the experts of an offloaded model are computed by melinoe",
    "use_kernels": "the experts of an offloaded model are computed by melinoe",
    "variant": "save the variant as a checkpoint of its own",
    "gguf_file": "use the safetensors checkpoint it was made from",
    "config": "change config.json in the model's folder",
    "state_dict": "save the weights as a checkpoint",
    "key_mapping": "save the weights as a checkpoint, under the names of its model",
    "output_loading_info": "melinoe.load raises an error where weights are missing",
    "ignore_mismatched_sizes": "melinoe.load raises an error where weights do not fit",
}
_IGNORED = ("low_cpu_mem_usage", "weights_only", "_fast_init")  # by transformers too, or for safetensors
_ONLY = {"trust_remote_code": (False, None), "use_safetensors": (True, None)}


def passed_on(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that transformers is to see.

    Raises:
        MelinoeError: one that cannot be followed, by its name.
    """
    for name, value in given.items():
        if name in PASSED_ON or name in _IGNORED:
            continue
        if name in _ONLY:
            if value not in _ONLY[name]:
                raise MelinoeError(
                    f"melinoe.load: {name}={value!r} is not possible",
                    allowed=f"{name}={_ONLY[name][0]}",
                    next_step="code of a checkpoint is not run, and pickled weights are not read",
                )
        elif name in REFUSED:
            raise MelinoeError(f"melinoe.load does not take {name}", next_step=REFUSED[name])
        else:
            raise MelinoeError(
                f"melinoe.load does not know the argument {name}",
                allowed=f"its own, and of from_pretrained dtype, device_map, {', '.join(PASSED_ON)}",
            )
    return {name: value for name, value in given.items() if name in PASSED_ON}


def dtype_of(dtype: str | torch.dtype | None, own: torch.dtype) -> torch.dtype:
    """The dtype that was asked for; None and "auto" are the model's own.

    Raises:
        MelinoeError: no such dtype, or another than the model's own.
    """
    asked = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if (asked is None and dtype is not None) or not isinstance(asked, torch.dtype | str | None):
        raise MelinoeError("no such dtype", got=dtype, allowed=f"auto, or {own} as the records have it")
    if asked not in (None, "auto", own):
        raise MelinoeError(
            "the store has another dtype",
            got=asked,
            allowed=own,
            next_step="its records are of that dtype; another needs a checkpoint of another",
        )
    return own


def one_device(device_map: Any) -> str | None:
    """The device of a device map that means one; "auto" is the first CUDA device, or else the CPU.

    Raises:
        MelinoeError: it spreads the model over several.
    """
    if device_map is None:
        return None
    given = device_map.values() if isinstance(device_map, dict) else [device_map]
    devices = {f"cuda:{device}" if isinstance(device, int) else str(device) for device in given}
    if devices == {"auto"}:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if len(devices) != 1 or devices & {"balanced", "balanced_low_0", "sequential", "disk", "meta"}:
        raise MelinoeError(
            "an offloaded model is on one device",
            got=f"device_map={device_map!r}",
            allowed="cpu, cuda, cuda:N, auto, or a map of everything to one of them",
            next_step="what does not fit there is what melinoe pages",
        )
    return devices.pop()
