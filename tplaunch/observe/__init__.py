"""What a run says about itself: `metrics` writes the record, `wandb` mirrors it."""
