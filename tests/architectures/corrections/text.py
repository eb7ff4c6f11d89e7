"""Model types that read text alone."""

from typing import Any

CLASSES: dict[str, str] = {"reformer": "ReformerModel"}
CONFIGS: dict[str, dict[str, Any]] = {}
