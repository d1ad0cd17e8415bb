"""An adapter on its way out: merged into its base, and verified."""
