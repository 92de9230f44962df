"""State and parameters in few bits: what a step takes, and whether they train as float32 does."""
