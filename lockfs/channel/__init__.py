"""The channel between /dev/fuse and pyfuse3: negotiation, relay, backing files and the data path."""
