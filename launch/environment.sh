# shellcheck shell=bash
# The Python environment of the scripts in this folder. Source it; it is not run.
#
# PYTHON names the interpreter (default: python3, at least 3.11). The environment is
# .venv in the repository; it belongs to the Python version that made it. Another
# version, say PYTHON=python3.12, gets .venv-3.12 beside it, and neither disturbs the
# other. pip runs again only when requirements.txt or setup.py have changed.
#
# Sets:    python, the environment's interpreter (an absolute path).
# Leaves:  the working folder at the root of the repository.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

_version='import sys; print("%d.%d" % sys.version_info[:2])'

# environment [EXTRA]: makes or updates the environment, with an extra of setup.py.
environment() {
  local extra="${1:-}" chosen="${PYTHON:-python3}" version folder=.venv

  if ! version="$("$chosen" -c "$_version" 2>/dev/null)"; then
    echo "No Python at '$chosen'. Install Python 3.11 or newer, or set PYTHON to one:" \
      "PYTHON=/path/to/python3 bash $0" >&2
    return 1
  fi
  if ! "$chosen" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "'$chosen' is Python $version, but 3.11 or newer is needed. Set PYTHON to one:" \
      "PYTHON=python3.12 bash $0" >&2
    return 1
  fi

  if [[ -x .venv/bin/python && "$(_made_with .venv)" != "$version" ]]; then
    # A .venv that does not even start has lost its interpreter: it is made again.
    [[ -z "$(_made_with .venv)" ]] || folder=".venv-$version"
  fi
  if [[ "$(_made_with "$folder")" != "$version" ]]; then
    echo "Making $folder with Python $version"
    rm -rf "$folder"
    if ! "$chosen" -m venv "$folder"; then
      rm -rf "$folder"
      echo "'$chosen' cannot make an environment. On Debian and Ubuntu, install the" \
        "package python3-venv (or python$version-venv) first." >&2
      return 1
    fi
    echo '*' >"$folder/.gitignore"
  fi
  python="$PWD/$folder/bin/python"

  # What was installed, as a copy of what asked for it; made only once pip is done.
  local stamp="$folder/installed${extra:+-$extra}"
  if ! cat requirements.txt setup.py | cmp -s - "$stamp"; then
    echo "Installing hope_jax${extra:+[$extra]} into $folder (minutes, the first time)"
    "$python" -m pip install --quiet --quiet --disable-pip-version-check \
      --editable ".${extra:+[$extra]}"
    cat requirements.txt setup.py >"$stamp"
    cp "$stamp" "$folder/installed" 2>/dev/null || true # an extra holds the base
  fi
}

# The version of Python in an environment, as in 3.11; nothing when it does not start.
_made_with() {
  "$1/bin/python" -c "$_version" 2>/dev/null || true
}
