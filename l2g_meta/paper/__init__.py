"""``l2g reproduce``: the tables and figures of the paper, ours beside theirs."""
