#!/usr/bin/env bash
# Sets up what the feature `cuda` is built with, on a machine that has no CUDA toolkit (and needs no GPU): nvcc 13.0 and
# the libraries from PyPI, about 1.2 GB. Prints the environment to use:
#
#     eval "$(scripts/cuda-toolkit.sh [FOLDER])"     # FOLDER: target/cuda-toolkit unless given
#     CUDA_COMPUTE_CAP=90 cargo build --release --features cuda
#
# Needs Python 3 with pip, a C compiler and cargo, on Linux on x86-64 or aarch64. A folder that is complete is used as it is.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:-$repo/target/cuda-toolkit}"
dir=$(cd "${1:-$repo/target/cuda-toolkit}" && pwd)

packages=(
  nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88
  nvidia-cublas==13.0.2.14 nvidia-curand==10.4.0.35
)

# The driver's library comes with a GPU. To link without one takes a library of its name with its functions in it: those
# that the crate `cudarc` declares, each empty.
driver_stub() {
  local manifest sys
  manifest=$(cd "$repo" && cargo metadata --format-version 1 --features cuda | python3 -c '
import json, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] == "cudarc":
        print(package["manifest_path"])')
  sys=$(dirname "$manifest")/src/driver/sys/mod.rs
  grep -oE 'fn cu[A-Za-z0-9_]+' "$sys" | sed 's/^fn \(.*\)/void \1(void) {}/' | sort -u >"$dir/cuda-stub.c"
  mkdir -p "$dir/lib64/stubs"
  cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$dir/lib64/stubs/libcuda.so" "$dir/cuda-stub.c"
}

if [ ! -e "$dir/complete" ]; then
  {
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$dir/python" "${packages[@]}"
    toolkit=$dir/python/nvidia/cu13
    for folder in bin include nvvm; do ln -sfn "$toolkit/$folder" "$dir/$folder"; done
    mkdir -p "$dir/lib64"
    # Linkers look for the name without a version, which these packages leave out.
    for library in "$toolkit"/lib/*.so* "$toolkit"/lib/*.a; do
      name=$(basename "$library")
      ln -sfn "$library" "$dir/lib64/$name"
      ln -sfn "$library" "$dir/lib64/${name%%.so*}$([[ $name == *.so* ]] && echo .so || true)"
    done
    driver_stub
    "$dir/bin/nvcc" --version | grep -q 'release 13'
    touch "$dir/complete"
  } >&2
fi

cat <<END
export CUDA_HOME='$dir' CUDA_PATH='$dir'
export PATH='$dir/bin':"\$PATH"
export LIBRARY_PATH='$dir/lib64:$dir/lib64/stubs'"\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
END
