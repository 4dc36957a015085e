"""``python -m vlmkernels.cli`` runs ``vlmkernels``."""

import sys

from vlmkernels.cli import main

sys.exit(main())
