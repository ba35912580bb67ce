"""One loop for everything that trains; it reads like the loop it is."""
