"""Raw text to a CORPUS directory, and batches from it. Imports nothing of models or torch."""
