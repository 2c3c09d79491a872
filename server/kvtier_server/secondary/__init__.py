"""Tiers below the pool, made by the factory from `[[tiers]]`. A tier knows nothing above itself."""
