"""What a run needs before it is started: memory of a GPU by part, seconds of a step, and which ZeRO stage to take."""
