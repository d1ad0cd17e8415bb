"""A run file of one's own: what is asked, what the data answer, and what is written."""
