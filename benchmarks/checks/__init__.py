"""What must never break: runs, checkpoints, the package among its neighbours."""
