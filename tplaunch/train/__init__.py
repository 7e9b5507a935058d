"""Training: microbatches through the pipeline, gradients, the optimizer, and the loop around them."""
