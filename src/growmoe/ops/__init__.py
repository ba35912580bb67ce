"""The hot operations; each has a short reference in the same file and picks its path by device."""
