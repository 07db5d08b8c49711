"""How far an output is, read from anywhere that sees it."""
