"""``python -m vgf_fast.cli``."""

from vgf_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
