"""What a job will cost: predicted device seconds, learned from the jobs before it."""

from app.schemas import GenerationRequest

LEARNING_RATE = 0.2
DECODER_WEIGHT = 0.5  # a step of the decoder against one of the prior, until measured apart
FIRST_GUESS_SECONDS = 5.0  # of a default picture, before anything has been measured


class CostModel:
    """Seconds = units x rate. The rate follows what is measured."""

    def __init__(self) -> None:
        self._seconds_per_unit: float | None = None

    def units(self, request: GenerationRequest) -> float:
        """Work of a request in arbitrary units: rows x steps x pixels."""
        prior = _rows(request.prior_guidance_scale) * request.prior_num_inference_steps
        decoder = _rows(request.decoder_guidance_scale) * request.decoder_num_inference_steps
        pixels = request.width * request.height
        return request.num_images * pixels * (prior + DECODER_WEIGHT * decoder)

    def learn(self, units: float, seconds: float) -> None:
        """Take note that work of `units` took `seconds`."""
        rate = seconds / units
        if self._seconds_per_unit is None:
            self._seconds_per_unit = rate
        else:
            self._seconds_per_unit += LEARNING_RATE * (rate - self._seconds_per_unit)

    def seconds(self, units: float, num_jobs: int) -> float:
        """Predicted time for work of `units` in `num_jobs` jobs."""
        if self._seconds_per_unit is None:
            return FIRST_GUESS_SECONDS * num_jobs
        return units * self._seconds_per_unit


def _rows(guidance_scale: float) -> int:
    """Rows of one picture in a batch: with guidance also the unconditional one."""
    return 2 if guidance_scale > 1 else 1
