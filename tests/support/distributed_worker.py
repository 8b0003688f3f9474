"""
One process of a distributed run: `distributed_worker.py FOLDER CASE`, under `accelerate launch` or alone.

CASE is a JSON object: `settings` of the trainer, `tasks` of the data, and `fsdp`. Writes the log, and the parameters
after training, from the main process.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tiny
import training
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file

from omni_video_hf.training import OmniVideoTrainer
from omni_video_hf.training.train import leave_process_group


class Sharded(OmniVideoTrainer):
    """With accelerate's FSDP2, which accelerate switches on for GPUs only though gloo can do it."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
        )
        self.is_fsdp_enabled = True


def main(folder: Path, case: dict) -> None:
    """Train, and write what came out."""
    tasks = case.get("tasks", ["v2v"])
    size = case["settings"]["per_device_train_batch_size"]
    # Eight samples a task, in batches of one task, the tasks in turn.
    samples = [
        training.sample(task, number) if task == "understand" else training.instructed(task, number)
        for start in range(0, 8, size)
        for task in tasks
        for number in range(start, start + size)
    ]
    sampler = training.BatchesInOrder([list(range(i, i + size)) for i in range(0, len(samples), size)])
    kind = Sharded if case.get("fsdp") else OmniVideoTrainer
    run = training.trainer(folder, samples, tiny.model(), sampler, kind=kind, stage="joint", **case["settings"])
    run.train(resume_from_checkpoint=case.get("resume"))
    weights = {name: value.detach().clone().contiguous() for name, value in run.gather_trained().items()}
    if run.is_world_process_zero():
        save_file(weights, folder / "weights.safetensors")
        (folder / "log.json").write_text(json.dumps(run.state.log_history))
    leave_process_group(run)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
