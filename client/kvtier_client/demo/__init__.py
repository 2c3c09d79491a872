"""The reference engine: a small real transformer with a paged KV cache that kvtier can offload.

Read it to learn how an engine is wired to kvtier: `offload.py` is the seam, `engine.py` calls it, `cache.py`
owns the blocks that are copied, `model.py` fills them, `chat.py` makes work for them. Nothing here imports a
server or a daemon.

Import the modules by name; this package imports nothing, because torch costs more than a second.
"""
