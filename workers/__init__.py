"""The worker side: from the queue to the model, and from the model to the token log."""
