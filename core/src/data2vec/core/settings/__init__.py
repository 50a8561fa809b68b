"""Settings: each with its default, its range and whether a run may continue with another value."""
