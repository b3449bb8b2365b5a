"""`melinoe.load`: a model by name, with its experts paged or resident."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from melinoe.config import DEFAULT_POLICY
from melinoe.conversion.first_use import store_of
from melinoe.errors import MelinoeError
from melinoe.machine import resident_memory, usable_device
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.layers import check_experts_per_token, experts_modules, moe_layers
from melinoe.models.pretrained import load_model, read_config, read_tokenizer
from melinoe.paging.expansion import slots_packed
from melinoe.paging.paged_experts import PagedExperts
from melinoe.paging.statistics import Statistics
from melinoe.prediction.predictor import Predictor
from melinoe.runtime.arguments import dtype_of, one_device, passed_on
from melinoe.runtime.attach import print_predictor_notes
from melinoe.runtime.division import Budget
from melinoe.runtime.quantizer import set_settings
from melinoe.runtime.settings import LoadSettings, file_bytes
from melinoe.sticky.model import settle_stickiness
from melinoe.sticky.settings import Stickiness
from melinoe.store.layout import FIELD_ALIGNMENT
from melinoe.store.manifest import is_store

GROUPED_MM_BYTES = 16  # torch's grouped_mm wants rows of a multiple of it


def load(
    source: str | Path,
    adapter: str | Path | None = None,
    predictor: str | Path | None = None,
    memory: int | str | None = None,
    slots: int | None = None,
    policy: str = DEFAULT_POLICY,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    slots_format: str | None = None,
    context: int | None = None,
    batch: int = 1,
    verify: bool = False,
    sticky: float | Stickiness | None = None,
    device_map: Any = None,
    **more: Any,
) -> Any:
    """Opens a model with its experts paged inside a memory budget.

    Args:
        source: a store, or a checkpoint (folder, Hub id, `tiny`). For that, $MELINOE_HOME/stores gets an
            index on first use where its experts can be read in place, else a converted copy.
        adapter: what `melinoe tune` wrote; applied without touching the store.
        predictor: what `melinoe fit-predictor` wrote.
        memory: bytes or text such as "4GiB", for everything that the process takes beyond what it has now
            (docs/memory.md). What needs more than was set aside is refused, before it is computed.
        slots: records per layer, instead of memory.
        policy: decay (default), lru, lfu or static.
        device: where weights, slots and computation are: cpu (default), cuda or cuda:N.
        dtype: the store's own, "auto" or None, which are all the same.
        slots_format: of a store converted with `format`: packed (slots hold records as they are stored,
            computed as they lie, many rows expanded at use) or expanded (to full size when they arrive);
            None: packed where this machine computes them so (docs/store.md).
        context: tokens of KV cache that `memory` sets aside for each sequence; None: the model's, at most
            2048.
        batch: sequences that `memory` is for, where several are generated at once; a beam is a sequence.
        verify: compare each record with its checksum when it is first read (docs/store.md: what it costs).
        sticky: how strongly each sequence keeps to its own experts (melinoe.sticky, docs/sticky.md); None: as
            the adapter was tuned, or as the model's config says, else not at all; 0: not at all.
        device_map: as for `from_pretrained`, where it means one device; instead of device.
        more: attn_implementation and generation_config, as for `from_pretrained`. Its other arguments are
            refused with a line that says what to do instead (melinoe.runtime.arguments).

    Returns:
        A transformers PreTrainedModel in eval mode; `melinoe.stats(model)` has its counters.

    Raises:
        MelinoeError: see `open_store`, `budget.derive`, `apply_adapter`, `Predictor.load`.
    """
    if device is not None and device_map is not None:
        raise MelinoeError("give device or device_map, not both", got=f"{device} and {device_map}")
    if "torch_dtype" in more:  # its older name
        dtype = more.pop("torch_dtype") if dtype is None else dtype
    passed = passed_on(more)
    device = one_device(device_map) if device is None else device
    place = usable_device("cpu" if device is None else device)
    process_bytes = resident_memory()
    settings = LoadSettings(
        memory=memory,
        slots=slots,
        policy=policy,
        slots_format=slots_format,
        context=context,
        batch=batch,
        verify=verify,
        extra_bytes=_weight_bytes(adapter) + file_bytes(predictor),
        predictor=None,  # opened below: it may have been fitted to the adapter's routers
    )
    store = store_of(source)
    slots_packed(store, slots_format)  # refused before anything is loaded
    config = read_config(store.folder)
    own = dtype_of(dtype, config.dtype)
    set_settings(config, settings, store)
    model = load_model(store.folder, config=config, dtype=own, device_map={"": place}, **passed)
    model.melinoe_budget = replace(model.melinoe_budget, process_bytes=process_bytes)
    if adapter is not None:
        from melinoe.adapters.peft_folder import apply_adapter

        apply_adapter(model, Path(adapter))
    settle_stickiness(model, sticky)
    if predictor is not None:
        model.melinoe_paged.predictor = Predictor.load(predictor, model)
        print_predictor_notes(model)
    return model.eval()


def load_for_tuning(
    folder: Path, slots: int, dtype: torch.dtype | None, device: str | torch.device, slots_format: str | None
) -> Any:
    """Opens a store for `tune`: every pass over a layer asks the pager, the statistics count it as training.

    Args:
        folder: a store.
        slots: records per layer, 0 or more.
        dtype: of everything but the records, which keep theirs; None: the store's.
        slots_format: packed or expanded, as for `load`.

    Returns:
        The model, frozen, in eval mode. Its policy is least recently used: what a forward pass has asked for
        is asked again by its backward pass, so there is no better use of a slot in between.

    Raises:
        MelinoeError: see `open_store`.
    """
    config = read_config(folder)
    settings = LoadSettings(slots=slots, policy="lru", slots_format=slots_format, any_dtype=True)
    set_settings(config, settings)
    place = usable_device(device)
    model = load_model(folder, config=config, dtype=dtype or config.dtype, device_map={"": place})
    model.melinoe_paged.tuning = True
    model.is_quantized = False  # nor is it; Trainer would refuse
    return model.eval()


def _weight_bytes(adapter: str | Path | None) -> int:
    return (
        sum(file.stat().st_size for file in Path(adapter).glob("*.safetensors")) if adapter is not None else 0
    )


def load_resident(
    source: str | Path,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    sticky: float | Stickiness | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) with everything in memory, in stock transformers; the adapter applied.

    Args:
        dtype: None: the checkpoint's.
        sticky: as for `load`.

    Raises:
        MelinoeError: no such model, a store (its experts are not resident), or a dense model.
    """
    resolved = resolve_model(source)
    if isinstance(resolved, Path) and is_store(resolved):
        raise MelinoeError(f"{resolved} is a store", allowed="the checkpoint it was made from")
    folder = local_folder(resolved)
    model = load_model(folder, dtype=dtype or "auto")
    check_experts_per_token(model, max(layer.num_experts for layer in moe_layers(model)))
    align(model)
    _settle_experts_function(model)
    if adapter is not None:
        from melinoe.adapters.peft_folder import apply_adapter

        apply_adapter(model, Path(adapter))
    settle_stickiness(model, sticky)
    return model.eval(), load_tokenizer(folder)


