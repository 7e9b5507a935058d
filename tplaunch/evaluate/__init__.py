"""What a model gets right: the loss of its tokens on texts, and answers among choices, on TP x PP x DP ranks."""
