"""A command: settings, data, training, evaluation and report; and finished runs as models."""
