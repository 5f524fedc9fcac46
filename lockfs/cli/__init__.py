"""The commands: lockfs, mount.lockfs and lockfsctl."""
