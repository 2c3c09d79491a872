"""The kvtier daemon: one per GPU node, it keeps KV-cache chunks that engines would otherwise recompute."""

__version__ = "0.1.0"
