"""Shards into batches, in five steps.

1. Locate: ``shards.locate`` finds the shards that a user names, ``shards.remote`` fetches those that lie on servers.
2. Count: ``shards.index`` reads or makes the list of their samples, ``shards.opened`` opens them as one set.
3. Order: ``stream.order`` says which sample comes at which position of an endless stream, ``stream.lengths`` which
   samples of like length go together.
4. Read: ``stream.reading`` takes samples out of tar files (``shards.tar``) and lets the modality decode them, in the
   processes of ``stream.workers``.
5. Batch: ``dataset`` puts it together, for training from any position and for evaluation from the first.
"""
