"""Averaged weights beside those that validation chose: accuracy, and its spread over seeds, of cells that keep both.

python docs/averaged_weights.py DIR             # the --out of `l2g reproduce spread`; --experiment for another
"""

import argparse
import json
from collections import defaultdict

import numpy as np
from training_curves import arguments, begun, table, titled

from l2g_meta.files.sealed import opened
from l2g_meta.paper.study import ROWS
from l2g_meta.paper.tables import difference


def tests(results, kind):
    """Results as if those of ``kind`` were their only tests."""
    return [result | {"tests": result[kind]} for result in results if kind in result]


def cells_of(results, base):
    """Mean, standard deviation over seeds, and the difference to a base."""
    means = [result["tests"]["running"]["accuracy_mean"] for result in results]
    gain = difference(results, base, "running")
    over = "" if not gain or gain["ci95_runs"] is None else f" ± {gain['ci95_runs']:.2f}"
    spread = f"{np.std(means, ddof=1):.2f}" if len(means) > 1 else ""
    return [f"{np.mean(means):.2f}", spread, f"{gain['mean']:+.2f}{over} (n = {len(gain['runs'])})" if gain else ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = arguments(parser, "spread")
    found = defaultdict(lambda: defaultdict(list))
    for cell in begun(args):
        if cell.done:
            result = opened(json.loads((cell.folder / "test.json").read_text(encoding="utf-8")))
            found[cell.data, cell.column][cell.row].append(result)
    for part, rows in found.items():
        lines = []
        for row, results in rows.items():
            base = next((other for other in ROWS[row].against if other in rows), None)
            kinds = ((tests(results, kind), tests(rows.get(base, ()), kind)) for kind in ("tests", "average"))
            cells = [cell for ours, theirs in kinds if ours for cell in cells_of(ours, theirs)]
            lines.append([f"`{row}`", str(len(results)), f"`{base}`" if base else "", *cells])
        print(f"### {titled(part)}: s is the standard deviation over seeds, ± is 95 % over seeds\n")
        table(["row", "seeds", "base", "best, %", "s", "row − base", "average, %", "s", "row − base"], lines)


if __name__ == "__main__":
    main()
