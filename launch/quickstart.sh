#!/usr/bin/env bash
# From nothing to a trained Hope, its Transformer++ twin, and one table of both.
#
#   bash launch/quickstart.sh                      needs Python 3.11 or newer
#   PYTHON=python3.12 bash launch/quickstart.sh    with another interpreter
#
# Makes an environment (see environment.sh), then runs launch/quickstart.py, which takes
# any arguments given here. Everything it writes is under runs/quickstart; a second
# start goes on from what is there.
set -euo pipefail
CDPATH='' cd -- "${0%"${0##*/}"}." # the folder of this script, however it was called
# shellcheck source=launch/environment.sh
source ./environment.sh
environment
exec "$python" -m launch.quickstart "$@"
