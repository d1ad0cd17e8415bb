"""How long ranks wait for each other: our three ways to make micro-batches beside those of Hugging Face's Trainer."""
