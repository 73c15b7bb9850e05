"""Command-line programs; `vla NAME` and `python launch/NAME.py` are the same."""
