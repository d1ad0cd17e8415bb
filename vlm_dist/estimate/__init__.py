"""Memory and time of a run, from the shapes of its model, before there is a GPU."""
