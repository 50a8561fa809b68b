"""Judgement of representations: frozen features, kNN, linear probes, effective rank."""
