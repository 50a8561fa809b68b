"""Shards that lie on servers: fetched, compared with their index, and kept in a folder of the local disk."""
