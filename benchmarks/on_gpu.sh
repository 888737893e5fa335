#!/usr/bin/env bash
# Everything that needs a GPU, in order, each step with a limit of its own: a failed one does not stop the next.
#
#     benchmarks/on_gpu.sh OUT [DATA [PART...]]
#
# OUT    a folder for tables and logs
# DATA   a folder of images with train/ and val/, such as CIFAR-100's ("digits", the bundled ones, leaves train out)
# PART   tests (those of a GPU), suite (all tests, which then train on the GPU), controls (the commands, several at a
#        time), overhead (what a comparison costs), train (a teacher and students on DATA); all of them if none is named
set -u
out=$1 data=${2:-digits}
parts=${*:3}
parts=${parts:-tests suite controls overhead train}
python=${PYTHON:-python3}
runs=$(mktemp -d)
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

step() {  # step SECONDS NAME COMMAND...
    local limit=$1 name=$2 started=$SECONDS code=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    printf '== %s: exit %s, %s s\n%s\n' "$name" "$code" "$((SECONDS - started))" \
        "$(tail -n "${LINES_SHOWN:-4}" "$out/$name.log")"
}
beside() {  # the same, beside the steps that follow, up to six at a time
    while [ "$(jobs -rp | wc -l)" -ge 6 ]; do wait -n; done
    step "$@" &
}
named() { case " $parts " in *" $1 "*) return 0 ;; esac; return 1; }
probe() { "$1" "$2" "$3" "$python" -m cka_probe "${@:4}" --device cuda; }
distill_digits() {  # distill_digits NAME OPTION...
    probe beside 90 "distill-$1" distill --recipe digits --student zoo:vit@random --epochs 2 "${@:2}" --out "$runs/$1"
}
train() {  # train NAME OPTION...
    probe step 120 "train-$1" distill --recipe cifar-token --data "$data" --image-size 32 --epochs 10 --warmup-epochs 1 \
        --bf16 "${@:2}" --out "$runs/$1"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$python" -c 'import timm, torch; print("torch", torch.__version__, "timm", timm.__version__)'
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if named tests; then
    LINES_SHOWN=30 step 150 tests "$python" -m pytest -q -p no:cacheprovider -n 4 -m cuda
fi
if named controls; then
    probe step 60 check check
    probe beside 90 compare compare zoo:cnn zoo:vit zoo:mlp --out "$runs/compare"
    teacher="--teacher zoo:cnn"
    # shellcheck disable=SC2086
    {
        distill_digits none --method none
        distill_digits kd $teacher --method kd --bf16 --compile
        distill_digits kd-fp16 $teacher --method kd --fp16
        distill_digits kd-z $teacher --method kd --standardize-logits --ema 0.99
        distill_digits cached $teacher --method kd --teacher-cache "$runs/cache"
        distill_digits ofa $teacher --method ofa --bf16 --channels-last
        distill_digits ofa-auto $teacher --method ofa --stages auto --probe-epochs 1
        distill_digits crd $teacher --method crd
        distill_digits rsd $teacher --method rsd --fp16
        distill_digits fbt $teacher --method fbt --bf16 --compile
        distill_digits fbt-student-first $teacher --method fbt --assistant student-first --fp16
        distill_digits fbt-auto $teacher --method fbt --cut auto --probe-epochs 1
        distill_digits words $teacher --method words
        probe beside 90 distill-obow distill --method obow --data digits --student zoo:cnn@random --epochs 2 \
            --batch-size 64 --bf16 --out "$runs/obow"
        wait
        distill_digits cached-again $teacher --method dkd --teacher-cache "$runs/cache"
        probe beside 60 evaluate evaluate "$runs/ofa"
        probe beside 60 evaluate-knn evaluate "$runs/obow" --by knn --data digits
        wait
    }
fi
if named suite; then
    # Some tests hold a CPU's last bit or its memory: read what fails.
    LINES_SHOWN=80 step 280 suite "$python" -m pytest -q -p no:cacheprovider -n 14 -m "not cuda and not full" --tb short
fi
if named overhead; then
    step 200 overhead "$python" benchmarks/gpu_overhead.py --out "$out/gpu_overhead.csv"
fi
if named train && [ "$data" != digits ]; then
    train teacher --method none --student resnet18@random
    for method in kd ofa fbt; do
        train "$method" --method "$method" --teacher "$runs/teacher" \
            --student deit_tiny_patch16_224,img_size=32,patch_size=4@random
    done
    probe step 120 train-obow distill --method obow --data "$data" --image-size 32 --epochs 5 --bf16 \
        --student resnet18@random --out "$runs/obow-real"
    probe step 60 train-obow-knn evaluate "$runs/obow-real" --by knn --data "$data"
fi
