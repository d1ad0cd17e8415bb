"""Indexes: where every sample lies, and what is known of it without decoding it."""
