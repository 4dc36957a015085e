"""``python -m vlmkernels.cli`` runs ``vlmkernels``, like ``python -m vlmkernels``."""

import sys

from vlmkernels.cli import main

sys.exit(main())
