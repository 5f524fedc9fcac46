"""The words of `-o`: how a list is split, and what mount(8)'s own words mean to lockfs.

Format: mount(8), "FILESYSTEM-INDEPENDENT MOUNT OPTIONS", and fstab(5); flags are MS_* of mount(2).
"""

from __future__ import annotations

from collections.abc import Iterator

from lockfs.errors import UsageError

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

OPTIONS_CHARS_MAX = 65536
_SHOWN_CHARS_MAX = 60

# A subject can be given once; two words of one subject with different flags contradict each other.
FLAG_WORDS: dict[str, tuple[str, int]] = {
    "ro": ("writing", MS_RDONLY),
    "rw": ("writing", 0),
    "nosuid": ("suid", MS_NOSUID),
    "suid": ("suid", 0),
    "nodev": ("dev", MS_NODEV),
    "dev": ("dev", 0),
    "noexec": ("exec", MS_NOEXEC),
    "exec": ("exec", 0),
    "sync": ("sync", MS_SYNCHRONOUS),
    "async": ("sync", 0),
    "dirsync": ("dirsync", MS_DIRSYNC),
    "noatime": ("atime", MS_NOATIME),
    "atime": ("atime", 0),
    "nodiratime": ("diratime", MS_NODIRATIME),
    "diratime": ("diratime", 0),
    "relatime": ("relatime", MS_RELATIME),
    "norelatime": ("relatime", 0),
    "strictatime": ("strictatime", MS_STRICTATIME),
    "nostrictatime": ("strictatime", 0),
    "lazytime": ("lazytime", MS_LAZYTIME),
    "nolazytime": ("lazytime", 0),
    "nosymfollow": ("symfollow", MS_NOSYMFOLLOW),
    "symfollow": ("symfollow", 0),
}

# Words for mount(8), systemd and people. `user` and the like imply flags, which mount(8) adds itself.
_IGNORED = frozenset(
    (
        *("defaults", "auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner", "group"),
        *("nogroup", "_netdev", "nofail", "default_permissions", "nomand", "comment", "uhelper", "silent"),
        "loud",
    )
)
_IGNORED_WITH_VALUE = frozenset({"user", "comment", "uhelper"})

REFUSED: dict[str, str] = {
    "remount": "lockfs cannot change a mount that runs: umount it and mount it again with the new options.",
    "auto_unmount": "auto_unmount would uncover the unguarded directory if lockfs died: leave it out.",
}


def shown(text: str) -> str:
    """`text` for a sentence: quoted, escaped, and cut if it is long."""
    return repr(text if len(text) <= _SHOWN_CHARS_MAX else text[: _SHOWN_CHARS_MAX - 3] + "...")


def split(text: str) -> Iterator[tuple[str, str | None]]:
    r"""Name and value (None: no `=`) of each word; `\,` is a comma and `\\` a backslash in a value.

    Raises:
        UsageError: the list is longer than OPTIONS_CHARS_MAX characters.
    """
    if len(text) > OPTIONS_CHARS_MAX:
        raise UsageError(f"The list of options is longer than {OPTIONS_CHARS_MAX} characters.")
    word: list[str] = []
    characters = iter(text + ",")
    for character in characters:
        if character == "\\":
            following = next(characters)
            if following not in ",\\":
                word.append("\\")
            word.append(following)
        elif character == ",":
            name, equals, value = "".join(word).partition("=")
            word.clear()
            if name or equals:
                yield name, value if equals else None
        else:
            word.append(character)
    if word:
        raise UsageError(f"The list of options ends in a backslash: {shown(text)}.")


def is_ignored(name: str, value: str | None) -> bool:
    """Whether the word is meant for mount(8), systemd or a person, and nothing to lockfs."""
    if name.startswith(("x-", "X-")):
        return True
    return name in _IGNORED and (value is None or name in _IGNORED_WITH_VALUE)
