"""A training run: its configuration, the training loop, its folder, and what it prints."""
