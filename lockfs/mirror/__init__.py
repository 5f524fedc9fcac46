"""The mirror file system: names, attributes, directories, extended attributes and opens."""
