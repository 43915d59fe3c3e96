"""Convolution and norms as pure functions with an exact, fast double backward."""
