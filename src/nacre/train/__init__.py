"""Training: one loop, one loss, checkpoints that share their frozen shards."""
