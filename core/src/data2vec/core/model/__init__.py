"""From inputs to representations: Transformer, attention, encoder, and the masks of what it sees."""
