"""Model types that read images or video, without text."""

from typing import Any

CLASSES: dict[str, str] = {}
CONFIGS: dict[str, dict[str, Any]] = {}
