"""The package of the protocol; each version of it is a package of its own, `kvtier.v1` the first."""
