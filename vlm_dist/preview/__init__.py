"""Samples as the model will see them: pictures, rendered prompts, labels, lengths; a page and a terminal form."""
