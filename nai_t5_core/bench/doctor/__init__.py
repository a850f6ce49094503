"""What this machine is, what of ours runs on it, whether it is right and how fast: ``nai-t5 doctor``."""

from nai_t5_core.bench.doctor.examination import Diagnosis, examine_machine
from nai_t5_core.bench.doctor.settings import DoctorSettings

__all__ = ["Diagnosis", "DoctorSettings", "examine_machine"]
