"""``l2g bench``: what an exact meta-step costs, ours and others', in one process."""
