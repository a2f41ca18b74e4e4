#!/usr/bin/env bash
# The CPU kernels on aarch64 (hosts of Grace Hopper, Graviton) without such a machine: cross-compiled, and their tests in an
# emulator, a quarter of an hour. For Debian 12 on x86-64, as root; ARGS are pytest's instead of those below:
#
#     bash tests/aarch64.sh FOLDER [ARGS]
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
# Not what Triton computes or what starts a process, which the emulator is not asked to run; nor torch's own products.
[ $# -gt 0 ] || set -- tests/ops --ignore tests/ops/test_attention_plan.py --ignore tests/ops/test_cpu_memory.py \
  -k "not triton and not torch and not interpreter"
cd "$folder"

# A Python for aarch64, with torch for it.
if [ ! -d site/torch ]; then
  dpkg --add-architecture arm64
  apt-get update -q
  apt-get install -q -y qemu-user g++-aarch64-linux-gnu
  python_packages="python3.11-minimal libpython3.11-minimal libpython3.11-stdlib"
  libraries="libc6 libstdc++6 libgcc-s1 libgomp1 zlib1g libexpat1 libffi8 libssl3 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1"
  for package in $python_packages $libraries; do apt-get download -q "$package:arm64"; done
  for package in *_arm64.deb; do dpkg -x "$package" sysroot; done
  platforms=$(printf -- '--platform manylinux_%s_aarch64 ' 2_17 2_27 2_28 2_31)
  get() {
    # shellcheck disable=SC2086
    "$root/.venv/bin/pip" install -q --target site --only-binary :all: $platforms --python-version 3.11 \
      --implementation cp --abi cp311 --abi abi3 --abi none "$@"
  }
  get transformers safetensors pillow tqdm pytest hypothesis expecttest sympy networkx jinja2
  get --no-deps torch==2.10.0  # pip would add what torch needs on the machine that pip runs on
fi

# Its own copy, as the libraries of this machine are in the checkout.
rm -rf tree && mkdir tree
cp -r "$root"/{bench,csrc,ras_fast,triton_kernels,tests,pyproject.toml} tree
rm -rf tree/ras_fast/_lib tree/ras_fast/_C*.so && mkdir tree/ras_fast/_lib
export PYTHONPATH=$folder/tree:$folder/site
(cd tree && CXX=aarch64-linux-gnu-g++ "$root/.venv/bin/python" -c "
from importlib.util import module_from_spec, spec_from_file_location as find
from pathlib import Path
import sys
spec = find('build', 'ras_fast/build.py')
sys.modules['build'] = build = module_from_spec(spec)
spec.loader.exec_module(build)
build.build_cpu(Path('ras_fast/_lib').resolve(), Path('build').resolve())")

export PYTHONHOME=$folder/sysroot/usr OMP_NUM_THREADS=1
libraries=/lib/aarch64-linux-gnu:/usr/lib/aarch64-linux-gnu
cd tree
exec qemu-aarch64 -L "$folder/sysroot" -E LD_LIBRARY_PATH=$libraries "$folder/sysroot/usr/bin/python3.11" -m pytest -q \
  -p no:cacheprovider "$@"
