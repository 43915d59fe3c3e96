"""All that `l2g reproduce` knows: the paper's tables and figures, and our studies."""

from __future__ import annotations

from l2g_meta.paper import published, study

COLUMNS = published.COLUMNS
ROWS = published.ROWS | study.ROWS
EXPERIMENTS = published.EXPERIMENTS | study.STUDIES


def rows_beside(experiment: str) -> tuple[str, ...]:
    """Rows that an experiment's table may show beside its own: the paper's in a table; others have their own alone.

    Example:
        >>> "proto" in rows_beside("table2"), rows_beside("figure2"), rows_beside("baselines")
        (True, (), ())
    """
    return tuple(published.ROWS) if experiment.startswith("table") else ()
