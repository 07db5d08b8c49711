"""Outputs made of scored outputs: what they are made of, and how they are committed."""
