"""The originals' own code on what we export; see test_originals.py."""
