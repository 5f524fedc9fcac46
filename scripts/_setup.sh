# Shared by scripts/lockfs, scripts/test and others, which source it: installs what is missing on Debian and
# Ubuntu, and makes the Python environment. Says what it installs, on standard error. Sets $root and $venv.
# shellcheck shell=bash

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd -P)

# Everything that running lockfs needs: Python and, because pyfuse3 is compiled here, a compiler and headers.
# shellcheck disable=SC2034  # used by those who source this
runtime_packages=(python3 python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev fuse3)

say() { printf '%s: %s\n' "${program:-${0##*/}}" "$*" >&2; }

# The environment lies in the checkout, or for a checkout that cannot be written in /var/lib/lockfs.
choose_venv() {
    if [[ -w $root || -d $root/.venv ]]; then
        venv=$root/.venv
    else
        venv=/var/lib/lockfs/venv
    fi
}
choose_venv

missing_packages() {
    local name
    for name in "$@"; do
        [[ $(dpkg-query -W -f='${db:Status-Abbrev}' "$name" 2>/dev/null) == ?i* ]] || printf '%s\n' "$name"
    done
}

# install_packages NAME...: those of the Debian packages that are not there yet.
install_packages() {
    local missing
    if ! command -v dpkg-query >/dev/null; then
        say "this is not Debian or Ubuntu; please see to it that these are installed: $*"
        return 0
    fi
    mapfile -t missing < <(missing_packages "$@")
    ((${#missing[@]})) || return 0
    if ((EUID)); then
        say "these packages are missing: ${missing[*]}; run this once with sudo, or install them with apt-get."
        return 1
    fi
    say "installing these packages: ${missing[*]}"
    local apt=(apt-get -y -q -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300)
    export DEBIAN_FRONTEND=noninteractive
    if ! "${apt[@]}" install --no-install-recommends "${missing[@]}" </dev/null >&2; then
        say "once more with fresh package lists"
        "${apt[@]}" update </dev/null >&2 || say "the package lists could not be refreshed"
        if ! "${apt[@]}" install --no-install-recommends "${missing[@]}" </dev/null >&2; then
            say "apt-get could not install ${missing[*]}; its reason stands above."
            return 1
        fi
    fi
}

# What an environment is made of, so that a change is noticed: the checkout, the interpreter, the lock files.
environment_key() {
    printf '%s\n' "$root"
    readlink -f /usr/bin/python3 "$venv/bin/python3" || true # neither need be there yet
    cat "$@"
}

# The system's Python, whose headers the packages bring; a newer one beside it where that is too old for lockfs.
choose_python() {
    python=/usr/bin/python3
    is_new_enough && return 0
    python=/usr/bin/python3.11
    is_new_enough || install_packages python3.11 python3.11-venv python3.11-dev || true
    is_new_enough && return 0
    say "lockfs needs Python 3.11 or later, and $(/usr/bin/python3 --version) is what this system has."
    return 1
}
is_new_enough() { "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# make_environment STAMP LOCKFILE...: a virtual environment with just what the lock files name.
make_environment() {
    local stamp=$venv/.$1 key file
    shift
    local files=("${@/#/$root/}")
    key=$(environment_key "${files[@]}" | sha256sum)
    [[ -r $stamp && $(<"$stamp") == "$key" ]] && return 0
    if ! mkdir -p "${venv%/*}" 2>/dev/null || [[ ! -w ${venv%/*} ]] || ! exec 9<"${venv%/*}"; then
        say "${venv%/*} cannot be written, where the Python environment belongs; run this once with sudo."
        return 1
    fi
    if ! flock -w 600 9; then
        say "another set-up has been running for ten minutes; end it and try again."
        return 1
    fi
    key=$(environment_key "${files[@]}" | sha256sum)
    if [[ -r $stamp && $(<"$stamp") == "$key" ]]; then # the one we waited for has done it
        exec 9>&-
        return 0
    fi
    say "making the Python environment $venv"
    if ! "$venv/bin/python3" -c 'import pip' 2>/dev/null; then
        rm -rf "$venv"
        choose_python && "$python" -m venv "$venv" || return 1
    fi
    for file in "${files[@]}"; do
        say "installing what ${file##*/} names"
        if ! "$venv/bin/python3" -m pip install -q --disable-pip-version-check -r "$file" </dev/null >&2; then
            say "pip could not install ${file##*/}; its reason stands above."
            return 1
        fi
    done
    "$venv/bin/python3" - "$root" <<'PYTHON' || return 1
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "lockfs.pth").write_text(sys.argv[1] + "\n", encoding="utf-8")
PYTHON
    environment_key "${files[@]}" | sha256sum >"$stamp"
    exec 9>&-
}

# link_command NAME DIRECTORY: a link to scripts/NAME, unless something else has the name.
link_command() {
    local target=$root/scripts/$1 link=$2/$1
    [[ $link -ef $target ]] && return 0
    if [[ -L $link && ! -e $link ]]; then
        say "replacing the dead link $link"
    elif [[ -e $link ]]; then
        say "$link is something else and stays as it is"
        return 0
    fi
    ln -sfn "$target" "$link" && say "$link now leads to $target"
}
