#!/usr/bin/env bash
# Pack the packages that gpu_check.sh needs beside torch and TVM, for a machine without a package index:
#
#   testing/pack_site.sh DIR [PYTHON_VERSION]          (default 3.12)
#
# fills DIR with extras.tar.xz, some 2 MiB. There:
#
#   mkdir -p extras && tar -xJf DIR/extras.tar.xz -C extras && EXTRAS=$PWD/extras testing/gpu_check.sh
#
# TVM itself (apache-tvm and apache-tvm-ffi, 61 MiB) is packed apart, and named in SITE. What runs without its compiled part
# goes without it, so that most of the packages serve any Python; psutil is for this one.
set -euo pipefail
out=${1:?usage: pack_site.sh DIR [PYTHON_VERSION]}
version=${2:-3.12}
packages=(pytest pluggy iniconfig packaging pygments pytest-timeout pytest-xdist execnet hypothesis sortedcontainers
  filelock tqdm thefuzz rapidfuzz cloudpickle psutil typing-extensions)
mkdir -p "$out"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux2010; do
  platforms+=(--platform "${name}_x86_64")
done
python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  "${platforms[@]}" -d "$tmp/wheels" "${packages[@]}"
mkdir "$tmp/site"
for wheel in "$tmp"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$tmp/site"; done
cd "$tmp/site"
find . -name '*.so' ! -path './psutil/*' -delete
find . \( -name __pycache__ -o -name tests -o -name docs -o -name '*.pyi' \) -prune -exec rm -rf {} +
tar -cf - . | xz -9e -T1 > "$tmp/extras.tar.xz"
cd - > /dev/null
mv "$tmp/extras.tar.xz" "$out/extras.tar.xz"
ls -l "$out/extras.tar.xz"
