"""``nai-t5 doctor``: describes the machine, says which backends run on it, checks their results and times them."""

from nai_t5_core.bench.doctor.examination import Diagnosis, examine_machine
from nai_t5_core.bench.doctor.settings import DoctorSettings

__all__ = ["Diagnosis", "DoctorSettings", "examine_machine"]
