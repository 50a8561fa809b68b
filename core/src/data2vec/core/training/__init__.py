"""The training loop, and what it asks when: schedules, metrics, health, stops."""
