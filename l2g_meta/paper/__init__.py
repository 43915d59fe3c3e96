"""``l2g reproduce``: the tables of the paper, ours beside theirs."""
