#!/usr/bin/env bash
# Installs what kvplane's programs are built with and what is missing, from Debian's packages: as root, or with
# sudo. Where all is there already, neither is needed.
set -euo pipefail

needed=(cmake ninja-build g++ pkg-config libeigen3-dev libgtest-dev libbenchmark-dev nlohmann-json3-dev libcli11-dev
    libzstd-dev "$@")
missing=()
for package in "${needed[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

echo "installing: ${missing[*]}" >&2
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "not root and no sudo: install ${missing[*]} first" >&2; exit 1; }
    as_root=(sudo)
fi
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
