"""Access tokens in calls of Python: cleaned, refused in the wrong place, and never part of an error."""

import copy
import pickle
import shutil
import traceback

import pytest
import tiny

from omni_video_hf.hub import inspection, push, repository
from omni_video_hf.models.configuration_omni_video import OmniVideoConfig
from omni_video_hf.models.configuration_vila import VilaConfig
from omni_video_hf.models.connectors import OmniVideoAdapter
from omni_video_hf.models.modeling_omni_video import OmniVideoForConditionalGeneration
from omni_video_hf.models.modeling_vila import VilaForConditionalGeneration
from omni_video_hf.pipelines.pipeline_omni_video import OmniVideoPipeline
from omni_video_hf.processing.processing_omni_video import OmniVideoProcessor
from omni_video_hf.training.arguments import OmniVideoTrainingArguments
from omni_video_hf.training.features.encoder import load_encoders
from omni_video_hf.utils.tokens import TOKEN_MASK, hub_call, mask_tokens

PLACE = "lab/model"
TOKEN = "hf_" + "aBcDeFgHiJ" * 4
CLASSES = [
    OmniVideoConfig,
    VilaConfig,
    OmniVideoAdapter,
    OmniVideoForConditionalGeneration,
    VilaForConditionalGeneration,
    OmniVideoPipeline,
    OmniVideoProcessor,
]


def whole_text(error):
    """Everything that Python prints about an error, but for lines of source."""
    lines = traceback.format_exception(error)
    return "".join(line for line in lines if not line.startswith("  File")) + repr(error)


@hub_call
def ask_with_header(place, token=None):
    """As clients of the Hub: the token goes into a header, and HTTP libraries repeat a header that they refuse."""
    try:
        raise RuntimeError(f"Illegal header value b'Bearer {token}\\n' for {place}")
    except RuntimeError as error:
        error.add_note(f"sent {token}")
        raise OSError(5, f"no answer with {token}", f"{place}/{token}") from error


@pytest.mark.parametrize("token", [TOKEN, TOKEN + "\n", "a-token-of-another-kind"])
def test_no_error_in_the_chain_shows_the_token(token):
    with pytest.raises(OSError, match="no answer") as caught:
        ask_with_header("lab/model", token)
    assert caught.value.errno == 5
    text = whole_text(caught.value)
    assert token.strip() not in text
    assert text.count(TOKEN_MASK) >= 4


def test_an_error_that_composes_its_own_text_is_replaced():
    class StubbornError(RuntimeError):
        def __str__(self):
            return f"sent {TOKEN}"

    @hub_call
    def ask(token):
        raise StubbornError

    with pytest.raises(ValueError, match="StubbornError: sent hf_") as caught:
        ask(token=None)
    assert TOKEN not in whole_text(caught.value)


def test_a_token_is_cleaned_wherever_it_stands_among_the_arguments():
    @hub_call
    def ask(place, revision=None, token=None, **others):
        return place, revision, token, others

    assert ask("a/b", None, f" {TOKEN}\r\n") == ("a/b", None, TOKEN, {})
    assert ask("a/b", token=TOKEN + "\n", more=1) == ("a/b", None, TOKEN, {"more": 1})
    assert ask("a/b", token=True) == ("a/b", None, True, {})
    assert ask("a/b", token=False) == ("a/b", None, False, {})
    for wrong in (f"{TOKEN} {TOKEN}", TOKEN + "\u00e9", 7):
        with pytest.raises(ValueError, match="`token` must be") as caught:
            ask("a/b", token=wrong)
        assert TOKEN not in whole_text(caught.value)


def test_other_kinds_of_tokens_are_masked():
    for token in ("hf_oauth_" + "x1-_." * 8, "hf_jwt_" + "eyJ.x" * 9, "api_org_" + "a1" * 17):
        assert mask_tokens(f"a {token} b") == f"a {TOKEN_MASK} b"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_refuses_a_token_in_the_place_of_another_argument(cls):
    """Before anything is sent: a repository of this name would publish the token."""
    for arguments in ((TOKEN,), (PLACE,)):
        options = {} if arguments[0] == TOKEN else {"revision": TOKEN}
        with pytest.raises(ValueError, match="is an access token") as caught:
            cls.from_pretrained(*arguments, **options, token=PLACE)
        assert TOKEN not in whole_text(caught.value)
    with pytest.raises(ValueError, match="`token` must be one word") as caught:
        cls.from_pretrained("lab/model", token=f"{TOKEN}\n{TOKEN}")
    assert TOKEN not in whole_text(caught.value)
    with pytest.raises(ValueError, match="`repo_id` is an access token"):
        cls.push_to_hub(None, TOKEN, token=PLACE)
    with pytest.raises(ValueError, match="is an access token"):
        cls.save_pretrained(None, TOKEN)


@pytest.mark.parametrize(
    "call",
    [
        OmniVideoPipeline.load_config,
        OmniVideoPipeline.download,
        lambda place, **options: OmniVideoPipeline.load_lora_weights(None, place, **options),
        load_encoders,
        inspection.repository_headers,
        inspection.repository_parts,
        lambda place, **options: push.push_repository("folder", place, **options),
        lambda place, **options: push.push_completed("folder", place, "base", **options),
        lambda place, **options: repository.complete_repository("folder", place, **options),
    ],
)
def test_every_function_refuses_it_too(call):
    with pytest.raises(ValueError, match="is an access token") as caught:
        call(TOKEN, token=PLACE)
    assert TOKEN not in whole_text(caught.value)
    with pytest.raises(ValueError, match="`token` must be one word"):
        call("lab/model", token=f"{TOKEN} x")


def test_a_folder_of_such_a_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / TOKEN[:40]).mkdir()
    tiny.config().save_pretrained(TOKEN[:40])
    assert OmniVideoConfig.from_pretrained(TOKEN[:40]).model_type == "omni_video"


def test_training_arguments_clean_the_token_and_refuse_it_elsewhere(tmp_path):
    arguments = OmniVideoTrainingArguments(str(tmp_path), report_to=[], use_cpu=True, hub_token=TOKEN + "\n")
    assert arguments.hub_token == TOKEN
    assert copy.deepcopy(arguments).hub_token == pickle.loads(pickle.dumps(arguments)).hub_token == TOKEN  # noqa: S301
    assert TOKEN not in str(arguments)
    with pytest.raises(ValueError, match="`hub_model_id` is an access token") as caught:
        OmniVideoTrainingArguments(str(tmp_path), report_to=[], use_cpu=True, hub_model_id=TOKEN)
    assert TOKEN not in whole_text(caught.value)


@pytest.fixture(scope="module")
def saved_processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    tiny.processor().save_pretrained(folder)
    return folder


HOSTILE_FILES = {
    "tokenizer.json": [
        '{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}',
        "[" * 100_000,
        '{"added_tokens": 1}',
    ],
    "tokenizer_config.json": ["[" * 100_000 + "]" * 100_000],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in HOSTILE_FILES.items() for text in texts])
def test_hostile_files_of_a_tokenizer_are_one_error_with_its_place(saved_processor, tmp_path, name, text):
    folder = tmp_path / "copy"
    shutil.copytree(saved_processor, folder)
    (folder / name).write_text(text)
    with pytest.raises((ValueError, OSError)) as caught:
        OmniVideoProcessor.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_configuration_that_is_nested_too_deeply_is_one_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "omni_video", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match=r"nested too deeply|not a valid JSON") as caught:
        OmniVideoForConditionalGeneration.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
