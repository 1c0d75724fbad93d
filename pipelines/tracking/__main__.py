"""`python -m pipelines.tracking`: send what a run could not send before it ended."""

from pipelines.tracking.run import main

main()
