"""Training experiments: does Adaptive Memory train better? Tasks, contestants, runs and report."""
