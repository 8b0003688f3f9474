"""What is said about a scene of Omni-Video Shapes: prompts, edits, and questions with their one right answer."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .scene import Scene

Kind = Literal["image", "video"]

# The first phrase of each is the plain one, which answers use.
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SHAPE_WORDS = {"circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle",)}
SIDEWAYS = ("moving {0}", "moving to the {0}", "sliding {0}", "drifting to the {0}", "gliding {0}", "that moves {0}")
UPRIGHT = ("moving {0}", "moving {0}wards", "sliding {0}", "drifting {0}wards", "gliding {0}", "that moves {0}")
STILL = ("standing still", "staying in place", "not moving", "at rest", "that does not move", "that stands still")
MOTION_WORDS = {
    "still": STILL,
    **{side: tuple(phrase.format(side) for phrase in SIDEWAYS) for side in ("left", "right")},
    **{side: tuple(phrase.format(side) for phrase in UPRIGHT) for side in ("up", "down")},
}
BACKGROUND_WORDS = (
    "on a {0} background",
    "on {0}",
    "over a {0} background",
    "in front of a {0} background",
    "against a {0} backdrop",
)
# `{it}` size, colour and shape; `{moves}` motion, videos only; `{behind}` background.
SENTENCES: dict[Kind, tuple[str, ...]] = {
    "video": (
        "{it} {moves} {behind}",
        "a video of {it} {moves} {behind}",
        "a clip of {it} {moves} {behind}",
        "{behind}, {it} {moves}",
        "{it} {behind}, {moves}",
        "show {it} {moves} {behind}",
        "an animation: {it} {moves} {behind}",
        "make a video of {it} {moves} {behind}",
    ),
    "image": (
        "{it} {behind}",
        "an image of {it} {behind}",
        "a picture of {it} {behind}",
        "{behind}, {it}",
        "draw {it} {behind}",
        "a drawing of {it} {behind}",
        "make an image of {it} {behind}",
        "paint {it} {behind}",
    ),
}
# `{old}` and `{new}` are words for the values of the attribute, `{shape}` for the source's shape.
EDITS: dict[str, tuple[str, ...]] = {
    "color": (
        "make it {new}",
        "turn it {new}",
        "paint it {new}",
        "change its color to {new}",
        "change the colour to {new}",
        "make the {shape} {new}",
        "recolor the {shape} in {new}",
        "the {shape} should be {new}",
    ),
    "shape": (
        "turn it into a {new}",
        "make it a {new}",
        "change it into a {new}",
        "replace it with a {new}",
        "replace the {old} with a {new}",
        "turn the {old} into a {new}",
        "it should be a {new}",
    ),
    "size": (
        "make it {new}",
        "change its size to {new}",
        "make the {shape} {new}",
        "it should be {new}",
        "turn it into a {new} {shape}",
    ),
    "background": (
        "change the background to {new}",
        "make the background {new}",
        "put it on a {new} background",
        "set the background to {new}",
        "paint the background {new}",
        "replace the {old} background with {new}",
        "it should be on a {new} background",
    ),
}
MOTION_EDITS = {
    "moving": (
        "make it move {new}",
        "let it move {new}",
        "it should move {new}",
        "make the {shape} move {new}",
        "change its motion to {new}",
    ),
    "still": ("make it stand still", "stop it", "let it stay in place", "it should not move", "stop the {shape}"),
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "color": (
        "what color is it?",
        "what colour is the shape?",
        "which color does the shape have?",
        "what is the color of the shape?",
        "name the colour of the shape",
    ),
    "shape": (
        "what shape is it?",
        "which shape is shown?",
        "what is the shape?",
        "name the shape",
        "is it a circle, a square or a triangle?",
    ),
    "size": (
        "what size is it?",
        "is it small or large?",
        "how large is the shape?",
        "what is the size of the shape?",
        "is the shape large or small?",
    ),
    "background": (
        "what color is the background?",
        "which colour does the background have?",
        "what is behind the shape?",
        "what is the color of the background?",
        "name the colour of the background",
    ),
    "motion": (
        "how does it move?",
        "where does the shape move?",
        "what is the motion of the shape?",
        "in which direction does it move?",
        "does it move, and where?",
    ),
    "describe": (
        "describe the {kind}",
        "describe this {kind}",
        "what is in the {kind}?",
        "what does the {kind} show?",
        "what do you see?",
    ),
}


def describe(scene: Scene, kind: Kind) -> str:
    """The plain sentence, such as "a large red circle moving left on a black background"; images have no motion."""
    motion = f" {MOTION_WORDS[scene.motion][0]}" if kind == "video" else ""
    return f"a {scene.size} {scene.color} {scene.shape}{motion} on a {scene.background} background"


def generation_prompt(rng: np.random.Generator, scene: Scene, kind: Kind, names_color: bool = True) -> str:
    """One of many ways to ask for a scene. Every attribute is named; motion if, and only if, it is a video."""
    color = f" {scene.color}" if names_color else ""
    it = f"a {_pick(rng, SIZE_WORDS[scene.size])}{color} {_pick(rng, SHAPE_WORDS[scene.shape])}"
    behind = _pick(rng, BACKGROUND_WORDS).format(scene.background)
    moves = _pick(rng, MOTION_WORDS[scene.motion])
    return _written(rng, _pick(rng, SENTENCES[kind]).format(it=it, moves=moves, behind=behind))


def edit_prompt(rng: np.random.Generator, source: Scene, attribute: str, value: str) -> str:
    """One of several ways to ask for `value` of `attribute` in place of the source's."""
    words: Any = {"size": SIZE_WORDS, "shape": SHAPE_WORDS}.get(attribute)
    old, new = getattr(source, attribute), value
    if words is not None:
        old, new = _pick(rng, words[old]), _pick(rng, words[new])
    phrases = MOTION_EDITS["still" if value == "still" else "moving"] if attribute == "motion" else EDITS[attribute]
    shape = _pick(rng, SHAPE_WORDS[source.shape])
    return _written(rng, _pick(rng, phrases).format(old=old, new=new, shape=shape))


def question_and_answer(rng: np.random.Generator, scene: Scene, topic: str, kind: Kind) -> tuple[str, str]:
    """A question on an attribute, or `"describe"`, and the exact answer: one word, or the plain sentence."""
    answer = describe(scene, kind) if topic == "describe" else getattr(scene, topic)
    return _written(rng, _pick(rng, QUESTIONS[topic]).format(kind=kind)), answer


def _pick(rng: np.random.Generator, phrases: Sequence[str]) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def _written(rng: np.random.Generator, sentence: str) -> str:
    """As people write: with or without a capital and a full stop."""
    style = rng.integers(4)
    if style & 1:
        sentence = sentence[0].upper() + sentence[1:]
    return sentence + "." if style & 2 and not sentence.endswith("?") else sentence


__all__ = ["Kind", "describe", "edit_prompt", "generation_prompt", "question_and_answer"]
