"""Putting a mount together: checks of the source, the kernel mount, the server and its control socket."""
