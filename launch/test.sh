#!/usr/bin/env bash
# All tests and all checks of style and types, in an environment of their own making.
#
#   bash launch/test.sh                      needs Python 3.11 or newer
#   PYTHON=python3.12 bash launch/test.sh    on another Python, beside the first
#   bash launch/test.sh --quick              one member of each kind, in minutes
#   bash launch/test.sh tests/core -k clock  arguments go to pytest
set -euo pipefail
CDPATH='' cd -- "${0%"${0##*/}"}." # the folder of this script, however it was called
# shellcheck source=launch/environment.sh
source ./environment.sh
environment test
"$python" -m ruff check .
"$python" -m ruff format --check .
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$python" -m pyright --pythonpath "$python"
# A file to a worker: what its tests share is compiled once.
exec "$python" -m pytest -n 2 --dist loadfile --durations=25 "$@"
