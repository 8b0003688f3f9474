"""Model card and push of a trainer, complete and checked."""

from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo
from transformers.trainer_utils import (
    HubStrategy,
)

from ...utils.modules import Host
from ..reporting import publishing


class OmniVideoPushMixin(Host):
    """What [`OmniVideoTrainer`] does instead of transformers' card and push."""

    def create_model_card(self, dataset: str | list[str] | None = None, **_: Any) -> None:
        """
        Write the card of `output_dir` from what the run knows; a card that a person wrote or edited stays.

        transformers' own would replace it, and knows neither `library_name` nor `pipeline_tag` nor `base_model`.

        Args:
            dataset: names of the data.
        """
        if self.is_world_process_zero():
            publishing.write_card(cast("Any", self), [dataset] if isinstance(dataset, str) else dataset)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,  # noqa: ARG002 - one commit, which is worth waiting for
        token: str | None = None,
        revision: str | None = None,
        dataset: str | list[str] | None = None,
        base: str | Path | None = None,
        **_: Any,
    ) -> CommitInfo | None:
        """
        Push the result with its card, in one commit: a complete repository, or the LoRA of the `lora` stage.

        Args:
            commit_message: title of the commit.
            token: `args.hub_token` by default.
            revision: branch; `args.hub_revision` by default.
            dataset: names of the data, for the card.
            base: folder or Hub repository to take from what the model does not have, such as the VAE; by default the
                one that training began with.

        Returns:
            The commit on the main process, `None` on the others.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(dataset=dataset)
        settings = {"commit_message": commit_message, "token": token, "revision": revision}
        return publishing.push(cast("Any", self), Path(self.args.output_dir), base, **settings)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:  # noqa: ARG002 - the model in memory is the same
        if not self._writing and self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub(commit_message=f"Training in progress, step {self.state.global_step}")


__all__ = ["OmniVideoPushMixin"]
