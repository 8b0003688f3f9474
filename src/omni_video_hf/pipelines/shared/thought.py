"""`OmniVideoThought`: what a model wrote about a request before the video is generated."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class OmniVideoThought:
    """
    Result of a pipeline's `think`: read it, edit it with `dataclasses.replace`, and pass it back as `thought=`.

    Args:
        prompt: the prompt to generate from; in Omni-Video 2 a description of the resulting video.
        reasoning: what the model wrote before it; may be empty.
        source_caption: description of the source of an edit; `None` without a source.
        settings: how it was made: `max_new_tokens`, `temperature`, `seed`.

    Example:
        >>> from omni_video_hf import OmniVideoThought
        >>> OmniVideoThought(prompt="A panda drinks coffee.").to_dict()["prompt"]
        'A panda drinks coffee.'
    """

    prompt: str
    reasoning: str = ""
    source_caption: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"`prompt` of a thought must be a text that is not empty, got {self.prompt!r}.")

    @property
    def text(self) -> str:
        """
        Reasoning and prompt as one text.

        Example:
            >>> from omni_video_hf import OmniVideoThought
            >>> OmniVideoThought(prompt="a green circle", reasoning="Grass is green.").text
            'Grass is green. a green circle'
        """
        return f"{self.reasoning} {self.prompt}".strip()

    def to_dict(self) -> dict[str, Any]:
        """
        The fields as a dict of plain values.

        Example:
            >>> from omni_video_hf import OmniVideoThought
            >>> OmniVideoThought(prompt="A panda.").to_dict()["source_caption"] is None
            True
        """
        return asdict(self)


def as_thoughts(thought: Any, batch_size: int) -> list[OmniVideoThought]:
    """
    Thoughts of a call, one per prompt, from what the caller passed as `thought`.

    Raises:
        ValueError: for another type, or another number than prompts.
    """
    given = thought if isinstance(thought, list) else [thought] * batch_size
    made = [
        entry
        if isinstance(entry, OmniVideoThought)
        else OmniVideoThought(**entry)
        if isinstance(entry, dict)
        else OmniVideoThought(entry)
        for entry in given
    ]
    if len(made) != batch_size:
        raise ValueError(f"`thought` has {len(made)} entries for {batch_size} prompts: pass one, or one per prompt.")
    return made


def plain_thoughts(thoughts: list[OmniVideoThought], is_one: bool) -> Any:
    """Thoughts as plain values, which `thought` takes back; one alone for one prompt."""
    plain = [thought.to_dict() for thought in thoughts]
    return plain[0] if is_one else plain


def filled(template: str, **values: str) -> str:
    """`template` with its `{name}`s replaced; braces within the values stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


__all__ = ["OmniVideoThought", "as_thoughts", "filled", "plain_thoughts"]
