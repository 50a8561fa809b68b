"""Shards: writing, finding, ordering and reading samples.

``shards`` writes and verifies sets of WebDataset tar files with an ``index.json``; ``tar`` reads single samples out of
them; ``source`` finds those that a user names, and ``shardset`` counts their samples; ``remote`` fetches those that lie
on servers; ``order`` says which sample comes at which position; ``pipeline`` makes batches of all that.
"""
