"""``python -m l2g_meta`` is the command ``l2g``; the package has taken the current folder from the path by now."""

import sys

from l2g_meta.cli.main import main

sys.exit(main())
