"""The benchmark at true size on a GPU: random weights, real shapes, ours beside TRL and the Hugging Face Trainer."""
