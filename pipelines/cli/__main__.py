"""`python -m pipelines.cli`, as jobs on a cluster start it."""

import sys

from pipelines.cli.main import main

sys.exit(main())
