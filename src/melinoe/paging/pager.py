"""Serves the experts of one call: the policy decides, the reader moves bytes, the caller computes.

One pager belongs to one model. Its `serve` yields every expert that a call asks for, as soon as the
expert's record is in memory: first those that are there, while the others are being read (`ServedCall`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch

from melinoe.errors import MelinoeError
from melinoe.paging.disk_reader import DiskReader
from melinoe.paging.expansion import ExpandingReader, Retiling, Scratch, slot_layout
from melinoe.paging.reader import Reader
from melinoe.paging.served_call import ServedCall, Views
from melinoe.paging.slots import STAGING_RECORDS, SlotBank, Staging
from melinoe.paging.statistics import Statistics
from melinoe.routing.policies import Call, Decision, Policy, Strength
from melinoe.store.manifest import Store
from melinoe.store.record_file import StoredLayer


class ExpertPager:
    """Slots, staging, policy and reader of one offloaded model.

    Args:
        store: where the records are.
        slots: per layer, 0 or more.
        policy: decides what stays; made for the same number of layers, experts and slots.
        staging: records that stream what is not kept, shared by all layers; 2 or more.
        reader: what moves records, to where the slots are to be; None: from disk into host memory.
        packed: slots hold packed records, computed as they lie or expanded at use; for a store whose records
            are packed.
    """

    def __init__(
        self,
        store: Store,
        slots: int,
        policy: Policy,
        staging: int = STAGING_RECORDS,
        reader: Reader | None = None,
        packed: bool = False,
    ) -> None:
        self.store, self.policy, self.slots = store, policy, slots
        packed = packed and store.record_format != "auto"
        retiling = Retiling(store) if packed and reader is None else None
        self.reader: Reader = DiskReader(store, arrived=retiling) if reader is None else reader
        device = self.reader.device
        layouts = [slot_layout(layer, packed) for layer in store.layers]
        self.banks = [
            SlotBank(min(slots, layer.num_experts), layout, device)
            for layer, layout in zip(store.layers, layouts, strict=True)
        ]
        self.staging = Staging(staging, layouts, device)
        self._scratch: Scratch | None = None
        if packed:
            tiles = retiling.tiles if retiling is not None else [_stored_tile(one) for one in store.layers]
            self._scratch = Scratch(store, device, tiles)
        elif store.record_format != "auto":
            self.reader = ExpandingReader(self.reader, store)
        self.statistics = Statistics()
        self.watcher: Callable[[int, Decision], None] | None = None  # told of every decision; must be quick
        self._lock = threading.RLock()  # decisions follow program order; two threads take turns
        self._process = os.getpid()
        self._inside = False  # while a call is served
        self._unfinished = False  # behind a call that did not come to its end

    @property
    def packed(self) -> bool:
        """Whether slots hold packed records."""
        return self._scratch is not None

    @property
    def slot_bytes(self) -> int:
        """Memory for experts: all slots, the staging records, and what packed records are expanded with."""
        buffers = [bank.buffer for bank in self.banks if bank.buffer.count] + [self.staging.buffer]
        if self._scratch is not None:
            buffers.append(self._scratch.buffer)
        if isinstance(self.reader, ExpandingReader):
            buffers.append(self.reader.buffers)
        return sum(buffer.tensor.nbytes for buffer in buffers)

    def reset(self) -> None:
        """Empties the slots and the policy's memory, after all reads have ended: a cold start."""
        with self._lock:
            self.reader.drain()
            for bank in self.banks:
                bank.clear()
            self.policy.reset()
            self._unfinished = False

    def begin(
        self, scores: np.ndarray | None = None, strength: Strength | None = None, kept: float = 0.0
    ) -> None:
        """A new request starts; see `Policy.begin`."""
        with self._lock:
            self.policy.begin(scores, strength, kept)

    def __reduce__(self) -> Any:
        raise MelinoeError(
            "an offloaded model cannot be copied or pickled: it has files and reading threads",
            next_step="load it once more with melinoe.load",
        )

    def weight_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that `serve` yields for an expert of this layer, by name."""
        return {field.name: field.shape for field in slot_layout(self.store.layers[layer], False).fields}

    def serve(self, layer: int, call: Call, training: bool = False) -> Iterator[tuple[int, Views]]:
        """Yields (expert, tensors) once for every expert of the call; the tensors hold until the next step.

        Args:
            training: count the call as one of tuning, not as prefill or decoding.

        Raises:
            MelinoeError: see `serve_groups`.
        """
        with contextlib.closing(self.serve_groups(layer, call, training, together=False)) as groups:
            for group in groups:
                yield group[0]

    def serve_groups(
        self, layer: int, call: Call, training: bool = False, together: bool = True
    ) -> Generator[list[tuple[int, Views]]]:
        """As `serve`, in groups of (expert, tensors): those that are at hand first, together.

        A call that does not come to its end (a read error, the caller stops, Ctrl-C) leaves a mark, and the
        next one begins with empty slots: no half-read record can be taken for an expert.

        Args:
            together: False: every group has one.

        Raises:
            MelinoeError: a record could not be read, or this process is a fork of the one that loaded the
                model.
        """
        if os.getpid() != self._process:  # it shares the slots with its parent, and has none of the threads
            raise MelinoeError(
                "an offloaded model cannot be used in a fork of the process that loaded it",
                next_step="load it in every process (multiprocessing: start method spawn, or load after the"
                " fork)",
            )
        with self._lock:
            assert not self._inside, "a call inside a call would overwrite what the outer one uses"
            if self._unfinished:
                self.reset()
            self._inside = self._unfinished = True
            try:
                decision = self._decide(layer, call, training)
                served = ServedCall(
                    layer, decision, self.banks[layer], self.staging, self.reader, self.statistics
                )
                served.start()
                hits = served.next_hits() if together else []
                if hits:
                    yield [(expert, self._unpacked(layer, views)) for expert, views in hits]
                while (ready := served.next()) is not None:
                    expert, views = ready
                    yield [(expert, self._unpacked(layer, views))]
                self._unfinished = False
            finally:
                self._inside = False

    def _unpacked(self, layer: int, views: Views) -> Views:
        return views if self._scratch is None else self._scratch.expert(layer, views)

    def serve_hits(
        self, layer: int, call: Call, compute: Callable[[list[int]], torch.Tensor]
    ) -> torch.Tensor | None:
        """`compute` of the slots of a decoded token's experts, in the order in which they are asked for.

        The same decisions as `serve`, with less in between. None, and nothing decided, where an expert is to
        be read or still arriving, and where it takes `serve` to say what is wrong.
        """
        asked, bank = call.indices[0].tolist(), self.banks[layer]
        with self._lock:
            if self._inside or self._unfinished or os.getpid() != self._process:
                return None
            try:
                slots = [bank.slot_of[expert] for expert in asked]
            except KeyError:
                return None
            if len(set(slots)) < len(slots) or not bank.pending.keys().isdisjoint(asked):
                return None
            self._inside = self._unfinished = True
            try:
                decision = self.policy.request_resident(layer, call, sorted(asked))
                if decision is None:
                    self._decide(layer, call)
                else:
                    self.statistics.count_hits(len(asked))
                    if self.watcher is not None:
                        self.watcher(layer, decision)
                found = compute(slots)
                self._unfinished = False
                return found
            finally:
                self._inside = False

    def follow(self, layer: int, call: Call, read_in_place: int) -> None:
        """Decides a call that was computed already, from where its experts were (`AddressTable`).

        An expert that is given a slot is copied into it from now on, behind all that was launched so far; it
        is asked for by whoever needs it next.

        Args:
            read_in_place: records that the computation has read over the bus.
        """
        bank, size = self.banks[layer], self.store.layers[layer].layout.record_bytes
        with self._lock:
            self._unfinished = True  # as in `serve_groups`
            decision = self._decide(layer, call)
            copied = [load for load in decision.loads if load.admit]
            for load in copied:
                slot = bank.place(load.expert, load.victim)
                bank.pending[load.expert] = self.reader.read(layer, load.expert, bank.record(slot))
            # as it was, not as the policy has it: in place, and once more for those that stay
            self.statistics.decode_bytes += size * (read_in_place + len(copied) - len(decision.loads))
            self._unfinished = False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside of it no other thread is served."""
        with self._lock:
            if self._unfinished:
                self.reset()
            yield

    def slot_views(self, layer: int, slot: int) -> Views:
        """The expert that stands in a slot; what it gives holds until the next call."""
        return self._unpacked(layer, self.banks[layer].slot_views(slot))

    def _decide(self, layer: int, call: Call, training: bool = False) -> Decision:
        decision = self.policy.request(layer, call)
        self.statistics.count(call, decision, self.store.layers[layer].layout.record_bytes, training)
        if self.watcher is not None:
            self.watcher(layer, decision)
        return decision

    def close(self) -> None:
        self.reset()
        self.reader.close()


def _stored_tile(layer: StoredLayer) -> int:
    return layer.packing.tile if layer.packing is not None else 0
