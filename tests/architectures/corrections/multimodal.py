"""Model types that read text together with images, video or sound."""

from typing import Any

CLASSES: dict[str, str] = {}
CONFIGS: dict[str, dict[str, Any]] = {}
