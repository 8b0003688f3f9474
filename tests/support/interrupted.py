"""Saves that are killed halfway."""

import os
from pathlib import Path

import pytest

from omni_video_hf.hub.repository import staged


def interrupt_save(folder: Path) -> None:
    """Leave `folder` as a save does that was killed between two renames."""
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        replace, seen = Path.replace, []

        def stop(self: Path, target: Path) -> Path:
            seen.append(target)
            if len(seen) == 8:
                os._exit(0)
            return replace(self, target)

        pid = os.fork()
        if pid == 0:
            patch.setattr(Path, "replace", stop)
            with staged(folder, folders=["", "a", "b"]) as new:
                (new / "config.json").write_text('{"model_type": "omni_video", "new": 1}')
                for name in ("a", "b"):
                    (new / name).mkdir()
                    for number in range(5):
                        (new / name / f"{number}.txt").write_text("new")
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        raise KeyboardInterrupt
