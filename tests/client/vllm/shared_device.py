"""A device whose memory is shared memory of this process, behind the border that a GPU has in an engine.

The daemon's process opens it by name, and waits for a timeline where it would wait for an event. What is
written and read is real; what a GPU's driver does is not here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from tests.daemon_process import wait_until

from kvtier_client.vllm.device import Device, Lane
from kvtier_ops.ipc import HandleError, MemoryHandle, SharedAllocation, export_shared
from kvtier_ops.pinning import Registrar
from kvtier_ops.timeline import SharedTimeline


class Compute(SharedTimeline):
    """The engine's compute: done at once, or when the test says."""

    def __init__(self) -> None:
        super().__init__()
        self._held = False

    def record(self) -> int:
        value = super().record()
        if not self._held:
            self.reach(value)
        return value

    def hold(self) -> None:
        """From now on it is busy."""
        self._held = True

    def let_go(self) -> None:
        """It is done, with everything it was given."""
        self._held = False
        self.reach(self.recorded)

    def has_reached(self, value: int) -> bool:
        return int(self._value[0]) >= value


class SharedDevice(Device):
    """See the module. `export_problem`: why its memory cannot be exported, "" = it can."""

    torch_device = torch.device("cpu")

    def __init__(self, export_problem: str = "") -> None:
        self.export_problem = export_problem
        self.compute = Compute()
        self.memory: list[SharedAllocation] = []
        self.registered: dict[int, int] = {}
        """Host memory that it knows: address -> bytes."""
        self.settled = 0
        """How often a copy was waited for."""

    def tensor(self, num_blocks: int, page_bytes: int, gap_bytes: int = 0) -> torch.Tensor:
        """Make a tensor of shape (num_blocks, page_bytes), int8, with a gap behind each row."""
        stride = page_bytes + gap_bytes
        self.memory.append(SharedAllocation(num_blocks * stride))
        rows = torch.from_numpy(self.memory[-1].data).view(torch.int8).view(num_blocks, stride)
        return rows[:, :page_bytes]

    def export(self, tensor: torch.Tensor) -> MemoryHandle:
        if self.export_problem:
            raise HandleError(self.export_problem)
        for memory in self.memory:
            offset = tensor.data_ptr() - memory.data.ctypes.data
            if 0 <= offset < memory.data.size:
                num_blocks, page_bytes = tensor.shape
                size = (num_blocks - 1) * tensor.stride(0) + page_bytes
                return export_shared(memory, offset, size, tensor.stride(0), num_blocks)
        raise HandleError("tensor_ptr: this is not memory of the device")

    def compute_event(self) -> Compute:
        return self.compute

    def mark(self) -> int:
        return self.compute.record()

    def lane(self) -> Lane:
        return _HostLane(self)

    def registrar(self) -> Registrar:
        return Registrar(self.registered.__setitem__, self.registered.__delitem__)

    def close(self) -> None:
        """Remove the names of its memory."""
        for memory in self.memory:
            memory.close()
        self.compute.close()


class _HostLane(Lane):
    def __init__(self, device: SharedDevice) -> None:
        self._device = device

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        yield

    def follow(self, mark: object) -> None:
        assert isinstance(mark, int)
        wait_until(lambda: self._device.compute.has_reached(mark), "the compute is done")

    def settle(self) -> None:
        self._device.settled += 1
