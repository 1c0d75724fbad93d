"""The `triptych` command: arguments in, exit code and results out.

May import everything, inside its commands, so that `--help` is instant; only the demo imports it.
"""
