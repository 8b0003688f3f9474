"""Check that the data have the inputs of every loss of a stage, from their buckets, before anything is loaded."""

from collections.abc import Iterable, Mapping, Sequence

from ...diffusion.losses import LOSS_NAMES, OmniVideoLossConfig
from .batch_sampler import Bucket

# Loss -> inputs of which a sample needs at least one, and how to get them.
NEEDED = {
    "answer": (("labels",), "compute features with `--instruction tokens`, or add `questions`"),
    "alignment": (("target_features",), "compute features with `--target-encoder`"),
    "text_alignment": (("target_prompt_embeds", "prompt_embeds"), "add samples of generation tasks"),
    "flow_matching": (("latents",), "add samples of generation tasks"),
}


def check_losses(
    buckets: Sequence[Bucket],
    losses: OmniVideoLossConfig,
    stage: str,
    weights: Mapping[str, float] | None = None,
    name: str = "data",
) -> None:
    """
    Refuse data that lack the inputs of a loss, and samples that no loss uses.

    Args:
        buckets: buckets of all samples.
        losses: losses of the stage; only those with a positive weight are checked.
        stage: name of the stage for messages.
        weights: share of the batches by task; samples of a task with weight 0 are ignored.
        name: name of the argument with the data. For `eval_data` a loss may lack samples, but a loss must use every
            sample.

    Raises:
        ValueError: for such data; the message names every loss or task, missing inputs, and what to do.
    """
    wanted = [loss for loss in LOSS_NAMES if losses.weight(loss) > 0]
    used = {bucket for bucket in set(buckets) if weights is None or weights.get(bucket.task, 0) > 0}
    missing = [] if name == "eval_data" else [loss for loss in wanted if not any(allows(b, loss) for b in used)]
    if missing:
        raise ValueError(
            f"`{name}`: no sample allows {_join(missing, wanted, stage)}. "
            + " ".join(f"{_describe(loss, losses)}." for loss in missing)
        )
    useless = sorted({bucket.task for bucket in used if not any(allows(bucket, loss) for loss in wanted)})
    if useless:
        number = sum(bucket.task in useless and not any(allows(bucket, loss) for loss in wanted) for bucket in buckets)
        needs = ", ".join(f"`{'` or `'.join(NEEDED[loss][0])}`" for loss in wanted)
        raise ValueError(
            f"`{name}`: {number} samples of the tasks {', '.join(useless)} allow none of the losses of the stage "
            f"{stage!r} ({', '.join(wanted)}), which need {needs}: remove them"
            + (", or give these tasks the weight 0 in `task_weights`." if name == "data" else ".")
        )


def allows(bucket: Bucket, loss: str) -> bool:
    """Whether the samples of a bucket have the inputs of a loss, one of `LOSS_NAMES`."""
    brings = {name for name, _ in bucket.shapes}
    return any(name in brings for name in NEEDED[loss][0])


def _join(missing: Iterable[str], wanted: Sequence[str], stage: str) -> str:
    missing = list(missing)
    return f"the {' and the '.join(missing)} loss of the stage {stage!r} (which minimises {', '.join(wanted)})"


def _describe(loss: str, losses: OmniVideoLossConfig) -> str:
    inputs, way = NEEDED[loss]
    return (
        f"`losses.{loss}_weight` is {losses.weight(loss):g} and needs `{'` or `'.join(inputs)}`: {way}, or set "
        f"`losses.{loss}_weight` to 0"
    )


__all__ = ["NEEDED", "allows", "check_losses"]
