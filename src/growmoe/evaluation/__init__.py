"""How good a model is: loss per domain, and scores on local task files."""
