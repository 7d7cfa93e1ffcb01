#!/usr/bin/env bash
# All tests and all style checks, in an environment of their own making.
#
#   bash launch/test.sh                      needs Python 3.11 or newer
#   PYTHON=python3.12 bash launch/test.sh    on another Python, beside the first
#   bash launch/test.sh tests/core -k clock  arguments go to pytest
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment test
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest -n 2 --durations=10 "$@"
