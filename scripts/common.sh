# Sourced by the other scripts, which then run in the repository root with these names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly ROOT=$PWD
readonly PYTHON=${PYTHON:-python3}

# Compiled with precompiled headers; without this ccache would never find an object again.
export CCACHE_SLOPPINESS=${CCACHE_SLOPPINESS:-pch_defines,time_macros,include_file_mtime,include_file_ctime}

say() { printf '== %s\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# Memory of this machine or container in GiB, rounded down.
memory_gib() {
  local bytes limit
  bytes=$(($(awk '/^MemTotal:/ {print $2}' /proc/meminfo) * 1024))
  for file in /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; do
    limit=$(cat "$file" 2>/dev/null || true)
    if [[ $limit =~ ^[0-9]{1,15}$ ]] && ((limit < bytes)); then bytes=$limit; fi
  done
  echo $((bytes >> 30))
}

# Compilers at once: one per processor, 3 GiB each.
jobs() {
  local by_memory=$(($(memory_gib) / 3)) processors
  processors=$(nproc)
  ((by_memory < processors)) && processors=$by_memory
  echo $((processors > 1 ? processors : 1))
}

# step NAME STAMP KEY COMMAND...: runs COMMAND unless STAMP says that it succeeded with the same KEY.
step() {
  local name=$1 stamp=$2 key=$3
  shift 3
  [[ -f $stamp && $(cat "$stamp") == "$key" ]] && return 0
  say "$name"
  rm -f "$stamp"
  "$@"
  mkdir -p "$(dirname "$stamp")"
  printf '%s\n' "$key" > "$stamp"
}

# One hash of the arguments and of standard input.
key_of() { { printf '%s\n' "$@"; cat; } | sha256sum | cut -d' ' -f1; }

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
