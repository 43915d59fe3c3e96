"""``python -m l2g_meta`` is the command ``l2g``."""

import sys

from l2g_meta.cli import main

sys.exit(main())
