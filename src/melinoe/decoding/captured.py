"""A decode step as one CUDA graph, whose experts are read where they are.

A step of a model on a GPU is a few hundred small kernels, and where experts are paged a question to the host
in every layer. Captured once, it is one launch: the kernels of `native/gathered.py` look up where each
expert's record is (`paging/address_table.py`), in device memory or in the host's, and which experts were
asked for is told afterwards. The host decides then who stays, while the next step runs.

A captured step is the model's own forward pass over a static cache. It is compared, bit for bit, with the
pass that was run before it in the ordinary way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import StaticCache

from melinoe.decoding.bits import same_bits
from melinoe.experts.forward import DOWN, UP, combine
from melinoe.models.layers import experts_per_token
from melinoe.native import gathered
from melinoe.native.gathered import Form
from melinoe.paging.address_table import AddressTable
from melinoe.paging.expansion import kernel_form
from melinoe.store.packing import SCALE
from melinoe.store.record_file import StoredLayer


class Graph:
    """A function of no arguments that writes to the same memory whenever it is replayed.

    On the CPU, where there are no graphs, it is called each time.
    """

    def __init__(self, device: torch.device, function: Callable[[], torch.Tensor]) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        # one that was captured is not kept: it may hold who holds this, and with it the graph's memory
        self._function = function if device.type != "cuda" else None
        if device.type == "cuda":
            self._graph = torch.cuda.CUDAGraph()
            # other threads may read records meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self.output = function()
        else:
            self.output = function().clone()

    def replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self._function is not None:
            self.output.copy_(self._function())


def place_of(layer: StoredLayer) -> tuple[tuple[int, int, int, int], Form]:
    """(where the matrices of a record and their scales begin, in bytes; how they lie) of a stored layer."""
    offset = {field.name: field.offset for field in layer.layout.fields}
    names = UP, UP + SCALE, DOWN, DOWN + SCALE
    up, up_scale, down, down_scale = (offset.get(name, 0) for name in names)
    packing = layer.packing
    fields = {field.name: field for field in (packing.expanded if packing else layer.layout).fields}
    inner = fields[DOWN].shape[1]
    form = kernel_form(packing, inner, packing.tile) if packing else Form(inner)
    return (up, up_scale, down, down_scale), form


class CapturedStep:
    """The step of one model over one cache, for one sequence.

    Args:
        model: paged, its records held in host memory, its experts such as `native/gathered.py` computes.
        cache: of its text, into which the prompt and the first token behind it have been read.
        inputs: what forward is given in a step; input_ids [1, 1] and, for most models, position_ids [1, 1].
    """

    def __init__(self, model: Any, cache: StaticCache, inputs: dict[str, torch.Tensor]) -> None:
        self.cache = cache
        self._paged = model.melinoe_paged
        self._pager = self._paged.pager
        self._table = AddressTable(self._pager)
        device = self._pager.reader.device
        self._records = [place_of(layer) for layer in self._pager.store.layers]
        self._given = {name: one.clone() for name, one in inputs.items()}
        layers = len(self._pager.banks)
        top_k = experts_per_token(model)
        self._chosen = torch.zeros(layers, top_k, dtype=torch.int64, device=device)
        self._zeros_K = torch.zeros(top_k, dtype=torch.int64, device=device)
        self._places_K = torch.arange(top_k, device=device)
        self._told = torch.zeros(layers, top_k, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        self._open = False  # a step was launched whose experts nobody has looked at yet
        self._sticky = getattr(model, "melinoe_sticky", None)
        self._history: Any = None  # of a sticky model
        self._model = weakref.ref(model)  # who keeps a step must not keep its model
        self._device = device

    def capture(self, expected: torch.Tensor) -> bool:
        """Captures the step that the cache's last token was computed by; the cache is as before.

        Args:
            expected: logits [1, 1, V] that it gave.

        Returns:
            Whether the captured step gives the same bits.
        """
        self._lengths = [layer.cumulative_length - 1 for layer in self.cache.layers]
        if self._sticky is not None:
            room = self.cache.layers[0].max_cache_len
            self._history = self._sticky.prepare_on_device(self.cache, room)
        with self._pager.alone():
            self._table.refresh()
            self._rewind()
            if self._device.type == "cuda":  # what libraries do at their first call is no part of a graph
                here, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
                aside.wait_stream(here)
                with torch.cuda.stream(aside):
                    self._compute()
                here.wait_stream(aside)
                self._rewind()
            self._graph = Graph(self._device, self._compute)
            self._rewind()
            self._graph.replay()
            return same_bits(self._graph.output.cpu(), expected.cpu())

    def take_back(self) -> None:
        """Takes the last token out of the cache, after a capture that failed or gave other bits.

        Its keys and values are whatever the try has left: it is to be read once more.
        """
        for layer, length in zip(self.cache.layers, self._lengths, strict=True):
            layer.cumulative_length.copy_(length)

    def _rewind(self) -> None:
        """Takes the last token back, or what a try has made of it, also out of what sticky routers know."""
        self.take_back()
        if self._history is not None:
            self._history.cut_on_device(self._history.length - 1)

    def begin(self) -> None:
        """To be called when a generation comes to its first captured step."""
        if self._history is not None:
            self._history.place_1.fill_(self._history.length)

    def _compute(self) -> torch.Tensor:
        """[1, 1, V] logits of the step; writes to the cache and into `_told`."""
        model: Any = self._model()
        follow = self._sticky.on_device(self._history) if self._sticky is not None else nullcontext()
        with self._paged.computing(self._experts), follow:
            # past the hooks on the model, which look at what it is given
            output = model.forward(**self._given, past_key_values=self.cache, use_cache=True)
        self._told.copy_(self._chosen, non_blocking=True)
        logits: torch.Tensor = output.logits
        return logits

    def _experts(
        self, module: Any, hidden_1H: torch.Tensor, index_1K: torch.Tensor, weights_1K: torch.Tensor
    ) -> torch.Tensor:
        layer = int(module.melinoe_layer)
        self._chosen[layer].copy_(index_1K[0])
        row, top_k = self._table.addresses[layer], index_1K.shape[1]
        which = self._zeros_K[:top_k], index_1K[0].long().contiguous(), self._places_K[:top_k]
        outputs = hidden_1H.new_empty(top_k, hidden_1H.shape[1])
        offsets, form = self._records[layer]
        gathered.gated_at(hidden_1H.contiguous(), which, outputs, [row] * 4, offsets, form)
        return combine(outputs, weights_1K, len(outputs), hidden_1H.dtype)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[1, 1, V] logits, valid until the next step; the cache grows by one token."""
        with self._pager.alone():
            before = self._asked()
            self._table.refresh()
            for name, value in inputs.items():
                self._given[name].copy_(value)
            self._graph.replay()
            if self._done is not None:
                self._done.record()
                self._pager.reader.copies_after(self._done)
            self._open = True
            if self._history is not None:
                self._history.length += 1
            self._follow(before)
        return self._graph.output

    def finish(self) -> None:
        """Tells the policy of the last step. To be called when a generation has ended."""
        with self._pager.alone():
            self._follow(self._asked())

    def _asked(self) -> list[tuple[list[int], int]] | None:
        """The experts of the last step, layer by layer, and how many of them were read from the host."""
        if not self._open:
            return None
        if self._done is not None:
            self._done.synchronize()
        self._open = False
        asked: list[list[int]] = self._told.tolist()
        return [(experts, self._table.read_in_place(layer, experts)) for layer, experts in enumerate(asked)]

    def _follow(self, asked: list[tuple[list[int], int]] | None) -> None:
        if asked is None:
            return
        self._paged.decoded()
        for layer, (experts, in_place) in enumerate(asked):
            self._table.follow(layer, self._paged.call(np.array([experts])), in_place)
