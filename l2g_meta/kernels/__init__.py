"""Passes over feature maps that batch normalisation is made of, one file per way to run them."""
