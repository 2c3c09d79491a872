"""Copies that the daemon makes for engines: RegisterMemory and Transfer.

    service.py         calls in, answers out: who may copy what
    messages.py        what engines say, checked and translated
    device_process.py  one helper process per device, from the daemon's side
    helper.py          the helper: maps the pool, opens the engines' memory, copies
    wire.py            what the two say to each other

An engine that is killed in the middle of a copy can poison a CUDA context, and a context belongs to a
process: so each device has a process of its own, which is ended and begun again when a copy fails for good.
"""
