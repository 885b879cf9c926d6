#!/usr/bin/env bash
# Installs the wheel, constraints.txt and configs/ that lie beside this script, for an ordinary user `a3`.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
id a3 >/dev/null 2>&1 || sudo useradd --system --home-dir /opt/a3 --shell /usr/sbin/nologin a3
sudo apt-get update -qq
sudo apt-get install -y -qq python3.11 python3.11-venv
sudo python3.11 -m venv /opt/a3
wheel="$(ls "$here"/a3_jax-*.whl)"
sudo /opt/a3/bin/pip install --quiet "${wheel}[tpu]" --constraint "$here/constraints.txt"
sudo cp -r "$here/configs" /opt/a3/
sudo chown -R a3: /opt/a3
/opt/a3/bin/a3 --help >/dev/null
