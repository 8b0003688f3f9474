"""Which losses the samples of a data set allow: known from its buckets, before anything is loaded."""

from collections.abc import Iterable, Mapping, Sequence

from ...diffusion.losses import LOSS_NAMES, OmniVideoLossConfig
from .batch_sampler import Bucket

# Loss -> the inputs of a sample of which it needs one, and how data get them.
NEEDED = {
    "answer": (("labels",), "compute features with `--instruction tokens`, or add `questions`"),
    "alignment": (("target_features",), "compute features with `--target-encoder`"),
    "text_alignment": (("target_prompt_embeds", "prompt_embeds"), "add samples that draw"),
    "flow_matching": (("latents",), "add samples that draw"),
}


def check_losses(
    buckets: Sequence[Bucket],
    losses: OmniVideoLossConfig,
    stage: str,
    weights: Mapping[str, float] | None = None,
    name: str = "data",
) -> None:
    """
    Refuse data without a sample for a loss that is to be minimised, and samples from which nothing is learned.

    Args:
        buckets: of all samples.
        losses: those with a positive weight count.
        stage: for the error.
        weights: share of the batches by task; samples of a task with 0 do not count.
        name: what the user calls the data. Of `eval_data` no loss is demanded, but every sample must allow one.

    Raises:
        ValueError: names every such loss or task, what is missing, and what to do.
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
    """Whether the samples of a bucket bring what one of `LOSS_NAMES` needs."""
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
