"""The shard format (README.md), its writer and its readers; shared by both stages."""
