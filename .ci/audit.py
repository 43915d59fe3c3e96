"""Known vulnerabilities of the installed packages, or one line that says why there is no answer.

The library pins no version of the packages it needs, so an advisory does not fail the build: it is printed, and whoever
installs can upgrade. A lack of advisories is not the same as none: where the index serves none, that is said.
"""

from __future__ import annotations

import json
import subprocess
import sys

SECONDS = 25


def main() -> None:
    """Prints advisories, or that there are none, or why that is not known."""
    command = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off", "--timeout=5"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)  # noqa: S603  # a fixed command
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        print(f"audit skipped: no answer within {SECONDS} s")
        return
    except (ValueError, KeyError):
        reason = done.stderr.strip().splitlines() or ["pip-audit gave no result"]
        print(f"audit skipped: {reason[-1][:200]}")
        return
    known = [package for package in packages if "skip_reason" not in package]
    if not known:
        print(f"audit skipped: the package index serves no advisories for any of {len(packages)} packages")
        return
    found = [(package, advisory) for package in known for advisory in package["vulns"]]
    for package, advisory in found:
        fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
        print(f"advisory: {package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}")
    unknown = len(packages) - len(known)
    print(f"audit: {len(found)} advisories for {len(known)} packages, {unknown} packages not known to the index")


if __name__ == "__main__":
    main()
