"""What stands around Lightning's loop: checkpoints, metrics, progress."""
