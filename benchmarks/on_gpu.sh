#!/usr/bin/env bash
# Everything that needs a GPU, in order, each step with a limit of its own: a failed one does not stop the next.
#
#     benchmarks/on_gpu.sh OUT [DATA]
#
# OUT    a folder for tables and logs
# DATA   a folder of images with train/ and val/, such as CIFAR-100's (the bundled digits are used where there is none)
set -u
out=$1 data=${2:-digits}
python=${PYTHON:-python3}
runs=$(mktemp -d)
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

step() {  # step SECONDS NAME COMMAND...
    local limit=$1 name=$2 started=$SECONDS code=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    echo "== $name: exit $code, $((SECONDS - started)) s"
    tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
}
probe() { "$python" -m cka_probe "$@"; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$python" -c 'import timm, torch; print("torch", torch.__version__, "timm", timm.__version__)'
step 150 tests "$python" -m pytest -q -p no:cacheprovider -m cuda --continue-on-collection-errors tests/test_cuda.py tests/probing/in_turn
step 60 check "$python" -m cka_probe check --device cuda
step 60 compare "$python" -m cka_probe compare zoo:cnn zoo:vit zoo:mlp --device cuda --out "$runs/compare"
for options in "--method none" "--method kd --bf16" "--method kd --fp16" "--method ofa --bf16 --channels-last" "--method crd" "--method rsd --fp16" "--method kd --standardize-logits" "--method ofa --stages auto --probe-epochs 1"; do
    # shellcheck disable=SC2086
    step 60 "distill-$(echo "$options" | tr -dc 'a-z0-9-')" "$python" -m cka_probe distill --recipe digits --teacher zoo:cnn \
        --student zoo:vit@random --epochs 2 --device cuda $options --out "$runs/$(echo "$options" | tr -dc 'a-z0-9')"
done
step 200 overhead "$python" benchmarks/gpu_overhead.py --out "$out/gpu_overhead.csv"
train() { step 120 "$1" "$python" -m cka_probe distill --recipe cifar-token --data "$data" --image-size 32 --epochs 10 \
    --warmup-epochs 1 --bf16 --device cuda --out "$runs/$1" "${@:2}"; }
if [ "$data" != digits ]; then
    train teacher --method none --student resnet18@random
    train student --method ofa --teacher "$runs/teacher" --student deit_tiny_patch16_224,img_size=32,patch_size=4@random
fi
