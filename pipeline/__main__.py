"""`python -m pipeline` is `lathe`."""

from pipeline.cli import main

main()
