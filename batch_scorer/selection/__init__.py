"""From scores to data: which rows of scored outputs are kept, and pairs made of rollouts."""
