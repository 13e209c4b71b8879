"""The contract between the two stages: WebDataset tars that are strided arrays at the same time.

`schema` says what a set of shards is and `writer` makes one; `reader` maps one, `order` and
`loader` make its batches, and `access` opens one wherever it lies; `buckets` holds sets of several
shapes together, which `bucket_order` visits in turn; `verify` checks one, `inspect` shows what is
in it; and README.md is the written format.
"""
