"""Commands, options, mounting, the control socket and the scripts."""
