"""Which way the bytes of one worker go, decided once, when vLLM has its KV tensors.

Owns the decision and its words. What the daemon says later, when the memory is registered, `RemoteCopies` and
`WorkerShim` act on: jobs that it does not take are copied by the engine.

    transfer    host memory     memory of a GPU
    auto        shm             cuda_ipc; shm where it cannot be exported or the daemon refuses it, said aloud
    shm         shm             shm: through a stage on the GPU and the pinned pool, by the engine
    cuda_ipc    an error        as auto, but what cannot be exported is an error at the start
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.logger import init_logger

from kvtier_client.channel import parse_address
from kvtier_client.tls import TlsFiles
from kvtier_client.transfers import RemoteCopies
from kvtier_client.vllm.device import Device, device_of
from kvtier_client.vllm.settings import Transfer
from kvtier_client.vllm.staging import StagedTensors
from kvtier_client.vllm.tensors import BoundTensors, UnsupportedTensors
from kvtier_ops.host import BlockTensors
from kvtier_ops.ipc import HandleError

logger = init_logger("vllm.kvtier")


@dataclass(frozen=True, slots=True)
class Path:
    """`tensors` is what the engine's own copies use, `remote` has the daemon copy where it can."""

    tensors: BlockTensors
    remote: RemoteCopies | None = None
    problem: str = ""
    """Why the daemon cannot copy, where it should have."""


def choose_path(
    transfer: Transfer, bound: BoundTensors, address: str, tls: TlsFiles | None, device: Device | None
) -> Path:
    """Decide; `device` None = where torch says the tensors are. Raises UnsupportedTensors."""
    try:
        device = device or device_of(bound.tensors)
    except HandleError as error:
        raise UnsupportedTensors(str(error)) from error
    if device is None:
        if transfer == "cuda_ipc":
            raise UnsupportedTensors(
                'transfer: "cuda_ipc" needs KV tensors in the memory of a GPU, and they are in host memory; '
                'use "auto" or "shm"'
            )
        return Path(bound.on_host())
    tensors = StagedTensors(bound.groups, device)
    if transfer == "shm":
        return Path(tensors)
    try:
        remote = RemoteCopies(parse_address(address, tls), bound.export(device), device.compute_event(), tls)
    except HandleError as error:
        if transfer == "cuda_ipc":
            raise UnsupportedTensors(f'transfer: "cuda_ipc" is not possible: {error}') from error
        logger.warning(
            "kvtier: the daemon cannot copy this worker's KV cache, so the engine copies through shared "
            "memory itself, more slowly: %s",
            error,
        )
        return Path(tensors, problem=str(error))
    except Exception as error:
        if transfer == "cuda_ipc":
            raise UnsupportedTensors(f'transfer: "cuda_ipc" is not possible: {error}') from error
        # Of torch or a driver: it must not keep the engine from starting.
        logger.warning(
            "kvtier: this worker's KV cache could not be exported, so the engine copies through shared "
            "memory itself, more slowly. This is a bug: please report it",
            exc_info=error,
        )
        return Path(tensors, problem=f"{type(error).__name__}: {error}")
    return Path(tensors, remote)
