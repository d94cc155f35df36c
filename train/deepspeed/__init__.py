"""DeepSpeed: its configuration, snapshots of its state, and its universal checkpoints."""
