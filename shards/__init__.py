"""The contract between the two stages: WebDataset tars that are strided arrays at the same time.

`schema` says what a set of shards is, `writer` makes one, `reader` opens one, `verify` checks one,
and README.md is the written format.
"""
