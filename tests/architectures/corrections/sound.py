"""Model types that read sound or time series."""

from typing import Any

CLASSES: dict[str, str] = {}
CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "time_series_transformer": {"prediction_length": 4},
}
