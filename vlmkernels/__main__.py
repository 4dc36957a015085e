"""``python -m vlmkernels`` runs the command ``vlmkernels``."""

import sys

from vlmkernels.cli import main

sys.exit(main())
