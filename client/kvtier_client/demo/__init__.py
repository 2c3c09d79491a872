"""The reference engine: a small real transformer with a paged KV cache that kvtier can offload.

Read it to learn how an engine is wired to kvtier: `adapter.py` is the file to copy. It fills the seam of
`offload.py`, which `engine.py` calls; `cache.py` owns the blocks that are copied, `model.py` fills them,
`chat.py` makes work for them.

`kvtier demo` is `__main__.py`: it starts daemons (`kvtier_client.private_daemon`) and engines
(`engine_process.py`), puts them through `scenario.py` and prints `report.py`. Nothing here imports a server
or a daemon.

Import the modules by name; this package imports nothing, because torch costs more than a second.
"""
