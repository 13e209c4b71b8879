"""The contract between the stages: the shard format (README.md), its writer and its readers."""
