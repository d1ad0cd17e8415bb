"""From the columns of a sample to the tensors of a micro-batch."""
