"""A policy in memory: observation in, action out."""
