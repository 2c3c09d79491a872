"""Which chunk goes first: one file per eviction policy.

`base` is the interface, `loader` makes a policy from its configured name or module path.
"""
