"""The operator's calls: what there is, why a key misses, and orders to evict, clear and drain."""
