"""What it will cost, before it is spent. Imports no torch."""
