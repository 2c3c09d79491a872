"""A double of Mooncake's client, as far as the helper uses it."""
