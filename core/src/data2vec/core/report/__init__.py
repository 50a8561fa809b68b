"""The page that a run ends in: what it shows, its figures and pictures."""
