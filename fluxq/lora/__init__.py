"""`fluxq lora`: what can be done to LoRA files, one command a file."""
