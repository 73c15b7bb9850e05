"""CALVIN's download."""
