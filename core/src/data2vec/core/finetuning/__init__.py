"""The tasks of fine-tuning: a pretrained encoder with a head, trained on labels."""
