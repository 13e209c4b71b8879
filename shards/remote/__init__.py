"""Remote shards: transport, local store, cache access, stream access."""
