"""What the Hub accepts as metadata of a model card, as far as this project needs it; stricter where it warns."""

import re
from collections.abc import Callable
from typing import Any

import yaml

LICENSE_TEXT = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""
TASK_TEXT = """
text-classification token-classification table-question-answering question-answering zero-shot-classification
translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech
text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image
image-to-text image-to-image image-to-video unconditional-image-generation video-classification reinforcement-learning
robotics graph-ml tabular-classification tabular-regression text-ranking time-series-forecasting text-to-video
image-text-to-text image-text-to-image image-text-to-video visual-question-answering document-question-answering
mask-generation zero-shot-image-classification zero-shot-object-detection text-to-3d image-to-3d
image-feature-extraction video-text-to-text video-to-video keypoint-detection visual-document-retrieval any-to-any
other
"""
LICENSES, TASKS = frozenset(LICENSE_TEXT.split()), frozenset(TASK_TEXT.split())
RELATIONS = ("adapter", "finetune", "merge", "quantized")
NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"  # of a user, an organisation or a repository


def card_data(text: str) -> Any:
    """The metadata block of a card, or `None` where it has none."""
    match = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(match[1]) if match else None


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: is_text(value) and re.fullmatch(pattern, value) is not None


def one_of(values: Any) -> Callable[[Any], bool]:
    return lambda value: is_text(value) and value in values


def is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)


# key, whether a list of such values will do as well, the test, and what to say
RULES: list[tuple[str, bool, Callable[[Any], bool], str]] = [
    ("license", True, one_of(LICENSES), "must be one of the license identifiers of https://hf.co/docs/hub"),
    ("pipeline_tag", False, one_of(TASKS), "must be one of the tasks of https://hf.co/tasks"),
    ("base_model", True, matches(f"{NAME}/{NAME}"), "use a model id from https://hf.co/models"),
    ("base_model_relation", False, one_of(RELATIONS), f"must be one of {', '.join(RELATIONS)}"),
    ("datasets", True, matches(f"(?:{NAME}/)?{NAME}"), "use a dataset id from https://hf.co/datasets"),
    ("tags", False, is_list_of(str), "must be a list of strings"),
    ("widget", False, is_list_of(dict), "must be a list of mappings"),
    ("model-index", False, is_list_of(dict), "must be a list of mappings"),
    *((key, False, is_text, "must be a string") for key in ("library_name", "license_name", "license_link")),
    *((key, True, is_text, "must be a string or a list of strings") for key in ("language", "metrics")),
]


def card_problems(text: str) -> tuple[list[str], list[str]]:
    """Errors, for which a card is refused, and warnings."""
    try:
        data = card_data(text)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    errors = []
    for key, many, accepts, wanted in RULES:
        if key in data:
            values = data[key] if many and isinstance(data[key], list) else [data[key]]
            errors += [
                f'"{key}" with value {value!r} is not valid: {wanted}' for value in values if not accepts(value)
            ]
    return errors, []
