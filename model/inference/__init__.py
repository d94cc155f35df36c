"""Generation: the paged key/value cache and sampling. Evaluation, training and serving use it."""
