"""kohya's sd-scripts: what flux_train_network.py is asked, read as it reads it."""

from .command import read_command
from .dataset import read_dataset
from .objective import loss, timesteps
from .prompts import parse_prompt

__all__ = ["loss", "parse_prompt", "read_command", "read_dataset", "timesteps"]
