"""Sets of WebDataset shards: written, found, indexed, checked, fetched and read at random."""
