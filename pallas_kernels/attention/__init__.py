"""Flash attention over one or two key/value segments, with forward- and reverse-mode derivatives."""

from pallas_kernels.attention.api import IMPLEMENTATIONS, attention
from pallas_kernels.attention.autodiff import LSE_NAME, OUTPUT_NAME
from pallas_kernels.attention.chunk_masks import BlockCausal, Captioned, TeacherForcing
from pallas_kernels.attention.mask import Cached, Full, Intervals, Mask

__all__ = [
    "IMPLEMENTATIONS",
    "LSE_NAME",
    "OUTPUT_NAME",
    "BlockCausal",
    "Cached",
    "Captioned",
    "Full",
    "Intervals",
    "Mask",
    "TeacherForcing",
    "attention",
]
