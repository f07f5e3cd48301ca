#!/usr/bin/env bash
# Perplexity at 6 x 512 with three arms, on a GPU machine without a network, in commands of a few minutes.
#
#   experiments/perplexity/slice.sh pack               here: corpus and missing wheels -> carried/, 34 MB
#   experiments/perplexity/slice.sh run OUT [FLAGS]    there, with carried/: trains; the runs that are done -> OUT/kept.tar.gz
#   experiments/perplexity/slice.sh unpack FILE        here: these runs into runs/studies/, then a draft of the results
#
# 11 minutes of one H100 or H200, estimated, in commands of MINUTES (8): the second goes on after the runs that the first
# ended, if FILE is unpacked there. Of the packages, jax for the GPU, flax, optax, orbax-checkpoint, numpy, scipy, einops,
# matplotlib, safetensors, tokenizers and tqdm must be there, for the Python of the wheels, PYTHON_VERSION (3.12).
# To see that it works, 10 minutes on a CPU: PRESET=cpu experiments/perplexity/slice.sh run OUT --steps=3 --seed=0 --arm=rwkv4 --arm=transformer
set -euo pipefail

# What an image with jax for GPUs may lack, and what these need.
WHEELS="absl-py array-record cloudpickle etils grain ml_collections platformdirs pooch"
CACHE=${RWKV_JAX_CACHE:-$HOME/.cache/rwkv_jax}
test "${1:-}" = pack || test $# -ge 2 || set -- help
test $# -lt 2 || there=$(realpath -m "$2")
cd "$(dirname "$0")/../.."
python=$(command -v .venv/bin/python || command -v python3)
mkdir -p runs/studies

case ${1:-} in
pack)
    "$python" -c 'from rwkv_jax import data; data.prepare("classic-books")'
    mkdir -p carried/wheels
    tar -C "$CACHE/downloads" -cJf carried/classic-books.tar.xz classic-books
    # shellcheck disable=SC2086
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version="${PYTHON_VERSION:-3.12}" \
        --dest=carried/wheels $WHEELS
    du -sh carried
    ;;
run)
    out=$there
    export RWKV_JAX_CACHE=$PWD/carried/cache
    mkdir -p "$RWKV_JAX_CACHE/downloads" "$out"
    tar -C "$RWKV_JAX_CACHE/downloads" -xJf carried/classic-books.tar.xz
    "$python" -c 'import array_record, cloudpickle, grain, ml_collections, pooch' 2>/dev/null ||
        "$python" -m pip install --quiet --no-index --no-deps carried/wheels/*.whl
    touch carried/began
    code=0
    timeout --signal=INT --kill-after=20 "${MINUTES:-8}m" \
        "$python" -m experiments.perplexity.run --preset="${PRESET:-slice}" "${@:3}" || code=$?
    find runs/studies -maxdepth 1 -name '*.json' -newer carried/began -printf '%P\0' |
        tar -C runs/studies --null -T - -czf "$out/kept.tar.gz"
    tar -tzf "$out/kept.tar.gz"
    case $code in 0 | 124 | 130) ;; *) exit "$code" ;; esac
    ;;
unpack)
    tar -C runs/studies -xzf "$there"
    "$python" -m experiments.perplexity.run --preset=slice --kept
    ;;
*)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
    ;;
esac
