"""The two ways to run the same networks: as the official code does, and as diffusers does."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cascade.sampling.schedule import CosineSchedule, Levels


@dataclass(frozen=True, slots=True)
class Preset:
    """The settings in which the two differ, apart from the source of the noise."""

    shifts: bool  # levels are shifted and the network is told the level; otherwise it is told the time
    rescale: float  # rho of the guidance
    keeps_clean: bool  # the result is the last predicted clean latents, not the latents after the last step

    def levels(self, schedule: CosineSchedule, steps: int, t_start: float = 1.0) -> Levels:
        """Return the noise levels of a run from time `t_start` to 0."""
        return schedule.grid(steps, t_start) if self.shifts else schedule.diffusers_grid(steps, t_start)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "official": Preset(shifts=True, rescale=0.7, keeps_clean=True),
        "diffusers": Preset(shifts=False, rescale=0.0, keeps_clean=False),
    }
)
