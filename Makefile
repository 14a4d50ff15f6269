# Each target creates .venv when it is missing; nothing but Python >= 3.11 and make is needed.
PYTHON ?= python3
VENV := .venv
SHELL := /bin/bash
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo pictures real evidence test test-all lint bench gpu clean

# A small model trains 1.4 x as fast in two processes that share the cores as in one that has them all.
# Said in full: `accelerate launch` prints a page of warnings about its defaults otherwise.
PROCS := $(shell { command -v nvidia-smi || test $$(nproc) -lt 2; } > /dev/null && echo 1 || echo 2)
LAUNCH := $(BIN)/accelerate launch $(if $(filter 2,$(PROCS)),--multi_gpu) --num_processes $(PROCS) \
    --num_cpu_threads_per_process $(shell expr $(shell nproc) / $(PROCS)) \
    --num_machines 1 --mixed_precision no --dynamo_backend no
# 32 records a step, however many processes
TRAIN_RUN := $(LAUNCH) train/run.py --per_device_train_batch_size $(shell expr 32 / $(PROCS))
EVALUATE := $(BIN)/python train/evaluate.py
ASKED := demo/toy/videos/test/clip-00000.mp4
QUESTION := "When is the red square visible?"

demo: $(READY)  ## draw a toy world, bank it, train twice on the bank, evaluate, ask
	rm -rf demo && mkdir demo
	$(BIN)/preprocess toyworld demo/toy --train-clips 1536
	set -o pipefail; $(BIN)/preprocess encode demo/toy/videos --stride 4,8 --frames 16 \
	    --out demo/bank --tower demo/toy/tower | tee demo/encode.txt
	$(TRAIN_RUN) --config train/presets/toy.yaml --stage_path demo/toy/llm --max_steps 300 \
	    --bank demo/bank --data_path demo/toy/train.jsonl --output_dir demo/run-a
	$(EVALUATE) --model demo/run-a --bank demo/bank --data_path demo/toy/test.jsonl --untrained --max_records 64
	$(EVALUATE) --model demo/run-a --bank demo/bank --data_path demo/toy/test.jsonl
	$(BIN)/python train/ask.py $(ASKED) $(QUESTION) --model demo/run-a
	@echo "--- the next experiment: another slow/fast pattern on the same bank, no video is read"
	$(TRAIN_RUN) --config train/presets/toy.yaml --stage_path demo/run-a --max_steps 60 \
	    --frame_sampling_strategy uniform --slow_frame_ratio 0.25 \
	    --bank demo/bank --data_path demo/toy/train.jsonl --output_dir demo/run-b
	$(EVALUATE) --model demo/run-b --bank demo/bank --data_path demo/toy/test.jsonl
	@echo "--- what the second one answers, drawn over the clip's frames"
	$(BIN)/python train/ask.py $(ASKED) $(QUESTION) --model demo/run-b --show demo/asked.png --truth demo/toy/test.jsonl
	@cat demo/encode.txt
	@$(BIN)/python -m train.report demo/run-a demo/run-b

pictures: $(READY)  ## the pictures of the READMEs, from what `make demo` has left
	rm -rf demo/four && $(BIN)/preprocess derive demo/bank --frames 4 --out demo/four
	$(BIN)/preprocess show demo/four test/clip-00000.mp4 --out demo/clip.png
	$(BIN)/python -c "$$SMALL_PNG" demo/clip.png preprocess/show/clip.png
	$(BIN)/python -c "$$SMALL_PNG" demo/asked.png preprocess/show/asked.png

define SMALL_PNG
import sys; from PIL import Image; picture = Image.open(sys.argv[1]).convert("RGB")
picture.thumbnail((900, 900)); picture.quantize(128, dither=0).save(sys.argv[2], optimize=True)
endef
export SMALL_PNG

# Pretrained weights and your own videos. What is there is not made again: after a stop, run it again.
# Other runs on the same bank: make real RUN=seed-1 TRAIN="--seed 1"; the features of a tower that never
# learned: make real REAL=real-random TOWER=dinov2-small-random.
CLIPS ?=
PHRASES ?=
REAL := real
MODELS := real/models
TOWER := dinov2-small
RUN := run
FOOTAGE := --train-clips 160 --test-clips 60
# other media in every epoch, in the words of the test set; SPLICE= trains on the clips as they are
SPLICE := --splice_path $(REAL)/world/train-scenes.jsonl --splice records=30000 parts=3-5 seconds=1-3 rounds=5 \
    questions=span+seen "span=When does the video show {}?" "seen=What does the video show at {}?"
TRAIN :=
STEPS := 900
HELD_OUT := --model $(REAL)/$(RUN) --bank $(REAL)/bank --data_path $(REAL)/world/test.jsonl
SCORES := $(REAL)/$(RUN)/eval-test
FILMED := $(REAL)/world/videos/test/clip-00000.mp4
# the first question of a kind that the test set asks about that clip
ASK := $(BIN)/python -c 'import json, sys; print(next(row["conversations"][0]["value"].split("\n", 1)[1] \
    for row in map(json.loads, open("$(REAL)/world/test.jsonl")) \
    if (row["video"], row["task"]) == ("test/clip-00000.mp4", sys.argv[1])))'
SHOW := $(BIN)/python train/ask.py $(FILMED) --model $(REAL)/$(RUN) --truth $(REAL)/world/test.jsonl

