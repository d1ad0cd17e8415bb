"""The shell of the pages that preview and report write: one file, no network, light and dark."""
