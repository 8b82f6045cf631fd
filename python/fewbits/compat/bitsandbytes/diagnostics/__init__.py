"""``python -m bitsandbytes``."""
