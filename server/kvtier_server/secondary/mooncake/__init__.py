"""The mooncake tier: chunks in the memory of many nodes, kept by Mooncake's store."""
