#!/usr/bin/env bash
# Makes a node ready for Ray: an environment with the pinned packages, caches on a local disk, and an environment file
# that every login shell reads (`bash --login` sets PATH anew). Run again on a node that is ready, it takes a second.
#
#   [PYTHON=python3.12] [VENV=~/venv] [CACHE=~/.cache] [SHARED=/mnt/shared] bash clusters/node.sh [EXTRAS [TORCH_INDEX]]
#
# SHARED: a folder that all nodes mount under one name, for what trials read; without one each node has its own copy.
# EXTRAS: of pyproject.toml, as in aws,gpu.  TORCH_INDEX: where torch comes from, as in
# https://download.pytorch.org/whl/cpu, which is 0.2 GB instead of 3 on a head that runs no trials.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} venv=${VENV:-$HOME/venv} cache=${CACHE:-$HOME/.cache} shared=${SHARED:-} extras=${1:-} torch_index=${2:-}

if [ ! -s ~/.ray/auth_token ]; then
  echo "node.sh: no ~/.ray/auth_token: before ray up, run: ray get-auth-token --generate" >&2
  exit 1
fi
chmod 600 ~/.ray/auth_token

# the stamp is written last: an installation that was cut off is done again
stamp=$(cat pyproject.toml constraints.txt - <<< "$extras $torch_index" | sha256sum)
if [ "$(cat "$venv/.installed" 2> /dev/null)" != "$stamp" ]; then
  "$python" -c 'import sys; sys.exit("node.sh: Python 3.11 or newer is needed; valid: PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
  "$python" -m venv "$venv"
  pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt)
  "${pip[@]}" ${torch_index:+--index-url "$torch_index"} torch
  "${pip[@]}" -e ".${extras:+[$extras]}"
  echo "$stamp" > "$venv/.installed"
fi

ours=${shared:-$cache}/minitron_search
mkdir -p "$cache/huggingface" "$ours"
cat > ~/.minitron_search.env << END
export PATH="$venv/bin:\$PATH"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 HF_HUB_DISABLE_TELEMETRY=1
export HF_HOME="$cache/huggingface" MINITRON_SEARCH_CACHE="$ours"
export HF_TOKEN_PATH="$HOME/.cache/huggingface/token"
END
grep -qsF .minitron_search.env ~/.bashrc || echo '. ~/.minitron_search.env' >> ~/.bashrc
