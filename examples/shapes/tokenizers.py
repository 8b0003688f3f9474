"""The two small tokenizers of Omni-Video Shapes, trained on the texts of its data set: always the same ones."""

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from omni_video_hf.processing.processing_omni_video import IMAGE_TOKEN, SYSTEM_PROMPT
from omni_video_hf.shapes.dataset import ShapesDataset
from omni_video_hf.tasks import IMAGE_GENERATION_TOKEN, TASKS, VIDEO_GENERATION_TOKEN

VOCABULARY_SIZE = 608  # special tokens, the 256 bytes, and merges: nearly every word of the data set is one token
EXAMPLES_PER_TASK = 500

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "[PAD]"
# Llama 3's, which the chat template writes, and what VILA and upstream's training add.
MLLM_TOKENS = (
    BOS,
    EOS,
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    IMAGE_GENERATION_TOKEN,
    VIDEO_GENERATION_TOKEN,
    PAD,
)
TEXT_PAD, TEXT_EOS = "<pad>", "</s>"  # T5's, numbered as there


def training_texts() -> Iterator[str]:
    """Prompts, edits, questions and answers of the training split, and what the processor writes around them."""
    yield SYSTEM_PROMPT
    yield "system user assistant"
    for task in TASKS.values():
        yield task.user.format(prompt="")
    for task in ("t2i", "t2v", "i2i", "v2v"):
        dataset = ShapesDataset(task, "train", EXAMPLES_PER_TASK)
        yield from (dataset.example(index).prompt for index in range(len(dataset)))
    for kind in ("image", "video"):
        dataset = ShapesDataset("understand", "train", EXAMPLES_PER_TASK, kind=kind)
        for index in range(len(dataset)):
            example = dataset.example(index)
            yield f"{example.prompt}\n{example.answer}"


def mllm_tokenizer() -> PreTrainedTokenizerFast:
    """
    The language model's: begins with bos as Llama 3's does; `<image>` is its last token, behind `VOCABULARY_SIZE`.

    Capitals do not count, so that "Red" is "red". Any text can be written in its bytes; none is unknown.
    """
    tokenizer = _train(MLLM_TOKENS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]),
        ]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    wrapped.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return wrapped


def text_tokenizer() -> PreTrainedTokenizerFast:
    """The text encoder's: ends with eos as T5's does."""
    tokenizer = _train((TEXT_PAD, TEXT_EOS))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"$A {TEXT_EOS}", special_tokens=[(TEXT_EOS, tokenizer.token_to_id(TEXT_EOS))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TEXT_EOS, pad_token=TEXT_PAD)


def _train(special_tokens: tuple[str, ...]) -> Tokenizer:
    """A byte-level BPE whose first ids are `special_tokens`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return tokenizer


__all__ = ["VOCABULARY_SIZE", "mllm_tokenizer", "text_tokenizer", "training_texts"]
