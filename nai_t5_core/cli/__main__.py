"""``python -m nai_t5_core.cli``."""

from nai_t5_core.cli import main

main()
