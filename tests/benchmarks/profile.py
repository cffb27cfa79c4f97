"""Where the time of a step goes, by kinds of operators."""

import os
from collections import Counter
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its notes would tear the progress bar

MATRIX, ATTENTION = "matrix products", "attention"
KINDS = (
    MATRIX,
    ATTENTION,
    "depthwise convolution",
    "norms and their sums",
    "GELU",
    "sums and products",
    "copies",
    "other",
)

_KIND_OF = {
    "mkldnn::_linear_pointwise": MATRIX,  # with the GELU or the addition that it ends with
    "aten::addmm": MATRIX,
    "aten::mm": MATRIX,
    "aten::mv": MATRIX,
    "aten::addmv": MATRIX,
    "aten::_scaled_dot_product_flash_attention_for_cpu": ATTENTION,
    "aten::baddbmm": ATTENTION,  # nothing else multiplies batches
    "aten::amax": ATTENTION,
    "aten::_softmax": ATTENTION,
    "aten::bmm": ATTENTION,
    "aten::mkldnn_convolution": "depthwise convolution",
    "aten::native_layer_norm": "norms and their sums",
    "aten::linalg_vector_norm": "norms and their sums",
    "aten::pow": "norms and their sums",
    "aten::pow_": "norms and their sums",
    "aten::sum": "norms and their sums",
    "aten::gelu": "GELU",
    "aten::add": "sums and products",
    "aten::add_": "sums and products",
    "aten::mul": "sums and products",
    "aten::mul_": "sums and products",
    "aten::div": "sums and products",
    "aten::addcmul": "sums and products",
    "aten::copy_": "copies",
    "aten::cat": "copies",
}


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Part of the operators' own time that each kind takes, 0..1."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        work()
    spent: Counter[str] = Counter()
    for event in recorded.key_averages():
        spent[_KIND_OF.get(event.key, "other")] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: spent[kind] / whole for kind in KINDS}
