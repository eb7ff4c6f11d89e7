"""When in a recording weights lie: over time, below its spectrogram, the swapped attention beside the model's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attn_plugins.config.extras import need
from attn_plugins.inspection.alignment import shown

SLICE = 0.025
"""Seconds of sound in a column of the spectrogram, every 10 ms."""
LOWEST = 80.0
"""Decibels below the loudest that the spectrogram shows."""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A recording as a model hears it."""

    samples_T: torch.Tensor = field(repr=False)
    rate: int
    """Samples in a second."""
    seconds: float
    """What the model hears: with the silence that a processor adds."""

    @property
    def lasts(self) -> float:
        """Seconds of sound."""
        return len(self.samples_T) / self.rate

    def times(self, number: int) -> list[float]:
        """Seconds at which the middles of as many frames are."""
        return [(place + 0.5) * self.seconds / number for place in range(number)]

    def tokens(self, number: int) -> list[str]:
        """What as many frames are called: by their time."""
        return [f" {time:.2f}s" for time in self.times(number)]

    def spectrogram(self) -> torch.Tensor:
        """Decibels below the loudest, (frequency, time), from 0 Hz to half the rate."""
        size = min(int(SLICE * self.rate), len(self.samples_T))
        waves = torch.stft(
            self.samples_T.float(),
            n_fft=size,
            hop_length=max(1, int(0.01 * self.rate)),
            window=torch.hann_window(size),
            center=False,
            return_complex=True,
        )
        decibels = 20 * waves.abs().clamp_min(1e-8).log10()
        return (decibels - decibels.max()).clamp_min(-LOWEST)


def over_time(sides: Mapping[str, torch.Tensor], sound: Heard, looking: Sequence[str], title: str) -> Any:
    """A matplotlib figure of weights on frames of sound, below its spectrogram: attentions side by side.

    Shades are of a share against an even one, up to what one pair in a hundred is above, so that a single frame does
    not hide the rest.

    Args:
        sides: by name of an attention the shares, (queries, frames).
        looking: what the queries are called: tokens that are written, or times.

    Raises:
        ValueError: matplotlib is not installed.
    """
    need("matplotlib", "compare")
    from matplotlib.figure import Figure

    keys = next(iter(sides.values())).shape[1]
    heard = sum(time < sound.lasts for time in sound.times(keys))
    most = float(torch.stack(list(sides.values()))[..., :heard].quantile(0.99)) * keys
    high = max(2.0, min(0.17 * len(looking), 9))
    figure = Figure(figsize=(1.6 + 3.6 * len(sides), 2.0 + high), layout="constrained")
    axes = figure.subplots(2, len(sides), sharex=True, sharey="row", squeeze=False, height_ratios=[1.3, high])
    where = {"aspect": "auto", "interpolation": "nearest"}
    spectrogram = sound.spectrogram().flip(0).numpy()
    step = max(1, -(-len(looking) // 48))
    for (above, below), (name, side_qK) in zip(axes.T, sides.items(), strict=True):
        above.imshow(spectrogram, cmap="gray_r", extent=(0, sound.lasts, 0, sound.rate / 2000), **where)
        beyond = float(side_qK[:, heard:].sum(-1).mean())
        above.set_title(f"{name}\n{beyond:.0%} after the end" if heard < keys else name, fontsize=9)
        until = heard * sound.seconds / keys
        shaded = below.imshow(
            side_qK[:, :heard].mul(keys).numpy(),
            extent=(0, until, len(looking) - 0.5, -0.5),
            cmap="viridis",
            vmin=0,
            vmax=most,
            **where,
        )
        below.set_yticks(range(0, len(looking), step), [shown(one) for one in looking][::step], fontsize=8)
        below.set_xlabel("seconds", fontsize=8)
        below.set_xlim(0, sound.lasts)
        for axis in (above, below):
            axis.tick_params(labelsize=8)
    axes[0][0].set_ylabel("kHz", fontsize=8)
    bar = figure.colorbar(shaded, ax=list(axes[1]), pad=0.01, extend="max")
    bar.set_label("times an even share", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
