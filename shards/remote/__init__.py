"""Reading shards that lie elsewhere: transport, local store, cache access, stream access."""
