"""ostris' ai-toolkit: a job for its sd_trainer, in YAML or JSON, as fluxq's settings."""

from .job import read_job

__all__ = ["read_job"]
