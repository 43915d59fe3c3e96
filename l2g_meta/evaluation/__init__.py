"""Accuracy on episodes with intervals, paired differences, and the processes that share the work."""
