"""Where each expert's record is for a kernel that reads it in place: in a slot, or in pinned host memory.

A decode step on a GPU that is one CUDA graph cannot stop to ask the host which experts are where. It looks
their addresses up in a table in device memory. The host changes the table between steps, in the order of the
stream, so that a record is never overwritten while a step that may read it runs:

- `ExpertPager.follow` gives a slot to another expert after the step that may still read it was launched; the
  copy waits for that step (`DeviceReader.read`).
- The next step's table names neither the old expert nor the new one by that slot: the old one has lost it,
  the new one is on its way. Both are read from the host.
- Once the copy's event has been seen to be over, the new expert is named by its slot.
"""

from __future__ import annotations

import torch

from melinoe.paging.device_reader import DeviceReader
from melinoe.paging.pager import ExpertPager
from melinoe.routing.calls import Call


class AddressTable:
    """The table of one pager, made for a reader that `DeviceReader.in_place` is true of.

    addresses: [L, E] int64 on the device.
    """

    def __init__(self, pager: ExpertPager) -> None:
        reader = pager.reader
        assert isinstance(reader, DeviceReader)
        self._pager, self._banks, self._reader = pager, pager.banks, reader
        self._hosts = [reader.addresses(layer) for layer in range(len(pager.banks))]
        self._slots = [bank.buffer.tensor.data_ptr() for bank in pager.banks]
        shape = len(self._hosts), max(map(len, self._hosts))
        pinned = reader.device.type == "cuda"
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=pinned)
        self.addresses = torch.zeros(shape, dtype=torch.int64, device=reader.device)
        self._seen = [-1] * len(self._hosts)  # of each bank: its changes that are in the table
        self._followed = [-1] * len(self._hosts)  # its changes when it was last left by `follow`
        self._here: list[set[int]] = [set() for _ in self._hosts]
        self._arriving: list[set[int]] = [set() for _ in self._hosts]  # when the table last looked

    def refresh(self) -> None:
        """Makes the table what the next step may rely on; in the order of the caller's stream.

        The step before must have ended: the copy of the table to the device reads what is written here.
        """
        banks = zip(self._banks, self._seen, self._followed, strict=True)
        others = any(bank.changes not in (seen, followed) for bank, seen, followed in banks)
        if others or any(map(self._taken, range(len(self._hosts)))):
            # other passes have filled slots since, or used what was arriving, perhaps on another stream, and
            # waited for it there
            self._reader.wait_for_copies()
        changed = [layer for layer in range(len(self._hosts)) if self._fill(layer)]
        if changed:
            self.addresses.copy_(self._host, non_blocking=True)

    def follow(self, layer: int, call: Call, read_in_place: int) -> None:
        """`ExpertPager.follow`; what it does to slots the table knows how to wait for."""
        bank = self._banks[layer]
        own = bank.changes in (self._seen[layer], self._followed[layer])
        taken = self._taken(layer)
        self._pager.follow(layer, call, read_in_place)
        self._arriving[layer] = bank.pending.keys() | taken
        if own:
            self._followed[layer] = bank.changes

    def _taken(self, layer: int) -> set[int]:
        """Experts that were arriving, whom somebody else has waited for."""
        return self._arriving[layer] - self._banks[layer].pending.keys()

    def _fill(self, layer: int) -> bool:
        bank, changed = self._banks[layer], False
        for expert in [one for one, future in bank.pending.items() if self._arrived(future)]:
            del bank.pending[expert]
            changed = True
        known = self._seen[layer] == bank.changes
        if not changed and known and len(self._here[layer]) + len(bank.pending) == len(bank.slot_of):
            return False
        self._seen[layer], self._arriving[layer] = bank.changes, set(bank.pending)
        row, size = list(self._hosts[layer]), bank.buffer.record_bytes
        self._here[layer] = bank.slot_of.keys() - bank.pending.keys()
        for expert in self._here[layer]:
            row[expert] = self._slots[layer] + bank.slot_of[expert] * size
        self._host[layer, : len(row)] = torch.tensor(row)
        return True

    def _arrived(self, future: object) -> bool:
        return self._reader.arrival(future.result())  # type: ignore[attr-defined]

    def read_in_place(self, layer: int, experts: list[int]) -> int:
        """How many of these the last table names by host memory."""
        return len(set(experts) - self._here[layer])
