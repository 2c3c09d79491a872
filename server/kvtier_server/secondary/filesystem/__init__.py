"""The filesystem tier: one self-describing file per chunk."""
