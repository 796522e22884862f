# Sourced by tools/demo and tools/test: makes .venv with Python 3.11-3.13 and installs this project with extras into it.
# `environment EXTRA` installs anew only when setup.py or the interpreter changed since. `compilers` adds libtpu, which
# compiles for TPUs that are not here, in a folder apart: where it is installed, JAX looks for a TPU in every process.
# `peers` adds Kyutai's client of Moshi's wire, likewise apart: what it is packed with wants torch and an older aiohttp.

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11-3.13 with venv found: install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
  return 2
}

environment() {
  local extra=$1 venv=.venv python stamp
  python=$(find_python)
  if [ -n "${PYTHON:-}" ] && [ "$("$venv/bin/python" -V 2>/dev/null)" != "$("$python" -V)" ]; then
    rm -rf "$venv"  # of another Python than the one asked for
  fi
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then  # none, or one whose making was interrupted
    echo "making the environment in $venv with $("$python" -V)"
    "$python" -m venv --clear "$venv"
  fi
  . "$venv/bin/activate"
  stamp=$(python -V; cat setup.py pyproject.toml)
  if ! [ "$stamp" == "$(cat "$venv/$extra.stamp" 2>/dev/null)" ]; then
    echo "installing jaxtml${extra:+[$extra]}"
    python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
    printf '%s\n' "$stamp" >"$venv/$extra.stamp"
  fi
}

apart() {
  local folder=.venv/$1 package=$2
  if ! [ -f "$folder/stamp" ]; then
    echo "installing $package into $folder"
    python -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "$package"
    touch "$folder/stamp"
  fi
}

compilers() {
  apart compilers "libtpu>=0.0.52"
}

peers() {
  apart peers "moshi==0.2.13"
}