real: $(READY)  ## a pretrained tower on your own videos: make real CLIPS="a.mp4 b.mp4 folder" PHRASES=phrases.yaml
	@test -n "$(CLIPS)" -o -e $(REAL)/world/footage.json || { echo 'error: make real: no videos; name four' \
	    'or more of your own: make real CLIPS="a.mp4 b.mp4 folder" [PHRASES=phrases.yaml], as' \
	    'preprocess footage --help says' >&2; exit 2; }
	$(BIN)/python -c 'import onnx, gguf' 2> /dev/null || \
	    $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[real]'
	$(BIN)/preprocess realmodels $(MODELS)
	test -e $(REAL)/world/footage.json || { rm -rf $(REAL)/world && \
	    $(BIN)/preprocess footage $(CLIPS) $(REAL)/world $(FOOTAGE) $(if $(PHRASES),--phrases $(PHRASES)); }
	$(BIN)/preprocess encode $(REAL)/world/videos --stride 4,8 --frames 16 \
	    --out $(REAL)/bank --tower $(MODELS)/$(TOWER)
	$(TRAIN_RUN) --config train/presets/footage.yaml --stage_path $(REAL)/world/llm \
	    --bank $(REAL)/bank --data_path $(REAL)/world/train.jsonl $(SPLICE) \
	    --max_steps $(STEPS) --output_dir $(REAL)/$(RUN) $(TRAIN)
	test -e $(SCORES)-untrained.json || \
	    $(EVALUATE) $(HELD_OUT) --untrained --max_records 128
	test -e $(SCORES)-shuffled.json || $(EVALUATE) $(HELD_OUT) --shuffle_features
	test -e $(SCORES).json || $(EVALUATE) $(HELD_OUT)
	$(BIN)/python -m train.probe $(HELD_OUT) --scenes $(REAL)/world/train-scenes.jsonl
	$(SHOW) "$$($(ASK) span)" --show $(REAL)/$(RUN)/span.png
	$(SHOW) "$$($(ASK) seen)" --show $(REAL)/$(RUN)/seen.png
	@$(BIN)/python -m train.report $(REAL)/$(RUN)

# What the project claims, measured on a drawn world: many runs on its banks, one after the other. What is
# done is not done again: after a stop, run it again. SMALL=1 tries the machinery in minutes; SWEEPS=lape is
# the first part alone. One process, so that the rows of a step are the same on every machine.
THREADS := $(shell nproc)
ifdef SMALL
EVIDENCE := evidence-small
DRAWN := --train-clips 24 --test-clips 8
SWEEPS := small
else
EVIDENCE := evidence
DRAWN := --train-clips 2048
SWEEPS := lape frame-loss space singles
endif
# a drawn world of so many clips: $(call drawn,NAME,FLAGS); a bank of one: $(call banked,NAME,WORLD,FLAGS)
drawn = test -e $(EVIDENCE)/$(1)/world.json || { rm -rf $(EVIDENCE)/$(1) && \
    $(BIN)/preprocess toyworld $(EVIDENCE)/$(1) $(2); }
banked = test -e $(EVIDENCE)/$(1)/bank.json || { set -o pipefail; $(BIN)/preprocess encode $(EVIDENCE)/$(2)/videos \
    --stride 4,8 --tower $(EVIDENCE)/$(2)/tower --out $(EVIDENCE)/$(1) $(3) | tee $(EVIDENCE)/encode-$(1).txt; }

evidence: $(READY)  ## what helps and what does not: a drawn world, its banks, all runs, their tables
	mkdir -p $(EVIDENCE)
	$(call drawn,toy,$(DRAWN))
	for n in 128 512; do head -n $$n $(EVIDENCE)/toy/train.jsonl > $(EVIDENCE)/toy/train-$$n.jsonl; done
	$(call banked,bank,toy,--frames 16)
ifneq ($(filter singles,$(SWEEPS)),)
	$(call banked,bank-int8,toy,--frames 16 --codec int8)
	$(call banked,bank-bf16,toy,--frames 16 --dtype bfloat16)
	$(call banked,bank-32,toy,--frames 32)
endif
ifneq ($(filter space,$(SWEEPS)),)
	$(call drawn,space,--train-clips 8192)
	$(call banked,bank-space,space,--frames 16)
endif
	EVIDENCE=$(EVIDENCE) OMP_NUM_THREADS=$(THREADS) $(BIN)/python train/run.py --output_dir $(EVIDENCE)/runs \
	    --sweep $(SWEEPS:%=train/presets/evidence/%.yaml); code=$$?; test $$code -gt 1 || \
	    OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m train.sweep.page $(EVIDENCE); exit $$code

# A thread each: two processes of two threads on two cores spend more than half their time spinning
# (tests of the model: 83 s of CPU with two threads each, 34 s with one).
# With compiled modules: many tests start commands, and to compile ours takes each of them a second.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -q -n 2 --dist loadfile

test: $(READY)  ## the default tests (about nine minutes on two cores)
	$(PYTEST) -m "not slow and not gpu"

test-all: $(READY)  ## the default tests and the long ones
	$(PYTEST) -m "not gpu"

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)  ## the benchmarks; the peers of decoding are measured where they install
	-$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m tests.bench

gpu: $(READY)  ## what waits for a CUDA device, in pieces: MINUTES=9 stops in time, PIECES="demo fsdp" are these
	$(BIN)/python -m tests.bench.gpu $(PIECES) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SMALL),--small)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "framebank needs Python >= 3.11: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,lora,scores]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo real bench-results .mypy_cache .ruff_cache .pytest_cache .hypothesis
