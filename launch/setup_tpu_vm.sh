#!/usr/bin/env bash
# Installs what was copied beside this script (install.sh, the wheel, constraints.txt, configs/) for an ordinary user `a3`.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
id a3 >/dev/null 2>&1 || sudo useradd --system --home-dir /opt/a3 --shell /usr/sbin/nologin a3
sudo apt-get update -qq
sudo apt-get install -y -qq python3.11 python3.11-venv
sudo bash "$here/install.sh" python3.11 /opt/a3
sudo cp -r "$here/configs" /opt/a3/
sudo chown -R a3: /opt/a3
