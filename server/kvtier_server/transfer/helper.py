"""The process that copies for engines, one per device: `python -P -m kvtier_server.transfer.helper SETTINGS`.

Maps the pool, opens the memory that engines have exported, and copies between the two. Which slots a job may
use the daemon has looked up; here the fence is kept, before a slot is touched and after its last byte, as a
worker that copies itself keeps it. Checksums are computed over the pool's side, behind the copy.

Ends when the daemon ends. It holds a lock file of its own among the pool's owners, so that an engine can tell
when nothing of it can arrive any more, and shares the daemon's lock, so that nobody takes the pool over before.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from kvtier_ops.checksum import part_checksum
from kvtier_ops.faults import fault_point
from kvtier_ops.layout import GroupLayout, TensorLayout, part_offset, slot_offset
from kvtier_ops.locks import OwnerLock
from kvtier_ops.plan import ChunkCopy, PlanError, plan_job
from kvtier_ops.pool import MappedPool
from kvtier_ops.slot_table import SlotState, fence
from kvtier_server.transfer.wire import (
    LENGTH_BYTES,
    Done,
    Failure,
    Job,
    Message,
    Ready,
    Register,
    Registered,
    Unregister,
    pack,
    unpack,
)
