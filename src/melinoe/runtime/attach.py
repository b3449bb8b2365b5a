"""Puts a pager under a model: the steps that the quantizer takes before and after weights are read."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from torch import nn

from melinoe.errors import MelinoeError
from melinoe.experts.forward import use_melinoe_experts
from melinoe.machine import UNCOUNTED_KERNELS, keep_kernels
from melinoe.models.layers import check_experts_per_token, experts_modules, fingerprint
from melinoe.paging.device_reader import DeviceReader
from melinoe.paging.expansion import expansion_bytes, slot_records, slots_packed
from melinoe.paging.gather import buffer_bytes
from melinoe.paging.paged_experts import Limits, PagedExperts
from melinoe.paging.pager import ExpertPager
from melinoe.paging.reader import READER_THREADS
from melinoe.prediction.origin import notes_on
from melinoe.prediction.predictor import Predictor
from melinoe.routing.policies import make_policy
from melinoe.runtime import budget
from melinoe.runtime.division import refuse_more_than_there_is
from melinoe.runtime.offloaded import replace_methods
from melinoe.runtime.settings import LoadSettings, file_bytes
from melinoe.store.layout import RecordLayout
from melinoe.store.manifest import Store
from melinoe.store.packing import packing_of


def check_fit(model: nn.Module, store: Store, any_dtype: bool = False) -> None:
    """Checks that the records of a store are those of a model skeleton.

    Args:
        any_dtype: the records may have another dtype than the model, whose experts function converts them.

    Raises:
        MelinoeError: the records have other shapes or another dtype.
    """
    modules = experts_modules(model)
    names = [name for name, _ in modules]
    if names != [layer.experts_name for layer in store.layers]:
        raise MelinoeError(
            f"{store.folder} is a store of another model",
            got=f"{len(store.layers)} layers, first {store.layers[0].experts_name}",
            allowed=f"{len(names)} layers, first {names[0] if names else None}",
        )
    check_experts_per_token(model, max(layer.num_experts for layer in store.layers))
    for (name, module), layer in zip(modules, store.layers, strict=True):
        own = (layer.packing.expanded if layer.packing else layer.layout).fields
        dtypes = {field.name: field.dtype for field in own} if any_dtype else None
        layout = RecordLayout.of(module, dtypes)
        packing = packing_of(store.record_format, layout, bool(module.is_transposed), layer.packing)
        expected_layout = layout if packing is None else packing.record_layout()
        if (expected_layout, packing) != (
            layer.layout,
            layer.packing,
        ) or module.num_experts != layer.num_experts:
            stored, expected = own[0], layout.fields[0]
            raise MelinoeError(
                f"the records of {name} in {store.folder} do not fit the model",
                got=f"{layer.num_experts} experts, {stored.name} {stored.shape} {stored.dtype}",
                allowed=f"{module.num_experts} experts, {expected.name} {expected.shape} {expected.dtype}",
                next_step="load with the store's own dtype, or convert again",
            )


def check_weights(model: nn.Module, store: Store) -> None:
    """Refuses resident weights (read by now) that are not those of the store.

    Raises:
        MelinoeError: its routers have another fingerprint.
    """
    found = fingerprint(model)
    if found != store.fingerprint:
        raise MelinoeError(
            f"the weights in {store.folder} are not those the store was made with",
            got=found,
            allowed=store.fingerprint,
            next_step="convert again",
        )


def strip(model: nn.Module) -> None:
    """Removes the expert parameters, so that nothing loads, allocates or initialises them."""
    for _, module in experts_modules(model):
        for name, _ in list(module.named_parameters(recurse=False)):
            delattr(module, name)
        module._is_hf_initialized = True  # type: ignore[assignment]


def unmap(model: nn.Module) -> None:
    """Gives weights on the CPU memory of their own, at the start of a cache line.

    from_pretrained maps them from the file. That may be overwritten by its owner while it is in use; what is
    mapped would change with it, or end the process where the file became shorter. And matrix libraries may
    round by where weights lie (see `load.align`).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def print_predictor_notes(model: Any) -> None:
    """Says where a model, as sticky as it is now, differs from the one that its predictor was fitted to."""
    predictor = model.melinoe_paged.predictor
    for note in [] if predictor is None else notes_on("the predictor", predictor.origin, model):
        print(f"melinoe: {note}", file=sys.stderr)


def attach(model: Any, store: Store, settings: LoadSettings) -> None:
    """Attaches pager and hook to a stripped model."""
    refuse_more_than_there_is(settings.memory, model.device)
    if settings.verify:
        if not all(layer.checksums for layer in store.layers):
            raise MelinoeError(
                f"the checksums of {store.folder} are not known yet",
                next_step=f"run once: melinoe verify {store.folder}",
            )
        store = replace(store, check_reads=True)
    if any(layer.packing is not None and layer.packing.form == "grouped" for layer in store.layers):
        print(
            f"melinoe: {store.folder} holds {store.record_format} records of an older form, which are"
            " expanded before they are computed; convert again for ones that are computed as they lie",
            file=sys.stderr,
        )
    packed = slots_packed(store, settings.slots_format, model.device)
    extra = settings.extra_bytes + file_bytes(settings.predictor) + READER_THREADS * buffer_bytes(store)
    plan = budget.derive(
        model,
        slot_records(store, packed),
        settings.memory,
        settings.slots,
        context=settings.context,
        batch=settings.batch,
        extra_bytes=extra,
        buffer_bytes=expansion_bytes(store, packed),
        device=model.device,
    )
    if settings.memory is None and settings.slots is None:
        print(f"melinoe: no budget given, using what is free: {plan}", file=sys.stderr)
    num_experts = max(layer.num_experts for layer in store.layers)
    policy = make_policy(settings.policy, len(store.layers), num_experts, plan.slots)
    reader = DeviceReader(store, model.device) if model.device.type != "cpu" else None
    pager = ExpertPager(store, plan.slots, policy, reader=reader, packed=packed)
    paged = PagedExperts(
        pager, Predictor.load(settings.predictor, model) if settings.predictor is not None else None
    )
    if settings.memory is not None:
        paged.limits = Limits(plan.batch, plan.context, plan.pass_tokens)
    if plan.kernels:  # without a budget some more, but not one for every length of a prompt that comes by
        keep_kernels(plan.kernels if settings.memory is not None else max(plan.kernels, UNCOUNTED_KERNELS))
    paged.attach(model)
    for index, (_, module) in enumerate(experts_modules(model)):
        module.melinoe_layer, module.melinoe_paged = index, paged  # type: ignore[assignment]
    model.melinoe_paged, model.melinoe_budget = paged, plan
    model.requires_grad_(False)  # slots are overwritten: nothing behind them can be differentiated
    use_melinoe_experts(model)
    model.generation_config.disable_compile = True  # the experts function talks to the disk
    replace_methods(model)
