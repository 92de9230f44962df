"""Longer trainings of larger models, with ablations: learning rates searched, not gridded."""
