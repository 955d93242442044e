"""The configs of other trainers, read as those trainers read them, and turned into fluxq's settings."""
