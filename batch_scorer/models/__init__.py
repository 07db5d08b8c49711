"""What is known about reward models: their directories, heads and traps."""
