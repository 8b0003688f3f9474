"""`create_model_card` and `push_to_hub` of the trainer."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo
from transformers.trainer_utils import (
    HubStrategy,
)

from ...utils.modules import Host, dtype_of
from ...utils.tokens import hub_call
from ..checkpointing.base_formats import in_formats_of_base
from ..reporting import publishing


class OmniVideoPushMixin(Host):
    """Model card and push of [`OmniVideoTrainer`], which replace those of transformers."""

    args: Any

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """
        Write a model's files, with what was not trained in the formats of the base, see [`in_formats_of_base`].

        transformers pickles the arguments beside them, with the token that pushes: it is left out.
        """
        args = self.args
        if not self._writing and not args.training_stage.lora:
            model = self.accelerator.unwrap_model(self.model)
            weights = model.state_dict() if state_dict is None else state_dict
            base, dtype = model.config._name_or_path, dtype_of(args.result_dtype)
            state_dict = in_formats_of_base(weights, base, self.base_revision, set(self.trained_names), dtype)
        self.args = copy.copy(args)
        self.args.hub_token = None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args

    def create_model_card(self, dataset: str | list[str] | None = None, **_: Any) -> None:
        """
        Write the model card of `output_dir`; a card that a person wrote or edited is not replaced.

        The method of transformers would replace it, and sets no `library_name`, `pipeline_tag` and `base_model`.

        Args:
            dataset: names of the data.
        """
        if self.is_world_process_zero():
            publishing.write_card(cast("Any", self), [dataset] if isinstance(dataset, str) else dataset)

    @hub_call
    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,  # noqa: ARG002 - the push always waits for its commit
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
            token: access token of the Hub. Default: `args.hub_token`.
            revision: branch. Default: `args.hub_revision`.
            dataset: names of the data, for the card.
            base: folder or Hub repository of components that the model does not have, such as the VAE. Default: the
                base model of the run.

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
