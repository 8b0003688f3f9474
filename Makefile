# `make demo` and `make test` set up everything they need; both start from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all screenshots style quality shapes clean

help: ## show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

install: $(INSTALLED) ## set up .venv with pinned versions

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED) ## generate, edit and ask with the default checkpoint
	$(BIN)/python demo.py

# Two processes of one thread each: with torch's two threads each, the same tests took more than twice as long.
test test-all: export OMP_NUM_THREADS ?= 1

test: $(INSTALLED) quality ## check style, and run the tests of the package
	$(BIN)/python -m pytest --numprocesses 2 --durations 10 -m 'not slow'

test-all: $(INSTALLED) quality ## the same, with all slow tests: documents, examples, benchmarks, the wheel, killed and distributed runs
	$(BIN)/python -m pytest --numprocesses 2 --durations 10 -rs

screenshots: $(INSTALLED) ## drive the demo page in Chromium, and write docs/demo/*.png
	OMNI_VIDEO_SCREENSHOTS=docs/demo $(BIN)/python -m pytest -rs tests/demo/test_browser.py

style: $(INSTALLED) ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED) ## what CI checks besides tests: style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Omni-Video Shapes from nothing: every file below is written last by what makes it, so that `make shapes` goes on where
# it was stopped, and `make -j2 shapes` trains VAE and MLLM side by side. Every seed is a default of its script or recipe.
SHAPES := build/shapes
RUN := $(BIN)/python -m examples.shapes
# Of a stage of the paper's: on CPUs, two processes of one thread train half as many samples more as one with two.
PROCESSES ?= $(shell nvidia-smi --list-gpus >/dev/null 2>&1 && echo 1 || echo 2)
STAGE = $(BIN)/torchrun --standalone --nproc_per_node $(PROCESSES) --module examples.shapes.training.train_stage $(notdir $(@D)) --data $(SHAPES)/latents --output_dir $(@D) --model

shapes: $(SHAPES)/omni-video-shapes/README.md ## train Omni-Video Shapes from nothing (hours); run again to go on

$(SHAPES)/vae/vae.json: | $(INSTALLED)
	$(RUN).training.train_vae --output $(@D)

$(SHAPES)/mllm/mllm.json: | $(INSTALLED)
	$(RUN).training.train_mllm --output $(@D)

$(SHAPES)/latents/latents.json: $(SHAPES)/vae/vae.json
	$(RUN).training.latents --vae $(SHAPES)/vae/vae --output $(@D)

$(SHAPES)/vae_decoder/vae.json: $(SHAPES)/vae/vae.json
	$(RUN).training.train_vae_decoder --vae $(SHAPES)/vae/vae --output $(@D)

$(SHAPES)/text_encoder/text_encoder.json: | $(INSTALLED)
	$(RUN).training.train_text_encoder --output $(@D)

$(SHAPES)/text_to_video/text_to_video.json: $(SHAPES)/latents/latents.json $(SHAPES)/text_encoder/text_encoder.json
	$(RUN).training.train_text_to_video --vae $(SHAPES)/vae/vae --text-encoder $(SHAPES)/text_encoder/text_encoder --latents $(SHAPES)/latents --output $(@D)

$(SHAPES)/given/model_index.json: $(SHAPES)/vae_decoder/vae.json $(SHAPES)/text_to_video/text_to_video.json $(SHAPES)/mllm/mllm.json
	$(RUN).assemble given --vae $(SHAPES)/vae_decoder/vae --text-encoder $(SHAPES)/text_encoder/text_encoder --transformer $(SHAPES)/text_to_video/transformer --mllm $(SHAPES)/mllm/mllm --output $(@D)

$(SHAPES)/align/stage.json: $(SHAPES)/given/model_index.json
	$(STAGE) $(<D)

$(SHAPES)/align_texts/stage.json: $(SHAPES)/align/stage.json
	$(STAGE) $(<D)/pipeline

$(SHAPES)/connect/stage.json: $(SHAPES)/align_texts/stage.json
	$(STAGE) $(<D)/pipeline

$(SHAPES)/joint/stage.json: $(SHAPES)/connect/stage.json
	$(STAGE) $(<D)/pipeline

$(SHAPES)/compose/stage.json: $(SHAPES)/joint/stage.json
	$(STAGE) $(<D)/pipeline

$(SHAPES)/refine/stage.json: $(SHAPES)/compose/stage.json
	$(STAGE) $(<D)/pipeline

$(SHAPES)/polish/stage.json: $(SHAPES)/refine/stage.json
	$(STAGE) $(<D)/pipeline

$(SHAPES)/finish/stage.json: $(SHAPES)/polish/stage.json
	$(STAGE) $(<D)/pipeline

$(SHAPES)/settle/stage.json: $(SHAPES)/finish/stage.json
	$(STAGE) $(<D)/pipeline

$(SHAPES)/edit_pairs/videos.json: $(SHAPES)/settle/stage.json
	$(RUN).training.edit_pairs --model $(<D)/pipeline --output $(@D)

$(SHAPES)/edit/edit.json: $(SHAPES)/edit_pairs/videos.json
	$(RUN).training.train_edit --model $(SHAPES)/settle/pipeline --pairs $(<D) --output $(@D)

$(SHAPES)/omni-video-shapes/model_index.json: $(SHAPES)/settle/stage.json
	$(RUN).assemble finished --model $(<D)/pipeline --output $(@D)

# A decoder that takes sources in its channels: `make build/shapes/omni-video-shapes-edit/model_index.json`. Not shipped
# yet: half of the edits keep everything, see examples/shapes/RESULTS.md.
$(SHAPES)/omni-video-shapes-edit/model_index.json: $(SHAPES)/edit/edit.json
	$(RUN).assemble finished --model $(SHAPES)/settle/pipeline --transformer $(<D)/transformer --output $(@D)

$(SHAPES)/scores/scores.json: $(SHAPES)/omni-video-shapes/model_index.json
	$(BIN)/omni-video eval shapes --model $(<D) --output $(@D)

$(SHAPES)/omni-video-shapes/README.md: $(SHAPES)/scores/scores.json
	$(RUN).card --build $(SHAPES) --model $(@D)

# What `demo.py` writes. A folder goes when nothing else is in it, .venv when make set it up; a link is left alone.
DEMO := circle.mp4 blue.mp4 square.png answer.txt sheet.png

clean: ## remove everything that make created
	if [ -d demo ] && [ ! -L demo ]; then (cd demo && rm -f $(DEMO)); rmdir demo 2>/dev/null || true; fi
	if [ -f $(INSTALLED) ] && [ -f $(VENV)/pyvenv.cfg ] && [ ! -L $(VENV) ]; then rm -rf $(VENV); fi
