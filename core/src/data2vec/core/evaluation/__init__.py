"""What representations are worth: frozen features, kNN, linear probes, effective rank."""
