"""The object tier: one self-describing object per chunk in a bucket."""
