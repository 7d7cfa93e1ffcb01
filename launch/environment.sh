# shellcheck shell=bash
# The Python environment of the scripts in this folder. Source it from there; it is not
# run. Needs bash and Python, and no other program.
#
# PYTHON names the interpreter (default: python3, at least 3.11). The environment is
# .venv in the repository; it belongs to the Python version that made it. Another
# version, say PYTHON=python3.12, gets .venv-3.12 beside it, and neither disturbs the
# other. pip runs again only when requirements.txt or setup.py have changed.
#
# Sets:    python, the environment's interpreter (an absolute path).
# Leaves:  the working folder at the root of the repository.

cd ..

_version='import sys; print("%d.%d" % sys.version_info[:2])'

# environment [EXTRA]: makes or updates the environment, with an extra of setup.py.
environment() {
  local extra="${1:-}" chosen="${PYTHON:-python3}" version folder=.venv

  if ! version="$("$chosen" -c "$_version" 2>/dev/null)"; then
    echo "No Python at '$chosen'. Install Python 3.11 or newer, or set PYTHON to one:" \
      "PYTHON=/path/to/python3 bash launch/${0##*/}" >&2
    return 1
  fi
  if ! "$chosen" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "'$chosen' is Python $version, but 3.11 or newer is needed. Set PYTHON to one:" \
      "PYTHON=python3.12 bash launch/${0##*/}" >&2
    return 1
  fi

  local made
  made="$(_made_with .venv)"
  if [[ -n "$made" && "$made" != "$version" ]]; then
    folder=".venv-$version"
  fi
  if [[ "$(_made_with "$folder")" != "$version" ]]; then # absent or broken
    echo "Making $folder with Python $version"
    if ! "$chosen" -m venv --clear "$folder"; then
      echo "'$chosen' cannot make an environment. On Debian and Ubuntu, install the" \
        "package python3-venv (or python$version-venv) first." >&2
      return 1
    fi
    echo '*' >"$folder/.gitignore"
  fi
  python="$PWD/$folder/bin/python"

  # Without a home to write to, pip would fail on its cache, and matplotlib warn of its.
  if [[ ! -w "${HOME:-}" ]]; then
    export PIP_NO_CACHE_DIR=1 MPLCONFIGDIR="${MPLCONFIGDIR:-$PWD/$folder/matplotlib}"
  fi

  # What was installed, as a copy of what asked for it; written only once pip is done.
  local wanted stamp="$folder/installed${extra:+-$extra}"
  wanted="$(<requirements.txt)$(<setup.py)"
  if [[ "$(_read "$stamp")" != "$wanted" ]]; then
    echo "Installing hope_jax${extra:+[$extra]} into $folder (minutes, the first time)"
    "$python" -m pip install --quiet --quiet --disable-pip-version-check \
      --editable ".${extra:+[$extra]}"
    echo "$wanted" >"$folder/installed" # an extra holds the base
    echo "$wanted" >"$stamp"
  fi
}

# The version of Python in an environment; nothing when that does not work, or was never
# finished, which shows in a missing pip.
_made_with() {
  "$1/bin/python" -c "import pip; $_version" 2>/dev/null || true
}

_read() {
  if [[ -f "$1" ]]; then echo "$(<"$1")"; fi
}
