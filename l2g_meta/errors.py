"""Errors that say what was needed, what came, and what to do."""


class L2GError(ValueError):
    """Base of the library's own errors: wrong input, with need, got and remedy in the message."""


class DataError(L2GError):
    """A data set is missing, damaged, or too small for the tasks asked of it."""


class FitError(L2GError):
    """Parts do not fit: an encoder's features and a head, or a model's scores and a task."""


class CheckpointError(L2GError):
    """A run directory or checkpoint cannot be used."""


class NotFiniteError(L2GError):
    """A loss, a gradient or a weight is NaN or infinite."""
