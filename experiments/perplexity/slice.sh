#!/usr/bin/env bash
# Perplexity at 6 x 512 with three arms, on a GPU that is lent for minutes to a machine without a network.
#
#   experiments/perplexity/slice.sh pack              here: corpus and missing wheels -> carried/, 36 MB
#   experiments/perplexity/slice.sh run OUT [FLAGS]   there, with carried/: trains; the runs that are done -> OUT/kept.tar.gz
#   experiments/perplexity/slice.sh unpack FILE       here: these runs into runs/studies/, then the results of all of them
#
# 11 minutes of one H100 or H200, estimated. Of the packages, jax for the GPU, flax, optax, orbax-checkpoint, numpy,
# scipy, einops, matplotlib, safetensors, tokenizers and tqdm must be there. What `run` has not ended after MINUTES (10)
# is lost, the runs before it are kept; `unpack` counts n-grams. To see that it works, 10 minutes on a CPU:
# MINUTES=8 run OUT --steps=3 --seed=0 --arm=rwkv4 --arm=transformer
set -euo pipefail
cd "$(dirname "$0")/../.."

WHEELS="grain array-record ml_collections pooch platformdirs absl-py etils"
CACHE=${RWKV_JAX_CACHE:-$HOME/.cache/rwkv_jax}

case ${1:-} in
pack)
    python=$(command -v .venv/bin/python || command -v python3)
    $python -c 'from rwkv_jax import data; data.prepare("classic-books")'
    mkdir -p carried/wheels
    tar -C "$CACHE/downloads" -cJf carried/classic-books.tar.xz classic-books
    # shellcheck disable=SC2086
    $python -m pip download --quiet --no-deps --only-binary=:all: --python-version=3.12 --dest=carried/wheels $WHEELS
    du -sh carried
    ;;
run)
    out=$(realpath "$2")
    export RWKV_JAX_CACHE=$PWD/carried/cache
    mkdir -p "$RWKV_JAX_CACHE/downloads" "$out"
    tar -C "$RWKV_JAX_CACHE/downloads" -xJf carried/classic-books.tar.xz
    python3 -c 'import grain, ml_collections, pooch' 2>/dev/null ||
        python3 -m pip install --quiet --no-index --no-deps carried/wheels/*.whl
    flags=("${@:3}")
    timeout --signal=INT "${MINUTES:-10}m" python3 -m experiments.perplexity.run "${flags[@]:---preset=slice}" || true
    find runs/studies -maxdepth 1 -name '*.json' -printf '%P\0' 2>/dev/null |
        tar -C runs/studies --null -T - -czf "$out/kept.tar.gz"
    tar -tzf "$out/kept.tar.gz"
    ;;
unpack)
    mkdir -p runs/studies
    tar -C runs/studies -xzf "$2"
    .venv/bin/python -m experiments.perplexity.run --preset=slice --kept
    ;;
*)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
    ;;
esac