def _settle_experts_function(model: Any) -> None:
    """Lets transformers compute experts one by one where its default would raise for the length of rows."""
    odd = any(
        weight.dim() == 3 and weight.shape[-1] * weight.element_size() % GROUPED_MM_BYTES
        for _, experts in experts_modules(model)
        for weight in experts.parameters()
    )
    if odd and model.config._experts_implementation == "grouped_mm":
        model.set_experts_implementation("eager")


def align(model: Any) -> None:
    """Moves weights that start inside a cache line to the start of one.

    from_pretrained maps CPU weights straight from the file, wherever its header left them, and matrix
    libraries may round differently at another alignment (seen: MKL on an AMD EPYC, last bit). So a result
    would depend on the length of a file's header.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % FIELD_ALIGNMENT:
            tensor.data = tensor.data.clone()


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a model folder or store, padding on the left."""
    folder = local_folder(resolve_model(source))
    tokenizer = read_tokenizer(folder)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _paged_experts(model: Any) -> PagedExperts:
    paged = getattr(model, "melinoe_paged", None)
    if paged is None:
        raise MelinoeError(
            "this model was not opened by melinoe.load or from a store", got=type(model).__name__
        )
    return paged


def stats(model: Any) -> Statistics:
    """The counters of an offloaded model, cumulative since load or `stats(model).reset()`."""
    return _paged_experts(model).pager.statistics


def reset_slots(model: Any) -> None:
    """Empties the slots: the next request starts cold."""
    _paged_experts(model).pager.reset()


def plan(model: Any) -> Budget:
    """What the model's memory is used for."""
    _paged_experts(model)
    return model.melinoe_budget
