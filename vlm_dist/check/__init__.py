"""What can be known of a run before it trains: every stage by itself, every problem at once."""
