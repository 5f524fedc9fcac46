"""lockfs: a mirror of a virtual-machine image store in which opening an image for writing is exclusive."""

__version__ = "0.1.0"
