"""OpenVLA and OpenVLA-OFT: names and files."""
