"""The device that holds vLLM's KV tensors, as far as copies need it: exports, events, side streams, pinning.

Owns every call of torch.cuda in this room. What is copied, and in which order, is decided elsewhere, above
this border; tests put shared memory of the CPU behind it.

NOT RUN ON A GPU yet: `CudaDevice`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

from kvtier_ops.cuda_export import ExportedEvent, export_cuda
from kvtier_ops.ipc import HandleError, MemoryHandle
from kvtier_ops.pinning import Registrar, cuda_registrar
from kvtier_ops.timeline import ComputeEvent


class Lane(ABC):
    """One copy thread's own stream: its copies run beside the engine's compute. That thread only."""

    @abstractmethod
    def active(self) -> contextlib.AbstractContextManager[object]:
        """Have what torch does inside go to this stream."""

    @abstractmethod
    def follow(self, mark: object) -> None:
        """Begin nothing more before what `Device.mark` noted is done."""

    @abstractmethod
    def settle(self) -> None:
        """Wait, without the GIL, until everything that the stream was given is done. Raises RuntimeError."""


class Device(ABC):
    """One device. Raises HandleError where it cannot be shared with another process."""

    torch_device: torch.device

    @abstractmethod
    def export(self, tensor: torch.Tensor) -> MemoryHandle:
        """Name a tensor of shape (num_blocks, page_bytes), int8, whose rows may lie apart."""

    @abstractmethod
    def compute_event(self) -> ComputeEvent:
        """Make what the daemon's process waits for: it notes what the calling thread's stream was given."""

    @abstractmethod
    def mark(self) -> object:
        """Note what the calling thread's stream was given so far, for lanes of this process."""

    @abstractmethod
    def lane(self) -> Lane:
        """Make a stream beside the others."""

    @abstractmethod
    def registrar(self) -> Registrar:
        """Return what makes host memory known to the device. Raises ImportError, HandleError."""


class CudaDevice(Device):
    """A GPU, through torch and cuda-bindings. NOT RUN ON A GPU yet."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    def export(self, tensor: torch.Tensor) -> MemoryHandle:
        num_blocks, page_bytes = tensor.shape
        stride = tensor.stride(0)
        with torch.cuda.device(self.torch_device):
            # The last row needs no gap behind it, and a view of the end of an allocation has none.
            size = (num_blocks - 1) * stride + page_bytes
            return export_cuda(tensor.data_ptr(), size, stride, num_blocks)

    def compute_event(self) -> ComputeEvent:
        with torch.cuda.device(self.torch_device):
            return ExportedEvent(lambda: torch.cuda.current_stream(self.torch_device).cuda_stream)

    def mark(self) -> object:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def lane(self) -> Lane:
        return _CudaLane(self.torch_device)

    def registrar(self) -> Registrar:
        return cuda_registrar(self.torch_device.index)


class _CudaLane(Lane):
    def __init__(self, torch_device: torch.device) -> None:
        self._stream = torch.cuda.Stream(torch_device)  # type: ignore[no-untyped-call]
        # Sleeps instead of spinning: the engine needs the core.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def follow(self, mark: object) -> None:
        assert isinstance(mark, torch.cuda.Event), f"a mark of {type(mark).__name__}"
        self._stream.wait_event(mark)

    def settle(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()


def device_of(tensors: list[torch.Tensor]) -> Device | None:
    """Return the device of KV tensors, None for host memory. Raises HandleError for what is not supported."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise HandleError(f"KV tensors: they are on {len(devices)} devices; a worker has one")
    (device,) = devices
    if device.type == "cpu":
        return None
    is_amd = getattr(torch.version, "hip", None)  # whose GPUs call themselves cuda
    if device.type != "cuda" or is_amd:
        raise HandleError(
            f"KV tensors: they are on {device}: kvtier copies host memory and that of NVIDIA GPUs; run vLLM "
            "without kvtier's --kv-transfer-config on this device"
        )
    return CudaDevice(device)
