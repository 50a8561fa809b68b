"""From a set of shards to batches, in an order that is a function of one integer."""
