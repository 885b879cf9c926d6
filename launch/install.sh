#!/usr/bin/env bash
# install.sh PYTHON DIRECTORY [EXTRAS]: the wheel beside this script, for TPUs, into a new virtual environment
# DIRECTORY, with the versions of the constraints.txt beside it. The image, TPU VMs and `make wheel-test` use it.
set -euo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
  echo "usage: install.sh PYTHON DIRECTORY [EXTRAS]" >&2
  exit 2
fi
python="$1" directory="$2" extras="${3:-}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
wheels=("$here"/a3_jax-*.whl)
if [ ${#wheels[@]} -ne 1 ] || [ ! -f "${wheels[0]}" ]; then
  echo "install.sh: expected one a3_jax-*.whl in $here, found: ${wheels[*]##*/}" >&2
  exit 2
fi
# uv is told where pip would look, and takes a third of its time.
if [ -n "${PIP_FIND_LINKS:-}" ]; then
  export UV_FIND_LINKS="${UV_FIND_LINKS:-$PIP_FIND_LINKS}"
fi
"$python" -m venv "$directory"
"$directory/bin/python" -m pip --disable-pip-version-check install --quiet --no-cache-dir \
  --constraint "$here/constraints.txt" uv
"$directory/bin/uv" pip install --quiet --compile-bytecode --python "$directory/bin/python" \
  --constraint "$here/constraints.txt" "${wheels[0]}[tpu${extras:+,$extras}]"
"$directory/bin/a3" --help >/dev/null
