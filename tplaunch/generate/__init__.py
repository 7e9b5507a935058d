"""Text from a checkpoint, on TP x PP ranks, with a key/value cache."""
