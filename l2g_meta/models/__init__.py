"""Metric-based models: encoders, heads, and how they are evaluated."""
